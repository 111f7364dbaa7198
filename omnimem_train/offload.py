"""What a training step needs later, kept in host memory meanwhile and copied while the device computes.

A step on a long stream holds two things that grow with it: what leads back from each chunk's memory to the one before
(`omnimem_train.snapshots`), and the embeddings. With `gradient.offload=host` both are in pinned host memory, and the
device holds those of the chunks at hand alone. On a CPU there is nothing to move, and nothing is.

Copies run in streams of their own, one for each direction: the way out starts when a chunk's first pass is done, the
way back one chunk ahead of its use. A tensor that such a copy reads or writes is not used for anything else before the
copy is done: on the device by `record_stream` and events, on the host by torch's allocator of pinned memory. The host
issues work no more than a few copies ahead, or what they hold would pile up on the device.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from omnimem_train.errors import UserError
from omnimem_train.models.interface import TokenBlock

SLAB_BYTES = 64 * 2**20
ALIGNED = 64
LARGE = 4 * 2**20
"""Bytes from which on a tensor is copied by itself."""
AHEAD = 4
"""Copies of a kind that may be under way when the host goes on."""


def host_memory(device: torch.device) -> HostMemory | None:
    """That of this process for `device`; None for a CPU, whose tensors are in host memory anyway."""
    return None if device.type == "cpu" else _of_device(device)


@cache
def _of_device(device: torch.device) -> HostMemory:
    return HostMemory(device)


class Slabs:
    """Host memory, given out front to back in pieces of slabs of one size.

    A slab of which no piece is left goes back to torch's allocator of pinned memory, which waits for the copies that
    read or write it and then hands it out again. Pinning is slow (seconds for some GiB), so that matters: later steps
    find the slabs of the first.

    Args:
        pinned: whether the device can copy by itself; needs CUDA.
        size: bytes of a slab; a power of two, to which the allocator rounds up.
    """

    def __init__(self, pinned: bool, size: int = SLAB_BYTES) -> None:
        self.pinned, self.size = pinned, size
        self._slab: Tensor | None = None
        self._used = 0

    def pieces(self, n_bytes: int) -> list[Tensor]:
        """uint8 pieces that have `n_bytes` together."""
        found = []
        while n_bytes > 0:
            if self._slab is None or self._used >= self.size:
                self._slab, self._used = self._new(self.size), 0
            piece = self._slab[self._used : self._used + n_bytes]
            found.append(piece)
            self._used += -(-piece.numel() // ALIGNED) * ALIGNED
            n_bytes -= piece.numel()
        return found

    def like(self, tensor: Tensor) -> Tensor:
        """Room for `tensor`, of its shape and dtype; a larger one than a slab gets one of its own."""
        n_bytes = tensor.numel() * tensor.element_size()
        if n_bytes > self.size:
            return self._new(n_bytes).view(tensor.dtype).view(tensor.shape)
        if self._slab is not None and self._used + n_bytes > self.size:
            self._slab = None
        whole = self.pieces(n_bytes)
        return (whole[0] if whole else self._new(0)).view(tensor.dtype).view(tensor.shape)

    def reserve(self, n_bytes: int) -> None:
        """Have that much pinned before it is needed."""
        del [self._new(self.size) for _ in range(-(-n_bytes // self.size))][:]

    def _new(self, n_bytes: int) -> Tensor:
        try:
            return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=self.pinned)
        except RuntimeError as error:
            raise UserError(
                f"no {n_bytes / 2**20:.0f} MiB more of {'pinned ' if self.pinned else ''}host memory",
                cause=str(error).splitlines()[0],
                remedy="use gradient.offload=none, shorter clips (data.max_duration_s) or fewer chunks with gradient",
            ) from error


class HostMemory:
    """Host memory for the tensors of one device, and the streams that copies run in.

    Args:
        device: with CUDA, copies overlap with its work; on a CPU they are plain copies (for tests).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cuda = device.type == "cuda"
        self.slabs = Slabs(cuda)
        self._out = torch.cuda.Stream(device) if cuda else None
        self._back = torch.cuda.Stream(device) if cuda else None
        self._ahead = {"out": deque[Any](), "back": deque[Any](), "fed": deque[Any]()}

    def park(self, tensors: Sequence[Tensor | None]) -> Parked:
        """Begin to copy `tensors` out, as far as the current stream has computed them. They may be let go of at
        once, and must not be written to."""
        places = defaultdict[Hashable, list[int]](list)
        for i, tensor in enumerate(tensors):
            if tensor is not None:  # small ones together, so that copies are few
                places[i if tensor.nbytes >= LARGE else tensor.dtype].append(i)
        flats, lengths = [], [0 if t is None else t.numel() for t in tensors]
        for where in places.values():
            parts = [t.detach().reshape(-1) for i in where if (t := tensors[i]) is not None]
            flats.append(torch.cat(parts) if len(parts) > 1 else parts[0])
        if self._out is not None:
            self._out.wait_stream(torch.cuda.current_stream(self.device))
        with self._in(self._out):
            copies = [self._written(flat) for flat in flats]
            done = None if self._out is None else self._out.record_event()
        self._pace("out", done)
        joined = [
            _Joined(flat.dtype, where, [lengths[i] for i in where], pieces)
            for flat, where, pieces in zip(flats, places.values(), copies, strict=True)
        ]
        return Parked(self, [None if t is None else t.shape for t in tensors], joined, done)

    def _written(self, flat: Tensor) -> list[Tensor]:
        """`flat` (n,) copied to pieces of host memory."""
        pieces, start = self.slabs.pieces(flat.numel() * flat.element_size()), 0
        for piece in pieces:
            piece.copy_(flat.view(torch.uint8)[start : start + piece.numel()], non_blocking=True)
            start += piece.numel()
        if self._out is not None:
            flat.record_stream(self._out)
        return pieces

    def fetch(self, joined: Sequence[_Joined], after: Any) -> tuple[list[Tensor], Any]:
        """Begin to copy back what was parked when the event `after` is done. Returns a tensor (n,) for each of
        `joined`, and the event at which they are there."""
        found = []
        self._pace("back", None if self._back is None else torch.cuda.current_stream(self.device).record_event())
        with self._in(self._back):
            if self._back is not None:
                self._back.wait_event(after)
            for part in joined:
                flat = torch.empty(sum(part.lengths), dtype=part.dtype, device=self.device)
                start = 0
                for piece in part.pieces:
                    flat.view(torch.uint8)[start : start + piece.numel()].copy_(piece, non_blocking=True)
                    start += piece.numel()
                found.append(flat)
            return found, None if self._back is None else self._back.record_event()

    def _pace(self, way: str, event: Any, most: int = AHEAD) -> None:
        """Wait until all but the `most` newest events of that way have come."""
        if event is not None:
            self._ahead[way].append(event)
            while len(self._ahead[way]) > most:
                self._ahead[way].popleft().synchronize()

    def arrived(self, tensors: Iterable[Tensor], event: Any) -> None:
        """Let the current stream use `tensors`, which a copy back writes until `event`."""
        if event is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(event)
            for tensor in tensors:
                tensor.record_stream(here)

    def new_slabs(self) -> Slabs:
        """For what lives shorter or longer than what is parked."""
        return Slabs(self.slabs.pinned, self.slabs.size)

    def store(self, block: TokenBlock, slabs: Slabs) -> TokenBlock:
        """`block` with embeddings and extras in `slabs`, once the current stream is done (`synchronise`)."""

        def stored(tensor: Tensor) -> Tensor:
            return slabs.like(tensor).copy_(tensor.detach(), non_blocking=True)

        extras = {name: stored(tensor) for name, tensor in block.extras.items()}
        return replace(block, embeds=stored(block.embeds), extras=extras)

    def synchronise(self) -> None:
        """Wait for the current stream."""
        if self._out is not None:
            torch.cuda.current_stream(self.device).synchronize()

    def ahead(self, blocks: Iterable[TokenBlock]) -> Iterator[TokenBlock]:
        """`blocks` on the device; the copy of each begins before the one in front of it is used."""
        waiting = None
        for block in blocks:
            moving = self._moving(block)
            if waiting is not None:
                yield self._moved(*waiting)
            waiting = moving
        if waiting is not None:
            yield self._moved(*waiting)

    def _moving(self, block: TokenBlock) -> tuple[TokenBlock, list[Tensor], Any]:
        copies = []

        def here(tensor: Tensor) -> Tensor:
            if tensor.device.type == self.device.type and self._back is not None:
                return tensor
            copies.append(torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device))
            return copies[-1].copy_(tensor, non_blocking=True)

        with self._in(self._back):
            return block.map(here), copies, self._back.record_event() if copies and self._back is not None else None

    def _moved(self, block: TokenBlock, copies: list[Tensor], event: Any) -> TokenBlock:
        if event is not None:
            self._pace("fed", torch.cuda.current_stream(self.device).record_event(), 4 * AHEAD)  # parts of chunks
        self.arrived(copies, event)
        return block

    @staticmethod
    def _in(stream: torch.cuda.Stream | None) -> AbstractContextManager[Any]:
        return nullcontext() if stream is None else torch.cuda.stream(stream)


