"""The bench runs on the CPU at a small shape, writes as it goes, and survives a case that fails."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "scripts" / "bench" / "bench.py"
KEYS = {"name", "value", "unit", "goal", "better", "spread", "versions", "note"}


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH), "--tiny", "--device", "cpu", "--reps", "1", "--out", str(out), *options]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


@pytest.mark.slow
def test_every_case_runs(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "results.json").read_text())
    assert all(set(row) == KEYS for row in rows)
    assert not [row for row in rows if row["unit"] == "failed"]
    free = ("share.", "step_third.difference")  # may be 0 or below
    assert all(row["value"] > 0 for row in rows if not row["name"].startswith(free) and row["value"] is not None)
    names = {row["name"] for row in rows}
    assert len(names) == len(rows)
    assert {"peak.bf16_matmul", "prefill.perturbation", "prefill.full", "ask.first_token", "lora.all"} <= names
    assert {"share.perturbation", "utilisation.lora.all", "gain.lora.all", "select.perturbation"} <= names
    assert "self_cpu" in (tmp_path / "profile_perturbation.txt").read_text().lower().replace(" ", "_")


@pytest.mark.slow
def test_a_run_adds_to_what_was_measured(tmp_path: Path) -> None:
    """One case at a time; a second run replaces results of the same name alone; without time, nothing is begun."""
    assert run(tmp_path, "--cases", "peak").returncode == 0
    first = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in first] == ["peak.bf16_matmul"]
    done = run(tmp_path, "--cases", "peak,prefill_sliding_window", "--suffix", ".again", "--case-s", "0")
    assert done.returncode == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "results.json").read_text())}
    assert rows["prefill.sliding_window.again"]["note"].startswith("extrapolated")
    assert "no time left for peak" in run(tmp_path, "--budget-s", "0").stdout
    assert "unknown cases: pek" in run(tmp_path, "--cases", "pek").stderr


def test_no_gpu_is_said() -> None:
    command = [sys.executable, str(BENCH), "--device", "cpu", "--cases", "peak"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr and "Traceback" not in done.stderr


def test_a_cap_counts_what_lies_outside_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 80 GiB, 5 are taken and 4 of them by torch: 1 lies outside, so 23 are left of 24; afterwards all again."""
    monkeypatch.syspath_prepend(str(BENCH.parent))
    quantised: Any = importlib.import_module("quantised")
    shares: list[float] = []
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (75 * gib, 80 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 4 * gib)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _: shares.append(share))
    with quantised.capped(torch.device("cuda"), 24.0):
        assert shares == [23 / 80]
    assert shares == [23 / 80, 1.0]


def bench_module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "scripts" / "bench" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def bench_table() -> Any:
    return bench_module("table")


def test_two_processes_write_into_one_file(tmp_path: Path) -> None:
    """Each keeps what the other has written since it looked."""
    measure, path = bench_module("measure"), tmp_path / "new" / "results.json"
    one, other = (measure.Results(path, {"device": name}) for name in ("one", "other"))
    one.add("first", 1.0, "s")
    other.add("second", 2.0, "s")
    one.add("third", 3.0, "s", spread=(2.0, 4.0))
    other.add("first", 5.0, "ms")
    found = {row["name"]: (row["value"], row["versions"]["device"]) for row in json.loads(path.read_text())}
    assert found == {"first": (5.0, "other"), "second": (2.0, "other"), "third": (3.0, "one")}
    assert one.value("first") == 1.0 and other.value("third") == 3.0
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_files_of_results_are_merged(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("results.json", "two.json", "three.json")]
    measure = bench_module("measure")
    for path, names in zip(paths, (["a", "b"], ["b", "c"], ["c"]), strict=True):
        results = measure.Results(path, {"device": path.stem})
        for name in names:
            results.add(name, 1.0, "s")
    command = [sys.executable, str(BENCH.with_name("measure.py")), *map(str, paths)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.endswith("3 rows\n")
    found = [(row["name"], row["versions"]["device"]) for row in json.loads(paths[0].read_text())]
    assert found == [("a", "results"), ("b", "two"), ("c", "three")]
    before = paths[0].read_text()
    paths[1].write_text('[{"name": "no row"}]')
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "not a row of results" in done.stderr
    paths[1].unlink()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "no such file" in done.stderr and "two.json" in done.stderr
    assert paths[0].read_text() == before


def test_the_readme_shows_the_results_as_they_are() -> None:
    made, readme = bench_table(), (ROOT / "README.md").read_text()
    results = json.loads((ROOT / "scripts" / "bench" / "results.json").read_text())
    assert made.written(readme, made.table(results)) == readme


def test_a_table_says_what_was_missed_and_is_of_one_machine() -> None:
    made, about = bench_table(), dict.fromkeys(("torch", "cuda", "triton", "transformers", "peft", "python"), "1")
    row = {"unit": "s", "goal": 2.0, "better": "lower", "spread": [1.0, 3.0], "versions": about | {"device": "one"}}
    slow, quick = (
        {"name": "lora.all.graphs", "value": 2.5} | row,
        {"name": "ask.first_token.graphs", "value": 1.5} | row,
    )
    text = made.table([slow, quick, {"name": "another", "value": 1.0} | row])
    assert "2.5 s [1, 3] | 2 s: **missed** |" in text and "1.5 s [1, 3] | 2 s: met |" in text
    assert "another" not in text and text.index("ask") < text.index("LoRA")
    with pytest.raises(ValueError, match="2 machines"):
        made.table([slow, quick | {"versions": about | {"device": "other"}}])
