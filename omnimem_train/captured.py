"""A function of tensors whose launches are recorded once and replayed (CUDA graphs), and a small store of them.

A chunk after a full memory runs the same kernels on the same shapes in every chunk of a stream. Launching them one by
one keeps the host busier than the device: a replay is one launch.

On a CPU there is nothing to record; the function is run again on the same fixed inputs, so that everything around it
can be tested.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from omnimem_train.beside import Beside

MET = 64  # keys whose meetings are counted
WORTH = 8  # uses that make up for a recording
Tensors = list[Tensor | None]
Function = Callable[[Tensors], Tensors]


class Slots:
    """Memory at fixed places, shared by recordings of which none runs while another does.

    The largest tensor of a recording takes the largest slot, and so on; a slot that is too small makes way for a larger
    one, and whoever has the smaller one keeps it. So memory is shared best where the largest recording comes first.
    """

    def __init__(self) -> None:
        self._slots: list[Tensor] = []  # uint8, longest first

    def like(self, tensors: Sequence[Tensor | None]) -> Tensors:
        """Contiguous tensors of the shapes, precisions and device of `tensors`, in slots of their own."""
        found: Tensors = [None] * len(tensors)
        there = [(i, t) for i, t in enumerate(tensors) if t is not None]
        for number, (i, tensor) in enumerate(sorted(there, key=lambda pair: -pair[1].nbytes)):
            slots = self._slots[number : number + 1]
            if not slots or slots[0].numel() < tensor.nbytes or slots[0].device != tensor.device:
                slots = [torch.empty(tensor.nbytes, dtype=torch.uint8, device=tensor.device)]
                self._slots[number : number + 1] = slots
            found[i] = slots[0][: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return found

    @property
    def n_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(slot.numel() for slot in self._slots)


@dataclass
class Shared:
    """What recordings share that never run at the same time: places of inputs and of results, and the memory pool of
    everything in between.

    Attributes:
        failed: why recording is given up, by all of them: what a failed one leaves behind in the pool and in the
            device's generator is not to be built on. Empty while it is not.
    """

    failed: str = ""
    inputs: Slots = field(default_factory=Slots)
    outputs: Slots = field(default_factory=Slots)
    _pool: Any = None
    _stream: Any = None
    _side: Any = None

    @property
    def stream(self) -> torch.cuda.Stream:
        """On which is recorded. What is recorded there goes before all other work of the device, which torch starts
        with priority 0 (encoders running ahead, NCCL); streams of this priority are given to nobody else."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(priority=-2)
        return self._stream

    @property
    def beside(self) -> Beside | None:
        """For a second branch of what is recorded, which has to make way for the first; None without a GPU."""
        if self._side is None and torch.cuda.is_available():
            self._side = torch.cuda.Stream(priority=-1)
        return None if self._side is None else Beside(self._side)

    @property
    def pool(self) -> Any:
        """See `torch.cuda.graph_pool_handle`."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool


class Captured:
    """`function`, recorded on memory of the shapes of `inputs`.

    It must read tensors only and wait for no result on the host. Random numbers are drawn anew in each call, from where
    the device's generator stands. Weights it reads beside its inputs are read where they are: they may change, but not
    move. None among inputs and outputs stays None.

    Args:
        function: from a list of tensors to a list of tensors.
        inputs: what it is given the first time.
        shared: memory it has together with others; its own if not given.
    """

    def __init__(self, function: Function, inputs: Sequence[Tensor | None], shared: Shared | None = None) -> None:
        self._function, self._shared = function, shared or Shared()
        self._inputs = self._shared.inputs.like(inputs)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs: Tensors = []
        if any(x is not None and x.is_cuda for x in inputs):
            _copy_given(self._inputs, inputs)
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            # torch.cuda.graph would also give back all pinned host memory that waits to be used again
            torch.cuda.empty_cache()
            with torch.cuda.stream(self._shared.stream):
                # other threads decode and encode meanwhile: what they do is no part of this
                self._graph.capture_begin(self._shared.pool, capture_error_mode="thread_local")
                try:
                    self._run()
                except BaseException:
                    with suppress(RuntimeError):  # of what is broken already; the first error is the one to tell
                        self._graph.capture_end()
                    raise
                self._graph.capture_end()

    def __call__(self, inputs: Sequence[Tensor | None]) -> Tensors:
        """The function's results for `inputs`, as tensors of their own."""
        _copy_given(self._inputs, inputs)
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()
        found: Tensors = [None if x is None else torch.empty_like(x) for x in self._outputs]
        _copy_given(found, self._outputs)
        return found

    def _run(self) -> None:
        """The function, and its results moved to where they stay until the next recording runs."""
        found = self._function(self._inputs)
        self._outputs = self._shared.outputs.like(found)
        _copy_given(self._outputs, found)


def _copy_given(targets: Sequence[Tensor | None], sources: Sequence[Tensor | None]) -> None:
    """Copy all that is not None."""
    copy_all([x for x in targets if x is not None], [x for x in sources if x is not None])


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors into others of the same shapes, in few launches: one for all of a precision that are laid out as
    their targets are, and one for each other."""
    by_kind: dict[Hashable, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        pair = by_kind.setdefault((target.dtype, source.dtype, target.stride() == source.stride()), ([], []))
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
    """Recorded functions by key. Few are held: each is thousands of launches.

    Attributes:
        most: how many are held.
        seen_first: times that a key is met before it is recorded; they run as usual, which also compiles kernels. Where
            recordings have to make way before they were of use, it grows: recording takes as long as some runs do.
        rest: calls after which one that was not used may make way for another.
        shared: with others.
    """

    most: int = 6
    seen_first: int = 2
    rest: int = 16
    shared: Shared = field(default_factory=Shared)
    _calls: int = 0
    _held: dict[Hashable, _Held] = field(default_factory=dict)
    _met: OrderedDict[Hashable, int] = field(default_factory=OrderedDict)

    def get(self, key: Hashable, function: Function, inputs: Sequence[Tensor | None]) -> Captured | None:
        """The recording under `key`, made now if the key was met often enough; None to run as usual."""
        self._calls += 1
        if self.shared.failed:
            self._held.clear()
            return None
        if (held := self._held.get(key)) is not None:
            held.used, held.last = held.used + 1, self._calls
            return held.captured
        self._met[key] = self._met.pop(key, 0) + 1
        while len(self._met) > MET:
            self._met.popitem(last=False)
        if self._met[key] <= self.seen_first or not self._room():
            return None
        try:
            found = Captured(function, inputs, self.shared)
        except Exception as error:  # of many kinds, from CUDA; running as usual remains
            self._give_up(inputs, error)
            return None
        self._held[key] = _Held(found, 1, self._calls)
        return found

    def _give_up(self, inputs: Sequence[Tensor | None], error: Exception) -> None:
        """Let go of everything. A generator that a failed recording left in its state of being recorded would refuse to
        draw from then on, so the device goes on with a copy of it."""
        self.shared.failed = str(error)
        self._held.clear()
        for index in {x.device.index for x in inputs if x is not None and x.is_cuda}:
            generator = torch.cuda.default_generators[index]
            generator.graphsafe_set_state(generator.clone_state())
        warnings.warn(f"chunks are run launch by launch, recording them failed: {error}", stacklevel=4)

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
