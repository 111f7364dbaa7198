"""Timing, and the file of results: measure.py RESULTS.json MORE.json ... adds the rows of other files to the first."""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

GIB = 2**30


def versions(device: torch.device) -> dict[str, str]:
    """What the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "peft"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    found["cuda"] = str(torch.version.cuda)
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return found


Row = dict[str, Any]
COLUMNS = frozenset({"name", "value", "unit", "goal", "better", "spread", "versions", "note"})


def merged(rows: list[Row], more: list[Row]) -> list[Row]:
    """`rows` with `more` behind them; a row with the name of an earlier one takes that one's place in the file.

    Every row tells its own versions and device, so runs of several processes, days and machines can share a file; who
    makes a table of them checks that they belong together.

    Raises:
        ValueError: something that is no row of results.
    """
    for row in [*rows, *more]:
        if not isinstance(row, dict) or set(row) != COLUMNS:
            raise ValueError(f"not a row of results: {str(row)[:80]}")
    return list(({row["name"]: row for row in rows} | {row["name"]: row for row in more}).values())


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; none if it does not exist."""
    return merged([], json.loads(path.read_text())) if path.is_file() else []


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write a file of results as a whole: a process that is killed leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(rows, indent=1) + "\n")
    beside.replace(path)


@dataclass
class Results:
    """Measurements, written to `path` as they come: what a run that is cut off has measured is kept.

    A result of an earlier run with the same name is replaced, others stay, also those that another process has written
    to the file in the meantime.
    """

    path: Path
    versions: dict[str, str]
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows = read_rows(self.path)

    def add(
        self,
        name: str,
        value: float | None,
        unit: str,
        *,
        goal: float | None = None,
        better: str = "lower",
        spread: tuple[float, float] | None = None,
        note: str = "",
    ) -> None:
        """Record one number.

        Args:
            value: None if it could not be measured; `note` then says why.
            goal: what is aimed at, None for no goal.
            better: "lower" or "higher".
            spread: smallest and largest of the samples that `value` is the median of.
        """
        row = {
            "name": name,
            "value": value,
            "unit": unit,
            "goal": goal,
            "better": better,
            "spread": None if spread is None else list(spread),
            "versions": self.versions,
            "note": note,
        }
        self.rows = merged(read_rows(self.path), [row])
        write_rows(self.path, self.rows)
        print(line(row), flush=True)

    def value(self, name: str) -> float | None:
        """An earlier result, None if there is none."""
        return next((r["value"] for r in self.rows if r["name"] == name), None)

    def table(self) -> str:
        """All results, a line each."""
        return "\n".join(line(row) for row in self.rows)


def line(row: Row) -> str:
    """A result in one line."""
    value = "-" if row["value"] is None else f"{row['value']:.4g}"
    goal = "" if row["goal"] is None else f"goal {row['goal']:g}"
    spread = "" if row["spread"] is None else "[{:.4g}, {:.4g}]".format(*row["spread"])
    return f"{row['name']:<44} {value:>10} {row['unit']:<10} {goal:<10} {spread} {row['note']}".rstrip()


@dataclass
class Clock:
    """Measures on one device, until a time is up."""

    device: torch.device
    deadline: float = float("inf")

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.perf_counter()

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def once(self, run: Callable[[], object]) -> float:
        """Seconds `run` takes, from an idle device to an idle device."""
        self.synchronise()
        start = time.perf_counter()
        run()
        self.synchronise()
        return time.perf_counter() - start

    def samples(self, run: Callable[[], object], reps: int, expected_s: float = 0.0) -> list[float]:
        """Up to `reps` timings, one at least; no more are begun when the next would pass the deadline."""
        found: list[float] = []
        while len(found) < reps and (not found or self.left_s > max(expected_s, found[-1])):
            found.append(self.once(run))
        return found

    def peak_gib(self, run: Callable[[], object], reserved: bool = False) -> float:
        """Peak of device memory while `run` runs; 0 without a GPU. What is allocated, or with `reserved` all that is
        set aside: recorded launches have memory that is theirs without being allocated."""
        self.clean()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self.synchronise()
        if self.device.type != "cuda":
            return 0.0
        peak = torch.cuda.max_memory_reserved if reserved else torch.cuda.max_memory_allocated
        return peak(self.device) / GIB

    def clean(self) -> None:
        """Give back what is not held."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def median_and_spread(samples: list[float]) -> tuple[float, tuple[float, float]]:
    """Median, and smallest and largest."""
    return statistics.median(samples), (min(samples), max(samples))


def main() -> None:
    """Merge files, last one wins."""
    parser = argparse.ArgumentParser(description="Adds the rows of result files to the first; same names are replaced.")
    parser.add_argument("into", type=Path, help="results.json to add to")
    parser.add_argument("more", type=Path, nargs="+")
    given = parser.parse_args()
    missing = [str(path) for path in given.more if not path.is_file()]
    if missing:
        raise SystemExit(f"no such file: {', '.join(missing)}")
    rows = read_rows(given.into)
    for path in given.more:
        rows = merged(rows, read_rows(path))
    write_rows(given.into, rows)
    print(f"{given.into}: {len(rows)} rows")


if __name__ == "__main__":
    main()
