"""The recall world: what happens in a clip, as plain data. `arrays` makes it visible and audible, `questions` asks.

A clip shows a slowly changing background. Its time is divided into slots; a slot holds a *sight* (a shape in a colour
in one cell of the picture), a *sound* (a pattern at a pitch), both at once, or nothing. In a clip a shape has one
colour and a pattern one pitch: that pair is a *thing*. Things come back in other slots and cells (redundant copies),
and some occurrences are faint. On top come loud *distractors* nobody asks about: flashes of visual noise, clicks and
bursts of sound noise. An eighth of the shapes' colours and a sixth of the patterns' pitches are left to test clips.

Everything follows from (settings, seed, split, index); no state, no clock. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

from omnimem_train.errors import UserError

VERSION = 3  # of the rules below: a change that alters pixels, samples or questions raises it
SPLITS = ("train", "val", "test")
SHAPES = (
    "circle", "square", "triangle", "cross", "ring", "diamond", "bar", "box",
    "pillar", "wedge", "ex", "corner", "tee", "stripes", "hourglass", "dots",
)  # fmt: skip
COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (50, 80, 240),
    "yellow": (240, 220, 40),
    "magenta": (220, 50, 210),
    "cyan": (40, 215, 220),
    "orange": (245, 140, 30),
    "white": (245, 245, 245),
}
PATTERNS = (
    "hum", "beeps", "trill", "rise", "fall", "chord", "hiss", "buzz", "pulse", "siren", "knocks", "warble",
)  # fmt: skip
PITCHES = {"deep": 200.0, "low": 340.0, "middle": 580.0, "high": 990.0, "shrill": 1680.0, "piercing": 2860.0}  # Hz
STEP_S = 0.5  # event times are multiples of it
EVENTS_PER_SLOT = 1.5  # sights and sounds together
MOST_COUNTED = 4  # occurrences of a thing that "how many times" asks for: 1 to 4


@dataclass(frozen=True)
class WorldSettings:
    """What all clips of a world share.

    Attributes:
        seconds: length of a clip, 4 to 36000.
        size: pixels of a side of the square picture.
        grid: cells in a row of the picture; a shape fills about 80 % of a cell.
        fps: frames a second in the file.
        sampling_rate: of the sound (Hz).
        slot_s: length of a slot, a multiple of 0.5. What remains of a clip after its last whole slot has no events.
        distractors_per_s: in each modality, per second.
        loudness: of distractors: contrast of flashes, amplitude of noise; 0 for none to be seen or heard, 2 for twice.
        copies: mean number of extra occurrences of a thing.
        faint: share of event occurrences of low contrast or low amplitude, still recognisable.
        sound_share: share of event occurrences that are sounds.
    """

    seconds: float = 60.0
    size: int = 112
    grid: int = 4
    fps: int = 4
    sampling_rate: int = 16000
    slot_s: float = 3.0
    distractors_per_s: float = 0.5
    loudness: float = 1.0
    copies: float = 0.5
    faint: float = 0.15
    sound_share: float = 0.5

    def __post_init__(self) -> None:
        longest = min(60, self.seconds)
        bad = [
            f"{name} = {getattr(self, name)} (must be {rule})"
            for name, rule, good in (
                ("seconds", "from 4 to 36000", 4 <= self.seconds <= 36000),
                ("size", "even and at least 16", self.size >= 16 and self.size % 2 == 0),
                ("grid", "from 1 to size / 8", 1 <= self.grid <= self.size // 8),
                ("fps", "from 1 to 240", 1 <= self.fps <= 240),
                ("sampling_rate", "at least 8000", self.sampling_rate >= 8000),
                ("slot_s", "a multiple of 0.5 from 1.5 to 60 and to the clip's length",
                 1.5 <= self.slot_s <= longest and self.slot_s % STEP_S == 0),
                ("distractors_per_s", "from 0 to 100", 0 <= self.distractors_per_s <= 100),
                ("loudness", "from 0 to 10", 0 <= self.loudness <= 10),
                ("copies", "from 0 to 100", 0 <= self.copies <= 100),
                ("faint", "from 0 to 1", 0 <= self.faint <= 1),
                ("sound_share", "from 0 to 1", 0 <= self.sound_share <= 1),
            )
            if not good
        ]  # fmt: skip
        if bad:
            raise UserError("world settings: " + "; ".join(bad), "no clip can be made of them", "change these values")

    @property
    def n_slots(self) -> int:
        """Whole slots of a clip, at least 1."""
        return int(self.seconds / self.slot_s)


@dataclass(frozen=True)
class Sight:
    """A shape in a colour, in one cell, from start_s to end_s."""

    shape: str
    colour: str
    row: int
    column: int
    start_s: float
    end_s: float
    slot: int
    faint: bool = False


@dataclass(frozen=True)
class Sound:
    """A pattern at a pitch, from start_s to end_s."""

    pattern: str
    pitch: str
    start_s: float
    end_s: float
    slot: int
    faint: bool = False


Event = TypeVar("Event", Sight, Sound)


@dataclass(frozen=True)
class Distractor:
    """A flash of visual noise in a cell (`kind` "flash"), a "click" or a "burst" of noise, from start_s to end_s."""

    kind: str
    row: int
    column: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class ClipSpec:
    """All there is to know of a clip; its events are in time order, at most one sight and one sound a slot."""

    id: str
    split: str
    settings: WorldSettings
    noise_seed: tuple[int, ...]
    background: tuple[tuple[int, int, int], tuple[int, int, int]]
    sights: tuple[Sight, ...]
    sounds: tuple[Sound, ...]
    distractors: tuple[Distractor, ...]

    def fingerprint(self) -> str:
        """16 hex digits that change with anything that changes the clip."""
        text = json.dumps([VERSION, asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _held_out(names: Sequence[str], partners: Sequence[str]) -> dict[str, str]:
    """The one partner of each name that is held out: names in the order of a hash take the partners in turn."""
    order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    return {name: partners[i % len(partners)] for i, name in enumerate(order)}


HELD_OUT = _held_out(SHAPES, tuple(COLOURS)) | _held_out(PATTERNS, tuple(PITCHES))
OPEN_PARTNERS = {
    name: tuple(p for p in (COLOURS if name in SHAPES else PITCHES) if p != HELD_OUT[name])
    for name in (*SHAPES, *PATTERNS)
}


def is_held_out(shape_or_pattern: str, colour_or_pitch: str) -> bool:
    """Whether a combination occurs in test clips alone."""
    return HELD_OUT[shape_or_pattern] == colour_or_pitch


def make_clip(settings: WorldSettings, seed: int, split: str, index: int) -> ClipSpec:
    """The clip number `index` of a split. Splits draw from separate random streams, so none shares a clip."""
    rng = random.Random(f"{seed}/{split}/{index}")
    seen, heard = _fill_slots(settings, rng)
    spans = [_span(slot, settings, rng) for slot in range(settings.n_slots)]
    n_cells = settings.grid**2
    sights, sounds = [], []
    for shape, slots in _things(SHAPES, seen, settings, rng):
        colour = _partner(shape, split, rng)
        cells = rng.sample(range(n_cells), min(n_cells, len(slots)))
        for i, slot in enumerate(slots):
            cell = divmod(cells[i % n_cells], settings.grid)
            sights.append(Sight(shape, colour, *cell, *spans[slot], slot, rng.random() < settings.faint))
    for pattern, slots in _things(PATTERNS, heard, settings, rng):
        pitch = _partner(pattern, split, rng)
        sounds += [Sound(pattern, pitch, *spans[slot], slot, rng.random() < settings.faint) for slot in slots]
    dark = [rng.randrange(20, 110) for _ in range(6)]
    return ClipSpec(
        id=f"{split}-{index:05d}",
        split=split,
        settings=settings,
        noise_seed=(seed, SPLITS.index(split), index),
        background=((dark[0], dark[1], dark[2]), (dark[3], dark[4], dark[5])),
        sights=tuple(sorted(sights, key=lambda e: e.slot)),
        sounds=tuple(sorted(sounds, key=lambda e: e.slot)),
        distractors=_distractors(settings, rng),
    )


def crop(spec: ClipSpec, start_s: float, end_s: float) -> ClipSpec:
    """The part of a clip between two borders of slots, as a clip of its own: events and times count from `start_s` on.

    A distractor across a border is cut there. The background runs through both of its colours in the part.
    """
    slot_s = spec.settings.slot_s
    if not 0 <= start_s < end_s <= spec.settings.seconds or start_s % slot_s or end_s % slot_s:
        raise UserError(
            f"part from {start_s} s to {end_s} s of a clip of {spec.settings.seconds} s",
            "borders lie inside the clip and between slots",
            f"use multiples of {slot_s} s",
        )
    first, last = round(start_s / slot_s), round(end_s / slot_s)

    return replace(
        spec,
        id=f"{spec.id}-{first:04d}-{last:04d}",
        settings=replace(spec.settings, seconds=float(end_s - start_s)),
        noise_seed=(*spec.noise_seed, first, last),
        sights=tuple(_earlier(e, start_s, first) for e in spec.sights if first <= e.slot < last),
        sounds=tuple(_earlier(e, start_s, first) for e in spec.sounds if first <= e.slot < last),
        distractors=tuple(
            replace(d, start_s=max(d.start_s, start_s) - start_s, end_s=min(d.end_s, end_s) - start_s)
            for d in spec.distractors
            if d.start_s < end_s and d.end_s > start_s
        ),
    )


def _earlier(event: Event, by_s: float, by_slots: int) -> Event:
    return replace(event, start_s=event.start_s - by_s, end_s=event.end_s - by_s, slot=event.slot - by_slots)


def _fill_slots(settings: WorldSettings, rng: random.Random) -> tuple[list[int], list[int]]:
    """Slots with a sight and slots with a sound, each in random order; at least half of the used slots hold both."""
    n = settings.n_slots
    n_seen, n_heard = (
        min(n, int(n * EVENTS_PER_SLOT * share + rng.random()))
        for share in (1 - settings.sound_share, settings.sound_share)
    )
    n_seen = max(n_seen, 1 if settings.sound_share < 1 else 0)
    n_heard = max(n_heard, 1 if settings.sound_share > 0 else 0)
    order = rng.sample(range(n), n)
    least, most = max(-(-(n_seen + n_heard) // 3), n_seen + n_heard - n), min(n_seen, n_heard)
    both = rng.randint(least, min(most, least + 2)) if least < most else most
    seen, rest = order[:n_seen], order[n_seen:]
    heard = rng.sample(seen, both) + rest[: n_heard - both]
    return seen, rng.sample(heard, len(heard))


def _things(
    names: Sequence[str], slots: list[int], settings: WorldSettings, rng: random.Random
) -> list[tuple[str, list[int]]]:
    """Which names occur, and in which of `slots`. One or two occur 1 to 4 times, uniformly; the others once and, on
    average, `copies` times more. If names run out (long clips), a quarter of them fill the remaining slots."""
    counts = [rng.randint(1, MOST_COUNTED) for _ in range(rng.randint(1, 2))]
    again = math.log(settings.copies / (1 + settings.copies)) if settings.copies else -math.inf
    while sum(counts) < len(slots) and len(counts) < len(names):
        counts.append(1 + int(math.log(1 - rng.random()) / again))
    common = range(len(counts) - len(counts) // 4, len(counts))
    for i in range(len(slots) - sum(counts)):
        counts[common[i % len(common)]] += 1
    chosen, begin = [], 0
    for name, n in zip(rng.sample(names, len(counts)), counts, strict=True):
        if taken := slots[begin : begin + n]:
            chosen.append((name, sorted(taken)))
        begin += n
    return chosen


def _partner(name: str, split: str, rng: random.Random) -> str:
    """A colour or pitch: in test clips a held-out one half of the time, elsewhere never."""
    if split == "test" and rng.random() < 0.5:
        return HELD_OUT[name]
    return rng.choice(OPEN_PARTNERS[name])


def _span(slot: int, settings: WorldSettings, rng: random.Random) -> tuple[float, float]:
    """Start and end inside a slot: 1 to 3 s long, at least half a second shorter than the slot."""
    n_steps = round(settings.slot_s / STEP_S)
    length = rng.randint(2, min(6, n_steps - 1))
    start = slot * n_steps + rng.randint(0, n_steps - length)
    return start * STEP_S, (start + length) * STEP_S


def _distractors(settings: WorldSettings, rng: random.Random) -> tuple[Distractor, ...]:
    """Flashes and noises at multiples of a quarter second, 0.25 to 1 s long."""
    found, quarters = [], int(settings.seconds * 4)
    for modality in ("flash", "noise"):
        for _ in range(int(settings.distractors_per_s * settings.seconds + rng.random())):
            kind = modality if modality == "flash" else rng.choice(("click", "burst"))
            length = rng.randint(2, 4) if kind == "flash" else rng.randint(1, 2)
            start = rng.randint(0, quarters - length)
            row, column = rng.randrange(settings.grid), rng.randrange(settings.grid)
            found.append(Distractor(kind, row, column, start / 4, (start + length) / 4))
    return tuple(sorted(found, key=lambda d: (d.start_s, d.kind, d.row, d.column)))
