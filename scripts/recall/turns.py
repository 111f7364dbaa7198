"""Questions of the world as the turns of a dialogue: batches for pre-training, choices for measuring."""

from __future__ import annotations

import multiprocessing.sharedctypes
import pickle
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from data_prep.arrays import occurrences
from data_prep.questions import KINDS, LIST, NARRATE, TIMES, Question, QuestionMaker, facts, narration
from data_prep.streams import PackedTurn, pack
from data_prep.world import COLOURS, PATTERNS, PITCHES, SHAPES, ClipSpec, crop
from omnimem_train.benchmarks import CLOZE, PROMPTS, choice_prompt
from omnimem_train.models.interface import RenderedTurn, StreamingModel, Turn
from omnimem_train.models.tiny import WORDS

# How a question is put: in the words of two benchmarks, without options, and two easy forms that teach what a letter
# stands for. Letters come late: a small model stays at chance with them while it already answers in words.
DIRECT = CLOZE.format(question="{}")
LOOKUP = "Which option says {}?"
REASON = "{} Say it, then its letter."
FORMS = {"manifest": 0.35, "lvomnibench": 0.05, "direct": 0.4, "lookup": 0.05, "reason": 0.15}  # shares in pre-training
LETTER_FORMS = ("manifest", "lvomnibench")
TRACKED = (
    *KINDS,
    "direct",
    "lookup",
    "reason",
)  # what a share of right answers is kept of: letters of each kind, forms
VOCABULARY = 1600  # entries of the tokenizer before its control tokens


def words() -> str:
    """What the tokenizer's merges are learned from: every word a question, an option or an answer can hold."""
    fixed = """How many times was the seen heard Which shape sound came first or In which part of video once twice
    three four quarter second third last and all A B C D What colour pitch when with nothing often facts"""
    text = " ".join(
        [WORDS, fixed, *SHAPES, *COLOURS, *PATTERNS, *PITCHES, *PROMPTS.values(), DIRECT, NARRATE, LOOKUP, REASON]
    )
    for mark in "{}().,:;?\n":
        text = text.replace(mark, " ")
    return " ".join(dict.fromkeys(text.split()))


def count_ids(model: StreamingModel) -> list[int]:
    """The first token of "once", "twice", ..., as a fact says them."""
    return [model.tokenizer(f" {times}", add_special_tokens=False)["input_ids"][0] for times in TIMES]


def rendered(model: StreamingModel, q: Question, form: str) -> RenderedTurn:
    """A question with its answer: the letter, the right option's text ("direct"), or that and the letter ("reason")."""
    right = q.options["ABCD".index(q.answer)]
    if form == "direct":
        return model.render(Turn(DIRECT.format(q.text), right))
    if form == "lookup":
        return model.render(Turn(choice_prompt(LOOKUP.format(right), q.options), q.answer))
    if form == "reason":
        return model.render(Turn(choice_prompt(REASON.format(q.text), q.options), f"{right}\n{q.answer}"))
    return model.render(Turn(choice_prompt(q.text, q.options, form), q.answer))


def listed(model: StreamingModel, rows: Sequence[tuple[str, str]]) -> RenderedTurn:
    """All facts of a clip as one answer. Names are given, in an order nobody could know, and not learned: each is a
    question of its own, so a clip's twenty things give some eighty answers in the tokens of three questions."""
    turn = model.render(Turn(LIST, "; ".join(f"{name} {about}" for name, about in rows) or "nothing"))
    separator = model.tokenizer(";", add_special_tokens=False)["input_ids"][0]
    labels = turn.labels.clone()
    answer = (labels != -100).nonzero()[:, 0].tolist()
    labels[answer[0]] = -100 if rows else labels[answer[0]]
    for place in answer:
        if int(turn.ids[place]) == separator:
            labels[place + 1] = -100
    return RenderedTurn(turn.ids, labels)


@dataclass(frozen=True)
class ChoiceTurn:
    """One question of each clip, and the tokens among which the model chooses.

    Attributes:
        turn: read once a question.
        candidates: (m, 4) int64 tokens of options A to D, one of which comes next.
    """

    turn: PackedTurn
    candidates: Tensor


def choices(model: StreamingModel, clips: Sequence[Sequence[Question]], form: str) -> list[ChoiceTurn]:
    """Questions of clips side by side.

    With form "direct" a question is asked without its options, and the likelihoods of the options are compared at the
    first token in which they differ (a cloze test); with the others those of the letters.
    """
    return [
        _choice_turn(model, [q[place] if place < len(q) else None for q in clips], form)
        for place in range(max(len(questions) for questions in clips))
    ]


def _choice_turn(model: StreamingModel, questions: Sequence[Question | None], form: str) -> ChoiceTurn:
    full = pack([None if q is None else rendered(model, q, form) for q in questions])
    starts = {int(stream): place for place, stream in reversed(list(enumerate(full.read[:, 0].tolist())))}
    read, candidates = [], []
    for number, q in enumerate(questions):
        if q is not None:
            texts = q.options if form == "direct" else tuple("ABCD")
            ids = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            same = next(i for i in range(len(ids[0])) if len({option[i] for option in ids}) > 1)
            read.append(starts[number] + same)
            candidates.append([option[same] for option in ids])
    at = torch.tensor(read)
    return ChoiceTurn(PackedTurn(full.ids, full.read[at], full.targets[at]), torch.tensor(candidates))


