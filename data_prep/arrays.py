"""Clips of the recall world as tensors, a batch at a time, on any device. The files are made of the same tensors.

All noise comes from a counter-based hash seeded per clip, so a clip looks and sounds the same in whatever batch it is.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data_prep.world import COLOURS, PATTERNS, PITCHES, SHAPES, ClipSpec, Distractor, Sight, Sound, WorldSettings

FAINT_CONTRAST, FAINT_AMPLITUDE = 0.45, 0.2  # of the colour over the background; of the usual amplitude
AMPLITUDE, FLOOR = 0.3, 0.004  # of events; of the noise that is always there
FLASH_CONTRAST, FLASH_BLOCKS = 90, 8  # grey levels either side at loudness 1; blocks of noise in a cell's side
CLICK_AMPLITUDE, BURST_AMPLITUDE = 0.9, 0.45  # at loudness 1
TEXTURE = 16  # grey levels
AUDIO_TOKENS_PER_S = 25


def render_frames(
    specs: Sequence[ClipSpec], fps: float, device: torch.device | str = "cpu", part: tuple[int, int] | None = None
) -> Tensor:
    """Pictures of clips that share their settings.

    Args:
        specs: the clips.
        fps: frames a second; frame k is shown at time k / fps.
        device: where to compute.
        part: frames from the first to before the second of these numbers; all without it.

    Returns: (len(specs), n, size, size, 3) uint8 RGB; n = round(seconds * fps), or the part's length.
    """
    s, device = _shared(specs), torch.device(device)
    first, last = part or (0, round(s.seconds * fps))
    frames = _backgrounds(specs, first, last, fps, device)
    side = s.size // s.grid
    inside = frames[:, :, : s.grid * side, : s.grid * side]
    cells = inside.unflatten(2, (s.grid, side)).unflatten(4, (s.grid, side)).transpose(3, 4)  # (b, n, row, column, ...)
    flashes, which = _shown([[d for d in c.distractors if d.kind == "flash"] for c in specs], first, last, fps)
    if s.loudness and which:
        noise = 2 * _noise([_seed(specs[b], f"flash {i}") for b, i in which], 3 * FLASH_BLOCKS**2, device) - 1
        noise = noise.view(-1, FLASH_BLOCKS, FLASH_BLOCKS, 3)
        rows = (torch.arange(side, device=device) * FLASH_BLOCKS) // side
        at, of = flashes[:, :4].to(device).unbind(1), flashes[:, 4].to(device)
        added = noise[:, rows][:, :, rows][of] * (FLASH_CONTRAST * s.loudness)
        cells[at] = (cells[at] + added).round_().clamp_(0, 255).to(torch.uint8)
    shown, which = _shown([c.sights for c in specs], first, last, fps)
    if which:
        sights = [specs[b].sights[i] for b, i in which]
        masks = torch.from_numpy(_masks(side)).to(device)[[SHAPES.index(e.shape) for e in sights]]
        contrast = torch.tensor([FAINT_CONTRAST if e.faint else 1.0 for e in sights], device=device)
        colours = torch.tensor([COLOURS[e.colour] for e in sights], dtype=torch.float32, device=device)
        at, of = shown[:, :4].to(device).unbind(1), shown[:, 4].to(device)
        old = cells[at].float()
        share = (masks * contrast[:, None, None])[of][..., None]
        cells[at] = (old + share * (colours[of][:, None, None] - old)).round_().to(torch.uint8)
    return frames


def render_sound(specs: Sequence[ClipSpec], device: torch.device | str = "cpu") -> Tensor:
    """Sound of clips that share their settings.

    Returns: (len(specs), round(seconds * sampling_rate)) float32 in [-1, 1], mono.
    """
    s, device = _shared(specs), torch.device(device)
    n = round(s.seconds * s.sampling_rate)
    out = _noise([_seed(spec, "floor") for spec in specs], n, device).sub_(0.5).mul_(2 * FLOOR * math.sqrt(3))
    sounds = [(b, e) for b, spec in enumerate(specs) for e in spec.sounds]
    for pattern in PATTERNS:
        group = [(b, e) for b, e in sounds if e.pattern == pattern]
        if not group:
            continue
        lengths = [_span(e.start_s, e.end_s, s) for _, e in group]
        waves = _waves(
            pattern,
            torch.tensor([PITCHES[e.pitch] for _, e in group], device=device)[:, None],
            [_seed(specs[b], f"sound {e.slot}") for b, e in group],
            torch.tensor([n for _, n in lengths], device=device)[:, None],
            s.sampling_rate,
        )
        waves *= torch.tensor([AMPLITUDE * (FAINT_AMPLITUDE if e.faint else 1) for _, e in group], device=device)[
            :, None
        ]
        for (b, _), (begin, length), wave in zip(group, lengths, waves, strict=True):
            out[b, begin : begin + length] += wave[:length]
    if s.loudness:
        _add_noises(out, specs)
    return out.clamp_(-1, 1)


def token_labels(spec: ClipSpec) -> dict[str, np.ndarray]:
    """What a clip's tokens show, to supervise encoders with.

    Returns:
        "visual": (ceil(seconds), grid * grid, 2) int64, for each second (two frames at 2 a second) and cell (row by
            row): index of the shape + 1 and of the colour + 1, of the occurrence that covers most of it; 0 for none.
        "audio": (round(seconds * 25), 2) int64, for each 1/25 s, the event at its middle: index of the pattern + 1 and
            of the pitch + 1; 0 for none.
    """
    s, colours, pitches = spec.settings, list(COLOURS), list(PITCHES)
    visual = np.zeros((math.ceil(s.seconds), s.grid**2, 2), np.int64)
    covered = np.zeros(visual.shape[:2])
    for e in spec.sights:
        cell = e.row * s.grid + e.column
        for k in range(int(e.start_s), math.ceil(e.end_s)):
            overlap = min(e.end_s, k + 1) - max(e.start_s, k)
            if overlap > covered[k, cell]:
                visual[k, cell] = SHAPES.index(e.shape) + 1, colours.index(e.colour) + 1
                covered[k, cell] = overlap
    audio = np.zeros((round(s.seconds * AUDIO_TOKENS_PER_S), 2), np.int64)
    for sound in spec.sounds:
        audio[_audio_tokens(sound)] = PATTERNS.index(sound.pattern) + 1, pitches.index(sound.pitch) + 1
    return {"visual": visual, "audio": audio}


def occurrences(spec: ClipSpec) -> dict[str, np.ndarray]:
    """For each token of `token_labels` that shows an event: is it the first, second, ... occurrence of its shape or
    pattern in the clip? (1, 2, ...; 0 where nothing is shown.) Shapes "visual" (seconds, cells), "audio" (tokens,)."""
    labels = token_labels(spec)
    visual, audio = (np.zeros(labels[kind].shape[:-1], np.int64) for kind in ("visual", "audio"))
    seen: Counter[str] = Counter()
    for e in spec.sights:
        seen[e.shape] += 1
        place = slice(int(e.start_s), math.ceil(e.end_s)), e.row * spec.settings.grid + e.column
        visual[place][labels["visual"][place][:, 0] == SHAPES.index(e.shape) + 1] = seen[e.shape]
    for sound in spec.sounds:
        seen[sound.pattern] += 1
        audio[_audio_tokens(sound)] = seen[sound.pattern]
    return {"visual": visual, "audio": audio}


def _audio_tokens(sound: Sound) -> slice:
    """The audio tokens whose middle lies in a sound."""
    begin, end = (math.ceil(t * AUDIO_TOKENS_PER_S - 0.5) for t in (sound.start_s, sound.end_s))
    return slice(begin, end)


def shape_mask(shape: str, side: int) -> np.ndarray:
    """(side, side) bool: the pixels of a shape that fills about 80 % of a cell."""
    y, x = np.meshgrid(*[(np.arange(side) + 0.5) / side * 2.5 - 1.25] * 2, indexing="ij")
    ax, ay, radius, reach = abs(x), abs(y), np.hypot(x, y), np.maximum(abs(x), abs(y))
    masks = {
        "circle": radius < 1,
        "square": reach < 0.97,
        "triangle": (y < 0.85) & (y > 2.0 * ax - 0.95),
        "cross": (np.minimum(ax, ay) < 0.28) & (reach < 1),
        "ring": (radius < 1) & (radius > 0.55),
        "diamond": ax + ay < 1,
        "bar": (ay < 0.3) & (ax < 1),
        "box": (reach < 0.95) & (reach > 0.55),
        "pillar": (ax < 0.3) & (ay < 1),
        "wedge": (-y < 0.85) & (-y > 2.0 * ax - 0.95),
        "ex": (abs(ax - ay) < 0.38) & (reach < 0.95),
        "corner": ((x < -0.4) | (y > 0.4)) & (reach < 0.95),
        "tee": ((y < -0.4) | (ax < 0.28)) & (reach < 0.95),
        "stripes": ((ay < 0.2) | (ay > 0.6)) & (reach < 1),
        "hourglass": (ax < ay + 0.05) & (reach < 0.95),
        "dots": np.hypot(ax - 0.55, ay - 0.55) < 0.4,
    }
    return masks[shape]


def _masks(side: int) -> np.ndarray:
    return np.stack([shape_mask(shape, side) for shape in SHAPES])


def _shared(specs: Sequence[ClipSpec]) -> WorldSettings:
    """The settings of all of them."""
    assert specs and all(spec.settings == specs[0].settings for spec in specs), "clips of a batch share their settings"
    return specs[0].settings


def _span(start_s: float, end_s: float, s: WorldSettings) -> tuple[int, int]:
    """First sample and number of samples."""
    first = round(start_s * s.sampling_rate)
    return first, round(end_s * s.sampling_rate) - first


def _seed(spec: ClipSpec, purpose: str) -> int:
    """A signed 32-bit number of a clip and a purpose."""
    text = f"{spec.noise_seed} {purpose}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little", signed=True)


def _noise(seeds: Sequence[int], n: int, device: torch.device) -> Tensor:
    """(len(seeds), n) float32, uniform in [0, 1): a hash of seed and place, the same on every device."""
    x = torch.arange(n, dtype=torch.int32, device=device).mul_(-1640531527)  # 32-bit integers wrap around
    return _mix(x + torch.tensor(seeds, dtype=torch.int32, device=device)[:, None])


def _mix(x: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) of int32 counters, which are overwritten."""
    for shift, factor in ((16, -2048144789), (13, -1028477387), (16, 1)):
        x ^= (x >> shift) & ((1 << (32 - shift)) - 1)
        x *= factor
    return (x & 0xFFFFFF).float().mul_(2.0**-24)


