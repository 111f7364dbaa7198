"""video-SALMONN 2+ from clips to an adapter in use, as users run it: both backbones, tiny, on the CPU."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import omni_clips
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_training import ROOT, launch

from omnimem_train.cli import main
from omnimem_train.errors import UserError
from omnimem_train.export import adapter_memory, export_adapter
from omnimem_train.gradient import Gradient
from omnimem_train.losses import LossConfig
from omnimem_train.memory import AUDIO, TEXT, MemorySpec
from omnimem_train.models.interface import StreamingModel, Turn
from omnimem_train.models.loading import load_model
from omnimem_train.models.lora import LoraSettings, add_lora, disable_adapter, lora_parameters
from omnimem_train.models.salmonn import VideoSalmonn2ForConditionalGeneration, merge_adapter
from omnimem_train.models.salmonn.adapter import read_adapter
from omnimem_train.models.salmonn.tiny import make_tiny_salmonn
from omnimem_train.runlog import read_metrics
from omnimem_train.step import EncodedStream, StreamingStep, TimedTurn, encode_stream

PIXELS = {"max_pixels": 3136}
IDS = torch.arange(20)[None]


# Gradients ------------------------------------------------------------------------------------------------------------


def adapted(folder: Path) -> StreamingModel:
    model = load_model(folder, device="cpu")
    torch.manual_seed(0)
    add_lora(model, LoraSettings(r=4, alpha=8.0, targets=("q_proj", "k_proj", "v_proj")))
    for _, p in lora_parameters(model):
        p.data.normal_(std=0.1)
    return model


def encoded(model: StreamingModel) -> EncodedStream:
    """Eight seconds, asked in the middle (while sound waits for its 30 s) and at the end."""
    clip = omni_clips.Clip(8.0, 1.0)
    encoder = model.open(clip.info, 1.0, **PIXELS)
    turns = [TimedTurn(model.render(Turn("Which?", a)), t) for a, t in (("A.", 4.0), ("B.", None))]
    return encode_stream(encoder, clip.windows(2.0), turns, torch.device("cpu"))


def gradients(model: StreamingModel, spec: MemorySpec, **settings: Any) -> dict[str, torch.Tensor]:
    model.module.zero_grad()
    result = StreamingStep(model, LossConfig())(encoded(model), spec, Gradient("all", **settings))
    result.loss.backward()
    return {name: p.grad.clone() for name, p in lora_parameters(model) if p.grad is not None}


@pytest.mark.parametrize("selector", ["omnimem", "perturbation"])
def test_checkpointed_gradients_equal_plain_ones(salmonn_folder: Path, selector: str) -> None:
    model = adapted(salmonn_folder)
    spec = MemorySpec(selector=selector, budget=16, chunk_tokens=24, allocation="avba")
    plain = gradients(model, spec, checkpointing=False)
    recomputed = gradients(model, spec, checkpointing=True)
    assert len(plain) == 2 * 3 * model.n_layers
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert float(gradient.abs().max()) > 0, name
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6)


def test_adapters_stay_out_of_the_encoders(salmonn_folder: Path) -> None:
    """The audio encoder has projections of the same names."""
    model = adapted(salmonn_folder)
    names = [name for name, p in model.module.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 3 * model.n_layers
    assert all(name.startswith("model.language_model.layers.") for name in names)
    assert any("audio.layers.0.self_attn.q_proj" in name for name, _ in model.module.named_parameters())


# As users run it ------------------------------------------------------------------------------------------------------


def recipe_of(folder: Path, rendered: Path, path: Path) -> Path:
    path.write_text(
        f"""
model: {{path: {folder}, device: cpu}}
lora: {{r: 4, alpha: 8, targets: [q_proj, k_proj, v_proj]}}
data: {{manifest: {rendered / "train.json"}, fps: 1, workers: 1}}
encoder: {{max_pixels: 3136}}
memory: {{selector: omnimem, allocation: avba, chunk_tokens: 40, layer_table: [12, [6, 18], 36]}}
budgets: {{low: 8, high: 32, full_share: 0}}
train: {{steps: 2, lr: 3e-3, warmup_steps: 0, accumulation: 2, log_every: 1, save_every: 1}}
"""
    )
    return path


@pytest.fixture(scope="module")
def trained(salmonn_folder: Path, rendered: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `recipe.yaml` and a finished run of two steps."""
    folder = tmp_path_factory.mktemp("run")
    recipe = recipe_of(salmonn_folder, rendered, folder / "recipe.yaml")
    assert main(["train", str(recipe), f"train.output={folder}"]) == 0
    return folder


