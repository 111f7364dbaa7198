"""The training manifest: what to watch, what is asked, what is to be answered.

A JSON list, JSON lines, Parquet or a saved dataset, in the LLaVA style:

    {"id": "a1", "video": "clips/a.mp4", "use_audio": true,
     "conversations": [{"from": "human", "value": "<video>\\nWhat happens?"}, {"from": "gpt", "value": "A dog barks."}]}

`audio` names sound in a file of its own (with "video", it replaces that file's sound; alone, there is no picture). The
mark is <video> (or <image>, as LLaVA-Video-178K writes it) or <audio>. A conversation of several pairs is one turn at
the end of the clip with `earlier` pairs. Our extension: independent questions that share the clip, at any time of it:

     "turns": [{"question": "Which colour?", "answer": "red", "time_s": 12.5}, ...]

(time_s null, or left out: at the end).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omnimem_train.errors import nearest
from omnimem_train.models.interface import Turn
from omnimem_train.records import Problems, Record, is_file, is_seconds, read_records

MARK = re.compile(r"\s*<(video|image|audio)>\s*")
TURN_KEYS = ("question", "answer", "time_s", "earlier", "kind")
ROLES = ("human", "gpt")


@dataclass(frozen=True)
class Sample:
    """One clip and its turns.

    Attributes:
        id: unique in the manifest.
        media: the video; None for sound alone.
        audio: sound in a file of its own, or None.
        use_audio: whether the sound is heard.
        turns: at least one.
        prefix: text that stood before the media mark.
        extra: the entry's other keys.
    """

    id: str
    media: Path | None
    audio: Path | None
    use_audio: bool
    turns: tuple[Turn, ...]
    prefix: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The file to open: the video, or the sound where there is none."""
        path = self.media or self.audio
        assert path is not None
        return path


def load_manifest(path: Path | str, media_root: Path | str | None = None) -> list[Sample]:
    """The samples of a manifest, in its order.

    Args:
        path: the manifest.
        media_root: where relative media paths start; the manifest's folder without it.

    Raises: UserError that lists all problems (the first 20 and their number): missing files and keys, unknown roles and
        keys, empty answers, marks without media, media without marks, ids that occur twice, times outside the clip
        (where the entry gives `duration_s`).
    """
    path = Path(path)
    entry = _EntryReader(Problems(path), Path(media_root) if media_root else path.parent)
    samples = [entry.read(record) for record in read_records(path)]
    entry.problems.check()
    return [sample for sample in samples if sample is not None]


