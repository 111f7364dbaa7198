"""The second pass of a chunk layer by layer (`gradient.granularity=layer`): from the last layer to the first, each is
run anew on the input that the first pass kept, and differentiated.

Between layers only the gradient of a layer's output goes on, so the activations of one layer are there at a time. A
layer's output is known to be what the next one was given, so the product that it ends with is not computed.

Shape legend: see `omnimem_train.memory.state`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from omnimem_train.chunk import ChunkInputs, ChunkPass
from omnimem_train.memory.state import LayerMemory
from omnimem_train.recompute import data_of, differentiate
from omnimem_train.snapshots import FirstPass, Layers


def gradients_by_layer(
    passes: ChunkPass,
    layers: Layers,
    embeds: Tensor,
    chunk: ChunkInputs,
    first: FirstPass,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients as `recompute.gradients_of` gives them.

    Args:
        layers: the memories before the chunk, with gradient where it is wanted.
        embeds: (B, n, E), likewise.
        first: filled, with the inputs of all layers that have gradient.
        weights: whatever else has a gradient.
        grads: of the data of what each layer kept, and of the sum of retention losses where there is one.
        needed: for embeddings, data of the memories and weights.
    """
    per_layer = [len(data_of(memory)) for memory in layers]
    starts = [sum(per_layer[:i]) for i in range(len(layers) + 1)]
    of_loss = grads[starts[-1]] if len(grads) > starts[-1] else None
    of_weights: list[Tensor | None] = [None] * len(weights)
    of_memory: list[Tensor | None] = [None] * starts[-1]
    of_output: Tensor | None = None
    for layer in reversed(range(first.keep_inputs)):
        part = slice(starts[layer], starts[layer + 1])
        memory = layers[layer]
        hidden = (first.input_of(layer).detach() if layer else embeds.detach()).requires_grad_(layer > 0 or needed[0])

        def run(layer: int = layer, memory: LayerMemory = memory, hidden: Tensor = hidden) -> list[Tensor | None]:
            out, kept, loss = passes.layer(layer, memory, hidden, chunk, first, unread=True)
            return [out, *data_of(kept), loss]

        ends = _in_place(first, layer, run)
        inputs = [hidden, *data_of(memory), *weights]
        wanted = [layer > 0 or needed[0], *needed[1:][part], *needed[1 + starts[-1] :]]
        found = differentiate(ends, [of_output, *grads[part], of_loss], inputs, wanted)
        of_output = found[0]
        of_memory[part] = found[1 : 1 + per_layer[layer]]
        for i, g in enumerate(found[1 + per_layer[layer] :]):
            of_weights[i] = _sum(of_weights[i], g)
    return [of_output, *of_memory, *of_weights]


def _in_place(first: FirstPass, layer: int, run: Callable[[], list[Tensor | None]]) -> list[Tensor | None]:
    """`run()` with gradient, drawing the numbers that the first pass drew in `layer`."""
    if first.surroundings:
        return first.surroundings[layer].again(run)
    with torch.enable_grad():
        return run()


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
