"""The trained model that ships with the package: what it is, and that it does what its card says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

from data_prep.streams import WorldStreams
from data_prep.world import WorldSettings, make_clip
from omnimem_train.export import adapter_memory
from omnimem_train.memory.spec import MemorySpec
from omnimem_train.models.loading import load_model
from omnimem_train.models.qwen2_5_omni import Qwen2_5OmniStreaming
from scripts.recall.asking import Asker, by_kind, clip_set
from scripts.recall.methods import Form

FOLDER = Path(__file__).parents[1] / "checkpoints" / "tiny-omni"


@pytest.fixture(scope="module")
def model() -> Qwen2_5OmniStreaming:
    found = load_model(FOLDER, dtype="float32", device="cpu")
    assert isinstance(found, Qwen2_5OmniStreaming)
    return found


def test_it_is_small_and_loads_with_the_stock_class() -> None:
    config = Qwen2_5OmniThinkerConfig.from_dict(json.loads((FOLDER / "config.json").read_text()))
    stock, report = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        FOLDER, config=config, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert stock.dtype == torch.bfloat16
    assert sum(p.numel() for p in stock.parameters()) < 12e6
    sizes = [p.stat().st_size for p in FOLDER.rglob("*") if p.is_file()]
    assert sum(sizes) < 25e6 and max(sizes) < 15e6


def test_it_remembers_unseen_clips(model: Qwen2_5OmniStreaming) -> None:
    """With its full cache it knows colours, pitches and what came together; with 2 % of it much is lost."""
    streams = WorldStreams(model, 112)
    specs = [make_clip(WorldSettings(seconds=24.0), 5, "val", i) for i in range(12)]
    asker = Asker(streams, clip_set(streams, specs, 12))
    full = by_kind(asker, asker.answers(MemorySpec(selector="full", budget=None)))
    assert min(full["colour"], full["pitch"]) >= 0.9
    assert full["together"] >= 0.7
    small = by_kind(asker, asker.answers(Form("sliding_window").spec(20)))
    assert small["all"] < full["all"] - 0.2


def test_the_adapter_is_of_this_base_and_changes_what_a_small_memory_tells(model: Qwen2_5OmniStreaming) -> None:
    folder = FOLDER.with_name("tiny-omni-budget-lora")
    tuned = load_model(FOLDER, dtype="float32", device="cpu", adapter=folder)
    assert isinstance(tuned, Qwen2_5OmniStreaming)
    spec = adapter_memory(folder, tuned).at(49)
    free = Form("omnimem", allocation=0.5).spec(49)
    assert spec.replace(selector_options={}) == free.replace(selector_options={})
    specs = [make_clip(WorldSettings(), 6, "val", i) for i in range(10)]
    askers = [
        Asker(streams, clip_set(streams, specs, 12)) for streams in (WorldStreams(m, 112) for m in (model, tuned))
    ]
    base, adapted = (by_kind(asker, asker.answers(s))["all"] for asker, s in zip(askers, (free, spec), strict=True))
    assert adapted > base + 0.03
