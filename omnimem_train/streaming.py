"""The stream loop: chunks through the decoder, a compressed memory between them.

Training, evaluation and generation all go through `Stream`: `feed` runs a chunk through the layers and compresses
every layer's memory, `ask` lets questions read the memory and leaves it as it was. A `StreamState` is a value: feeding
returns a new one, so a state can be kept, branched and differentiated through.

Shape legend: see `omnimem_train.memory.state`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from omnimem_train import kernels
from omnimem_train.choosing import Chooser
from omnimem_train.chunk import ChunkInputs, ChunkPass, Result
from omnimem_train.chunk_graphs import ChunkGraphs
from omnimem_train.errors import UserError
from omnimem_train.gradient import Gradient
from omnimem_train.layerwise import gradients_by_layer
from omnimem_train.memory import positions as rotary_positions
from omnimem_train.memory.spec import MemorySpec
from omnimem_train.memory.state import TEXT, LayerMemory
from omnimem_train.models.interface import MediaEncoder, MediaWindow, StreamingModel, Tap, TokenBlock
from omnimem_train.offload import host_memory
from omnimem_train.recompute import recomputed
from omnimem_train.retention import Attended, Watch
from omnimem_train.snapshots import FirstPass, Layers, Snapshot
from omnimem_train.surroundings import dropouts


@dataclass(frozen=True)
class StreamState:
    """Where a stream stands.

    Attributes:
        layers: the memory of each layer.
        pending: tokens that are encoded but not run yet, fewer than a chunk; None for none.
        n_run: tokens run so far.
        n_chunks: chunks run so far.
        offset: (B,) int64 added to temporal positions of later tokens (0 with absolute positions).
        horizon: (B,) int64, the largest temporal position run so far, offset included; -1 before any.
        n_text: text tokens run so far; None where they were not counted. Text is never dropped, so every layer
            remembers them all.
        pending_text: text tokens among `pending`; None where the device has to be asked.
        retention: scalar, the sum of the retention losses of all choices so far, and their number; None without any.
        past: `layers` for the backward pass; None if no chunk is recomputed there so far.
    """

    layers: Layers
    pending: TokenBlock | None
    n_run: int
    n_chunks: int
    offset: Tensor
    horizon: Tensor
    past: Snapshot | None = None
    n_text: int | None = 0
    pending_text: int | None = 0
    retention: tuple[Tensor, int] | None = None


class Stream:
    """A model with a memory.

    Args:
        model: the decoder to run.
        spec: how memory is compressed.
        gradient: which chunks carry gradient; none (the default) also switches gradients off.
        total_tokens: length of the whole stream; gradient kinds "last" and "stop_layer" need it to know how many
            chunks are still to come.
        attended: what the questions will look at; with it the states add up retention losses
            (`omnimem_train.retention`).

    Raises:
        UserError: a spec or a gradient setting that does not fit the model.
    """

    def __init__(
        self,
        model: StreamingModel,
        spec: MemorySpec,
        gradient: Gradient | None = None,
        total_tokens: int = 0,
        attended: Attended | None = None,
    ) -> None:
        self.model, self.spec, self.total_tokens, self.attended = model, spec, total_tokens, attended
        self.gradient = gradient or Gradient("none")
        self.chooser = Chooser(model, spec)
        self.passes = ChunkPass(model, spec, self.chooser, attended)
        self.graphs: ChunkGraphs | None = None
        self._draws = False
        self._weights = [p for p in model.module.parameters() if p.requires_grad] if self._checkpoints() else []
        self._host = host_memory(model.device)
        self._stows = self._host if self.gradient.offload == "host" and self._checkpoints() else None
        if model.device.type == "cuda":
            kernels.install()
        if self.gradient.kind in ("last", "stop_layer") and total_tokens < 1:
            raise ValueError("this gradient kind needs total_tokens")
        if self.gradient.kind == "stop_layer" and self.gradient.layer >= model.n_layers:
            raise UserError(f"gradient stop layer {self.gradient.layer} of a model with {model.n_layers} layers")

    # A stream's life -------------------------------------------------------------------------------------------------

    def start(self, batch: int = 1) -> StreamState:
        """An empty memory for `batch` streams of equal layout. What selectors derive from the weights alone is made
        anew: between two streams the weights may have changed."""
        m = self.model
        self.chooser.start()
        self._draws = any(p > 0 and training for p, training in dropouts(m.module))
        # weights that are gathered layer by layer do not stay where a recording would look for them
        self.graphs = ChunkGraphs(self.passes) if m.graphs and m.gathering is None else None
        wants_hidden = "hidden" in self.chooser.selector.needs and not self.spec.unlimited
        empty = LayerMemory.empty(
            batch,
            m.kv_heads,
            m.head_dim,
            dtype=m.dtype,
            device=m.device,
            hidden_size=m.hidden_size if wants_hidden else None,
        )
        zero = torch.zeros(batch, dtype=torch.int64, device=m.device)
        return StreamState((empty,) * m.n_layers, None, 0, 0, zero, zero - 1)

    def feed(self, state: StreamState, block: TokenBlock) -> StreamState:
        """Take in `block`; every full chunk is run and the memory compressed. Chunks are cut by number of tokens,
        wherever that falls. A block in host memory is copied to the device chunk by chunk."""
        return self.feed_all(state, [block])

    def feed_all(self, state: StreamState, blocks: Iterable[TokenBlock]) -> StreamState:
        """`feed` for each block. Of blocks that are all there, text is counted at once: the host then does not wait for
        the device in between."""
        size, before = self.spec.chunk_tokens, 0 if state.pending is None else state.pending.n
        text = None
        if isinstance(blocks, Sequence) and self.chooser.counts_text and before + sum(b.n for b in blocks) >= size:
            text = torch.cat([b.modality[0] == TEXT for b in blocks]).cpu()
        parts, start = TokenBlock.cut(blocks, size, before), 0
        for part in parts if self._host is None else self._host.ahead(parts):
            told = None if text is None else int(text[start : start + part.n].sum())
            start += part.n
            pending, n_text = part, told
            if state.pending is not None:
                pending = TokenBlock.cat([state.pending, part])
                n_text = None if told is None or state.pending_text is None else state.pending_text + told
            state = replace(state, pending=pending, pending_text=n_text)
            if pending.n == size:
                state = self.flush(state)
        return state

    def flush(self, state: StreamState) -> StreamState:
        """Run what is pending as a shorter chunk and compress."""
        if (chunk := state.pending) is None:
            return state
        n_text = self._count_text(state, chunk) if self.chooser.counts_text else None
        return self._run_chunk(replace(state, pending=None, pending_text=0, n_text=n_text), chunk)

    def _count_text(self, state: StreamState, chunk: TokenBlock) -> int:
        """Text tokens run so far, with those of `chunk`. The device is asked for what is not known."""
        before, here = state.n_text, state.pending_text
        if before is None:
            before = count_text(state.layers[0].modality[0, 0])
        return before + (count_text(chunk.modality[0]) if here is None else here)

    def caught_up(self, state: StreamState, waiting: TokenBlock | None = None) -> StreamState:
        """`state` with everything run that was seen so far: pending tokens, and those an encoder holds back
        (`MediaEncoder.waiting`). For questions asked now; the stream itself goes on from `state`."""
        return self.flush(state if waiting is None else self.feed(state, waiting))

    def ask(self, state: StreamState, questions: list[TokenBlock], watch: tuple[Watch, Tensor] | None = None) -> Tensor:
        """Hidden states of questions that read the memory and nothing of each other.

        `state` is left as it was, so any number of questions can share one pass over the stream. Tokens still pending
        in it are run and compressed first, on a copy.

        Args:
            questions: text blocks (B, n_i) with the positions they have in the uncompressed stream.
            watch: notes what they look at; with it (B, sum n_i) bool, the tokens that count.

        Returns:
            (B, sum n_i, E), before the final norm.
        """
        state = self.flush(state)
        block = TokenBlock.cat(questions)
        mask = None if len(questions) == 1 else _separate([q.n for q in questions], block.embeds.device)
        offset = state.offset

        def run(layers: Layers, embeds: Tensor) -> tuple[Layers, Tensor]:
            return (), self._extend(layers, replace(block, embeds=embeds), offset, mask, watch)[1]

        with self._grad(True):
            if self._checkpoints():
                before = state.past or Snapshot(state.layers)
                _, hidden = recomputed(run, state.layers, before, block.embeds, self._learned(block.extras))
            else:
                _, hidden = run(state.layers, block.embeds)
        assert hidden is not None
        return hidden

    @torch.no_grad()
    def generate(self, state: StreamState, encoder: MediaEncoder, ids: Tensor, max_new_tokens: int = 64) -> list[int]:
        """Greedy answer to the question `ids` (n,) of one stream; ends before an end-of-sequence token. `state` is left
        as it was; bring it up to date with `caught_up` first."""
        layers, answer = state.layers, list[int]()
        block = encoder.text(ids)
        next_position = block.positions[:, -1:] + 1
        for _ in range(max_new_tokens):
            layers, hidden = self._extend(layers, block, state.offset)
            token = int(self.model.logits(hidden[:, -1]).argmax(-1)[0])
            if token in self.model.eos_ids:
                break
            answer.append(token)
            new = encoder.text(torch.tensor([token], device=ids.device), closing=False)
            block, next_position = replace(new, positions=next_position), next_position + 1
        return answer

    # One chunk -------------------------------------------------------------------------------------------------------

    def _run_chunk(self, state: StreamState, chunk: TokenBlock) -> StreamState:
        """Run `chunk` after the memory and compress, with the gradient this chunk is due."""
        due = self._gradient_due(state, chunk)
        stop_layer = self.gradient.layer if due == "below" else self.model.n_layers
        first, past = FirstPass(chunk.embeds, dict(chunk.extras)), None
        # a second pass holds on to what follows, so that is little: no memories, no embeddings, nothing derived
        marks = replace(chunk, embeds=chunk.embeds.new_empty(*chunk.embeds.shape[:2], 0), extras={})
        inputs = partial(self._inputs, marks, state.offset, state.n_run, state.n_chunks, state.n_text or 0)

        def run(layers: Layers, embeds: Tensor) -> Result:
            given = inputs()
            if self.graphs is not None and not first.rows:
                found = self.graphs.run(layers, embeds, given, first)
                if found is not None:
                    return found
            return self.passes.run(layers, embeds, given, first, stop_layer)

        def back(layers: Layers, embeds: Tensor, *due: Any) -> list[Tensor | None] | None:
            given, found = inputs(), None
            if self.graphs is not None:
                found = self.graphs.back(layers, embeds, given, first, stop_layer, self._weights, *due)
            if found is None and first.keep_inputs:
                found = gradients_by_layer(self.passes, layers, embeds, given, first, self._learned(first.extras), *due)
            return found

        def again() -> Tensor:
            first.back()
            return first.embeds

        with self._grad(due != "none"):
            if due != "none" and self._checkpoints():
                first.notes = self._can_undo(state.layers)
                if self.gradient.granularity == "layer":
                    first.keep_inputs, first.draws = stop_layer, self._draws
                before, learned = state.past or Snapshot(state.layers), self._learned(chunk.extras)
                layers, lost = recomputed(run, state.layers, before, chunk.embeds, learned, stop_layer, back, again)
                past = Snapshot(layers, before)
                before.precede(past, first)
            else:
                layers, lost = run(state.layers, chunk.embeds)
        n_choices = sum(r is not None for r in first.rows)
        if self._stows is not None and past is not None:
            first.stow(self._stows)
            before.stow(self._stows)
        offset, horizon = self._move(state, layers, chunk, n_choices > 0)
        retention = state.retention
        if lost is not None:
            before_it, n_before = retention or (torch.zeros_like(lost), 0)
            retention = before_it + lost, n_before + n_choices
        n_run, n_chunks = state.n_run + chunk.n, state.n_chunks + 1
        return StreamState(layers, None, n_run, n_chunks, offset, horizon, past, state.n_text, 0, retention)

    def _inputs(self, chunk: TokenBlock, offset: Tensor, n_run: int, number: int, n_text: int) -> ChunkInputs:
        """What a pass over chunk `number` reads beside memories, embeddings and extras."""
        positions = chunk.shifted(offset)
        index = torch.arange(n_run, n_run + chunk.n, device=positions.device).expand(positions.shape[0], -1)
        return ChunkInputs(positions, self.model.rope(positions), chunk.modality, chunk.time_s, index, number, n_text)

    def _can_undo(self, layers: Layers) -> bool:
        """Whether what is kept stays as it is: then older memories follow from newer ones."""
        still = self.spec.positions == "absolute" or self.spec.unlimited
        return still and layers[0].hidden is None

    def _extend(
        self,
        layers: Layers,
        block: TokenBlock,
        offset: Tensor,
        mask: Tensor | None = None,
        watch: tuple[Watch, Tensor] | None = None,
    ) -> tuple[Layers, Tensor]:
        """Run text after the memory without compressing: the grown memory, and hidden states (B, n, E)."""
        hidden, grown = block.embeds, []
        positions = block.shifted(offset)
        rope = self.model.rope(positions)
        index = torch.full(block.modality.shape, -1, device=hidden.device)
        for layer, memory in enumerate(layers):
            tap = Tap(memory if memory.n_tokens else None, mask)
            layer_input = hidden if memory.hidden is not None else None
            hidden = self.model.run_layer(layer, hidden, rope, tap, block.extras)
            assert tap.keys is not None and tap.values is not None and tap.queries is not None
            if watch is not None:
                keys = torch.cat([memory.keys, tap.keys], 2) if tap.joined is None else tap.joined[0]
                watch[0].add(layer, tap.queries, keys, memory, watch[1], mask)
            new = LayerMemory.from_chunk(
                tap.keys, tap.values, positions, block.modality, block.time_s, index, layer_input
            )
            grown.append(memory.append(new, tap.joined) if mask is None else memory)
        return tuple(grown), hidden

    def _move(self, state: StreamState, layers: Layers, chunk: TokenBlock, evicted: bool) -> tuple[Tensor, Tensor]:
        """Offset and horizon after a chunk: with compact positions the stream goes on right after what was kept."""
        newest = (chunk.positions[..., 0].amax(1) + state.offset).maximum(state.horizon)
        if self.spec.positions != "compact" or not evicted:
            return state.offset, newest
        end = torch.stack([rotary_positions.end(memory) for memory in layers]).amax(0)
        return state.offset - (newest + 1 - end), end - 1

    # Gradient --------------------------------------------------------------------------------------------------------

    def _gradient_due(self, state: StreamState, chunk: TokenBlock) -> str:
        """`Gradient.due` of the chunk that follows `state`."""
        return self.gradient.due(-(-(self.total_tokens - state.n_run - chunk.n) // self.spec.chunk_tokens))

    def _grad(self, due: bool) -> torch.no_grad | nullcontext[None]:
        return nullcontext() if due and self.gradient.kind != "none" else torch.no_grad()

    def _learned(self, extras: Mapping[str, Tensor]) -> list[Tensor]:
        """What a pass over tokens with `extras` reads, besides memory and embeddings, that wants a gradient."""
        return [*self._weights, *(x for x in extras.values() if x.requires_grad)]

    def _checkpoints(self) -> bool:
        return self.gradient.kind != "none" and self.gradient.checkpointing and torch.is_grad_enabled()


def encode(encoder: MediaEncoder, windows: Iterable[MediaWindow]) -> Iterator[TokenBlock]:
    """The whole of a stream as blocks, window by window: opening text, media, and what waited for more input."""
    yield encoder.start()
    for window in windows:
        block = encoder.push(window)
        if block is not None and block.n:
            yield block
    block = encoder.finish()
    if block is not None and block.n:
        yield block


def count_text(modality: Tensor) -> int:
    """Text tokens among (n,) modalities; waits for the device."""
    return int((modality == TEXT).sum())


def _separate(lengths: list[int], device: torch.device) -> Tensor:
    """(N, N) bool: causal inside each question, nothing across."""
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device))
    return (owner[:, None] == owner[None, :]).tril()
