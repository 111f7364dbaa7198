"""Streams eight times as long as the bench's: what grows with them. Embeddings are in host memory, as in training with
`gradient.offload=host`, and so is what a LoRA step stores for its second pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from cases import Bench, clear, release, with_lora
from measure import GIB
from shape import end_of, stream_block, text_block

from omnimem_train.gradient import Gradient
from omnimem_train.losses import LossConfig
from omnimem_train.models.interface import TokenBlock
from omnimem_train.offload import SLAB_BYTES, host_memory
from omnimem_train.step import EncodedStream, Moment, Question, StreamingStep
from omnimem_train.streaming import Stream

LONGER = 8
BLOCKS = 4  # a chunk comes in so many blocks, as from an encoder
GROWTH_GIB, HOST_GIB, PER_TOKEN = 2.0, 80.0, 1.1  # goals
WARM = 2  # whole steps that pin host memory and are not counted
STEP_BYTES = 4 * GIB  # host memory is pinned so much at a time, with a look at the clock


def blocks_of(bench: Bench, tokens: int, *, host: bool = True) -> list[TokenBlock]:
    """A stream with random embeddings, which are made block by block and put into host memory unless said."""
    model, shape = bench.model, bench.shape
    bare = stream_block(shape, model, tokens, width=0)
    memory = host_memory(model.device) if host else None
    slabs = None if memory is None else memory.new_slabs()
    generator = torch.Generator(model.device).manual_seed(1)
    made = {"generator": generator, "device": model.device, "dtype": model.dtype}
    found, size = [], shape.chunk // BLOCKS
    for start in range(0, tokens, size):
        block = bare[start : start + size]
        block = replace(block, embeds=torch.randn(1, block.n, model.hidden_size, **made))
        found.append(block if memory is None or slabs is None else memory.store(block, slabs))
    bench.clock.synchronise()
    return found


def asked(bench: Bench, blocks: list[TokenBlock]) -> EncodedStream:
    """`blocks`, and one question whose last 8 tokens are learned."""
    question = text_block(bench.model, 24, end_of(blocks[-1]))
    rows = torch.arange(16, 24, device=bench.device) - 1
    read = torch.stack([torch.zeros_like(rows), rows], dim=-1)
    targets = torch.arange(8, device=bench.device)
    return EncodedStream(blocks, [Moment(len(blocks), None, [Question(question, read, targets)])])


@dataclass(frozen=True)
class Taken:
    """Seconds, and GiB of device memory at the peak (0 without a GPU)."""

    seconds: float
    peak_gib: float


def take(bench: Bench, run: Callable[[], object]) -> Taken:
    """One timing of `run`, with its peak."""
    found: list[float] = []
    peak = bench.clock.peak_gib(lambda: found.append(bench.clock.once(run)), bench.graphs)
    return Taken(found[0], peak)


def fill(bench: Bench) -> int:
    """Tokens after which a memory is full and chunks take what they always take."""
    return min(bench.shape.tokens, (-(-bench.shape.budget // bench.shape.chunk) + 2) * bench.shape.chunk)


def record(bench: Bench, name: str, taken: Taken, note: str = "") -> None:
    """Time and peak."""
    bench.add(name, [taken.seconds], note=note)
    bench.add_peak(name, taken.peak_gib)


def compare(bench: Bench, name: str, short: Taken, long: Taken) -> None:
    """Time per token and growth of the peak, from a stream to one `LONGER` times as long."""
    bench.add(f"{name}.per_token", [long.seconds / LONGER / short.seconds], "x", goal=PER_TOKEN)
    if bench.device.type == "cuda":
        bench.add(f"{name}.growth", [long.peak_gib - short.peak_gib], "GiB", goal=GROWTH_GIB)


def too_late(bench: Bench, name: str, expected_s: float) -> bool:
    """Notes that there is no time for a timing, if there is none."""
    if expected_s <= bench.clock.left_s:
        return False
    note = f"not run: about {expected_s:.0f} s needed, {bench.clock.left_s:.0f} s left"
    bench.results.add(name + bench.suffix, None, "s", note=note)
    return True


def long_prefill(bench: Bench) -> None:
    """Prefill of the stream and of one `LONGER` times as long."""
    spec, tokens = bench.spec("perturbation"), bench.shape.tokens

    @torch.no_grad()
    def run(blocks: list[TokenBlock]) -> None:
        stream = Stream(bench.model, spec)
        stream.flush(stream.feed_all(stream.start(), blocks))

    blocks = blocks_of(bench, tokens)
    run(blocks[: fill(bench) * BLOCKS // bench.shape.chunk])
    short = take(bench, partial(run, blocks))
    record(bench, "prefill.host", short)
    if too_late(bench, "prefill.long", 1.3 * LONGER * short.seconds):
        return
    del blocks
    long = take(bench, partial(run, blocks_of(bench, LONGER * tokens)))
    record(bench, "prefill.long", long, f"{LONGER * tokens:,} tokens")
    compare(bench, "prefill.long", short, long)


def step_on(bench: Bench, stream: EncodedStream, gradient: Gradient) -> None:
    """One step, forward and backward."""
    step = StreamingStep(bench.model, LossConfig())
    step(stream, bench.spec("perturbation"), gradient).loss.backward()
    clear(with_lora(bench))


def lora_offload(bench: Bench) -> None:
    """A step with everything on the device, and with what waits in host memory: what the copies cost."""
    with_lora(bench)
    tokens, warm = bench.shape.tokens, fill(bench) * BLOCKS // bench.shape.chunk
    found = {}
    for name, offload in (("lora.on_device", "none"), ("lora.offload", "host")):
        gradient = Gradient("all", offload=offload)
        blocks = blocks_of(bench, tokens, host=offload == "host")
        step_on(bench, asked(bench, blocks[:warm]), gradient)
        whole = partial(step_on, bench, asked(bench, blocks), gradient)
        first = take(bench, whole)  # pins host memory, too
        again = bench.clock.samples(whole, bench.reps - 1, first.seconds) if bench.reps > 1 else []
        bench.add(name, again or [first.seconds], note="" if again else "the first, which pins host memory")
        bench.add_peak(name, first.peak_gib)
        found[name] = min(again or [first.seconds])
    bench.add("share.offload", [100 * (1 - found["lora.on_device"] / found["lora.offload"])], "%")


def lora_by_layer(bench: Bench) -> None:
    """A step whose second passes go layer by layer, with all it stores in host memory."""
    with_lora(bench)
    gradient = Gradient("all", granularity="layer", offload="host")
    stream = asked(bench, blocks_of(bench, bench.shape.tokens))
    for _ in range(2):  # the first chunks, too, are recorded after these
        step_on(bench, asked(bench, blocks_of(bench, fill(bench))), gradient)
    whole, told = partial(step_on, bench, stream, gradient), list[str]()
    taken = []
    for _ in range(WARM + bench.reps):
        before = host_allocations()
        taken.append(take(bench, whole) if not taken else Taken(bench.clock.once(whole), 0.0))
        count, pinning_s = (now - then for now, then in zip(host_allocations(), before, strict=True))
        told.append(f"{taken[-1].seconds:.2f} s (pinned {count:.0f} times, {pinning_s:.1f} s)")
        print(told[-1], flush=True)
    note = f"without the first {WARM}, in order: {'; '.join(told)}"
    bench.add("lora.all_by_layer", [t.seconds for t in taken[WARM:]], goal=14.0, note=note)
    bench.add_peak("lora.all_by_layer", max(t.peak_gib for t in taken), goal=32.0)
    if bench.device.type == "cuda":
        bench.add("lora.all_by_layer.pinned", [pinned_gib()], "GiB")


def lora_1m(bench: Bench) -> None:
    """One step on a stream `LONGER` times as long, beside one on the stream."""
    with_lora(bench)
    tokens, gradient = bench.shape.tokens, Gradient("all", offload="host")
    stream = asked(bench, blocks_of(bench, tokens))
    step_on(bench, stream, gradient)  # pins host memory, compiles kernels
    for _ in range(2):  # the first chunks, too, are recorded by then
        step_on(bench, asked(bench, blocks_of(bench, fill(bench))), gradient)
    short = take(bench, partial(step_on, bench, stream, gradient))
    record(bench, "lora.short", short, f"{tokens:,} tokens")
    del stream
    need = LONGER * tokens * bytes_a_token(bench)
    pin_s, done = pin(bench, need, 1.2 * LONGER * short.seconds)
    if pin_s:
        note = f"{done / GIB:.1f} GiB of host memory, once a process; not in the step"
        bench.add("lora.1m.pinning", [pin_s], note=note)
    if done < need or too_late(bench, "lora.1m", 1.1 * LONGER * short.seconds):
        return
    stream = asked(bench, blocks_of(bench, LONGER * tokens))
    long = take(bench, partial(step_on, bench, stream, gradient))
    record(bench, "lora.1m", long, f"{LONGER * tokens:,} tokens, one timing")
    compare(bench, "lora.1m", short, long)
    add_host(bench)
    del stream
    release(bench)


def bytes_a_token(bench: Bench) -> float:
    """Bytes of host memory that a token takes: its keys and values once they are dropped, its embedding here and in its
    chunk, rows in 16 bits; room that slabs leave unused."""
    size, model, width = bench.shape, bench.model, torch.finfo(bench.dtype).bits // 8
    rows = 2 * model.n_layers * model.kv_heads * (size.budget + size.chunk) / size.chunk
    dropped = 2 * model.n_layers * model.kv_heads * model.head_dim * width
    return 1.01 * (dropped + rows + 2 * model.hidden_size * width)


def pin(bench: Bench, n_bytes: float, spare_s: float) -> tuple[float, float]:
    """Pin host memory before the clock runs, as long as `spare_s` seconds stay. Returns seconds and bytes."""
    memory, start, done = host_memory(bench.device), time.perf_counter(), 0.0
    if memory is None:
        return 0.0, n_bytes
    slower_s = 0.0
    while done < n_bytes and bench.clock.left_s > spare_s + slower_s:
        begun, done = time.perf_counter(), min(n_bytes, done + STEP_BYTES)
        memory.slabs.reserve(-(-int(done) // SLAB_BYTES) * SLAB_BYTES)
        slower_s = max(slower_s, time.perf_counter() - begun)
    if done < n_bytes:
        note = f"not run: {done / GIB:.0f} of {n_bytes / GIB:.0f} GiB pinned, {bench.clock.left_s:.0f} s left"
        bench.results.add("lora.1m" + bench.suffix, None, "s", note=note)
    return time.perf_counter() - start, done


def add_host(bench: Bench) -> None:
    """The process's peak of host memory. Drivers differ in whether pinned pages count as resident; they do not where
    less is resident than pinned."""
    resident, pinned = status_gib("VmHWM"), pinned_gib()
    note = f"{pinned:.1f} GiB pinned, resident at most {resident:.1f} GiB"
    bench.add("lora.1m.host", [resident + (pinned if resident < pinned else 0)], "GiB", goal=HOST_GIB, note=note)


def status_gib(field: str) -> float:
    """A size in /proc/self/status; 0 where there is none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 / GIB for line in lines if line.startswith(f"{field}:")), 0.0)


def host_allocations() -> tuple[float, float]:
    """How often torch has pinned host memory so far, and for how many seconds."""
    stats = torch.cuda.host_memory_stats() if torch.cuda.is_available() else {}
    return stats.get("num_host_alloc", 0), stats.get("host_alloc_time.total", 0) / 1e6


def pinned_gib() -> float:
    """Host memory that torch has pinned; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0.0
    stats = torch.cuda.host_memory_stats()
    known = [stats.get(f"{name}_bytes.current", 0) for name in ("allocated", "reserved")]  # versions differ in names
    return float(max(known)) / GIB


LONG_CASES: dict[str, Callable[[Bench], None]] = {
    "long_prefill": long_prefill,
    "lora_offload": lora_offload,
    "lora_by_layer": lora_by_layer,
    "lora_1m": lora_1m,
}
