"""A decoder in 4 bits: what is packed, that a step on it is one on the unpacked weights, and what is exported."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import omni_clips
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from omnimem_train.cli import main
from omnimem_train.config import load_config
from omnimem_train.errors import UserError
from omnimem_train.export import adapter_memory, export_adapter
from omnimem_train.gradient import Gradient
from omnimem_train.losses import LossConfig
from omnimem_train.memory.spec import MemorySpec
from omnimem_train.models.interface import StreamingModel, Turn
from omnimem_train.models.loading import ModelConfig, load_model
from omnimem_train.models.lora import LoraSettings, add_lora, disable_adapter, lora_parameters
from omnimem_train.models.quantised import BYTES_A_WEIGHT, unpacked
from omnimem_train.run_config import RunConfig
from omnimem_train.session import StreamSession, model_fingerprint
from omnimem_train.step import StreamingStep, TimedTurn, encode_stream
from omnimem_train.trainer import train

needs_bnb = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra nf4)"
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])]
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def packed(folder: Path, dtype: str = "float32", device: str = "cpu") -> Any:
    return load_model(folder, dtype=dtype, device=device, quantization="nf4")


def twin(model: StreamingModel, folder: Path) -> StreamingModel:
    """The same model unpacked: a plain one with the weights that the packed one stands for."""
    plain = load_model(folder, dtype=str(model.dtype).removeprefix("torch."), device=str(model.device))
    for name, module in model.language_modules():
        if getattr(getattr(module, "weight", None), "quant_state", None) is not None:
            own: Any = plain.module.get_submodule(name)
            own.weight.data.copy_(unpacked(module))
    return plain


def with_adapter(model: StreamingModel, targets: tuple[str, ...] = ALL) -> StreamingModel:
    add_lora(model, LoraSettings(r=4, alpha=8.0, targets=targets))
    for i, (_, p) in enumerate(sorted(lora_parameters(model))):
        p.data.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return model


# What is packed -------------------------------------------------------------------------------------------------------


def only_the_layers_are_packed(model: StreamingModel, plain: StreamingModel) -> None:
    own, stored = dict(model.module.named_modules()), dict(plain.module.named_modules())
    assert own.keys() == stored.keys()
    prefix = model.language_prefix()
    linears = {name for name, m in stored.items() if isinstance(m, nn.Linear)}
    found = {name for name, m in own.items() if type(m).__name__ == "Linear4bit"}
    assert found == {name for name in linears if name.startswith(prefix)}
    assert len(found) == 7 * model.n_layers < len(linears)
    held = {name: p for name, p in model.module.named_parameters() if name.removesuffix(".weight") not in found}
    assert held
    for name, parameter in held.items():
        assert torch.equal(parameter, plain.module.get_parameter(name)), name
    assert not any(p.requires_grad for p in model.module.parameters())


@needs_bnb
def test_only_the_layers_of_an_omni_are_packed(nano_folder: Path, nano_session: StreamingModel) -> None:
    only_the_layers_are_packed(packed(nano_folder), nano_session)


@needs_bnb
def test_only_the_layers_of_a_salmonn_are_packed(salmonn_folder: Path) -> None:
    only_the_layers_are_packed(packed(salmonn_folder), load_model(salmonn_folder, dtype="float32", device="cpu"))


@needs_bnb
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("device", DEVICES)
def test_products_are_those_of_the_unpacked_weight(nano_folder: Path, dtype: str, device: str) -> None:
    """Forward and backward, with many rows and with one, in training and in evaluation."""
    model = packed(nano_folder, dtype, device)
    stored = load_model(nano_folder, dtype=dtype, device=device)
    for target in ("self_attn.q_proj", "mlp.down_proj"):  # with a bias and without
        name = f"{model.language_prefix()}1.{target}"
        module: Any = model.module.get_submodule(name)
        before: Any = stored.module.get_submodule(name)
        weight = unpacked(module)
        assert weight.dtype == model.dtype and weight.shape == before.weight.shape
        error = (weight - before.weight).float().norm() / before.weight.float().norm()
        assert 0.01 < error < 0.12  # 4 bits of normal numbers lose about 9 %
        for rows, training in ((40, True), (40, False), (1, False)):
            module.train(training)
            x = torch.randn(rows, weight.shape[1], device=device).to(model.dtype).requires_grad_()
            tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 2e-2, "atol": 2e-2}
            torch.testing.assert_close(module(x), linear(x, weight, module.bias), **tolerance)
            with torch.no_grad():
                torch.testing.assert_close(module(x), linear(x, weight, module.bias), **tolerance)
            (mine,) = torch.autograd.grad(module(x).sum(), x)
            (wanted,) = torch.autograd.grad(linear(x, weight, module.bias).sum(), x)
            torch.testing.assert_close(mine, wanted, **tolerance)


@needs_bnb
def test_bytes_are_what_plans_count(tmp_path: Path) -> None:
    """On matrices of whole blocks: 4 bits, and scales in 8 bits for 64 weights, theirs in 32 for 256."""
    from omnimem_train.models.quantised import pack_linears

    part = nn.Sequential(nn.Linear(512, 256, bias=False))
    pack_linears(part, torch.device("cpu"))
    weight: Any = part[0].weight
    state = weight.quant_state
    held = [weight, state.absmax, state.state2.absmax]
    assert sum(t.numel() * t.element_size() for t in held) == 512 * 256 * BYTES_A_WEIGHT


@needs_bnb
def test_the_output_projection_is_unpacked(nano_folder: Path) -> None:
    model = packed(nano_folder)
    projection = model.parts.text.layers[1].self_attn.o_proj
    assert torch.equal(model.output_weight(1), unpacked(projection))
    with_adapter(model)
    projection = model.parts.text.layers[1].self_attn.o_proj
    x = torch.randn(5, projection.in_features)
    with torch.no_grad():
        torch.testing.assert_close(x @ model.output_weight(1).T, projection(x), rtol=1e-5, atol=1e-5)
        with disable_adapter(model):
            assert torch.equal(model.output_weight(1), unpacked(projection.base_layer))
            torch.testing.assert_close(x @ model.output_weight(1).T, projection(x), rtol=1e-5, atol=1e-5)
    for _, p in lora_parameters(model):
        p.requires_grad_(False)
    assert model.output_weight(1) is model.output_weight(1)


# Training -------------------------------------------------------------------------------------------------------------


def gradients(model: StreamingModel, gradient: Gradient, selector: str, **loss: float) -> dict[str, Tensor]:
    """Of a step on a clip of more than six chunks, compressed, questions in the middle and at the end; and its loss."""
    clip = omni_clips.Clip(10.0, 2.0)
    turns = [TimedTurn(model.render(t), t.time_s) for t in (Turn("Which?", "a beep", 3.0), Turn("Where?", "left"))]
    stream = encode_stream(model.open(clip.info, 2.0), clip.windows(2.0), turns, model.device)
    spec = MemorySpec(selector, budget=16, chunk_tokens=20)
    assert stream.n_tokens > 6 * spec.chunk_tokens
    stepper = StreamingStep(model, LossConfig(**loss), lambda: disable_adapter(model))
    model.module.zero_grad()
    result = stepper(stream, spec, gradient)
    result.loss.backward()
    return {"loss": result.loss.detach()} | {n: p.grad.clone() for n, p in lora_parameters(model) if p.grad is not None}


def alike(mine: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert mine.keys() == wanted.keys() and len(mine) > 20
    largest = max(float(g.norm()) for name, g in wanted.items() if name != "loss")
    for name, gradient in wanted.items():
        scale = max(float(gradient.norm()), 1e-3 * largest)
        assert float((mine[name] - gradient).norm()) < tolerance * scale, name


def a_step_is_that_of_the_unpacked_weights(folder: Path, dtype: str) -> None:
    """Gradient through all chunks, `perturbation` choosing by the output projection; in bfloat16 by the short steps."""
    model = packed(folder, dtype)
    plain = with_adapter(twin(model, folder))
    with_adapter(model)
    mine, wanted = (gradients(m, Gradient("all"), "perturbation") for m in (model, plain))
    alike(mine, wanted, 1e-4 if dtype == "float32" else 0.03)
    stored = gradients(with_adapter(load_model(folder, dtype=dtype, device="cpu")), Gradient("all"), "perturbation")
    with pytest.raises(AssertionError):
        alike(mine, stored, 0.03)  # the test sees what 4 bits lose
    last = gradients(model, Gradient("last", chunks=1), "perturbation")
    with pytest.raises(AssertionError):
        alike(mine, last, 0.03)  # and that the earlier chunks count


@needs_bnb
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_of_an_omni(dtype: str, nano_folder: Path) -> None:
    a_step_is_that_of_the_unpacked_weights(nano_folder, dtype)


@needs_bnb
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_of_a_salmonn(dtype: str, salmonn_folder: Path) -> None:
    a_step_is_that_of_the_unpacked_weights(salmonn_folder, dtype)


@pytest.mark.gpu
@needs_bnb
@needs_cuda
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-2), ("bfloat16", 0.1)])
def test_a_step_on_a_gpu(dtype: str, tolerance: float, nano_folder: Path) -> None:
    """As above, with a selector that rounding cannot tip, and the package's kernels in bfloat16."""
    model = packed(nano_folder, dtype, "cuda")
    plain = with_adapter(twin(model, nano_folder))
    with_adapter(model)
    mine, wanted = (gradients(m, Gradient("all"), "sliding_window") for m in (model, plain))
    alike(mine, wanted, tolerance)


