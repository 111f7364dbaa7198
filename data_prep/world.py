"""A small world of clips with known events, as arrays: the ground under `data_prep.render`.

A clip shows a slowly changing background. Its time is divided into equal slots; a slot holds a *sight* (a shape in a
colour in one cell of the picture), a *sound* (a pattern at a pitch), both at once, or nothing. Each shape and each
pattern occurs at most once in a clip, so every question has one answer. On top come *distractors* nobody asks about:
flashes of visual noise and clicks. Everything follows from (settings, seed, split, index); no state, no clock.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

import numpy as np

from omnimem_train.errors import UserError

VERSION = 1  # of the rules below: a change that alters pixels, samples or questions raises it
SPLITS = ("train", "val", "test")
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond", "bar", "box")
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
PATTERNS = ("beeps", "sweep", "noise", "chord", "hum", "trill")
PITCHES = {"low": 250.0, "middle": 500.0, "high": 1000.0, "very high": 2000.0}  # Hz


@dataclass(frozen=True)
class WorldSettings:
    """What all clips of a world share.

    Attributes:
        seconds: length of a clip, at least 4.
        size: pixels of a side of the square picture.
        grid: cells in a row of the picture; a shape fills about 80 % of a cell.
        fps: frames a second in the file.
        sampling_rate: of the sound (Hz).
        slot_s: wished length of a slot; a clip has max(2, round(seconds / slot_s)) slots.
        distractors_per_s: flashes and clicks, each, per second.
    """

    seconds: float = 16.0
    size: int = 112
    grid: int = 2
    fps: int = 4
    sampling_rate: int = 16000
    slot_s: float = 2.6
    distractors_per_s: float = 0.15

    def __post_init__(self) -> None:
        bad = [
            f"{name} = {value} (must be {rule})"
            for name, value, rule, good in (
                ("seconds", self.seconds, "from 4 to 36000", 4 <= self.seconds <= 36000),
                ("size", self.size, "even and at least 16", self.size >= 16 and self.size % 2 == 0),
                ("grid", self.grid, "from 1 to size / 8", 1 <= self.grid <= self.size // 8),
                ("fps", self.fps, "from 1 to 240", 1 <= self.fps <= 240),
                ("sampling_rate", self.sampling_rate, "at least 8000", self.sampling_rate >= 8000),
                ("slot_s", self.slot_s, "at least 1.5", self.slot_s >= 1.5),
                ("distractors_per_s", self.distractors_per_s, "from 0 to 100", 0 <= self.distractors_per_s <= 100),
            )
            if not good
        ]
        if bad:
            raise UserError("world settings: " + "; ".join(bad), "no clip can be made of them", "change these values")


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


@dataclass(frozen=True)
class Sound:
    """A pattern at a pitch, from start_s to end_s."""

    pattern: str
    pitch: str
    start_s: float
    end_s: float
    slot: int


@dataclass(frozen=True)
class Distractor:
    """A flash of visual noise in a cell (`kind` "flash") or a click ("click"), from start_s to end_s."""

    kind: str
    row: int
    column: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class ClipSpec:
    """All there is to know of a clip; `clip_arrays` makes it visible and audible."""

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


def make_clip(settings: WorldSettings, seed: int, split: str, index: int) -> ClipSpec:
    """The clip number `index` of a split. Splits draw from separate random streams, so none shares a clip."""
    key = (seed, SPLITS.index(split), index)
    rng = np.random.default_rng(key)
    n_slots = max(2, round(settings.seconds / settings.slot_s))
    seen, heard = _fill_slots(n_slots, rng)
    shapes = rng.permutation(SHAPES)[: len(seen)]
    patterns = rng.permutation(PATTERNS)[: len(heard)]
    spans = [_span(slot, n_slots, settings, rng) for slot in range(n_slots)]
    sights = tuple(
        Sight(str(shape), str(rng.choice(list(COLOURS))), *_cell(settings, rng), *spans[slot], slot)
        for slot, shape in zip(seen, shapes, strict=True)
    )
    sounds = tuple(
        Sound(str(pattern), str(rng.choice(list(PITCHES))), *spans[slot], slot)
        for slot, pattern in zip(heard, patterns, strict=True)
    )
    dark = tuple(tuple(int(c) for c in rng.integers(20, 110, 3)) for _ in range(2))
    return ClipSpec(
        id=f"{split}-{index:05d}",
        split=split,
        settings=settings,
        noise_seed=(*key, 1),
        background=(dark[0], dark[1]),  # type: ignore[arg-type]
        sights=sights,
        sounds=sounds,
        distractors=_distractors(settings, rng),
    )


def clip_arrays(spec: ClipSpec) -> tuple[np.ndarray, np.ndarray]:
    """The clip before any codec.

    Returns:
        frames: (round(seconds * fps), size, size, 3) uint8 RGB.
        samples: (round(seconds * sampling_rate),) float32 mono in [-1, 1].
    """
    rng = np.random.default_rng(spec.noise_seed)
    frames = _background(spec, rng)
    for flash in (d for d in spec.distractors if d.kind == "flash"):
        _draw(frames, spec.settings, flash, rng.integers(0, 256, (8, 8, 1)), np.ones((8, 8), bool))
    for sight in spec.sights:
        _draw(frames, spec.settings, sight, np.array(COLOURS[sight.colour]), None)
    samples = 0.004 * rng.standard_normal(round(spec.settings.seconds * spec.settings.sampling_rate))
    for sound in spec.sounds:
        _add(samples, spec.settings, sound, _tone(sound, spec.settings, rng))
    for click in (d for d in spec.distractors if d.kind == "click"):
        _add(samples, spec.settings, click, _click(click, spec.settings, rng))
    return frames, np.clip(samples, -1, 1).astype(np.float32)


def _fill_slots(n_slots: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Slots with a sight and slots with a sound: half of the used slots hold both, a third a sight alone."""
    used = min(n_slots, 8)
    both = (used + 1) // 2
    alone = max(1, used // 3) if used > both else 0
    order = [int(s) for s in rng.permutation(n_slots)[:used]]
    seen, heard = order[: both + alone], order[:both] + order[both + alone :]
    return sorted(seen), sorted(heard)


def _span(slot: int, n_slots: int, settings: WorldSettings, rng: np.random.Generator) -> tuple[float, float]:
    """Start and end inside a slot, at frame times: 1 to 3 s long, and shorter than the slot by a frame."""
    length = settings.seconds / n_slots
    frame = 1 / settings.fps
    duration = rng.uniform(1.0, max(1.0, min(3.0, length - frame)))
    start = slot * length + rng.uniform(0.0, max(0.0, length - frame - duration))
    first = int(np.ceil(start / frame - 1e-9))
    return round(first * frame, 6), round((first + max(1, round(duration / frame))) * frame, 6)


def _cell(settings: WorldSettings, rng: np.random.Generator) -> tuple[int, int]:
    return int(rng.integers(settings.grid)), int(rng.integers(settings.grid))


def _distractors(settings: WorldSettings, rng: np.random.Generator) -> tuple[Distractor, ...]:
    found = []
    for kind in ("flash", "click"):
        for _ in range(rng.poisson(settings.distractors_per_s * settings.seconds)):
            start = round(float(rng.uniform(0, settings.seconds - 0.5)), 3)
            found.append(Distractor(kind, *_cell(settings, rng), start, round(start + 0.5, 3)))
    return tuple(sorted(found, key=lambda d: (d.start_s, d.kind)))


def _background(spec: ClipSpec, rng: np.random.Generator) -> np.ndarray:
    """A colour gradient that drifts from one colour to the other over the clip, with a fixed faint texture."""
    s = spec.settings
    n = round(s.seconds * s.fps)
    first, second = (np.array(c, np.float32) for c in spec.background)
    ramp = np.linspace(-0.3, 0.3, s.size, dtype=np.float32)
    texture = rng.uniform(-8, 8, (s.size, s.size, 1)).astype(np.float32)
    frames = np.empty((n, s.size, s.size, 3), np.uint8)
    for k in range(n):
        mix = np.clip((k / n) + ramp[:, None] + 0 * ramp[None, :], 0, 1)[..., None]
        frames[k] = np.clip(first * (1 - mix) + second * mix + texture, 0, 255)
    return frames


def _draw(
    frames: np.ndarray, s: WorldSettings, what: Sight | Distractor, colour: np.ndarray, mask: np.ndarray | None
) -> None:
    """Put a shape or a flash into its cell in every frame shown from start_s to end_s."""
    side = s.size // s.grid
    if mask is None:
        assert isinstance(what, Sight)
        mask = shape_mask(what.shape, side)
    else:
        repeat = -(-side // mask.shape[0])
        mask, colour = (np.kron(a, np.ones((repeat, repeat) + (1,) * (a.ndim - 2), a.dtype)) for a in (mask, colour))
        mask, colour = mask[:side, :side], colour[:side, :side]
    first, last = int(np.ceil(what.start_s * s.fps - 1e-6)), int(np.ceil(what.end_s * s.fps - 1e-6))
    top, left = what.row * side, what.column * side
    part = frames[first:last, top : top + side, left : left + side]
    part[:] = np.where(mask[None, ..., None], colour.astype(np.uint8), part)


def shape_mask(shape: str, side: int) -> np.ndarray:
    """(side, side) bool: the pixels of a shape that fills about 80 % of a cell."""
    y, x = np.meshgrid(*[(np.arange(side) + 0.5) / side * 2.5 - 1.25] * 2, indexing="ij")
    radius, reach = np.hypot(x, y), np.maximum(abs(x), abs(y))
    masks = {
        "circle": radius < 1,
        "square": reach < 0.9,
        "triangle": (y < 0.85) & (y > 2.0 * abs(x) - 0.95),
        "cross": (np.minimum(abs(x), abs(y)) < 0.28) & (reach < 1),
        "ring": (radius < 1) & (radius > 0.55),
        "diamond": abs(x) + abs(y) < 1,
        "bar": (abs(y) < 0.3) & (abs(x) < 1),
        "box": (reach < 0.95) & (reach > 0.55),
    }
    return masks[shape]


def _tone(sound: Sound, s: WorldSettings, rng: np.random.Generator) -> np.ndarray:
    """The waveform of a sound event: pattern at a pitch, with soft edges."""
    n = round(sound.end_s * s.sampling_rate) - round(sound.start_s * s.sampling_rate)
    t = np.arange(n) / s.sampling_rate
    f = PITCHES[sound.pitch]

    def sine(hz: np.ndarray | float) -> np.ndarray:
        return np.sin(2 * np.pi * np.cumsum(np.full(n, hz) if np.isscalar(hz) else hz) / s.sampling_rate)

    if sound.pattern == "beeps":
        wave = sine(f) * ((t * 4) % 1 < 0.5)
    elif sound.pattern == "sweep":
        wave = sine(f * 2 ** (0.8 * t / t[-1] - 0.4))
    elif sound.pattern == "noise":
        wave = sine(f * (1 + 0.15 * np.repeat(rng.uniform(-1, 1, -(-n // 32)), 32)[:n]))
    elif sound.pattern == "chord":
        wave = (sine(f) + sine(f * 1.25) + sine(f * 1.5)) / 2
    elif sound.pattern == "hum":
        wave = sine(f)
    else:
        wave = sine(np.where((t * 8) % 1 < 0.5, f, f * 1.19))
    return 0.35 * wave * np.clip(np.minimum(t, t[::-1]) / 0.02, 0, 1)


def _click(click: Distractor, s: WorldSettings, rng: np.random.Generator) -> np.ndarray:
    n = round(click.end_s * s.sampling_rate) - round(click.start_s * s.sampling_rate)
    return 0.9 * rng.uniform(-1, 1, n) * np.exp(-np.arange(n) / (0.01 * s.sampling_rate))


def _add(samples: np.ndarray, s: WorldSettings, what: Sound | Distractor, wave: np.ndarray) -> None:
    first = round(what.start_s * s.sampling_rate)
    samples[first : first + len(wave)] += wave[: len(samples) - first]