@dataclass(frozen=True)
class _Joined:
    """Tensors of one dtype one after the other: which (`places`), how many numbers each, and their bytes."""

    dtype: torch.dtype
    places: list[int]
    lengths: list[int]
    pieces: list[Tensor]


@dataclass
class Parked:
    """Tensors in host memory. Made by `HostMemory.park`.

    Attributes:
        shapes: of the tensors; None for None.
        joined: where their bytes are; empty once they are on their way back.
        event: when the last copy is done.
    """

    host: HostMemory
    shapes: list[torch.Size | None]
    joined: list[_Joined]
    event: Any
    _flats: list[Tensor] = field(default_factory=list)
    _layout: list[_Joined] = field(default_factory=list)

    def fetch(self) -> None:
        """Begin to copy them back, if that has not begun. Their host memory is free from then on."""
        if self.joined:
            self._flats, self.event = self.host.fetch(self.joined, self.event)
            self._layout = [replace(part, pieces=[]) for part in self.joined]
            self.joined = []

    def get(self) -> list[Tensor | None]:
        """The tensors as they were, on the device."""
        self.fetch()
        self.host.arrived(self._flats, self.event)
        found: list[Tensor | None] = [None] * len(self.shapes)
        for part, flat in zip(self._layout, self._flats, strict=True):
            for place, tensor in zip(part.places, flat.split(part.lengths), strict=True):
                shape = self.shapes[place]
                assert shape is not None
                found[place] = tensor.view(shape)
        return found
