"""What a model offers to the stream loop. `omnimem_train.streaming` knows this file and no concrete model.

A model takes part in two ways. Its *encoder side* turns windows of a file (frames and samples) into `TokenBlock`s:
embeddings with their positions, in stream order. Its *decoder side* runs one decoder layer on some tokens while a `Tap`
hands the layer's attention the keys and values remembered so far and brings back those of the new tokens.

Shape legend: see `omnimem_train.memory.state`.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from omnimem_train.memory.positions import Rotary
from omnimem_train.memory.state import VISUAL, LayerMemory


@dataclass(frozen=True)
class MediaInfo:
    """What is known of a file before it is read.

    Attributes:
        path: the file.
        duration_s: seconds; the longer of picture and sound.
        has_video, has_audio: which tracks it has.
        width, height: pixels of the picture, 0 without one.
        video_fps: frames a second in the file, 0 without a picture.
        sampling_rate: of the sound track in the file (Hz), 0 without sound.
    """

    path: Path
    duration_s: float
    has_video: bool
    has_audio: bool
    width: int = 0
    height: int = 0
    video_fps: float = 0.0
    sampling_rate: int = 0


@dataclass(frozen=True)
class MediaWindow:
    """A stretch of a file, decoded.

    Attributes:
        start_s, end_s: its borders in seconds; windows of a file follow each other without gaps.
        frames: (n, height, width, 3) uint8 RGB, the frames whose time k / fps lies in [start_s, end_s); None without a
            picture. n may be 0.
        samples: (m,) float32 mono, about in [-1, 1], at the model's sampling rate; None without sound. Sample i of the
            file lies at i / rate; a window holds those from round(start_s * rate) to round(end_s * rate), as far as the
            sound goes: m is smaller where it ends, and 0 after that.
        last: True for the last window of the file.
        shrunk: the frames went through `StreamingModel.shrink`.
    """

    start_s: float
    end_s: float
    frames: np.ndarray | None
    samples: np.ndarray | None
    last: bool = False
    shrunk: bool = False


@dataclass(frozen=True)
class TokenBlock:
    """Tokens on their way into the decoder.

    Attributes:
        embeds: (B, n, E).
        positions: (B, n, 3) int64 (time, row, column) in the uncompressed stream.
        modality: (B, n) int8.
        time_s: (B, n) float32, seconds since the start of the stream.
        extras: further per-token tensors (B, n, ...) a model's layers read (deepstack features, say), by name.
    """

    embeds: Tensor
    positions: Tensor
    modality: Tensor
    time_s: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Number of tokens."""
        return self.embeds.shape[1]

    def __getitem__(self, part: slice) -> TokenBlock:
        """The tokens of a slice."""
        return self.map(lambda x: x[:, part])

    def map(self, f: Callable[[Tensor], Tensor]) -> TokenBlock:
        """`f` of every tensor."""
        return TokenBlock(
            f(self.embeds),
            f(self.positions),
            f(self.modality),
            f(self.time_s),
            {k: f(v) for k, v in self.extras.items()},
        )

    def shifted(self, offset: Tensor) -> Tensor:
        """(B, n, 3) positions moved by `offset` (B,): time for all, row and column for text and sound only (in a
        picture they count from the stream's start)."""
        move = offset[:, None, None].expand(-1, self.n, 3).clone()
        move[..., 1:] *= (self.modality != VISUAL)[..., None]
        return self.positions + move

    @staticmethod
    def cut(blocks: Iterable[TokenBlock], size: int, pending: int = 0) -> Iterator[TokenBlock]:
        """`blocks` cut wherever a chunk of `size` tokens ends; `pending` tokens of the first chunk came before."""
        for block in blocks:
            start = 0
            while start < block.n:
                part = block[start : start + size - pending]
                yield part
                start, pending = start + part.n, (pending + part.n) % size

    @staticmethod
    def cat(blocks: list[TokenBlock]) -> TokenBlock:
        """Blocks one after the other. All must carry the same extras."""
        first = blocks[0]
        return TokenBlock(
            torch.cat([b.embeds for b in blocks], 1),
            torch.cat([b.positions for b in blocks], 1),
            torch.cat([b.modality for b in blocks], 1),
            torch.cat([b.time_s for b in blocks], 1),
            {k: torch.cat([b.extras[k] for b in blocks], 1) for k in first.extras},
        )

    @staticmethod
    def stack(blocks: list[TokenBlock]) -> TokenBlock:
        """Streams of equal layout side by side (along B)."""
        first = blocks[0]
        return TokenBlock(
            torch.cat([b.embeds for b in blocks]),
            torch.cat([b.positions for b in blocks]),
            torch.cat([b.modality for b in blocks]),
            torch.cat([b.time_s for b in blocks]),
            {k: torch.cat([b.extras[k] for b in blocks]) for k in first.extras},
        )