def _letters(turns: Sequence[RenderedTurn | None]) -> list[int]:
    """Of the supervised places that `pack` lists for these turns, the last before the end mark of each turn."""
    counts = [0 if t is None else int((t.labels[1:] != -100).sum()) for t in turns]
    ends = np.cumsum(counts)
    return [int(end) - 2 for end, n in zip(ends, counts, strict=True) if n]


@dataclass(frozen=True)
class Batch:
    """Turns about crops of clips of a pool.

    Attributes:
        seconds: length of the crops.
        clips: (B,) int64 which clip of the pool. starts: where each crop begins, seconds.
        turns: question slots, then one of facts and one of narration.
        letters: (k, 3) int64: for each letter its slot, its place among the slot's targets, what it tells (`TRACKED`).
        occurrences: (B, T) uint8 of each media token, pictures' before sound's (`data_prep.arrays.occurrences`).
    """

    seconds: int
    clips: Tensor
    starts: list[int]
    turns: list[PackedTurn]
    letters: Tensor
    occurrences: Tensor

    def pack(self) -> bytes:
        """For the way between processes: torch would open a shared file for every tensor."""
        return pickle.dumps(self)

    @staticmethod
    def unpack(packed: bytes) -> Batch:
        """Inverse of `pack`."""
        batch = pickle.loads(packed)
        assert isinstance(batch, Batch)
        return batch


class TurnBatches(IterableDataset[bytes]):
    """Endless random batches (packed) at the level of the curriculum that `level` holds, for workers of a DataLoader.

    Args:
        model: whose tokenizer and dialogue.
        specs: the pool, all of one length and slot length.
        levels: (seconds of a crop, crops in a batch, questions of each), from first to last of the curriculum.
        level: shared with the training process, which raises it.
        seed: of everything drawn. start: step that the first batch is for; batches of another start are others.
    """

    def __init__(
        self,
        model: StreamingModel,
        specs: Sequence[ClipSpec],
        levels: Sequence[tuple[int, int, int]],
        level: multiprocessing.sharedctypes.Synchronized[int],
        seed: int = 0,
        start: int = 0,
    ) -> None:
        self.model, self.specs, self.levels, self.level = model, specs, levels, level
        self.seed, self.start = seed, start

    def __iter__(self) -> Iterator[bytes]:
        info = get_worker_info()
        worker = info.id if info else 0
        rng = np.random.default_rng((self.seed, worker, self.start))
        maker = QuestionMaker(int(rng.integers(2**31)), 0)
        while True:
            level = self.level.value
            if level and rng.random() < 0.2:  # earlier lengths are not forgotten
                level = int(rng.integers(level))
            yield self._batch(*self.levels[level], rng, maker).pack()

    def _batch(self, seconds: int, size: int, asks: int, rng: np.random.Generator, maker: QuestionMaker) -> Batch:
        clips = rng.integers(len(self.specs), size=size)
        slot_s = self.specs[0].settings.slot_s
        step = int(np.lcm(round(slot_s), 2))  # crops begin where a slot and a block of the audio tower begin
        last = (int(self.specs[0].settings.seconds) - seconds) // step
        starts = [int(s) * step for s in rng.integers(last + 1, size=size)]
        cut = [crop(self.specs[c], s, s + seconds) for c, s in zip(clips, starts, strict=True)]
        asked = [maker.ask(spec, asks) for spec in cut]
        turns, letters = [], []
        for slot in range(max(len(q) for q in asked)):
            form = str(rng.choice(list(FORMS), p=list(FORMS.values())))  # one for all, so that little is padding
            row = [rendered(self.model, q[slot], form) if slot < len(q) else None for q in asked]
            turns.append(pack(row))
            told_by = [TRACKED.index(q[slot].kind if form in LETTER_FORMS else form) for q in asked if slot < len(q)]
            letters += [(slot, place, tells) for place, tells in zip(_letters(row), told_by, strict=True)]
        draw = random.Random(int(rng.integers(2**31)))
        turns.append(pack([listed(self.model, facts(spec, draw)) for spec in cut], "facts"))
        told = [narration(spec) for spec in cut]
        turns.append(pack([self.model.render(Turn(NARRATE, text or "nothing")) for text in told], "narration"))
        places = torch.tensor(letters, dtype=torch.int64).view(-1, 3)
        return Batch(seconds, torch.from_numpy(clips), starts, turns, places, media_occurrences(cut))


def media_occurrences(specs: Sequence[ClipSpec]) -> Tensor:
    """(B, T) uint8, as `Batch.occurrences`."""
    found = [occurrences(spec) for spec in specs]
    rows = [np.concatenate([f["visual"].flatten(), f["audio"]]) for f in found]
    return torch.from_numpy(np.stack(rows).astype(np.uint8))
