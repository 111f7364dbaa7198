"""What a model chooses in the questions of many clips, under a memory setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_prep.questions import Question, QuestionMaker
from data_prep.streams import WorldStreams
from data_prep.world import SPLITS, ClipSpec
from omnimem_train.memory.spec import MemorySpec
from omnimem_train.step import answer_logits
from omnimem_train.streaming import Stream
from scripts.recall.turns import ChoiceTurn, choices

FORM = "direct"  # how the study asks


@dataclass(frozen=True)
class ClipSet:
    """Clips of one length, encoded, with their questions.

    Attributes:
        specs: what happens in them.
        media: (N, T, E) their tokens.
        questions: of each clip.
    """

    specs: Sequence[ClipSpec]
    media: Tensor
    questions: Sequence[Sequence[Question]]

    @property
    def seconds(self) -> int:
        """Length of each clip."""
        return int(self.specs[0].settings.seconds)


def clip_set(
    streams: WorldStreams, specs: Sequence[ClipSpec], n_questions: int, seed: int = 0, media: Tensor | None = None
) -> ClipSet:
    """Clips of a split with `n_questions` of each (none: 0), encoded unless `media` is given."""
    maker = QuestionMaker(seed, SPLITS.index(specs[0].split))
    asked = [maker.ask(spec, n_questions) if n_questions else [] for spec in specs]
    return ClipSet(specs, streams.encode(specs) if media is None else media, asked)


class Asker:
    """Asks all questions of a clip set at the end of its clips.

    Args:
        streams: of the model that answers.
        clips: what is watched.
        form: "direct" compares the options' own words, the name of a benchmark's prompt the letters (see `choices`).
        at_once: clips in a batch.
    """

    def __init__(self, streams: WorldStreams, clips: ClipSet, form: str = FORM, at_once: int = 128) -> None:
        self.streams, self.clips = streams, clips
        self.batches: list[tuple[Tensor, list[ChoiceTurn]]] = []
        for first in range(0, len(clips.specs), at_once):
            part = slice(first, first + at_once)
            self.batches.append((clips.media[part], choices(streams.model, clips.questions[part], form)))

    @torch.no_grad()
    def answers(self, spec: MemorySpec) -> np.ndarray:
        """(questions,) int8, the option chosen (0 to 3) of each question, in the order of clips and their questions."""
        stream = Stream(self.streams.model, spec)
        found = []
        for media, turns in self.batches:
            logits, _ = answer_logits(stream, self.streams.stream(media, self.clips.seconds, [t.turn for t in turns]))
            table = torch.full((len(media), len(turns)), -1, dtype=torch.int8, device=media.device)
            for slot, (turn, rows) in enumerate(zip(turns, logits, strict=True)):
                chosen = rows.gather(1, turn.candidates.to(rows.device)).argmax(-1)
                table[turn.turn.read[:, 0].to(media.device), slot] = chosen.to(torch.int8)
            found.append(table.cpu().numpy())
        return np.concatenate([t[t >= 0] for t in found])

    def right(self) -> np.ndarray:
        """(questions,) int8, the right letters in the same order."""
        return np.array(["ABCD".index(q.answer) for clip in self.clips.questions for q in clip], dtype=np.int8)

    def kinds(self) -> np.ndarray:
        """(questions,) their kinds, in the same order."""
        return np.array([q.kind for clip in self.clips.questions for q in clip])


def by_kind(asker: Asker, answers: np.ndarray) -> dict[str, float]:
    """Share of right answers of each kind and of all."""
    hit, kinds = answers == asker.right(), asker.kinds()
    return {kind: float(hit[kinds == kind].mean()) for kind in sorted(set(kinds))} | {"all": float(hit.mean())}
