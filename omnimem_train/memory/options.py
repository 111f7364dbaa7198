"""Building a selector or an allocation from a name and options that a user wrote."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from omnimem_train.errors import UserError, nearest

T = TypeVar("T")


def values(component: Any) -> dict[str, Any]:
    """The options a frozen dataclass was built with, defaults included."""
    return {f.name: getattr(component, f.name) for f in fields(component)}


def build(kind: str, table: Mapping[str, type[T]], name: str, options: Mapping[str, Any]) -> T:
    """`table[name](**options)`, where a wrong name, option or type is a `UserError` that says what would be right.

    Args:
        kind: what is being built ("selector"), for the message.
        table: frozen dataclasses by name; the types of their defaults are the types of the options.
    """
    if not isinstance(name, str) or name not in table:
        raise UserError(
            f"unknown {kind} {name!r}{nearest(str(name), table)}", remedy=f"choose one of: {', '.join(table)}"
        )
    cls = table[name]
    defaults = {f.name: f.default for f in fields(cls)}  # type: ignore[arg-type]
    for key, value in options.items():
        if key not in defaults:
            raise UserError(
                f"{kind} {name!r} has no option {key!r}{nearest(key, defaults)}",
                remedy=f"its options are: {', '.join(defaults) or '(none)'}",
            )
        if not _fits(value, defaults[key]):
            raise UserError(
                f"option {key}={value!r} of {kind} {name!r} is not of type {type(defaults[key]).__name__}",
                remedy=f"write e.g. {key}={defaults[key]!r}, the default",
            )
    missing = [key for key, default in defaults.items() if default is MISSING and key not in options]
    if missing:
        raise UserError(f"{kind} {name!r} needs the option {missing[0]!r}", remedy=f"give {', '.join(missing)}")
    return cls(**{k: float(v) if isinstance(defaults[k], float) else v for k, v in options.items()})


def _fits(value: Any, default: Any) -> bool:
    if default is MISSING:
        return True
    if isinstance(value, bool) or isinstance(default, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    return isinstance(value, int | float if isinstance(default, float) else type(default))


def one_of(option: str, value: str, choices: Collection[str]) -> None:
    """A `UserError` unless `value` is one of `choices`."""
    if value not in choices:
        raise UserError(
            f"option {option}={value!r} is unknown{nearest(str(value), choices)}",
            remedy=f"choose one of: {', '.join(choices)}",
        )


def within(option: str, value: float, low: float, high: float = float("inf")) -> None:
    """A `UserError` unless low <= value <= high (which also refuses NaN)."""
    if not low <= value <= high:
        limits = f"{low} or more" if high == float("inf") else f"between {low} and {high}"
        raise UserError(f"option {option}={value!r} is out of range", remedy=f"give {limits}")
