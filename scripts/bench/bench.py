"""Speed and memory of streaming on one device: bench.py [--cases a,b] [--budget-s 240] [--out FOLDER] [--tiny]

Runs the package's own code on the shape of a real model with random weights and random data. Timings are warm and
synchronised; a value is the median of several runs with the smallest and largest beside it. Results are written after
each case, so a run that is cut off keeps what it has measured.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from cases import LORA_CASES, STREAM_CASES, Bench, with_tokens
from layers import ADAPTED_LAYER_CASES, ADAPTED_PROFILE_CASES, LAYER_CASES
from long import LONG_CASES
from measure import Clock, Results, versions
from pieces import PIECE_CASES
from quantised import QUANTISED_CASES
from recorded import RECORDED_CASES
from selection import PROFILE_CASES, SELECTION_CASES
from shape import SHAPES
from timeline import TIMELINE_CASES

HERE = Path(__file__).resolve().parent
# Adapters stay on the model once they are on it, so the cases that need them come late. A profiler may go on slowing
# the launches of its process after it has stopped, so profiles come last.
CASES: dict[str, Callable[[Bench], None]] = (
    STREAM_CASES
    | PIECE_CASES
    | LAYER_CASES
    | SELECTION_CASES
    | ADAPTED_LAYER_CASES
    | RECORDED_CASES
    | LORA_CASES
    | QUANTISED_CASES
    | LONG_CASES
    | ADAPTED_PROFILE_CASES
    | PROFILE_CASES
    | TIMELINE_CASES
)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", default="all", help=f"comma-separated, of: {', '.join(CASES)}; or all")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="seconds after which no case is begun")
    parser.add_argument("--case-s", type=float, default=float("inf"), help="seconds one case plans to use at most")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results.json and the profiles")
    parser.add_argument("--shape", default="qwen2.5-omni-7b", choices=list(SHAPES))
    parser.add_argument("--tiny", action="store_true", help="a small shape in seconds, for a look at the bench itself")
    parser.add_argument("--tokens", type=int, default=0, help="length of the stream, if not the shape's")
    parser.add_argument("--reps", type=int, default=3, help="timed runs of a case")
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "split", "eager"], help="of the decoder")
    parser.add_argument("--graphs", action="store_true", help="record chunks that repeat and replay them")
    parser.add_argument(
        "--dtype", default="", choices=["", "bfloat16", "float32"], help="unset: bfloat16 on a GPU, float32 elsewhere"
    )
    parser.add_argument("--suffix", default="", help="put behind the names of results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def chosen(names: str) -> list[str]:
    """Names of the cases to run, in the order of `CASES`."""
    wanted = list(CASES) if names == "all" else [n.strip() for n in names.split(",") if n.strip()]
    unknown = sorted(set(wanted) - set(CASES))
    if unknown:
        raise SystemExit(f"unknown cases: {', '.join(unknown)}; known: {', '.join(CASES)}")
    return [name for name in CASES if name in wanted]


def main() -> None:
    """Run the cases one after the other; one that fails is noted and the rest go on. Exit code 1 if one failed."""
    args, start, failed = arguments(), time.perf_counter(), list[str]()
    names, end = chosen(args.cases), start + args.budget_s
    device = torch.device(args.device)
    shape = SHAPES["tiny" if args.tiny else args.shape]
    if device.type == "cpu" and shape is SHAPES["qwen2.5-omni-7b"]:
        raise SystemExit("no CUDA device: the 7B shape is measured on a GPU; --tiny shows the bench itself on a CPU")
    if args.tokens:
        shape = with_tokens(shape, args.tokens)
    results = Results(args.out / "results.json", versions(device))
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    bench = Bench(shape, device, dtype, results, Clock(device), args.reps, args.suffix, args.attention, args.graphs)
    for name in names:
        now = time.perf_counter()
        if now > end:
            print(f"no time left for {name}")
            continue
        bench.clock.deadline = min(end, now + args.case_s)
        print(f"-- {name}, {now - start:.0f} s", flush=True)
        try:
            CASES[name](bench)
        except Exception as error:  # the other cases are still worth having
            traceback.print_exc()
            failed.append(name)
            results.add(name + bench.suffix, None, "failed", note=f"{type(error).__name__}: {str(error)[:200]}")
        bench.clock.clean()
    print(f"\n{results.table()}\n{time.perf_counter() - start:.0f} s")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