def _backgrounds(specs: Sequence[ClipSpec], first: int, last: int, fps: float, device: torch.device) -> Tensor:
    """(b, last - first, size, size, 3) uint8: a gradient drifting from one colour to the other, fixed texture."""
    s = specs[0].settings
    colours = torch.tensor([spec.background for spec in specs], dtype=torch.float32, device=device)
    time = torch.arange(first, last, device=device) / (s.seconds * fps)
    mix = (time[:, None] + torch.linspace(-0.3, 0.3, s.size, device=device)).clamp(0, 1)[
        None, :, :, None
    ]  # (1, n, size, 1)
    rows = colours[:, 0, None, None] * (1 - mix) + colours[:, 1, None, None] * mix - TEXTURE / 2
    texture = _noise([_seed(spec, "texture") for spec in specs], s.size**2, device) * TEXTURE
    texture = texture.to(torch.uint8).view(-1, 1, s.size, s.size, 1)
    return rows.round_().to(torch.uint8)[:, :, :, None] + texture  # colours are dark: nothing wraps around


def _shown(
    events: Sequence[Sequence[Sight | Distractor]], first: int, last: int, fps: float
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Where events are seen, in frames first to last of each clip of a batch.

    Returns:
        (places, 5) int64: clip, frame - first, row, column, and which event (row of the list). A later event hides an
            earlier one in the same place, so every place comes once.
        the events that are seen: number of clip, number in it.
    """
    which: list[tuple[int, int]] = []
    at: dict[tuple[int, int, int, int], int] = {}
    for b, of_clip in enumerate(events):
        for i, e in enumerate(of_clip):
            begin, end = (math.ceil(t * fps - 1e-6) for t in (e.start_s, e.end_s))
            shown = range(max(begin, first), min(end, last))
            for k in shown:
                at[b, k - first, e.row, e.column] = len(which)
            if shown:
                which.append((b, i))
    return torch.tensor([(*place, n) for place, n in at.items()], dtype=torch.int64).view(-1, 5), which


def _waves(pattern: str, hz: Tensor, seeds: Sequence[int], lengths: Tensor, rate: int) -> Tensor:
    """(events, samples of the longest) float32 within [-1, 1]: a pattern at pitches `hz` (events, 1), with soft edges.

    `lengths`: (events, 1), samples of each event; what comes after them is to be cut off.
    """
    n = int(lengths.max())
    t = torch.arange(n, dtype=torch.float32, device=hz.device) / rate  # seconds

    def sine(cycles: Tensor) -> Tensor:
        return torch.sin((cycles % 1) * (2 * math.pi))

    def swept(bend: Tensor) -> Tensor:
        """A sine whose frequency is hz * bend."""
        return sine(torch.cumsum(bend.double(), -1) * (hz / rate))

    if pattern == "hum":
        wave = sine(hz * t)
    elif pattern == "beeps":
        wave = sine(hz * t) * ((t * 4) % 1 < 0.5)
    elif pattern == "trill":
        wave = swept(torch.where((t * 5) % 1 < 0.5, 1.0, 1.35))
    elif pattern in ("rise", "fall"):
        along = t / (lengths / rate)
        wave = swept(2 ** (1.1 * (along if pattern == "rise" else 1 - along) - 0.55))
    elif pattern == "chord":
        wave = (sine(hz * t) + sine(1.5 * hz * t) + sine(2.25 * hz * t)) / 2.2
    elif pattern == "hiss":
        wave = _band(hz, t, seeds) * 1.2
    elif pattern == "buzz":
        wave = (sine(hz * t) + sine(2 * hz * t)) / 1.6 * ((t * 20) % 1 < 0.5)
    elif pattern == "pulse":
        wave = sine(hz * t) * ((t * 2) % 1) ** 2
    elif pattern == "siren":
        wave = swept(2 ** (0.45 * torch.sin(2 * math.pi * t)))
    elif pattern == "knocks":
        wave = (sine(hz * t) + sine(1.41 * hz * t)) * torch.exp(-60 * ((t * 6) % 1) / 6)
    else:
        steps = _noise(seeds, int(n / rate * 8) + 2, hz.device)[:, (t * 8).long()]
        wave = swept(2 ** (steps - 0.5))
    left = (lengths - 1 - torch.arange(n, device=hz.device)) / rate
    return (wave * (torch.minimum(t, left) / 0.02).clamp(0, 1)).float()


def _band(hz: Tensor, t: Tensor, seeds: Sequence[int]) -> Tensor:
    """Noise in a band around hz: two carriers, each with a random amplitude that changes slowly."""
    place = t * (0.35 * hz + 100)  # the band's half width in Hz is about the number of changes a second
    step, between = place.long(), place % 1
    out = torch.zeros_like(place)
    for quarter in (0.0, 0.25):
        noise = 2 * _noise([seed if quarter else ~seed for seed in seeds], int(step.max()) + 2, t.device) - 1
        amplitude = noise.gather(1, step) * (1 - between) + noise.gather(1, step + 1) * between
        out += amplitude * torch.sin(((hz * t + quarter) % 1) * (2 * math.pi))
    return out


def _add_noises(out: Tensor, specs: Sequence[ClipSpec]) -> None:
    """Add clicks and bursts to the sound of clips."""
    s = specs[0].settings
    noises = [(b, i, d) for b, c in enumerate(specs) for i, d in enumerate(c.distractors) if d.kind != "flash"]
    if not noises:
        return
    spans = [_span(d.start_s, d.end_s, s) for _, _, d in noises]
    waves = _noise([_seed(specs[b], f"noise {i}") for b, i, _ in noises], max(n for _, n in spans), out.device)
    t = torch.arange(waves.shape[1], device=out.device) / s.sampling_rate
    click = torch.tensor([d.kind == "click" for _, _, d in noises], device=out.device)[:, None]
    loud = torch.where(click, CLICK_AMPLITUDE * torch.exp(-t / 0.01), BURST_AMPLITUDE) * s.loudness
    waves = (2 * waves - 1) * loud
    for (b, _, _), (begin, length), wave in zip(noises, spans, waves, strict=True):
        out[b, begin : begin + length] += wave[:length]
