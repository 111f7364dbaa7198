"""Training in two processes on streams of unequal length, with and without sound, asked at different times."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from omnimem_train.checkpoint import checkpoints
from omnimem_train.export import export_adapter
from omnimem_train.runlog import read_metrics

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "recipes" / "launch"
FSDP = ["train.sharding=fsdp"]
ZERO2, ZERO3 = [f"train.deepspeed={LAUNCH / 'zero2.json'}"], [f"train.deepspeed={LAUNCH / 'zero3.json'}"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def recipe(nano_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for a run of four steps on made-up streams."""
    path = tmp_path_factory.mktemp("unequal") / "nano.yaml"
    path.write_text(
        f"""
model: {{path: {nano_folder}, device: cpu}}
lora: {{r: 4, alpha: 8}}
memory: {{selector: perturbation, budget: 24, chunk_tokens: 48}}
budgets: {{kind: log_uniform, low: 8, high: 64, full_share: 0.25, chunk_jitter: 0.25}}
train: {{steps: 4, lr: 3e-3, warmup_steps: 1, log_every: 1, save_every: 2, keep: 4}}
"""
    )
    return path


def run(recipe: Path, output: Path, *options: str, processes: int = 2) -> Path:
    """Two streams a step, in one process or two. A hang is a failure."""
    words = [sys.executable]
    if processes > 1:
        words += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    words += [str(ROOT / "scripts/bench/unequal.py"), str(recipe), f"train.output={output}", *options]
    words.append(f"train.accumulation={2 // processes}")
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    env["PYTHONPATH"] = str(ROOT)
    if any("deepspeed" in option for option in options):
        env |= {"DS_ACCELERATOR": "cpu", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    else:
        env["ACCELERATE_USE_CPU"] = "true"
    done = subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return output


def adapter(output: Path, step: int = 4) -> dict[str, torch.Tensor]:
    return load_file(output / "checkpoints" / f"step-{step:08d}" / "adapter.safetensors")


def assert_same(a: Path, b: Path, loss: float = 1e-5, weights: float = 1e-4) -> None:
    """Two runs of the same global batches."""
    rows_a, rows_b = read_metrics(a / "metrics.jsonl"), read_metrics(b / "metrics.jsonl")
    assert len(rows_a) == len(rows_b) > 0
    for x, y in zip(rows_a, rows_b, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], abs=loss)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-2)
    last = int(rows_a[-1]["step"])
    held, other = adapter(a, last), adapter(b, last)
    assert held.keys() == other.keys()
    assert any(bool(x.any()) for name, x in held.items() if "lora_B" in name)
    assert max(float((held[k] - other[k]).abs().max()) for k in held) < weights


def empty_share(output: Path) -> list[float]:
    return [row["empty_share"] for row in read_metrics(output / "metrics.jsonl")]


@pytest.fixture(scope="session")
def one(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that the others are compared with: one process with both streams of a step."""
    return run(recipe, tmp_path_factory.mktemp("one"), processes=1)


@pytest.mark.parametrize("engine", [[], ZERO2], ids=["ddp", "zero2"])
def test_whole_weights(engine: list[str], recipe: Path, one: Path, tmp_path: Path) -> None:
    assert_same(one, run(recipe, tmp_path / "two", *engine))


@pytest.mark.parametrize("engine", [FSDP, ZERO3], ids=["fsdp2", "zero3"])
def test_sharded_weights(engine: list[str], recipe: Path, one: Path, tmp_path: Path) -> None:
    """The same losses and weights; a resumed run is the same to the bit; the adapter can be exported and is whole."""
    two = run(recipe, tmp_path / "two", *engine)
    assert_same(one, two)
    assert all(0 < share < 0.6 for share in empty_share(two)), "streams of a step are of unequal length here"
    half = checkpoints(two / "checkpoints")[0]
    again = run(recipe, tmp_path / "again", *engine, f"train.resume={half}")
    assert [row["step"] for row in read_metrics(again / "metrics.jsonl")] == [3, 4]
    for name, weight in adapter(two).items():
        assert torch.equal(weight, adapter(again)[name]), name
    for before, now in zip(read_metrics(two / "metrics.jsonl")[2:], read_metrics(again / "metrics.jsonl"), strict=True):
        assert before["loss"] == now["loss"]
    report = export_adapter(two, tmp_path / "adapter")
    assert report["trained"] == report["modules"] == 12


OPTIONS: dict[str, list[str]] = {
    "stop_layer": ["gradient.kind=stop_layer", "gradient.layer=1", "loss.distill=0.5"],
    "by_layer": ["gradient.granularity=layer"],
    "retention": [
        "memory.selector=omnimem",
        "memory.selector_options={importance: learned, lam: 0.3}",
        "loss.retention=1",
        "gradient.kind=last",
        "gradient.chunks=2",
    ],
}


@pytest.mark.parametrize("options", OPTIONS)
def test_sharded_weights_with_passes_of_other_kinds(options: str, recipe: Path, tmp_path: Path) -> None:
    """A teacher, chunks without gradient, with gradient in some layers alone, recomputed layer by layer."""
    more = [*OPTIONS[options], "train.steps=2"]
    alone = run(recipe, tmp_path / "one", *more, processes=1)
    assert_same(alone, run(recipe, tmp_path / "two", *more, *FSDP))


def test_sharded_weights_in_half_precision(recipe: Path, tmp_path: Path) -> None:
    more = ["model.dtype=bfloat16", "train.steps=2"]
    alone = run(recipe, tmp_path / "one", *more, processes=1)
    assert_same(alone, run(recipe, tmp_path / "two", *more, *FSDP), loss=1e-3, weights=1e-3)


def test_one_process_shards_nothing(recipe: Path, one: Path, tmp_path: Path) -> None:
    again = run(recipe, tmp_path / "again", *FSDP, processes=1)
    assert_same(one, again, loss=0, weights=1e-9)
    assert all("empty_share" not in row for row in read_metrics(again / "metrics.jsonl"))


def test_what_cannot_be_sharded_is_said_before_training(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"gradient\.checkpointing=false with sharded weights"):
        run(recipe, tmp_path, *FSDP, "gradient.checkpointing=false")
