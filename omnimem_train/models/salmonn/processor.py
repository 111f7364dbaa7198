"""Messages and media -> token ids and tensors, as the public pipeline makes them.

Three samples the public code fails on work here: one without media, one with several videos, and one whose sound is
shorter than its picture (see `layout.audio_groups`). The public dataset also cannot mix `<video>` and `<audio>`; here
media follow the order of their marks in the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, WhisperFeatureExtractor

from omnimem_train.errors import UserError
from omnimem_train.models.salmonn import media
from omnimem_train.models.salmonn.config import VideoSalmonn2Config
from omnimem_train.models.salmonn.layout import Segment, interleaved, timestamped
from omnimem_train.models.salmonn.media import CLIP_MEAN, CLIP_STD, PictureRules, Sampling
from omnimem_train.models.salmonn.positions import VideoGrid

SYSTEM = "You are a helpful assistant."
START, END, VIDEO_PAD, AUDIO_PAD = "<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|audio_pad|>"
MAX_TIMESTAMPS = 256
"""Of the released OmniMem script (Qwen3-VL backbone)."""


class Tokenizer(Protocol):
    """What is asked of a tokenizer: special strings in the text become single ids."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]:
        """Ids of a text."""


@dataclass(frozen=True)
class Clip:
    """A video, already decoded, for one `<video>` mark.

    Attributes:
        frames: (n, 3, height, width) uint8, those that `media.frame_indices` takes.
        seconds_per_pair: None if unknown.
        times_s: time of each frame pair in seconds; the Qwen3-VL backbone writes them as text.
        samples: (m,) float32 mono at 16 kHz in [-1, 1]; None without sound.
    """

    frames: Tensor
    seconds_per_pair: float | None = None
    times_s: tuple[float, ...] = ()
    samples: np.ndarray | None = None

    @classmethod
    def taken(
        cls, frames: Tensor, indices: np.ndarray, n_frames: int, fps: float, samples: np.ndarray | None = None
    ) -> Clip:
        """The frames at `indices` of a file of `n_frames` at `fps`."""
        times = tuple(media.pair_times(indices, fps))
        return cls(frames, media.seconds_per_pair(n_frames, fps, len(indices)), times, samples)


@dataclass
class _Media:
    """What the marks of a sample have used so far."""

    clips: list[Clip]
    sounds: list[np.ndarray]
    pixels: list[Tensor] = field(default_factory=list)
    grids: list[tuple[int, int, int]] = field(default_factory=list)
    seconds: list[float | None] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    audio_lengths: list[int] = field(default_factory=list)


