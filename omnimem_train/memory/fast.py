"""Where faster equivalents of the costly steps are plugged in.

The reference of every step is plain torch and stands where it is used. A faster function is offered the same inputs
and gives the same numbers up to rounding, or None where it does not apply (another device, precision or size); the
reference then runs. This module holds none: `omnimem_train.kernels.install` provides them.

Steps:
    "change" (candidates, gram) -> (B, G, S): mean change of the output over probes and heads (`Perturbation`).
    "attention" (candidates) -> (B, G, H/G, S): attention each candidate gets, summed over the probes.
    "later_key" (keys, modality) -> (B, G, S): see `omnimem_train.memory.redundancy.later_key`.
    "earlier_cosine" (x, earlier) -> (B, G, S): cosine of every row of x (B, G, S, D) with the row `earlier` (B, G, S)
        names for it; 0 where that is negative (`neighbour_cosine`).
    "keep" (score, modality, groups, n) -> (B, G, n) rows: text and the best of each group of modalities, see `choose`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

STEPS = ("change", "attention", "later_key", "earlier_cosine", "keep")
_PROVIDED: dict[str, Callable[..., Tensor | None]] = {}


def provide(step: str, function: Callable[..., Tensor | None] | None) -> None:
    """Use `function` for `step` from now on; None goes back to the reference."""
    if step not in STEPS:
        raise ValueError(f"unknown step {step!r}")
    if function is None:
        _PROVIDED.pop(step, None)
    else:
        _PROVIDED[step] = function


def provided() -> list[str]:
    """Steps that have a faster function."""
    return sorted(_PROVIDED)


@contextmanager
def references() -> Iterator[None]:
    """Inside, plain torch runs whatever is provided, but what is provided there; afterwards all is as before."""
    before = dict(_PROVIDED)
    _PROVIDED.clear()
    try:
        yield
    finally:
        _PROVIDED.clear()
        _PROVIDED.update(before)


def fast(step: str, *inputs: Any) -> Tensor | None:
    """What the function provided for `step` gives for `inputs`; None if there is none or it does not apply."""
    function = _PROVIDED.get(step)
    return None if function is None else function(*inputs)
