"""What to change when a plan does not fit: every knob by itself with what it leads to, then several together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from omnimem_train.errors import UserError
from omnimem_train.plan import Request

SHORTEST_CHUNK, SHORTEST_S = 256, 10.0
SHARES_OF_CLIP = (0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05)
WORTH = 0.99  # of the peak; a knob that leaves more is not worth a line

Settings = dict[str, Any]


@dataclass(frozen=True)
class Remedy:
    """A change of settings and what it leads to.

    Attributes:
        overrides: as the command line takes them.
        peak_gib: predicted with it.
        step_s: predicted seconds of a step; None for a GPU of unknown rates.
        fits: whether it is enough.
        host_gib: of host memory that each process needs then, beside what a process takes anyway.
    """

    overrides: tuple[str, ...]
    peak_gib: float
    step_s: float | None
    fits: bool
    host_gib: float = 0.0


def remedies(asked: Request) -> list[Remedy]:
    """For each knob the mildest setting with which the plan fits, or else the one that brings most; those that are
    enough first. If none is enough alone but shorter clips, the last entry has several together."""
    tried = [settings for knob in KNOBS if (settings := _turned(asked, knob))]
    found = sorted((_remedy(asked, settings) for settings in tried), key=lambda r: not r.fits)
    if any(_with(asked, settings).fits() for settings in tried if "data__max_duration_s" not in settings):
        return found
    together = Settings()
    for knob in KNOBS:
        if not _with(asked, together).fits():
            together |= _turned(_with(asked, together), knob)
    for name in list(together):  # an early knob may have become needless
        fewer = {key: value for key, value in together.items() if key != name}
        together = fewer if _enough(asked, fewer) else together
    return [*found, _remedy(asked, together)] if together not in (*tried, {}) else found


def _turned(asked: Request, knob: Callable[[Request], Iterator[Settings]]) -> Settings:
    """The first setting of a knob that fits, else that with the lowest peak; none where it brings next to nothing."""
    before = least = asked.peak()[1].total
    best = Settings()
    for settings in knob(asked):
        changed = _with(asked, settings)
        if changed.fits():
            return settings
        if (peak := changed.peak()[1].total) < least:
            best, least = settings, peak
    return best if least < WORTH * before else {}


def _remedy(asked: Request, settings: Settings) -> Remedy:
    changed = _with(asked, settings)
    phases = changed.phases()
    overrides = tuple(f"{name.replace('__', '.')}={_text(value)}" for name, value in settings.items())
    step_s = None if phases is None else sum(phases.values())
    return Remedy(overrides, changed.peak()[1].total / 2**30, step_s, changed.fits(), changed.host_bytes() / 2**30)


def _enough(asked: Request, settings: Settings) -> bool:
    """Whether the plan fits with them; not if they exclude each other."""
    try:
        return _with(asked, settings).fits()
    except UserError:
        return False


def _text(value: Any) -> str:
    """As an override has it."""
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _with(asked: Request, settings: Settings) -> Request:
    """`asked` with settings by the name "section__key"."""
    config = asked.config
    for name, value in settings.items():
        section, key = name.split("__")
        config = replace(config, **{section: replace(getattr(config, section), **{key: value})})
    return replace(asked, config=config)


def _halves(start: int, least: int) -> Iterator[int]:
    while start // 2 >= least:
        start //= 2
        yield start


# Knobs, from those that cost a run least ------------------------------------------------------------------------------


def _precision(asked: Request) -> Iterator[Settings]:
    if asked.itemsize > 2:
        yield {"model__dtype": "bfloat16"}


def _recomputation(asked: Request) -> Iterator[Settings]:
    if not asked.config.gradient.checkpointing:
        yield {"gradient__checkpointing": True}


def _offload(asked: Request) -> Iterator[Settings]:
    gradient = asked.config.gradient
    if gradient.checkpointing and gradient.offload == "none":
        yield {"gradient__offload": "host"}


def _by_layer(asked: Request) -> Iterator[Settings]:
    gradient = asked.config.gradient
    if gradient.checkpointing and gradient.granularity == "chunk":
        yield {"gradient__granularity": "layer"}
        if gradient.offload == "none":
            yield {"gradient__granularity": "layer", "gradient__offload": "host"}


def _full_steps(asked: Request) -> Iterator[Settings]:
    if 0 < asked.config.budgets.full_share < 1:
        yield {"budgets__full_share": 0.0}


def _clips_held(asked: Request) -> Iterator[Settings]:
    for n in _halves(asked.config.train.accumulation, 1):
        yield {"train__accumulation": n}


def _four_bits(asked: Request) -> Iterator[Settings]:
    if asked.config.model.quantization == "none" and asked.itemsize <= 4:
        yield {"model__quantization": "nf4"}


def _chunks_with_gradient(asked: Request) -> Iterator[Settings]:
    gradient = asked.config.gradient
    if gradient.kind not in ("all", "last"):
        return
    n = min(asked.step(draw).n_chunks for draw in asked.corners())
    for chunks in _halves(min(n, gradient.chunks) if gradient.kind == "last" else n, 1):
        both: Settings = {} if gradient.kind == "last" else {"gradient__kind": "last"}
        yield both | {"gradient__chunks": chunks}


def _stop_layer(asked: Request) -> Iterator[Settings]:
    gradient = asked.config.gradient
    start = gradient.layer if gradient.kind == "stop_layer" else asked.shape.decoder.layers
    for layer in _halves(start, 1):
        both: Settings = {} if gradient.kind == "stop_layer" else {"gradient__kind": "stop_layer"}
        yield both | {"gradient__layer": layer}


def _budget(asked: Request) -> Iterator[Settings]:
    b = asked.config.budgets
    if b.full_share >= 1:
        return
    if b.choices:
        for top in _halves(max(b.choices), 64):
            yield {"budgets__choices": tuple(sorted({min(c, top) for c in b.choices}))}
        return
    for high in _halves(b.high, b.low):
        yield {"budgets__high": high}


def _chunk(asked: Request) -> Iterator[Settings]:
    for size in _halves(asked.config.memory.chunk_tokens, SHORTEST_CHUNK):
        yield {"memory__chunk_tokens": size}


def _shorter_clips(asked: Request) -> Iterator[Settings]:
    for share in SHARES_OF_CLIP:
        if (length := float(round(asked.watched_s * share))) >= SHORTEST_S:
            yield {"data__max_duration_s": length}


def _positions(asked: Request) -> Iterator[Settings]:
    if asked.config.memory.positions == "compact":
        yield {"memory__positions": "absolute"}


def _adapter(asked: Request) -> Iterator[Settings]:
    lora = asked.config.lora
    fewer = tuple(t for t in lora.targets if t in ("q_proj", "v_proj"))
    if fewer and fewer != lora.targets:
        yield {"lora__targets": fewer}


KNOBS = (
    _precision,
    _recomputation,
    _offload,
    _by_layer,
    _full_steps,
    _clips_held,
    _four_bits,
    _chunks_with_gradient,
    _positions,
    _adapter,
    _stop_layer,
    _chunk,
    _budget,
    _shorter_clips,
)