@pytest.mark.slow
def test_it_trains_within_its_budgets(trained: Path) -> None:
    rows = read_metrics(trained / "metrics.jsonl")
    assert len(rows) == 2
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 and row["kept_share/visual"] <= 1 for row in rows)
    moved = load_file(trained / "checkpoints" / "step-00000002" / "adapter.safetensors")
    assert all(bool(x.any()) for k, x in moved.items() if "lora_B" in k)


@pytest.mark.slow
def test_it_exports_evaluates_and_answers(
    trained: Path, salmonn_folder: Path, rendered: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = trained / "adapter"
    assert main(["export", str(trained), str(out)]) == 0
    spec = adapter_memory(out, load_model(salmonn_folder, device="cpu"))
    assert [list(e) if isinstance(e, tuple) else e for e in spec.layer_table] == [12, [6, 18], 36]
    assert "`VideoSalmonn2ForConditionalGeneration`" in (out / "README.md").read_text()

    recipe = trained / "eval.yaml"
    recipe.write_text(
        f"""
model: {{path: {salmonn_folder}, device: cpu, adapter: {out}}}
data: {{items: {rendered / "test_choices.jsonl"}, fps: 1}}
encoder: {{max_pixels: 3136}}
memory: {{chunk_tokens: 40, layer_table: [12, [6, 18], 36]}}
selectors: [omnimem]
budgets: [table, 12, full]
output: {trained / "eval"}
"""
    )
    assert main(["eval", str(recipe)]) == 0
    summary = json.loads((trained / "eval" / "summary.json").read_text())
    assert not summary["failed"]
    assert [(row["budget"], row["adapter"]) for row in summary["rows"]] == [
        (24, False), (12, False), ("full", False), (24, True), (12, True), ("full", True),
    ]  # fmt: skip
    answers = [json.loads(line) for line in (trained / "eval" / "results-rank0.jsonl").read_text().splitlines()]
    by = {(a["question"], a["setting"]): a["scores"] for a in answers}
    asked = {q for q, _ in by}
    assert any(by[q, "omnimem@12"] != by[q, "full"] for q in asked)
    assert any(by[q, "omnimem@12"] != by[q, "omnimem@12+adapter"] for q in asked)

    capsys.readouterr()
    video = next((rendered / "clips").glob("test-*.mp4"))
    asking = ["ask", str(video), "What is heard?", "--model", str(salmonn_folder), "--adapter", str(out)]
    asking += ["--fps", "1", "--encoder", "max_pixels=3136", "--device", "cpu", "--max-new-tokens", "4"]
    assert main(asking) == 0
    shown = capsys.readouterr().err
    text = load_model(salmonn_folder, device="cpu").open(omni_clips.Clip(6.0, 1.0).info, 1.0).start().n
    low, high = (int(x) for x in shown.split("kept a layer: ")[1].split(",")[0].split(" to "))
    assert low < high, "layers of different budgets kept the same"
    assert low >= text
    assert main([*asking, "--budget", "8", "--encoder", "max_pixls=3136"]) == 2
    assert "max_pixls" in capsys.readouterr().err


@pytest.mark.slow
def test_both_layouts_give_the_same_logits(trained: Path, salmonn_folder: Path, tmp_path: Path) -> None:
    plain, public = tmp_path / "peft", tmp_path / "salmonn"
    export_adapter(trained, plain)
    export_adapter(trained, public, layout="salmonn")
    ours: Any = load_model(salmonn_folder, device="cpu", adapter=plain)
    with torch.no_grad():
        expected = ours.module(input_ids=IDS).logits
        with disable_adapter(ours):
            base = ours.module(input_ids=IDS).logits
        stock: Any = VideoSalmonn2ForConditionalGeneration.from_pretrained(salmonn_folder).eval()
        merged: Any = VideoSalmonn2ForConditionalGeneration.from_pretrained(salmonn_folder).eval()
        merge_adapter(merged, public)
        again: Any = load_model(salmonn_folder, device="cpu", adapter=public)
        found = [m(input_ids=IDS).logits for m in (PeftModel.from_pretrained(stock, plain), merged, again.module)]
    for logits in found:
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert float((expected - base).abs().max()) > 1e-3
    # what the public code needs: targets by name, its own key names
    config = json.loads((public / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["k_proj", "q_proj", "v_proj"]
    old = "qwen2_5_vl" in str(salmonn_folder)
    prefix = "base_model.model.model." + ("layers." if old else "language_model.layers.")
    assert all(key.startswith(prefix) for key in load_file(public / "adapter_model.safetensors"))
    assert len(read_adapter(public).lora) == 3 * 3
    with pytest.raises(UserError, match="choose one of: peft, salmonn"):
        export_adapter(trained, tmp_path / "x", layout="thinker")


@pytest.mark.slow
def test_it_calibrates_and_trains_with_the_table(salmonn_folder: Path, rendered: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "calibrate.yaml"
    recipe.write_text(
        f"""
model: {{path: {salmonn_folder}, device: cpu}}
data: {{manifest: {rendered / "train.json"}, fps: 1}}
encoder: {{max_pixels: 3136}}
memory: {{selector: omnimem, allocation: avba, budget: 24, chunk_tokens: 40}}
clips: 2
per_modality: true
output: {tmp_path / "table.json"}
"""
    )
    assert main(["calibrate", str(recipe)]) == 0
    measured = json.loads((tmp_path / "table.json").read_text())
    assert sum(map(sum, measured["layer_table"])) == 3 * 24
    training = recipe_of(salmonn_folder, rendered, tmp_path / "recipe.yaml")
    options = ["train.steps=1", "train.accumulation=1", f"memory.layer_table={tmp_path / 'table.json'}"]
    assert main(["train", str(training), f"train.output={tmp_path / 'run'}", *options]) == 0
    export_adapter(tmp_path / "run", tmp_path / "adapter")
    assert [list(e) for e in MemorySpec.load(tmp_path / "adapter").layer_table] == measured["layer_table"]


@pytest.mark.slow
def test_zero_2_with_two_processes_equals_one(rendered: Path, tmp_path: Path) -> None:
    folder = make_tiny_salmonn(tmp_path / "model")
    recipe = recipe_of(folder, rendered, tmp_path / "recipe.yaml")
    zero2 = f"train.deepspeed={ROOT / 'recipes/launch/zero2.json'}"

    def finished(done: subprocess.CompletedProcess[str]) -> None:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    finished(launch(recipe, tmp_path / "one"))
    finished(launch(recipe, tmp_path / "two", "train.accumulation=1", zero2, processes=2, DS_ACCELERATOR="cpu"))
    assert (tmp_path / "two" / "checkpoints" / "step-00000002" / "deepspeed").is_dir(), "DeepSpeed was not in use"
    one, two = (
        load_file(tmp_path / name / "checkpoints" / "step-00000002" / "adapter.safetensors") for name in ("one", "two")
    )
    assert one.keys() == two.keys()
    assert max(float((one[k] - two[k]).abs().max()) for k in one) < 1e-3
    for a, b in zip(*(read_metrics(tmp_path / n / "metrics.jsonl") for n in ("one", "two")), strict=True):
        assert a["budget"] == b["budget"]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-3)


@pytest.mark.parametrize("kind", ["no sound", "no picture"])
def test_clips_with_one_track_train(salmonn_folder: Path, kind: str) -> None:
    model = adapted(salmonn_folder)
    clip = omni_clips.Clip(8.0, 1.0, audio=kind != "no sound", video=kind != "no picture")
    turns = [TimedTurn(model.render(Turn("Which?", "A.")))]
    stream = encode_stream(model.open(clip.info, 1.0, **PIXELS), clip.windows(2.0), turns, torch.device("cpu"))
    spec = MemorySpec(selector="omnimem", chunk_tokens=24, allocation="avba", layer_table=(8, (4, 8), 16))
    result = StreamingStep(model, LossConfig())(stream, spec, Gradient("all"))
    result.loss.backward()
    assert torch.isfinite(result.loss)
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for _, p in lora_parameters(model))
    held = {AUDIO: result.kept["audio"], TEXT: result.kept["text"]}
    assert held[TEXT] > 0
    assert (float(held[AUDIO]) == 0) == (kind == "no sound")
