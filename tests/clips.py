"""Small media files for tests, written with PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

RATE = 16000


def numbered_frames(n: int, height: int = 48, width: int = 64) -> np.ndarray:
    """(n, height, width, 3) uint8: a grey that names the frame (see `frame_numbers`), and a bright top left corner."""
    frames = np.empty((n, height, width, 3), np.uint8)
    frames[:] = (30 + 8 * np.arange(n) % 200)[:, None, None, None]
    frames[:, : height // 4, : width // 4] = 255
    return frames


def frame_numbers(frames: np.ndarray) -> list[int]:
    """Which of `numbered_frames` (up to 25) these are, after any codec, read in the middle of the picture."""
    height, width = frames.shape[1:3]
    middle = frames[:, height // 2 - 4 : height // 2 + 4, width // 2 - 4 : width // 2 + 4].mean((1, 2, 3))
    return [round(float(m - 30) / 8) for m in middle]


def tone(seconds: float, rate: int = RATE, hz: float = 440.0) -> np.ndarray:
    """(n,) float32 sine whose loudness rises with time, so that a shift shows."""
    t = np.arange(round(seconds * rate)) / rate
    return (np.sin(2 * np.pi * hz * t) * (0.1 + 0.5 * t / max(seconds, 1e-9))).astype(np.float32)


def write_media(
    path: Path,
    frames: np.ndarray | None = None,
    fps: Fraction | float = 4,
    samples: np.ndarray | None = None,
    rate: int = RATE,
    *,
    frame_times: Sequence[float] | None = None,
    sound_start_s: float = 0.0,
    options: dict[str, str] | None = None,
    stream_options: dict[str, str] | None = None,
    codec: str = "libx264",
) -> Path:
    """Write a file with a picture (H.264), a sound (AAC; (m,) mono or (2, m) stereo), or both.

    `frame_times` (multiples of 1 ms) makes the frame rate variable; `sound_start_s` delays the sound track.
    """
    with av.open(str(path), "w", options=options or {}) as out:
        encoders = []
        if frames is not None:
            rate_v = Fraction(fps).limit_denominator(1001)
            quality = {"crf": "12", "preset": "veryfast"} if codec in ("libx264", "libx265") else {}
            video = out.add_stream(codec, rate=rate_v, options={**quality, **(stream_options or {})})
            video.width, video.height = frames.shape[2], frames.shape[1]
            video.pix_fmt = "yuv420p" if frames.shape[1] % 2 == frames.shape[2] % 2 == 0 else "yuv444p"
            if frame_times is not None:
                video.codec_context.time_base = video.time_base = Fraction(1, 1000)
            encoders.append((video, _pictures(frames, rate_v, frame_times)))
        if samples is not None:
            sound = out.add_stream("aac", rate=rate, layout="mono" if samples.ndim == 1 else "stereo")
            encoders.append((sound, _sounds(samples, rate, sound_start_s)))
        for stream, items in encoders:
            for item in items:
                out.mux(stream.encode(item))
            out.mux(stream.encode())
    return path


def _pictures(frames: np.ndarray, fps: Fraction, times: Sequence[float] | None):
    for k, frame in enumerate(frames):
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        if times is None:
            picture.pts, picture.time_base = k, 1 / fps
        else:
            picture.pts, picture.time_base = round(times[k] * 1000), Fraction(1, 1000)
        yield picture


def _sounds(samples: np.ndarray, rate: int, start_s: float):
    layout = "mono" if samples.ndim == 1 else "stereo"
    samples = np.atleast_2d(samples)
    for first in range(0, samples.shape[1], 1024):
        block = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[:, first : first + 1024]), "fltp", layout)
        block.sample_rate, block.time_base = rate, Fraction(1, rate)
        block.pts = first + round(start_s * rate)
        yield block
