"""Configuration: dataclass defaults, then a YAML recipe, then dotted overrides. Strict, and all errors at once.

Each component owns its settings as a dataclass; a run's configuration is a dataclass of those. `load_config` fills one:

    config = load_config(RunConfig, "recipes/tiny.yaml", ["memory.budget=512", "train.lr=1e-4", "budgets.low=64"])

Rules:
    - A recipe may name another with `base: other.yaml` (relative to itself); its own keys win over those of the base.
    - Sections (fields that are dataclasses) are merged key by key. All else is replaced whole, free-form mappings such
      as `memory.selector_options` too: options of one selector make no sense for another. An override may still set
      one of their keys: `memory.selector_options.window=64`.
    - Values are YAML, in recipes and overrides alike (see `omnimem_train.recipe` for the dialect), and must have the
      field's type. An integer is a valid `float`, text is a valid `Path`, a list becomes a tuple.
    - Ranges are checked by `__post_init__` of the dataclass; a `UserError` from there is listed with the others.
"""

from __future__ import annotations

import copy
import math
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from omnimem_train import recipe as recipes
from omnimem_train.errors import UserError, nearest
from omnimem_train.recipe import BASE_KEY, Keys, Recipe

C = TypeVar("C")
_BAD = object()  # stands for a value whose error is already listed


def load_config(cls: type[C], path: str | Path | None = None, overrides: Sequence[str] = ()) -> C:
    """An instance of the dataclass `cls`: defaults, then the recipe at `path`, then `overrides` ("section.key=YAML").

    Raises:
        UserError: one for all errors, each with its file and line or its override: unknown keys (with the nearest known
            one), duplicate keys, wrong types, missing values, values that `__post_init__` refuses. A recipe that cannot
            be read or parsed, or a cycle of bases, is reported alone.
    """
    assert BASE_KEY not in get_type_hints(cls), f"{cls.__name__} may not have a field called {BASE_KEY!r}"
    reading = _Reading(cls)
    tree: dict[str, Any] = {}
    for recipe in [] if path is None else recipes.read_chain(Path(path)):
        reading.errors += recipe.errors
        reading.merge(cls, tree, recipe.values, (), recipe)
    for text in overrides:
        reading.override(tree, text)
    config = reading.build(cls, tree, ())
    if reading.errors:
        n = len(reading.errors)
        lines = [f"  {i}. {text}" for i, text in enumerate(reading.errors, 1)]
        of = f" {path}" if path is not None else ""
        raise UserError("\n".join([f"{n} error{'s' * (n > 1)} in the configuration{of}", *lines])) from reading.first
    return config


