"""Our side of `peers.sh`: peers_ours.py FOLDER --device cuda --reps 10

Times this package's rules on the layers in FOLDER, through the same `choose` as a stream, and writes what they keep.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import Clock, versions
from peers_tensors import Layer, Side, Sizes, frequencies, read_layer, read_sizes, timed
from torch import Tensor

from omnimem_train import kernels
from omnimem_train.memory import (
    VISUAL,
    Candidates,
    LayerMemory,
    Rotary,
    Selector,
    choose,
    make_allocation,
    make_selector,
)
from omnimem_train.memory.fast import provided
from omnimem_train.memory.perturbation import own_gram

FRAME = (8, 14)  # rows and columns of a picture, for the rule that asks where a token stands in it


@dataclass(frozen=True)
class Case:
    """A rule and how it is shown the tensors.

    Attributes:
        whole: all candidates are one fresh chunk, so that a rule that looks at every query of the chunk looks at all of
            them, as kvpress does; otherwise the last `chunk` are new.
        pictures: candidates stand in pictures of `FRAME`; otherwise in one line.
        compared: kvpress has this rule, so it is also run in float32.
        study: its name in the recall study; "" where that did not have it.
    """

    selector: str
    options: dict[str, Any] = field(default_factory=dict)
    whole: bool = False
    pictures: bool = False
    compared: bool = False
    study: str = ""

    def make(self) -> Selector:
        """The selector."""
        return make_selector(self.selector, **self.options)


CASES = {
    "snapkv": Case("snapkv", compared=True, study="snapkv"),
    "critical_kv": Case("critical_kv", compared=True, study="critical_kv"),
    "key_difference": Case("key_difference", compared=True, study="key_difference"),
    "expected_attention": Case("expected_attention", whole=True, compared=True, study="expected_attention"),
    "lagkv": Case("lagkv", compared=True, study="lagkv"),
    "expected_attention.stream": Case("expected_attention", study="expected_attention"),
    "infinipot_v": Case("infinipot_v", pictures=True, study="infinipot_v"),
    "observed_attention": Case("observed_attention", study="observed_attention"),
    "sliding_window": Case("sliding_window", study="sliding_window"),
    "omnimem": Case("omnimem", study="omnimem"),
    "omnimem.rho": Case("omnimem", {"redundancy": "later_key"}, study="omnimem + rho"),
    "perturbation": Case("perturbation", study="perturbation + rho"),
    "perturbation.no_rho": Case("perturbation", {"redundancy": "none"}, study="perturbation"),
}


def candidates(case: Case, selector: Selector, layer: Layer, sizes: Sizes, number: int) -> Candidates:
    """The view of a layer that a stream would give this rule, queries and weights at hand as the model leaves them."""
    device, s = layer.keys.device, sizes.candidates
    row = torch.arange(s, device=device)
    positions = row[:, None].expand(s, 3)
    if case.pictures:
        rows, columns = FRAME
        positions = torch.stack([row // (rows * columns), row // columns % rows, row % columns], dim=-1)
    tokens = LayerMemory.from_chunk(
        layer.keys,
        layer.values,
        positions[None],
        torch.full((1, s), VISUAL, dtype=torch.int8, device=device),
        row.float()[None],
        row[None],
        layer.hidden if "hidden" in selector.needs else None,
    )
    n_chunk = s if case.whole else sizes.chunk
    asked = selector.probes().rows(n_chunk, device) + s - n_chunk
    needs = selector.needs
    gram = own_gram(layer.o_weight, sizes.kv_heads, sizes.heads) if "output_gram" in needs else None
    queries = (
        layer.queries(sizes)[:, :, asked] if len(asked) else layer.keys.new_zeros(1, sizes.heads, 0, sizes.head_dim)
    )
    return Candidates(
        tokens=LayerMemory.from_tensors(None if t is None else t.contiguous() for t in tokens.tensors()),
        n_memory=s - n_chunk,
        queries=queries.contiguous(),
        query_rows=asked,
        scaling=sizes.head_dim**-0.5,
        output_weight=layer.o_weight if "output_weight" in needs and gram is None else None,
        output_gram=gram,
        layer=number,
        n_layers=sizes.layers,
        rotary=Rotary(frequencies(sizes, device), torch.zeros(sizes.head_dim // 2, dtype=torch.int64, device=device)),
        known_text=0,
    )


def steps(case: Case, layers: list[Layer], sizes: Sizes) -> list[Callable[[], Tensor]]:
    """For each layer, the choice: (1, G, K) rows in stream order."""
    selector, allocation = case.make(), make_allocation("shared")

    def step(c: Candidates) -> Tensor:
        return choose(c, selector, allocation, sizes.budget)[0]

    return [partial(step, candidates(case, selector, layer, sizes, i)) for i, layer in enumerate(layers)]


def measured(side: Side, name: str, layers: list[Layer], sizes: Sizes, clock: Clock, reps: int) -> dict[str, Any]:
    """Times and kept sets of a case."""
    case = CASES[name]
    found, side.kept[name] = timed(clock, steps(case, layers, sizes), reps)
    if case.compared:
        exact = [layer.to(clock.device, torch.float32) for layer in layers[: sizes.exact_layers]]
        side.kept[f"{name}.float32"] = torch.stack([step()[0] for step in steps(case, exact, sizes)])
    clock.clean()
    return {"ms": found, "options": case.make().options()}


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--reps", type=int, default=10)
    given = parser.parse_args()
    device, sizes = torch.device(given.device), read_sizes(given.folder)
    if device.type == "cuda":
        kernels.install()
    layers = [read_layer(given.folder, i, device) for i in range(sizes.layers)]
    side = Side(versions(device) | {"kernels": " ".join(provided()) or "none"})
    for name in CASES:
        side.attempt(name, partial(measured, side, name, layers, sizes, Clock(device), given.reps))
    side.write(given.folder, "ours")


if __name__ == "__main__":
    main()
