"""Writes a clip to measure reading with: make_clip.py OUT.mp4 [--seconds 1200] [--size 640x360] [--fps 25]

H.264 and AAC. The camera pans over a texture while blocks move on their own ways, so most of a frame is predicted with
motion, as in real clips; but the bit rate is held low (about 75 kbit/s in all, 11 MB for 20 minutes), so decoding costs
less than for a real clip of that size. Needs PyAV.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

RATE = 16000


def canvas(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth texture (height, width, 3) uint8 that continues at its borders."""
    generator, total = np.random.default_rng(seed), np.zeros((height, width, 3))
    y, x = np.mgrid[:height, :width]
    for _ in range(24):
        down, right = generator.integers(1, 7, 2)
        phase = generator.uniform(0, 2 * np.pi, 3)
        wave = 2 * np.pi * (down * y / height + right * x / width)
        total += np.sin(wave[..., None] + phase) / (down + right)
    return np.uint8(128 + 100 * total / np.abs(total).max())


def frames(n: int, height: int, width: int) -> Iterator[np.ndarray]:
    """(height, width, 3) uint8, one after the other."""
    whole = canvas(2 * height, 2 * width)
    whole = np.concatenate([whole, whole[:height]])
    whole = np.concatenate([whole, whole[:, :width]], axis=1)
    for k in range(n):
        top, left = k // 2 % (2 * height), k % (2 * width)
        frame = whole[top : top + height, left : left + width].copy()
        for block in range(3):
            row = int((height - 48) * (0.5 + 0.5 * np.sin(k / (70 + 9 * block) + block)))
            column = int((width - 48) * (0.5 + 0.5 * np.cos(k / (110 + 13 * block))))
            frame[row : row + 48, column : column + 48] = (40 + 80 * block, 200 - 60 * block, k // 250 * 37 % 255)
        yield frame


def sounds(seconds: float) -> Iterator[np.ndarray]:
    """(1, 1024) float32 pieces: two tones that change every second, and a little noise."""
    generator = np.random.default_rng(1)
    for start in range(0, round(seconds * RATE), 1024):
        t = (start + np.arange(1024)) / RATE
        note = np.floor(t)
        wave = np.sin(2 * np.pi * (200 + 40 * (note % 13)) * t) + np.sin(2 * np.pi * (500 + 70 * (note % 7)) * t)
        yield (0.2 * wave + 0.005 * generator.standard_normal(1024)).astype(np.float32)[None]


def write(path: Path, seconds: float, width: int, height: int, fps: int) -> None:
    """Picture and sound side by side, a second of each in turn."""
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=fps, options={"preset": "veryfast", "g": str(10 * fps)})
        video.width, video.height, video.pix_fmt, video.bit_rate = width, height, "yuv420p", 48000
        sound = out.add_stream("aac", rate=RATE, layout="mono")
        sound.bit_rate = 24000
        heard, n_heard = sounds(seconds), 0
        for k, picture in enumerate(frames(round(seconds * fps), height, width)):
            shown = av.VideoFrame.from_ndarray(picture, format="rgb24")
            shown.pts, shown.time_base = k, Fraction(1, fps)
            out.mux(video.encode(shown))
            while n_heard * 1024 / RATE < (k + 1) / fps and (samples := next(heard, None)) is not None:
                block = av.AudioFrame.from_ndarray(samples, "fltp", "mono")
                block.sample_rate, block.time_base, block.pts = RATE, Fraction(1, RATE), 1024 * n_heard
                out.mux(sound.encode(block))
                n_heard += 1
        out.mux(video.encode())
        out.mux(sound.encode())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=1200)
    parser.add_argument("--size", default="640x360")
    parser.add_argument("--fps", type=int, default=25)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    width, height = (int(n) for n in args.size.split("x"))
    write(args.out, args.seconds, width, height, args.fps)
    print(f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
