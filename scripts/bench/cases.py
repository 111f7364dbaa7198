"""What is measured on a stream: prefill, LoRA steps, the answer's first token. Selection alone is in `selection`."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from measure import Clock, Results, median_and_spread
from shape import Shape, end_of, make_model, stream_block, text_block
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from omnimem_train import kernels
from omnimem_train.gradient import Gradient
from omnimem_train.losses import LossConfig, answer_loss
from omnimem_train.memory import MemorySpec
from omnimem_train.models.interface import StreamingModel, Tap, TokenBlock
from omnimem_train.models.lora import LoraSettings, add_lora, lora_parameters
from omnimem_train.step import EncodedStream, Moment, Question, StreamingStep
from omnimem_train.streaming import Stream, StreamState

PREFILL = {
    "sliding_window": ("sliding_window", {}),
    "perturbation": ("perturbation", {}),
    "perturbation_no_rho": ("perturbation", {"redundancy": "none"}),
    "perturbation_all_queries": ("perturbation", {"n_probes": 0}),
    "observed_attention": ("observed_attention", {}),
    "omnimem": ("omnimem", {}),
}
"""Label -> selector and its options. `observed_attention` and `omnimem` look at all queries of the chunk."""


@dataclass
class Bench:
    """What all cases share.

    Attributes:
        suffix: put behind the names of results, to tell runs with other settings apart.
        attention: kernel of the decoder's attention.
        graphs: whether chunks that repeat are recorded and replayed.
    """

    shape: Shape
    device: torch.device
    dtype: torch.dtype
    results: Results
    clock: Clock
    reps: int = 3
    suffix: str = ""
    attention: str = "sdpa"
    graphs: bool = False

    @property
    def has_kernels(self) -> bool:
        """Whether selection runs in the package's kernels here."""
        return self.device.type == "cuda" and kernels.install()

    @cached_property
    def model(self) -> StreamingModel:
        """The model; made at first use."""
        model = make_model(self.shape, self.device, self.dtype, self.attention)
        model.graphs = self.graphs
        return model

    @cached_property
    def block(self) -> TokenBlock:
        """The whole stream."""
        return stream_block(self.shape, self.model, self.shape.tokens)

    def spec(self, label: str) -> MemorySpec:
        """The memory under a label of `PREFILL`."""
        selector, options = PREFILL[label]
        return MemorySpec(selector, options, budget=self.shape.budget, chunk_tokens=self.shape.chunk)

    def add(self, name: str, samples: list[float], unit: str = "s", goal: float | None = None, note: str = "") -> None:
        """Record the median of some samples."""
        value, spread = median_and_spread(samples)
        self.results.add(name + self.suffix, value, unit, goal=goal, spread=spread, note=note)

    def add_peak(self, name: str, peak_gib: float, goal: float | None = None) -> None:
        """Record a peak of device memory."""
        if self.device.type == "cuda":
            self.results.add(f"{name}.peak{self.suffix}", peak_gib, "GiB", goal=goal)


def peak_matmul(bench: Bench) -> None:
    """What the device reaches in a large bf16 product: the ceiling of everything else."""
    n = 8192 if bench.device.type == "cuda" else 256
    x, y = (torch.randn(n, n, device=bench.device, dtype=bench.dtype) for _ in range(2))
    for _ in range(3):
        x @ y
    per_call = 10

    def run() -> None:
        for _ in range(per_call):
            torch.mm(x, y)

    rates = [per_call * 2 * n**3 / s / 1e12 for s in bench.clock.samples(run, 5)]
    value, spread = median_and_spread(rates)
    bench.results.add("peak.bf16_matmul", value, "TFLOP/s", better="higher", spread=spread)


def run_stream(bench: Bench, spec: MemorySpec, block: TokenBlock) -> StreamState:
    """Prefill: all of `block` through the model with a memory."""
    stream = Stream(bench.model, spec)
    return stream.flush(stream.feed(stream.start(), block))


def prefill(bench: Bench, label: str) -> None:
    """Streaming prefill with one selector. If the whole stream would not fit into the time left, it is extrapolated
    from chunks with a full memory."""
    spec, shape = bench.spec(label), bench.shape
    n_chunks, n_full = shape.tokens // shape.chunk, -(-shape.budget // shape.chunk)
    start = bench.block[: n_full * shape.chunk]
    stream = Stream(bench.model, spec)
    state = stream.feed(stream.start(), start)
    more = bench.block[start.n : start.n + shape.chunk]
    stream.feed(state, more)  # warms up, compiles kernels
    chunk_s = min(bench.clock.samples(lambda: stream.feed(state, more), 2))
    name, goal = f"prefill.{label}", 4.2 if label == "perturbation" else None
    fill_s = bench.clock.once(lambda: stream.feed(stream.start(), start))
    expected_s = fill_s + (n_chunks - n_full) * chunk_s
    if 2 * expected_s > bench.clock.left_s:
        bench.add(name, [expected_s], goal=goal, note="extrapolated from chunks with a full memory")
    else:
        bench.add_peak(name, bench.clock.peak_gib(lambda: run_stream(bench, spec, bench.block), bench.graphs))
        run = bench.clock.samples(lambda: run_stream(bench, spec, bench.block), bench.reps, expected_s)
        bench.add(name, run, goal=goal)
    bench.add(f"prefill.{label}.chunk", [1e3 * chunk_s], "ms")
    share(bench, label)