class VideoSalmonn2Processor:
    """Prepares samples for `VideoSalmonn2ForConditionalGeneration`.

    Args:
        tokenizer: the checkpoint's.
        config: the model's.
        sampling: pixel limits (and which frames were taken to reach the maximum).
        max_timestamps: see `layout.timestamped`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: VideoSalmonn2Config,
        sampling: Sampling | None = None,
        max_timestamps: int = MAX_TIMESTAMPS,
    ) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.sampling = sampling or Sampling()
        self.max_timestamps = max_timestamps
        self.rules = picture_rules(config)

    @classmethod
    def from_pretrained(cls, folder: Any, **kwargs: Any) -> VideoSalmonn2Processor:
        """With the tokenizer and the configuration of `folder`; `<|audio_pad|>` is added to a stock tokenizer.

        Raises:
            UserError: `<|audio_pad|>` does not land on the id that the configuration names.
        """
        config = VideoSalmonn2Config.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": [AUDIO_PAD]})
        found = tokenizer.convert_tokens_to_ids(AUDIO_PAD)
        if found != config.audio_token_id:
            raise UserError(
                f"{folder}: {AUDIO_PAD} has id {found} in the tokenizer and {config.audio_token_id} in config.json",
                "the tokenizer is of another model generation",
                "take tokenizer and config.json from one checkpoint",
            )
        return cls(tokenizer, config, **kwargs)

    def __call__(
        self,
        messages: Iterable[Mapping[str, str]],
        videos: Iterable[Clip] = (),
        audios: Iterable[np.ndarray] = (),
    ) -> dict[str, Tensor | list[float | None]]:
        """One sample.

        Args:
            messages: {"role": ..., "content": ...}; `<video>` and `<audio>` in a content stand for the next clip or
            sound.
                If the last one is not the assistant's, the ids end where its reply begins. A system message comes first
                in any case.
            videos, audios: in the order of their marks; a clip brings its own sound.

        Returns:
            `input_ids`, `attention_mask`, `labels` (1, n): labels are -100 outside the assistant's messages (role and
            its newline excluded, closing mark and newline included), not shifted. As far as there are media:
            `pixel_values_videos` (patches, values), `video_grid_thw` (videos, 3), `second_per_grid_ts` (list, a value
            per video), `audio_feature` (windows, 128, 3000), `audio_lengths` (sounds,) tokens.

        Raises:
            UserError: marks and media do not correspond; the tokenizer does not know the marks.
        """
        left = _Media(list(videos), list(audios))
        placed = [
            {**turn, "content": turn["content"] if turn["role"] == "assistant" else self._place(turn["content"], left)}
            for turn in messages
        ]
        if left.clips or left.sounds:
            raise _marks(f"{len(left.clips)} videos and {len(left.sounds)} sounds without a mark in the text")
        ids, labels = self.render(placed)
        self._check(ids, left)
        return _tensors(ids, labels, left)

    def render(self, messages: Iterable[Mapping[str, str]]) -> tuple[list[int], list[int]]:
        """Ids and labels of messages whose media are written out already (`video_text`, `audio_text`)."""
        ids: list[int] = []
        labels: list[int] = []
        role = ""
        for turn in [{"role": "system", "content": SYSTEM}, *messages]:
            role = turn["role"]
            new = self._encode(f"<|im_start|>{role}\n{turn['content']}<|im_end|>\n")
            ids += new
            labels += [-100] * 3 + new[3:] if role == "assistant" else [-100] * len(new)
        if role != "assistant":
            new = self._encode("<|im_start|>assistant\n")
            ids, labels = ids + new, labels + [-100] * len(new)
        return ids, labels

    def video_text(self, grid: VideoGrid, audio_tokens: int = 0, times_s: Sequence[float] = ()) -> str:
        """What stands for a video: its tokens with those of its sound between marks, in the backbone's order.

        Raises:
            UserError: Qwen3-VL backbone without the time of each pair.
        """
        if self.config.backbone == "qwen2_5_vl":
            return START + "".join(_strings(s) for s in interleaved(grid, audio_tokens)) + END
        if len(times_s) != grid.pairs:
            raise UserError(
                f"a clip with {len(times_s)} times for {grid.pairs} frame pairs",
                "this backbone writes the time of each frame pair as text",
                "make the clip with Clip.taken",
            )
        segments = timestamped(grid, times_s, audio_tokens, self.max_timestamps)
        return "".join(s.text + START + _strings(s) + END for s in segments)

    def audio_text(self, audio_tokens: int) -> str:
        """What stands for a sound alone."""
        return START + AUDIO_PAD * audio_tokens + END

    def audio_tokens(self, samples: np.ndarray | None) -> int:
        """Tokens of a sound: 60 for every window of 30 s, the last one padded; 0 for None."""
        if samples is None:
            return 0
        return len(media.windows(samples)) * self.config.audio_config.tokens_per_window()

    def log_mel(self, samples: np.ndarray) -> Tensor:
        """(m,) float32 at 16 kHz -> (windows, 128, 3000): each 30 s on its own, the last one padded with silence.

        The floor of the logarithm is relative to the loudest value of the window, so a window's features do not
        depend on the rest of the sound.
        """
        extract = _extractor(self.config.audio_config.num_mel_bins)
        rows = [
            extract(w, sampling_rate=media.SAMPLING_RATE, padding="max_length", return_tensors="pt")["input_features"]
            for w in media.windows(np.asarray(samples, dtype=np.float32))
        ]
        return torch.cat(rows)

    def pictures(self, frames: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """(n, 3, h, w) uint8 -> patches and patch grid, after resizing to the pixel limits."""
        size = media.resized(frames.shape[-2], frames.shape[-1], len(frames), self.sampling, self.rules)
        return media.patches(media.resize(frames, size), self.rules)

    def _place(self, content: str, left: _Media) -> str:
        """The content with marks replaced by the strings of their tokens."""
        parts = re.split(r"(<video>|<audio>)", content)
        places = {"<video>": self._video, "<audio>": self._audio}
        return "".join(places[p](left) if p in places else p for p in parts)

    def _video(self, left: _Media) -> str:
        if not left.clips:
            raise _marks("a <video> mark without a video")
        clip = left.clips.pop(0)
        pixels, grid = self.pictures(clip.frames)
        left.pixels.append(pixels)
        left.grids.append(grid)
        left.seconds.append(clip.seconds_per_pair)
        if clip.samples is not None:
            self._sound(clip.samples, left)
        merge = self.rules.merge
        tokens = VideoGrid(grid[0], grid[1] // merge, grid[2] // merge, clip.seconds_per_pair)
        return self.video_text(tokens, self.audio_tokens(clip.samples), clip.times_s)

    def _audio(self, left: _Media) -> str:
        if not left.sounds:
            raise _marks("an <audio> mark without a sound")
        samples = left.sounds.pop(0)
        self._sound(samples, left)
        return self.audio_text(self.audio_tokens(samples))

    def _sound(self, samples: np.ndarray, left: _Media) -> None:
        left.features.append(self.log_mel(samples))
        left.audio_lengths.append(self.audio_tokens(samples))

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _check(self, ids: Sequence[int], left: _Media) -> None:
        """The tokenizer turned each pad string into the id that the configuration names."""
        c, merge = self.config, self.rules.merge
        wanted = {
            VIDEO_PAD: (c.video_token_id, sum(t * h * w for t, h, w in left.grids) // merge**2),
            AUDIO_PAD: (c.audio_token_id, sum(left.audio_lengths)),
        }
        for string, (token, count) in wanted.items():
            if ids.count(token) != count:
                raise UserError(
                    f"{ids.count(token)} tokens with id {token} for {count} times {string}",
                    "the tokenizer does not know the string as that id, or it stands in the text already",
                    f"give the checkpoint's own tokenizer, and text without {string}",
                )


def picture_rules(config: VideoSalmonn2Config) -> PictureRules:
    """How the configuration's backbone sees frames."""
    v = config.vision_config
    newer = config.backbone == "qwen3_vl"
    mean, std = ((0.5,) * 3, (0.5,) * 3) if newer else (CLIP_MEAN, CLIP_STD)
    return PictureRules(v.patch_size, v.spatial_merge_size, v.temporal_patch_size, mean, std, whole_clip=newer)


@cache
def _extractor(mel_bins: int) -> Any:
    return WhisperFeatureExtractor(feature_size=mel_bins, chunk_length=media.WINDOW_S)


def _strings(segment: Segment) -> str:
    return VIDEO_PAD * segment.visual_tokens + AUDIO_PAD * segment.audio_tokens


def _marks(what: str) -> UserError:
    return UserError(
        what, "<video> and <audio> in the text stand for the media, one each, in order", "write one mark per medium"
    )


def _tensors(ids: list[int], labels: list[int], used: _Media) -> dict[str, Tensor | list[float | None]]:
    out: dict[str, Tensor | list[float | None]] = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
        "labels": torch.tensor([labels]),
    }
    if used.grids:
        out["pixel_values_videos"] = torch.cat(used.pixels)
        out["video_grid_thw"] = torch.tensor(used.grids)
        out["second_per_grid_ts"] = used.seconds
    if used.features:
        out["audio_feature"] = torch.cat(used.features)
        out["audio_lengths"] = torch.tensor(used.audio_lengths)
    return out
