"""Questions about a clip of the world, each with four options and one right answer.

Kinds: "colour" (of a shape), "pitch" (of a sound), "together" (which shape was seen when a sound was heard), "order"
(which came first). The wrong options of "together" and "order" occur in the clip too where there are enough, so that
what was there does not give away when it was there. Right letters go round A, B, C, D per kind, from a random start,
over all clips of a split.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_prep.world import COLOURS, PITCHES, SHAPES, ClipSpec, Sight, Sound

KINDS = ("colour", "pitch", "together", "order")
LETTERS = "ABCD"


@dataclass(frozen=True)
class Question:
    """One question. `known_s`: from this second on the clip has shown all that the answer needs."""

    kind: str
    text: str
    options: tuple[str, ...]
    answer: str
    known_s: float


class QuestionMaker:
    """Makes the questions of a split, clip after clip; remembers the last letter used per kind to balance answers."""

    def __init__(self, seed: int, split_number: int) -> None:
        self._rng = np.random.default_rng((seed, split_number, 2**31))
        self._letters = {kind: int(self._rng.integers(4)) for kind in KINDS}

    def ask(self, spec: ClipSpec) -> list[Question]:
        """All questions the clip can answer: one per sight, sound and pair, and two on order."""
        return [
            self._place(kind, text, right, wrong, known_s)
            for kind, text, right, wrong, known_s in (*self._single(spec), *self._together(spec), *self._order(spec))
        ]

    def _place(self, kind: str, text: str, right: str, wrong: list[str], known_s: float) -> Question:
        """Put the right option at the next letter of its kind; the wrong ones follow in random order."""
        assert len(wrong) == 3
        assert right not in wrong
        self._letters[kind] = at = (self._letters[kind] + 1) % 4
        options = self._shuffle(wrong)
        options.insert(at, right)
        return Question(kind, text, tuple(options), LETTERS[at], known_s)

    def _single(self, spec: ClipSpec) -> Iterator[tuple[str, str, str, list[str], float]]:
        for sight in spec.sights:
            wrong = self._others(list(COLOURS), sight.colour)
            yield "colour", f"What colour was the {sight.shape}?", sight.colour, wrong, sight.end_s
        for sound in spec.sounds:
            wrong = self._others(list(PITCHES), sound.pitch)
            yield "pitch", f"What was the pitch of the {sound.pattern}?", sound.pitch, wrong, sound.end_s

    def _together(self, spec: ClipSpec) -> Iterator[tuple[str, str, str, list[str], float]]:
        shape_in = {sight.slot: sight.shape for sight in spec.sights}
        for sound in (s for s in spec.sounds if s.slot in shape_in):
            right = shape_in[sound.slot]
            seen = self._others(list(shape_in.values()), right)
            unseen = self._shuffle([s for s in SHAPES if s not in shape_in.values()])
            text = f"Which shape was seen when the {sound.pattern} was heard?"
            yield "together", text, right, (seen + unseen)[:3], sound.end_s

    def _order(self, spec: ClipSpec) -> Iterator[tuple[str, str, str, list[str], float]]:
        """Which of four came first: four shapes, and four events of either kind from different slots."""
        by_slot: dict[int, list[Sight | Sound]] = {}
        happened: list[Sight | Sound] = [*spec.sights, *spec.sounds]
        for event in happened:
            by_slot.setdefault(event.slot, []).append(event)
        mixed = [events[int(self._rng.integers(len(events)))] for _, events in sorted(by_slot.items())]
        for text, events in (("Which of these shapes came first?", spec.sights), ("Which of these came first?", mixed)):
            if len(events) >= 4:
                chosen = [events[i] for i in self._rng.permutation(len(events))[:4]]
                chosen.sort(key=lambda e: e.start_s)
                names = [e.shape if isinstance(e, Sight) else e.pattern for e in chosen]
                yield "order", text, names[0], names[1:], max(e.end_s for e in chosen)

    def _others(self, values: list[str], right: str) -> list[str]:
        return self._shuffle([v for v in values if v != right])[:3]

    def _shuffle(self, values: list[str]) -> list[str]:
        return [values[i] for i in self._rng.permutation(len(values))]


def narration(spec: ClipSpec) -> str:
    """All events in time order, for example "red circle; blue bar and high beeps; low hum"."""
    slots: dict[int, list[str]] = {}
    for sound in spec.sounds:
        slots.setdefault(sound.slot, []).append(f"{sound.pitch} {sound.pattern}")
    for sight in spec.sights:
        slots.setdefault(sight.slot, []).insert(0, f"{sight.colour} {sight.shape}")
    return "; ".join(" and ".join(slots[slot]) for slot in sorted(slots))