def share(bench: Bench, label: str) -> None:
    """Scoring and selection as a share of prefill, against the rule that scores nothing."""
    plain = bench.results.value(f"prefill.sliding_window{bench.suffix}")
    whole = bench.results.value(f"prefill.{label}{bench.suffix}")
    if plain is None or whole is None or label == "sliding_window":
        return
    goal = {"perturbation": 3.0, "omnimem": 12.0, "observed_attention": 12.0}.get(label)
    bench.results.add(f"share.{label}{bench.suffix}", 100 * (whole - plain) / whole, "%", goal=goal)


def prefill_full(bench: Bench) -> None:
    """Full context: the whole stream as one chunk, nothing dropped."""
    spec = MemorySpec("full", budget=None, chunk_tokens=bench.shape.tokens)
    expected_s = bench.clock.once(lambda: run_stream(bench, spec, bench.block))
    bench.add_peak("prefill.full", bench.clock.peak_gib(lambda: run_stream(bench, spec, bench.block)))
    bench.add("prefill.full", bench.clock.samples(lambda: run_stream(bench, spec, bench.block), 2, expected_s))
    bench.clock.clean()


def ask(bench: Bench) -> None:
    """First token of the answer to a question of 32 tokens, over a memory that is full."""
    shape, stream = bench.shape, Stream(bench.model, bench.spec("perturbation"))
    tokens = min(shape.tokens, (shape.budget // shape.chunk + 2) * shape.chunk)
    block = bench.block[:tokens]
    state = stream.feed(stream.start(), block)
    question = text_block(bench.model, 32, end_of(block))

    @torch.no_grad()
    def first_token() -> int:
        hidden = stream.ask(state, [question])
        return int(bench.model.logits(hidden[:, -1]).argmax())

    first_token()
    bench.add("ask.first_token", bench.clock.samples(first_token, 10), goal=0.2)


# LoRA steps -----------------------------------------------------------------------------------------------------------


def with_lora(bench: Bench) -> list[torch.nn.Parameter]:
    """Put adapters on q, k, v, o if there are none yet, and give their parameters."""
    if bench.model.adapter is None:
        add_lora(bench.model, LoraSettings(r=bench.shape.rank, alpha=2 * bench.shape.rank))
    return [p for _, p in lora_parameters(bench.model)]


def encoded(bench: Bench, tokens: int) -> EncodedStream:
    """The first `tokens` of the stream, and one question whose last 8 tokens are learned."""
    block = bench.block[:tokens]
    question = text_block(bench.model, 24, end_of(block))
    rows = torch.arange(16, 24, device=bench.device) - 1
    read = torch.stack([torch.zeros_like(rows), rows], dim=-1)
    targets = torch.arange(8, device=bench.device)
    return EncodedStream([block], [Moment(1, None, [Question(question, read, targets)])])


def lora(bench: Bench, name: str, gradient: Gradient, goal_s: float, goal_gib: float) -> None:
    """One step with compression, forward and backward (the optimizer's own step is a few milliseconds)."""
    parameters = with_lora(bench)
    step, spec = StreamingStep(bench.model, LossConfig()), bench.spec("perturbation")

    def run(stream: EncodedStream, gradient: Gradient = gradient) -> None:
        step(stream, spec, gradient).loss.backward()
        clear(parameters)

    shape = bench.shape
    short = encoded(bench, min(shape.tokens, (-(-shape.budget // shape.chunk) + 2) * shape.chunk))
    run(short, gradient)
    expected_s = extrapolated(bench, lambda given: run(short, given), short.n_tokens // shape.chunk, gradient)
    whole = encoded(bench, shape.tokens)
    if expected_s > bench.clock.left_s:
        return bench.add(name, [expected_s], goal=goal_s, note=f"extrapolated from {short.n_tokens} tokens")
    bench.add_peak(name, bench.clock.peak_gib(lambda: run(whole), bench.graphs), goal_gib)
    bench.add(name, bench.clock.samples(lambda: run(whole), bench.reps, expected_s), goal=goal_s)
    add_utilisation(bench, name)
    return None


def extrapolated(bench: Bench, run: Callable[[Gradient], None], n_short: int, gradient: Gradient) -> float:
    """Seconds of a step on the whole stream, from steps on one of `n_short` chunks: all chunks cost one pass, those
    with gradient a second one and the way back."""
    one, all_of_them = (dataclasses.replace(gradient, kind=kind, chunks=1) for kind in ("last", "all"))
    run(one)
    one_s, all_s = (bench.clock.once(lambda g=g: run(g)) for g in (one, all_of_them))
    back_s = (all_s - one_s) / max(1, n_short - 1)
    n = bench.shape.tokens // bench.shape.chunk
    n_back = min(n, gradient.chunks) if gradient.kind == "last" else n
    return n * (one_s - back_s) / n_short + n_back * back_s


def add_utilisation(bench: Bench, name: str) -> None:
    """The operations of a step over its time, as a share of the measured peak."""
    peak, taken_s = bench.results.value("peak.bf16_matmul"), bench.results.value(name + bench.suffix)
    if name == "lora.all" and peak and taken_s:
        rate = bench.shape.step_flops() / taken_s / 1e12
        bench.results.add(f"utilisation.{name}{bench.suffix}", 100 * rate / peak, "%", goal=61, better="higher")


def lora_full(bench: Bench) -> None:
    """The reference: full context, every layer recomputed in the backward pass."""
    parameters, shape = with_lora(bench), bench.shape

    def run(stream: EncodedStream) -> None:
        full_loss(bench.model, stream).backward()
        clear(parameters)

    short = encoded(bench, min(shape.tokens, 8 * shape.chunk))
    run(short)
    whole = encoded(bench, shape.tokens)
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    found = bench.clock.samples(lambda: run(whole), 2, float("inf") if bench.clock.left_s < 60 else 0.0)
    if bench.device.type == "cuda":
        bench.add_peak("lora.full_context", torch.cuda.max_memory_allocated(bench.device) / 2**30)
    bench.add("lora.full_context", found)
    add_gains(bench)


def add_gains(bench: Bench) -> None:
    """The reference against the steps with compression, from what the file holds: recordings would count as memory of
    the reference, so each runs in a process of its own."""
    for suffix in sorted({bench.suffix, ".graphs"}):
        for name in ("lora.all", "lora.all_by_layer"):
            for part, unit, goal in (("", "x faster", 2.8), (".peak", "x less", 2.5)):
                ours = bench.results.value(f"{name}{part}{suffix}")
                reference = f"lora.full_context{part}"
                theirs = bench.results.value(reference + bench.suffix) or bench.results.value(reference)
                if ours and theirs:
                    bench.results.add(f"gain.{name}{part}{suffix}", theirs / ours, unit, goal=goal, better="higher")


def full_loss(model: StreamingModel, stream: EncodedStream) -> Tensor:
    """Loss of one question over the whole stream in one pass."""
    (question,) = stream.questions
    block = TokenBlock.cat([*stream.blocks, question.block])
    rope, hidden = model.rope(block.positions), block.embeds

    def run(layer: int, given: Tensor) -> Tensor:
        return model.run_layer(layer, given, rope, Tap(), block.extras)

    for layer in range(model.n_layers):
        hidden = checkpoint(run, layer, hidden, use_reentrant=False)
    rows = question.read[:, 1] + stream.n_tokens
    return answer_loss(model.logits(hidden[0, rows]), question.targets)


def clear(parameters: list[torch.nn.Parameter]) -> None:
    """Drop gradients."""
    for parameter in parameters:
        parameter.grad = None


def release(bench: Bench) -> None:
    """Free the model and the stream."""
    for name in ("model", "block"):
        bench.__dict__.pop(name, None)
    gc.collect()
    bench.clock.clean()


def lora_case(name: str, gradient: Gradient, goal_s: float, goal_gib: float) -> Callable[[Bench], None]:
    """A case of `lora`."""
    return lambda bench: lora(bench, name, gradient, goal_s, goal_gib)


def prefill_case(label: str) -> Callable[[Bench], None]:
    """A case of `prefill`."""
    return lambda bench: prefill(bench, label)


STREAM_CASES: dict[str, Callable[[Bench], None]] = {
    "peak": peak_matmul,
    **{f"prefill_{label}": prefill_case(label) for label in PREFILL},
    "prefill_full": prefill_full,
    "ask": ask,
}
LORA_CASES: dict[str, Callable[[Bench], None]] = {
    "lora_last8": lora_case("lora.last_8", Gradient("last", chunks=8), 6.0, 26.0),
    "lora_last8_by_layer": lora_case(
        "lora.last_8_by_layer", Gradient("last", chunks=8, granularity="layer"), 6.0, 26.0
    ),
    "lora_all": lora_case("lora.all", Gradient("all"), 14.0, 32.0),
    "lora_full": lora_full,
    "gains": add_gains,
}


def with_tokens(shape: Shape, tokens: int) -> Shape:
    """`shape` with a stream of at least `tokens`, in whole chunks."""
    return dataclasses.replace(shape, tokens=-(-tokens // shape.chunk) * shape.chunk)
