"""Multiple-choice benchmarks: our own manifest and three public formats, each with its own prompt. Imports no torch.

- manifest: a list of objects with video (or audio), question, options, answer; optional id, use_audio, time_s, and
  whatever else (category, say).
- videomme: Video-MME's table (videoID, duration, question_id, question, options, answer); its "long" videos alone.
- lvbench: LVBench's video_info.meta.jsonl, a video a line: key, qa[uid, question with its options inside, answer, ...].
- lvomnibench: LVOmniBench's data.json: video_id, question, options, correct_option, ...
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omnimem_train.errors import UserError, nearest
from omnimem_train.records import Problems, Record, is_file, is_seconds, read_records

LETTERS = "ABCDEFGHIJ"
SUFFIXES = (".mp4", ".MP4", ".mkv", ".webm", ".mov", ".avi")
_LETTERED = re.compile(r"^\s*\(?([A-J])[.):]\s*")

CLOZE = "{question} Answer in a few words."
"""How a question is put without its options, to compare how likely each of them is as the answer."""

# {options} are one a line. Sources: our own; the official Video-MME prompt (lmms-eval's says "and the subtitles" even
# without them); lmms-eval for LVBench, whose questions carry their options; the LVOmniBench repository.
PROMPTS = {
    "manifest": "{question}\n{options}\nAnswer with the letter of the right option.",
    "videomme": (
        "Select the best answer to the following multiple-choice question based on the video. Respond with only the "
        "letter (A, B, C, or D) of the correct option.\n{question}\n{options}\nThe best answer is:"
    ),
    "lvbench": "{question}\n{options}\nAnswer the question with the option letter",
    "lvomnibench": (
        "Question: {question}\nOptions:\n{options}\n\nSelect the best answer from the options above. Directly provide "
        "the letter representing your choice and nothing else. Do not include the full text of the option, do not "
        "provide any explanation."
    ),
}


@dataclass(frozen=True)
class ChoiceItem:
    """A multiple-choice question about a file.

    Attributes:
        id: unique in its benchmark.
        media: the video; None for sound alone.
        audio: sound in a file of its own, or None.
        question: its text alone.
        options: their texts, without letters.
        answer: the right letter.
        prompt: what a model is asked, in the benchmark's own words.
        time_s: asked after this many seconds; None for the end.
        use_audio: whether the sound is heard.
        meta: category and the like; "cluster" names the video, for intervals clustered by video.
    """

    id: str
    media: Path | None
    audio: Path | None
    question: str
    options: tuple[str, ...]
    answer: str
    prompt: str
    time_s: float | None = None
    use_audio: bool = True
    meta: dict[str, Any] = field(default_factory=dict)


def choice_prompt(question: str, options: Sequence[str], form: str = "manifest") -> str:
    """The prompt of a benchmark for a question; `options` without letters."""
    opening, closing = ("(", ")") if form == "lvbench" else ("", ".")
    lines = (f"{opening}{letter}{closing} {option}" for letter, option in zip(LETTERS, options, strict=False))
    return PROMPTS[form].format(question=question, options="\n".join(lines))


def load_choices(
    path: Path | str, media_root: Path | str | None = None, form: str = "manifest", require_media: bool = True
) -> list[ChoiceItem]:
    """The questions of a benchmark file, in its order.

    Args:
        path: the file with the questions.
        media_root: folder of the videos; the file's own folder without it. The public formats name videos by id; they
            are looked for as ID.mp4 (.mkv, ...) in the root and in its folders `videos` and `data`.
        form: "manifest", "videomme", "lvbench" or "lvomnibench".
        require_media: a missing video is an error now. Without it the item stays, fails when it is read, and is to be
            counted as wrong: leaving it out would raise the score.

    Raises: UserError naming all problems of the file at once.
    """
    if form not in READERS:
        raise UserError(f"benchmark format {form!r} is not known{nearest(form, READERS)}", remedy=", ".join(READERS))
    path = Path(path)
    loading = _Loading(path, Path(media_root) if media_root else path.parent, form, require_media)
    items = [item for record in read_records(path) for item in READERS[form](loading, record)]
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            loading.problems.add(item.id, "this id occurs twice", "give every question an id of its own")
        seen.add(item.id)
    loading.problems.check()
    if not items:
        raise UserError(f"{path}: no question of the kind wanted", f"format {form!r}", "check file and format")
    return items


class _Loading:
    """What the readers of formats share: where things are, and what is wrong."""

    def __init__(self, path: Path, root: Path, form: str, require_media: bool) -> None:
        self.problems, self.root, self.form, self.require_media = Problems(path), root, form, require_media
        self._found: dict[str, Path] = {}

    def text(self, where: str, values: dict[str, Any], key: str) -> str:
        """A text that must be there."""
        value = values.get(key)
        if isinstance(value, (str, int)) and not isinstance(value, bool) and str(value).strip():
            return str(value)
        found = "missing" if value is None else f"{value!r:.60}"
        self.problems.add(where, f"{key} is {found}", f"{key!r} must be a text")
        return ""

    def file(self, where: str, name: str) -> Path:
        """A file named by path."""
        file = self.root / name
        if self.require_media and not is_file(file):
            self.problems.add(where, f"there is no file {file}", "correct the path or the media root")
        return file

    def video(self, where: str, name: str) -> Path:
        """A video named by its id."""
        if name not in self._found:
            places = (self.root / sub / f"{name}{suffix}" for sub in ("", "videos", "data") for suffix in SUFFIXES)
            self._found[name] = next((p for p in places if is_file(p)), self.root / f"{name}.mp4")
        if self.require_media and name and not is_file(self._found[name]):
            remedy = "fetch it, or allow missing media (they count as wrong)"
            self.problems.add(where, f"no video {name!r} in {self.root}", remedy)
        return self._found[name]

    def item(
        self, where: str, id: str, media: Path | None, question: str, options: Any, answer: str, **more: Any
    ) -> Iterator[ChoiceItem]:
        """The item, if options and answer fit together; otherwise nothing, and the problem noted."""
        if not isinstance(options, (list, tuple)) or not 2 <= len(options) <= len(LETTERS):
            self.problems.add(where, f"options are {options!r:.60}", f"give a list of 2 to {len(LETTERS)} texts")
            return
        if not all(isinstance(option, (str, int, float)) for option in options):
            self.problems.add(where, f"options are {options!r:.60}", "every option must be a text")
            return
        texts = tuple(_bare(options))
        answer = answer.strip().strip("().").upper()
        if "" in texts or len(set(texts)) < len(texts):
            self.problems.add(where, f"options are {options!r:.60}", "options must differ and none may be empty")
        elif len(answer) != 1 or answer not in LETTERS[: len(texts)]:
            self.problems.add(where, f"answer {answer!r:.40} for {len(texts)} options", "give an option's letter")
        else:
            prompt = choice_prompt(question, texts, self.form)
            more.setdefault("audio", None)
            yield ChoiceItem(id, media, question=question, options=texts, answer=answer, prompt=prompt, **more)


def _bare(options: Sequence[Any]) -> list[str]:
    """Options without "A. ", if each begins with its own letter."""
    texts = [str(option).strip() for option in options]
    heads = [_LETTERED.match(text) for text in texts]
    if all(head and head[1] == letter for head, letter in zip(heads, LETTERS, strict=False)):
        return [text[head.end() :].strip() for text, head in zip(texts, heads, strict=True) if head]
    return texts


def _manifest(loading: _Loading, record: Record) -> Iterator[ChoiceItem]:
    where, values = record.where, dict(record.values)
    question, answer = (loading.text(where, values, key) for key in ("question", "answer"))
    id = str(values.pop("id", where))
    video, audio = values.pop("video", None), values.pop("audio", None)
    if video is None and audio is None:
        loading.problems.add(where, "neither video nor audio is given", "name a file")
    time_s, use_audio = values.pop("time_s", None), values.pop("use_audio", True)
    if time_s is not None and not is_seconds(time_s):
        loading.problems.add(where, f"time_s is {time_s!r:.60}", "seconds from 0 on, or null for the end")
    if not isinstance(use_audio, bool):
        loading.problems.add(where, f"use_audio is {use_audio!r}", "true or false")
    more = {
        "audio": None if audio is None else loading.file(where, str(audio)),
        "time_s": time_s,
        "use_audio": use_audio,
        "meta": {k: v for k, v in values.items() if k not in ("question", "options", "answer")},
    }
    more["meta"]["cluster"] = str(video or audio)
    media = None if video is None else loading.file(where, str(video))
    yield from loading.item(where, id, media, question, values.get("options"), answer, **more)


def _videomme(loading: _Loading, record: Record) -> Iterator[ChoiceItem]:
    where, values = record.where, record.values
    if loading.text(where, values, "duration") != "long":
        return
    video, id, question, answer = (
        loading.text(where, values, key) for key in ("videoID", "question_id", "question", "answer")
    )
    keys = ("video_id", "domain", "sub_category", "task_type")
    meta: dict[str, Any] = {k: values[k] for k in keys if k in values}
    media = loading.video(where, video)
    meta |= {"cluster": video, "category": values.get("task_type", "")}
    yield from loading.item(where, id, media, question, values.get("options"), answer, meta=meta)


def _lvbench(loading: _Loading, record: Record) -> Iterator[ChoiceItem]:
    key = loading.text(record.where, record.values, "key")
    media = loading.video(record.where, key)
    questions = record.values.get("qa")
    if not isinstance(questions, list) or not questions:
        loading.problems.add(record.where, f"qa is {questions!r:.60}", "a list of questions is expected")
        return
    for number, values in enumerate(questions, 1):
        where = f"{record.where}, question {number}"
        if not isinstance(values, dict):
            loading.problems.add(where, f"{values!r:.60} is no object", "a question is an object {...}")
            continue
        id, text, answer = (loading.text(where, values, k) for k in ("uid", "question", "answer"))
        question, *options = re.split(r"\n\s*(?=\([A-J]\))", text)
        kinds = values.get("question_type", [])
        meta = {k: values[k] for k in ("question_type", "time_reference") if k in values}
        meta |= {"cluster": key, "category": ", ".join(kinds) if isinstance(kinds, list) else str(kinds)}
        yield from loading.item(where, id, media, question.strip(), options, answer, meta=meta)


def _lvomnibench(loading: _Loading, record: Record) -> Iterator[ChoiceItem]:
    where, values = record.where, record.values
    video, question, answer = (loading.text(where, values, key) for key in ("video_id", "question", "correct_option"))
    keys = ("question_type", "audio_type", "difficulty", "video_category")
    meta = {k: values[k] for k in keys if k in values}
    meta |= {"cluster": video, "category": values.get("question_type", "")}
    id = str(values.get("question_id", f"{video}:{where.split()[-1]}"))
    media = loading.video(where, video)
    yield from loading.item(where, id, media, question, values.get("options"), answer, meta=meta)


READERS: dict[str, Callable[[_Loading, Record], Iterator[ChoiceItem]]] = {
    "manifest": _manifest,
    "videomme": _videomme,
    "lvbench": _lvbench,
    "lvomnibench": _lvomnibench,
}
