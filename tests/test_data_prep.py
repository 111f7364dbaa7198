"""The recall world: clips that follow from their seed, pictures and sound true to the log, and real files."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep import render as rendering
from data_prep.arrays import occurrences, render_frames, render_sound, shape_mask, token_labels
from data_prep.encode import comment_of
from data_prep.manifests import manifests
from data_prep.render import RenderConfig, clip_path, main, render, specs
from data_prep.world import (
    COLOURS,
    PATTERNS,
    PITCHES,
    SHAPES,
    SPLITS,
    WorldSettings,
    crop,
    is_held_out,
    make_clip,
)
from omnimem_train.benchmarks import CLOZE, load_choices
from omnimem_train.errors import UserError
from omnimem_train.manifest import load_manifest
from omnimem_train.media import read_windows

SMALL = WorldSettings(seconds=12.0, size=64)
DEFAULT = WorldSettings()
QUIET = replace(DEFAULT, loudness=0.0, faint=0.5)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    render(folder, RenderConfig(SMALL, clips=6))
    return folder


def test_clips_follow_from_seed_split_and_index() -> None:
    assert make_clip(SMALL, 0, "train", 3) == make_clip(SMALL, 0, "train", 3)
    others = [make_clip(SMALL, seed, split, i) for seed in (0, 1) for split in SPLITS for i in range(20)]
    assert len({spec.fingerprint() for spec in others}) == len(others)
    assert len({(spec.sights, spec.sounds) for spec in others}) == len(others)  # splits share no clip


def test_events_keep_to_their_slots() -> None:
    for index in range(50):
        spec = make_clip(DEFAULT, 0, "train", index)
        seen, heard = ({e.slot for e in events} for events in (spec.sights, spec.sounds))
        assert (len(seen), len(heard)) == (len(spec.sights), len(spec.sounds)) == (15, 15)
        assert len(seen & heard) >= len(seen | heard) / 2
        for e in (*spec.sights, *spec.sounds):
            assert 3 * e.slot <= e.start_s < e.end_s <= 3 * e.slot + 3
            assert 1 <= e.end_s - e.start_s <= 2.5
            assert e.start_s % 0.5 == e.end_s % 0.5 == 0
        span = {e.slot: (e.start_s, e.end_s) for e in spec.sights}
        assert all(span[e.slot] == (e.start_s, e.end_s) for e in spec.sounds if e.slot in span)
        things = {e.shape: e.colour for e in spec.sights} | {e.pattern: e.pitch for e in spec.sounds}
        assert all(things[e.shape] == e.colour for e in spec.sights)
        assert all(things[e.pattern] == e.pitch for e in spec.sounds)
        cells = [(e.shape, e.row, e.column) for e in spec.sights]
        assert len(set(cells)) == len(cells)  # copies stand elsewhere


def test_copies_and_faint_events_are_as_often_as_asked() -> None:
    def mean_copies(copies: float) -> float:
        clips = [make_clip(replace(DEFAULT, copies=copies), 0, "train", i) for i in range(200)]
        counts = [n for c in clips for n in Counter(e.shape for e in c.sights).values()]
        return sum(counts) / len(counts) - 1

    assert mean_copies(0) < mean_copies(0.5) < mean_copies(2)
    assert 0.35 < mean_copies(0.5) < 0.8
    events = [e for i in range(200) for e in make_clip(DEFAULT, 0, "train", i).sights]
    assert 0.13 < sum(e.faint for e in events) / len(events) < 0.17


def test_combinations_held_out_for_test() -> None:
    for names, partners in ((SHAPES, COLOURS), (PATTERNS, PITCHES)):
        table = np.array([[is_held_out(name, partner) for partner in partners] for name in names])
        assert (table.sum(1) == 1).all()
        assert (table.sum(0) == 2).all()
    for split, low, high in (("train", 0, 0), ("val", 0, 0), ("test", 0.45, 0.55)):
        clips = [make_clip(DEFAULT, 0, split, i) for i in range(100)]
        held = [is_held_out(shape, colour) for c in clips for shape, colour in {(e.shape, e.colour) for e in c.sights}]
        held += [is_held_out(*thing) for c in clips for thing in {(e.pattern, e.pitch) for e in c.sounds}]
        assert low <= sum(held) / len(held) <= high


def test_a_part_of_a_clip_is_a_clip() -> None:
    spec = make_clip(DEFAULT, 0, "val", 1)
    part, whole = token_labels(crop(spec, 15, 39)), token_labels(spec)
    assert (part["visual"] == whole["visual"][15:39]).all()
    assert (part["audio"] == whole["audio"][15 * 25 : 39 * 25]).all()
    assert crop(spec, 15, 39).settings.seconds == 24
    assert all(0 <= d.start_s < d.end_s <= 24 for d in crop(spec, 15, 39).distractors)
    for start_s, end_s in ((1, 31), (30, 63), (30, 30)):
        with pytest.raises(UserError, match="multiples of 3"):
            crop(spec, start_s, end_s)


def test_a_clip_looks_and_sounds_the_same_in_any_batch() -> None:
    clips = [make_clip(SMALL, 0, "train", i) for i in range(3)]
    frames, sound = render_frames(clips, 2), render_sound(clips)
    assert (frames.shape, frames.dtype) == ((3, 24, 64, 64, 3), torch.uint8)
    assert (sound.shape, sound.dtype) == ((3, 12 * 16000), torch.float32)
    assert torch.equal(render_frames(clips[1:2], 2)[0], frames[1])
    assert torch.equal(render_sound(clips[1:2])[0], sound[1])
    assert torch.equal(render_frames(clips, 2, part=(5, 19)), frames[:, 5:19])
    assert not torch.equal(sound[0, -8000:], sound[1, -8000:])  # noise of its own


def test_pixels_show_what_the_log_says() -> None:
    """A shape's pixels have its colour exactly while it is there, or a mixture with the background if it is faint."""
    faint, checked = 0, 0
    for index in range(4):
        spec = make_clip(QUIET, 0, "val", index)
        frames = render_frames([spec], 2)[0].numpy().astype(int)
        empty = render_frames([replace(spec, sights=())], 2)[0].numpy().astype(int)
        expected = empty.copy()
        for e in spec.sights:
            part = np.s_[round(2 * e.start_s) : round(2 * e.end_s), e.row * 28 : e.row * 28 + 28]
            cell = expected[part][:, :, e.column * 28 : e.column * 28 + 28]
            mask = shape_mask(e.shape, 28)
            new = cell[:, mask] + (0.45 if e.faint else 1) * (np.array(COLOURS[e.colour]) - cell[:, mask])
            cell[:, mask] = np.round(new)
            faint, checked = faint + e.faint, checked + 1
        assert np.abs(frames - expected).max() <= 1
        assert empty.min() > 10 and empty.max() < 120  # backgrounds are dark
        assert np.abs(np.diff(empty, axis=0)).max() <= 6  # and drift slowly
    assert checked == 60
    assert 15 < faint < 45


