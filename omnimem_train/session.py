"""`StreamSession`: watch a file or a live feed in a fixed memory, ask questions at any time, save and go on later."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from omnimem_train.errors import UserError
from omnimem_train.memory.spec import MemorySpec
from omnimem_train.memory.state import LayerMemory
from omnimem_train.models.interface import MediaInfo, MediaWindow, StreamingModel, TokenBlock, Turn, weight_sample
from omnimem_train.streaming import Stream, StreamState, count_text

FORMAT = 1


class StreamSession:
    """A stream in progress.

    Args:
        model: from `omnimem_train.models.load_model`.
        spec: how memory is compressed.
        info: which tracks the stream has (`omnimem_train.media.probe` for a file).
        fps: frames a second that will be fed.
        options: passed to the model's encoder (system prompt, pixel limits, ...).

    Example:
        >>> session = StreamSession(model, MemorySpec(budget=4096), info, fps=2.0)
        >>> for window in read_windows(path, fps=2.0, window_s=model.window_s(2.0)):
        ...     session.feed(window)
        >>> session.ask("What is the dog doing?")
    """

    def __init__(
        self, model: StreamingModel, spec: MemorySpec, info: MediaInfo, fps: float = 2.0, **options: Any
    ) -> None:
        if isinstance(fps, bool) or not isinstance(fps, int | float):
            raise UserError(f"fps is {fps!r}", remedy="give a number, e.g. 2.0")
        self.model, self.spec, self.info, self.fps, self.options = model, spec, info, fps, options
        self.stream = Stream(model, spec)
        self.encoder = model.open(info, fps, **options)
        self.state: StreamState = self.stream.feed(self.stream.start(), self.encoder.start())
        self.watched_s = 0.0

    @torch.no_grad()
    def feed(self, window: MediaWindow) -> None:
        """Take in the next window; windows must follow each other.

        Raises:
            UserError: one out of order, or that does not hold what `MediaWindow` says.
        """
        if abs(window.start_s - self.watched_s) > 1e-3:
            raise UserError(
                f"this window starts at {window.start_s:g} s, the stream stands at {self.watched_s:g} s",
                remedy="feed windows in order and without gaps",
            )
        try:
            check_window(window, self.info, self.fps)
            block = self.encoder.push(window)
        except ValueError as error:
            raise UserError(
                f"the window from {window.start_s:g} s on cannot be taken in",
                cause=str(error),
                remedy=f"cut windows at multiples of {self.model.window_s(self.fps):g} s, with {self.fps:g} frames "
                f"and {self.model.sampling_rate} samples a second; only at the end of a track may there be less",
            ) from error
        self._take(block)
        self.watched_s = window.end_s
        if window.last:
            self._take(self.encoder.finish())

    def _take(self, block: TokenBlock | None) -> None:
        if block is not None and block.n:
            self.state = self.stream.feed(self.state, block)

    def ask(self, question: str, max_new_tokens: int = 64) -> str:
        """Greedy answer to a question about what was watched so far. The memory stays as it was."""
        if not isinstance(question, str) or not question.strip():
            raise UserError(f"the question is {question!r}", cause="there is nothing to answer", remedy="ask something")
        if type(max_new_tokens) is not int or max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens!r}", remedy="give a whole number, 1 or more")
        ids = self.model.render(Turn(question)).ids.to(self.model.device)
        state = self.stream.caught_up(self.state, self.encoder.waiting())
        tokens = self.stream.generate(state, self.encoder, ids, max_new_tokens)
        return self.model.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def kept_tokens(self) -> list[int]:
        """Tokens each layer holds per kv head, pinned text included."""
        return [memory.n_tokens for memory in self.state.layers]

    # Files -----------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write memory, pending tokens and encoder state to a safetensors file, with the fingerprints of the memory
        spec and of the model's weights (adapters included).

        Raises:
            UserError: it cannot be written.
        """
        tensors: dict[str, Tensor] = {"offset": self.state.offset, "horizon": self.state.horizon}
        for i, memory in enumerate(self.state.layers):
            named = dict(zip(LayerMemory.__dataclass_fields__, memory.tensors(), strict=True))
            tensors |= {f"layer.{i}.{k}": v for k, v in named.items() if v is not None}
        if self.state.pending is not None:
            pending = self.state.pending
            tensors |= {f"pending.{k}": getattr(pending, k) for k in ("embeds", "positions", "modality", "time_s")}
            tensors |= {f"pending.extras.{k}": v for k, v in pending.extras.items()}
        tensors |= {f"encoder.{k}": v for k, v in self.encoder.snapshot().items()}
        about = {
            "format": FORMAT,
            "spec": self.spec.to_dict(),
            "spec_fingerprint": self.spec.fingerprint(),
            "model_fingerprint": model_fingerprint(self.model),
            "info": asdict(self.info) | {"path": str(self.info.path)},
            "fps": self.fps,
            "options": self.options,
            "watched_s": self.watched_s,
            "n_run": self.state.n_run,
            "n_chunks": self.state.n_chunks,
        }
        # copies: safetensors refuses tensors that share storage, and heads share positions before the first eviction
        copies = {k: v.detach().clone().contiguous().cpu() for k, v in tensors.items()}
        try:
            save_file(copies, str(path), metadata={"omnimem_session": json.dumps(about)})
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot write the session {path}", str(error), "choose a file in a writable folder with free space"
            ) from error

    @classmethod
    def load(cls, path: str | Path, model: StreamingModel, spec: MemorySpec | None = None) -> StreamSession:
        """Go on from a saved session.

        Args:
            spec: what the caller expects, or None to take the session's own.

        Raises:
            UserError: not a session file, another model or adapter, or another spec.
        """
        tensors, about = _read(Path(path))
        try:
            return cls._restored(path, tensors, about, model, spec)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"the session {path} is damaged", cause=repr(error), remedy="watch the stream again and save it anew"
            ) from error

    @classmethod
    def _restored(
        cls,
        path: str | Path,
        tensors: dict[str, Tensor],
        about: dict[str, Any],
        model: StreamingModel,
        spec: MemorySpec | None,
    ) -> StreamSession:
        saved = MemorySpec.from_dict(about["spec"])
        if about["spec_fingerprint"] != saved.fingerprint():
            raise UserError(f"the memory spec inside {path} does not match its fingerprint")
        if spec is not None and spec.fingerprint() != saved.fingerprint():
            raise UserError(
                f"{path} was written with memory spec {saved.fingerprint()}, asked for is {spec.fingerprint()}",
                remedy="load it without a spec, or watch the stream again with the new one",
            )
        now = model_fingerprint(model)
        if about["model_fingerprint"] != now:
            raise UserError(
                f"{path} was written with model {about['model_fingerprint']}, this one is {now}",
                cause="keys and values of other weights (or another adapter) mean nothing to this model",
                remedy="load the model and adapter the session was saved with",
            )
        info = MediaInfo(**(about["info"] | {"path": Path(about["info"]["path"])}))
        session = cls(model, saved, info, about["fps"], **about["options"])
        session.encoder.restore(_part(tensors, "encoder."))
        session.state = _state(tensors, about, model)
        session.watched_s = about["watched_s"]
        return session


