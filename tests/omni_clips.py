"""Made-up clips for the tests of Qwen2.5-Omni."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import WhisperFeatureExtractor

from omnimem_train.models.interface import MediaEncoder, MediaInfo, MediaWindow, StreamingModel, TokenBlock

RATE = 16000


class Clip:
    """A made-up file: noise pictures and noise sound, cut into windows as a reader would."""

    def __init__(
        self,
        seconds: float,
        fps: float,
        *,
        size: tuple[int, int] = (60, 90),
        video: bool = True,
        audio: bool = True,
        picture_s: float | None = None,
        seed: int = 0,
    ) -> None:
        draw = np.random.RandomState(seed)
        n = max(1, math.ceil((picture_s or seconds) * fps - 1e-9))
        self.frames = draw.randint(0, 256, (n, *size, 3), dtype=np.uint8) if video else None
        loudness = draw.uniform(0.001, 0.3, math.ceil(seconds * 4)).repeat(RATE // 4)
        n_samples = int(seconds * RATE)
        self.samples = (draw.randn(n_samples) * loudness[:n_samples]).astype(np.float32) if audio else None
        self.seconds, self.fps = seconds, fps
        self.info = MediaInfo(Path("made-up"), seconds, video, audio, size[1], size[0], 25.0, RATE)

    def windows(self, window_s: float) -> Iterator[MediaWindow]:
        for k in range(math.ceil(self.seconds / window_s)):
            start, end = k * window_s, min((k + 1) * window_s, self.seconds)
            frames = samples = None
            if self.frames is not None:
                frames = self.frames[[i for i in range(len(self.frames)) if start <= i / self.fps < end]]
            if self.samples is not None:
                samples = self.samples[round(start * RATE) : round(end * RATE)]
            yield MediaWindow(start, end, frames, samples, end >= self.seconds)


def run(model: StreamingModel, clip: Clip, windows_at_once: int = 1, **options: Any) -> tuple[TokenBlock, MediaEncoder]:
    """Everything up to the media's end, and the encoder there."""
    encoder = model.open(clip.info, clip.fps, **options)
    blocks = [encoder.start()]
    for window in clip.windows(windows_at_once * model.window_s(clip.fps)):
        if (block := encoder.push(window)) is not None:
            blocks.append(block)
    if (block := encoder.finish()) is not None:
        blocks.append(block)
    return TokenBlock.cat(blocks), encoder


def stock_features(samples: np.ndarray) -> Tensor:
    """Log-mel (128, frames) by the stock extractor; clips up to 30 s."""
    extractor = WhisperFeatureExtractor(feature_size=128, chunk_length=30, return_attention_mask=True)
    out = extractor(samples, sampling_rate=RATE, padding="max_length", return_attention_mask=True, return_tensors="pt")
    return out["input_features"][0][:, out["attention_mask"][0].bool()]
