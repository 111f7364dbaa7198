"""The decoder's frozen weights, spread over the processes and put together one layer at a time.

Streams of unequal length run unequal numbers of passes over the layers, and a collective that one process enters and
another does not is a hang. So the collectives do not hang on modules or on autograd: they follow a `Rota`. A step has
two phases. In the first every pass visits layers 0, 1, ..., L - 1 (chunks, questions, the teacher); in the second every
pass visits them up and down again (a chunk is run anew, then differentiated, see `omnimem_train.recompute`; one that
goes layer by layer does both on the way down, and takes part in the way up because others may need it). Before a
pass a process announces it, in one all-reduce of one number; a process that has nothing left to run announces that, and
as long as any other has something it takes part in the gathering of an empty pass. Nothing about the passes has to be
known in advance: what ends a phase is that nobody announces anything.

The weights that are trained (adapters, a learned importance) are small; they stay whole on every process, where the
engine (DDP, DeepSpeed) averages or reduces their gradients. So do embeddings, norm, output matrix and the encoders.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from omnimem_train.models.interface import StreamingModel, Tap


class Shard(ABC):
    """The frozen weights of one layer. Autograd may hold on to the layer's weights: they are the same tensors each time
    they are gathered, their storage alone comes and goes."""

    @abstractmethod
    def start(self) -> None:
        """Begin to gather, if need be; does not wait."""

    @abstractmethod
    def gather(self) -> None:
        """Fill the layer's weights; returns when work enqueued from now on sees them."""

    @abstractmethod
    def release(self) -> None:
        """Free what `gather` filled."""


class Rota:
    """Who gathers which layer when: the same on every process, whatever each has to run.

    Args:
        shards: of the layers, in order.
        group: the processes that share them.
        device: where tensors of that group's collectives are.
    """

    def __init__(self, shards: Sequence[Shard], group: dist.ProcessGroup, device: torch.device) -> None:
        self.shards, self.group, self.device = shards, group, device
        self._passes = self._empty = 0  # since they were last read
        self._cycle: list[int] = []  # layers in the order a pass of this phase visits them; empty outside of a step
        self._next = 0  # place in it
        self._held: int | None = None
        self._both: int | None = None  # layer that was gathered for its second run and its way back at once

    # Phases ----------------------------------------------------------------------------------------------------------

    def attach(self, step: nn.Module, weights: Sequence[nn.Parameter]) -> None:
        """Begin the first phase with a forward of `step` and the second at its end; end that when the first gradient
        of `weights` is complete. Every pass is in the graph of every weight, so none is left then; and engines reduce
        gradients after that, which is too late to wait for each other here."""
        step.register_forward_pre_hook(lambda *_: self._begin())
        step.register_forward_hook(lambda *_: self._turn())
        for weight in weights:
            weight.register_post_accumulate_grad_hook(lambda _: self._end())

    def read(self) -> tuple[float, int]:
        """The share of empty passes since this was last asked, and the passes in all."""
        total = self._passes + self._empty
        share = self._empty / max(total, 1)
        self._passes = self._empty = 0
        return share, total

    def _begin(self) -> None:
        if self._cycle:
            raise RuntimeError("a step began before the backward pass of the one before it")
        self._cycle = list(range(len(self.shards)))

    def _turn(self) -> None:
        self._wait_for_others()
        up = list(range(len(self.shards)))
        self._cycle = up + up[::-1]

    def _end(self) -> None:
        if self._cycle:
            self._wait_for_others()
            self._cycle = []

    def _wait_for_others(self) -> None:
        """Take part in passes as long as any process has some left."""
        self._complete()
        while self._announce(busy=False):
            self._empty += 1
            self._complete()
        if self._held is not None:
            self.shards[self._held].release()
            self._held = None

    # Passes ----------------------------------------------------------------------------------------------------------

    def before(self, layer: int) -> None:
        """Gather `layer`; it is about to run."""
        self._both = None
        self._go_to(layer)

    def before_both(self, layer: int) -> None:
        """Gather `layer`; it is about to run and then to be differentiated, before any other layer is."""
        self.before_backward(layer)
        self._both = layer

    def before_backward(self, layer: int) -> None:
        """Gather `layer`; it is about to be differentiated."""
        both, self._both = self._both, None
        if both == layer:
            return
        if len(self._cycle) != 2 * len(self.shards):
            raise RuntimeError("a sharded layer is differentiated outside of the backward pass of a step")
        self._go_to(2 * len(self.shards) - 1 - layer)

    def after(self, layer: int, out: Tensor, tap: Tap) -> Tensor:
        """Mark what leaves `layer`: the backward pass comes by here before anything of the layer itself."""
        given = [out, tap.keys, tap.values, *(tap.joined or ())]
        if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in given):
            return out
        assert tap.keys is not None and tap.values is not None
        left = _Leave.apply(self, layer, *given)
        tap.keys, tap.values = left[1:3]
        tap.joined = (left[3], left[4]) if tap.joined else None
        return left[0]

    def _go_to(self, place: int) -> None:
        if not self._cycle:
            raise RuntimeError("a layer whose weights are sharded runs outside of a training step")
        if place < self._next:
            self._complete()
        if self._next == 0:
            self._announce(busy=True)
            self._passes += 1
        while self._next <= place:
            self._visit()

    def _complete(self) -> None:
        """Visit what the current pass has left out, if one is under way."""
        while 0 < self._next < len(self._cycle):
            self._visit()
        self._next = 0

    def _announce(self, busy: bool) -> bool:
        """Whether any process has something to run. One that is busy does not wait for the answer."""
        told = torch.full((), int(busy), dtype=torch.int32, device=self.device)
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self.group)
        if busy or not bool(told):
            return busy
        self._visit()
        return True

    @torch.no_grad()
    def _visit(self) -> None:
        layer = self._cycle[self._next]
        self._next += 1
        if self._held != layer:
            if self._held is not None:
                self.shards[self._held].release()
            self.shards[layer].gather()
            self._held = layer
        if self._next < len(self._cycle) and self._cycle[self._next] != layer:
            self.shards[self._cycle[self._next]].start()


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rota: Rota, layer: int, *given: Tensor) -> tuple[Tensor, ...]:
        ctx.rota, ctx.layer = rota, layer
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in given)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        ctx.rota.before_backward(ctx.layer)
        return None, None, *grads