def check_window(window: MediaWindow, info: MediaInfo, fps: float) -> None:
    """Raises ValueError unless the arrays of a window are what `MediaWindow` says."""
    frames, samples = window.frames, window.samples
    if info.has_video and (frames is None or frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8):
        found = None if frames is None else (frames.dtype.name, frames.shape)
        raise ValueError(f"frames are (n, height, width, 3) uint8, not {found}")
    room = math.ceil(window.end_s * fps - 1e-6) - math.ceil(window.start_s * fps - 1e-6)
    if info.has_video and frames is not None and len(frames) > room:
        raise ValueError(f"it holds {len(frames)} frames, and there is room for {room}")
    if info.has_audio and (samples is None or samples.ndim != 1 or samples.dtype.kind != "f"):
        found = None if samples is None else (samples.dtype.name, samples.shape)
        raise ValueError(f"samples are (n,) float32 in [-1, 1], not {found}")
    if info.has_audio and samples is not None and not np.isfinite(samples).all():
        raise ValueError("some samples are no numbers")


def model_fingerprint(model: StreamingModel, adapters: bool = True) -> str:
    """16 hex digits of the decoder layers: names, shapes and some values of their weights, as the checkpoint has them.

    Args:
        adapters: tell what is run: count the adapter's weights too, and whether the decoder is in 4 bits. Without them
            a model with an adapter, or in 4 bits, has the print of its base.
    """
    digest = hashlib.sha256()
    prefix = model.language_prefix()
    if adapters and model.quantization != "none":
        digest.update(model.quantization.encode())
    for name, weight in model.module.named_parameters():
        adapter = ".lora_" in name or name == model.HEAD
        if name.startswith((prefix, model.HEAD)) and (adapters or not adapter):
            short = name.removeprefix(prefix).replace(".base_layer.", ".")
            module, _, leaf = name.rpartition(".")
            packed = getattr(model.module.get_submodule(module), "before_packing", None) if leaf == "weight" else None
            shape, sample = packed or (tuple(weight.shape), weight_sample(weight))
            digest.update(f"{short} {shape}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("omnimem_session", "null"))
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"cannot read the session {path}", cause=str(error)) from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise UserError(f"{path} is not a saved session of format {FORMAT}")
    return tensors, about


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _state(tensors: dict[str, Tensor], about: dict[str, Any], model: StreamingModel) -> StreamState:
    layers = []
    for i in range(model.n_layers):
        named = _part(tensors, f"layer.{i}.")
        memory = LayerMemory.from_tensors(named.get(k) for k in LayerMemory.__dataclass_fields__).to(model.device)
        if memory.keys.shape != memory.values.shape or memory.keys.shape[:3] != memory.positions.shape[:3]:
            raise ValueError(f"layer {i}: keys, values and positions differ in shape")
        layers.append(memory)
    pending = None
    if held := {k: v.to(model.device) for k, v in _part(tensors, "pending.").items()}:
        pending = TokenBlock(held["embeds"], held["positions"], held["modality"], held["time_s"])
        pending = replace(pending, extras=_part(held, "extras."))
    if not isinstance(about["n_run"], int) or not isinstance(about["n_chunks"], int):
        raise ValueError("the numbers of tokens and chunks are no whole numbers")
    offset, horizon = tensors["offset"].to(model.device), tensors["horizon"].to(model.device)
    n_text = count_text(layers[0].modality[0, 0])
    n_run, n_chunks = about["n_run"], about["n_chunks"]
    return StreamState(tuple(layers), pending, n_run, n_chunks, offset, horizon, n_text=n_text, pending_text=None)
