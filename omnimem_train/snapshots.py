"""The memories between chunks, for the backward pass: the newest in full, of each older one only what it takes to get
back to it.

With absolute positions a kept key and value never change, so the memory before a chunk is what was kept of it, put back
in place, and what the chunk's selection dropped. A backward pass goes from the newest chunk to the oldest and undoes
one selection after the other; each token is held twice at most, however many chunks it was kept for.

What a chunk leaves can be `stow`ed in host memory (`omnimem_train.offload`). When a memory is restored, what the chunk
before it left begins its way back.

Shape legend: see `omnimem_train.memory.state`.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from omnimem_train.memory.state import LayerMemory
from omnimem_train.offload import HostMemory, Parked
from omnimem_train.surroundings import Surroundings

Layers = tuple[LayerMemory, ...]


@dataclass(frozen=True)
class Undo:
    """The way back from the memory after a chunk to the one before it, for one layer.

    Attributes:
        n_before: tokens before the chunk.
        gone: (B, G, S - K) rows of the candidates that were dropped; None if all were kept.
        keys, values: (B, G, S - K, D) of those.
    """

    n_before: int
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
        return cls(n_before, narrow(gone, tokens.n_tokens), keys, values)

    def apply(self, after: LayerMemory, kept: Tensor | None) -> LayerMemory:
        """Keys and values of the memory before the chunk, of whose candidates `after` has the rows `kept`."""
        if kept is None or self.gone is None or self.keys is None or self.values is None:
            return LayerMemory.bare(after.keys[:, :, : self.n_before], after.values[:, :, : self.n_before])
        stay, go = (rows.long()[..., None].expand(*rows.shape, after.keys.shape[-1]) for rows in (kept, self.gone))

        def back(stayed: Tensor, left: Tensor) -> Tensor:
            both = stayed.new_empty(*stayed.shape[:2], stayed.shape[2] + left.shape[2], stayed.shape[3])
            return both.scatter_(2, stay, stayed).scatter_(2, go, left)[:, :, : self.n_before]

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
    """What a chunk's first pass leaves for the second.

    Attributes:
        embeds: (B, n, E) of its tokens.
        extras: see `TokenBlock`.
        notes: whether selections can be undone, and are noted.
        rows: layer by layer, the rows that were kept (None: all).
        undo: layer by layer, the way back to the memory before, if `notes`.
        keep_inputs: of how many layers, the first ones, inputs are kept.
        inputs: those (B, n, E), from the second layer on; the first one's are `embeds`.
        draws: whether a pass draws random numbers, so that a layer by itself needs to know from where on.
        surroundings: layer by layer, if inputs are kept and it `draws`.
    """

    embeds: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)
    notes: bool = False
    rows: list[Tensor | None] = field(default_factory=list)
    undo: list[Undo] = field(default_factory=list)
    keep_inputs: int = 0
    inputs: list[Tensor] = field(default_factory=list)
    draws: bool = False
    surroundings: list[Surroundings] = field(default_factory=list)
    _parked: Parked | None = None

    def keep(self, layer: int, hidden: Tensor) -> None:
        """Note the input of `layer`, which is about to run."""
        if layer:
            self.inputs.append(hidden.detach())
        if self.draws:
            self.surroundings.append(Surroundings.here(hidden))

    def input_of(self, layer: int) -> Tensor:
        """What `keep` noted."""
        return self.inputs[layer - 1] if layer else self.embeds

    def stow(self, host: HostMemory) -> None:
        """Keep all tensors in host memory until `back`; positions and the like, which are small, stay."""
        undo = [t for u in self.undo for t in (u.gone, u.keys, u.values)]
        extras = [None if t.requires_grad else t for t in self.extras.values()]
        self._parked = host.park([self.embeds, *extras, *self.rows, *self.inputs, *undo])
        nothing = self.embeds.new_empty(0)
        self.embeds = nothing
        self.extras = {name: t if t.requires_grad else nothing for name, t in self.extras.items()}
        self.rows, self.undo = [None] * len(self.rows), [Undo(u.n_before) for u in self.undo]
        self.inputs = [nothing] * len(self.inputs)

    def fetch(self) -> None:
        """Begin the way back of what was stowed."""
        if self._parked is not None:
            self._parked.fetch()

    def back(self) -> None:
        """Have the tensors again."""
        if self._parked is None:
            return
        found = iter(self._parked.get())
        self._parked, embeds = None, next(found)
        assert embeds is not None
        self.embeds = embeds
        self.extras = {name: t if (got := next(found)) is None else got for name, t in self.extras.items()}
        self.rows = [next(found) for _ in self.rows]
        self.inputs = [x for _ in self.inputs if (x := next(found)) is not None]
        self.undo = [Undo(u.n_before, next(found), next(found), next(found)) for u in self.undo]


class Snapshot:
    """Memories of all layers at one moment.

    Args:
        layers: held in full until `precede` says how to get them from newer ones. Nothing of their history is held.
        older: the snapshot before the chunk that led here.
    """

    def __init__(self, layers: Layers, older: Snapshot | None = None) -> None:
        self._held: Layers | None = tuple(memory.detach() for memory in layers)
        self._with_gradient = [[t is not None and t.requires_grad for t in _data(m)] for m in layers]
        self._older = None if older is None else weakref.ref(older)
        self._newer: Snapshot | None = None
        self._next: FirstPass | None = None
        self._parked: Parked | None = None

    def precede(self, newer: Snapshot, chunk: FirstPass) -> None:
        """`chunk` led from here to `newer`. If it noted how to undo that, let go of the memories: they are what is left
        of `newer` when all is undone. Where a stream branches, the last call counts."""
        if self._next is not None and self._newer is not None:
            self._next.undo = []
        self._next = chunk
        if chunk.notes:
            self._held, self._newer = None, newer

    def stow(self, host: HostMemory) -> None:
        """Keep memories that are held in full in host memory."""
        if self._held is not None:
            self._parked = host.park([t for memory in self._held for t in memory.tensors()])
            self._held = None

    def fetch(self) -> None:
        """Begin the way back of what was stowed, here and of the chunk that follows."""
        if self._parked is not None:
            self._parked.fetch()
        if self._next is not None:
            self._next.fetch()

    def restore(self) -> Layers:
        """The memories as leaves of a new graph, with gradient where they had it; keys and values alone where they were
        let go. The one before them will be wanted next, so what is in host memory of it begins its way back."""
        away = [self]
        while (newer := away[-1]._newer) is not None:
            away.append(newer)
        held = away.pop()._in_full()
        for snapshot in reversed(away):
            chunk = snapshot._next
            assert chunk is not None
            chunk.back()
            held = tuple(u.apply(m, rows) for u, m, rows in zip(chunk.undo, held, chunk.rows, strict=True))
        if self._next is not None:
            self._next.undo = []
        self._held, self._newer, self._next = held, None, None  # the next older one starts from here
        if self._older is not None and (older := self._older()) is not None:
            older.fetch()
        return tuple(_leaves(m, flags) for m, flags in zip(held, self._with_gradient, strict=True))

    def _in_full(self) -> Layers:
        if self._parked is not None:
            tensors, n = self._parked.get(), len(self._with_gradient)
            each = len(tensors) // n
            self._held = tuple(LayerMemory.from_tensors(tensors[i * each : (i + 1) * each]) for i in range(n))
            self._parked = None
        assert self._held is not None
        return self._held


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
