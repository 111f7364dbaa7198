"""What models share: checks of texts, encoder options and frame rates."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from inspect import signature
from typing import Any

from omnimem_train.errors import UserError, nearest
from omnimem_train.models.interface import MediaEncoder

MAX_WINDOW_FRAMES = 1000


def check_text(text: Any, control_tokens: Iterable[str]) -> None:
    """Raises UserError unless `text` can stand in a dialogue: text, valid Unicode, no control token."""
    if not isinstance(text, str):
        raise UserError(f"{text!r:.60} is not text", remedy="quote it")
    if found := next((token for token in control_tokens if token in text), None):
        raise UserError(
            f"the text {text[:60]!r} holds the control token {found}",
            cause="it would be read as a mark of the dialogue, not as text",
            remedy="remove it",
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the text {text[:60]!r} is not valid Unicode", str(error), "write it as UTF-8") from error


def check_options(encoder: type[MediaEncoder], options: Iterable[str]) -> None:
    """Raises UserError unless an encoder side can be opened with `options`: its keyword-only parameters."""
    known = [name for name, p in signature(encoder).parameters.items() if p.kind is p.KEYWORD_ONLY]
    for key in options:
        if key not in known:
            raise UserError(f"unknown encoder option {key!r}{nearest(key, known)}", remedy=f"known: {', '.join(known)}")


def paired_window_s(fps: float) -> float:
    """Smallest multiple of 2 s that holds whole pairs of frames.

    Raises:
        UserError: no such rate, or one whose windows would fill the memory (29.97 needs windows of 200 s).
    """
    if not 0.001 <= fps <= 240:
        raise UserError(f"fps is {fps:g}", cause="frames a second go from 0.001 to 240", remedy="give e.g. fps 2")
    pair = Fraction(2) / Fraction(fps).limit_denominator(1000)
    window_s = math.lcm(2 * pair.denominator, pair.numerator) / pair.denominator
    if window_s * fps > MAX_WINDOW_FRAMES:
        raise UserError(
            f"fps is {fps:g}",
            cause=f"whole pairs of frames and whole 2 s of sound meet only every {window_s:g} s, "
            f"that is {window_s * fps:.0f} frames to hold at once",
            remedy=f"give a rounder number, e.g. {_rounder(fps):g}",
        )
    return float(window_s)


def _rounder(fps: float) -> float:
    """A whole number or a first decimal within a tenth of `fps`, a rate that was refused.

    There always is one, and it works: windows of p / q frames a second hold 2 p frames, so only rates above 0.5 are
    refused (q is 1000 at most), and from 5 on a whole number is near enough.
    """
    return next(near for digits in (0, 1) if abs((near := round(fps, digits)) - fps) <= fps / 10)
