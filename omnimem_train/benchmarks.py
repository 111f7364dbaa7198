"""Multiple-choice benchmarks: their file formats, and their own prompt texts. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

LETTERS = "ABCDEFGH"


def choice_prompt(question: str, options: Sequence[str]) -> str:
    """The prompt for a question of our own manifests; `options` without letters."""
    lines = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    return f"{question}\n{lines}\nAnswer with the letter of the right option."