# Ways to spread a layer ----------------------------------------------------------------------------------------------


class Shelf(nn.Module):
    """The frozen weights of a layer as a module of their own, which never runs: no hook of any engine is on the layer.

    Args:
        layer: whose weights; they stay there until `put_back`.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.places: list[list[tuple[nn.Module, str]]] = []
        known: dict[nn.Parameter, int] = {}
        for module, name, weight in frozen(layer):
            if weight not in known:
                known[weight] = len(self.places)
                self.places.append([])
                self.register_parameter(f"weight{known[weight]}", weight)
            self.places[known[weight]].append((module, name))

    def weights(self) -> list[nn.Parameter]:
        """As they are now: whole or not."""
        return [getattr(self, f"weight{i}") for i in range(len(self.places))]

    def put_back(self, weights: Sequence[nn.Parameter]) -> None:
        """Make `weights` those of the layer."""
        for places, weight in zip(self.places, weights, strict=True):
            for module, name in places:
                setattr(module, name, weight)


def frozen(layer: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """The module, the name there, and the weight, of all that is not trained."""
    for module in layer.modules():
        for name, weight in module.named_parameters(recurse=False):
            if not weight.requires_grad:
                yield module, name, weight


class FsdpShard(Shard):
    """Through FSDP2 (`torch.distributed.fsdp.fully_shard`): every weight is cut along its first dimension."""

    def __init__(self, layer: nn.Module, mesh: DeviceMesh) -> None:
        shelf = Shelf(layer)
        fully_shard(shelf, mesh=mesh)
        self.module: Any = shelf
        self._pending: Any = None
        self.gather()
        shelf.put_back(shelf.weights())
        self.release()

    def start(self) -> None:
        """See `Shard`."""
        if self._pending is None:
            self._pending = self.module.unshard(async_op=True)

    def gather(self) -> None:
        """See `Shard`."""
        self.start()
        self._pending.wait()
        self._pending = None

    def release(self) -> None:
        """See `Shard`."""
        self.module.reshard()


class ZeroShard(Shard):
    """Through DeepSpeed's ZeRO-3 partitions."""

    def __init__(self, layer: nn.Module, group: dist.ProcessGroup) -> None:
        from deepspeed import zero

        shelf = Shelf(layer)
        self.weights = [nn.Parameter(w.detach().clone(), requires_grad=False) for w in shelf.weights()]
        shelf.put_back(self.weights)
        zero.Init(module=shelf, data_parallel_group=group, mem_efficient_linear=False, dtype=self.weights[0].dtype)
        self.parts: list[Any] = list(shelf.parameters())
        self._pending: Any = None
        self.release()

    def start(self) -> None:
        """See `Shard`."""
        if self._pending is None:
            self._pending = self.parts[0].all_gather_coalesced(self.parts)

    def gather(self) -> None:
        """See `Shard`."""
        self.start()
        self._pending.wait()
        self._pending = None
        for weight, part in zip(self.weights, self.parts, strict=True):
            weight.untyped_storage().resize_(weight.numel() * weight.element_size())
            with torch.autograd._unsafe_preserve_version_counter(weight), torch.no_grad():
                weight.copy_(part)
        self.parts[0].partition(self.parts)

    def release(self) -> None:
        """See `Shard`."""
        for weight in self.weights:
            weight.untyped_storage().resize_(0)


def shard_layers(model: StreamingModel, kind: str) -> Rota:
    """Spread the frozen weights of the decoder layers of `model` over all processes: "fsdp" or "zero3"."""
    group = dist.new_group()
    assert group is not None
    layers = model.module.get_submodule(model.language_prefix().rstrip("."))
    if kind == "zero3":
        shards: list[Shard] = [ZeroShard(layer, group) for layer in layers.children()]
    else:
        mesh = DeviceMesh.from_group(group, model.device.type)
        shards = [FsdpShard(layer, mesh) for layer in layers.children()]
    model.gathering = Rota(shards, group, model.device)
    return model.gathering
