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
        table: frozen dataclasses by name. Options annotated as bool, int, float or str are checked; a whole number
            serves as a float.
    """
    if not isinstance(name, str) or name not in table:
        raise UserError(
            f"unknown {kind} {name!r}{nearest(str(name), table)}", remedy=f"choose one of: {', '.join(table)}"
        )
    cls = table[name]
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    checked = {}
    for key, value in options.items():
        if key not in known:
            raise UserError(
                f"{kind} {name!r} has no option {key!r}{nearest(str(key), known)}",
                remedy=f"its options are: {', '.join(known) or '(none)'}",
            )
        annotation = known[key].type
        wanted = annotation if isinstance(annotation, str) else annotation.__name__
        checked[key] = float(value) if wanted == "float" and type(value) is int else value
        if wanted in ("bool", "int", "float", "str") and type(checked[key]).__name__ != wanted:
            raise UserError(f"option {key}={value!r} of {kind} {name!r} is not of type {wanted}")
    needed = [key for key, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    missing = [key for key in needed if key not in options]
    if missing:
        raise UserError(f"{kind} {name!r} needs the option {missing[0]!r}", remedy=f"give {', '.join(missing)}")
    return cls(**checked)


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
