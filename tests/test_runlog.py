"""Metrics: arithmetic of the meter, no sync between logs, and files that survive a crash and a resume."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from omnimem_train.errors import UserError
from omnimem_train.runlog import Meter, RunLog, console_line, peak_gib, read_metrics


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Watched(Tensor):
    """A tensor that notes every function which brings its value to the host."""

    synced: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name in ("item", "tolist", "__float__", "__int__", "__bool__", "numpy", "cpu", "__index__", "__format__"):
            cls.synced.append(name)
        return super().__torch_function__(func, types, args, kwargs or {})


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


# Meter ----------------------------------------------------------------------------------------------------------------


def test_means_rates_and_waiting() -> None:
    clock = Clock()
    meter = Meter(clock=clock)
    meter.mean("loss", torch.tensor([2.0]), weight=3)
    meter.mean("loss", 6.0, weight=torch.tensor(1))
    meter.mean("lr", 0.5)
    meter.count("tokens", 1000)
    meter.count("tokens", torch.tensor(500))
    clock.now_s += 3
    with meter.waiting():
        clock.now_s += 1
    row = meter.read()
    assert row.pop("peak_gib") == pytest.approx(peak_gib(torch.device("cpu")), rel=0.5)
    assert row == {"loss": 3.0, "lr": 0.5, "tokens_per_s": 375.0, "wait_share": 0.25}


def test_a_read_begins_a_new_window() -> None:
    clock = Clock()
    meter = Meter(clock=clock)
    meter.mean("loss", 5.0)
    meter.count("tokens", 5)
    with meter.waiting():
        clock.now_s += 5
    meter.read()
    meter.mean("loss", 1.0)
    clock.now_s += 2
    row = meter.read()
    assert (row["loss"], row["wait_share"]) == (1.0, 0.0)
    assert "tokens_per_s" not in row


def test_paused_time_belongs_to_no_window() -> None:
    clock = Clock()
    meter = Meter(clock=clock)
    meter.count("tokens", 100)
    clock.now_s += 4
    with meter.paused():
        clock.now_s += 1000
    assert meter.read()["tokens_per_s"] == 25.0


def test_waiting_counts_when_the_data_raises() -> None:
    clock = Clock()
    meter = Meter(clock=clock)

    def late_end() -> None:
        with meter.waiting():
            clock.now_s += 2
            raise StopIteration

    with pytest.raises(StopIteration):
        late_end()
    clock.now_s += 2
    assert meter.read()["wait_share"] == 0.5


def test_reduce_over_ranks() -> None:
    """Two ranks: means weighted over both, tokens of both, seconds of one."""
    clock = Clock()
    meter = Meter(clock=clock)
    meter.mean("loss", 2.0, weight=1)
    meter.count("tokens", 100)
    with meter.waiting():
        clock.now_s += 2
    clock.now_s += 2
    other = torch.tensor([8.0 * 3, 3.0, 300.0, 0.0, 6.0, 1.0])  # loss sum, weight, tokens, waited, window, ranks
    row = meter.read(lambda own: own + other)
    assert row["loss"] == pytest.approx((2 + 24) / 4)
    assert row["tokens_per_s"] == pytest.approx(400 / 5)
    assert row["wait_share"] == pytest.approx(2 / 10)


def test_steps_that_do_not_log_do_not_sync() -> None:
    Watched.synced.clear()
    meter = Meter()
    for _ in range(3):
        loss = torch.ones(()).as_subclass(Watched)
        meter.mean("loss", loss, weight=torch.tensor(2.0).as_subclass(Watched))
        meter.count("tokens", torch.tensor(3).as_subclass(Watched))
    assert Watched.synced == []
    assert meter.read()["loss"] == 1.0
    assert Watched.synced != [], "the watch sees nothing"


def test_meter_keeps_no_graph_and_sums_in_float64() -> None:
    meter = Meter()
    loss = torch.tensor(1.0, requires_grad=True) * 2
    meter.mean("loss", loss)
    assert not meter._sums["loss"].requires_grad  # type: ignore[union-attr]
    meter.count("tokens", torch.tensor(2.0**24))
    for _ in range(4):
        meter.count("tokens", torch.tensor(1.0))  # lost in float32
    assert float(meter._counts["tokens"]) == 2**24 + 4


def test_zero_weight_is_not_a_number_and_vectors_are_refused() -> None:
    meter = Meter()
    meter.mean("loss", 0.0, weight=0)
    assert math.isnan(meter.read()["loss"])
    with pytest.raises(AssertionError, match="one number"):
        meter.mean("loss", torch.zeros(2))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to compare with")
def test_peak_gib_on_cpu_is_the_largest_resident_set() -> None:
    (kib,) = (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    assert peak_gib(torch.device("cpu")) == pytest.approx(int(kib) / 2**20, rel=0.05)


# RunLog ---------------------------------------------------------------------------------------------------------------


def test_writes_json_lines_tensorboard_and_console(tmp_path: Path) -> None:
    lines: list[str] = []
    with RunLog(tmp_path, total_steps=100, console=lines.append) as log:
        log.log(5, {"loss": torch.tensor(2.5), "loss_by_budget/64-127": 2.25, "budget": 96})
        on_disk = (tmp_path / "metrics.jsonl").read_text()  # flushed before the log is closed
        log.log(10, {"loss": 1.5, "budget": 64.0})
    first = json.loads(on_disk)
    assert first.pop("time_s") >= 0
    assert first == {"step": 5, "loss": 2.5, "loss_by_budget/64-127": 2.25, "budget": 96.0}
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [5, 10]
    assert scalars(tmp_path) == {
        "loss": [(5, 2.5), (10, 1.5)],
        "budget": [(5, 96.0), (10, 64.0)],
        "loss_by_budget/64-127": [(5, 2.25)],
    }
    assert lines[0] == "step      5/100  loss  2.5000  budget     96  64-127 2.250"
    assert lines[1] == "step     10/100  loss  1.5000  budget     64"


def test_only_rank_0_writes(tmp_path: Path) -> None:
    lines: list[str] = []
    with RunLog(tmp_path / "run", rank=1, console=lines.append) as log:
        log.log(1, {"loss": 1.0})
        log.note("x")
        log.derived("steps", 3, "y")
    assert lines == []
    assert not (tmp_path / "run").exists()


def test_non_finite_numbers_are_valid_json_and_come_back(tmp_path: Path) -> None:
    with RunLog(tmp_path, console=lambda _: None) as log:
        log.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(row["a"])
    assert (row["b"], row["c"], row["d"]) == (math.inf, -math.inf, 1.0)


def test_resume_cuts_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    with RunLog(tmp_path, console=lambda _: None) as log:
        for step in (10, 20, 30, 40):
            log.log(step, {"loss": float(step), "x": math.nan})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 50, "lo')  # the crash
    with RunLog(tmp_path, resumed_at=20, console=lambda _: None) as log:
        log.log(30, {"loss": 3.0})
    rows = read_metrics(path)
    assert [(row["step"], row["loss"]) for row in rows] == [(10, 10.0), (20, 20.0), (30, 3.0)]
    assert math.isnan(rows[1]["x"])
    assert scalars(tmp_path)["loss"] == [(10, 10.0), (20, 20.0), (30, 3.0)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_time_goes_on_after_a_resume(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time_s": 1000.0}\n{"step": 2, "time_s": 9000.0}\n')
    with RunLog(tmp_path, resumed_at=1, console=lambda _: None) as log:
        log.log(2, {})
    assert 1000 <= read_metrics(tmp_path / "metrics.jsonl")[-1]["time_s"] < 1100


def test_resume_before_anything_was_logged(tmp_path: Path) -> None:
    with RunLog(tmp_path, resumed_at=0, console=lambda _: None) as log:
        log.log(1, {"loss": 1.0})
    time.sleep(
        1.01
    )  # event files are read in the order of their names: the second, then a count that is no fixed width
    with RunLog(tmp_path, resumed_at=0, console=lambda _: None) as log:
        log.log(1, {"loss": 2.0})
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [2.0]
    assert scalars(tmp_path)["loss"] == [(1, 2.0)]


def test_a_new_run_is_not_mixed_with_an_old_one(tmp_path: Path) -> None:
    with RunLog(tmp_path, console=lambda _: None) as log:
        log.log(1, {"loss": 1.0})
    with pytest.raises(UserError, match="already holds the metrics"):
        RunLog(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    RunLog(tmp_path, console=lambda _: None).close()


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', '{"step": 1, "loss": "high"}', "3"])
def test_a_damaged_line_is_named_unless_it_is_the_last(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        RunLog(tmp_path, resumed_at=3)
    path.write_text(f'{{"step": 1}}\n{line}')
    assert read_metrics(path) == [{"step": 1}]
    with pytest.raises(UserError, match="cannot read"):
        read_metrics(tmp_path / "none.jsonl")


def test_console_columns_keep_their_width() -> None:
    row = {"loss": 2.0, "lr": 1e-4, "tokens_per_s": 12345.6, "wait_share": 0.034, "peak_gib": 1.5, "other": 3.0}
    line = console_line(3, 1000, row)
    assert line == "step      3/1000  loss  2.0000  lr 1.00e-04  tok/s    12,346  wait   3%  peak GiB   1.50"
    later = row | {"loss": 10.5, "tokens_per_s": 7.0, "wait_share": 1.0, "peak_gib": 111.25}
    assert len(console_line(999, 1000, later)) == len(line)
    assert console_line(3, None, {}) == "step      3"


def test_derived_numbers_say_where_they_come_from(tmp_path: Path) -> None:
    lines: list[str] = []
    with RunLog(tmp_path, console=lines.append) as log:
        log.derived("steps", 1200, "2,400 clips x 2 epochs / 4")
        log.derived("tokens a step", 8192.5, "4 clips x 2,048")
        log.note("hello")
    assert lines == [
        "steps                               1,200  = 2,400 clips x 2 epochs / 4",
        "tokens a step                        8192  = 4 clips x 2,048",
        "hello",
    ]
