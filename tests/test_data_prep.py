"""The rendered world: deterministic, true to its log, balanced, and real files."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_prep.encode import comment_of
from data_prep.questions import KINDS, QuestionMaker, narration
from data_prep.render import RenderConfig, clip_path, main, render, specs
from data_prep.world import COLOURS, PITCHES, SHAPES, SPLITS, WorldSettings, clip_arrays, make_clip, shape_mask
from omnimem_train.benchmarks import load_choices
from omnimem_train.errors import UserError
from omnimem_train.manifest import load_manifest
from omnimem_train.media import read_windows

SMALL = WorldSettings(seconds=12.0, size=64)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    render(folder, RenderConfig(SMALL, clips=6))
    return folder


def test_clips_follow_from_seed_split_and_index() -> None:
    assert make_clip(SMALL, 0, "train", 3) == make_clip(SMALL, 0, "train", 3)
    first, again = (clip_arrays(make_clip(SMALL, 0, "train", 3)) for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    others = [make_clip(SMALL, seed, split, i) for seed in (0, 1) for split in SPLITS for i in range(20)]
    assert len({spec.fingerprint() for spec in others}) == len(others)
    contents = {(spec.sights, spec.sounds) for spec in others}
    assert len(contents) == len(others)  # no clip of one split occurs in another


def test_events_stay_apart_and_inside_the_clip() -> None:
    for index in range(50):
        spec = make_clip(SMALL, 0, "train", index)
        assert len({s.shape for s in spec.sights}) == len(spec.sights) >= 2
        assert len({s.pattern for s in spec.sounds}) == len(spec.sounds) >= 2
        spans = sorted({(e.start_s, e.end_s, e.slot) for e in (*spec.sights, *spec.sounds)})
        assert all(1 <= end - start <= 3 for start, end, _ in spans)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))  # one slot at a time
        assert spans[0][0] >= 0
        assert spans[-1][1] <= SMALL.seconds
        assert {s.slot for s in spec.sights} & {s.slot for s in spec.sounds}  # some are seen and heard together


def test_pixels_show_what_the_log_says() -> None:
    """In every frame, a shape's pixels have its colour exactly while it is there."""
    checked = 0
    for index in range(10):
        spec = make_clip(SMALL, 0, "val", index)
        frames, _ = clip_arrays(spec)
        side = SMALL.size // SMALL.grid
        assert frames.shape == (48, 64, 64, 3)
        for sight in spec.sights:
            top, left = sight.row * side, sight.column * side
            mask = shape_mask(sight.shape, side)
            inside = frames[:, top : top + side, left : left + side][:, mask]
            shown = (inside == np.array(COLOURS[sight.colour])).all((1, 2))
            times = np.arange(48) / SMALL.fps
            there = (times >= sight.start_s) & (times < sight.end_s)
            others = [
                (times >= o.start_s) & (times < o.end_s) for o in spec.sights if o != sight
            ]  # may cover its pixels
            assert (shown == there)[~np.any(others, 0)].all()
            assert shown[there].all()
            checked += 1
    assert checked >= 20


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_differ_and_fit_their_cell(shape: str) -> None:
    mask = shape_mask(shape, 28)
    assert 0.15 < mask.mean() < 0.7
    assert not mask[0].any()
    assert not mask[:, 0].any()
    assert all((mask != shape_mask(other, 28)).mean() > 0.05 for other in SHAPES if other != shape)


def test_sounds_have_their_pitch() -> None:
    """The strongest frequency of a hum and of beeps is the pitch; between sounds it is quiet."""
    quiet, checked = WorldSettings(seconds=12.0, size=64, distractors_per_s=0), Counter[str]()
    for index in range(40):
        spec = make_clip(quiet, 0, "train", index)
        _, samples = clip_arrays(spec)
        busy = np.zeros(len(samples), bool)
        for sound in spec.sounds:
            part = slice(round(sound.start_s * 16000), round(sound.end_s * 16000))
            busy[part] = True
            if sound.pattern in ("hum", "beeps"):
                spectrum = np.abs(np.fft.rfft(samples[part]))
                strongest = spectrum.argmax() * 16000 / (part.stop - part.start)
                assert abs(strongest - PITCHES[sound.pitch]) < 6
                checked[sound.pitch] += 1
        assert np.abs(samples[~busy]).max() < 0.05
        assert np.abs(samples[busy]).max() > 0.3
    assert len(checked) == 4


def answers_from_log(spec, question) -> str:
    """The right option's text, worked out from the events without the question maker."""
    word = question.text.rstrip("?").split()
    if question.kind == "colour":
        return next(s.colour for s in spec.sights if s.shape == word[-1])
    if question.kind == "pitch":
        return next(s.pitch for s in spec.sounds if s.pattern == word[-1])
    if question.kind == "together":
        sound = next(s for s in spec.sounds if s.pattern == word[word.index("the") + 1])
        return next(s.shape for s in spec.sights if s.start_s <= sound.start_s < s.end_s)
    starts = {s.shape: s.start_s for s in spec.sights} | {s.pattern: s.start_s for s in spec.sounds}
    return min(question.options, key=lambda name: starts[name])


def test_answers_are_right_balanced_and_known_in_time() -> None:
    maker, letters, kinds = QuestionMaker(0, 0), Counter[tuple[str, str]](), Counter[str]()
    for index in range(100):
        spec = make_clip(WorldSettings(), 0, "train", index)
        for q in maker.ask(spec):
            assert len(set(q.options)) == 4
            assert q.options["ABCD".index(q.answer)] == answers_from_log(spec, q), (q, spec)
            assert 0 < q.known_s <= 16
            letters[q.kind, q.answer] += 1
            kinds[q.kind] += 1
    assert set(kinds) == set(KINDS)
    assert all(abs(n - kinds[kind] / 4) <= 1 for (kind, _), n in letters.items())


