"""Adapters: where they go, what they leave alone, and files that other software reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from omnimem_train.errors import UserError
from omnimem_train.models.interface import Tap
from omnimem_train.models.loading import load_model
from omnimem_train.models.lora import (
    CONFIG,
    WEIGHTS,
    LoraSettings,
    add_lora,
    check_adapter,
    disable_adapter,
    load_adapter,
    lora_parameters,
    save_adapter,
)

SETTINGS = LoraSettings(r=4, alpha=8.0, dropout=0.1)
IDS = torch.arange(20)[None]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.module(input_ids=IDS).logits


def adapted(model: Any, settings: LoraSettings = SETTINGS, seed: int = 0) -> Any:
    """A model with an adapter that does something."""
    add_lora(model, settings)
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in lora_parameters(model):
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def relayout(folder: Path, old: str, new: str) -> None:
    """Rename the modules of a saved adapter."""
    weights = {key.replace(old, new, 1): x for key, x in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS)


@pytest.mark.parametrize("targets", [("q_proj", "k_proj", "v_proj", "o_proj"), ("v_proj",), ("q_proj", "down_proj")])
def test_adapters_go_to_the_language_model_alone(nano: Any, targets: tuple[str, ...]) -> None:
    before = logits(nano)
    names = add_lora(nano, LoraSettings(r=4, targets=targets))
    assert len(names) == nano.n_layers * len(targets)
    trained = [name for name, p in nano.module.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(names)
    assert all(name.startswith(nano.language_prefix()) and ".lora_" in name for name in trained)
    towers = [nano.parts.visual, nano.parts.audio]
    assert not any("lora" in name for tower in towers for name, _ in tower.named_modules())
    assert any(name.endswith("q_proj") for name, _ in nano.parts.audio.named_modules())  # a suffix would have hit it
    assert torch.equal(logits(nano), before)


def test_adapters_are_float32_under_bfloat16(nano_folder: Path) -> None:
    model: Any = load_model(nano_folder, dtype="bfloat16", device="cpu")
    add_lora(model, SETTINGS)
    assert {p.dtype for _, p in lora_parameters(model)} == {torch.float32}
    tap = Tap()
    hidden = torch.randn(1, 5, model.hidden_size, dtype=torch.bfloat16)
    out = model.run_layer(0, hidden, model.rope(torch.zeros(1, 5, 3, dtype=torch.int64)), tap, {})
    assert out.dtype == torch.bfloat16
    assert tap.keys is not None
    assert tap.keys.dtype == torch.bfloat16


def test_modes_stay_and_dropout_works_in_training_alone(nano: Any) -> None:
    adapted(nano)
    assert torch.equal(logits(nano), logits(nano))
    nano.module.train()
    assert not torch.equal(logits(nano), logits(nano))


def test_disabling_restores_the_base_and_what_is_trainable(nano: Any) -> None:
    base = logits(nano)
    with disable_adapter(nano):
        assert torch.equal(logits(nano), base)
    adapted(nano)
    changed = logits(nano)
    assert not torch.allclose(changed, base, atol=0.1)
    for trainable in (True, False):
        for _, p in lora_parameters(nano):
            p.requires_grad_(trainable)
        with disable_adapter(nano):
            torch.testing.assert_close(logits(nano), base)
        assert all(p.requires_grad == trainable for _, p in lora_parameters(nano))
    with pytest.raises(ZeroDivisionError), disable_adapter(nano):
        raise ZeroDivisionError
    assert torch.equal(logits(nano), changed)


def test_output_weight_is_what_the_layer_applies(nano: Any) -> None:
    adapted(nano)
    projection = nano.parts.text.layers[1].self_attn.o_proj
    x = torch.randn(5, projection.in_features)

    def applied() -> Tensor:
        with torch.no_grad():
            return projection(x)

    torch.testing.assert_close(x @ nano.output_weight(1).T, applied(), rtol=0, atol=1e-5)
    before = nano.output_weight(1)
    b = next(p for name, p in lora_parameters(nano) if "layers.1.self_attn.o_proj.lora_B" in name)
    b.data.mul_(2)  # as an optimizer that writes through .data
    assert not torch.allclose(nano.output_weight(1), before)
    torch.testing.assert_close(x @ nano.output_weight(1).T, applied(), rtol=0, atol=1e-5)
    with disable_adapter(nano):
        assert torch.equal(nano.output_weight(1), projection.base_layer.weight)
    for _, p in lora_parameters(nano):
        p.requires_grad_(False)
    frozen = nano.output_weight(1)
    assert nano.output_weight(1) is frozen  # kept while nothing is trained
    with torch.no_grad():
        b.mul_(0.5)
    torch.testing.assert_close(x @ nano.output_weight(1).T, applied(), rtol=0, atol=1e-5)
    assert not nano.output_weight(1).requires_grad
    b.requires_grad_(True)  # training goes on: what was kept while frozen must not come back
    b.data.mul_(3)
    torch.testing.assert_close(x @ nano.output_weight(1).T, applied(), rtol=0, atol=1e-5)


def test_output_weight_without_adapter(nano_session: Any) -> None:
    projection = nano_session.parts.text.layers[2].self_attn.o_proj
    assert torch.equal(nano_session.output_weight(2), projection.weight)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_peft_loads_what_is_saved(nano_folder: Path, tmp_path: Path, dtype: str) -> None:
    model: Any = adapted(load_model(nano_folder, dtype=dtype, device="cpu"))
    report = save_adapter(model, tmp_path / "adapter")
    assert report == {"modules": 12, "trained": 12, "parameters": sum(p.numel() for _, p in lora_parameters(model))}
    stock = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(nano_folder, dtype=getattr(torch, dtype)).eval()
    loaded = PeftModel.from_pretrained(stock, tmp_path / "adapter")
    with torch.no_grad():
        found = loaded(input_ids=IDS).logits
    torch.testing.assert_close(found, logits(model), rtol=0, atol=1e-5 if dtype == "float32" else 0.1)


def test_a_saved_adapter_comes_back_equal(nano: Any, nano_folder: Path, tmp_path: Path) -> None:
    adapted(nano)
    save_adapter(nano, tmp_path)
    again: Any = load_model(nano_folder, device="cpu", adapter=tmp_path)
    assert torch.equal(logits(again), logits(nano))
    assert not any(p.requires_grad for p in again.module.parameters())
    other: Any = adapted(load_model(nano_folder, device="cpu"), seed=1)
    load_adapter(other, tmp_path, trainable=True)  # into the adapter it has, to go on training
    assert torch.equal(logits(other), logits(nano))
    assert all(p.requires_grad for _, p in lora_parameters(other))


@pytest.mark.parametrize("layout", ["model.layers.", "model.language_model.layers.", "thinker.model.layers."])
def test_adapters_of_other_versions_load(nano: Any, nano_folder: Path, tmp_path: Path, layout: str) -> None:
    adapted(nano)
    save_adapter(nano, tmp_path)
    relayout(tmp_path, nano.language_prefix(), layout)
    assert any(key.startswith(f"base_model.model.{layout}0.") for key in load_file(tmp_path / WEIGHTS))
    again: Any = load_model(nano_folder, device="cpu", adapter=tmp_path)
    assert torch.equal(logits(again), logits(nano))


def test_saving_for_the_full_omni_model(nano: Any, nano_folder: Path, tmp_path: Path) -> None:
    adapted(nano)
    save_adapter(nano, tmp_path, layout="omni")
    inside = torch.nn.Module()
    inside.thinker = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(nano_folder).eval()
    inside.config = {"model_type": "custom"}
    loaded: Any = PeftModel.from_pretrained(inside, tmp_path)
    with torch.no_grad():
        found = loaded.base_model.model.thinker(input_ids=IDS).logits
    torch.testing.assert_close(found, logits(nano), rtol=0, atol=1e-5)


def test_rank_stabilised_scale_is_understood(nano: Any, nano_folder: Path, tmp_path: Path) -> None:
    adapted(nano, LoraSettings(r=4, alpha=16.0))
    save_adapter(nano, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"use_rslora": True, "lora_alpha": 8}))
    again: Any = load_model(nano_folder, device="cpu", adapter=tmp_path)
    torch.testing.assert_close(logits(again), logits(nano))


def test_sharded_states_can_be_saved(nano: Any, tmp_path: Path) -> None:
    adapted(nano)
    state = {name: torch.full_like(p, 0.5) for name, p in lora_parameters(nano)}
    save_adapter(nano, tmp_path, state=state)
    assert all(bool((x == 0.5).all()) for x in load_file(tmp_path / WEIGHTS).values())


def test_untrained_modules_are_counted(nano: Any, tmp_path: Path) -> None:
    add_lora(nano, SETTINGS)
    assert save_adapter(nano, tmp_path)["trained"] == 0


def test_adapters_that_do_not_fit_are_refused(nano: Any, nano_folder: Path, tmp_path: Path) -> None:
    adapted(nano)
    save_adapter(nano, tmp_path)
    whole, config = load_file(tmp_path / WEIGHTS), json.loads((tmp_path / CONFIG).read_text())
    first = next(iter(whole))

    def message(weights: dict[str, Tensor], **changed: Any) -> str:
        save_file(weights, tmp_path / WEIGHTS)
        (tmp_path / CONFIG).write_text(json.dumps(config | changed))
        model = load_model(nano_folder, device="cpu")
        with pytest.raises(UserError) as error:
            load_adapter(model, tmp_path)
        assert model.adapter is None
        return str(error.value)

    layer_2 = {key: x for key, x in whole.items() if ".layers.2." not in key}
    assert "4 modules lack one" in message(layer_2)
    deeper = whole | {key.replace(".layers.2.", ".layers.3."): x.clone() for key, x in whole.items()}
    assert "first model" in message(deeper)
    assert "lora_A" in message(whole | {first: torch.zeros(5, 64)})
    assert "all finite" in message(whole | {first: torch.full_like(whole[first], torch.nan)})
    tower = {"base_model.model.model.audio_tower.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}
    assert "no LoRA weight of a decoder layer" in message(whole | tower)
    assert "only plain LoRA" in message(whole, use_dora=True)
    assert "only plain LoRA" in message(whole, peft_type="IA3")
    (tmp_path / WEIGHTS).write_bytes(b"junk")
    with pytest.raises(UserError, match="cannot read an adapter"):
        check_adapter(nano, tmp_path)
    with pytest.raises(UserError, match="cannot read an adapter"):
        load_model(nano_folder, device="cpu", adapter=tmp_path / "absent")


def test_bad_settings_are_refused(nano: Any, tmp_path: Path) -> None:
    for bad in ({"r": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"targets": ()}, {"targets": ("q_proj", "q_proj")}):
        with pytest.raises(UserError):
            LoraSettings(**bad)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="did you mean 'q_proj'"):
        add_lora(nano, LoraSettings(targets=("q_prj",)))
    with pytest.raises(UserError, match="no adapter to save"):
        save_adapter(nano, tmp_path)
    add_lora(nano, SETTINGS)
    with pytest.raises(UserError, match="already has an adapter"):
        add_lora(nano, SETTINGS)


def test_a_rank_is_at_most_the_smallest_side_of_a_target(nano: Any) -> None:
    heads = nano.parts.text.layers[0].self_attn
    assert heads.q_proj.weight.shape == (64, 64)
    assert heads.k_proj.weight.shape == (32, 64)
    for r, targets, message in (
        (33, ("q_proj", "k_proj"), r"r=33 is above 32, the smaller side of .*\.k_proj \(32 x 64\)"),
        (65, ("q_proj", "down_proj"), r"r=65 is above 64, the smaller side of .*_proj \(64 x "),
        (10**9, ("k_proj",), "lora.r to 32 or less"),
    ):
        with pytest.raises(UserError, match=message):
            add_lora(nano, LoraSettings(r=r, targets=targets))
        assert nano.adapter is None
    assert len(add_lora(nano, LoraSettings(r=32, targets=("q_proj", "k_proj")))) == 2 * nano.n_layers


def test_an_adapter_of_another_rank_is_not_loaded_over_one(nano: Any, nano_folder: Path, tmp_path: Path) -> None:
    adapted(nano)
    save_adapter(nano, tmp_path)
    other: Any = adapted(load_model(nano_folder, device="cpu"), LoraSettings(r=8))
    with pytest.raises(UserError, match="differs in shape"):
        load_adapter(other, tmp_path)