def test_distractors_are_as_loud_as_asked() -> None:
    spec = make_clip(DEFAULT, 0, "train", 0)
    cells, noise = [], []
    for loudness in (0.0, 1.0, 2.0):
        changed = replace(spec, sights=(), sounds=(), settings=replace(DEFAULT, loudness=loudness))
        none = replace(changed, distractors=())
        difference = render_frames([changed], 2)[0].float() - render_frames([none], 2)[0].float()
        cells.append(float(difference.abs().mean()))
        noise.append(float((render_sound([changed]) - render_sound([none])).abs().mean()))
    assert cells[0] == noise[0] == 0
    assert 1.3 < cells[2] / cells[1] < 2  # dark backgrounds cut the negative half
    assert 1.8 < noise[2] / noise[1] <= 2.01


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_differ_and_fit_their_cell(shape: str) -> None:
    mask = shape_mask(shape, 28)
    assert 0.15 < mask.mean() < 0.7
    assert not (mask[0].any() or mask[:, 0].any() or mask[-1].any() or mask[:, -1].any())
    assert all((mask != shape_mask(other, 28)).mean() > 0.1 for other in SHAPES if other != shape)


def test_sounds_have_their_pitch_and_pattern() -> None:
    """The strongest frequency of steady patterns is the pitch; faint ones are weaker; otherwise it is quiet."""
    steady, levels = Counter[str](), {False: [], True: []}
    for index in range(12):
        spec = make_clip(QUIET, 0, "train", index)
        samples = render_sound([spec])[0].numpy()
        quiet = np.ones(len(samples), bool)
        for sound in spec.sounds:
            part = slice(round(sound.start_s * 16000), round(sound.end_s * 16000))
            quiet[part] = False
            if sound.pattern in ("hum", "beeps", "pulse"):
                spectrum = np.abs(np.fft.rfft(samples[part]))
                assert abs(spectrum.argmax() * 16000 / (part.stop - part.start) - PITCHES[sound.pitch]) < 6
                steady[sound.pitch] += 1
            if sound.pattern == "hum":
                levels[sound.faint].append(samples[part].std())
        assert 0.002 < samples[quiet].std() < 0.006
    assert len(steady) == 6
    assert np.mean(levels[True]) == pytest.approx(0.2 * np.mean(levels[False]), rel=0.1)


