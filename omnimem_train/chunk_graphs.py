"""Chunks whose launches are recorded once and replayed: both passes of a chunk.

In a stream with one budget and chunk length every chunk after the first few has the same shapes, and the first few have
those of the first few of the next stream. A first pass, and in training a second pass with the way back, are then one
replay each (`omnimem_train.captured`). What is recorded is `ChunkPass` itself, so results are of the same kernels.

Dropout draws in a replay what it would draw launch by launch: a replay starts where the device's generator stands.
Adapters in float32 beside a model in half precision are rounded to it once a stream, and when
they change in its course; launch by launch each product rounds them, to the same numbers.

Not recorded, and run as usual: learning with a retention loss, selectors that wait for the host or read the output
projection itself, dropout where a second pass goes layer by layer; in the second pass also remembered layer inputs,
extras, and a gradient of embeddings.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from omnimem_train.beside import Beside
from omnimem_train.captured import Recordings, Tensors, copy_all, shapes
from omnimem_train.chunk import ChunkInputs, ChunkPass, Result
from omnimem_train.layerwise import gradients_by_layer
from omnimem_train.memory.state import LayerMemory
from omnimem_train.models.fused import rounded_weights
from omnimem_train.models.interface import StreamingModel
from omnimem_train.recompute import gradients_of
from omnimem_train.snapshots import FirstPass, Layers, Undo
from omnimem_train.surroundings import dropouts

FIELDS = len(fields(LayerMemory))
STANDS = 4  # of a model with other weights or adapters at work, of which rounded copies are held


class ChunkGraphs:
    """The recorded passes of a stream's chunks, shared by all streams of a model.

    Args:
        passes: what is recorded.
    """

    def __init__(self, passes: ChunkPass) -> None:
        self.passes = passes
        model = passes.model
        self.first, self.second = recordings_of(model)
        self._stands = _standing(model)
        selector = passes.chooser.selector
        self._can = (
            passes.attended is None
            and selector.records
            and not ("output_weight" in selector.needs and "output_gram" not in selector.needs)
            and not passes.spec.unlimited
        )
        self._rounded = rounded_of(model, self._stands) if self._can else {}
        self._versions = self._versions_now()
        places = tuple(copy.data_ptr() for _, copy in self._rounded.values())
        self._setting = (passes.spec.fingerprint(), _manner(model), self._stands, places)

    # First pass ------------------------------------------------------------------------------------------------------

    def run(self, layers: Layers, embeds: Tensor, chunk: ChunkInputs, first: FirstPass) -> Result | None:
        """`ChunkPass.run`, the first time and without gradient; None where it is not recorded."""
        if not self._can or torch.is_grad_enabled() or (first.keep_inputs and first.draws):
            return None
        if (now := self._versions_now()) != self._versions:
            round_again(self._rounded)
            self._versions = now
        given = [embeds, *first.extras.values(), *_of_chunk(chunk), *self._grams(), *_of_layers(layers)]
        key = (self._setting, chunk.n_text, first.notes, first.keep_inputs, tuple(first.extras), shapes(given))
        n_before = [memory.n_tokens for memory in layers]
        shape = Shape(chunk, tuple(first.extras), n_before, len(self._grams()), first.notes, first.keep_inputs)

        def function(inputs: Tensors) -> Tensors:
            with own_leaves(self.passes.model.module, [w for w, _ in self._rounded.values()], self._rounded):
                return shape.first(self.passes, inputs, self.first.shared.beside if embeds.is_cuda else None)

        recorded = self.first.get(key, function, given)
        return None if recorded is None else shape.result(recorded(given), first)

    # Second pass -----------------------------------------------------------------------------------------------------

    def back(
        self,
        layers: Layers,
        embeds: Tensor,
        chunk: ChunkInputs,
        first: FirstPass,
        stop_layer: int,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        needed: Sequence[bool],
    ) -> list[Tensor | None] | None:
        """Gradients as `recompute.gradients_of` gives them; None where that is not recorded."""
        hidden = any(m.hidden is not None for m in layers)
        if not self._can or hidden or needed[0] or first.extras or (first.keep_inputs and first.draws):
            return None
        notes, n_layers = first.notes, len(layers)
        # the memory's gradient is always computed, so that the oldest chunk, which needs none, is no case of its own
        due = [False, *[True] * (2 * n_layers), *needed[1 + 2 * n_layers :]]
        memory = [t for m in layers for t in (m.keys, m.values)] if notes else _of_layers(layers)
        given = [embeds, *_of_chunk(chunk), *first.rows, *first.inputs, *memory, *grads]
        keep_inputs, n_inputs = first.keep_inputs, len(first.inputs)  # what is recorded must not hold on to `first`
        key = (self._setting, stop_layer, notes, keep_inputs, tuple(due), shapes(given))

        def function(inputs: Tensors) -> Tensors:
            held = iter(inputs)
            again, known = _given(next(held)), _chunk_from(chunk, held)
            noted = FirstPass(again, notes=notes, rows=[next(held) for _ in range(n_layers)])
            noted.keep_inputs, noted.inputs = keep_inputs, [_given(next(held)) for _ in range(n_inputs)]
            before = tuple(_leaves(held, bare=notes) for _ in range(n_layers))
            data = [t for m in before for t in (m.keys, m.values)]
            with torch.enable_grad(), own_leaves(self.passes.model.module, weights, self._rounded) as leaves:
                if noted.keep_inputs:
                    found = gradients_by_layer(self.passes, before, again, known, noted, leaves, list(held), due)
                else:
                    kept, more = self.passes.run(before, again, known, noted, stop_layer)
                    found = gradients_of(kept, more, [again, *data, *leaves], list(held), due)
            return as_precise(found, [again, *data, *weights])

        recorded = self.second.get(key, function, given)
        if recorded is None:
            return None
        return [g if need else None for g, need in zip(recorded(given), needed, strict=True)]

    def _versions_now(self) -> list[int]:
        """By which a change of the adapters in the middle of a stream is known."""
        return [weight._version for weight, _ in self._rounded.values()]

    def _grams(self) -> list[Tensor]:
        """Gram matrices of the output projections, which differ from stream to stream."""
        chooser = self.passes.chooser
        if "output_gram" not in chooser.selector.needs:
            return []
        return [chooser.gram(layer) for layer in range(self.passes.model.n_layers)]


class Shape:
    """How the inputs and outputs of a recorded first pass are laid out in one list.

    Args:
        chunk: gives what is no tensor.
        extras: their names.
        n_before: tokens of each layer's memory before the chunk.
        n_grams: Gram matrices that are given.
        notes: whether the way back is noted.
        keep_inputs: of how many layers inputs are kept.
    """

    def __init__(
        self,
        chunk: ChunkInputs,
        extras: tuple[str, ...],
        n_before: list[int],
        n_grams: int,
        notes: bool,
        keep_inputs: int,
    ) -> None:
        self.chunk, self.extras, self.n_before, self.n_grams, self.notes = chunk, extras, n_before, n_grams, notes
        self.keep_inputs = keep_inputs

    def first(self, passes: ChunkPass, inputs: Tensors, beside: Beside | None) -> Tensors:
        """What is recorded."""
        held = iter(inputs)
        first = FirstPass(_given(next(held)), {name: _given(next(held)) for name in self.extras}, self.notes)
        first.keep_inputs = self.keep_inputs
        chunk = _chunk_from(self.chunk, held)
        grams = [_given(next(held)) for _ in range(self.n_grams)]
        layers = self._layers(held)
        with passes.chooser.holding(grams):
            kept, _ = passes.run(layers, first.embeds, chunk, first, beside=beside)
        undo = [t for u in first.undo for t in (u.gone, u.keys, u.values)]
        return [*_of_layers(kept), *first.rows, *undo, *first.inputs]

    def result(self, found: Tensors, first: FirstPass) -> Result:
        """What a pass gives, from what the recording gave; `first` is filled."""
        held = iter(found)
        kept = self._layers(held)
        first.rows = [next(held) for _ in self.n_before]
        if self.notes:
            first.undo = [Undo(n, next(held), next(held), next(held)) for n in self.n_before]
        first.inputs = [_given(x) for x in held]
        return kept, None

    def _layers(self, held: Iterator[Tensor | None]) -> Layers:
        return tuple(LayerMemory.from_tensors([next(held) for _ in range(FIELDS)]) for _ in self.n_before)


Rounded = dict[int, tuple[nn.Parameter, Tensor]]
"""Adapter weights and their copies in the model's precision, by `id` of the weight."""


