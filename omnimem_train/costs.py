"""What a training step on a stream holds in memory, counted from how the step works.

The counts follow `omnimem_train.streaming` and `omnimem_train.step`: chunks with a memory in front, selection without
gradient, every chunk with gradient recomputed in the backward pass, as a whole or layer by layer. Nothing here knows a
GPU or is measured; tests hold the counts against the tensors of a small model. `omnimem_train.operations` counts what
such a step computes.

Symbols as in `omnimem_train.memory.state`; n tokens of a chunk, S = memory + n candidates, b bytes of a number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from omnimem_train.beside import BEHIND
from omnimem_train.footprint import Footprint
from omnimem_train.gradient import Gradient
from omnimem_train.memory.spec import LayerBudget, MemorySpec
from omnimem_train.models.lora import LoraSettings
from omnimem_train.models.quantised import BLOCK, BYTES_A_WEIGHT
from omnimem_train.models.shape import DecoderShape
from omnimem_train.offload import AHEAD
from omnimem_train.scoring_costs import scoring_bytes

MARKS = 41
"""Bytes of a remembered token and kv head beside key and value: three positions and an index in int64, time and
evidence in float32, modality (`LayerMemory`)."""
MEDIA_MARKS = 29  # bytes of a token of a clip beside its embedding: position, modality, time
NORMS = 2  # of a layer
IN_FLIGHT = 3
"""Chunks whose parts are on the device when the rest waits in host memory: one in use, one on its way, and one more
while it is put together for its copy. Beside recorded chunks, whose launches cost the host next to nothing, as many as
it may be ahead (`omnimem_train.offload.AHEAD`)."""


INPUT_OF = {
    "q_proj": "x",
    "k_proj": "x",
    "v_proj": "x",
    "o_proj": "o",
    "gate_proj": "y",
    "up_proj": "y",
    "down_proj": "down",
}
"""Projections that read the same tensor."""


@dataclass(frozen=True)
class Chunk:
    """One chunk, or several that are alike.

    Attributes:
        n: tokens.
        memory: tokens a kv head of a layer remembers before it, mean over layers.
        kept: the same after it.
        due: gradient: "none", "all", or "below" the stop layer.
        count: how many such chunks follow each other.
    """

    n: int
    memory: float
    kept: float
    due: str
    count: int = 1

    @property
    def candidates(self) -> float:
        """S."""
        return self.memory + self.n

    @property
    def pairs(self) -> float:
        """Query-key pairs that attention looks at, for one head."""
        return self.n * (self.memory + (self.n + 1) / 2)


@dataclass(frozen=True)
class StreamStep:
    """A step on one clip.

    Attributes:
        shape: of the decoder.
        itemsize: bytes of a number of the model, b.
        spec: the memory, with the budget and chunk length of this step.
        tokens: of the stream.
        text: of them pinned text: `text` in all, `opening` of it in front.
        gradient: as in training; kind "none" is a plain prefill.
        lora: the adapter; None for none.
        question, answer: tokens of the turn asked at the end, and of its answer.
        window: tokens of an encoded block; 0 when the stream comes as one block.
        kernels: whether the package's kernels run: in bfloat16 on a GPU, unless switched off.
        split: whether attention goes to memory and chunk apart.
        teacher: whether the model runs with a full memory first, to be learned from.
        packed: whether the decoder's matrices are held in 4 bits and unpacked for each product.
        recorded: whether chunks of the same shapes are recorded and replayed.
    """

    shape: DecoderShape
    itemsize: int
    spec: MemorySpec
    tokens: int
    text: int = 16
    opening: int = 16
    gradient: Gradient = field(default_factory=Gradient)
    lora: LoraSettings | None = None
    question: int = 64
    answer: int = 32
    window: int = 0
    kernels: bool = True
    split: bool = False
    teacher: bool = False
    packed: bool = False
    recorded: bool = False

    # The stream ------------------------------------------------------------------------------------------------------

    @cached_property
    def budgets(self) -> list[LayerBudget | None]:
        """Of the layers."""
        s = self.shape
        return self.spec.layer_budgets(s.layers, s.kv_heads, s.head_dim, self.itemsize)

    def kept(self, seen: int) -> float:
        """Tokens a kv head remembers after `seen` tokens of the stream, mean over layers.

        Raises:
            UserError: pinned text exceeds its limit or a budget that counts it.
        """
        text = seen if seen <= self.opening else self.opening
        if self.tokens > self.opening and seen > self.opening:
            text += round((self.text - self.opening) * (seen - self.opening) / (self.tokens - self.opening))
        media = seen - text

        def of(budget: LayerBudget | None) -> int:
            return media if budget is None else min(media, self.spec.media_budget(budget, text).total)

        known = {budget: of(budget) for budget in set(self.budgets)}
        return text + sum(known[budget] for budget in self.budgets) / len(self.budgets)

    @cached_property
    def chunks(self) -> list[Chunk]:
        """All chunks in order; equal neighbours as one."""
        size, found = self.spec.chunk_tokens, list[Chunk]()
        seen, memory = 0, 0.0
        while seen < self.tokens:
            n = min(size, self.tokens - seen)
            seen += n
            kept = self.kept(seen)
            due = self.gradient.due(-(-(self.tokens - seen) // size))
            last = found[-1] if found else None
            if last is not None and (last.n, last.memory, last.kept, last.due) == (n, memory, kept, due):
                found[-1] = Chunk(n, memory, kept, due, last.count + 1)
            else:
                found.append(Chunk(n, memory, kept, due))
            memory = kept
        return found

    @property
    def n_chunks(self) -> int:
        """Chunks of the stream."""
        return sum(c.count for c in self.chunks)

    @property
    def asked(self) -> Chunk:
        """The question at the end with its answer, as a chunk of which nothing is dropped."""
        n, memory = self.question + self.answer, self.chunks[-1].kept if self.chunks else 0.0
        return Chunk(n, memory, memory + n, "none" if self.gradient.kind == "none" else "all")

    def gradient_layers(self, chunk: Chunk) -> int:
        """Layers of a chunk that have gradient."""
        return {"none": 0, "all": self.shape.layers, "below": min(self.gradient.layer, self.shape.layers)}[chunk.due]

    @property
    def recomputes(self) -> bool:
        """Whether chunks are recomputed in the backward pass."""
        return self.gradient.kind != "none" and self.gradient.checkpointing

    @property
    def offloads(self) -> bool:
        """Whether what is stored for recomputations, and the embeddings, are in host memory."""
        return self.recomputes and self.gradient.offload == "host"

    @property
    def by_layer(self) -> bool:
        """Whether that goes layer by layer, on stored layer inputs."""
        return self.recomputes and self.gradient.granularity == "layer"

    @property
    def rank(self) -> int:
        """Of the adapter; 0 without one."""
        return 0 if self.lora is None else self.lora.r

    @property
    def trained(self) -> int:
        """Numbers of the adapter."""
        return 0 if self.lora is None else self.shape.adapter_weights(self.lora.r, self.lora.targets)

    @property
    def short(self) -> bool:
        """Whether a layer's small steps run in one kernel each (`omnimem_train.models.fused`)."""
        return self.kernels and self.itemsize == 2

    # Memory ----------------------------------------------------------------------------------------------------------

    @property
    def token_bytes(self) -> float:
        """Bytes of keys and values of a remembered token in one layer."""
        return 2 * self.shape.key_width * self.itemsize

    @property
    def stored_bytes(self) -> float:
        """Bytes of a remembered token in one layer, all that a snapshot holds of it."""
        hidden = self.shape.hidden * self.itemsize if self.keeps_hidden else 0
        return self.token_bytes + MARKS * self.shape.kv_heads + hidden

    @property
    def keeps_hidden(self) -> bool:
        """Whether the selector has layer inputs remembered."""
        return "hidden" in self.spec.make_selector().needs and not self.spec.unlimited

    def snapshot(self, tokens: float) -> float:
        """Bytes of the memory of all layers with `tokens` a head."""
        return self.shape.layers * tokens * self.stored_bytes

    @property
    def undoes(self) -> bool:
        """Whether older memories follow from newer ones in the backward pass (`omnimem_train.snapshots`)."""
        return (self.spec.positions == "absolute" or self.spec.unlimited) and not self.keeps_hidden

    def left_behind(self, chunk: Chunk) -> float:
        """Bytes that a chunk which will be recomputed leaves for the backward pass: its selection, and the memory
        before it, or what it takes to get back there."""
        s, evicts = self.shape, chunk.kept < chunk.candidates
        row = s.layers * s.kv_heads * (2 if chunk.candidates <= 32767 else 4)
        inputs = self.layer_inputs(chunk)
        if not self.undoes:
            return inputs + self.snapshot(chunk.memory) + (row * chunk.kept if evicts else 0)
        if not evicts or not chunk.memory:
            return inputs + (row * chunk.kept if evicts else 0)
        return inputs + row * chunk.candidates + s.layers * (chunk.candidates - chunk.kept) * self.token_bytes

    def layer_inputs(self, chunk: Chunk) -> float:
        """Bytes of the inputs of its layers that a chunk leaves behind; the first layer's are the embeddings."""
        layers = self.gradient_layers(chunk) - 1 if self.by_layer else 0
        return max(0, layers) * chunk.n * self.shape.hidden * self.itemsize

    @property
    def embedding_bytes(self) -> int:
        """Bytes of a token's embedding, with what goes along for deeper layers."""
        return (1 + self.shape.deepstack) * self.shape.hidden * self.itemsize

    def host_bytes(self, clips: int = 1) -> float:
        """Bytes of host memory: `clips` encoded, and what the chunks of one leave for the backward pass, which is their
        embeddings too. 0 unless the step offloads."""
        if not self.offloads:
            return 0.0
        left = sum(c.count * (self.left_behind(c) + c.n * self.embedding_bytes) for c in self.chunks if c.due != "none")
        return left + self.embedding_bytes * self.tokens * clips

    def activations(self, chunk: Chunk, of: str = "kept") -> float:
        """Bytes that autograd keeps of a chunk at a time, whose first layer gets inputs that need no gradient.

        Args:
            of: "kept", after the pass: the last layer with gradient hands on nothing but its keys and values. "made",
                until its end: of the last layer of the model nothing else is computed than they and queries. "asked",
                of a question: all of all layers.
        """
        layers = self.gradient_layers(chunk)
        if layers == 0:
            return 0
        s, b, n = self.shape, self.itemsize, chunk.n
        norm = (b if self.short else 4) * s.hidden * n  # its input, which a stock norm converts first
        keys = norm + self._adapter_activations(n, ("k_proj", "v_proj"))
        keys_held = n if self.split else chunk.candidates  # the memory itself is held anyway
        attention = n * (2 * s.query_width * b + 4 * s.heads) + keys_held * self.token_bytes
        mlp = (2 if self.short else 3) * s.mlp * b * n
        layer = NORMS * norm + self._adapter_activations(n) + attention + mlp
        turned = 0.0
        if self.spec.positions == "compact" and chunk.kept < chunk.candidates:
            turned = chunk.kept * s.key_width * 4  # cos and sin of half the channels each, float32
            layer, keys = layer + turned, keys + turned
        last = {"kept": keys, "asked": layer, "made": layer}[of]
        if of == "made" and layers == s.layers:  # through `run_states`: the output projection gets the queries
            adapted = self.lora is not None and "o_proj" in self.lora.targets
            last = norm + self._adapter_activations(n) + adapted * n * s.query_width * b + turned
        if self.by_layer and of != "asked":  # one at a time; a layer's input is held anyway
            return (last if layers == 1 else layer) - norm
        return (layers - 1) * layer + last - norm

    def _adapter_activations(self, n: int, only: tuple[str, ...] = ()) -> float:
        """Bytes kept for the adapters of a layer: their inputs (shared unless dropout makes copies), dropout's masks,
        the inner vectors, and in half precision the rounded adapters."""
        if self.lora is None:
            return 0
        targets = [t for t in self.lora.targets if not only or t in only]
        inputs = {t if self.lora.dropout else INPUT_OF[t]: self.shape.projections[t][0] for t in targets}
        if not self.lora.dropout:
            inputs.pop("o", None)  # attention keeps its output anyway
        per_token = sum(inputs.values()) * (self.itemsize + (self.lora.dropout > 0))
        per_token += self.itemsize * self.lora.r * len(targets)
        rounded = sum(sum(self.shape.projections[t]) for t in targets) * self.lora.r * self.itemsize
        return n * per_token + (rounded if self.itemsize == 2 else 0)

    def footprint(self, parameters: int, clips: int = 1, *, moments: bool = True) -> Footprint:
        """Peak of device memory, of all moments in the step at which it can be.

        Args:
            parameters: of the whole model.
            clips: held encoded at the same time (`train.accumulation`).
            moments: whether AdamW's two moments are held.
        """
        trained = self.trained
        copied = sum(c.n * c.count for c in self.chunks if c.due != "none") if self.window else 0
        held = self.tokens * clips + copied
        # with offload of a chunk in use, one on its way in and, in the first pass, one on its way out
        embedded = min(held, 3 * max((c.n for c in self.chunks), default=0)) if self.offloads else held
        snapshots, activations, passing = max(self._moments(), key=sum)
        passing += self.unpacked
        copies = 1 if self.gradient.kind == "none" else 4 if moments else 2
        return Footprint(
            weights=self.weights(parameters),
            adapter=4 * trained * copies,
            clips=self.embedding_bytes * embedded + MEDIA_MARKS * held,
            snapshots=snapshots,
            activations=activations,
            passing=passing,
            recordings=self.recordings(4 * trained) if self.recorded else 0.0,
            beside=activations if self.recorded and self.recomputes else 0.0,
        )

    def recordings(self, gradients: float) -> float:
        """Bytes of the places where recorded chunks find their inputs and leave their results, which they share: for
        first passes the memory on its way in and out; for second passes the memory and its gradient, and on the way out
        that and `gradients` of the weights. Activations are counted as those of any chunk."""
        inputs = max((self.layer_inputs(c) for c in self.chunks), default=0.0)
        given = max((self.snapshot(c.memory) for c in self.chunks), default=0.0)
        found = max((self.snapshot(c.kept) + self.left_behind(c) for c in self.chunks), default=0.0)
        if self.recomputes:
            memory = self.shape.layers * max((c.kept for c in self.chunks), default=0.0) * self.token_bytes
            given, found = max(given, 2 * memory + inputs), max(found, memory + gradients)
        return given + found

    def weights(self, parameters: int) -> float:
        """Bytes of a model of so many numbers, of which the matrices of the layers may be packed."""
        packed = self.shape.layers * self.shape.layer_weights if self.packed else 0
        return (parameters - packed) * self.itemsize + packed * BYTES_A_WEIGHT

    @property
    def unpacked(self) -> float:
        """Bytes of the largest matrix of a layer while it is unpacked: its numbers, and its scales in float32."""
        largest = max(i * o for i, o in self.shape.projections.values())
        return largest * (self.itemsize + 4 / BLOCK) if self.packed else 0

    def _moments(self) -> Iterator[tuple[float, float, float]]:
        """(snapshots, activations, passing) at the end of each kind of chunk's forward pass and of its recomputation,
        and at the question. A recomputation has the gradients of what was kept and gathers that anew."""
        s, b, left, active = self.shape, self.itemsize, 0.0, 0.0
        for c in self.chunks:
            evicts, kept = c.kept < c.candidates, s.layers * c.kept * self.token_bytes
            # turning keys to other positions takes about ten float32 tensors of half their size, twice
            turning = 40 * c.kept * s.key_width if evicts and self.spec.positions == "compact" else 0
            scores = scoring_bytes(self.spec, s, b, c.n, c.candidates, self.kernels)
            mlp, choice, branch = (3 if self.short else 4) * s.mlp * b * c.n, max(scores, turning), 0.0
            if self.recorded and evicts:  # chosen beside the next layers, in memory that a recomputation cannot use
                branch = choice + c.candidates * self.stored_bytes + BEHIND * c.n * s.query_width * b
            buffers = 12 * s.hidden * c.n + (mlp + branch if branch else max(mlp, choice))
            yield left + self.snapshot(c.memory), active, self.snapshot(c.kept) + buffers + self.layer_inputs(c)
            if c.due == "none":
                continue
            if self.recomputes:
                made = self.activations(c, "made")
                # gradients of the memory after the chunk, and that; layer by layer those of all candidates
                passed = 2 if evicts else 1 + 1 / s.layers
                if self.by_layer:
                    passed = 1 + c.candidates / c.kept
                if self.offloads:
                    left = max(left, (AHEAD + 1 if self.recorded else IN_FLIGHT) * self.left_behind(c))
                else:
                    left += c.count * self.left_behind(c)
                before = s.layers * c.candidates * self.token_bytes if self.undoes and c.memory else 0
                rest = turning + 12 * s.hidden * c.n + (4 * self.trained if self.by_layer else 0)
                rest += branch + self.snapshot(c.kept) if branch else 0
                yield left + before, made, kept * passed + rest
            else:
                active += c.count * self.activations(c)
                yield 0.0, active, kept + 3 * s.mlp * b * c.n
        q = self.asked
        held, logits = left + self.snapshot(q.memory), self.answer * s.vocabulary * (b + 12)
        grown = s.layers * q.candidates * (self.stored_bytes - self.token_bytes)  # the memory with the question, unused
        yield held, active + self.activations(q, "asked"), logits + grown
        if self.teacher:
            yield 0.0, 0.0, 2 * self.snapshot(self.tokens) + logits
