"""From decoded frames and samples to what the encoders take, equal to the public preprocessing.

The order of floating-point operations is the public one wherever a rounding depends on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from omnimem_train.errors import UserError

SAMPLING_RATE = 16000
WINDOW_S = 30
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT = 200


@dataclass(frozen=True)
class PictureRules:
    """How a backbone sees frames.

    Attributes:
        patch, merge, pairing: side of a patch in pixels, patches a side of a token, frames of a pair.
        mean, std: per colour, of values in [0, 1].
        whole_clip: the pixel limits are for the clip (Qwen3-VL) and not for a frame (Qwen2.5-VL).
    """

    patch: int
    merge: int
    pairing: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    whole_clip: bool


@dataclass(frozen=True)
class Sampling:
    """Which frames are taken and how large they are shown.

    The defaults are those of the published inference command: a frame each 0.1 s, 16 to 768 of them, at most 61,250
    pixels a frame when the maximum is reached.
    """

    interval_s: float = 0.1
    min_frames: int = 16
    max_frames: int = 768
    max_frame_pixels: int = 61250
    min_pixels: int = 3136


def frame_indices(n_frames: int, fps: float, sampling: Sampling) -> np.ndarray:
    """Indices of the frames taken: evenly spaced from first to last, truncated, duplicates dropped.

    round(duration / interval) of them (half to even), held between minimum and maximum.
    """
    wanted = round(n_frames / fps / sampling.interval_s)
    wanted = min(max(wanted, sampling.min_frames), sampling.max_frames)
    return _even(n_frames, wanted)


def fallback_frame_indices(n_frames: int, fps: float, sampling: Sampling) -> np.ndarray:
    """What the public code takes with its fallback decoder (decord): each round(fps * interval)-th frame, minimum
    ignored; evenly spaced only above the maximum."""
    step = max(1, round(fps * sampling.interval_s))
    taken = np.arange(0, n_frames, step)
    return _even(n_frames, sampling.max_frames) if len(taken) > sampling.max_frames else taken


def _even(n_frames: int, wanted: int) -> np.ndarray:
    return np.unique(np.linspace(0, n_frames - 1, wanted).astype(np.int64))


def seconds_per_pair(n_frames: int, fps: float, taken: int, pairing: int = 2) -> float:
    """Seconds a frame pair stands for: 2 * duration / frames taken."""
    return pairing / (taken / (n_frames / fps))


def pair_times(indices: np.ndarray, fps: float, pairing: int = 2) -> list[float]:
    """Mean time of each pair's frames in seconds; an odd last frame is doubled."""
    times = [int(i) / fps for i in indices]
    times += times[-1:] * (-len(times) % pairing)
    return [(times[i] + times[i + pairing - 1]) / 2 for i in range(0, len(times), pairing)]


def pixel_budget(taken: int, sampling: Sampling) -> float:
    """Pixels a frame may have: the setting if the maximum number of frames was taken, else 0.95 of what all frames may
    have together, shared among those taken. Short clips are therefore shown much larger."""
    if taken >= sampling.max_frames:
        return sampling.max_frame_pixels
    return sampling.max_frame_pixels * (0.95 * sampling.max_frames / taken)


def resized(height: int, width: int, taken: int, sampling: Sampling, rules: PictureRules) -> tuple[int, int]:
    """Height and width in pixels after resizing: multiples of a token's side, within the pixel limits.

    Source: Qwen2-VL (arXiv 2409.12191). With `rules.whole_clip` the limits hold for all frames together, and the
    number of frames is rounded to the pairing for the test alone.

    Raises:
        UserError: a frame more than 200 times as long as wide.
    """
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise UserError(
            f"a frame of {width}x{height} pixels",
            f"sides may differ by a factor of at most {MAX_ASPECT}",
            "crop the video",
        )
    side = rules.patch * rules.merge
    frames, count = 1, 1
    most: float = pixel_budget(taken, sampling)
    if rules.whole_clip:
        frames, count = taken, round(taken / rules.pairing) * rules.pairing
        most = taken * sampling.max_frame_pixels
    h, w = (max(side, round(x / side) * side) for x in (height, width))
    if count * h * w > most:
        shrink = math.sqrt(frames * height * width / most)
        h, w = (max(side, math.floor(x / shrink / side) * side) for x in (height, width))
    elif count * h * w < sampling.min_pixels:
        grow = math.sqrt(sampling.min_pixels / (frames * height * width))
        h, w = (math.ceil(x * grow / side) * side for x in (height, width))
    return h, w


def resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """(n, 3, h, w) uint8 -> (n, 3, *size) uint8, bicubic with antialiasing, computed in uint8."""
    if frames.shape[-2:] == size:
        return frames
    return F.interpolate(frames.cpu(), size=size, mode="bicubic", antialias=True, align_corners=False)


def patches(frames: Tensor, rules: PictureRules) -> tuple[Tensor, tuple[int, int, int]]:
    """Normalised and flattened patches in the order of the merged tokens.

    Args:
        frames: (n, 3, h, w) uint8, sides multiples of patch * merge. An odd count repeats the last frame.
        rules: the backbone's.

    Returns:
        (t * h * w, 3 * pairing * patch * patch) float32 and the patch grid (t, h, w). Patches: frame pair, block of
        merge x merge row by row, patches of a block; inside: colour, frame of the pair, row, column.
    """
    frames = torch.cat([frames, frames[-1:].expand(-len(frames) % rules.pairing, -1, -1, -1)])
    mean, std = (255 * torch.tensor(x).view(3, 1, 1) for x in (rules.mean, rules.std))
    pixels = (frames.float() - mean) / std
    p, m = rules.patch, rules.merge
    n, _, height, width = frames.shape
    t, h, w = n // rules.pairing, height // p, width // p
    x = pixels.view(t, rules.pairing, 3, h // m, m, p, w // m, m, p)
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return x.reshape(t * h * w, -1), (t, h, w)


def windows(samples: np.ndarray) -> list[np.ndarray]:
    """Sound cut every 30 s; below 1 s it is padded with zeros to 1 s (as in the public code)."""
    if len(samples) < SAMPLING_RATE:
        samples = np.pad(samples, (0, SAMPLING_RATE - len(samples)))
    step = WINDOW_S * SAMPLING_RATE
    return [samples[k : k + step] for k in range(0, len(samples), step)]