def as_precise(found: Tensors, like: Sequence[Tensor]) -> Tensors:
    """`found` in the precision of `like`, item by item."""
    rough = [i for i, x in enumerate(found) if x is not None and x.dtype != like[i].dtype]
    exact = list(found)
    for i in rough:
        exact[i] = torch.empty_like(like[i])
    copy_all([_given(exact[i]) for i in rough], [_given(found[i]) for i in rough])
    return exact


@contextmanager
def own_leaves(module: nn.Module, weights: Sequence[Tensor], rounded: Rounded) -> Iterator[list[nn.Parameter]]:
    """Inside, the parameters `weights` of `module` are others that share their memory, or that of their copies in
    `rounded`.

    A parameter in a graph is tied to the stream on which that graph was made. A recording has a stream of its own, and
    must not wait for another.
    """
    new = {id(w): nn.Parameter(rounded[id(w)][1] if id(w) in rounded else w.detach()) for w in weights}
    owners = [(m, n, p) for m in module.modules() for n, p in m._parameters.items() if p is not None and id(p) in new]
    try:
        for owner, name, parameter in owners:
            owner._parameters[name] = new[id(parameter)]
        yield [new[id(w)] for w in weights]
    finally:
        for owner, name, parameter in owners:
            owner._parameters[name] = parameter


