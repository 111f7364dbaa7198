"""Questions about a clip of the world, each with four options and one right answer.

- "colour" of a shape, "pitch" of a sound;
- "together": which shape was seen when a sound was heard that occurs once, or which sound was heard when a shape was
  seen that occurs once;
- "order": which of four shapes, four sounds or two of each came first (their first occurrences count); the question
  names all four, so that it can be asked without options too;
- "count": how many times something was seen or heard, once to four times;
- "when": in which quarter of the clip something was seen or heard that occurs once.

What is there to guess from is taken away. Right letters go round A, B, C, D per kind. A count, a quarter or a modality
that has been right more often than the others is not asked for again until they have caught up. Options of "together"
and "order" occur in the clip, and how often an option of "together" occurs says nothing either: what was there does not
tell when it was there. (Clips of fewer than 8 slots are for practice: there an option of "together" may not occur.) In
test clips the held-out colour of a shape (pitch of a pattern) is always among the options and right in a quarter of the
questions; elsewhere it is never an option.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from data_prep.world import HELD_OUT, OPEN_PARTNERS, PATTERNS, SHAPES, ClipSpec, Sight, Sound, is_held_out

NARRATE = "Name everything that was seen and heard, in order."
LIST = "List the facts about everything that was seen and heard."
KINDS = ("colour", "pitch", "together", "order", "count", "when")
LETTERS = "ABCD"
TIMES = ("once", "twice", "three times", "four times")
QUARTERS = ("the first quarter", "the second quarter", "the third quarter", "the last quarter")
TRIES = 3  # at finding wrong options
SHORT = 8  # clips of fewer slots cannot be expected to hold four shapes and four patterns
SLACK = 1  # how far an answer may run ahead of the rarest one


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        kind: one of KINDS.
        text: the question alone.
        options: four texts.
        answer: the right letter.
        known_s: from this second on the clip has shown all that the answer needs.
        held_out: whether the thing asked about or the one that is the answer is a combination held out for test.
    """

    kind: str
    text: str
    options: tuple[str, ...]
    answer: str
    known_s: float
    held_out: bool = False


class _Clip:
    """A clip by its things: the occurrences of each shape and pattern in time order."""

    def __init__(self, spec: ClipSpec) -> None:
        self.seconds, self.n_slots, self.test = spec.settings.seconds, spec.settings.n_slots, spec.split == "test"
        self.seen: dict[str, list[Sight]] = {}
        self.heard: dict[str, list[Sound]] = {}
        for sight in spec.sights:
            self.seen.setdefault(sight.shape, []).append(sight)
        for sound in spec.sounds:
            self.heard.setdefault(sound.pattern, []).append(sound)
        self.shape_in = {e.slot: e.shape for e in spec.sights}
        self.pattern_in = {e.slot: e.pattern for e in spec.sounds}

    def all(self, modality: str) -> dict[str, list[Sight]] | dict[str, list[Sound]]:
        """Occurrences by shape ("seen") or by pattern ("heard")."""
        return self.seen if modality == "seen" else self.heard

    def held_out(self, name: str) -> bool:
        """Whether a shape or a pattern has its held-out colour or pitch here."""
        if name in self.seen:
            return is_held_out(name, self.seen[name][0].colour)
        return name in self.heard and is_held_out(name, self.heard[name][0].pitch)


Maker = Callable[[], Question | None]  # None: not now, or answers would get out of balance


