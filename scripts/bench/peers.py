"""Selection beside kvpress, in one run on the same tensors: peers.py [--tiny] [--out FOLDER] [--table]

Writes random layers of the 7B shape to files, lets two processes choose from them one after the other (peers_ours.py
here, peers_kvpress.py in the environment of kvpress), and puts times, and how far the kept sets agree, into
results.json. The table adds what each rule is worth in the recall study. `peers.sh` sets kvpress's environment up.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import Results, Row, median_and_spread, read_rows, write_rows
from peers_ours import CASES
from peers_tensors import SIZES, Side, write_layers
from torch import Tensor

from scripts.recall.load import load
from scripts.recall.results_scores import Scores, grid

HERE = Path(__file__).resolve().parent
STUDY = HERE.parent / "recall" / "results"
STUDY_BUDGETS = (74, 295)  # 3 and 12 % of the media tokens of a minute
SIDE_S = 240.0  # seconds after which a side is given up
NEEDS = "peers.sh needs kvpress 0.5.5 with a transformers it takes (before 5.3) in a folder of their own; see its head"


# The two sides -------------------------------------------------------------------------------------------------------


def run_side(name: str, python: str, path: str, given: argparse.Namespace, folder: Path) -> str:
    """Run peers_NAME.py with `path` as PYTHONPATH; what went wrong in words, "" if nothing did."""
    command = [python, str(HERE / f"peers_{name}.py"), str(folder), "--device", given.device, "--reps", str(given.reps)]
    try:
        done = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.PIPE, text=True, timeout=SIDE_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    sys.stderr.write(done.stderr)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def both_sides(given: argparse.Namespace, folder: Path) -> tuple[Side | None, Side | None, list[str]]:
    """What the sides hand back, and what failed."""
    start, device = time.perf_counter(), torch.device(given.device)
    dtype = getattr(torch, given.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    write_layers(folder, SIZES["tiny" if given.tiny else "qwen2.5-omni-7b"], device, dtype)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    print(f"tensors written, {time.perf_counter() - start:.0f} s", flush=True)
    found: list[Side | None] = []
    failed = []
    environments = {"ours": (sys.executable, str(HERE.parents[1])), "kvpress": (given.kvpress_python, given.site)}
    for name, (python, path) in environments.items():
        problem = run_side(name, python, path, given, folder)
        if problem:
            failed.append(f"{name} did not run: {problem}" + (f"\n{NEEDS}" if name == "kvpress" else ""))
        found.append(None if problem else Side.read(folder, name))
        print(f"{name} done, {time.perf_counter() - start:.0f} s", flush=True)
    return found[0], found[1], failed


# Results -------------------------------------------------------------------------------------------------------------


def shared(one: Tensor, other: Tensor) -> list[float]:
    """Share in % of the rows (layers, G, K) that two sides both keep, by layer and head.

    Raises:
        ValueError: sets of different sizes cannot be compared so.
    """
    if one.shape != other.shape:
        raise ValueError(f"kept sets of shapes {tuple(one.shape)} and {tuple(other.shape)}")
    size = int(torch.maximum(one.max(), other.max())) + 1

    def mask(rows: Tensor) -> Tensor:
        return torch.zeros(*rows.shape[:-1], size, dtype=torch.bool).scatter(-1, rows.long(), True)

    both = (mask(one) & mask(other)).sum(-1)
    return (100 * both / one.shape[-1]).flatten().tolist()


def different_options(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Options of theirs that ours does not share."""
    return [f"{k}={v} there, {ours.get(k)} here" for k, v in theirs.items() if k not in ours or ours[k] != v]


def record(results: Results, side: Side, keys: dict[str, str], notes: dict[str, str]) -> list[str]:
    """A row for each rule and list of times: `keys` maps a list to the end of a row's name. Gives back what failed."""
    failed = []
    for rule, found in side.rules.items():
        for key, end in keys.items():
            name = f"peers.{rule}.{end}"
            if key in found:
                value, spread = median_and_spread(found[key])
                results.add(name, value, "ms", spread=spread, note=notes.get(rule, ""))
            elif "error" in found:
                results.add(name, None, "failed", note=found["error"])
                failed.append(f"{name}: {found['error']}")
    return failed


