"""What to change when a plan does not fit its GPU: every knob by itself with what it leads to, then several together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from omnimem_train.plan import Request

SHORTEST_CHUNK, SHORTEST_S = 256, 10.0
SHARES_OF_CLIP = (0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05)
NF4_BYTES = 0.516  # 4 bits, and scales of blocks of 64 numbers that are themselves quantised (arXiv 2305.14314)

Step = tuple[Request, tuple[str, ...]]


@dataclass(frozen=True)
class Remedy:
    """A change of settings and what it leads to.

    Attributes:
        overrides: as the command line takes them.
        peak_gib: predicted with it.
        step_s: predicted seconds of a step; None for a GPU of unknown rates.
        fits: whether it is enough.
        note: what else is to be known.
    """

    overrides: tuple[str, ...]
    peak_gib: float
    step_s: float | None
    fits: bool
    note: str = ""


def remedies(asked: Request) -> list[Remedy]:
    """For each knob the mildest setting with which the plan fits, or else its strongest; those that are enough first.
    If none is enough alone, the last entry has as many together as it takes, or all of them."""
    tried = [_mildest(asked, knob) for knob in KNOBS]
    found = [_remedy(*step) for step in tried if step is not None]
    if any(r.fits for r in found):
        return sorted(found, key=lambda r: not r.fits)
    together, overrides = asked, tuple[str, ...]()
    for knob in KNOBS:
        step = _mildest(together, knob)
        if step is not None and step[0].peak()[1].total < together.peak()[1].total:
            together, overrides = step[0], overrides + step[1]
        if together.fits():
            break
    return [*found, _remedy(together, overrides)]


def _mildest(asked: Request, knob: Callable[[Request], Iterator[Step]]) -> Step | None:
    """The first setting of a knob that fits, else its last; None where there is nothing to turn."""
    last: Step | None = None
    for step in knob(asked):
        last = step
        if step[0].fits():
            break
    return last


def _remedy(changed: Request, overrides: tuple[str, ...]) -> Remedy:
    phases = changed.phases()
    peak_gib = changed.peak()[1].total / 2**30
    return Remedy(overrides, peak_gib, None if phases is None else sum(phases.values()), changed.fits())


def _with(asked: Request, **settings: Any) -> Step:
    """`asked` with `section__key=value` settings, and these as overrides."""
    config, overrides = asked.config, []
    for name, value in settings.items():
        section, key = name.split("__")
        config = replace(config, **{section: replace(getattr(config, section), **{key: value})})
        text = str(value).lower() if isinstance(value, bool) else value
        text = f"[{','.join(str(x) for x in value)}]" if isinstance(value, tuple) else text
        overrides.append(f"{section}.{key}={text}")
    return replace(asked, config=config), tuple(overrides)


def _halves(start: int, least: int) -> Iterator[int]:
    while start // 2 >= least:
        start //= 2
        yield start


# Knobs, from those that cost a run least ------------------------------------------------------------------------------


def _precision(asked: Request) -> Iterator[Step]:
    if asked.itemsize > 2:
        yield _with(asked, model__dtype="bfloat16")


def _recomputation(asked: Request) -> Iterator[Step]:
    if not asked.config.gradient.checkpointing:
        yield _with(asked, gradient__checkpointing=True)


def _full_steps(asked: Request) -> Iterator[Step]:
    if 0 < asked.config.budgets.full_share < 1:
        yield _with(asked, budgets__full_share=0.0)


def _clips_held(asked: Request) -> Iterator[Step]:
    for n in _halves(asked.config.train.accumulation, 1):
        yield _with(asked, train__accumulation=n)


def _chunks_with_gradient(asked: Request) -> Iterator[Step]:
    gradient = asked.config.gradient
    if gradient.kind not in ("all", "last"):
        return
    n = min(asked.step(draw).n_chunks for draw in asked.corners())
    for chunks in _halves(min(n, gradient.chunks) if gradient.kind == "last" else n, 1):
        both = {} if gradient.kind == "last" else {"gradient__kind": "last"}
        yield _with(asked, **both, gradient__chunks=chunks)


def _stop_layer(asked: Request) -> Iterator[Step]:
    gradient = asked.config.gradient
    start = gradient.layer if gradient.kind == "stop_layer" else asked.shape.decoder.layers
    for layer in _halves(start, 1):
        both = {} if gradient.kind == "stop_layer" else {"gradient__kind": "stop_layer"}
        yield _with(asked, **both, gradient__layer=layer)


def _budget(asked: Request) -> Iterator[Step]:
    b = asked.config.budgets
    if b.full_share >= 1:
        return
    if b.choices:
        for top in _halves(max(b.choices), 64):
            yield _with(asked, budgets__choices=tuple(sorted({min(c, top) for c in b.choices})))
        return
    for high in _halves(b.high, b.low):
        yield _with(asked, budgets__high=high)


def _chunk(asked: Request) -> Iterator[Step]:
    for size in _halves(asked.config.memory.chunk_tokens, SHORTEST_CHUNK):
        yield _with(asked, memory__chunk_tokens=size)


def _shorter_clips(asked: Request) -> Iterator[Step]:
    for share in SHARES_OF_CLIP:
        if (length := float(round(asked.watched_s * share))) >= SHORTEST_S:
            yield _with(asked, data__max_duration_s=length)


def _adapter(asked: Request) -> Iterator[Step]:
    lora = asked.config.lora
    fewer = tuple(t for t in lora.targets if t in ("q_proj", "v_proj"))
    if fewer and fewer != lora.targets:
        yield _with(asked, lora__targets=fewer)


KNOBS = (
    _precision,
    _recomputation,
    _full_steps,
    _clips_held,
    _chunks_with_gradient,
    _adapter,
    _stop_layer,
    _chunk,
    _budget,
    _shorter_clips,
)


def four_bit_gib(asked: Request) -> float:
    """Peak with the decoder's matrices in 4 bits (NF4), everything else as it is."""
    decoder = asked.shape.decoder
    saved = decoder.layers * decoder.layer_weights * (asked.itemsize - NF4_BYTES)
    return (asked.peak()[1].total - saved) / 2**30
