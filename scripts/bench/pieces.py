"""The kernels by themselves: against plain torch, and with other block sizes. Needs a GPU that runs them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch
from cases import Bench
from selection import candidates
from torch import Tensor

from omnimem_train.memory import Candidates, make_allocation, make_selector
from omnimem_train.memory.fast import references
from omnimem_train.memory.perturbation import own_gram
from omnimem_train.memory.redundancy import later_key
from omnimem_train.memory.selector import choose

CALLS = 10  # layers that are gone through between two synchronisations, so that no input is still in the cache


def time_us(bench: Bench, run: Callable[[Candidates], object], layers: list[Candidates], reps: int = 5) -> list[float]:
    """Microseconds a call takes."""
    run(layers[0])
    samples = bench.clock.samples(lambda: [run(c) for c in layers], reps)
    return [1e6 * s / len(layers) for s in samples]


def pieces(bench: Bench) -> None:
    """Every kernel against its reference: time of both, and the largest difference relative to the largest number."""
    if not bench.has_kernels:
        print("no kernels on this device")
        return
    from omnimem_train.kernels import attention, change, redundancy

    selector, everything = make_selector("perturbation", redundancy="none"), make_selector("perturbation", n_probes=0)
    few = [candidates(bench, layer, selector) for layer in range(CALLS)]
    wide = [candidates(bench, layer, everything) for layer in range(2)]
    grams = {id(c): gram_of(bench, c) for c in few + wide}

    def changed(c: Candidates) -> Tensor | None:
        return change.change(c, grams[id(c)])

    def scored(c: Candidates) -> Tensor:
        return selector.score(without_weight(c, grams[id(c)]), bench.shape.budget).score

    def kept(c: Candidates) -> Tensor:
        return choose(c, make_selector("knorm"), make_allocation("shared"), bench.shape.budget)[0]

    compare(bench, "change", few, changed, scored)
    compare(bench, "later_key", few, lambda c: redundancy.later_key(c.tokens.keys, c.tokens.modality), later_of)
    compare(bench, "keep", few, kept, kept)
    compare(bench, "attention", wide, attention.attention_sum, summed)
    compare(bench, "change.all_queries", wide, changed, scored)


def compare(
    bench: Bench,
    name: str,
    layers: list[Candidates],
    kernel: Callable[[Candidates], Tensor | None],
    reference: Callable[[Candidates], Tensor],
) -> None:
    """Record one piece."""
    found = kernel(layers[0])
    assert found is not None
    with references():
        wanted = reference(layers[0])
        slow = time_us(bench, reference, layers, 3)
    error = float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())
    bench.add(f"kernel.{name}", time_us(bench, kernel, layers), "us")
    bench.add(f"kernel.{name}.torch", slow, "us")
    bench.results.add(f"kernel.{name}.difference{bench.suffix}", error, "of largest")


def gram_of(bench: Bench, c: Candidates) -> Tensor:
    """W_h^T W_h."""
    assert c.output_weight is not None
    return own_gram(c.output_weight, bench.shape.size.kv_heads, bench.shape.size.heads)


def without_weight(c: Candidates, gram: Tensor) -> Candidates:
    """The view that a stream would give."""
    return dataclasses.replace(c, output_weight=None, output_gram=gram)


def later_of(c: Candidates) -> Tensor:
    """rho."""
    return later_key(c.tokens.keys, c.tokens.modality)


def summed(c: Candidates) -> Tensor:
    """Attention summed over the probes."""
    total = torch.zeros(*c.shape[:2], c.group, c.n, device=c.tokens.keys.device)
    for part, _ in c.attention_blocks():
        total += part.sum(dim=3)
    return total


# Block sizes ----------------------------------------------------------------------------------------------------------


def grid(*names: str, values: list[tuple[int, ...]]) -> list[dict[str, int]]:
    """Settings of a kernel."""
    return [dict(zip(names, tried, strict=True)) for tried in values]


GRIDS: dict[str, list[dict[str, int]]] = {
    "ATTEND": grid(
        "BS", "BP", "num_warps", "num_stages",
        values=[(64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 8, 2), (64, 128, 8, 3), (128, 64, 8, 2)],
    ),
    "SIZES": grid("BS", "num_warps", "num_stages", values=[(64, 4, 3), (64, 4, 2), (128, 4, 2), (128, 8, 3)]),
    "SCORE": grid(
        "BS", "BP", "num_warps", "num_stages",
        values=[(128, 32, 8, 2), (128, 32, 4, 2), (64, 32, 4, 2), (128, 64, 8, 2), (64, 64, 4, 1)],
    ),
    "LATER": grid(
        "BR", "BC", "num_warps", "num_stages",
        values=[(128, 128, 4, 2), (128, 64, 4, 2), (128, 64, 4, 3), (128, 128, 8, 3), (256, 64, 8, 3)],
    ),
    "OFFSETS": grid("BS", "num_warps", "num_stages", values=[(128, 8, 3), (64, 8, 3), (64, 4, 3)]),
    "COLUMNS": grid(
        "BS", "BP", "num_warps", "num_stages",
        values=[(128, 128, 4, 2), (128, 64, 4, 3), (128, 64, 8, 3), (64, 128, 4, 3), (256, 64, 8, 2)],
    ),
}  # fmt: skip


def tune(bench: Bench) -> None:
    """Times of the kernels with other block sizes; what is best is left to the reader to write down."""
    if not bench.has_kernels:
        print("no kernels on this device")
        return
    from omnimem_train.kernels import attention, change, redundancy

    few = [candidates(bench, layer, make_selector("perturbation")) for layer in range(CALLS)]
    wide = [candidates(bench, layer, make_selector("perturbation", n_probes=0)) for layer in range(2)]
    gram = gram_of(bench, few[0])
    runs: dict[str, tuple[Any, Callable[[Candidates], object], list[Candidates]]] = {
        "ATTEND": (change, lambda c: change.change(c, gram), few),
        "SIZES": (change, lambda c: change.change(c, gram), few),
        "SCORE": (change, lambda c: change.change(c, gram), few),
        "LATER": (redundancy, lambda c: redundancy.later_key(c.tokens.keys, c.tokens.modality), few),
        "OFFSETS": (attention, attention.attention_sum, wide),
        "COLUMNS": (attention, attention.attention_sum, wide),
    }
    for name, spans in itertools.product(GRIDS, (1024, 2048, 4096)):
        if name != "LATER" and spans != 1024:
            continue
        module, run, layers = runs[name]
        config, before, span = getattr(module, name), dict(getattr(module, name)), redundancy.SPAN
        redundancy.SPAN = spans
        for tried in GRIDS[name]:
            if bench.clock.left_s < 0:
                break
            config.update(tried)
            label = ",".join(str(v) for v in tried.values()) + (f",span {spans}" if name == "LATER" else "")
            try:
                bench.add(f"tune.{name}({label})", time_us(bench, run, layers), "us")
            except Exception as error:  # a block that does not fit this GPU
                print(f"tune.{name}({label}): {type(error).__name__}: {str(error)[:100]}")
        config.update(before)
        redundancy.SPAN = span


PIECE_CASES: dict[str, Callable[[Bench], None]] = {"pieces": pieces, "tune": tune}