def compare(results: Results, ours: Side, theirs: Side) -> list[str]:
    """Rows for each rule of both sides: what of the kept sets they share, and what of its own float32 set each still
    keeps when it rounds. Gives back what failed."""
    failed = []
    for rule in theirs.rules:
        exact = f"{rule}.float32"
        try:
            other = different_options(ours.rules[rule]["options"], theirs.rules[rule]["options"])
            if other:
                raise ValueError(f"options differ: {'; '.join(other)}")
            found = {
                "shared": shared(ours.kept[rule], theirs.kept[rule]),
                "shared_float32": shared(ours.kept[exact], theirs.kept[exact]),
                "rounded.ours": shared(ours.kept[rule][: len(ours.kept[exact])], ours.kept[exact]),
                "rounded.kvpress": shared(theirs.kept[rule][: len(theirs.kept[exact])], theirs.kept[exact]),
            }
        except (KeyError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            results.add(f"peers.{rule}.shared", None, "failed", note=reason)
            failed.append(f"peers.{rule}.shared: {reason}")
            continue
        for end, shares in found.items():
            mean, spread = sum(shares) / len(shares), (min(shares), max(shares))
            results.add(
                f"peers.{rule}.{end}", mean, "%", better="higher", spread=spread, note="mean over layers, heads"
            )
    return failed


def collect(path: Path, ours: Side | None, theirs: Side | None) -> list[str]:
    """All rows, in place of those of earlier runs, so that what is compared is of one run; gives back what failed."""
    write_rows(path, [row for row in read_rows(path) if not row["name"].startswith("peers.")])
    failed = []
    if ours is not None:
        kernels = f"kernels: {ours.about.pop('kernels')}"
        failed += record(Results(path, ours.about), ours, {"ms": "ours"}, dict.fromkeys(ours.rules, kernels))
    if theirs is not None:
        failed += record(Results(path, theirs.about), theirs, {"ms": "kvpress", "given_ms": "kvpress_given"}, {})
    if ours is not None and theirs is not None:
        about = ours.about | {"kvpress": theirs.about["kvpress"]}
        failed += compare(Results(path, about), ours, theirs)
    return failed


# The table -----------------------------------------------------------------------------------------------------------


def quality(folder: Path = STUDY) -> dict[str, list[float]]:
    """Accuracy in % in the recall study at `STUDY_BUDGETS`, by method, over both base models."""
    scores, cells = Scores(), grid(load(folder).conditions("main")).cells
    whole = {m: own for m, own in cells.items() if set(STUDY_BUDGETS) <= set(own)}
    return {m: [100 * scores.accuracy(own[b]).value for b in STUDY_BUDGETS] for m, own in whole.items()}


COLUMNS = {
    "ours, ms": ("ours",),
    "kvpress, ms": ("kvpress",),
    "kvpress given the queries, ms": ("kvpress_given",),
    "kept by both, %": ("shared",),
    "by both in float32, %": ("shared_float32",),
    "of its float32 set, ours / kvpress, %": ("rounded.ours", "rounded.kvpress"),
}


def table(rows: list[Row], worth: dict[str, list[float]]) -> str:
    """Markdown: each rule's times on both sides, what of the kept sets they share, and its accuracy beside them."""
    found = {row["name"]: row for row in rows}
    heads = ["rule", *COLUMNS, "recall at 3 %, %", "at 12 %, %"]
    lines = [" | ".join(["", *heads, ""]).strip(), "|" + "---|" * len(heads)]
    for rule, case in CASES.items():
        cells = [" / ".join(cell(found.get(f"peers.{rule}.{end}")) for end in ends) for ends in COLUMNS.values()]
        accuracy = [f"{x:.1f}" for x in worth.get(case.study, [])] or [""] * len(STUDY_BUDGETS)
        lines.append("| " + " | ".join([f"`{rule}`", *(c.strip(" /") for c in cells), *accuracy]) + " |")
    return "\n".join(lines)


def cell(row: Row | None) -> str:
    """A time with the shortest and longest beside it, or a share."""
    if row is None:
        return ""
    if row["value"] is None:
        return "failed"
    if row["unit"] == "%":
        return f"{row['value']:.1f}"
    return "{:.2f} [{:.2f}, {:.2f}]".format(row["value"], *row["spread"])


# The command ---------------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a small shape in seconds, for a look at the bench itself")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results.json")
    parser.add_argument(
        "--work", type=Path, help="where the tensors go for the run (4 GB), if not the temporary folder"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", default="", choices=["", "bfloat16", "float32"], help="unset: bfloat16 on a GPU, float32 elsewhere"
    )
    parser.add_argument("--reps", type=int, default=15, help="timings of a rule, each of all layers")
    parser.add_argument("--kvpress-python", default=sys.executable, help="python of kvpress's side")
    parser.add_argument("--site", default="", help="folder that holds kvpress and its transformers")
    parser.add_argument("--table", action="store_true", help="only show the table of what was measured before")
    return parser.parse_args()


def main() -> None:
    """Measure, then the table; exits with 1 if any part failed."""
    given, failed = arguments(), list[str]()
    path = given.out / "results.json"
    if not given.table:
        with tempfile.TemporaryDirectory(prefix="peers_", dir=given.work) as folder:
            ours, theirs, failed = both_sides(given, Path(folder))
        failed += collect(path, ours, theirs)
    for problem in failed:
        print("FAILED", problem)
    print("\n" + table(read_rows(path), quality()))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