def to_plain(config: Any) -> Any:
    """Dataclasses as dicts, tuples as lists, paths as text: what YAML and JSON can hold."""
    if is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_plain(getattr(config, f.name)) for f in fields(config) if f.init}
    if isinstance(config, Mapping):
        return {key: to_plain(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_plain(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def flatten(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one of dotted keys; an empty mapping stays as a value. `{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat


def to_yaml(config: Any) -> str:
    """All fields of `config` as YAML that `load_config` reads back to an equal one."""
    return recipes.dump(to_plain(config))


def save_resolved(config: Any, path: str | Path) -> None:
    """Write the complete configuration, defaults included, to `path`; it is itself a recipe that repeats the run."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# Every setting of this run, defaults included.\n{to_yaml(config)}", encoding="utf-8")


# Merging and building ------------------------------------------------------------------------------------------------


class _Reading:
    """Collects values, where each came from, and every error."""

    def __init__(self, cls: type) -> None:
        self.cls = cls
        self.errors: list[str] = []
        self.first: Exception | None = None
        self.places: dict[Keys, str] = {}

    def fail(self, where: str, text: str, error: Exception | None = None) -> Any:
        self.errors.append(f"{where}: {text}" if where else text)
        self.first = self.first or error
        return _BAD

    def merge(self, cls: type, tree: dict[str, Any], values: Mapping[Any, Any], prefix: Keys, source: Recipe) -> None:
        """Put `values` into `tree`, section by section."""
        hints = _hints(cls)
        for key, value in values.items():
            path = (*prefix, str(key))
            if key not in hints:
                self.unknown(source.where(path), path, hints)
                continue
            section = _section(hints[key])
            if section is not None and isinstance(value, Mapping):
                if not isinstance(tree.get(key), dict):
                    tree[key] = {}
                self.places[path] = source.where(path)
                self.merge(section, tree[key], value, path, source)
            else:
                tree[key] = value
                self.forget(path)
                self.places |= {p: source.where(p) for p in source.lines if p[: len(path)] == path}
                self.places[path] = source.where(path)

    def override(self, tree: dict[str, Any], text: str) -> None:
        """Put "section.key=YAML" into `tree`."""
        name, equals, value = text.partition("=")
        where, keys = f"override {text!r}", tuple(name.strip().split("."))
        if not equals or not all(keys):
            self.fail(where, "is not of the form section.key=value")
            return
        try:
            source = recipes.parse(value, where)
        except yaml.YAMLError as error:
            self.fail(where, f"the value is not valid YAML ({recipes.problem(error)}); quote special characters")
            return
        self.errors += source.errors
        source.lines.clear()  # the place of an override is the override itself
        self.override_at(self.cls, tree, keys, 0, source)

    def override_at(self, cls: type, tree: dict[str, Any], keys: Keys, depth: int, source: Recipe) -> None:
        """Go down from section `cls` at `keys[:depth]` to the key that is set."""
        hints, path = _hints(cls), keys[: depth + 1]
        key = keys[depth]
        if key not in hints:
            self.unknown(source.name, path, hints)
        elif depth == len(keys) - 1:
            self.merge(cls, tree, {key: source.values}, keys[:depth], source)
        elif section := _section(hints[key]):
            self.places.setdefault(path, source.name)
            if not isinstance(tree.get(key), dict):
                tree[key] = {}
            self.override_at(section, tree[key], keys, depth + 1, source)
        elif _is_mapping(hints[key]):
            current = tree[key] if key in tree else _initial(self.cls, path)
            tree[key] = inner = copy.deepcopy(current) if isinstance(current, dict) else {}
            for part in keys[depth + 1 : -1]:
                if not isinstance(inner.get(part), dict):
                    inner[part] = {}
                inner = inner[part]
            inner[keys[-1]] = source.values
            self.places[path] = self.places[keys] = source.name
        else:
            dotted = ".".join(path)
            self.fail(source.name, f"{dotted} has no keys of its own; set it whole: {dotted}=...")

    def forget(self, path: Keys) -> None:
        for known in [p for p in self.places if p[: len(path)] == path]:
            del self.places[known]

    def unknown(self, where: str, path: Keys, siblings: Mapping[str, Any]) -> None:
        """List an unknown key with the nearest known one: a sibling, or the same name in another section."""
        elsewhere = [name for name in _all_keys(self.cls) if name.split(".")[-1] == path[-1]]
        hint = f"; did you mean {elsewhere[0]!r}?" if elsewhere else nearest(path[-1], siblings)
        known = "" if hint else f"; known: {', '.join(siblings)}"
        self.fail(where, f"unknown key {'.'.join(path)}{hint}{known}")

    def build(self, cls: type, tree: Mapping[Any, Any], path: Keys, start: Any = None) -> Any:
        """An instance of `cls`, or `_BAD` with the errors listed.

        Keys that `tree` does not set come from `start`, the default of the field this section is for, or from `cls`.
        """
        hints = _hints(cls)
        values: dict[str, Any] = {}
        for f in (f for f in fields(cls) if f.init):
            below, section = (*path, f.name), _section(hints[f.name])
            default = _default(f) if start is None else getattr(start, f.name)
            if section and isinstance(tree.get(f.name, {} if default is MISSING else None), Mapping):
                inner = default if isinstance(default, section) else None
                values[f.name] = self.build(section, tree.get(f.name, {}), below, inner)
            elif f.name in tree:
                values[f.name] = self.convert(tree[f.name], hints[f.name], below)
            elif default is MISSING:
                values[f.name] = self.fail(self.place(path), f"{'.'.join(below)} is missing")
            elif start is not None:
                values[f.name] = default
        if any(value is _BAD for value in values.values()):
            return _BAD
        try:
            return cls(**values)
        except UserError as error:
            text = "; ".join(part for part in (error.what, error.cause, error.remedy) if part)
            return self.fail(self.blame(path, tree, text), text, error)
        except (TypeError, ValueError) as error:  # a free-form value (Any) that the component cannot use
            text = f"{'.'.join(path) or cls.__name__} cannot be used: {error}"
            return self.fail(self.blame(path, tree, text), text, error)

    def blame(self, path: Keys, tree: Mapping[Any, Any], text: str) -> str:
        """Where the values that an error speaks of were set: those of its section that it names, else the section."""
        named = [self.places[(*path, k)] for k in tree if (*path, k) in self.places and re.search(rf"\b{k}\b", text)]
        return ", ".join(dict.fromkeys(named)) or self.place(path) or ".".join(path)

    def place(self, path: Keys) -> str:
        """Where the value at `path`, or the nearest section around it, was set; empty for a default."""
        return next((self.places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.places), "")

    def convert(self, value: Any, hint: Any, path: Keys) -> Any:
        """`value` as the type `hint`, or `_BAD` with the error listed."""
        origin, args = get_origin(hint), get_args(hint)
        if origin in (Union, types.UnionType):
            return self.convert_union(value, args, path)
        if isinstance(hint, type) and is_dataclass(hint) and isinstance(value, Mapping):
            return self.build_element(hint, value, path)
        if origin in (tuple, list) and isinstance(value, (list, tuple)):
            return self.convert_list(value, origin, args, hint, path)
        if origin is dict and isinstance(value, Mapping):
            keys = [self.convert(k, args[0], (*path, str(k))) for k in value]
            items = [self.convert(v, args[1], (*path, str(k))) for k, v in value.items()]
            return _BAD if any(x is _BAD for x in (*keys, *items)) else dict(zip(keys, items, strict=True))
        if origin is None or origin is Literal:
            result = _scalar(value, hint)
            if result is not _BAD:
                return result
        return self.fail(self.place(path), _wrong_type(path, value, hint))

    def convert_union(self, value: Any, members: tuple[Any, ...], path: Keys) -> Any:
        """A member that takes the value as it is comes first, then one that converts it (text to `Path`, ...)."""
        if value is None and type(None) in members:
            return None
        others = [m for m in members if m is not type(None)]
        if len(others) == 1 and (_section(others[0]) or get_origin(others[0])) and isinstance(value, (Mapping, list)):
            return self.convert(value, others[0], path)  # errors inside are more telling than "must be a mapping"
        n_errors = len(self.errors)
        results = [r for r in (self.convert(value, m, path) for m in others) if r is not _BAD]
        del self.errors[n_errors:]
        if not results:
            return self.fail(self.place(path), _wrong_type(path, value, Union[members]))  # noqa: UP007
        return next((r for r in results if type(r) is type(value)), results[0])

    def convert_list(self, value: Sequence[Any], origin: Any, args: tuple[Any, ...], hint: Any, path: Keys) -> Any:
        open_ended = origin is list or args[1:] == (...,)
        if not open_ended and len(value) != len(args):
            return self.fail(self.place(path), f"{'.'.join(path)} must have {len(args)} entries, got {len(value)}")
        hints = [args[0]] * len(value) if open_ended else args
        items = [self.convert(v, h, (*path, str(i))) for i, (v, h) in enumerate(zip(value, hints, strict=True))]
        return _BAD if any(item is _BAD for item in items) else origin(items)

    def build_element(self, cls: type, value: Mapping[Any, Any], path: Keys) -> Any:
        """A dataclass in a list or mapping: not merged as a section, so its keys are checked here."""
        hints = _hints(cls)
        for key in value:
            if key not in hints:
                self.unknown(self.place((*path, str(key))), (*path, str(key)), hints)
        return self.build(cls, {k: v for k, v in value.items() if k in hints}, path)


# Types ---------------------------------------------------------------------------------------------------------------


def _hints(cls: type) -> dict[str, Any]:
    """Type of each field that can be set."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls) if f.init}


def _default(f: Field[Any]) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


def _initial(cls: type, path: Keys) -> Any:
    """The value at `path` before any recipe; None where a section on the way is absent by default."""
    start: Any = None
    for key in path:
        default = _default(next(f for f in fields(cls) if f.name == key))
        start = default if start is None else getattr(start, key)
        cls = _section(_hints(cls)[key]) or cls
    return start


def _is_mapping(hint: Any) -> bool:
    """A free-form mapping, also an optional one."""
    return any(member is dict or get_origin(member) is dict for member in (hint, *get_args(hint)))


def _section(hint: Any) -> type | None:
    """The dataclass of a field that is a section, also an optional one."""
    union = get_origin(hint) in (Union, types.UnionType)
    members = [m for m in get_args(hint) if m is not type(None)] if union else [hint]
    found: list[type] = [m for m in members if isinstance(m, type) and is_dataclass(m)]
    assert not found or len(members) == 1, f"a section may be optional but not one of several types: {hint}"
    return found[0] if found else None


def _all_keys(cls: type, prefix: str = "") -> list[str]:
    """Dotted names of all settings."""
    keys: list[str] = []
    for name, hint in _hints(cls).items():
        section = _section(hint)
        keys += _all_keys(section, f"{prefix}{name}.") if section else [f"{prefix}{name}"]
    return keys


def _scalar(value: Any, hint: Any) -> Any:
    """`value` as a scalar type, or `_BAD`. True is no number, 1 is no boolean, NaN is no setting."""
    if hint is Any:
        return value
    if get_origin(hint) is Literal:
        return next((v for v in get_args(hint) if v == value and type(v) is type(value)), _BAD)
    if hint is float and not isinstance(value, bool) and isinstance(value, (int, float, str)):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            return _BAD
        return _BAD if math.isnan(number) else number
    if hint is Path and isinstance(value, (str, Path)) and str(value):
        return Path(value)
    if hint in (dict, list) and isinstance(value, hint):
        return value
    return value if hint in (bool, int, str, type(None)) and type(value) is hint else _BAD


_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    type(None): "null",
}


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(a) for a in args)
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in args)
    if origin in (list, tuple):
        return "a list"
    return "a mapping" if origin is dict or hint is dict or is_dataclass(hint) else _NAMES.get(hint, str(hint))


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list" if isinstance(value, (list, tuple)) else _NAMES.get(type(value), type(value).__name__)


def _wrong_type(path: Keys, value: Any, hint: Any) -> str:
    got = "nothing (null)" if value is None else f"{value!r}, which is {_kind(value)}"
    text = f"{'.'.join(path)} must be {_describe(hint)}, got {got}"
    if get_origin(hint) is Literal and isinstance(value, str):
        return text + nearest(value, [a for a in get_args(hint) if isinstance(a, str)])
    wants_text = str in (hint, *get_args(hint)) and isinstance(value, (bool, int, float))
    return f"{text}; quote it to make it text" if wants_text else text