@dataclass
class Tap:
    """Carries memory into one attention call and the new tokens' states out of it.

    Attributes:
        memory: what the layer remembers, or None for nothing; every new token sees all of it.
        mask: (N, N) bool, which new tokens see which; None for causal.
        states_only: True where nothing reads the attention's result: the call sets the rest and computes none.
        unread: True where of the layer's output only the graph is wanted: its numbers may be others, and `joined` is
            left out where the attention call does without.
        queries, keys, values: set by the attention call: (B, H, n, D), (B, G, n, D), (B, G, n, D), rotated.
        sums: set by an attention call that has them: (B, H, n) float32 without gradient, the logarithm of the sum of
            exponentials over all that a query sees.
        joined: keys and values of memory and new tokens, (B, G, S, D) each, if the attention call puts them together.
    """

    memory: LayerMemory | None = None
    mask: Tensor | None = None
    states_only: bool = False
    unread: bool = False
    queries: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    sums: Tensor | None = None
    joined: tuple[Tensor, Tensor] | None = None


class Gathering(Protocol):
    """Puts together the weights of decoder layers that are spread over processes (`omnimem_train.sharding`)."""

    def before(self, layer: int) -> None:
        """Called before a layer runs."""

    def before_both(self, layer: int) -> None:
        """Called instead where the layer runs to be differentiated right after, before any other runs."""

    def after(self, layer: int, out: Tensor, tap: Tap) -> Tensor:
        """Called with what leaves a layer; returns what takes the place of `out`. The layer's weights are whole until
        the next layer runs."""


@dataclass(frozen=True)
class Turn:
    """A question asked at some time of the stream, and its answer if known.

    Attributes:
        question: text.
        answer: text to be learned or compared with, or None.
        time_s: asked after this many seconds of stream; None for its end.
        earlier: (question, answer) pairs said before in the same dialogue; they are learned too.
    """

    question: str
    answer: str | None = None
    time_s: float | None = None
    earlier: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class RenderedTurn:
    """A turn as token ids. `labels` is -100 where nothing is learned; it is not shifted. Both (n,) int64."""

    ids: Tensor
    labels: Tensor


