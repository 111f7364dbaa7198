"""What the recall experiments saved, read and checked: questions by clip set, answers by study and model.

    questions/<clip_set>.csv.gz       a line a question, in order: id, clip, kind, answer (A-D), held_out (0/1)
    answers/<study>__<model>.json     the run, and its settings by name
    answers/<study>__<model>.npz      by the name of a setting: int8, 0 to 3 for A to D, -1 without an answer
    kept.json, map.json               for the two pictures; may be missing

Damaged or incomplete files stop the page: a number that rests on half of the answers is worse than none.
"""

from __future__ import annotations

import csv
import gzip
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from omnimem_train.errors import UserError, nearest

KINDS = ("colour", "pitch", "together", "order", "count", "when")
FAMILIES = ("omnimem", "rival", "augmented", "reference")
HEADER = ["id", "clip", "kind", "answer", "held_out"]
LETTERS = "ABCD"
STUDIES = ("main", "tuning", "finetune", "ablation", "sweep", "long", "precision", "modality", "combination", "attempt")
AGAIN = "run the study again, or take its files out of the folder"


@dataclass(frozen=True, eq=False)
class Questions:
    """A clip set: per question its id, clip, kind, right answer (0 to 3) and whether its combination was held out."""

    name: str
    ids: tuple[str, ...]
    clips: tuple[str, ...]
    kinds: tuple[str, ...]
    answers: np.ndarray
    held_out: np.ndarray


@dataclass(frozen=True, eq=False)
class Condition:
    """One setting of one run, with its answers.

    Attributes:
        budget: tokens a layer; None for the full cache.
        share: budget over the media tokens of the stream.
        text_tokens: pinned text of the stream as the file implies it; None where it does not.
        predicted: 0 to 3, -1 without an answer. right: whether that is the answer.
    """

    study: str
    model: str
    base: int
    arm: str
    seed: int | None
    questions: Questions
    name: str
    method: str
    family: str
    budget: int | None
    share: float
    tuned: Mapping[str, Any]
    memory: Mapping[str, Any]
    kept_overlap: float | None
    text_tokens: float | None
    predicted: np.ndarray
    right: np.ndarray


@dataclass(frozen=True, eq=False)
class Run:
    """One file of answers: what it says about itself, and its settings in order; of some, how the model was trained and
    a digest of the base model's weights."""

    study: str
    model: str
    base: int
    arm: str
    seed: int | None
    clip_set: str
    full_tokens: float
    world: Mapping[str, float]
    machine: str
    versions: Mapping[str, str]
    command: str
    conditions: tuple[Condition, ...]
    training: Mapping[str, Any] = field(default_factory=dict)
    weights: str = ""


@dataclass(frozen=True, eq=False)
class Data:
    """Everything in a folder of results; `kept` and `map` are None when not measured."""

    questions: Mapping[str, Questions]
    runs: tuple[Run, ...]
    kept: Mapping[str, Any] | None
    map: Mapping[str, Any] | None

    def study(self, name: str) -> list[Run]:
        """The runs of a study, by base, arm and seed."""
        own = [run for run in self.runs if run.study == name]
        return sorted(own, key=lambda r: (r.base, r.arm, -1 if r.seed is None else r.seed, r.model))

    def conditions(self, study: str) -> list[Condition]:
        """All settings of a study."""
        return [condition for run in self.study(study) for condition in run.conditions]


def load(folder: Path) -> Data:
    """Read a folder of results.

    Raises:
        UserError: the folder is not there, or something in it is damaged, incomplete or contradicts itself.
    """
    if not folder.is_dir():
        remedy = "run the experiments first, or name the folder with --results"
        raise UserError(f"there is no folder {folder}", "the page is made from what the experiments saved", remedy)
    questions = {p.name.removesuffix(".csv.gz"): _questions(p) for p in sorted((folder / "questions").glob("*.csv.gz"))}
    about = {p.stem for p in (folder / "answers").glob("*.json")}
    arrays = {p.stem for p in (folder / "answers").glob("*.npz")}
    if alone := sorted(about ^ arrays):
        lacking = ".npz" if alone[0] in about else ".json"
        raise UserError(f"answers/{alone[0]} has no {lacking} file", "a run is written as a pair of files", AGAIN)
    runs = tuple(_run(folder / "answers" / name, questions) for name in sorted(about))
    _no_run_twice(runs)
    return Data(questions, runs, _picture(folder / "kept.json"), _picture(folder / "map.json"))


