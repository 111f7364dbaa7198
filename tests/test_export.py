"""Exported adapters: what others load, and what belongs together."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from omnimem_train.checkpoint import save_checkpoint
from omnimem_train.cli import main
from omnimem_train.config import to_plain
from omnimem_train.errors import UserError
from omnimem_train.export import adapter_memory, export_adapter
from omnimem_train.memory.spec import MemorySpec
from omnimem_train.models.loading import load_model
from omnimem_train.models.lora import LoraSettings, add_lora, disable_adapter, lora_parameters
from omnimem_train.models.tiny import make_tiny
from omnimem_train.rng import versions
from omnimem_train.run_config import RunConfig
from omnimem_train.session import model_fingerprint

SPEC = MemorySpec(selector="snapkv", budget=48, chunk_tokens=96)
LORA = LoraSettings(r=4, alpha=8.0)
IDS = torch.arange(20)[None]


def checkpoint(folder: Path, base: Path, trained: bool = True, noted: bool = True) -> Any:
    """A checkpoint as the trainer writes it, of an adapter that does something; and the model it is on.

    Args:
        trained: the adapter changes the model.
        noted: the fingerprint of the base is in it, as in all but old checkpoints.
    """
    model = load_model(base, device="cpu")
    note = {"base_fingerprint": model_fingerprint(model, adapters=False)} if noted else {}
    add_lora(model, LORA)
    if trained:
        for _, p in lora_parameters(model):
            p.data.normal_(std=0.2)
    config = RunConfig()
    config = replace(config, model=replace(config.model, path=str(base)), lora=LORA, memory=SPEC)
    save_checkpoint(
        folder / "checkpoints",
        7,
        tensors={"adapter": dict(lora_parameters(model))},
        objects={},
        rank_objects={},
        meta={"config": to_plain(config), "versions": versions(), "lora": to_plain(LORA)} | note,
    )
    return model


@pytest.fixture(scope="module")
def exported(nano_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    model = checkpoint(folder, nano_folder)
    report = export_adapter(folder, folder / "adapter")
    assert report["step"] == 7
    assert report["modules"] == report["trained"] == 4 * model.n_layers
    return folder / "adapter", model


def test_plain_peft_loads_it_on_the_stock_class(exported: tuple[Path, Any], nano_folder: Path) -> None:
    folder, model = exported
    stock = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(nano_folder).eval()
    with torch.no_grad():
        base = stock(input_ids=IDS).logits
        expected = model.module(input_ids=IDS).logits
        found = PeftModel.from_pretrained(stock, folder)(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert float((found - base).abs().max()) > 0.01


def test_it_carries_its_memory(exported: tuple[Path, Any], nano_folder: Path) -> None:
    folder, _ = exported
    assert adapter_memory(folder, load_model(nano_folder, device="cpu", adapter=folder)) == SPEC
    about = json.loads((folder / "memory.json").read_text())["about"]
    assert about["steps"] == 7
    card = (folder / "README.md").read_text()
    assert "selector `snapkv`" in card
    assert SPEC.fingerprint() in card


def test_things_that_do_not_belong_together_are_refused(
    exported: tuple[Path, Any], nano_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(exported[0], folder)
    memory = json.loads((folder / "memory.json").read_text())
    edited = memory | {"memory": memory["memory"] | {"budget": 49}}
    (folder / "memory.json").write_text(json.dumps(edited))
    with pytest.raises(UserError, match="does not match its fingerprint"):
        adapter_memory(folder)
    (folder / "memory.json").write_text(json.dumps(memory))
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(UserError, match="belongs to another"):
        adapter_memory(folder)
    other = load_model(nano_folder, device="cpu")
    with torch.no_grad():
        next(p for n, p in other.module.named_parameters() if n.startswith(other.language_prefix())).add_(1)
    with pytest.raises(UserError, match="trained on another base model"):
        adapter_memory(exported[0], other)


def test_another_base_of_the_same_size_is_refused(
    exported: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_tiny(tmp_path / "other", seed=1, size="nano")
    arguments = ["export", str(exported[0].parent), str(tmp_path / "adapter"), "--model", str(other)]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert f"{other} is not the base model that checkpoint" in said
    for model in (exported[1], load_model(other, device="cpu")):
        assert model_fingerprint(model, adapters=False) in said
    assert not (tmp_path / "adapter").exists()


def test_the_base_may_move(exported: tuple[Path, Any], nano_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(nano_folder, tmp_path / "moved")
    export_adapter(exported[0].parent, tmp_path / "adapter", model_path=str(tmp_path / "moved"))


def test_an_old_checkpoint_without_the_note_is_exported(nano_folder: Path, tmp_path: Path) -> None:
    model = checkpoint(tmp_path, nano_folder, noted=False)
    export_adapter(tmp_path, tmp_path / "adapter")
    about = json.loads((tmp_path / "adapter" / "memory.json").read_text())["about"]
    assert about["base_fingerprint"] == model_fingerprint(model, adapters=False)


def test_what_cannot_be_exported(nano_folder: Path, tmp_path: Path) -> None:
    checkpoint(tmp_path, nano_folder, trained=False)
    with pytest.raises(UserError, match="changes nothing"):
        export_adapter(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="layout"):
        export_adapter(tmp_path, tmp_path / "out", layout="talker")
    assert main(["export", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2


def test_the_full_omni_layout(exported: tuple[Path, Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    export_adapter(exported[0].parent, tmp_path / "omni", layout="omni")
    names = load_file(tmp_path / "omni" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.thinker.") for name in names)


def test_the_base_is_what_is_left_without_the_adapter(exported: tuple[Path, Any], nano_folder: Path) -> None:
    model = load_model(nano_folder, device="cpu", adapter=exported[0])
    with torch.no_grad(), disable_adapter(model):
        off = model.module(input_ids=IDS).logits
        base = load_model(nano_folder, device="cpu").module(input_ids=IDS).logits
    torch.testing.assert_close(off, base, rtol=0, atol=1e-6)
