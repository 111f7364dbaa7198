"""Arrays to a small mp4 (H.264 and AAC) with PyAV."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def write_clip(
    path: Path, frames: np.ndarray, samples: np.ndarray | None, fps: int, sampling_rate: int, comment: str = ""
) -> None:
    """Write frames (n, height, width, 3) uint8 and mono samples (m,) float32 as an mp4 with `comment` in its metadata.

    The file is written aside and renamed, so a name ending in .mp4 is always a whole clip. A key frame every 4 seconds;
    no B-frames; one thread, so the same arrays and the same FFmpeg give the same bytes.
    """
    aside = path.with_suffix(".part")
    with av.open(str(aside), "w", format="mp4") as out:
        out.metadata["comment"] = comment
        video = out.add_stream(
            "libx264", rate=fps, options={"crf": "16", "preset": "veryfast", "bf": "0", "threads": "1"}
        )
        video.width, video.height, video.pix_fmt, video.gop_size = frames.shape[2], frames.shape[1], "yuv420p", 4 * fps
        video.time_base = Fraction(1, fps)
        if samples is not None:
            sound = out.add_stream("aac", rate=sampling_rate, layout="mono")
            sound.bit_rate = 64000
        for k, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = k, Fraction(1, fps)
            out.mux(video.encode(picture))
        out.mux(video.encode())
        if samples is not None:
            for first in range(0, len(samples), 1024):
                block = av.AudioFrame.from_ndarray(samples[None, first : first + 1024], format="fltp", layout="mono")
                block.sample_rate, block.pts, block.time_base = sampling_rate, first, Fraction(1, sampling_rate)
                out.mux(sound.encode(block))
            out.mux(sound.encode())
    os.replace(aside, path)


def comment_of(path: Path) -> str | None:
    """The comment a clip was written with; None if there is no such clip."""
    if not path.is_file():
        return None
    with av.open(str(path)) as found:
        return found.metadata.get("comment", "")
