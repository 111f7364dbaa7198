"""The results page: its smaller studies, its files, and folders of results that are empty, broken or incomplete."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from test_results_page import BOTH, FULL, OURS, RIVAL, Folder, first, setting

from omnimem_train.errors import UserError
from omnimem_train.stats import accuracy
from scripts.recall import tables, tables_studies
from scripts.recall.load import load
from scripts.recall.results import main, write
from scripts.recall.results_scores import pooled


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "results")


# Smaller studies ------------------------------------------------------------------------------------------------------


def test_what_adds_what(folder: Folder) -> None:
    later = {"redundancy": "later_key"}
    specs = {"a": ("snapkv", {}, "shared", 50), "b": ("snapkv", {}, "split", 56), "c": ("snapkv", later, "shared", 60),
             "d": ("perturbation", {"redundancy": "none"}, "shared", 70), "e": ("perturbation", {}, "shared", 80),
             "f": ("critical_kv", later, "shared", 72)}  # fmt: skip
    settings = {}
    for name, (selector, options, allocation, value) in specs.items():
        memory = {"selector": selector, "selector_options": options, "allocation": allocation}
        settings[name] = setting(name, "rival", 40, **memory), first(value)
    folder.run("main", "base0", settings)
    rows = [line for line in tables.adds_section(folder.page()).splitlines() if "| main |" in line]
    found = {tuple(cell.strip(" `") for cell in row.split("|")[1:4]): row.split("|")[5] for row in rows}
    assert found.keys() == {
        ("split", "a", "b"),
        ("redundancy", "a", "c"),
        ("redundancy", "d", "e"),
        ("exactness", "f", "e"),
    }
    assert "+6.0" in found["split", "a", "b"]
    assert "+8.0" in found["exactness", "f", "e"]


def test_sweep_takes_the_best_rival_of_each_world(folder: Folder) -> None:
    for i, (loudness, rivals) in enumerate(((1, (70, 60)), (2, (60, 90)))):
        values = {OURS: {40: 80}, RIVAL: {40: rivals[0]}, BOTH: {40: rivals[1]}}
        world = {"loudness": loudness, "copies": 1, "sound_share": 0.5}
        folder.methods("sweep", values, model=f"w{i}", world=world)
    found = tables_studies.sweep_found(folder.page())
    assert [(row[1], round(100 * row[2].value)) for row in found.values()] == [("snapkv", 10), ("snapkv+split", -10)]
    text = folder.text()
    assert "2 worlds: 1 better, 1 worse, 0 open" in text
    assert "+10.0" in (folder.path / "figures" / "sweep.svg").read_text()


def test_positions_precision_and_modality(folder: Folder) -> None:
    pair = {f"{p}@40": (setting(f"perturbation {p}", "omnimem", 40, positions=p), first(v))
            for p, v in (("absolute", 50), ("compact", 70))}  # fmt: skip
    folder.run("long", "base0", pair)
    for precision, value in (("float32", 70), ("bfloat16", 66)):
        one = {"a@40": (setting("a", "rival", 40) | {"kept_overlap": 0.9}, first(value))}
        folder.run("precision", f"base0-{precision}", one)
    folder.run("modality", "base0", {"both": (FULL | {"method": "both"}, first(96))})
    text = folder.text()
    assert "| 0 | `perturbation` | 40 | 50.0 [" in text
    assert "**+20.0 [" in text
    assert "**-4.0 [" in text
    assert "| 90.0 % |" in text
    assert "| 0 | both | 96.0 [" in text


# Folders that are empty, whole or broken ------------------------------------------------------------------------------


def test_nothing_measured_is_a_page(folder: Folder) -> None:
    text = folder.text()
    assert text.count("NOT MEASURED") == 2
    assert text.count("Not measured.") >= 8


def test_page_is_the_same_twice_and_old_pictures_go(folder: Folder) -> None:
    folder.methods("main", {OURS: {40: 80, 20: 60}, RIVAL: {40: 70, 20: 50}, BOTH: {40: 70, 20: 50}})
    (folder.path / "kept.json").write_text(
        json.dumps({"seconds": [0, 1], "methods": {"a": {"visual": [0.1, 0.2], "audio": [0.3, 0.1]}}})
    )
    event = {"kind": "sight", "name": "<red>", "start_s": 1, "end_s": 3, "faint": True}
    method = {"layer": 1, "visual_s": [1.5, 2.5, 8.0, 9.0], "audio_s": []}
    (folder.path / "map.json").write_text(
        json.dumps({"clip": "c", "seconds": 10, "events": [event], "methods": {"a": method}})
    )
    once = folder.text()
    pictures = {p.name: p.read_text() for p in (folder.path / "figures").glob("*.svg")}
    assert pictures.keys() == {"accuracy.svg", "rivals.svg", "kinds.svg", "kept.svg", "map.svg"}
    for name, svg in pictures.items():
        ElementTree.fromstring(svg)
        assert "var(" not in svg and "nan" not in svg, name
        assert f"](figures/{name})" in once
    assert "a: 50 % of the kept picture, 0 % of the kept sound" in once
    (folder.path / "figures" / "old.svg").write_text("")
    assert folder.text() == once
    assert {p.name: p.read_text() for p in (folder.path / "figures").glob("*.svg")} == pictures


def break_answers(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Folder], None]:
    def damage(folder: Folder) -> None:
        path = folder.path / "answers" / "main__base0.npz"
        with np.load(path) as file:
            arrays = dict(file)
        change(arrays)
        np.savez(path, **arrays)

    return damage


def break_json(change: Callable[[dict[str, Any]], Any]) -> Callable[[Folder], None]:
    def damage(folder: Folder) -> None:
        path = folder.path / "answers" / "main__base0.json"
        about = json.loads(path.read_text())
        change(about)
        path.write_text(json.dumps(about))

    return damage


def cut(name: str) -> Callable[[Folder], None]:
    def damage(folder: Folder) -> None:
        path = folder.path / name
        path.write_bytes(path.read_bytes()[:-40])

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f.path / "answers" / "main__base0.npz").unlink(), r"main__base0 has no \.npz file"),
        (lambda f: (f.path / "answers" / "main__base0.json").unlink(), r"main__base0 has no \.json file"),
        (lambda f: (f.path / "questions" / "test.csv.gz").unlink(), "answers the clip set 'test'"),
        (cut("questions/test.csv.gz"), r"test\.csv\.gz cannot be read"),
        (cut("answers/main__base0.npz"), r"npz cannot be read"),
        (cut("answers/main__base0.json"), r"json cannot be read"),
        (break_answers(lambda a: a.pop("full")), r"differ in settings\n.*full"),
        (break_answers(lambda a: a.update(full=a["full"][:-1])), r"'full' has answers int8\(399,\)"),
        (break_answers(lambda a: a.update(full=a["full"] + 3)), r"expected 400 whole numbers from -1 to 3"),
        (break_answers(lambda a: a.update(full=a["full"] / 2)), r"'full' has answers float"),
        (break_json(lambda j: j.pop("clip_set")), r"does not describe a run\n.*clip_set"),
        (break_json(lambda j: j.update(study="mian")), "its name says something else"),
        (break_json(lambda j: j["settings"]["full"].pop("budget")), r"setting 'full' is incomplete\n.*budget"),
        (break_json(lambda j: j["settings"]["full"].update(family="ours")), "unknown family 'ours'"),
        (lambda f: f.methods("main", {OURS: {40: 80}}, model="again"), "is measured twice"),
        (lambda f: f.methods("sweep", {OURS: {40: 80}}, world={"loudness": 1}), "names no whole world"),
        (lambda f: (f.path / "kept.json").write_text('{"seconds": [1], "methods": {}}'), r"kept\.json is not as"),
        (lambda f: (f.path / "map.json").write_text('{"methods": {"a": 1}}'), r"map\.json is not as"),
    ],
)
def test_damaged_folders_are_refused(folder: Folder, damage: Callable[[Folder], Any], message: str) -> None:
    folder.methods("main", {OURS: {40: 80}, RIVAL: {40: 70}})
    load(folder.path)
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load(folder.path)
    assert caught.value.cause and caught.value.remedy


def test_questions_are_checked(folder: Folder) -> None:
    path = folder.path / "questions" / "test.csv.gz"
    for lines, message in (
        (["id,clip,kind,answer", "a,b,c,A"], "begins with 'id,clip,kind,answer'"),
        (["id,clip,kind,answer,held_out", "a,b,colour,E,0"], "line 2: 'a,b,colour,E,0' is no question"),
        (["id,clip,kind,answer,held_out", "a,b,colour,A,0", "a,b,pitch,A,0"], "question 'a' appears twice"),
    ):
        with gzip.open(path, "wt") as file:
            file.write("\n".join(lines))
        with pytest.raises(UserError, match=message):
            load(folder.path)


def test_command_prints_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--results", str(tmp_path / "none"), "--out", str(tmp_path / "R.md")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    whole = Folder(tmp_path / "results")
    whole.methods("main", {OURS: {40: 80}})
    assert main(["--results", str(whole.path), "--out", str(tmp_path / "page" / "R.md")]) == 0
    assert "](../results/figures/accuracy.svg)" in (tmp_path / "page" / "R.md").read_text()


def test_a_silent_answer_counts_as_wrong_and_is_counted(folder: Folder) -> None:
    folder.methods("main", {OURS: {40: 80}})
    break_answers(lambda a: a["full"].__setitem__(slice(0, 3), -1))(folder)
    page = folder.page()
    found = accuracy(pooled(tuple(page.main.full)))
    assert (found.failed, found.value) == (3, pytest.approx((384 - 3) / 400))
    assert "| main | 1 | 2 | test | 1,030 | 800 | 3 |" in folder.text()


def test_the_page_in_the_repository_is_what_the_saved_answers_give(tmp_path: Path) -> None:
    """Both are committed; neither may change without the other."""
    root = Path(__file__).parents[1]
    copy = tmp_path / "scripts" / "recall" / "results"
    shutil.copytree(root / "scripts" / "recall" / "results", copy)
    shutil.rmtree(copy / "figures")
    write(copy, tmp_path / "RESULTS.md")
    assert (tmp_path / "RESULTS.md").read_text() == (root / "RESULTS.md").read_text()
    drawn = {p.name: p.read_text() for p in (copy / "figures").glob("*.svg")}
    assert drawn == {p.name: p.read_text() for p in (root / "scripts/recall/results/figures").glob("*.svg")}