@needs_bnb
def test_distillation_learns_from_the_packed_base(nano_folder: Path) -> None:
    model = packed(nano_folder)
    plain = with_adapter(twin(model, nano_folder))
    with_adapter(model)
    mine, wanted = (gradients(m, Gradient("all"), "snapkv", distill=1.0) for m in (model, plain))
    alike(mine, wanted, 1e-4)


@needs_bnb
def test_ranks_are_held_against_the_sides_of_a_weight(nano_folder: Path) -> None:
    model = packed(nano_folder)
    with pytest.raises(UserError, match=r"above 32, the smaller side of .*k_proj"):
        add_lora(model, LoraSettings(r=33))
    add_lora(model, LoraSettings(r=32))


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(rendered: Path, nano_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The configuration of a run of two steps on a 4-bit base, which has been made."""
    out = tmp_path_factory.mktemp("quantised")
    overrides = [
        f"model.path={nano_folder}", "model.device=cpu", "model.quantization=nf4", "lora.r=4", "lora.alpha=8",
        f"data.manifest={rendered / 'train.json'}", "data.workers=1", "memory.budget=24", "memory.chunk_tokens=48",
        "budgets.low=8", "budgets.high=64", "train.steps=2", "train.lr=3e-3", f"train.output={out / 'run'}",
    ]  # fmt: skip
    config = load_config(RunConfig, None, overrides)
    train(config)
    return config


@needs_bnb
@pytest.mark.slow
def test_what_is_trained_in_4_bits_loads_on_the_stored_base(
    trained: RunConfig, nano_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # neither export nor what follows needs it
    report = export_adapter(trained.train.output, tmp_path / "adapter")
    assert report["trained"] == report["modules"]
    about = json.loads((tmp_path / "adapter" / "memory.json").read_text())["about"]
    assert about["base_quantization"] == "nf4"
    assert "held in 4 bits (NF4)" in (tmp_path / "adapter" / "README.md").read_text()
    plain = load_model(nano_folder, device="cpu", adapter=tmp_path / "adapter")
    assert adapter_memory(tmp_path / "adapter", plain).budget == 24
    monkeypatch.undo()
    four = load_model(nano_folder, device="cpu", adapter=tmp_path / "adapter", quantization="nf4")
    assert adapter_memory(tmp_path / "adapter", four).budget == 24
    for name, parameter in lora_parameters(plain):
        assert torch.equal(parameter, four.module.get_parameter(name))


@needs_bnb
@pytest.mark.slow
def test_a_run_goes_on_with_the_same_base_alone(trained: RunConfig) -> None:
    onward = replace(trained, train=replace(trained.train, resume="auto"))
    with pytest.raises(UserError, match=r"config\.model\.quantization: 'nf4' in the checkpoint, 'none' now"):
        train(replace(onward, model=replace(trained.model, quantization="none")))
    train(onward)  # all steps are done: it loads, compares and ends


@needs_bnb
@pytest.mark.slow
def test_ask_and_eval_take_a_base_in_4_bits(
    rendered: Path, nano_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = next(rendered.rglob("*.mp4"))
    common = ["ask", str(clip), "What?", "--model", str(nano_folder), "--max-new-tokens", "3", "--budget", "24"]
    common += ["--chunk-tokens", "48", "--quantization", "nf4", "--device", "cpu", "--save", str(tmp_path / "s")]
    assert main(common) == 0
    first = capsys.readouterr().out.strip()
    assert StreamSession.load(tmp_path / "s", packed(nano_folder)).ask("What?", 3) == first
    with pytest.raises(UserError, match="was written with model"):
        StreamSession.load(tmp_path / "s", load_model(nano_folder, device="cpu"))
    items = [f"model.path={nano_folder}", f"data.items={rendered / 'test_choices.jsonl'}", "budgets=[24]"]
    items += [f"output={tmp_path / 'eval'}", "memory.chunk_tokens=48", "data.limit=1"]
    recipe = tmp_path / "eval.yaml"
    recipe.write_text("selectors: [snapkv]\n")
    assert main(["eval", str(recipe), *items, "model.quantization=nf4"]) == 0
    assert "| snapkv | 24 |" in capsys.readouterr().out
    assert main(["eval", str(recipe), *items]) == 2
    assert "holds results of another evaluation (weights" in capsys.readouterr().err


@needs_bnb
def test_the_fingerprint_is_that_of_the_checkpoint(nano_folder: Path, nano_session: StreamingModel) -> None:
    model = packed(nano_folder)
    assert model_fingerprint(model, adapters=False) == model_fingerprint(nano_session, adapters=False)
    assert model_fingerprint(model) != model_fingerprint(nano_session)
    assert model_fingerprint(model) == model_fingerprint(packed(nano_folder))
    with_adapter(model)
    assert model_fingerprint(model, adapters=False) == model_fingerprint(nano_session, adapters=False)


# Errors ---------------------------------------------------------------------------------------------------------------


def test_without_the_package(
    nano_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="needs the package bitsandbytes") as caught:
        load_model(nano_folder, quantization="nf4")
    assert "pip install 'omnimem-train[nf4]'" in str(caught.value.remedy)
    command = ["ask", "a.mp4", "What?", "--model", str(nano_folder), "--quantization", "nf4"]
    assert main(command) == 2
    assert "bitsandbytes" in capsys.readouterr().err


@needs_bnb
def test_precisions_that_cannot_be_unpacked_to(nano_folder: Path) -> None:
    with pytest.raises(UserError, match="nf4 with numbers in float64"):
        packed(nano_folder, "float64")


@needs_bnb
def test_a_package_that_does_not_work_here(nano_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes.functional

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no library for this machine\nand a long text")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", fails)
    with pytest.raises(UserError, match="cannot be packed into 4 bits on cpu") as caught:
        packed(nano_folder)
    assert caught.value.cause == "no library for this machine"


def test_settings_are_checked() -> None:
    with pytest.raises(UserError, match=r"model\.quantization is 'nf5'; did you mean 'nf4'"):
        ModelConfig("x", quantization="nf5")
