"""One chunk through all layers, and what each layer keeps of memory and chunk.

Shape legend: see `omnimem_train.memory.state`.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnimem_train.beside import Beside
from omnimem_train.choosing import Chooser
from omnimem_train.memory import positions as rotary_positions
from omnimem_train.memory.spec import MemorySpec
from omnimem_train.memory.state import LayerMemory
from omnimem_train.models.interface import StreamingModel, Tap
from omnimem_train.retention import Attended, retention_loss
from omnimem_train.snapshots import FirstPass, Layers, Undo, narrow

Result = tuple[Layers, Tensor | None]


@dataclass(frozen=True)
class ChunkInputs:
    """What a chunk is, beside embeddings and extras of its tokens.

    Attributes:
        positions: (B, n, 3) of its tokens, moved to where they are in the compressed stream.
        rope: cos and sin for them, in the form the model's layers take.
        modality, time_s: (B, n) of its tokens.
        index: (B, n) int64, their number in the stream.
        number: of the chunk in the stream.
        n_text: text tokens among memory and chunk.
    """

    positions: Tensor
    rope: tuple[Tensor, Tensor]
    modality: Tensor
    time_s: Tensor
    index: Tensor
    number: int
    n_text: int


class ChunkPass:
    """Runs chunks through the layers of a model.

    Args:
        model: the decoder to run.
        spec: how memory is compressed.
        chooser: what chooses by it.
        attended: what the questions will look at; with it a pass gives retention losses.
    """

    def __init__(self, model: StreamingModel, spec: MemorySpec, chooser: Chooser, attended: Attended | None) -> None:
        self.model, self.spec, self.chooser, self.attended = model, spec, chooser, attended

    def run(
        self,
        layers: Layers,
        embeds: Tensor,
        chunk: ChunkInputs,
        first: FirstPass,
        stop_layer: int | None = None,
        beside: Beside | None = None,
    ) -> Result:
        """All layers on one chunk: what they keep, and the sum of their retention losses.

        Args:
            layers: their memories.
            embeds: (B, n, E).
            chunk: what else is known of it.
            first: empty on the first pass, which fills it, and full on a recomputation, which must not select anew
                (rounding could tip a tie).
            stop_layer: layers from here on have no gradient; None for all with.
            beside: where layers choose while the next ones run. For a first pass without gradient; None: in turn.
        """
        with nullcontext() if beside is None else beside:
            return self._through(layers, embeds, chunk, first, stop_layer, beside)

    def _through(
        self,
        layers: Layers,
        embeds: Tensor,
        chunk: ChunkInputs,
        first: FirstPass,
        stop_layer: int | None,
        beside: Beside | None,
    ) -> Result:
        out: Tensor | None = embeds
        kept, lost = list[LayerMemory](), list[Tensor]()
        first_pass = not first.rows
        for layer, memory in enumerate(layers):
            assert out is not None
            if first_pass and layer < first.keep_inputs:
                first.keep(layer, out)
            stopped = stop_layer is not None and layer >= stop_layer
            if stopped and not first_pass:  # nobody reads what they keep
                return (*kept, *layers[layer:]), torch.stack(lost).sum() if lost else None
            with torch.no_grad() if stopped else nullcontext():
                out, held, loss = self.layer(layer, memory, out, chunk, first, first_pass=first_pass, beside=beside)
            kept.append(held)
            if loss is not None:
                lost.append(loss)
        return tuple(kept), torch.stack(lost).sum() if lost else None

    def layer(
        self,
        layer: int,
        memory: LayerMemory,
        hidden: Tensor,
        chunk: ChunkInputs,
        first: FirstPass,
        *,
        first_pass: bool = False,
        unread: bool = False,
        beside: Beside | None = None,
    ) -> tuple[Tensor | None, LayerMemory, Tensor | None]:
        """One layer on one chunk: its output, which the last layer has none of, what it keeps, its retention loss.

        With `beside` the latter two may not be read before `run` is through.

        Args:
            memory: what the layer remembers.
            hidden: (B, n, E) its input.
            first_pass: whether to select, and note it in `first`; otherwise it is read there.
            unread: of the output only the graph is wanted, see `Tap`.
            beside: see `run`.
        """
        tap = Tap(memory if memory.n_tokens else None, unread=unread)
        layer_input = hidden if memory.hidden is not None else None
        out = None
        if layer + 1 < self.model.n_layers:
            out = self.model.run_layer(layer, hidden, chunk.rope, tap, first.extras)
        else:  # nothing of a stream's tokens is read after their last keys and values
            self.model.run_states(layer, hidden, chunk.rope, tap, first.extras)
        if unread and first.notes and self.attended is None:
            return out, _unread(memory, tap, first.rows[layer]), None

        def after() -> tuple[LayerMemory, Tensor | None]:
            return self._after(layer, memory, layer_input, tap, chunk, first, first_pass=first_pass)

        kept, loss = after() if beside is None else beside.do(after)
        return out, kept, loss

    def _after(
        self,
        layer: int,
        memory: LayerMemory,
        layer_input: Tensor | None,
        tap: Tap,
        chunk: ChunkInputs,
        first: FirstPass,
        *,
        first_pass: bool,
    ) -> tuple[LayerMemory, Tensor | None]:
        """What a layer that has run keeps, and its retention loss."""
        tokens = memory.append(_new(tap, chunk, layer_input, not first_pass and first.notes), tap.joined)
        if first_pass:
            tokens = self._choose(layer, tokens, tap, chunk, first, memory.n_tokens)
        chosen, loss = first.rows[layer], None
        if self.attended is not None and chosen is not None and self.model.importance_head is not None:
            loss = retention_loss(tokens, self.model.importance_head[layer], self.attended.layers[layer])
        return self._keep(tokens, None if chosen is None else chosen.long()), loss

    def _choose(
        self, layer: int, tokens: LayerMemory, tap: Tap, chunk: ChunkInputs, first: FirstPass, n_before: int
    ) -> LayerMemory:
        """Note in `first` which candidates stay; the candidates, with what was measured of them."""
        assert tap.queries is not None
        rows, evidence = self.chooser.choose(layer, tokens, tap.queries, chunk.number, chunk.n_text, tap.sums)
        first.rows.append(None if rows is None else narrow(rows, tokens.n_tokens))
        if first.notes:
            first.undo.append(Undo.of(tokens, n_before, first.rows[layer]))
        return tokens if evidence is None else tokens.with_evidence(evidence)

    def _keep(self, tokens: LayerMemory, rows: Tensor | None) -> LayerMemory:
        """The selected tokens, moved together where positions are compact."""
        if rows is None:
            return tokens
        kept = tokens.gather(rows)
        if self.spec.positions == "compact":
            kept = rotary_positions.compact(kept, self.model.rotary(), self.spec.max_gap)
        return kept


def _unread(memory: LayerMemory, tap: Tap, rows: Tensor | None) -> LayerMemory:
    """The graph of what is kept, from memory and new tokens, without its numbers."""
    assert tap.keys is not None and tap.values is not None
    rows = None if rows is None else rows.long()
    pairs = (memory.keys, tap.keys), (memory.values, tap.values)
    return LayerMemory.bare(*(_Kept.apply(old, new, rows) for old, new in pairs))


class _Kept(torch.autograd.Function):
    """Rows (B, G, K) of memory (B, G, M, D) and new tokens (B, G, n, D); all without rows. No number is copied."""

    @staticmethod
    def forward(ctx: Any, old: Tensor, new: Tensor, rows: Tensor | None) -> Tensor:
        ctx.rows, ctx.n_before, ctx.n = rows, old.shape[2], old.shape[2] + new.shape[2]
        return new.new_empty(*new.shape[:2], ctx.n if rows is None else rows.shape[2], new.shape[3])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        if ctx.rows is not None:
            index = ctx.rows[..., None].expand_as(grad)
            grad = grad.new_zeros(*grad.shape[:2], ctx.n, grad.shape[3]).scatter_(2, index, grad)
        return grad[:, :, : ctx.n_before], grad[:, :, ctx.n_before :], None


def _new(tap: Tap, chunk: ChunkInputs, layer_input: Tensor | None, bare: bool) -> LayerMemory:
    """The tokens of a chunk, fresh from a layer."""
    assert tap.keys is not None and tap.values is not None
    if bare:
        return LayerMemory.bare(tap.keys, tap.values)
    return LayerMemory.from_chunk(
        tap.keys, tap.values, chunk.positions, chunk.modality, chunk.time_s, chunk.index, layer_input
    )
