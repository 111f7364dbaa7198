"""Budgets across layers: what is measured, the table made of it, and lengths that differ by layer in use."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import omni_clips
import pytest
import torch

from omnimem_train.calibration import CalibrationConfig, Recorder, calibrate, measure, spread, statistics, table
from omnimem_train.cli import main
from omnimem_train.config import load_config
from omnimem_train.data import DataConfig
from omnimem_train.errors import UserError
from omnimem_train.evaluate import Setting
from omnimem_train.evaluation import EvalConfig, describe
from omnimem_train.export import adapter_memory
from omnimem_train.manifest import Sample, load_manifest
from omnimem_train.memory import AUDIO, TEXT, VISUAL, Candidates, LayerMemory, MemorySpec, Scored
from omnimem_train.memory.allocation import Avba, make_allocation
from omnimem_train.models.interface import StreamingModel
from omnimem_train.models.loading import ModelConfig, load_model
from omnimem_train.session import StreamSession
from omnimem_train.streaming import Stream, StreamState, encode

SPEC = MemorySpec(selector="omnimem", budget=24, chunk_tokens=48, allocation="avba")


def stream_of(model: StreamingModel, clip: omni_clips.Clip, spec: MemorySpec) -> StreamState:
    stream = Stream(model, spec)
    encoder = model.open(clip.info, clip.fps)
    return stream.flush(stream.feed_all(stream.start(), encode(encoder, clip.windows(2.0))))


def test_what_is_noted_of_a_layer() -> None:
    """Two candidates of each modality with known importance and no redundancy: entropies by hand."""
    n = 5
    modality = torch.tensor([[TEXT, VISUAL, VISUAL, AUDIO, AUDIO]], dtype=torch.int8)
    row = torch.arange(n)[None]
    keys = torch.zeros(1, 1, n, 4)
    tokens = LayerMemory.from_chunk(keys, keys, row[..., None].expand(1, n, 3), modality, row.float(), row)
    c = Candidates(tokens, 0, torch.zeros(1, 1, 0, 4), torch.zeros(0, dtype=torch.int64), 1.0, layer=1, n_layers=2)
    importance = torch.tensor([[[9.0, 0.25, 0.25, 0.1, 0.4]]])
    scored = Scored(importance, importance, torch.zeros(1, 1, n))
    recorder = Recorder(Avba(prior=2.0, floor=0.0), 2)
    assert recorder.counts(c, scored, 3)[1][1].tolist() == [[1]]
    entropy = -sum(p * math.log(p) for p in (0.25, 0.25, 0.1, 0.4))
    assert recorder.complexity == [[], [pytest.approx(entropy, abs=1e-6)]]
    c_a = -(0.2 * math.log(0.2) + 0.8 * math.log(0.8)) / math.log(2)  # picture is at its maximum, 1
    assert recorder.audio_share == [[], [pytest.approx(c_a / (2 + c_a), abs=1e-6)]]
    silent = replace(c, tokens=replace(tokens, modality=tokens.modality.clamp(max=VISUAL)))
    recorder.counts(silent, scored, 3)
    assert [len(x[1]) for x in (recorder.complexity, recorder.audio_share)] == [2, 1]


def test_measuring_changes_nothing(nano_session: StreamingModel) -> None:
    clip = omni_clips.Clip(8.0, 2.0)
    inner = make_allocation("avba")
    want = stream_of(nano_session, clip, SPEC)
    stream = Stream(nano_session, SPEC)
    stream.chooser.allocation = Recorder(inner, 3)
    encoder = nano_session.open(clip.info, 2.0)
    got = stream.flush(stream.feed_all(stream.start(), encode(encoder, clip.windows(2.0))))
    for a, b in zip(want.layers, got.layers, strict=True):
        assert torch.equal(a.index, b.index)
    recorder = measure(nano_session, SPEC, nano_session.open(clip.info, 2.0), clip.windows(2.0))
    assert {len(x) for x in recorder.complexity} == {got.n_chunks}  # every chunk overfills a memory of 24
    assert all(0 < share < 1 for layer in recorder.audio_share for share in layer)


def test_chunks_that_fit_are_not_measured(nano_session: StreamingModel) -> None:
    clip = omni_clips.Clip(8.0, 2.0)
    n = stream_of(nano_session, clip, SPEC.at(None)).layers[0].n_tokens
    spec = SPEC.replace(budget=n // 2)
    recorder = measure(nano_session, spec, nano_session.open(clip.info, 2.0), clip.windows(2.0))
    assert 0 < len(recorder.complexity[0]) < -(-n // SPEC.chunk_tokens)


def recorded(complexity: list[list[float]], audio: list[list[float]]) -> Recorder:
    r = Recorder(Avba(), len(complexity))
    r.complexity, r.audio_share = complexity, audio
    return r


def test_clips_count_alike_and_shares_follow_the_softmax() -> None:
    """A clip of many chunks weighs as much as one of few."""
    config = CalibrationConfig(memory=SPEC.replace(budget=500), temperature=0.2, per_modality=True)
    found = [
        recorded([[0.9, 1.1, 1.0], [1.2, 1.3, 1.1]], [[0.1] * 3, [0.2, 0.3, 0.4]]),
        recorded([[2.0], [2.2]], [[], []]),
    ]
    layers = statistics(found, config)
    assert [layer["complexity"] for layer in layers] == pytest.approx([1.5, 1.7])
    assert [layer["complexity_std"] for layer in layers] == pytest.approx([0.5, 0.5])
    assert [layer["audio_share"] for layer in layers] == pytest.approx([0.1, 0.3])
    share = 1 / (1 + math.e)
    totals = [sum(entry) for entry in table(layers, config)]
    assert sum(totals) == 1000
    assert totals[0] == pytest.approx(1000 * share, abs=2)
    assert [entry[0] for entry in table(layers, config)] == [round(0.1 * totals[0]), round(0.3 * totals[1])]
    assert table(layers, replace(config, per_modality=False)) == totals
    even = table(layers, replace(config, temperature=1e6, per_modality=False))
    assert even == [500, 500]
    low = [{"complexity": 1.0, "audio_share": 0.0}] * 2  # the floor of AVBA holds in the table too
    assert table(low, config) == [[10, 490], [10, 490]]


def test_no_sound_or_nothing_dropped_is_said() -> None:
    config = CalibrationConfig(memory=SPEC, per_modality=True)
    silent = [recorded([[1.0], [2.0]], [[], []])]
    with pytest.raises(UserError, match="picture and sound together"):
        statistics(silent, config)
    assert statistics(silent, replace(config, per_modality=False))[0]["audio_share"] is None
    with pytest.raises(UserError, match="no clip fills a memory of 24 tokens"):
        statistics([], config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"clips": 0}, "clips=0"),
        ({"memory": SPEC.replace(layer_table=(5, 5))}, "with memory.layer_table"),
        ({"memory": SPEC.replace(selector="full")}, "selector 'full'"),
        ({"memory": SPEC.replace(budget=None)}, "memory.budget=None"),
        ({"memory": SPEC.replace(budget="1MiB")}, "memory.budget='1MiB'"),
        ({"memory": SPEC.replace(allocation="fixed", allocation_options={"audio": 1, "visual": 2})}, "'fixed'"),
        ({"memory": SPEC.replace(allocation="shared"), "per_modality": True}, "per_modality with allocation 'shared'"),
    ],
    ids=str,
)
def test_settings_that_measure_nothing(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CalibrationConfig(**{"memory": SPEC} | changes)


def test_clips_are_spread_over_the_manifest_and_files_count_once() -> None:
    samples = [Sample(str(i), Path(f"{i // 2}.mp4"), None, True, ()) for i in range(20)]
    assert [s.id for s in spread(samples, 5)] == ["0", "4", "8", "12", "16"]
    assert len(spread(samples, 99)) == 10


@pytest.fixture(scope="module")
def settings(rendered: Path, nano_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> CalibrationConfig:
    return CalibrationConfig(
        model=ModelConfig(str(nano_folder), device="cpu"),
        data=DataConfig(rendered / "train.json", workers=0),
        memory=SPEC,
        clips=2,
        per_modality=True,
        output=tmp_path_factory.mktemp("calibration") / "table.json",
    )


def test_the_file(settings: CalibrationConfig, nano_session: StreamingModel, tmp_path: Path) -> None:
    report = calibrate(settings, nano_session)
    assert json.loads(settings.output.read_text()) == report
    spec = MemorySpec(layer_table=str(settings.output))
    assert [list(entry) for entry in spec.layer_table] == report["layer_table"]
    assert spec.mean_tokens == 24
    assert [c["id"] for c in report["clips"]] == sorted(s.id for s in spread(load_manifest(settings.data.manifest), 2))
    assert all(c["chunks"] > 1 for c in report["clips"])
    again = calibrate(replace(settings, output=tmp_path / "b.json", model=replace(settings.model)), nano_session)
    assert again["fingerprints"] == report["fingerprints"]
    assert again["layer_table"] == report["layer_table"]
    other = calibrate(replace(settings, temperature=5.0, output=tmp_path / "c.json"), nano_session)
    assert other["fingerprints"]["settings"] != report["fingerprints"]["settings"]
    assert other["fingerprints"]["model"] == report["fingerprints"]["model"]
    totals, flatter = ([sum(e) for e in r["layer_table"]] for r in (report, other))
    assert len(set(totals)) > 1
    assert max(flatter) - min(flatter) < max(totals) - min(totals)


def test_a_broken_clip_stops_it_or_is_passed_over(
    settings: CalibrationConfig, nano_session: StreamingModel, rendered: Path, tmp_path: Path
) -> None:
    entries = json.loads((rendered / "train.json").read_text())[:2]
    (tmp_path / "broken.mp4").write_bytes(b"not a video" * 100)
    for entry, video in zip(entries, (rendered / entries[0]["video"], tmp_path / "broken.mp4"), strict=True):
        entry["video"] = str(video)
    manifest = tmp_path / "m.json"
    manifest.write_text(json.dumps(entries))
    config = replace(settings, data=replace(settings.data, manifest=manifest), output=tmp_path / "t.json")
    with pytest.raises(UserError, match=r"broken\.mp4"):
        calibrate(config, nano_session)
    config = replace(config, data=replace(config.data, max_broken=1))
    assert [c["id"] for c in calibrate(config, nano_session)["clips"]] == [entries[0]["id"]]


def test_clips_that_fit_are_listed_and_not_counted(
    settings: CalibrationConfig, nano_session: StreamingModel, tmp_path: Path
) -> None:
    config = replace(settings, memory=SPEC.replace(budget=5000), output=tmp_path / "t.json")
    with pytest.raises(UserError, match="no clip fills a memory of 5000 tokens"):
        calibrate(config, nano_session)
    assert not config.output.exists()


def test_the_command(settings: CalibrationConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "calibrate.yaml"
    recipe.write_text(
        f"model: {{path: {settings.model.path}, device: cpu}}\ndata: {{manifest: {settings.data.manifest}}}\n"
        "memory: {selector: perturbation, budget: 20, chunk_tokens: 40}\nclips: 1\n"
    )
    assert main(["calibrate", str(recipe), f"output={tmp_path / 'out' / 'table.json'}"]) == 0
    assert f"memory.layer_table={tmp_path / 'out' / 'table.json'}" in capsys.readouterr().out
    spec = load_config(MemorySpec, None, [f"layer_table={tmp_path / 'out' / 'table.json'}"])
    assert sum(spec.layer_table) == 3 * 20
    assert main(["calibrate", str(recipe), "temperature=0"]) == 2


# Lengths that differ by layer -----------------------------------------------------------------------------------------

UNEVEN = MemorySpec(selector="omnimem", chunk_tokens=40, layer_table=(8, [20, 4], 40))


@pytest.mark.parametrize("selector", ["omnimem", "perturbation"])
@pytest.mark.parametrize("budget", [None, 12, 60])
def test_every_layer_keeps_to_its_own_budget(nano_session: StreamingModel, selector: str, budget: int | None) -> None:
    spec = UNEVEN.replace(selector=selector) if budget is None else UNEVEN.replace(selector=selector).at(budget)
    state = stream_of(nano_session, omni_clips.Clip(8.0, 2.0), spec)
    kept = [(m.modality == AUDIO).sum(-1) + (m.modality == VISUAL).sum(-1) for m in state.layers]
    budgets = spec.layer_budgets(3, 1, 1, 1)
    assert [int(k.unique()) for k in kept] == [b.total for b in budgets if b is not None]
    assert int((state.layers[1].modality == AUDIO).sum(-1).unique()) == (budgets[1].audio if budgets[1] else None)


@pytest.mark.parametrize("positions", ["absolute", "compact"])
def test_sessions_with_uneven_layers_go_on_after_a_file(
    nano_session: StreamingModel, positions: str, tmp_path: Path
) -> None:
    clip, spec = omni_clips.Clip(8.0, 2.0), UNEVEN.replace(positions=positions)
    windows = list(clip.windows(2.0))
    whole = StreamSession(nano_session, spec, clip.info, 2.0)
    half = StreamSession(nano_session, spec, clip.info, 2.0)
    for session, part in ((whole, windows), (half, windows[:2])):
        for window in part:
            session.feed(window)
    half.save(tmp_path / "half.safetensors")
    again = StreamSession.load(tmp_path / "half.safetensors", nano_session, spec)
    for window in windows[2:]:
        again.feed(window)
    assert again.kept_tokens() == whole.kept_tokens()
    assert len(set(whole.kept_tokens())) == 3
    for a, b in zip(again.state.layers, whole.state.layers, strict=True):
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.positions, b.positions)
    assert again.ask("Which?", 4) == whole.ask("Which?", 4)


@pytest.mark.slow
def test_training_and_export_with_uneven_layers(rendered: Path, nano_folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
model: {{path: {nano_folder}, device: cpu}}
lora: {{r: 4, alpha: 8}}
data: {{manifest: {rendered / "train.json"}, workers: 0}}
budgets: {{low: 4, high: 40, full_share: 0}}
train: {{steps: 2, log_every: 1, lr: 1.0e-3, warmup_steps: 0, output: {tmp_path / "run"}}}
"""
    )
    (tmp_path / "table.json").write_text('{"layer_table": [8, [20, 4], 40]}')
    table = [f"memory.layer_table={tmp_path / 'table.json'}", "memory.chunk_tokens=40"]
    assert main(["train", str(recipe), *table]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "adapter")]) == 0
    spec = adapter_memory(tmp_path / "adapter", load_model(nano_folder, device="cpu"))
    assert [list(e) if isinstance(e, tuple) else e for e in spec.layer_table] == [8, [20, 4], 40]
    short = ["memory.layer_table=[8, 8]", f"train.output={tmp_path / 'other'}"]
    assert main(["train", str(recipe), *short]) == 2


