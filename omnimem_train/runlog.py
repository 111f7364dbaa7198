"""What a run reports: `metrics.jsonl`, TensorBoard scalars and console lines, written by rank 0 alone.

A run folder holds

    metrics.jsonl      one JSON object a line: {"step": 20, "time_s": 31.4, "loss": 2.31, ...}; time_s goes on
                       where the resumed run stood
    tensorboard/       the same numbers as scalars
    run.lock           while the run goes on: who it is (see `omnimem_train.runlock`)

Steps that do not log cost no host sync: `Meter` adds tensors up where they are and converts them when it is read.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnimem_train.errors import UserError

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

# column on the console: metric, label, format
COLUMNS = (
    ("loss", "loss", "{:7.4f}"),
    ("budget", "budget", "{:6.0f}"),
    ("lr", "lr", "{:.2e}"),
    ("grad_norm", "grad", "{:7.3f}"),
    ("tokens_per_s", "tok/s", "{:9,.0f}"),
    ("wait_share", "wait", "{:4.0%}"),
    ("peak_gib", "peak GiB", "{:6.2f}"),
)


class Meter:
    """Means, rates and shares over the steps since it was last read.

    Args:
        device: where the numbers live: on which sums are kept in `read`, and whose peak memory is reported.
        clock: seconds; for tests.
    """

    def __init__(self, device: torch.device | str = "cpu", clock: Callable[[], float] = time.perf_counter) -> None:
        self.device = torch.device(device)
        self.clock = clock
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._weights: dict[str, Tensor | float] = {}
        self._counts: dict[str, Tensor | float] = {}
        self._waited_s = 0.0
        self._start_s = self.clock()

    def mean(self, name: str, value: Tensor | float, weight: Tensor | float = 1.0) -> None:
        """Add `value` (a number or a tensor of one element) to the weighted mean `name`. Does not sync."""
        value, weight = _detached(value), _detached(weight)
        self._sums[name] = self._sums.get(name, 0.0) + value * weight
        self._weights[name] = self._weights.get(name, 0.0) + weight

    def count(self, name: str, n: Tensor | float) -> None:
        """Add `n` to what is read as `{name}_per_s`. Does not sync."""
        self._counts[name] = self._counts.get(name, 0.0) + _detached(n)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent inside counts as waiting for data."""
        start_s = self.clock()
        try:
            yield
        finally:
            self.waited(self.clock() - start_s)

    def waited(self, seconds: float) -> None:
        """Count `seconds` measured elsewhere as waiting for data."""
        self._waited_s += seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside (evaluation, say) belongs to no window."""
        start_s = self.clock()
        try:
            yield
        finally:
            self._start_s += self.clock() - start_s

    def read(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """All numbers since the last read, and begin anew.

        Args:
            reduce: sums a float64 vector over ranks. All ranks must then have used the same names.

        Returns:
            each mean (over all ranks); `{count}_per_s` (all ranks together, per second of the window);
            `wait_share` in [0, 1] (mean over ranks); `peak_gib` (this rank, see `peak_gib`).
        """
        means, counts = sorted(self._sums), sorted(self._counts)
        columns = [self._sums[k] for k in means] + [self._weights[k] for k in means] + [self._counts[k] for k in counts]
        sums = _stack([*columns, self._waited_s], self.device)
        # the first conversion waits for the device, so the window ends when its work is done
        own = sums.tolist()
        window_s = max(self.clock() - self._start_s, 1e-9)
        sums = torch.tensor([*own, window_s, 1.0], dtype=sums.dtype, device=self.device)
        *totals, waited_s, windows_s, ranks = (sums if reduce is None else reduce(sums)).tolist()
        n = len(means)
        row = {k: _ratio(totals[i], totals[n + i]) for i, k in enumerate(means)}
        row |= {f"{k}_per_s": totals[2 * n + i] * ranks / windows_s for i, k in enumerate(counts)}
        row |= {"wait_share": waited_s / windows_s, "peak_gib": peak_gib(self.device)}
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._reset()
        return row


def peak_gib(device: torch.device) -> float:
    """GiB (2^30 bytes). On CUDA the most that tensors took since the last read of a `Meter`; elsewhere the largest
    resident set of this process since it began, which never falls."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # getrusage counts bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class RunLog:
    """Writes the numbers of a run. On other ranks than 0 every method does nothing.

    Args:
        folder: of the run; made if missing.
        rank: of this process.
        total_steps: for the console; None where unknown.
        resumed_at: the step of the checkpoint a resumed run starts from; None for a new run. What was logged after
            that step is cut from `metrics.jsonl` and hidden in TensorBoard.
        console: takes a line of text.

    Raises:
        UserError: a new run in a folder that holds the metrics of another.
    """

    def __init__(
        self,
        folder: str | Path,
        rank: int = 0,
        *,
        total_steps: int | None = None,
        resumed_at: int | None = None,
        console: Callable[[str], None] = lambda line: print(line, flush=True),
    ) -> None:
        self.folder = Path(folder)
        self.total_steps = total_steps
        self.active = rank == 0
        self._console = console
        self._start_s = time.perf_counter()
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter  # here because it takes a second to import

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.jsonl"
        if resumed_at is not None:
            self._start_s -= _cut_after(path, resumed_at)
        elif path.exists() and path.stat().st_size:
            raise UserError(
                f"{self.folder} already holds the metrics of a run",
                cause="a new run would be mixed with it",
                remedy="resume it, or choose another folder",
            )
        self._file = path.open("a", encoding="utf-8")
        purge = None if resumed_at is None else resumed_at + 1
        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=purge)

    def log(self, step: int, row: Mapping[str, float | Tensor]) -> None:
        """Write the metrics of `step` everywhere. "loss_by_budget/64-127" is grouped at its slash in TensorBoard."""
        if not self.active:
            return
        numbers = {name: float(value) for name, value in row.items()}
        assert not {"step", "time_s"} & set(row), "step and time_s are written by the log itself"
        content = {"step": step, "time_s": round(time.perf_counter() - self._start_s, 3)} | numbers
        self._file.write(json.dumps({k: _json_number(v) for k, v in content.items()}, allow_nan=False) + "\n")
        self._file.flush()
        for name, number in numbers.items():
            self._board.add_scalar(name, number, step)
        self._console(console_line(step, self.total_steps, numbers))

    def note(self, text: str) -> None:
        """A line for the console."""
        if self.active:
            self._console(text)

    def derived(self, name: str, value: object, source: str) -> None:
        """A number that follows from others, and how: `steps            1,200  = 2,400 samples x 2 epochs / 4`."""
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
        self.note(f"{name:<28} {shown:>12}  = {source}")

    def close(self) -> None:
        """Flush and close the files."""
        if self.active:
            self._file.close()
            self._board.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def console_line(step: int, total_steps: int | None, row: Mapping[str, float]) -> str:
    """The metrics of `COLUMNS` that `row` has, aligned, then the loss of each budget band."""
    of = f"/{total_steps}" if total_steps is not None else ""
    parts = [f"step {step:>{max(len(of) - 1, 6)}}{of}"]
    parts += [f"{label} {pattern.format(row[name])}" for name, label, pattern in COLUMNS if name in row]
    bands = {name.split("/", 1)[1]: value for name, value in row.items() if name.startswith("loss_by_budget/")}
    parts += [f"{band} {value:.3f}" for band, value in bands.items()]
    return "  ".join(parts)


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`, non-finite numbers restored. A last line cut short by a crash is left out.

    Raises:
        UserError: the file cannot be read, or another line is no metrics.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}", cause=str(error)) from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({k: NON_FINITE[v] if isinstance(v, str) else v for k, v in row.items()} | {"step": row["step"]})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            if number == len(lines):
                break
            raise UserError(
                f"{path}:{number} is not a line of metrics: {line!r:.60}", cause=repr(error), remedy="remove that line"
            ) from error
    return rows


def _cut_after(path: Path, step: int) -> float:
    """Keep the lines of `path` up to `step`; returns the `time_s` of the last one, or 0.

    Written aside and renamed, so a crash leaves the old file or the new one.
    """
    if not path.exists():
        return 0.0
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    lines = [json.dumps({k: _json_number(v) for k, v in row.items()}, allow_nan=False) + "\n" for row in kept]
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(lines), encoding="utf-8")
    os.replace(aside, path)
    return kept[-1].get("time_s", 0.0) if kept else 0.0


def _json_number(value: float) -> float | str:
    """JSON has no NaN and no infinity: they become the strings that `read_metrics` knows."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _detached(value: Tensor | float) -> Any:
    if isinstance(value, Tensor):
        assert value.numel() == 1, f"a metric is one number, not a tensor of shape {tuple(value.shape)}"
        return value.detach().reshape(()).double()
    return value


def _stack(values: list[Tensor | float], device: torch.device) -> Tensor:
    """Numbers and tensors of one element as one float64 vector on `device`."""
    return torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in values])


def _ratio(total: float, weight: float) -> float:
    return total / weight if weight else math.nan
