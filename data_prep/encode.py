"""Arrays to a small mp4 (H.264 and AAC) with PyAV."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

SAMPLES_AT_ONCE = 1024  # an AAC frame


def write_clip(
    path: Path,
    blocks: Iterable[np.ndarray],
    samples: np.ndarray | None,
    fps: int,
    sampling_rate: int,
    comment: str = "",
) -> None:
    """Write frames, in blocks of (n, height, width, 3) uint8, and mono samples (m,) float32 as an mp4.

    `comment` goes into its metadata. The file is written aside and renamed, so a name ending in .mp4 is always a whole
    clip; what was begun is removed if it fails. A key frame every 4 seconds, no B-frames, one thread: the same arrays
    and the same FFmpeg give the same bytes.

    Raises: OSError for a folder that cannot be written or is full (hence the detour through memory: PyAV drops that).
    """
    memory = io.BytesIO()
    with av.open(memory, "w", format="mp4") as out:
        out.metadata["comment"] = comment
        sound = None if samples is None else _Sound(out, samples, sampling_rate)
        video, shown = None, 0
        for frames in blocks:
            if video is None:
                video = _video(out, fps, frames.shape[1], frames.shape[2])
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
                picture.pts, picture.time_base = shown, Fraction(1, fps)
                out.mux(video.encode(picture))
                shown += 1
            if sound is not None:
                sound.write(until_s=shown / fps)
        if video is not None:
            out.mux(video.encode())
        if sound is not None:
            sound.finish()
    aside = path.with_suffix(".part")
    try:
        aside.write_bytes(memory.getbuffer())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def comment_of(path: Path) -> str | None:
    """The comment a clip was written with; None if there is no such clip, or no whole one."""
    if not path.is_file():
        return None
    try:
        with av.open(str(path)) as found:
            return found.metadata.get("comment", "")
    except av.FFmpegError:
        return None


def _video(out: av.container.OutputContainer, fps: int, height: int, width: int) -> av.VideoStream:
    options = {"crf": "16", "preset": "veryfast", "bf": "0", "threads": "1"}
    video = out.add_stream("libx264", rate=fps, options=options)
    video.width, video.height, video.pix_fmt, video.gop_size = width, height, "yuv420p", 4 * fps
    video.time_base = Fraction(1, fps)
    return video


class _Sound:
    """The sound of a clip, written beside the picture as it goes on, so that a reader never has to look far ahead."""

    def __init__(self, out: av.container.OutputContainer, samples: np.ndarray, rate: int) -> None:
        self._out, self._samples, self._rate, self._done = out, samples, rate, 0
        # At this rate faint sounds survive (13 dB at worst); FFmpeg's quick coder is also the more faithful one here.
        self._stream = out.add_stream("aac", rate=rate, layout="mono", options={"aac_coder": "fast"})
        self._stream.bit_rate = min(64000, 6 * rate)  # AAC takes no more than 6 bits a sample

    def write(self, until_s: float) -> None:
        """Encode whole AAC frames up to a time."""
        while self._done + SAMPLES_AT_ONCE <= min(until_s * self._rate, len(self._samples)):
            self._encode(SAMPLES_AT_ONCE)

    def finish(self) -> None:
        """Encode what is left."""
        while self._done < len(self._samples):
            self._encode(SAMPLES_AT_ONCE)
        self._out.mux(self._stream.encode())

    def _encode(self, n: int) -> None:
        part = self._samples[None, self._done : self._done + n]
        block = av.AudioFrame.from_ndarray(np.ascontiguousarray(part), format="fltp", layout="mono")
        block.sample_rate, block.pts, block.time_base = self._rate, self._done, Fraction(1, self._rate)
        self._out.mux(self._stream.encode(block))
        self._done += part.shape[1]