class _EntryReader:
    """Turns records into samples and notes what is wrong with them."""

    def __init__(self, problems: Problems, root: Path) -> None:
        self.problems, self.root = problems, root
        self._ids: dict[str, str] = {}
        self._exists: dict[Path, bool] = {}

    def read(self, record: Record) -> Sample | None:
        """The sample of one entry; None if something is wrong with it."""
        before, where, values = len(self.problems.found), record.where, dict(record.values)
        id = str(values.pop("id", where))
        if id in self._ids:
            self.problems.add(where, f"id {id!r} was used by {self._ids[id]}", "give every entry an id of its own")
        self._ids[id] = where
        media, audio = (self._file(where, key, values.pop(key, None)) for key in ("video", "audio"))
        if media is None and audio is None and "image" in record.values:
            self.problems.add(where, "it has an image but no video or audio", "only clips can be streamed; take it out")
        elif "video" not in record.values and "audio" not in record.values:
            self.problems.add(where, "it has neither video nor audio", "name a file; there must be something to watch")
        use_audio = values.pop("use_audio", True)
        if not isinstance(use_audio, bool):
            self.problems.add(where, f"use_audio is {use_audio!r}", "write true or false")
        if use_audio is False and "video" not in record.values:
            self.problems.add(where, "use_audio is false and there is no video", "nothing would be left to perceive")
        sound_alone = "video" not in record.values and "audio" in record.values
        prefix, turns = self._turns(where, values, sound_alone)
        if len(self.problems.found) > before:
            return None
        return Sample(id, media, audio, use_audio, tuple(turns), prefix, values)

    def _file(self, where: str, key: str, name: Any) -> Path | None:
        if name is None:
            return None
        if not isinstance(name, str) or not name:
            self.problems.add(where, f"{key} is {name!r:.60}", "one path, as text")
            return None
        file = self.root / name
        if file not in self._exists:
            self._exists[file] = is_file(file)
        if not self._exists[file]:
            self.problems.add(where, f"there is no file {file}", f"correct {key!r} or the media root")
        return file

    def _turns(self, where: str, values: dict[str, Any], sound_alone: bool) -> tuple[str, list[Turn]]:
        """Prefix and turns of an entry, from "conversations" and "turns"."""
        said, asked, duration_s = values.pop("conversations", None), values.pop("turns", None), values.get("duration_s")
        if said is None and asked is None:
            self.problems.add(where, "it has neither conversations nor turns", "add one of them")
        if duration_s is not None and not is_seconds(duration_s):
            self.problems.add(where, f"duration_s is {duration_s!r:.60}", "seconds, or leave it out")
            duration_s = None
        prefix, turns = "", []
        if said is not None:
            pairs = self._pairs(where, said)
            if pairs:
                prefix, question = self._without_mark(where, pairs[0][0], sound_alone)
                pairs[0] = (question, pairs[0][1])
                turns.append(Turn(pairs[-1][0], pairs[-1][1], None, tuple(pairs[:-1])))
        if asked is not None:
            if not isinstance(asked, list) or not asked:
                self.problems.add(where, f"turns is {asked!r:.60}", "a list of at least one turn")
                asked = []
            turns += [self._turn(f"{where}, turn {n}", turn, duration_s) for n, turn in enumerate(asked, 1)]
        return prefix, turns

    def _pairs(self, where: str, said: Any) -> list[tuple[str, str]]:
        """(question, answer) pairs of a conversation; empty if it is not well formed."""
        if not isinstance(said, list) or not said or len(said) % 2:
            what = f"{len(said)} messages" if isinstance(said, list) else repr(said)[:60]
            self.problems.add(where, f"conversations has {what}", "give pairs of human and gpt messages")
            return []
        before = len(self.problems.found)
        for n, message in enumerate(said, 1):
            here, role = f"{where}, message {n}", ROLES[(n - 1) % 2]
            if not isinstance(message, dict) or "from" not in message or "value" not in message:
                self.problems.add(here, f"{message!r:.60} lacks from or value", '{"from": ..., "value": ...}')
            elif message["from"] not in ROLES:
                self.problems.add(here, f"unknown role {message['from']!r}", "roles are human and gpt")
            elif message["from"] != role:
                self.problems.add(here, f"{message['from']} speaks where {role} should", "human and gpt take turns")
                break  # all that follow are out of turn too
            else:
                self._text(here, "value", message["value"])
                if n > 1 and role == "human" and MARK.search(str(message["value"])):
                    self.problems.add(here, "a media mark after the first message", "mark the clip at the start")
        if len(self.problems.found) > before:
            return []
        return [(said[i]["value"].strip(), said[i + 1]["value"].strip()) for i in range(0, len(said), 2)]

    def _without_mark(self, where: str, text: str, sound_alone: bool) -> tuple[str, str]:
        """Text before the media mark, and the question after it."""
        kinds = [("video" if kind == "image" else kind) for kind in MARK.findall(text)]
        remedy = "write <video> (or <audio> for sound alone) once, before the first question"
        if not kinds:
            self.problems.add(where, "the first message has no media mark", remedy)
        elif len(set(kinds)) < len(kinds):
            self.problems.add(where, f"the mark <{kinds[0]}> occurs twice", "one clip an entry")
        elif "video" in kinds and sound_alone:
            self.problems.add(where, "a <video> mark without a video", remedy)
        prefix, *rest = MARK.sub("\0", text).split("\0")
        question = " ".join(part for part in rest if part)
        if kinds and not question:
            if prefix:
                return "", prefix  # the mark came last
            self.problems.add(where, "the first message is a media mark and nothing else", "add the question")
        return prefix, question

    def _turn(self, where: str, values: Any, duration_s: Any) -> Turn:
        """One of our own turns."""
        if not isinstance(values, dict):
            self.problems.add(where, f"{values!r:.60} is no object", '{"question": ..., "answer": ..., "time_s": ...}')
            return Turn("")
        for key in values:
            if key not in TURN_KEYS:
                self.problems.add(where, f"unknown key {key!r}{nearest(key, TURN_KEYS)}", ", ".join(TURN_KEYS))
        question, answer = (self._text(where, key, values.get(key)) for key in ("question", "answer"))
        if MARK.search(question):
            self.problems.add(where, "a media mark in a turn's question", "leave it out: the clip is always before it")
        time_s, earlier = values.get("time_s"), values.get("earlier") or []
        is_time = is_seconds(time_s)
        if time_s is not None and not (is_time and time_s <= (duration_s or float("inf"))):
            end = f" (the clip's length is {duration_s} s)" if duration_s else ""
            is_time = False
            self.problems.add(where, f"time_s is {time_s!r:.60}{end}", "seconds within the clip, or null for its end")
        if not isinstance(earlier, list) or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in earlier):
            self.problems.add(where, f"earlier is {earlier!r:.60}", "a list of [question, answer]")
            earlier = []
        pairs = tuple((self._text(where, "earlier", q), self._text(where, "earlier", a)) for q, a in earlier)
        return Turn(question, answer, float(str(time_s)) if is_time else None, pairs)

    def _text(self, where: str, key: str, value: Any) -> str:
        """A text that must not be empty."""
        if isinstance(value, str) and value.strip():
            return value.strip()
        what = "missing" if value is None else "empty" if isinstance(value, str) else f"{value!r:.60}, no text"
        self.problems.add(where, f"{key} is {what}", "every question and every answer needs a text")
        return ""
