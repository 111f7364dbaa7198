"""Samples to log-mel frames and pictures to patches, a window at a time, equal to Qwen2.5-Omni's stock preprocessing.

The stock classes take a whole clip: `WhisperFeatureExtractor` cuts it at 300 s, and the video processor needs
torchvision. What is here takes a stream of any length, reads the same settings from the checkpoint, and gives the same
numbers (tests compare).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers.audio_utils import mel_filter_bank

from omnimem_train.errors import UserError
from omnimem_train.models.loading import read_json

# What the stock processor holds a video frame between, whatever the checkpoint's image limits are.
STOCK_VIDEO_PIXELS = (128 * 28 * 28, 768 * 28 * 28)
MAX_ASPECT = 200
SILENCE = 1e-10  # power that log-mel takes for zero
DYNAMIC_RANGE = 8.0  # decades below the loudest frame that stay visible


@dataclass(frozen=True)
class Settings:
    """Preprocessing of a checkpoint.

    Attributes:
        sampling_rate, n_fft, hop, mels: of the log-mel spectrogram; Hz, samples, samples, bands.
        patch, merge, pairing: side of a patch in pixels, patches a side of a token, frames of a temporal patch.
        mean, std: per colour, of values in [0, 1].
        min_pixels, max_pixels: of a video frame after resizing.
    """

    sampling_rate: int = 16000
    n_fft: int = 400
    hop: int = 160
    mels: int = 128
    patch: int = 14
    merge: int = 2
    pairing: int = 2
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    min_pixels: int = STOCK_VIDEO_PIXELS[0]
    max_pixels: int = STOCK_VIDEO_PIXELS[1]

    @property
    def factor(self) -> int:
        """Side of a token in pixels."""
        return self.patch * self.merge

    def within(self, min_pixels: int | None = None, max_pixels: int | None = None) -> Settings:
        """These settings with other pixel limits where given. A maximum below the minimum lowers the minimum too.

        Raises:
            UserError: limits of which no frame can be made.
        """
        high = self.max_pixels if max_pixels is None else max_pixels
        low = min_pixels
        if low is None:
            low = min(self.min_pixels, high) if isinstance(high, int) else self.min_pixels
        if type(low) is not int or type(high) is not int or not 0 < low <= high or high < self.factor**2:
            raise UserError(
                f"frames of {low} to {high} pixels",
                cause=f"a token is {self.factor} x {self.factor} pixels, and the minimum is at most the maximum",
                remedy=f"give whole numbers, 0 < min_pixels <= max_pixels, max_pixels >= {self.factor**2}",
            )
        return replace(self, min_pixels=low, max_pixels=high)


def read_settings(path: str) -> Settings:
    """Preprocessing settings of the checkpoint at `path`.

    Published checkpoints keep all of them in preprocessor_config.json; newer saves have processor_config.json (a part
    per modality) or video_preprocessor_config.json. The pixel limits there are those of images (up to 16,384 tokens
    each), and the stock processor replaces them for video by 100,352 and 602,112. So are they here, with two
    exceptions: a smaller maximum holds, and with a maximum below 100,352 the file's minimum holds too.

    Raises:
        UserError: no preprocessing file, or one whose values cannot be used.
    """
    flat = read_json(path, "preprocessor_config.json", required=False)
    nested = read_json(path, "processor_config.json", required=False)
    video = read_json(path, "video_preprocessor_config.json", required=False)
    if not flat and not nested:
        raise UserError(
            f"{path} has neither preprocessor_config.json nor processor_config.json",
            cause="picture sizes and spectrogram settings are unknown without them",
            remedy="copy the file from the base checkpoint",
        )
    sound = flat | dict(nested.get("feature_extractor") or {})
    picture = flat | dict(nested.get("image_processor") or {}) | dict(nested.get("video_processor") or {}) | video
    known = Settings()
    low, high = _pixel_limits(picture)
    try:
        return Settings(
            sampling_rate=int(sound.get("sampling_rate", known.sampling_rate)),
            n_fft=int(sound.get("n_fft", known.n_fft)),
            hop=int(sound.get("hop_length", known.hop)),
            mels=int(sound.get("feature_size", known.mels)),
            patch=int(picture.get("patch_size", known.patch)),
            merge=int(picture.get("merge_size", known.merge)),
            pairing=int(picture.get("temporal_patch_size", known.pairing)),
            mean=_three(picture.get("image_mean", known.mean)),
            std=_three(picture.get("image_std", known.std)),
            min_pixels=low,
            max_pixels=high,
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"the preprocessing settings of {path} cannot be read", cause=str(error)) from error


def _pixel_limits(picture: Mapping[str, Any]) -> tuple[int, int]:
    size = picture.get("size") or {}
    low = picture.get("min_pixels") or size.get("shortest_edge") or STOCK_VIDEO_PIXELS[0]
    high = picture.get("max_pixels") or size.get("longest_edge") or STOCK_VIDEO_PIXELS[1]
    if high < STOCK_VIDEO_PIXELS[0]:
        return int(low), int(high)
    return STOCK_VIDEO_PIXELS[0], min(int(high), STOCK_VIDEO_PIXELS[1])


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(v) for v in values)
    return red, green, blue


# Sound ---------------------------------------------------------------------------------------------------------------


class MelStream:
    """Log10 power of mel bands, frame by frame, from samples that come in pieces of any size.

    Frame f is centred at sample f * hop and reads n_fft samples around it, so it needs n_fft / 2 samples that come
    after its centre: frames lag behind samples by that much. Before the first sample the signal is reflected, after
    the last it is zero, as the stock extractor has it (which pads every clip to 300 s with zeros).

    The values are not yet clamped and scaled: see `scale_log_mel`.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.n_samples = 0
        self.n_frames = 0
        # samples from n_fft / 2 before the next frame's centre on; the reflection is put in front once it is known
        self.held = torch.zeros(0)
        self.window = torch.hann_window(settings.n_fft)
        filters = mel_filter_bank(
            num_frequency_bins=1 + settings.n_fft // 2,
            num_mel_filters=settings.mels,
            min_frequency=0.0,
            max_frequency=8000.0,
            sampling_rate=settings.sampling_rate,
            norm="slaney",
            mel_scale="slaney",
        )
        self.filters = torch.from_numpy(filters).float().T.contiguous()

    def push(self, samples: np.ndarray | Tensor) -> Tensor:
        """The frames (mels, f) that these samples (m,) complete."""
        half = self.settings.n_fft // 2
        self.held = torch.cat([self.held, torch.as_tensor(samples, dtype=torch.float32)])
        reflected = self.n_samples > half
        self.n_samples += len(samples)
        if self.n_samples <= half:
            return torch.zeros(self.settings.mels, 0)
        if not reflected:
            self.held = torch.cat([self.held[1 : half + 1].flip(0), self.held])
        ready = (len(self.held) - self.settings.n_fft) // self.settings.hop + 1
        return self._frames(max(0, ready))

    def finish(self, more: int = 0) -> Tensor:
        """The frames whose centre lies before the last sample and that were still waiting, and `more` after them."""
        half, hop = self.settings.n_fft // 2, self.settings.hop
        left = math.ceil(self.n_samples / hop) - self.n_frames + more
        if self.n_samples == 0 or left <= 0:
            return torch.zeros(self.settings.mels, 0)
        if self.n_samples <= half:
            padded = torch.nn.functional.pad(self.held, (0, half + 1 - len(self.held)))
            self.held = torch.cat([padded[1 : half + 1].flip(0), self.held])
        missing = (left - 1) * hop + self.settings.n_fft - len(self.held)
        self.held = torch.nn.functional.pad(self.held, (0, max(0, missing)))
        return self._frames(left)

    def _frames(self, count: int) -> Tensor:
        """The next `count` frames; drops the samples that no later frame reads."""
        if count == 0:
            return torch.zeros(self.settings.mels, 0)
        s = self.settings
        part = self.held[: (count - 1) * s.hop + s.n_fft]
        spectrum = torch.stft(part, s.n_fft, s.hop, window=self.window, center=False, return_complex=True)
        power = self.filters @ spectrum.abs().square()
        self.held = self.held[count * s.hop :]
        self.n_frames += count
        return power.clamp(min=SILENCE).log10()


