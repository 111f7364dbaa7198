"""Training as users run it: processes started from the command line, on real clips and a real (nano) model."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from omnimem_train.budget_sampling import BudgetSampling, Draw
from omnimem_train.checkpoint import checkpoints, read_meta, step_of
from omnimem_train.cli import main
from omnimem_train.config import load_config
from omnimem_train.data import DataConfig
from omnimem_train.errors import UserError
from omnimem_train.export import export_adapter
from omnimem_train.gradient import Gradient
from omnimem_train.losses import LossConfig
from omnimem_train.memory.spec import MemorySpec
from omnimem_train.models.loading import ModelConfig, load_model
from omnimem_train.models.lora import LoraSettings
from omnimem_train.models.tiny import make_tiny
from omnimem_train.run_config import RunConfig, TrainConfig
from omnimem_train.runlock import run_lock
from omnimem_train.runlog import read_metrics
from omnimem_train.session import model_fingerprint
from omnimem_train.trainer import check_finite, train

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight clips of 4 s with questions."""
    out = tmp_path_factory.mktemp("world")
    command = [sys.executable, "-m", "data_prep.render", str(out), "--clips", "8", "--seconds", "6", "--seed", "5"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return out


@pytest.fixture(scope="session")
def recipe(world: Path, nano_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for a run of four steps."""
    path = tmp_path_factory.mktemp("recipe") / "nano.yaml"
    path.write_text(
        f"""
model: {{path: {nano_folder}, device: cpu}}
lora: {{r: 4, alpha: 8, dropout: 0.05}}
data: {{manifest: {world / "train.json"}, fps: 2, workers: 1}}
memory: {{selector: perturbation, budget: 24, chunk_tokens: 48}}
budgets: {{kind: log_uniform, low: 8, high: 64, full_share: 0.25, chunk_jitter: 0.25}}
train: {{steps: 4, lr: 3e-3, warmup_steps: 1, accumulation: 2, log_every: 1, save_every: 2, keep: 4}}
"""
    )
    return path


def command(recipe: Path, output: Path, *overrides: str, processes: int = 1, **env: str) -> dict[str, Any]:
    """Arguments of `subprocess` for `omnimem train` in `processes` processes on the CPU."""
    words = [sys.executable, "-m"]
    if processes > 1:
        # standalone: a free port of its own, so that tests running side by side do not meet
        words += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    words += ["omnimem_train", "train", str(recipe), f"train.output={output}", *overrides]
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    if "DS_ACCELERATOR" in env:  # DeepSpeed compiles a small extension once, with the ninja beside this Python
        quiet["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    else:
        quiet["ACCELERATE_USE_CPU"] = "true"
    return {"args": words, "env": os.environ | quiet | env, "cwd": ROOT}


def launch(
    recipe: Path, output: Path, *overrides: str, processes: int = 1, **env: str
) -> subprocess.CompletedProcess[str]:
    """`omnimem train`, to its end."""
    what = command(recipe, output, *overrides, processes=processes, **env)
    return subprocess.run(**what, capture_output=True, text=True, timeout=500)


def run(recipe: Path, output: Path, *overrides: str, **more: Any) -> Path:
    done = launch(recipe, output, *overrides, **more)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return output


def adapter(output: Path, step: int = 4) -> dict[str, torch.Tensor]:
    return load_file(output / "checkpoints" / f"step-{step:08d}" / "adapter.safetensors")


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


@pytest.fixture(scope="session")
def one(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that the others are compared with: one process, two clips a step, no dropout."""
    return run(recipe, tmp_path_factory.mktemp("one"), "lora.dropout=0")


def test_a_run_writes_what_it_promises(one: Path) -> None:
    rows = read_metrics(one / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    wanted = {"loss", "budget", "lr", "grad_norm", "tokens_per_s", "wait_share", "peak_gib"}
    for row in rows:
        assert wanted <= row.keys()
        assert any(k.startswith("loss_by_budget/") for k in row)
        assert 0 < row["kept_share/visual"] <= 1
        assert 0 < row["kept_share/audio"] <= 1
        assert row["grad_norm"] > 0
    assert [p.name for p in checkpoints(one / "checkpoints")] == ["step-00000002", "step-00000004"]
    assert list((one / "tensorboard").iterdir())
    resolved = load_config(RunConfig, one / "config.yaml")
    assert resolved.budgets.low == 8
    moved = adapter(one)
    assert all(bool(x.any()) for k, x in moved.items() if "lora_B" in k), "a B matrix was never trained"


def test_a_resumed_run_is_bit_equal(recipe: Path, tmp_path: Path) -> None:
    """With dropout, so that random states matter."""
    whole = run(recipe, tmp_path / "whole")
    resumed = run(recipe, tmp_path / "resumed", f"train.resume={whole / 'checkpoints' / 'step-00000002'}")
    assert largest_difference(adapter(whole), adapter(resumed)) == 0
    then, now = read_metrics(whole / "metrics.jsonl"), read_metrics(resumed / "metrics.jsonl")
    assert [row["step"] for row in now] == [3, 4]
    for a, b in zip(then[2:], now, strict=True):
        for key in ("loss", "grad_norm", "budget", "chunk_tokens"):
            assert a[key] == b[key]
    # auto: the run has nothing left to do, and says so by ending at once with the same checkpoint
    again = run(recipe, whole, "train.resume=auto")
    assert largest_difference(adapter(again), adapter(resumed)) == 0


def test_another_run_does_not_resume(recipe: Path, one: Path, tmp_path: Path) -> None:
    done = launch(recipe, tmp_path, "lora.dropout=0", "memory.chunk_tokens=32", f"train.resume={one / 'checkpoints'}")
    assert done.returncode == 2
    assert "chunk_tokens: 48 in the checkpoint, 32 now" in done.stderr


def test_two_runs_do_not_share_a_folder(recipe: Path, tmp_path: Path) -> None:
    """The second is told who the first is. Once that is killed, the folder is free, and its run can go on."""
    options = ("train.steps=5000", "train.save_every=1", "train.resume=auto", "train.keep=1")

    @contextmanager
    def running() -> Iterator[subprocess.Popen[bytes]]:
        """Inside, a run goes on that has made a step."""
        before = last_step(tmp_path)
        process = subprocess.Popen(**command(recipe, tmp_path, *options), stdout=subprocess.DEVNULL)
        try:
            until = time.monotonic() + 200
            while last_step(tmp_path) == before and process.poll() is None and time.monotonic() < until:
                time.sleep(0.1)
            assert last_step(tmp_path) > before
            yield process
        finally:
            process.kill()
            process.wait()

    with running() as first:
        second = launch(recipe, tmp_path, *options)
        assert second.returncode == 2
        assert f"{tmp_path} is in use by another run, process {first.pid} on" in second.stderr
        assert first.poll() is None
    with running():
        pass
    steps = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))


def last_step(output: Path) -> int:
    """The last step that a run has saved, 0 before."""
    found = checkpoints(output / "checkpoints")
    return step_of(found[-1]) if found else 0


def test_a_folder_in_use_stops_all_processes(recipe: Path, tmp_path: Path) -> None:
    with run_lock(tmp_path):
        stopped = launch(recipe, tmp_path, processes=2)
    assert stopped.returncode != 0
    assert f"in use by another run, process {os.getpid()} on" in stopped.stderr
    assert not list(tmp_path.iterdir())


def test_two_processes_equal_one(recipe: Path, one: Path, tmp_path: Path) -> None:
    """The same global batch: two processes with a clip each, one process with two."""
    two = run(recipe, tmp_path / "two", "lora.dropout=0", "train.accumulation=1", processes=2)
    for a, b in zip(read_metrics(one / "metrics.jsonl"), read_metrics(two / "metrics.jsonl"), strict=True):
        assert a["budget"] == b["budget"]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    assert largest_difference(adapter(one), adapter(two)) < 1e-4


def test_two_processes_teach_the_same_importance(recipe: Path, tmp_path: Path) -> None:
    """Also where a step has nothing to choose (full cache), which gives the head a gradient of zero and no hang."""
    learned = "memory.selector_options={importance: learned, lam: 0.3}"
    options = ("lora.dropout=0", "memory.selector=omnimem", learned, "loss.retention=1", "budgets.full_share=0.5")
    one = run(recipe, tmp_path / "one", *options)
    two = run(recipe, tmp_path / "two", *options, "train.accumulation=1", processes=2)
    assert {row["budget"] > 0 for row in read_metrics(two / "metrics.jsonl")} == {False, True}
    assert adapter(one)["omnimem_importance"].any()
    assert largest_difference(adapter(one), adapter(two)) < 1e-4


def test_encoding_ahead_and_caching_change_no_number(
    recipe: Path, one: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Filled by a command, by a run, or not at all; and a run may go on with other settings of both."""
    same, cache = ("lora.dropout=0", "data.encode_ahead=1"), f"data.cache={tmp_path / 'cache'}"
    assert main(["cache", str(recipe), cache, f"train.output={tmp_path / 'filled'}"]) == 0
    assert "stored=6" in capsys.readouterr().out
    ahead = run(recipe, tmp_path / "ahead", *same, cache)
    assert largest_difference(adapter(one), adapter(ahead)) == 0
    assert len(list((tmp_path / "cache").glob("*/index.json"))) == 6
    from_half = f"train.resume={one / 'checkpoints' / 'step-00000002'}"
    resumed = run(recipe, tmp_path / "resumed", *same, cache, from_half)
    assert largest_difference(adapter(one), adapter(resumed)) == 0
    assert main(["cache", str(recipe)]) == 2
    assert "data.cache=FOLDER" in capsys.readouterr().err


def test_ranks_run_clips_of_similar_length(recipe: Path, world: Path, tmp_path: Path) -> None:
    """As the manifest states lengths; the run says how many forwards are empty, now and without."""
    entries = json.loads((world / "train.json").read_text())
    for seconds, entry in zip((5, 40, 12, 38, 6, 11), entries, strict=True):
        entry |= {"duration_s": seconds, "video": str(world / entry["video"])}
    manifest = tmp_path / "lengths.json"
    manifest.write_text(json.dumps(entries))
    options = (f"data.manifest={manifest}", "data.balance=length", "train.accumulation=1", "data.encode_ahead=1")
    done = launch(recipe, tmp_path / "run", *options, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    said = next(line for line in done.stdout.splitlines() if line.startswith("empty forwards"))
    now, before = (float(text) for text in re.findall(r"([\d.]+)%", said))
    assert now < before


def test_zero_2_equals_one_process_and_resumes(recipe: Path, one: Path, tmp_path: Path) -> None:
    options = ("lora.dropout=0", "train.accumulation=1", f"train.deepspeed={ROOT / 'recipes/launch/zero2.json'}")
    zero = run(recipe, tmp_path / "zero", *options, processes=2, DS_ACCELERATOR="cpu")
    assert (zero / "checkpoints" / "step-00000002" / "deepspeed").is_dir(), "DeepSpeed was not in use"
    for a, b in zip(read_metrics(one / "metrics.jsonl"), read_metrics(zero / "metrics.jsonl"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-3)
    assert largest_difference(adapter(one), adapter(zero)) < 1e-3
    notes = [read_meta(checkpoints(run / "checkpoints")[-1])["meta"]["base_fingerprint"] for run in (one, zero)]
    assert notes[0] == notes[1]
    from_half = f"train.resume={zero / 'checkpoints' / 'step-00000002'}"
    resumed = run(recipe, tmp_path / "resumed", *options, from_half, processes=2, DS_ACCELERATOR="cpu")
    assert largest_difference(adapter(zero), adapter(resumed)) == 0


def test_a_run_belongs_to_its_base(recipe: Path, nano_folder: Path, tmp_path: Path) -> None:
    """Other weights of the same size, in the same folder, are not taken for it: not to export and not to go on."""
    base = tmp_path / "base"
    shutil.copytree(nano_folder, base)
    c = config(recipe, tmp_path, steps=1)
    c = replace(c, model=replace(c.model, path=str(base)))
    last = train(c)
    note = model_fingerprint(load_model(base, device="cpu"))
    assert read_meta(last)["meta"]["base_fingerprint"] == note
    export_adapter(last, tmp_path / "adapter")
    make_tiny(base, seed=1, size="nano")
    with pytest.raises(UserError, match=f"in training they had {note}"):
        export_adapter(last, tmp_path / "adapter")
    with pytest.raises(UserError, match=f"in training they had {note}"):
        train(replace(c, train=replace(c.train, resume="auto")))


def config(recipe: Path, tmp_path: Path, **train_settings: Any) -> RunConfig:
    loaded = load_config(RunConfig, recipe)
    settings = {"output": tmp_path / "run", "steps": 2, "save_every": 0} | train_settings
    return replace(loaded, train=replace(loaded.train, **settings))


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient": Gradient("last", chunks=1)},
        {"gradient": Gradient("stop_layer", layer=1)},
        {"loss": LossConfig(distill=0.5, temperature=2.0)},
        {"memory": MemorySpec(selector="omnimem", budget=16, chunk_tokens=32, allocation="avba")},
        {"memory": MemorySpec(selector="snapkv", budget=16, chunk_tokens=32, positions="compact")},
    ],
    ids=["last", "stop_layer", "distill", "omnimem", "compact"],
)
def test_every_way_of_training_trains(recipe: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = train(replace(config(recipe, tmp_path), **changes))
    tensors = load_file(folder / "adapter.safetensors")
    assert any(bool(x.any()) for k, x in tensors.items() if "lora_B" in k)
    if "loss" in changes:
        rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
        assert all(row["distill_loss"] >= 0 for row in rows)


def test_a_loss_that_is_not_finite_stops_before_the_update(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it was not made"):
        check_finite(3, torch.tensor(float("nan")), torch.tensor(1.0), Draw(8, 32))
    with pytest.raises(UserError, match="step 3: loss 1, gradient norm inf"):
        check_finite(3, torch.tensor(1.0), torch.tensor(float("inf")), Draw(8, 32))
    check_finite(3, torch.tensor(1.0), None, Draw(8, 32))


def test_learning_rate() -> None:
    t = TrainConfig(steps=11, warmup_steps=2, lr=1.0, min_lr_share=0.1)
    assert [round(t.lr_at(s), 4) for s in (0, 1, 2, 10)] == [0.5, 1.0, 1.0, 0.1]
    assert all(t.lr_at(s) >= t.lr_at(s + 1) for s in range(2, 10))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.path=/nowhere/model"], "there is no model folder"),
        (["data.manifest=/nowhere.json"], "nowhere.json"),
        (["memory.selector=snapkb"], "did you mean 'snapkv'"),
        (["memory.bugdet=12", "train.lr=fast"], "did you mean 'budget'"),
        (["lora.targets=[q_prj]"], "did you mean 'q_proj'"),
        (["train.deepspeed=/nowhere.json"], "no DeepSpeed configuration"),
        (["memory.count_text=true", "budgets.low=8", "budgets.full_share=0"], "text tokens it has to hold"),
        (["gradient.kind=stop_layer", "gradient.layer=7"], "stop layer 7 of a model with 3 layers"),
        (["train.resume=/nowhere"], "nowhere"),
        (["gradient.kind=none"], "trains nothing"),
        ([f"train.deepspeed={ROOT / 'recipes/launch/zero2.json'}"], "but accelerate chose"),
    ],
)
def test_what_a_user_does_wrong_is_said_before_training(
    recipe: Path, tmp_path: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from omnimem_train.cli import main

    code = main(["train", str(recipe), f"train.output={tmp_path / 'run'}", *overrides])
    captured = capsys.readouterr()
    assert code == 2
    assert message in captured.err
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_without_a_launcher_is_refused(recipe: Path, tmp_path: Path, stage: int) -> None:
    settings = ROOT / "recipes" / "launch" / f"zero{stage}.json"
    env = {"ACCELERATE_USE_CPU": "false", "DS_ACCELERATOR": "cpu"}
    stopped = launch(recipe, tmp_path / "run", f"train.deepspeed={settings}", **env)
    assert stopped.returncode == 2, stopped.stderr
    assert "no launcher started" in stopped.stderr and "torchrun" in stopped.stderr
    assert not (tmp_path / "run").exists()


def test_a_broken_clip_stops_the_run_or_is_counted(recipe: Path, world: Path, tmp_path: Path) -> None:
    entries = json.loads((world / "train.json").read_text())
    for entry in entries:
        entry["video"] = str(world / entry["video"])
    (tmp_path / "broken.mp4").write_bytes(b"not a video" * 100)
    entries[1]["video"] = str(tmp_path / "broken.mp4")
    manifest = tmp_path / "train.json"
    manifest.write_text(json.dumps(entries))
    stopped = launch(recipe, tmp_path / "a", f"data.manifest={manifest}")
    assert stopped.returncode == 2
    assert "broken.mp4: cannot be decoded" in stopped.stderr
    assert "data.max_broken=1" in stopped.stderr
    run(recipe, tmp_path / "b", f"data.manifest={manifest}", "data.max_broken=1")
    listed = [json.loads(line) for line in (tmp_path / "b" / "broken-rank0.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in listed] == [entries[1]["id"]]


def test_components_of_a_run_have_defaults() -> None:
    c = RunConfig()
    assert isinstance(c.model, ModelConfig)
    assert isinstance(c.lora, LoraSettings)
    assert isinstance(c.data, DataConfig)
    assert isinstance(c.budgets, BudgetSampling)
