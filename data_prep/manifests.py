"""The files about clips: training manifests, multiple-choice benchmarks, the log of events, and a record of them."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep.questions import LETTERS, NARRATE, Question, QuestionMaker, narration
from data_prep.world import SPLITS, ClipSpec
from omnimem_train.benchmarks import CLOZE, choice_prompt
from omnimem_train.errors import UserError

RECORD = "settings.json"


def manifests(
    clips: Sequence[ClipSpec],
    seed: int,
    questions_per_clip: int = 0,
    early: float = 0.0,
    narrate: bool = True,
    words: bool = False,
) -> dict[str, str]:
    """Texts of all files by name, the same for the same arguments.

    Args:
        clips: of all splits.
        seed: of the questions.
        questions_per_clip: so many, chosen at random, balanced over kinds; 0 for all.
        early: share of the training turns asked as soon as they can be answered; the others come at the end.
        narrate: add a narration to every training clip.
        words: training questions come without options and are answered in words, as the evaluation method "options"
            asks them; else with options and letters.
    """
    makers = {split: QuestionMaker(seed, SPLITS.index(split)) for split in SPLITS}
    asked = {spec.id: makers[spec.split].ask(spec, questions_per_clip or None) for spec in clips}
    rng = random.Random(f"{seed}/early")
    of = {split: [(spec, asked[spec.id]) for spec in clips if spec.split == split] for split in SPLITS}
    files = {
        "train.json": _list(
            _with_turns(spec, questions, early, narrate, words, rng) for spec, questions in of["train"]
        ),
        "train_llava.json": _list(
            e for spec, questions in of["train"] for e in _llava(spec, questions, narrate, words)
        ),
        "events.jsonl": _lines({"fingerprint": spec.fingerprint(), **asdict(spec)} for spec in clips),
    }
    for split in SPLITS[1:]:
        files[f"{split}_choices.jsonl"] = _lines(e for spec, questions in of[split] for e in _choices(spec, questions))
        files[f"{split}_lvomnibench.json"] = _list(e for spec, questions in of[split] for e in _lvomni(spec, questions))
    return files


def check_unchanged(out: Path, files: Mapping[str, str]) -> None:
    """Raise UserError if a file that is to be written was changed since it was written by an earlier call."""
    record = out / RECORD
    if not record.exists():
        return
    try:
        written = dict(json.loads(record.read_text()).get("files", {}))
    except (ValueError, AttributeError, TypeError) as error:
        remedy = "delete or move it; clips that are there are kept all the same"
        raise UserError(f"{record}: is no record of a rendering", str(error), remedy) from error
    changed = [
        name
        for name, text in files.items()
        if name in written and (out / name).exists() and _digest((out / name).read_bytes()) not in
        (written[name], _digest(text.encode()))
    ]  # fmt: skip
    if changed:
        raise UserError(
            f"{out}: {', '.join(changed)} changed since the last rendering",
            "rendering writes these files anew and the changes would be lost",
            "move them to other names, or delete them",
        )


def write(out: Path, files: Mapping[str, str], settings: dict[str, Any]) -> None:
    """Write all files, each whole or not at all, and last the record: the settings, and the files' digests."""
    for name, text in files.items():
        _write(out / name, text)
    digests = {name: _digest(text.encode()) for name, text in files.items()}
    _write(out / RECORD, json.dumps({**settings, "files": digests}, indent=1) + "\n")


def _with_turns(
    spec: ClipSpec, questions: Iterable[Question], early: float, narrate: bool, words: bool, rng: random.Random
) -> dict[str, Any]:
    """A clip as an entry of the training manifest: all its questions share one stream."""
    turns: list[dict[str, Any]] = []
    for q in questions:
        at_once = rng.random() < early and q.known_s < spec.settings.seconds
        time_s = q.known_s if at_once else None
        question, answer = _asked(q, words)
        turns.append({"question": question, "answer": answer, "time_s": time_s, "kind": q.kind})
    if narrate:
        turns.append({"question": NARRATE, "answer": narration(spec), "time_s": None, "kind": "narration"})
    return {"id": spec.id, "video": _video(spec), "use_audio": True, "turns": turns}


def _asked(q: Question, words: bool) -> tuple[str, str]:
    """What a model is asked in training, and its answer."""
    if words:
        return CLOZE.format(question=q.text), q.options[LETTERS.index(q.answer)]
    return choice_prompt(q.text, q.options), q.answer


def _llava(spec: ClipSpec, questions: Iterable[Question], narrate: bool, words: bool) -> Iterator[dict[str, Any]]:
    """The same in LLaVA style: an entry a question, at the end of the clip."""
    pairs = [_asked(q, words) for q in questions]
    for number, (question, answer) in enumerate([*pairs, (NARRATE, narration(spec))] if narrate else pairs):
        said = [{"from": "human", "value": f"<video>\n{question}"}, {"from": "gpt", "value": answer}]
        yield {"id": f"{spec.id}-{number:02d}", "video": _video(spec), "use_audio": True, "conversations": said}


def _choices(spec: ClipSpec, questions: Iterable[Question]) -> Iterator[dict[str, Any]]:
    """Entries of our own benchmark format."""
    for number, q in enumerate(questions):
        yield {
            "id": f"{spec.id}-{number:02d}",
            "video": _video(spec),
            "question": q.text,
            "options": list(q.options),
            "answer": q.answer,
            "time_s": None,
            "category": q.kind,
            "held_out": q.held_out,
        }


def _lvomni(spec: ClipSpec, questions: Iterable[Question]) -> Iterator[dict[str, Any]]:
    """Entries in the format of LVOmniBench's data.json; "difficulty" tells held-out combinations."""
    for number, q in enumerate(questions):
        yield {
            "question_id": f"{spec.id}-{number:02d}",
            "video_id": spec.id,
            "question": q.text,
            "options": [f"{letter}. {option}" for letter, option in zip(LETTERS, q.options, strict=True)],
            "correct_option": q.answer,
            "question_type": q.kind,
            "audio_type": "sound",
            "difficulty": "held out" if q.held_out else "open",
            "video_category": "recall world",
        }


def _video(spec: ClipSpec) -> str:
    return f"clips/{spec.id}.mp4"


def _list(entries: Iterable[dict[str, Any]]) -> str:
    return json.dumps(list(entries), indent=1) + "\n"


def _lines(entries: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write(path: Path, text: str) -> None:
    aside = path.with_suffix(".part")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