class QuestionMaker:
    """Makes the questions of a split, clip after clip. It remembers what was right so far, to keep answers balanced."""

    def __init__(self, seed: int, split_number: int) -> None:
        self._rng = random.Random(f"{seed}/{split_number}/questions")
        self._letters = {kind: self._rng.randrange(4) for kind in KINDS}
        self._right: dict[tuple[str, str], list[int]] = {}

    def ask(self, spec: ClipSpec, n: int | None = None) -> list[Question]:
        """Questions the clip can answer.

        Args:
            spec: the clip.
            n: so many, kinds in turn from a random one, at random within a kind; fewer if the clip has no more. Without
                it all, kind by kind.
        """
        clip = _Clip(spec)
        if n is None:
            made = (make() for kind in KINDS for make in self._makers(kind, clip))
            return [question for question in made if question is not None]
        waiting = [iter(self._makers(kind, clip)) for kind in self._rng.sample(KINDS, len(KINDS))]
        asked: list[Question] = []
        while waiting and len(asked) < n:
            makers = waiting.pop(0)
            question = next((q for q in (make() for make in makers) if q is not None), None)
            if question is not None:
                asked.append(question)
                waiting.append(makers)
        return asked

    def _makers(self, kind: str, clip: _Clip) -> Iterator[Maker]:
        """What can be asked of a kind, in random order."""
        modalities = ("seen", "heard")
        if kind in ("colour", "pitch"):
            names: list[tuple[str, ...]] = [(name,) for name in (clip.seen if kind == "colour" else clip.heard)]
        elif kind == "order":
            names = [(which,) for which in ("seen", "heard", "mixed")]
        elif kind == "together":
            names = [(m, right) for m in modalities for right in self._pairs(clip, m)]
        else:
            names = [(m, name) for m in modalities for name in clip.all(m)]
        make = getattr(self, f"_{kind}")
        return (partial(make, clip, *chosen) for chosen in self._rng.sample(names, len(names)))

    def _colour(self, clip: _Clip, shape: str) -> Question | None:
        first = clip.seen[shape][0]
        return self._partner("colour", f"What colour was the {shape}?", clip, shape, first.colour, first.end_s)

    def _pitch(self, clip: _Clip, pattern: str) -> Question | None:
        first = clip.heard[pattern][0]
        return self._partner("pitch", f"What was the pitch of the {pattern}?", clip, pattern, first.pitch, first.end_s)

    def _partner(self, kind: str, text: str, clip: _Clip, name: str, right: str, known_s: float) -> Question | None:
        """About a colour or pitch; in test clips the held-out one is an option, and right once for three others."""
        held_out = is_held_out(name, right)
        wrong = [p for p in OPEN_PARTNERS[name] if p != right]
        if not clip.test:
            return self._place(kind, text, right, self._rng.sample(wrong, 3), known_s, held_out)
        if not self._take("held out", kind, 0 if held_out else self._rng.randint(1, 3), 4):
            return None
        others = self._rng.sample(wrong, 3) if held_out else [HELD_OUT[name], *self._rng.sample(wrong, 2)]
        return self._place(kind, text, right, others, known_s, held_out)

    def _pairs(self, clip: _Clip, modality: str) -> dict[str, list[Sight | Sound]]:
        """What "together" can ask for: by shape (or pattern, with "heard") the single events it occurs with."""
        others = clip.heard if modality == "seen" else clip.seen
        beside = clip.shape_in if modality == "seen" else clip.pattern_in
        pairs: dict[str, list[Sight | Sound]] = {}
        for events in others.values():
            if len(events) == 1 and events[0].slot in beside:
                pairs.setdefault(beside[events[0].slot], []).append(events[0])
        return pairs

    def _together(self, clip: _Clip, modality: str, right: str) -> Question | None:
        event = self._rng.choice(self._pairs(clip, modality)[right])
        wrong = self._others_there(clip, modality, right)
        if not wrong:
            return None
        if isinstance(event, Sound):
            name, text = event.pattern, f"Which shape was seen when the {event.pattern} was heard?"
        else:
            name, text = event.shape, f"Which sound was heard when the {event.shape} was seen?"
        held_out = clip.held_out(right) or clip.held_out(name)
        return self._place("together", text, right, wrong, event.end_s, held_out)

    def _others_there(self, clip: _Clip, modality: str, right: str) -> list[str]:
        """Three other things of a clip, if answers stay balanced: among options that occur, say, 1, 1, 2 and 4 times,
        each of the four is right as often as the others. A short clip without four things lends some of the world."""
        times = {name: len(events) for name, events in clip.all(modality).items()}
        others = [name for name in times if name != right]
        if len(others) < 3:
            strange = [name for name in (SHAPES if modality == "seen" else PATTERNS) if name not in times]
            return others + self._rng.sample(strange, 3 - len(others)) if clip.n_slots < SHORT else []
        for _ in range(TRIES):
            wrong = self._rng.sample(others, 3)
            rank = sum(times[name] < times[right] for name in wrong)
            rank += self._rng.randint(0, sum(times[name] == times[right] for name in wrong))
            often = sorted(min(3, times[name]) for name in (right, *wrong))
            if self._take("together", f"{modality} {often}", rank, 4, slack=0):
                return wrong
        return []

    def _order(self, clip: _Clip, which: str) -> Question | None:
        if which == "mixed":
            names = self._mixed(clip)
        else:
            there = list(clip.all(which))
            names = self._rng.sample(there, 4) if len(there) >= 4 else []
        if not names:
            return None
        *others, last = self._rng.sample(names, 4)
        text = f"Which came first: the {', the '.join(others)} or the {last}?"
        first = {name: events[0] for events_of in (clip.seen, clip.heard) for name, events in events_of.items()}
        names.sort(key=lambda name: first[name].start_s)
        known_s = max(first[name].end_s for name in names)
        return self._place("order", text, names[0], names[1:], known_s, clip.held_out(names[0]))

    def _mixed(self, clip: _Clip) -> list[str]:
        """Two shapes and two sounds that first came in different slots, a shape first as often as a sound; or none."""
        seen, heard = ({name: e[0].slot for name, e in clip.all(m).items()} for m in ("seen", "heard"))
        target = self._rarest("order", "mixed", 2)
        same, other = (seen, heard) if target == 0 else (heard, seen)
        for right in self._rng.sample(list(same), len(same)):
            third = [name for name, slot in same.items() if slot > same[right]]
            if third:
                second = self._rng.choice(third)
                rest = {slot: n for n, slot in other.items() if slot > same[right] and slot != same[second]}
                if len(rest) >= 2:
                    self._take("order", "mixed", target, 2)
                    return [right, second, *self._rng.sample(list(rest.values()), 2)]
        return []

    def _count(self, clip: _Clip, modality: str, name: str) -> Question | None:
        n = len(clip.all(modality)[name])
        if n > len(TIMES) or not self._take("count", modality, n - 1, len(TIMES)):
            return None
        text = f"How many times was the {name} {modality}?"
        return self._place_all("count", text, TIMES, n - 1, clip.seconds, clip.held_out(name))

    def _when(self, clip: _Clip, modality: str, name: str) -> Question | None:
        event, *more = clip.all(modality)[name]
        quarter = int(4 * event.start_s / clip.seconds)
        inside = 4 * event.end_s <= (quarter + 1) * clip.seconds
        if more or not inside or not self._take("when", modality, quarter, len(QUARTERS)):
            return None
        text = f"In which part of the video was the {name} {modality}?"
        return self._place_all("when", text, QUARTERS, quarter, clip.seconds, clip.held_out(name))

    def _take(self, kind: str, group: str, answer: int, of: int, slack: int = SLACK) -> bool:
        """Whether this one of `of` answers may be right now; if so it is counted."""
        counts = self._right.setdefault((kind, group), [0] * of)
        if counts[answer] > min(counts) + slack:
            return False
        counts[answer] += 1
        return True

    def _rarest(self, kind: str, group: str, of: int) -> int:
        counts = self._right.get((kind, group), [0] * of)
        return self._rng.choice([i for i, n in enumerate(counts) if n == min(counts)])

    def _place_all(
        self, kind: str, text: str, every: Sequence[str], right: int, known_s: float, held_out: bool
    ) -> Question:
        wrong = [option for i, option in enumerate(every) if i != right]
        return self._place(kind, text, every[right], wrong, known_s, held_out)

    def _place(
        self, kind: str, text: str, right: str, wrong: Sequence[str], known_s: float, held_out: bool
    ) -> Question:
        """Put the right option at the next letter of its kind; the wrong ones follow in random order."""
        assert len(wrong) == 3
        assert right not in wrong
        self._letters[kind] = at = (self._letters[kind] + 1) % 4
        options = self._rng.sample(wrong, 3)
        options.insert(at, right)
        return Question(kind, text, tuple(options), LETTERS[at], known_s, held_out)