class MediaEncoder(ABC):
    """The encoder side of one stream. Holds what an encoder needs to continue (a few frames, the next position)."""

    @abstractmethod
    def start(self) -> TokenBlock:
        """The tokens before the first window: system prompt, opening marks."""

    @abstractmethod
    def push(self, window: MediaWindow) -> TokenBlock | None:
        """The tokens that `window` completes; None while there are none yet."""

    @abstractmethod
    def finish(self) -> TokenBlock | None:
        """The tokens that were waiting for more input when the stream ended."""

    @abstractmethod
    def waiting(self) -> TokenBlock | None:
        """What `finish` would give now; None for nothing. Leaves the encoder as it is. A question asked now sees it."""

    @abstractmethod
    def text(self, ids: Tensor, *, closing: bool = True) -> TokenBlock:
        """Text as if the stream ended here: closing marks (unless the stream has none open or `closing` is off), then
        `ids` (n,), with positions after what is `waiting`. Leaves the encoder as it is."""

    @abstractmethod
    def snapshot(self) -> dict[str, Tensor]:
        """What a new encoder needs to go on from here, as tensors."""

    @abstractmethod
    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Go on from `snapshot`."""


class StreamingModel(ABC):
    """A decoder that can be run layer by layer, with encoders that can be run window by window."""

    n_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    sampling_rate: int
    eos_ids: tuple[int, ...]
    module: nn.Module
    quantization: str = "none"  # how the decoder's matrices are held; see `omnimem_train.models.quantised`
    tokenizer: Any
    HEAD: ClassVar[str] = "omnimem_importance"  # the parameter of `module` that `importance_head` is
    gathering: Gathering | None = None  # set where the layers' weights are spread over processes
    adapter: Any = None  # peft's wrapper around `module` once it has an adapter; see `omnimem_train.models.lora`
    graphs: bool = False
    """Record the launches of chunks that repeat and replay them (CUDA graphs), see `omnimem_train.chunk_graphs`."""
    adapter_layouts: tuple[str, ...] = ("peft",)
    """Names under which an adapter can be exported. The first is what peft writes for the class of `module`."""

    @property
    def importance_head(self) -> nn.Parameter | None:
        """(L, 2, E) what a learned importance is read with (`omnimem_train.models.importance`), or None."""
        return getattr(self.module, self.HEAD, None)

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the decoder is."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of keys, values and embeddings."""

    @abstractmethod
    def rotary(self) -> Rotary:
        """How keys are rotated."""

    @abstractmethod
    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin for (B, n, 3) positions, in the form the layers take."""

    @abstractmethod
    def run_layer(
        self, layer: int, hidden: Tensor, rope: tuple[Tensor, Tensor], tap: Tap, extras: Mapping[str, Tensor]
    ) -> Tensor:
        """One decoder layer on (B, n, E); attention goes through `tap`."""

    def run_states(
        self, layer: int, hidden: Tensor, rope: tuple[Tensor, Tensor], tap: Tap, extras: Mapping[str, Tensor]
    ) -> None:
        """Fill `tap` as `run_layer` does, for a layer whose output nobody reads: the last, on a chunk of a stream."""
        self.run_layer(layer, hidden, rope, tap, extras)

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and output matrix: (..., E) -> (..., vocabulary)."""

    @abstractmethod
    def output_weight(self, layer: int) -> Tensor:
        """(E, H * D) output projection of a layer's attention, adapters included, detached."""

    @abstractmethod
    def open(self, info: MediaInfo, fps: float, **options: Any) -> MediaEncoder:
        """The encoder side of a new stream."""

    def prepass(self, sound: Iterable[np.ndarray]) -> dict[str, Any]:
        """Options for `open` that take a look at the whole sound track first; none unless a model needs some.

        Args:
            sound: the track in blocks of (m,) float32 samples at `sampling_rate`.
        """
        return {}

    def shrink(self, frames: np.ndarray, **options: Any) -> np.ndarray:
        """(n, height, width, 3) uint8 frames resized as an encoder opened with `options` does, which leaves them as
        they are in a window marked `shrunk`. For whoever keeps frames waiting; unchanged where a model does not offer
        it."""
        return frames

    def encoding_settings(self) -> dict[str, Any]:
        """What decides how media becomes tokens besides weights, tokenizer and encoder options."""
        return {"config": _without_names(self.module.config.to_dict())}  # type: ignore[operator, union-attr]

    @abstractmethod
    def window_s(self, fps: float) -> float:
        """Seconds of a window; encoding window by window, cut at multiples of this, is exact."""

    @abstractmethod
    def render(self, turn: Turn) -> RenderedTurn:
        """The ids of a turn, from the first token after the closing marks to the answer's end (or, without an answer,
        to where the answer begins)."""

    @abstractmethod
    def tokens_per_s(self, info: MediaInfo, fps: float, **options: Any) -> dict[str, float]:
        """Tokens a second of "visual" and "audio" for such a file; `options` may hold the pixel limits of `open`."""

    def language_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Named modules of the language model alone (where adapters go); names relative to `module`."""
        prefix = self.language_prefix()
        for name, module in self.module.named_modules():
            if name.startswith(prefix):
                yield name, module

    def convert_adapter(self, source: Path, target: Path, layout: str) -> None:
        """Write the adapter folder `source`, in the first of `adapter_layouts`, to `target` in `layout`."""
        assert layout == self.adapter_layouts[0]
        shutil.copytree(source, target, dirs_exist_ok=True)

    @abstractmethod
    def language_prefix(self) -> str:
        """Common prefix of the names of the decoder layers in `module`, e.g. "model.language_model.layers."."""


def weight_sample(weight: Tensor) -> Tensor:
    """Up to 64 values spread over a weight, float32 on the CPU: what fingerprints read of it."""
    return weight.detach().flatten()[:: max(1, weight.numel() // 64)][:64].float().cpu()


def _without_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without where it came from and which version wrote it."""
    kept = {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version")}
    return {k: _without_names(v) if isinstance(v, Mapping) else v for k, v in kept.items()}