def test_evaluation_scales_a_table_or_takes_it_as_it_is() -> None:
    def specs(*budgets: int | str, memory: MemorySpec = UNEVEN) -> list[tuple[str, MemorySpec]]:
        config = EvalConfig(memory=memory, selectors=("omnimem",), budgets=budgets)
        return [(s.name, s.spec) for s in config.settings()]

    found = dict(specs("table", 48, "full"))
    assert found["omnimem@table"].layer_table == UNEVEN.layer_table
    assert found["omnimem@48"].layer_table == (16, [40, 8], 80)
    assert found["full"].unlimited
    assert describe(Setting("omnimem@table", found["omnimem@table"]))["budget"] == 24
    with pytest.raises(UserError, match="'table' without a layer table"):
        specs("table", memory=SPEC)
    with pytest.raises(UserError, match="cannot be scaled to the size"):
        specs("1MiB")


def test_uneven_lengths_stream_on_salmonn(salmonn_folder: Path) -> None:
    model = load_model(salmonn_folder, device="cpu")
    clip = omni_clips.Clip(8.0, 1.0)
    spec = UNEVEN.at(16)
    stream, encoder = Stream(model, spec), model.open(clip.info, 1.0, max_pixels=3136)
    state = stream.start()
    for block in encode(encoder, clip.windows(2.0)):
        state = stream.feed(state, block)
        for memory, budget in zip(state.layers, spec.layer_budgets(3, 1, 1, 1), strict=True):
            assert budget is not None
            assert int((memory.modality != TEXT).sum(-1).amax()) <= budget.total
    lengths = [m.n_tokens for m in stream.flush(state).layers]
    assert lengths[0] < lengths[2]
    assert stream.generate(stream.flush(state), encoder, torch.tensor([5, 6]), 4) is not None