def test_patterns_differ_at_every_pitch() -> None:
    """No two patterns have the same picture over time and frequency, at the same pitch or at different ones."""
    settings = replace(DEFAULT, seconds=36.0, loudness=0.0)
    base = make_clip(settings, 0, "train", 0).sounds[0]
    pictures = []
    for pitch in PITCHES:
        sounds = [
            replace(base, pattern=p, pitch=pitch, start_s=3.0 * i, end_s=3.0 * i + 2, slot=i, faint=False)
            for i, p in enumerate(PATTERNS)
        ]
        spec = replace(make_clip(settings, 0, "train", 0), sounds=tuple(sounds))
        waves = render_sound([spec])[0].view(12, 48000)[:, :32000]
        stft = torch.stft(waves, 512, 320, window=torch.hann_window(512), return_complex=True).abs()
        pictures.append((stft + 0.3).log().flatten(1))
    rows = torch.cat(pictures)
    rows = torch.nn.functional.normalize(rows - rows.mean(1, keepdim=True), dim=1)
    same = (rows @ rows.T).fill_diagonal_(0)
    assert same.max() < 0.9


def test_labels_name_what_tokens_show() -> None:
    spec = make_clip(QUIET, 0, "val", 2)
    labels = token_labels(spec)
    assert labels["visual"].shape == (60, 16, 2)
    assert labels["audio"].shape == (1500, 2)
    for e in spec.sights:
        middle = int((e.start_s + e.end_s) / 2)
        expected = [SHAPES.index(e.shape) + 1, list(COLOURS).index(e.colour) + 1]
        assert labels["visual"][middle, 4 * e.row + e.column].tolist() == expected
    for e in spec.sounds:
        heard = labels["audio"][round(25 * e.start_s) + 1 : round(25 * e.end_s) - 1]
        assert (heard == [PATTERNS.index(e.pattern) + 1, list(PITCHES).index(e.pitch) + 1]).all()
    covered = sum(e.end_s - e.start_s for e in spec.sounds) / 60
    assert (labels["audio"][:, 0] > 0).mean() == pytest.approx(covered, abs=0.01)
    assert ((labels["visual"][..., 0] > 0).sum(1) <= 2).all()  # two events at most meet in a second
    assert ((labels["visual"] > 0).all(-1) == (labels["visual"] > 0).any(-1)).all()


