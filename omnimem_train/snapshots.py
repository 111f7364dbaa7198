"""The memories between chunks, for the backward pass: the newest in full, of each older one only what it takes to get
back to it.

With absolute positions a kept key and value never change, so the memory before a chunk is what was kept of it, put back
in place, and what the chunk's selection dropped. A backward pass goes from the newest chunk to the oldest and undoes
one selection after the other; each token is held twice at most, however many chunks it was kept for.

Shape legend: see `omnimem_train.memory.state`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from omnimem_train.memory.state import LayerMemory

Layers = tuple[LayerMemory, ...]


@dataclass(frozen=True)
class Undo:
    """The way back from the memory after a chunk to the one before it, for one layer.

    Attributes:
        n_before: tokens before the chunk.
        kept: (B, G, K) rows of the candidates that are left; None if all are.
        gone: (B, G, S - K) rows of the others.
        keys, values: (B, G, S - K, D) of the others.
    """

    n_before: int
    kept: Tensor | None = None
    gone: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None

    @classmethod
    def of(cls, tokens: LayerMemory, n_before: int, kept: Tensor | None) -> Undo:
        """For candidates `tokens`, the first `n_before` of them memory, of which the rows `kept` stay (None: all)."""
        if kept is None or n_before == 0:
            return cls(n_before)
        gone = others(kept.long(), tokens.n_tokens)
        index = gone[..., None].expand(*gone.shape, tokens.keys.shape[-1])
        keys, values = tokens.keys.detach().gather(2, index), tokens.values.detach().gather(2, index)
        return cls(n_before, kept, narrow(gone, tokens.n_tokens), keys, values)

    def apply(self, after: LayerMemory) -> LayerMemory:
        """Keys and values of the memory before the chunk."""
        if self.kept is None or self.gone is None or self.keys is None or self.values is None:
            return LayerMemory.bare(after.keys[:, :, : self.n_before], after.values[:, :, : self.n_before])
        kept, gone = (
            rows.long()[..., None].expand(*rows.shape, after.keys.shape[-1]) for rows in (self.kept, self.gone)
        )

        def back(stayed: Tensor, left: Tensor) -> Tensor:
            both = stayed.new_empty(*stayed.shape[:2], stayed.shape[2] + left.shape[2], stayed.shape[3])
            return both.scatter_(2, kept, stayed).scatter_(2, gone, left)[:, :, : self.n_before]

        return LayerMemory.bare(back(after.keys, self.keys), back(after.values, self.values))


def others(rows: Tensor, n: int) -> Tensor:
    """Unique rows (B, G, K) of n -> the n - K that are not among them, ascending, without asking the device."""
    taken = torch.zeros(*rows.shape[:2], n, dtype=torch.bool, device=rows.device).scatter_(2, rows, True)
    n_gone = n - rows.shape[2]
    place = ((~taken).cumsum(-1) - 1).masked_fill_(taken, n_gone)  # rows that are taken share a place at the end
    found = rows.new_empty(*rows.shape[:2], n_gone + 1)
    return found.scatter_(2, place, torch.arange(n, device=rows.device).expand_as(place))[..., :n_gone]


def narrow(rows: Tensor, n: int) -> Tensor:
    """Rows of n in as few bytes as they need."""
    return rows.to(torch.int16 if n <= torch.iinfo(torch.int16).max else torch.int32)


@dataclass
class FirstPass:
    """What a chunk's first pass leaves, layer by layer: the rows that were kept (None: all), and where the pass will be
    repeated and selections can be undone (`notes`) the way back to the memory before."""

    notes: bool = False
    rows: list[Tensor | None] = field(default_factory=list)
    undo: list[Undo] = field(default_factory=list)


class Snapshot:
    """Memories of all layers at one moment.

    Args:
        layers: held in full until `follow` says how to get them from newer ones. Nothing of their history is held.
    """

    def __init__(self, layers: Layers) -> None:
        self._held: Layers | None = tuple(memory.detach() for memory in layers)
        self._with_gradient = [[t is not None and t.requires_grad for t in _data(m)] for m in layers]
        self._newer: Snapshot | None = None
        self._undo: Sequence[Undo] = ()

    def follow(self, newer: Snapshot, undo: Sequence[Undo]) -> None:
        """Let go of the memories: they are what is left of `newer` when `undo` is applied, layer by layer. Where a
        stream branches, the last call counts."""
        self._held, self._newer, self._undo = None, newer, undo

    def restore(self) -> Layers:
        """The memories as leaves of a new graph, with gradient where they had it; keys and values alone where they were
        let go."""
        away = [self]
        while (newer := away[-1]._newer) is not None:
            away.append(newer)
        held = away.pop()._held
        for snapshot in reversed(away):
            assert held is not None
            held = tuple(undo.apply(memory) for undo, memory in zip(snapshot._undo, held, strict=True))
        assert held is not None
        self._held, self._newer, self._undo = held, None, ()  # the next older one starts from here
        return tuple(_leaves(m, flags) for m, flags in zip(held, self._with_gradient, strict=True))


def _data(memory: LayerMemory) -> tuple[Tensor | None, ...]:
    return memory.keys, memory.values, memory.hidden


def _leaves(memory: LayerMemory, with_gradient: list[bool]) -> LayerMemory:
    found = [
        None if t is None else t.detach().requires_grad_(flag)
        for t, flag in zip(_data(memory), with_gradient, strict=True)
    ]
    keys, values, hidden = found
    assert keys is not None and values is not None
    return replace(memory, keys=keys, values=values, hidden=hidden)
