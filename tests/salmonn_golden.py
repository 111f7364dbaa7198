"""Reads golden data of video-SALMONN 2+ (either backbone): cases, byte tokenizer, preprocessing as recorded."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from omnimem_train.models.salmonn import (
    Clip,
    Sampling,
    VideoSalmonn2Config,
    VideoSalmonn2ForConditionalGeneration,
    VideoSalmonn2Processor,
    media,
)

ROOT = Path(os.environ.get("OMNIMEM_GOLDEN") or Path(__file__).resolve().parents[2] / "shared" / "golden")
OLD, NEW = "video_salmonn2_plus", "omnimem_qwen3vl"
LOGITS, EMBEDS = 1e-4, 2e-5
"""Largest difference in float32 on a CPU: of logits and caches, and of embeddings."""


class ByteTokenizer:
    """UTF-8 bytes as ids, special strings and the role after <|im_start|> as single ids."""

    def __init__(self, text: dict[str, Any]) -> None:
        self.special: dict[str, int] = text["special_ids"]
        self.roles: dict[str, int] = text["role_ids_right_after_im_start"]
        self._split = re.compile("(" + "|".join(map(re.escape, self.special)) + ")")

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        out: list[int] = []
        for part in self._split.split(text):
            if part in self.special:
                out.append(self.special[part])
                continue
            rest = part
            if out and out[-1] == self.special["<|im_start|>"]:
                role = next((r for r in self.roles if part.startswith(r)), "")
                out += [self.roles[role]] if role else []
                rest = part.removeprefix(role)
            out += rest.encode()
        return out


@dataclass(frozen=True)
class Case:
    """One prompt: recorded tensors, and the inputs of the model (some are stored with another case)."""

    letter: str
    prompt: str
    reply: str
    tensors: dict[str, Tensor]
    inputs: dict[str, Any]

    @property
    def ids(self) -> Tensor:
        return self.tensors["input_ids"]


@dataclass
class Golden:
    """One of the two folders, read as needed."""

    folder: Path
    new: bool

    @cached_property
    def text(self) -> dict[str, Any]:
        return self.json("text.json")

    @cached_property
    def tokenizer(self) -> ByteTokenizer:
        return ByteTokenizer(self.text)

    @cached_property
    def config(self) -> VideoSalmonn2Config:
        return VideoSalmonn2Config.from_pretrained(self.folder / "model")

    @cached_property
    def model(self) -> VideoSalmonn2ForConditionalGeneration:
        return self.load()

    @cached_property
    def waveform(self) -> np.ndarray:
        return np.load(self.folder / "waveform.npz")["pcm_int8"].astype(np.float32) / 128

    @cached_property
    def cases(self) -> dict[str, Case]:
        files = sorted(self.folder.glob("case_*.safetensors"))
        tensors = {f.name[len("case_")]: load_file(f) for f in files}
        stored = {
            name: next(t[name] for t in tensors.values() if name in t) for name in ("audio_feature",)
        } | self._shared_pixels(tensors)
        return {k: Case(k, *self.text["cases"][k], t, self._inputs(t, stored)) for k, t in tensors.items()}

    def load(self) -> VideoSalmonn2ForConditionalGeneration:
        return VideoSalmonn2ForConditionalGeneration.from_pretrained(self.folder / "model").eval()

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    def processor(self, case: Case | None = None, **kwargs: Any) -> VideoSalmonn2Processor:
        if case is not None and "<video>" in case.prompt:
            kwargs["sampling"] = self.sampling(case)
        if case is not None and self.new:
            kwargs["max_timestamps"] = self.text["total_timestamps"].get(case.letter, 5000)
        return VideoSalmonn2Processor(self.tokenizer, self.config, **kwargs)

    def sampling(self, case: Case) -> Sampling:
        m = self.media(case)
        least = self.text.get("min_frame_pixels", 3136)
        return Sampling(m["interval"], m["min_frames"], m["max_frames"], m.get("fpx", 61250), least)

    def media(self, case: Case) -> dict[str, Any]:
        """Facts of the clip; a case without an entry uses the one with the same frames."""
        entries = self.text["media"]
        if case.letter in entries:
            return entries[case.letter]
        frames = case.tensors["frame_indices"].tolist()
        same = (k for k in entries if self.cases[k].tensors["frame_indices"].tolist() == frames)
        return entries[next(same)]

    def media_of(self, case: Case) -> tuple[list[Clip], list[np.ndarray]]:
        """Clips and sounds of a prompt; black frames where the real ones are not stored."""
        sounds = self._sounds(case)
        if "<video>" not in case.prompt:
            return [], sounds
        m, indices = self.media(case), case.tensors["frame_indices"].numpy()
        black = torch.zeros(len(indices), 3, *m["raw"], dtype=torch.uint8)
        frames = case.tensors.get("raw_frames_uint8", black)
        return [Clip.taken(frames, indices, m["nframes"], m["fps"], sounds[0] if sounds else None)], []

    def _sounds(self, case: Case) -> list[np.ndarray]:
        """The whole waveform, or for a sound alone what remains of it after 30 s."""
        if "audio_lengths" not in case.tensors:
            return []
        alone = "<audio>" in case.prompt and "audio_feature" not in case.tensors
        return [self.waveform[media.WINDOW_S * media.SAMPLING_RATE :] if alone else self.waveform]

    def _shared_pixels(self, tensors: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        for t in tensors.values():
            if "pixel_uint8" in t:
                return {"pixel_values_videos": (t["pixel_uint8"].float() - 127.5) / 127.5}
        return {}

    def _inputs(self, t: dict[str, Tensor], stored: dict[str, Tensor]) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": t["input_ids"]}
        if "video_grid_thw" in t:
            inputs["video_grid_thw"] = t["video_grid_thw"]
            inputs["pixel_values_videos"] = t.get("pixel_values_videos", stored.get("pixel_values_videos"))
        if "second_per_grid_ts" in t:
            inputs["second_per_grid_ts"] = t["second_per_grid_ts"]
        if "audio_lengths" in t:
            windows = int(t["audio_lengths"].sum()) // 60
            inputs["audio_feature"] = t.get("audio_feature", stored["audio_feature"][-windows:])
        return inputs


def find(name: str) -> Golden | None:
    """The folder `name` of the golden data, None if it is not there."""
    folder = ROOT / name
    return Golden(folder, name == NEW) if (folder / "model" / "config.json").is_file() else None


def largest(a: Tensor, b: Tensor) -> float:
    """Largest difference; infinite for another shape, so that a mistake in the shape is one in the value."""
    return float((a.detach().double() - b.detach().double()).abs().max()) if a.shape == b.shape else float("inf")