def test_no_option_gives_itself_away() -> None:
    """A guesser that sees options but no clip stays at chance: no attribute is right more often than it is offered."""
    maker, right, offered = QuestionMaker(0, 0), Counter[str](), Counter[str]()
    for index in range(400):
        for q in maker.ask(make_clip(WorldSettings(), 0, "train", index)):
            if q.kind != "order":
                offered.update(q.options)
                right[q.options["ABCD".index(q.answer)]] += 1
    for name, n in offered.items():
        assert abs(right[name] / n - 0.25) < 5 * (0.25 * 0.75 / n) ** 0.5, name


def test_narration_names_every_event_in_order() -> None:
    spec = make_clip(SMALL, 0, "train", 0)
    text = narration(spec)
    assert all(f"{s.colour} {s.shape}" in text for s in spec.sights)
    assert all(f"{s.pitch} {s.pattern}" in text for s in spec.sounds)
    events = sorted((*spec.sights, *spec.sounds), key=lambda e: e.start_s)
    places = [text.index(getattr(e, "shape", None) or e.pattern) for e in events if e in spec.sights]
    assert places == sorted(places)


def test_files_are_what_was_drawn(out: Path) -> None:
    spec = specs(RenderConfig(SMALL, clips=6))[0]
    frames, samples = clip_arrays(spec)
    for reader in ("decord", "pyav"):
        with read_windows(clip_path(out, spec), fps=4, window_s=2, reader=reader) as opened:
            windows = list(opened)
        assert len(windows) == 6
        assert np.abs(np.concatenate([w.frames for w in windows]).astype(int) - frames).mean() < 4
        heard = np.concatenate([w.samples for w in windows])
        assert len(heard) == len(samples)
        assert np.abs(heard - samples).mean() < 0.2 * np.abs(samples).mean()


def test_manifests_load(out: Path) -> None:
    train, val, test = (
        load_manifest(out / "train.json"),
        *(load_choices(out / f"{s}_choices.jsonl") for s in SPLITS[1:]),
    )
    assert len(train) == 4
    clips = [{s.media for s in train}, {c.media for c in val}, {c.media for c in test}]
    assert not clips[0] & clips[1] | clips[0] & clips[2] | clips[1] & clips[2]
    turns = [t for s in train for t in s.turns]
    early = sum(t.time_s is not None for t in turns)
    assert 0 < early < len(turns) / 2
    assert sum(t.answer not in "ABCD" for t in turns) == 4  # a narration each
    asked = {t.question.splitlines()[-1] for t in turns if t.answer in "ABCD"}
    assert asked == {c.prompt.splitlines()[-1] for c in val}  # trained as it is tested


def test_second_call_keeps_what_is_there(out: Path, tmp_path: Path) -> None:
    """Same bytes of JSON; a missing, a foreign and an unfinished clip are rendered, the others kept."""
    names = ("train.json", "val_choices.jsonl", "test_choices.jsonl", "events.jsonl", "settings.json")
    before = {name: (out / name).read_bytes() for name in names}
    clips = specs(RenderConfig(SMALL, clips=6))
    first = clip_path(out, clips[0])
    original = first.read_bytes()
    stamp = clip_path(out, clips[3]).stat().st_mtime_ns
    clip_path(out, clips[1]).unlink()
    clip_path(out, clips[2]).rename(first)
    first.with_suffix(".part").write_bytes(b"half")
    assert render(out, RenderConfig(SMALL, clips=6)) == {"rendered": 3, "kept": 3}
    assert render(out, RenderConfig(SMALL, clips=6)) == {"rendered": 0, "kept": 6}
    assert {name: (out / name).read_bytes() for name in names} == before
    assert first.read_bytes() == original
    assert clip_path(out, clips[3]).stat().st_mtime_ns == stamp
    assert comment_of(first) == clips[0].fingerprint()
    assert not list((out / "clips").glob("*.part"))


def test_other_settings_render_anew(out: Path, tmp_path: Path) -> None:
    config = RenderConfig(WorldSettings(seconds=4.0, size=32), clips=3)
    render(tmp_path, config)
    assert render(tmp_path, RenderConfig(WorldSettings(seconds=4.0, size=32), clips=4)) == {"rendered": 1, "kept": 3}
    assert render(tmp_path, RenderConfig(WorldSettings(seconds=4.0, size=32), clips=3, seed=1))["rendered"] == 3


def test_a_clip_of_any_length() -> None:
    for seconds in (4.0, 5.5, 31.0, 120.0):
        spec = make_clip(WorldSettings(seconds=seconds, size=32), 0, "test", 0)
        frames, samples = clip_arrays(spec)
        assert (len(frames), len(samples)) == (seconds * 4, seconds * 16000)
        assert QuestionMaker(0, 2).ask(spec)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["--seconds", "2"], "seconds"), (["--clips", "2"], "training clip"), (["--early", "2"], "early"),
     (["--size", "31"], "even")],
)  # fmt: skip
def test_impossible_settings_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], word: str
) -> None:
    assert main([str(tmp_path / "w"), *arguments]) == 2
    assert word in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        render(tmp_path / "file" / "w", RenderConfig(SMALL, clips=3))


def test_settings_are_recorded(out: Path) -> None:
    settings = json.loads((out / "settings.json").read_text())
    assert settings["world"]["seconds"] == 12.0
    assert settings["clips"] == 6
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert [e["id"] for e in events] == [s.id for s in specs(RenderConfig(SMALL, clips=6))]
