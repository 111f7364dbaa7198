"""Multiple-choice evaluation: many memory settings, with and without an adapter, in one pass over each clip.

Encoding a clip costs the same whatever is remembered of it, so every clip is decoded and encoded once and its tokens
are fed to one stream per setting. Every answer is a line of JSON; tables are made from those lines and nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnimem_train.benchmarks import CLOZE
from omnimem_train.errors import UserError
from omnimem_train.losses import supervised
from omnimem_train.memory.spec import MemorySpec
from omnimem_train.models.interface import MediaEncoder, MediaWindow, StreamingModel, TokenBlock, Turn
from omnimem_train.streaming import Stream, StreamState

LETTERS = "ABCDEFGHIJ"
METHODS = ("letters", "generate", "options")
# What fails an item instead of the run. Anything else is a defect of this package and stops it.
FAILURES = (UserError, torch.OutOfMemoryError)


@dataclass(frozen=True)
class Setting:
    """One thing to measure: a memory spec, with or without the adapter.

    Attributes:
        name: unique, shown in tables.
        spec: how memory is compressed.
        adapter: whether the loaded adapter is on.
    """

    name: str
    spec: MemorySpec
    adapter: bool = False

    def key(self) -> str:
        """Identifies results of this setting in a results file."""
        return f"{'adapter' if self.adapter else 'base'}:{self.spec.fingerprint()}"


@dataclass(frozen=True)
class ChoiceQuestion:
    """A multiple-choice question as a model is asked it.

    Attributes:
        id: unique in its task.
        prompt: the full text of the question, options included.
        n_options: how many letters are possible.
        answer: the right letter.
        time_s: asked after this many seconds (None: at the end).
        meta: category and the like, copied into the results.
        stem, options: the question and its options by themselves; needed by the method "options".
    """

    id: str
    prompt: str
    n_options: int
    answer: str
    time_s: float | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    stem: str = ""
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 2 <= self.n_options <= len(LETTERS):
            raise UserError(f"question {self.id!r} has {self.n_options} options", remedy=f"give 2 to {len(LETTERS)}")
        if self.answer not in LETTERS[: self.n_options] or len(self.answer) != 1:
            raise UserError(f"question {self.id!r}: answer {self.answer!r} is not one of its letters")


@dataclass(frozen=True)
class Clip:
    """A clip and what is asked about it. `open` decodes it: an encoder and its windows."""

    id: str
    questions: tuple[ChoiceQuestion, ...]
    open: Callable[[], tuple[MediaEncoder, Iterable[MediaWindow]]]


@dataclass(frozen=True)
class ItemResult:
    """One answer to one question under one setting: a line of the results file.

    `predicted` is None when the item failed (`error` says why) or the model's text held no letter. Both count as wrong.
    """

    clip: str
    question: str
    setting: str
    key: str
    answer: str
    predicted: str | None
    text: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    error: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def correct(self) -> bool:
        """Whether the right letter was given."""
        return self.predicted == self.answer


def extract_letter(text: str, n_options: int) -> str | None:
    """The option a text chooses, or None.

    In this order: the text begins with a letter that stands alone ("B", "B.", "(B)"); "answer is B" or "answer: B"; the
    only letter in parentheses; the only capital letter standing alone. Two different candidates at a stage, and a
    letter that is a word ("A dog"), count as no answer; the public extractors take the first capital of any word.
    """
    text = text.strip()
    letters = LETTERS[:n_options]
    patterns = (
        rf"^\W*([{letters}])(?=$|[\s]*[.):,\]]|\s*$)",
        rf"(?i:answer|option|choice)(?:\s+(?i:is))?\s*[:=]?\s*\(?([{letters}])\b(?!\s+[a-z])",
        rf"\(([{letters}])\)",
        rf"\b([{letters}])\b(?!\s+(?!(?:or|and)\b)[a-z']|')",
    )
    for pattern in patterns:
        found = set(re.findall(pattern, text))
        if len(found) == 1:
            return found.pop()
        if found:
            return None
    return None


class Evaluator:
    """Answers the questions of clips under many settings.

    Args:
        model: with its adapter loaded, if any.
        settings: names and keys must be unique.
        method: "letters" compares the probabilities of the option letters as the next token (always an answer);
            "generate" writes up to `max_new_tokens` greedily and reads the letter from the text, as the benchmarks do;
            "options" asks without the options and compares how likely the words of each are as the answer (a cloze
            test, for models too small to know what a letter stands for).
        adapters_off: context in which the adapter is off; needed when a setting is without.
    """

    def __init__(
        self,
        model: StreamingModel,
        settings: list[Setting],
        *,
        method: str = "letters",
        max_new_tokens: int = 16,
        adapters_off: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        if method not in METHODS:
            raise UserError(f"unknown answer method {method!r}", remedy=f"choose one of: {', '.join(METHODS)}")
        for what, values in (("name", [s.name for s in settings]), ("content", [s.key() for s in settings])):
            twice = {v for v in values if values.count(v) > 1}
            if twice:
                raise UserError(f"two evaluation settings have the same {what}: {sorted(twice)[0]}")
        self.model, self.method, self.max_new_tokens = model, method, max_new_tokens
        # one switch of the adapter per block is enough when settings without it come first
        self.settings = sorted(settings, key=lambda s: s.adapter)
        self.streams = {s.key(): Stream(model, s.spec) for s in self.settings}
        self.adapters_off = adapters_off

    @torch.no_grad()
    def clip(self, clip: Clip, skip: frozenset[tuple[str, str]] = frozenset()) -> list[ItemResult]:
        """Results of all questions and settings for a clip. A setting whose every answer is in `skip` ((question id,
        setting key)) is not run. What goes wrong while decoding or streaming
        (`FAILURES`) fails the items that needed it."""
        left = [s for s in self.settings if any((q.id, s.key()) not in skip for q in clip.questions)]
        if not left:
            return []
        results: list[ItemResult] = []
        broken: dict[str, str] = {}
        states = {s.key(): self.streams[s.key()].start() for s in left}
        waiting = sorted(clip.questions, key=lambda q: float("inf") if q.time_s is None else q.time_s)
        end_s = 0.0
        try:
            encoder, windows = clip.open()
            for end_s, block in _timed_blocks(encoder, windows):
                due = [q for q in waiting if q.time_s is not None and q.time_s < end_s - 1e-6]
                waiting = waiting[len(due) :]
                results += self._ask(clip, due, left, states, encoder, broken)
                if block is not None:
                    self._each(left, broken, partial(self._feed, states, block))
            late = [q for q in waiting if q.time_s is not None and q.time_s > end_s]
            for q in late:
                why = f"asked at {q.time_s:g} s, the clip ends at {end_s:g} s"
                results += [_failed(clip, q, s, why) for s in left]
            results += self._ask(clip, [q for q in waiting if q not in late], left, states, encoder, broken)
        except FAILURES as error:
            for s in left:
                broken.setdefault(s.key(), str(error))
        answered = {(r.question, r.key) for r in results}
        for s in left:
            for q in clip.questions:
                if (q.id, s.key()) not in answered:
                    results.append(_failed(clip, q, s, broken.get(s.key(), "not reached")))
        return [r for r in results if (r.question, r.key) not in skip]

    def _each(self, settings: list[Setting], broken: dict[str, str], run: Callable[[Setting], None]) -> None:
        """`run` for every setting that still works, with the adapter on or off as it says."""
        for s in settings:
            if s.key() in broken:
                continue
            try:
                with nullcontext() if s.adapter else self.adapters_off():
                    run(s)
            except FAILURES as error:
                broken[s.key()] = str(error)

    def _feed(self, states: dict[str, StreamState], block: TokenBlock, s: Setting) -> None:
        state = states.pop(s.key())  # a setting that fails must not hold its memory while the others go on
        states[s.key()] = self.streams[s.key()].feed(state, block)

    def _ask(
        self,
        clip: Clip,
        questions: list[ChoiceQuestion],
        settings: list[Setting],
        states: dict[str, StreamState],
        encoder: MediaEncoder,
        broken: dict[str, str],
    ) -> list[ItemResult]:
        results: list[ItemResult] = []
        if questions:
            ways = {"letters": self._by_letters, "generate": self._by_text, "options": self._by_options}
            answer = ways[self.method]
            self._each(
                settings,
                broken,
                lambda s: results.extend(answer(clip, questions, s, states[s.key()], encoder)),
            )
        return results

    def _by_letters(
        self, clip: Clip, questions: list[ChoiceQuestion], s: Setting, state: StreamState, encoder: MediaEncoder
    ) -> list[ItemResult]:
        blocks = [encoder.text(self._ids(q)) for q in questions]
        stream = self.streams[s.key()]
        hidden = stream.ask(stream.caught_up(state, encoder.waiting()), blocks)[0]
        last = torch.tensor([b.n for b in blocks], device=hidden.device).cumsum(0) - 1
        logits = self.model.logits(hidden[last]).float().log_softmax(-1)
        tokens = letter_tokens(self.model, max(q.n_options for q in questions))
        table = logits[:, tokens].cpu()
        results = []
        for q, row in zip(questions, table, strict=True):
            scores = {LETTERS[i]: float(row[i]) for i in range(q.n_options)}
            best = max(scores, key=lambda letter: scores[letter])
            results.append(_result(clip, q, s, best, scores=scores))
        return results

    def _by_options(
        self, clip: Clip, questions: list[ChoiceQuestion], s: Setting, state: StreamState, encoder: MediaEncoder
    ) -> list[ItemResult]:
        """Sum of the log-probabilities of an option's tokens; the mark that ends an answer does not count."""
        turns = [self.model.render(Turn(CLOZE.format(question=q.stem), text)) for q in questions for text in q.options]
        blocks = [encoder.text(turn.ids.to(self.model.device)) for turn in turns]
        stream = self.streams[s.key()]
        hidden = stream.ask(stream.caught_up(state, encoder.waiting()), blocks)[0]
        scores, end = list[float](), 0
        for turn, block in zip(turns, blocks, strict=True):
            end += block.n
            words = supervised(turn.labels)[:-1]
            logits = self.model.logits(hidden[words.to(hidden.device) + end - len(turn.ids)]).float().log_softmax(-1)
            scores.append(float(logits.gather(1, turn.labels[words + 1].to(logits.device)[:, None]).sum()))
        results = []
        for q in questions:
            own, scores = dict(zip(LETTERS, scores[: len(q.options)], strict=False)), scores[len(q.options) :]
            results.append(_result(clip, q, s, max(own, key=lambda letter: own[letter]), scores=own))
        return results

    def _by_text(
        self, clip: Clip, questions: list[ChoiceQuestion], s: Setting, state: StreamState, encoder: MediaEncoder
    ) -> list[ItemResult]:
        stream = self.streams[s.key()]
        state = stream.caught_up(state, encoder.waiting())
        results = []
        for q in questions:
            tokens = stream.generate(state, encoder, self._ids(q), self.max_new_tokens)
            text = self.model.tokenizer.decode(tokens, skip_special_tokens=True)
            results.append(_result(clip, q, s, extract_letter(text, q.n_options), text=text))
        return results

    def _ids(self, q: ChoiceQuestion) -> Tensor:
        return self.model.render(Turn(q.prompt)).ids.to(self.model.device)


