"""Errors a user can cause: what was found, why it is wrong, what to do. The command prints them and exits with 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error the user can mend.

    Args:
        what: the value or file at fault, and what is wrong with it.
        cause: why it cannot work.
        remedy: what to change.
    """

    def __init__(self, what: str, cause: str = "", remedy: str = "") -> None:
        self.what, self.cause, self.remedy = what, cause, remedy
        lines = [what]
        if cause:
            lines.append(f"  cause:  {cause}")
        if remedy:
            lines.append(f"  remedy: {remedy}")
        super().__init__("\n".join(lines))


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the known name nearest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
