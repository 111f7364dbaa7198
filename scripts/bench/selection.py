"""Selection alone, its pieces against their references, what a chunk's time goes to, and which tokens are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import Bench
from torch.profiler import ProfilerActivity, profile, record_function

import omnimem_train.choosing as choosing
from omnimem_train.memory import Candidates, LayerMemory, Selector, choose, make_allocation, make_selector, selectors
from omnimem_train.streaming import Stream

VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    ("perturbation (no rho)", "perturbation", {"redundancy": "none"}),
    ("perturbation (all queries)", "perturbation", {"n_probes": 0}),
    ("perturbation (group norm)", "perturbation", {"group_norm": "sum"}),
    ("snapkv (later_key)", "snapkv", {"redundancy": "later_key"}),
    ("omnimem (keys)", "omnimem", {"features": "keys"}),
]
SLOW_S = 3.0  # a selector that takes longer for all layers is measured once


def candidates(bench: Bench, layer: int, selector: Selector) -> Candidates:
    """Random candidates of one layer, memory full, laid out as the stream of `stream_block`."""
    shape, size = bench.shape, bench.shape.size
    draw = torch.Generator(bench.device).manual_seed(layer)
    d = size.hidden // size.heads

    def random(*dims: int) -> torch.Tensor:
        return torch.randn(*dims, generator=draw, device=bench.device, dtype=bench.dtype)

    n, block = shape.candidates, bench.block
    given = block[:n] if block.n >= n else block
    n = given.n
    index = torch.arange(n, device=bench.device)[None]
    tokens = LayerMemory.from_chunk(
        random(1, size.kv_heads, n, d),
        random(1, size.kv_heads, n, d),
        given.positions,
        given.modality,
        given.time_s,
        index,
        random(1, n, size.hidden) if "hidden" in selector.needs else None,
    )
    n_memory = n - shape.chunk
    asked = selector.probes().rows(shape.chunk, bench.device)
    return Candidates(
        tokens=LayerMemory.from_tensors(None if t is None else t.contiguous() for t in tokens.tensors()),
        n_memory=n_memory,
        queries=2 * random(1, size.heads, shape.chunk, d)[:, :, asked],
        query_rows=asked + n_memory,
        scaling=d**-0.5,
        output_weight=random(size.hidden, size.hidden) / size.hidden**0.5,
        layer=layer,
        n_layers=size.layers,
        seed=layer,
        rotary=bench.model.rotary(),
        known_text=shape.text,
    )


def selection(bench: Bench) -> None:
    """Time of score and selection for all layers by selector, on random tensors."""
    named = [(name, name, dict[str, Any]()) for name in selectors()] + VARIANTS
    allocation = make_allocation("shared")
    for label, name, options in named:
        if bench.clock.left_s < 0:
            print("no time left for the selectors from", label, "on")
            return
        selector = make_selector(name, **options)
        layers = [candidates(bench, layer, selector) for layer in range(bench.shape.size.layers)]

        def run(layers: list[Candidates] = layers, selector: Selector = selector) -> None:
            for c in layers:
                choose(c, selector, allocation, bench.shape.budget)

        choose(layers[0], selector, allocation, bench.shape.budget)
        first_s = bench.clock.once(run)
        samples = [first_s] if first_s > SLOW_S else bench.clock.samples(run, 5, first_s)
        bench.add(f"select.{label}", [1e3 * s for s in samples], "ms")
        del layers
        bench.clock.clean()


def agreement(bench: Bench) -> None:
    """Which share of the tokens kept with all queries is kept with 64 probes too, on one chunk of the random model."""
    counts = [bench.shape.chunk // 4] if bench.shape.chunk <= 64 else [32, 64, 128, 256]
    everything = make_selector("perturbation", n_probes=0)
    seen = captured(bench, everything)
    allocation = make_allocation("shared")
    wanted = [c.media_among(choose(c, everything, allocation, bench.shape.budget)[0]) for c in seen]
    for count in counts:
        probed = make_selector("perturbation", n_probes=count)
        found = []
        for c, best in zip(seen, wanted, strict=True):
            asked = probed.probes().rows(bench.shape.chunk, bench.device)
            kept = c.media_among(choose(c.asked_by(asked), probed, allocation, bench.shape.budget)[0])
            found.append(100 * float((best & kept).sum() / best.sum()))
        goal = 99.0 if count == 64 else None
        bench.results.add(
            f"agreement.{count}_probes{bench.suffix}",
            sum(found) / len(found),
            "%",
            goal=goal,
            better="higher",
            spread=(min(found), max(found)),
            note="mean over layers; random weights, so attention is noise: a lower bound",
        )


def captured(bench: Bench, selector: Selector) -> list[Candidates]:
    """What the stream shows a selector in each layer, in the first chunk that has a full memory."""
    shape, seen = bench.shape, list[Candidates]()

    def spy(c: Candidates, *rest: Any) -> Any:
        seen.append(c)
        return choose(c, *rest)

    n_full = -(-shape.budget // shape.chunk)
    fast = Stream(bench.model, bench.spec("perturbation"))
    state = fast.feed(fast.start(), bench.block[: n_full * shape.chunk])
    wide = Stream(bench.model, bench.spec("perturbation_all_queries"))
    before = choosing.choose
    choosing.choose = spy
    try:
        wide.feed(state, bench.block[n_full * shape.chunk : (n_full + 1) * shape.chunk])
    finally:
        choosing.choose = before
    return seen


def profile_chunks(bench: Bench) -> None:
    """A table of kernels by time for a chunk with a full memory, beside the results as profile_*.txt."""
    shape, activities = bench.shape, [ProfilerActivity.CPU]
    if bench.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    for label in ("perturbation", "sliding_window"):
        stream = Stream(bench.model, bench.spec(label))
        n_full = -(-shape.budget // shape.chunk) * shape.chunk
        state = stream.feed(stream.start(), bench.block[:n_full])
        more = bench.block[n_full : n_full + shape.chunk]
        stream.feed(state, more)
        with profile(activities=activities) as found, record_function("chunk"):
            stream.feed(state, more)
            bench.clock.synchronise()
        order = "self_cuda_time_total" if bench.device.type == "cuda" else "self_cpu_time_total"
        table = found.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=90)
        path = bench.results.path.with_name(f"profile_{label}{bench.suffix}.txt")
        path.write_text(table + "\n")
        print("wrote", path)


SELECTION_CASES: dict[str, Callable[[Bench], None]] = {"agreement": agreement, "select": selection}
PROFILE_CASES: dict[str, Callable[[Bench], None]] = {"profile": profile_chunks}