def letter_tokens(model: StreamingModel, n: int) -> list[int]:
    """The token id of each of the first `n` letters.

    Raises:
        UserError: a letter is not one token of this tokenizer.
    """
    ids = [model.tokenizer.encode(letter, add_special_tokens=False) for letter in LETTERS[:n]]
    if any(len(i) != 1 for i in ids):
        raise UserError("the tokenizer splits a single letter into several tokens", remedy="use method='generate'")
    return [i[0] for i in ids]


def _timed_blocks(encoder: MediaEncoder, windows: Iterable[MediaWindow]) -> Iterator[tuple[float, TokenBlock | None]]:
    """(end of its window in seconds, block); the tokens that waited for the end come with the last window."""
    yield 0.0, encoder.start()
    for window in windows:
        # the consumer asks what is due before this window, so it must learn of the window before it is encoded
        yield window.end_s, None
        block = encoder.push(window)
        if block is not None and block.n:
            yield 0.0, block
    block = encoder.finish()
    if block is not None and block.n:
        yield 0.0, block


def _result(clip: Clip, q: ChoiceQuestion, s: Setting, predicted: str | None, **more: Any) -> ItemResult:
    return ItemResult(clip.id, q.id, s.name, s.key(), q.answer, predicted, meta=q.meta, **more)


