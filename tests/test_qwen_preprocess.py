"""Log-mel frames and patches against the stock preprocessing."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omni_clips import stock_features

from omnimem_train.errors import UserError
from omnimem_train.models.preprocess import (
    MelStream,
    Settings,
    patchify,
    peak_log_mel,
    read_settings,
    resize,
    scale_log_mel,
    smart_resize,
)


@pytest.mark.parametrize("seed", range(12))
def test_log_mel_equals_the_stock_extractor(seed: int) -> None:
    draw = random.Random(seed)
    n = draw.choice([1, 100, 200, 201, 400, draw.randrange(1, 2000), draw.randrange(2000, 90000)])
    samples = np.random.RandomState(seed).randn(n).astype(np.float32) * 10 ** draw.uniform(-3, 0)
    samples[n // 2 :] *= draw.choice([1, 1e-6])
    cuts = sorted(draw.randrange(0, n + 1) for _ in range(4))
    pieces = np.split(samples, cuts)
    stream = MelStream(Settings())
    log_mel = torch.cat([*(stream.push(piece) for piece in pieces), stream.finish()], 1)
    found = scale_log_mel(log_mel, peak_log_mel(pieces))
    torch.testing.assert_close(found, stock_features(samples), rtol=0, atol=1e-5)


def test_peak_of_a_clip_that_ends_loud() -> None:
    """The stock spectrogram sees the last samples in frames that no token is made of; its floor comes from there."""
    samples = np.zeros(1600, dtype=np.float32)
    samples[-3:] = 1.0
    stream = MelStream(Settings())
    log_mel = torch.cat([stream.push(samples), stream.finish()], 1)
    assert peak_log_mel([samples]) > float(log_mel.max()) + 1
    torch.testing.assert_close(scale_log_mel(log_mel, peak_log_mel([samples])), stock_features(samples))


def test_frame_sizes_equal_stock() -> None:
    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as theirs
    except ImportError:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as theirs
    draw = random.Random(0)
    for _ in range(300):
        height, width = draw.randrange(1, 2000), draw.randrange(1, 2000)
        low = draw.randrange(784, 20000)
        high = draw.randrange(low + 30000, 900000)
        if max(height, width) / min(height, width) > 200:
            continue
        expected = theirs(height, width, factor=28, min_pixels=low, max_pixels=high)
        assert smart_resize(height, width, Settings(min_pixels=low, max_pixels=high)) == expected


def test_patches_hold_the_pixels_they_should() -> None:
    settings = Settings(patch=2, merge=2)
    frames = torch.randint(0, 256, (4, 3, 8, 12), dtype=torch.uint8)
    patches, grid = patchify(frames, settings)
    assert grid == (2, 4, 6)
    mean, std = torch.tensor(settings.mean), torch.tensor(settings.std)
    values = (frames / 255 - mean[:, None, None]) / std[:, None, None]
    row = 0
    for t in range(2):
        for token_row in range(2):
            for token_column in range(3):
                for y in range(2):
                    for x in range(2):
                        top, left = 2 * (2 * token_row + y), 2 * (2 * token_column + x)
                        expected = values[2 * t : 2 * t + 2, :, top : top + 2, left : left + 2].transpose(0, 1)
                        torch.testing.assert_close(patches[row], expected.reshape(-1), rtol=0, atol=1e-5)
                        row += 1


def test_resize_is_bicubic_with_antialiasing() -> None:
    image = pytest.importorskip("PIL.Image")
    frame = np.random.RandomState(0).randint(0, 256, (90, 150, 3), dtype=np.uint8)
    expected = np.asarray(image.fromarray(frame).resize((56, 28), image.Resampling.BICUBIC)).astype(int)
    found = resize(torch.from_numpy(frame)[None], 28, 56)[0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(found - expected).max() <= 1


def test_a_thin_frame_is_refused() -> None:
    with pytest.raises(UserError, match="ratio at most 200"):
        smart_resize(2, 500, Settings())


@pytest.mark.parametrize(
    ("files", "limits"),
    [
        ({"preprocessor_config.json": {"min_pixels": 3136, "max_pixels": 12845056}}, (100352, 602112)),
        ({"preprocessor_config.json": {"min_pixels": 784, "max_pixels": 3136}}, (784, 3136)),
        ({"preprocessor_config.json": {"min_pixels": 3136, "max_pixels": 200000}}, (100352, 200000)),
        (
            {"processor_config.json": {"video_processor": {"size": {"shortest_edge": 3136, "longest_edge": 50176}}}},
            (3136, 50176),
        ),
        (
            {
                "preprocessor_config.json": {"min_pixels": 3136, "max_pixels": 12845056},
                "video_preprocessor_config.json": {"min_pixels": 784, "max_pixels": 1568},
            },
            (784, 1568),
        ),
    ],
)
def test_pixel_limits_of_checkpoints(tmp_path: Path, files: dict[str, Any], limits: tuple[int, int]) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    settings = read_settings(str(tmp_path))
    assert (settings.min_pixels, settings.max_pixels) == limits
