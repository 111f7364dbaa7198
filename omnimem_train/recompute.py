"""A chunk in a training step, run twice: once without a graph, and again with one when its gradient is due.

The first pass leaves what is kept of it and nothing else: no graph is built, no hook is called for the hundreds of
tensors that an ordinary checkpoint notes and throws away. To the graph of the step a chunk is one node, from the memory
before it, its embeddings and the trained weights to the memory after it. Every weight gets one gradient per chunk, and
is done once per step, as gradient reduction across processes expects it.

Shape legend: see `omnimem_train.memory.state`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from omnimem_train.memory.state import LayerMemory
from omnimem_train.snapshots import Layers, Snapshot
from omnimem_train.surroundings import Surroundings

Result = tuple[Layers, Tensor | None]
Run = Callable[[Layers, Tensor], Result]
Back = Callable[[Layers, Tensor, Sequence[Tensor | None], Sequence[bool]], list[Tensor | None] | None]


def recomputed(
    run: Run,
    layers: Layers,
    snapshot: Snapshot,
    embeds: Tensor,
    weights: Sequence[Tensor],
    learning: int | None = None,
    back: Back | None = None,
    again: Callable[[], Tensor] | None = None,
) -> Result:
    """`run(layers, embeds)`, computed again in the backward pass on what `snapshot` restores.

    Dropout draws the same numbers both times. The graph can be gone through once.

    Args:
        run: from memories and embeddings (B, n, E) to memories, and one more tensor or None.
        layers: the memories; not held after the first pass.
        snapshot: of `layers`.
        embeds: what the chunk's tokens enter the first layer as.
        weights: everything else `run` reads that may want a gradient.
        learning: memories of how many layers, the first ones, have gradient afterwards; None for all.
        back: a shorter way to the same gradients: from memories, embeddings, gradients of the outputs and which inputs
            need one to what `gradients_of` gives; or to None, where there is none.
        again: gives the embeddings to the second pass; without it they are held.
    """
    here = Surroundings.here(embeds)
    work = _Work(run, snapshot, again or (lambda: embeds), list(weights), learning, back, here)
    first = [layers]
    given = [embeds, *_data(layers), *weights]
    outputs = iter(_Twice.apply(work, first, *given))
    kept, more = work.result.pop()
    return tuple(_with_data(memory, outputs) for memory in kept), None if more is None else next(outputs)


@dataclass
class _Work:
    """What the backward pass of a chunk needs. `result` is filled by the first pass for its caller."""

    run: Run
    snapshot: Snapshot
    again: Callable[[], Tensor]
    weights: list[Tensor]
    learning: int | None
    back: Back | None
    surroundings: Surroundings
    result: list[Result] = field(default_factory=list)

    def gradients(self, grads: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
        """Gradients of embeddings, memories and weights (None where `needed` is False), from those of the outputs."""
        layers = self.snapshot.restore()
        embeds = self.again().detach().requires_grad_(needed[0])
        if self.back is not None:
            back = self.back
            found = self.surroundings.again(lambda: back(layers, embeds, grads, needed))
            if found is not None:
                return found
        kept, more = self.surroundings.again(lambda: self.run(layers, embeds))
        return gradients_of(kept, more, [embeds, *_data(layers), *self.weights], grads, needed)


def gradients_of(
    kept: Layers, more: Tensor | None, inputs: Sequence[Tensor], grads: Sequence[Tensor | None], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the `inputs` of a pass, None where they are not `needed`.

    Args:
        kept, more: what the pass gave.
        inputs: embeddings, data of the memories, weights.
        grads: of the data of `kept`, and of `more` where the first pass gave it.
    """
    outputs: list[Tensor | None] = [*_data(kept)]
    if len(grads) > len(outputs):  # there was one more the first time, perhaps of layers without gradient alone
        outputs.append(more)
    return differentiate(outputs, grads, inputs, needed)


def differentiate(
    outputs: Sequence[Tensor | None], grads: Sequence[Tensor | None], inputs: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the `inputs` where they are `needed`, None elsewhere, from those of the `outputs` that have any."""
    given = zip(outputs, grads, strict=True)
    pairs = [(o, g) for o, g in given if o is not None and g is not None and o.requires_grad]
    places = [i for i, (x, need) in enumerate(zip(inputs, needed, strict=True)) if need and x.requires_grad]
    found: list[Tensor | None] = [None] * len(inputs)
    if pairs and places:
        ends, weight = zip(*pairs, strict=True)
        gradients = torch.autograd.grad(ends, [inputs[i] for i in places], weight, allow_unused=True)
        for i, gradient in zip(places, gradients, strict=True):
            found[i] = gradient
    return found


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: _Work, first: list[Layers], *given: Tensor) -> tuple[Tensor, ...]:
        kept, more = work.run(first.pop(), given[0])
        work.result.append((kept, more))
        ctx.work = work
        ctx.set_materialize_grads(False)
        if work.learning is not None:
            ctx.mark_non_differentiable(*_data(kept[work.learning :]))
        return (*_data(kept), *([] if more is None else [more]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        work, ctx.work = ctx.work, None  # lets go of the memory, which the graph outlives
        if work is None:
            raise RuntimeError("the graph of a stream can be gone through once")
        return None, None, *work.gradients(grads, ctx.needs_input_grad[2:])


def _data(layers: Layers) -> list[Tensor]:
    return [t for memory in layers for t in data_of(memory)]


def data_of(memory: LayerMemory) -> list[Tensor]:
    """Keys, values and layer inputs: all that can have a gradient."""
    return [t for t in (memory.keys, memory.values, memory.hidden) if t is not None]


def _with_data(memory: LayerMemory, data: Iterator[Tensor]) -> LayerMemory:
    """`memory` with the next of `data`, in the order of `_data`."""
    names = ("keys", "values") if memory.hidden is None else ("keys", "values", "hidden")
    return replace(memory, **{name: next(data) for name in names})