def narration(spec: ClipSpec) -> str:
    """All events in time order, slot by slot, for example "red circle; blue bar and high beeps; low hum"."""
    slots: dict[int, list[str]] = {}
    for sound in spec.sounds:
        slots.setdefault(sound.slot, []).append(f"{sound.pitch} {sound.pattern}")
    for sight in spec.sights:
        slots.setdefault(sight.slot, []).insert(0, f"{sight.colour} {sight.shape}")
    return "; ".join(" and ".join(slots[slot]) for slot in sorted(slots))


def facts(spec: ClipSpec, rng: random.Random) -> list[tuple[str, str]]:
    """(name, facts) of every thing, in random order: colour or pitch, what came with it the first time, how often
    it came, and in which quarter of the clip first, for example ("circle", "red with beeps twice second")."""
    clip = _Clip(spec)
    rows = []
    for own, other in ((clip.seen, clip.pattern_in), (clip.heard, clip.shape_in)):
        for name, events in own.items():
            first = events[0]
            kind = first.colour if isinstance(first, Sight) else first.pitch
            quarter = QUARTERS[min(3, int(4 * first.start_s / clip.seconds))].split()[1]
            times = TIMES[len(events) - 1].split()[0] if len(events) <= len(TIMES) else "often"
            rows.append((name, f"{kind} with {other.get(first.slot, 'nothing')} {times} {quarter}"))
    rng.shuffle(rows)
    return rows