def scale_log_mel(log_mel: Tensor, peak: float | Tensor) -> Tensor:
    """What the audio tower takes: values more than 8 decades below `peak` are raised to there, then (x + 4) / 4."""
    return (torch.maximum(log_mel, torch.as_tensor(peak - DYNAMIC_RANGE, dtype=log_mel.dtype)) + 4.0) / 4.0


def peak_log_mel(samples: Iterable[np.ndarray], settings: Settings | None = None) -> float:
    """The largest log10 mel value of a clip given in pieces: the stock floor of the clip is 8 below it.

    Costs one pass over the sound; pass the result as `mel_floor` to `open` to get the stock features exactly.
    """
    stream = MelStream(settings or Settings())
    peak = math.log10(SILENCE)
    for piece in samples:
        frames = stream.push(piece)
        if frames.numel():
            peak = max(peak, float(frames.max()))
    # the stock spectrogram goes on over its zero padding, where the clip's end still sounds in a frame or two
    frames = stream.finish(more=math.ceil(stream.settings.n_fft / 2 / stream.settings.hop))
    return max(peak, float(frames.max())) if frames.numel() else peak


# Pictures ------------------------------------------------------------------------------------------------------------


def smart_resize(height: int, width: int, settings: Settings) -> tuple[int, int]:
    """(height, width) a frame is resized to: multiples of a token's side, near its shape, within the pixel limits.

    Raises:
        UserError: a frame without pixels, or more than 200 times longer than wide.
    """
    factor, low, high = settings.factor, settings.min_pixels, settings.max_pixels
    if min(height, width) < 1 or max(height, width) / min(height, width) > MAX_ASPECT:
        raise UserError(
            f"a frame of {width} x {height} pixels cannot be encoded",
            cause=f"both sides must be at least 1 and their ratio at most {MAX_ASPECT}",
        )
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > high:
        shrink = math.sqrt(height * width / high)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < low:
        grow = math.sqrt(low / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def resize(frames: Tensor, height: int, width: int) -> Tensor:
    """(n, h, w, 3) uint8 frames to (n, 3, height, width) uint8, bicubic with antialiasing, as the stock processor."""
    planes = frames.permute(0, 3, 1, 2)
    if planes.shape[-2:] == (height, width):
        return planes.contiguous()
    return interpolate(planes, size=(height, width), mode="bicubic", antialias=True, align_corners=False)


def patchify(frames: Tensor, settings: Settings) -> tuple[Tensor, tuple[int, int, int]]:
    """Resized frames (n, 3, height, width) uint8, n a multiple of `pairing`, to the vision tower's input.

    Returns:
        (patches, 3 * pairing * patch * patch) float32 normalised, in the order the tower wants (tokens row by row, the
        merge x merge patches of a token together), and the grid (temporal patches, rows, columns) in patches.
    """
    s = settings
    n, colours, height, width = frames.shape
    grid = (n // s.pairing, height // s.patch, width // s.patch)
    mean = torch.tensor(s.mean, device=frames.device).view(1, 3, 1, 1) * 255
    std = torch.tensor(s.std, device=frames.device).view(1, 3, 1, 1) * 255
    values = (frames.float() - mean) / std
    values = values.view(
        grid[0], s.pairing, colours, grid[1] // s.merge, s.merge, s.patch, grid[2] // s.merge, s.merge, s.patch
    )
    values = values.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return values.reshape(math.prod(grid), -1), grid
