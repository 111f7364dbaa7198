"""A function of tensors whose launches are recorded once and replayed (CUDA graphs), and a small store of them.

A chunk after a full memory runs the same kernels on the same shapes in every chunk of a stream. Launching them one by
one keeps the host busier than the device: a replay is one launch.

On a CPU there is nothing to record; the function is run again on the same fixed inputs, so that everything around it
can be tested.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MET = 64  # keys whose meetings are counted
WORTH = 8  # uses that make up for a recording
Tensors = list[Tensor | None]
Function = Callable[[Tensors], Tensors]


class Captured:
    """`function`, recorded on copies of `inputs`.

    It must read tensors only and wait for no result on the host. Random numbers are drawn anew in each call, from where
    the device's generator stands. Weights it reads beside its inputs are read where they are: they may change, but not
    move. None among inputs and outputs stays None.

    Args:
        function: from a list of tensors to a list of tensors.
        inputs: shapes, precisions and device of what it will be given; may be overwritten here and there.
        pool: memory that recorded functions share which never run at the same time, see `torch.cuda.graph_pool_handle`.
    """

    def __init__(self, function: Function, inputs: Sequence[Tensor | None], pool: Any = None) -> None:
        self._function = function
        self._inputs: Tensors = [None if x is None else x.detach().clone() for x in inputs]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs: Tensors = []
        if any(x is not None and x.is_cuda for x in inputs):
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            # other threads decode and encode meanwhile: what they do is no part of this
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                self._outputs = function(self._inputs)

    def __call__(self, inputs: Sequence[Tensor | None]) -> Tensors:
        """The function's results for `inputs`, as tensors of their own."""
        copy_all([x for x in self._inputs if x is not None], [x for x in inputs if x is not None])
        if self._graph is None:
            return [None if x is None else x.detach().clone() for x in self._function(self._inputs)]
        self._graph.replay()
        found: Tensors = [None if x is None else torch.empty_like(x) for x in self._outputs]
        copy_all([x for x in found if x is not None], [x for x in self._outputs if x is not None])
        return found


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors into others of the same shapes, in few launches."""
    by_kind: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        pair = by_kind.setdefault(target.dtype, ([], []))
        pair[0].append(target)
        pair[1].append(source.detach())
    for into, of in by_kind.values():
        torch._foreach_copy_(into, of)


def shapes(inputs: Sequence[Tensor | None]) -> Hashable:
    """What must agree for a recorded function to be used again."""
    return tuple(None if x is None else (tuple(x.shape), x.dtype) for x in inputs)


@dataclass
class _Held:
    """A recording, how often it was used, and in which call last."""

    captured: Captured
    used: int
    last: int


@dataclass
class Recordings:
    """Recorded functions by key. Few are held: each has memory of its own.

    Attributes:
        most: how many are held.
        seen_first: times that a key is met before it is recorded; they run as usual, which also compiles kernels. Where
            recordings have to make way before they were of use, it grows: recording takes as long as some runs do.
        rest: calls after which one that was not used may make way for another.
        failed: why recording is given up; empty while it is not.
    """

    most: int = 6
    seen_first: int = 2
    rest: int = 16
    failed: str = ""
    _calls: int = 0
    _held: dict[Hashable, _Held] = field(default_factory=dict)
    _met: OrderedDict[Hashable, int] = field(default_factory=OrderedDict)
    _pool: Any = None

    def get(self, key: Hashable, function: Function, inputs: Sequence[Tensor | None]) -> Captured | None:
        """The recording under `key`, made now if the key was met often enough; None to run as usual."""
        self._calls += 1
        if (held := self._held.get(key)) is not None:
            held.used, held.last = held.used + 1, self._calls
            return held.captured
        self._met[key] = self._met.pop(key, 0) + 1
        while len(self._met) > MET:
            self._met.popitem(last=False)
        if self.failed or self._met[key] <= self.seen_first or not self._room():
            return None
        if self._pool is None and torch.cuda.is_available():
            self._pool = torch.cuda.graph_pool_handle()
        found = Captured(function, inputs, self._pool)
        self._held[key] = _Held(found, 1, self._calls)
        return found

    def _room(self) -> bool:
        """Whether one more can be held; the one that was used least recently goes if it has rested."""
        if len(self._held) < self.most:
            return True
        key = min(self._held, key=lambda k: self._held[k].last)
        if self._calls - self._held[key].last <= self.rest:
            return False
        if self._held.pop(key).used < WORTH:
            self.seen_first *= 2
        return True