# Files ---------------------------------------------------------------------------------------------------------------


def _questions(path: Path) -> Questions:
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read", repr(error), "write the clip set's questions again") from error
    if not lines or lines[0] != HEADER or len(lines) == 1:
        found = ",".join(lines[0]) if lines else "nothing"
        raise UserError(f"{path} begins with {found!r}", f"expected {','.join(HEADER)!r} and questions", AGAIN)
    rows = lines[1:]
    for number, row in enumerate(rows, start=2):
        if len(row) != len(HEADER) or row[2] not in KINDS or row[3] not in tuple(LETTERS) or row[4] not in ("0", "1"):
            cause = f"expected {', '.join(HEADER)} with a kind of {', '.join(KINDS)}, an answer A-D, held_out 0 or 1"
            raise UserError(f"{path}, line {number}: {','.join(row)!r} is no question", cause, AGAIN)
    ids, clips, kinds, answers, held_out = zip(*rows, strict=True)
    if len(set(ids)) < len(ids):
        double = next(i for i in ids if ids.count(i) > 1)
        raise UserError(f"{path}: question {double!r} appears twice", "each counts once", "give questions unique ids")
    key = np.array([LETTERS.index(a) for a in answers], dtype=np.int8)
    return Questions(path.name.removesuffix(".csv.gz"), ids, clips, kinds, key, np.array(held_out) == "1")


def _run(stem: Path, questions: Mapping[str, Questions]) -> Run:
    """A pair of files. `stem` is their path without the suffix."""
    path = stem.parent / f"{stem.name}.json"
    about = _object(path)
    try:
        study, model, settings = str(about["study"]), str(about["model"]), dict(about["settings"])
        base, arm, seed, clip_set = int(about["base"]), str(about["arm"]), about["seed"], str(about["clip_set"])
        full_tokens, machine, command = float(about["full_tokens"]), str(about["machine"]), str(about["command"])
        versions = {str(k): str(v) for k, v in dict(about["versions"]).items()}
        world = {str(k): float(v) for k, v in dict(about.get("world") or {}).items()}
        seed, training = None if seed is None else int(seed), dict(about.get("training") or {})
        weights = str(about.get("weights", ""))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not describe a run", f"missing or not as expected: {error!r}", AGAIN) from error
    if f"{study}__{model}" != stem.name:
        raise UserError(f"{path} says it is study {study!r}, model {model!r}", "its name says something else", AGAIN)
    if study not in STUDIES:
        raise UserError(f"{path}: unknown study {study!r}{nearest(study, STUDIES)}", f"known: {', '.join(STUDIES)}")
    if clip_set not in questions:
        cause = f"there is no questions/{clip_set}.csv.gz"
        raise UserError(f"{path} answers the clip set {clip_set!r}", cause, "write the clip set's questions as well")
    if study == "sweep" and not {"loudness", "copies", "sound_share"} <= world.keys():
        raise UserError(f"{path} names no whole world", "a sweep needs loudness, copies and sound_share", AGAIN)
    arrays = _arrays(stem.parent / f"{stem.name}.npz")
    if arrays.keys() != settings.keys():
        odd = sorted(arrays.keys() ^ settings.keys())
        raise UserError(f"{path} and its .npz differ in settings", f"in one of them alone: {', '.join(odd[:5])}", AGAIN)
    shared = {"study": study, "model": model, "base": base, "arm": arm, "seed": seed}
    conditions = []
    for name, setting in settings.items():
        where = f"{path}, setting {name!r}"
        own = {"name": name, "predicted": arrays[name], "questions": questions[clip_set], **shared}
        conditions.append(_condition(where, own, setting, full_tokens))
    about_it = (clip_set, full_tokens, world, machine, versions, command)
    return Run(study, model, base, arm, seed, *about_it, tuple(conditions), training, weights)


