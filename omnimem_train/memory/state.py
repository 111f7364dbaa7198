"""What one layer remembers between chunks.

Shape legend, used in the whole package: B streams, G kv heads, H query heads (H / G read one kv head), S candidate
tokens, K kept tokens, P probe queries, D head width, E model width.

Everything here is functional: a method returns a new `LayerMemory` and never writes into a tensor, so a memory can be
shared by many questions and gradients reach the keys and values that were kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

TEXT, VISUAL, AUDIO = 0, 1, 2
MODALITIES = {"text": TEXT, "visual": VISUAL, "audio": AUDIO}


@dataclass(frozen=True)
class LayerMemory:
    """Tokens of one layer: what is kept between chunks, or (during a chunk) the candidates for being kept.

    Tokens are in stream order. Different kv heads may hold different tokens, all of them the same number.

    Attributes:
        keys: (B, G, S, D), rotated to `positions`.
        values: (B, G, S, D).
        positions: (B, G, S, 3) int64, the (time, row, column) position each key is rotated to.
        modality: (B, G, S) int8, one of `TEXT`, `VISUAL`, `AUDIO`.
        time_s: (B, G, S) float32, seconds since the start of the stream.
        index: (B, G, S) int64, number of the token in its stream.
        evidence: (B, G, S) float32, importance a selector stored for a kept token; 0 for a new one.
        hidden: (B, S, E) layer inputs, or None; kept only for selectors that ask for them, which keep the same tokens
            for all kv heads.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    modality: Tensor
    time_s: Tensor
    index: Tensor
    evidence: Tensor
    hidden: Tensor | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens held by each kv head of each stream."""
        return self.keys.shape[2]

    @classmethod
    def empty(
        cls,
        batch: int,
        kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        hidden_size: int | None = None,
    ) -> LayerMemory:
        """A memory without tokens. `hidden_size` is given when layer inputs are kept."""
        shape = (batch, kv_heads, 0)
        return cls(
            keys=torch.zeros(*shape, head_dim, dtype=dtype, device=device),
            values=torch.zeros(*shape, head_dim, dtype=dtype, device=device),
            positions=torch.zeros(*shape, 3, dtype=torch.int64, device=device),
            modality=torch.zeros(shape, dtype=torch.int8, device=device),
            time_s=torch.zeros(shape, dtype=torch.float32, device=device),
            index=torch.zeros(shape, dtype=torch.int64, device=device),
            evidence=torch.zeros(shape, dtype=torch.float32, device=device),
            hidden=None if hidden_size is None else torch.zeros(batch, 0, hidden_size, dtype=dtype, device=device),
        )

    @classmethod
    def from_chunk(
        cls,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        modality: Tensor,
        time_s: Tensor,
        index: Tensor,
        hidden: Tensor | None = None,
    ) -> LayerMemory:
        """Tokens fresh from a layer. `positions` (B, n, 3), `modality`, `time_s`, `index` (B, n) hold for all heads."""
        batch, heads, n, _ = keys.shape

        def per_head(x: Tensor) -> Tensor:
            return x.unsqueeze(1).expand(batch, heads, n, *x.shape[2:])

        return cls(
            keys=keys,
            values=values,
            positions=per_head(positions),
            modality=per_head(modality),
            time_s=per_head(time_s),
            index=per_head(index),
            evidence=torch.zeros(batch, heads, n, dtype=torch.float32, device=keys.device),
            hidden=hidden,
        )

    @classmethod
    def bare(cls, keys: Tensor, values: Tensor) -> LayerMemory:
        """Keys and values (B, G, S, D) alone, all that a recomputation reads; nothing else is known of the tokens."""
        none = cls.empty(keys.shape[0], keys.shape[1], 0, dtype=keys.dtype, device=keys.device)
        return replace(none, keys=keys, values=values)

    @property
    def is_bare(self) -> bool:
        """Whether there are keys and values alone."""
        return self.index.shape[2] < self.n_tokens

    def append(self, new: LayerMemory, joined: tuple[Tensor, Tensor] | None = None) -> LayerMemory:
        """Memory followed by `new`: the candidates of a chunk. `joined` holds keys and values of both, where attention
        has put them together already. Bare if one of the two is."""
        if (self.hidden is None) != (new.hidden is None):
            raise ValueError("one of the two memories carries layer inputs (hidden) and the other does not")
        both = {} if joined is None else {"keys": joined[0], "values": joined[1]}
        if self.is_bare or new.is_bare:
            keys, values = joined or (
                torch.cat([a, b], 2) for a, b in ((self.keys, new.keys), (self.values, new.values))
            )
            return LayerMemory.bare(keys, values)
        for name in (f.name for f in fields(self) if f.name != "hidden" and f.name not in both):
            both[name] = torch.cat([getattr(self, name), getattr(new, name)], dim=2)
        hidden = None
        if self.hidden is not None and new.hidden is not None:
            hidden = torch.cat([self.hidden, new.hidden], dim=1)
        return LayerMemory(**both, hidden=hidden)

    def gather(self, rows: Tensor) -> LayerMemory:
        """The tokens in `rows` (B, G, K) int64, per stream and kv head, none twice. Differentiable in keys, values and
        hidden."""
        if self.is_bare:
            return LayerMemory.bare(_Rows.apply(self.keys, rows), _Rows.apply(self.values, rows))

        def take(x: Tensor) -> Tensor:
            return x.gather(2, rows) if x.ndim == 3 else _Rows.apply(x, rows)

        kept = {f.name: take(getattr(self, f.name)) for f in fields(self) if f.name != "hidden"}
        hidden = None
        if self.hidden is not None:
            hidden = self.hidden.gather(1, rows[:, 0].unsqueeze(-1).expand(-1, -1, self.hidden.shape[-1]))
        return LayerMemory(**kept, hidden=hidden)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors in field order: what a checkpointed function takes and returns."""
        return tuple(getattr(self, f.name) for f in fields(self))

    @classmethod
    def from_tensors(cls, tensors: Iterable[Tensor | None]) -> LayerMemory:
        """Inverse of `tensors`."""
        return cls(*tensors)  # type: ignore[arg-type]

    def detach(self) -> LayerMemory:
        """The same memory without gradient history."""
        return LayerMemory.from_tensors(None if t is None else t.detach() for t in self.tensors())

    def to(self, device: torch.device | str) -> LayerMemory:
        """The same memory on `device`."""
        return LayerMemory.from_tensors(None if t is None else t.to(device) for t in self.tensors())

    def repeat(self, batch: int) -> LayerMemory:
        """The memory of one stream seen by `batch` streams; no data is copied."""
        if self.keys.shape[0] != 1:
            raise ValueError(f"only the memory of one stream can be repeated, this one holds {self.keys.shape[0]}")
        return LayerMemory.from_tensors(None if t is None else t.expand(batch, *t.shape[1:]) for t in self.tensors())

    def with_evidence(self, evidence: Tensor) -> LayerMemory:
        """The same tokens with `evidence` (B, G, S) float32 stored."""
        return replace(self, evidence=evidence)

    def nbytes(self) -> int:
        """Bytes of keys and values (what a memory budget in bytes counts)."""
        return self.keys.nbytes + self.values.nbytes


class _Rows(torch.autograd.Function):
    """Rows (B, G, K) of (B, G, S, D). They are unique, so the gradient is put in place rather than added up, which for
    half precision on a GPU is an order slower."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.n = x.shape[2]
        return x.gather(2, rows.unsqueeze(-1).expand(*rows.shape, x.shape[-1]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        whole = grad.new_zeros(*grad.shape[:2], ctx.n, grad.shape[-1])
        return whole.scatter(2, rows.unsqueeze(-1).expand_as(grad), grad), None