def _failed(clip: Clip, q: ChoiceQuestion, s: Setting, error: str) -> ItemResult:
    return _result(clip, q, s, None, error=error)


# Results files -------------------------------------------------------------------------------------------------------


def read_results(path: Path) -> list[ItemResult]:
    """All complete lines of a results file; a last line cut off by a crash is dropped (and measured again)."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    results = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            results.append(ItemResult(**json.loads(line)))
        except (ValueError, TypeError) as error:
            if number == len(lines):
                break
            raise UserError(
                f"line {number} of {path} is not a result", cause=str(error), remedy="delete the file and run again"
            ) from error
    return results


def _drop_partial_line(path: Path) -> None:
    """Cut off a last line without its end, which a crash leaves behind; what follows would be glued to it."""
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])


def run(
    evaluator: Evaluator,
    clips: list[Clip],
    folder: Path,
    *,
    rank: int = 0,
    world: int = 1,
    retry_failed: bool = False,
    progress: Callable[[list[Clip]], Iterable[Clip]] = iter,
) -> list[ItemResult]:
    """Evaluate clips `rank`, `rank + world`, ... and append to `folder/results-rank{rank}.jsonl`.

    What is already in any results file of the folder is not measured again, so a stopped run goes on where it was, with
    any number of processes. With `retry_failed`, failed items are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = collect(folder)
    done = frozenset((r.question, r.key) for r in known if not (retry_failed and r.error))
    out = folder / f"results-rank{rank}.jsonl"
    _drop_partial_line(out)
    new: list[ItemResult] = []
    with out.open("a") as file:
        for clip in progress(clips[rank::world]):
            results = evaluator.clip(clip, done)
            new += results
            file.writelines(json.dumps(asdict(r)) + "\n" for r in results)
            file.flush()
    return new


def collect(folder: Path) -> list[ItemResult]:
    """All results of a folder, one for each question and setting (the newest of a retried item)."""
    latest: dict[tuple[str, str], ItemResult] = {}
    for path in sorted(folder.glob("results-rank*.jsonl")):
        for result in read_results(path):
            held = latest.get((result.question, result.key))
            if held is None or held.error or not result.error:
                latest[result.question, result.key] = result
    return list(latest.values())
