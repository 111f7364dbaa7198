"""Bad input to the recall world: every mistake is named, and nothing is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.render import RenderConfig, main, render
from data_prep.world import WorldSettings
from omnimem_train.benchmarks import load_choices
from omnimem_train.errors import UserError
from omnimem_train.manifest import load_manifest

SMALL = RenderConfig(WorldSettings(seconds=12.0, size=32), clips=3)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    render(folder, SMALL)
    return folder


@pytest.fixture
def out(world: Path, tmp_path: Path) -> Path:
    """A rendered world to be damaged."""
    return Path(shutil.copytree(world, tmp_path / "world"))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["--seconds", "2"], "seconds"), (["--clips", "2"], "training clip"), (["--early", "2"], "early"),
     (["--size", "31"], "even"), (["--slot-s", "2.6"], "multiple of 0.5"), (["--loudness", "-1"], "loudness"),
     (["--copies", "nan"], "copies"), (["--faint", "1.5"], "faint"), (["--sound-share", "2"], "sound_share"),
     (["--questions-per-clip", "-1"], "questions_per_clip"), (["--grid", "0"], "grid")],
)  # fmt: skip
def test_impossible_settings_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], word: str
) -> None:
    assert main([str(tmp_path / "w"), *arguments]) == 2
    assert word in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_all_impossible_settings_are_named_at_once() -> None:
    with pytest.raises(UserError, match=r"(?s)seconds.*fps.*loudness"):
        WorldSettings(seconds=1, fps=0, loudness=99)


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        render(tmp_path / "file" / "w", SMALL)


@pytest.mark.parametrize("name", ["clips/train-00000", "train"])
def test_full_disk(tmp_path: Path, name: str) -> None:
    """Neither a clip nor a manifest is left half-written; with space the same call goes on."""
    (tmp_path / "clips").mkdir()
    (tmp_path / name).with_suffix(".part").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"(?s)cannot be written.*No space left"):
        render(tmp_path, SMALL)
    assert not list(tmp_path.rglob("*.part"))
    assert not (tmp_path / "settings.json").exists()
    assert render(tmp_path, SMALL)["kept"] == len(list((tmp_path / "clips").iterdir())) * (name == "train")


@pytest.mark.parametrize("name", ["train.json", "test_choices.jsonl", "val_lvomnibench.json"])
def test_a_manifest_edited_by_hand_is_not_overwritten(out: Path, name: str) -> None:
    edited = (out / name).read_text().replace("A", "B")
    (out / name).write_text(edited)
    with pytest.raises(UserError, match=rf"{name} changed since"):
        render(out, SMALL)
    assert (out / name).read_text() == edited
    (out / name).rename(out / "mine.json")
    assert render(out, SMALL)["kept"] == 3
    assert (out / name).exists()


def test_a_damaged_record(out: Path) -> None:
    (out / "settings.json").write_text("[1, 2")
    with pytest.raises(UserError, match=r"settings.json: is no record"):
        render(out, SMALL)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    entries = json.loads(path.read_text())
    change(entries)
    path.write_text(json.dumps(entries))


def test_a_question_without_an_answer(out: Path) -> None:
    """Taken out by hand, it is named by the loaders: entry and key."""
    edit(out / "test_lvomnibench.json", lambda entries: entries[1].pop("correct_option"))
    with pytest.raises(UserError, match="entry 2: correct_option is missing"):
        load_choices(out / "test_lvomnibench.json", out / "clips", "lvomnibench")
    edit(out / "train.json", lambda entries: entries[0]["turns"][2].update(answer=""))
    with pytest.raises(UserError, match="entry 1, turn 3: answer is empty"):
        load_manifest(out / "train.json")
    edit(out / "train_llava.json", lambda entries: entries[0]["conversations"].pop())
    with pytest.raises(UserError, match="entry 1: conversations has 1 messages"):
        load_manifest(out / "train_llava.json")


def test_settings_are_recorded(out: Path) -> None:
    settings = json.loads((out / "settings.json").read_text())
    assert settings["world"]["seconds"] == 12.0
    assert settings["clips"] == 3
    assert set(settings["files"]) == {p.name for p in out.iterdir() if p.is_file()} - {"settings.json"}
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert [e["id"] for e in events] == ["train-00000", "val-00000", "test-00000"]