def test_occurrences_count_what_tokens_show() -> None:
    spec = make_clip(WorldSettings(copies=1.5), 0, "val", 2)
    labels, found = token_labels(spec), occurrences(spec)
    for kind in ("visual", "audio"):
        assert ((found[kind] > 0) == (labels[kind][..., 0] > 0)).all()
    for pattern in {e.pattern for e in spec.sounds}:
        numbers = found["audio"][labels["audio"][:, 0] == PATTERNS.index(pattern) + 1]
        assert list(dict.fromkeys(numbers.tolist())) == list(
            range(1, sum(e.pattern == pattern for e in spec.sounds) + 1)
        )
    for shape in {e.shape for e in spec.sights}:
        numbers = found["visual"][labels["visual"][..., 0] == SHAPES.index(shape) + 1]
        assert list(dict.fromkeys(numbers.tolist())) == list(range(1, sum(e.shape == shape for e in spec.sights) + 1))
    assert found["audio"].max() > 1 and found["visual"].max() > 1


def test_files_are_what_was_drawn(out: Path) -> None:
    spec = specs(RenderConfig(SMALL, clips=6))[0]
    frames, samples = render_frames([spec], 4)[0].numpy(), render_sound([spec])[0].numpy()
    for reader in ("decord", "pyav"):
        with read_windows(clip_path(out, spec), fps=4, window_s=2, reader=reader) as opened:
            windows = list(opened)
        assert len(windows) == 6
        assert np.abs(np.concatenate([w.frames for w in windows]).astype(int) - frames).mean() < 4
        heard = np.concatenate([w.samples for w in windows])
        assert len(heard) == len(samples)
        assert np.abs(heard - samples).mean() < 0.2 * np.abs(samples).mean()


def test_faint_events_survive_the_codecs(tmp_path: Path) -> None:
    spec = make_clip(replace(SMALL, seconds=30.0, faint=1.0), 0, "train", 0)
    rendering.render_clip(tmp_path / "faint.mp4", spec)
    with read_windows(tmp_path / "faint.mp4", fps=2, window_s=30) as opened:
        (window,) = opened
    frames, samples = render_frames([spec], 2)[0].numpy().astype(int), render_sound([spec])[0].numpy()
    for e in spec.sights:
        k, side = round(2 * e.start_s), 16
        cell = np.s_[k, e.row * side : e.row * side + side, e.column * side : e.column * side + side]
        mask = shape_mask(e.shape, side)
        shown, drawn = (f[cell].astype(int) for f in (window.frames, frames))
        assert np.abs(shown[mask].mean(0) - drawn[mask].mean(0)).max() < 20  # thin shapes lose some colour
    for e in spec.sounds:
        part = slice(round(e.start_s * 16000), round(e.end_s * 16000))
        error = window.samples[part] - samples[part]
        assert 10 * np.log10((samples[part] ** 2).mean() / (error**2).mean()) > 8  # dB


def test_manifests_load(out: Path) -> None:
    train, llava = (load_manifest(out / name) for name in ("train.json", "train_llava.json"))
    choices = {s: load_choices(out / f"{s}_choices.jsonl") for s in SPLITS[1:]}
    assert len(train) == 4
    clips = [{s.media for s in train}, *({c.media for c in items} for items in choices.values())]
    assert not clips[0] & clips[1] | clips[0] & clips[2] | clips[1] & clips[2]
    turns = [t for s in train for t in s.turns]
    assert 0 < sum(t.time_s is not None for t in turns) < len(turns) / 2
    assert sum(t.answer not in "ABCD" for t in turns) == 4  # a narration each
    assert [t.question for s in llava for t in s.turns] == [t.question for t in turns]
    assert [s.turns[0].answer for s in llava] == [t.answer for t in turns]
    asked = {t.question.splitlines()[-1] for t in turns if t.answer in "ABCD"}
    assert asked == {c.prompt.splitlines()[-1] for c in choices["val"]}  # trained as it is tested
    for split, items in choices.items():
        same = load_choices(out / f"{split}_lvomnibench.json", out / "clips", "lvomnibench")
        for name in ("id", "question", "options", "answer", "media"):
            assert [getattr(c, name) for c in same] == [getattr(c, name) for c in items]
        assert {c.meta["category"] for c in same} == {c.meta["category"] for c in items} <= {
            "colour", "pitch", "together", "order", "count", "when"
        }  # fmt: skip