def _of_chunk(chunk: ChunkInputs) -> list[Tensor]:
    """The tensors of a chunk in a fixed order."""
    return [chunk.positions, *chunk.rope, chunk.modality, chunk.time_s, chunk.index]


def _chunk_from(like: ChunkInputs, held: Iterator[Tensor | None]) -> ChunkInputs:
    """A chunk like `like` of the next tensors in `held`."""
    positions, cos, sin, modality, time_s, index = (_given(next(held)) for _ in range(6))
    return replace(like, positions=positions, rope=(cos, sin), modality=modality, time_s=time_s, index=index)


def _leaves(held: Iterator[Tensor | None], bare: bool) -> LayerMemory:
    """The next memory of `held`, keys and values as leaves with gradient; `bare`: nothing else."""
    keys, values = (_given(next(held)).detach().requires_grad_() for _ in range(2))
    if bare:
        return LayerMemory.bare(keys, values)
    return LayerMemory.from_tensors([keys, values, *(next(held) for _ in range(FIELDS - 2))])


def _of_layers(layers: Layers) -> list[Tensor | None]:
    return [t for memory in layers for t in memory.tensors()]


def _given(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def recordings_of(model: StreamingModel) -> tuple[Recordings, Recordings]:
    """Of first and of second passes. They go with the model."""
    if "_recordings" not in vars(model):
        first = Recordings()
        vars(model)["_recordings"] = first, Recordings(shared=first.shared)
    held: tuple[Recordings, Recordings] = vars(model)["_recordings"]
    return held


def rounded_of(model: StreamingModel, stands: Hashable) -> Rounded:
    """The adapters as they are now, rounded, in memory that stays where it is as long as the weights `stand` and no
    more than a few others came between."""
    known: OrderedDict[Hashable, Rounded] = vars(model).setdefault("_rounded", OrderedDict())
    if stands not in known:
        weights = rounded_weights(model.module, model.dtype)
        known[stands] = {id(w): (w, torch.empty_like(w.detach(), dtype=model.dtype)) for w in weights}
    known.move_to_end(stands)
    while len(known) > STANDS:
        known.popitem(last=False)
    round_again(known[stands])
    return known[stands]


def round_again(rounded: Rounded) -> None:
    """Copy the weights as they are now."""
    copy_all([copy for _, copy in rounded.values()], [weight for weight, _ in rounded.values()])


def _manner(model: StreamingModel) -> Hashable:
    """What a pass does differently without other weights or inputs: dropout, and autocast."""
    kind = model.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return model.module.training, dropouts(model.module), cast


def _standing(model: StreamingModel) -> Hashable:
    """Where the weights are, and which adapters are at work: a recording holds as long as both stay."""
    places = tuple(p.data_ptr() for p in model.module.parameters())
    adapted: Any = [m for m in model.module.modules() if hasattr(m, "lora_A") and hasattr(m, "active_adapters")]
    at_work = {(m.disable_adapters, m.merged, tuple(m.active_adapters)) for m in adapted}
    return places, frozenset(at_work)
