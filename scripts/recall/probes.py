"""How many of the chunk's queries a selector has to look at: kept tokens with few probes and with all queries agree.

    python -m scripts.recall.probes MODEL [--clips 8] [--budgets 49 148 615] [--out probes.json]

`perturbation` looks at some queries of a chunk, spread evenly. After each chunk of held-out clips of a minute the same
candidates, those of a stream that looks at all queries, are chosen among with fewer. The tokens that are kept both
ways, as a share of what is kept: mean over chunks, layers and heads, then over clips, with the lowest and the highest
clip. Four clips take three minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.streams import WorldStreams
from data_prep.world import WorldSettings
from omnimem_train import choosing
from omnimem_train.errors import UserError
from omnimem_train.memory.selector import Candidates, choose, make_selector
from omnimem_train.memory.spec import MemorySpec
from omnimem_train.models.loading import load_model
from scripts.recall.asking import Asker, clip_set
from scripts.recall.inside import final_state
from scripts.recall.jobs import SetSpec
from scripts.recall.methods import CHUNK

COUNTS = (4, 8, 16, 32, 64, 128)


@contextmanager
def compared(counts: tuple[int, ...], options: dict[str, Any]) -> Iterator[dict[int, list[Tensor]]]:
    """Inside, every choice is also made with fewer probes; gives the agreement of each count, choice by choice, each
    (clips,)."""
    found: dict[int, list[Tensor]] = {count: [] for count in counts}

    def both(c: Candidates, selector: Any, allocation: Any, budget: int) -> Any:
        rows, scored = choose(c, selector, allocation, budget)
        if rows.shape[-1] < c.n:
            best = c.media_among(rows)
            for count in counts:
                probed = make_selector("perturbation", n_probes=count, **options)
                asked = probed.probes().rows(c.queries.shape[2], c.queries.device)
                same = c.media_among(choose(c.asked_by(asked), probed, allocation, budget)[0]) & best
                found[count].append(same.flatten(1).sum(1) / best.flatten(1).sum(1))
        return rows, scored

    before = choosing.choose
    choosing.choose = both
    try:
        yield found
    finally:
        choosing.choose = before


def agreement(asker: Asker, budget: int, redundancy: str) -> dict[int, list[float]]:
    """Share of the kept tokens by number of probes: mean over clips, lowest, highest."""
    options = {"redundancy": redundancy}
    spec = MemorySpec("perturbation", {"n_probes": 0} | options, budget=budget, chunk_tokens=CHUNK)
    with compared(COUNTS, options) as found:
        final_state(asker, spec, asker.clips.media)
    if not found[COUNTS[0]]:
        raise UserError(
            f"no chunk of these clips has more than {budget} tokens to choose among", remedy="lower --budgets"
        )
    by_clip = {count: torch.stack(shares).mean(0) for count, shares in found.items()}
    return {count: [float(x) for x in (c.mean(), c.min(), c.max())] for count, c in by_clip.items()}


def main() -> int:
    """Print a table, and write it if asked to; 2 after an error of the user's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--budgets", type=int, nargs="+", default=[49, 148, 615])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    try:
        rows = measured(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.out is not None:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each budget, with redundancy and without."""
    if args.clips < 1:
        raise UserError(f"--clips {args.clips}", remedy="give at least one")
    streams = WorldStreams(load_model(args.model, dtype=args.dtype, device=args.device), WorldSettings().size)
    asker = Asker(streams, clip_set(streams, SetSpec("test", args.clips, 0).clips(), 0))
    rows = []
    print(f"kept as with all {CHUNK} queries of a chunk, % [lowest, highest clip], by number of probes")
    print(f"{'budget':>8} {'redundancy':>12} " + " ".join(f"{count:>18}" for count in COUNTS))
    for redundancy in ("none", "later_key"):
        for budget in args.budgets:
            found = agreement(asker, budget, redundancy)
            shares = " ".join("{:5.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in f)) for f in found.values())
            print(f"{budget:>8} {redundancy:>12} {shares}", flush=True)
            rows.append({"budget": budget, "redundancy": redundancy, "agreement": found})
    return rows


if __name__ == "__main__":
    sys.exit(main())