def test_second_call_keeps_what_is_there(out: Path) -> None:
    """Same bytes of JSON; a missing, a foreign and an unfinished clip are rendered, the others kept."""
    names = [p.name for p in out.iterdir() if p.is_file()]
    assert len(names) == 8
    before = {name: (out / name).read_bytes() for name in names}
    clips = [clip_path(out, spec) for spec in specs(RenderConfig(SMALL, clips=6))]
    original = clips[0].read_bytes()
    stamp = clips[3].stat().st_mtime_ns
    clips[1].unlink()
    clips[2].rename(clips[0])
    clips[4].write_bytes(clips[4].read_bytes()[:-1000])
    clips[0].with_suffix(".part").write_bytes(b"half")
    assert render(out, RenderConfig(SMALL, clips=6)) == {"rendered": 4, "kept": 2}
    assert render(out, RenderConfig(SMALL, clips=6)) == {"rendered": 0, "kept": 6}
    assert {name: (out / name).read_bytes() for name in names} == before
    assert clips[0].read_bytes() == original
    assert clips[3].stat().st_mtime_ns == stamp
    assert comment_of(clips[0]) == specs(RenderConfig(SMALL, clips=6))[0].fingerprint()
    assert not list(out.rglob("*.part"))


def test_an_interrupted_rendering_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tmp_path), "--seconds", "4", "--size", "32", "--clips", "4"]
    written: list[Path] = []
    whole = rendering.write_clip

    def interrupted(path: Path, *rest: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        whole(path, *rest)

    monkeypatch.setattr(rendering, "write_clip", interrupted)
    assert main(arguments) == 130
    assert "goes on from here" in capsys.readouterr().err
    assert not (tmp_path / "train.json").exists()
    monkeypatch.setattr(rendering, "write_clip", whole)
    assert main(arguments) == 0
    assert "2 clips rendered, 2 kept" in capsys.readouterr().out


def test_other_settings_render_anew(tmp_path: Path) -> None:
    settings = WorldSettings(seconds=4.0, size=32)
    render(tmp_path, RenderConfig(settings, clips=3))
    assert render(tmp_path, RenderConfig(settings, clips=4)) == {"rendered": 1, "kept": 3}
    assert render(tmp_path, RenderConfig(settings, clips=3, seed=1))["rendered"] == 3


def test_a_clip_of_any_length(tmp_path: Path) -> None:
    for seconds in (4.0, 5.5, 31.0, 1200.0):
        spec = make_clip(replace(SMALL, seconds=seconds, size=32), 0, "test", 0)
        assert max(e.end_s for e in (*spec.sights, *spec.sounds)) <= seconds
        blocks = [block.shape[0] for block in rendering.frame_blocks(spec)]
        assert sum(blocks) == seconds * 4
        assert max(blocks) <= 64
    assert render_sound([spec]).shape == (1, 1200 * 16000)


def test_training_answers_are_letters_or_words() -> None:
    clips = [make_clip(WorldSettings(seconds=12.0), 0, "train", 0)]
    files = {words: manifests(clips, 0, narrate=False, words=words) for words in (False, True)}
    turns = {words: json.loads(text["train.json"])[0]["turns"] for words, text in files.items()}
    assert len(turns[False]) == len(turns[True]) > 5
    for letter, word in zip(turns[False], turns[True], strict=True):
        options = dict(line.split(". ", 1) for line in letter["question"].split("\n")[1:5])
        assert options[letter["answer"]] == word["answer"]
        assert word["question"] == CLOZE.format(question=letter["question"].split("\n")[0])
    said = json.loads(files[True]["train_llava.json"])
    assert [e["conversations"][1]["value"] for e in said] == [t["answer"] for t in turns[True]]