def _condition(where: str, own: Mapping[str, Any], setting: Mapping[str, Any], full_tokens: float) -> Condition:
    """One setting; `own` are its answers, its name and what it shares with the others of its file."""
    questions, predicted = own["questions"], own["predicted"]
    try:
        method, family, share = str(setting["method"]), str(setting["family"]), float(setting["share"])
        budget = None if setting["budget"] == "full" else int(setting["budget"])
        tuned, memory = dict(setting.get("tuned") or {}), dict(setting.get("memory") or {})
        overlap = setting.get("kept_overlap")
        overlap = None if overlap is None else float(overlap)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} is incomplete", f"missing or not as expected: {error!r}", AGAIN) from error
    if family not in FAMILIES:
        raise UserError(f"{where}: unknown family {family!r}", f"known: {', '.join(FAMILIES)}", AGAIN)
    whole = np.issubdtype(predicted.dtype, np.integer)
    if not whole or predicted.shape != questions.answers.shape or not np.isin(predicted, (-1, 0, 1, 2, 3)).all():
        expected = f"{len(questions.ids)} whole numbers from -1 to 3, one a question of {questions.name!r}"
        raise UserError(f"{where} has answers {predicted.dtype}{predicted.shape}", f"expected {expected}", AGAIN)
    text = full_tokens - budget / share if budget and share > 0 else None
    spec: dict[str, Any] = {
        "method": method,
        "family": family,
        "budget": budget,
        "share": share,
        "tuned": tuned,
        "memory": memory,
    }
    right = predicted == questions.answers
    return Condition(**own, **spec, kept_overlap=overlap, text_tokens=text, right=right)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} cannot be read", repr(error), AGAIN) from error


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read", repr(error), AGAIN) from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object", f"it holds a {type(found).__name__}", AGAIN)
    return found


def _picture(path: Path) -> dict[str, Any] | None:
    """Contents of a file for a picture; None when it is not there."""
    if not path.exists():
        return None
    found = _object(path)
    try:
        own = found["methods"]
        if path.name == "kept.json":
            n = len([float(s) for s in found["seconds"]])
            sound = all(len(m[k]) == n and [float(v) for v in m[k]] for m in own.values() for k in ("visual", "audio"))
        else:
            _ = [float(e[k]) for e in found["events"] for k in ("start_s", "end_s")], str(found["clip"])
            _ = [[float(v) for v in m[k]] for m in own.values() for k in ("visual_s", "audio_s")]
            kinds = {e["kind"] for e in found["events"]} | {"sight", "sound", "distractor"}
            sound = float(found["seconds"]) > 0 and len(kinds) == 3 and all(str(e["name"]) for e in found["events"])
        if not (sound and own):
            raise ValueError("values of different lengths, or none")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not as expected", repr(error), "write it again, or take it away") from error
    return found


def _no_run_twice(runs: tuple[Run, ...]) -> None:
    """One file for a base model's main study, one for a fine-tuned model; in them, each method and budget once."""
    seen: dict[tuple[Any, ...], str] = {}
    for run in runs:
        if run.study not in ("main", "finetune", "combination", "attempt"):
            continue
        for c in run.conditions:
            key = (run.study, run.base, run.arm if run.study != "main" else "", run.seed, c.method, c.budget)
            place = f"answers/{run.study}__{run.model}, setting {c.name!r}"
            if key in seen:
                cause = f"same base, arm, seed, method and budget as {seen[key]}"
                raise UserError(f"{place} is measured twice", cause, "keep one of them")
            seen[key] = place
