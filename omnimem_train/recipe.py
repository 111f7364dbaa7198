"""Recipes as YAML text: what a file says and in which line, its chain of bases, and writing one.

Scalars follow YAML 1.2's core schema, not the guesses of 1.1: `1e-4` is a number; `no`, `1:30` and `2026-11-23` are
text; only `true` and `false` are booleans. Aliases (`*name`) and duplicate keys are errors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from omnimem_train.errors import UserError

Keys = tuple[str, ...]
BASE_KEY = "base"


@dataclass
class Recipe:
    """What one source says.

    Attributes:
        name: of the file or the override.
        values: plain Python values.
        lines: line of each key, and of each list entry (its number as text).
        errors: duplicate keys.
    """

    name: str
    values: Any = None
    lines: dict[Keys, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def where(self, path: Keys) -> str:
        """`"file.yaml:12"`, or the name alone where the line is unknown."""
        return f"{self.name}:{self.lines[path]}" if path in self.lines else self.name


def parse(text: str, name: str) -> Recipe:
    """A YAML document.

    Raises:
        yaml.YAMLError: not valid; `problem` puts it in words.
    """
    recipe, loader = Recipe(name), _Loader(text)
    try:
        root = loader.get_single_node()
        recipe.values = None if root is None else _plain(loader, root, (), recipe)
    finally:
        loader.dispose()
    return recipe


def problem(error: yaml.YAMLError) -> str:
    """Line, column and what is wrong there."""
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    return place + (getattr(error, "problem", None) or str(error))


def read_chain(path: Path, seen: tuple[Path, ...] = ()) -> list[Recipe]:
    """The recipe at `path` preceded by its bases.

    Raises:
        UserError: a file cannot be read, is not YAML or holds no mapping; or recipes name each other as base.
    """
    if path.resolve() in [p.resolve() for p in seen]:
        cycle = " -> ".join(str(p) for p in (*seen, path))
        raise UserError(f"recipes name each other as base: {cycle}", remedy="remove one of the `base:` lines")
    try:
        recipe = parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        asked = f"; {seen[-1]} names it as its base" if seen else ""
        raise UserError(f"cannot read the recipe {path}{asked}", cause=str(error), remedy="check the path") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML", cause=problem(error), remedy="mend that line") from error
    if recipe.values is None:
        recipe.values = {}
    if not isinstance(recipe.values, dict):
        raise UserError(f"{path} must hold lines `key: value`, it holds {recipe.values!r:.60}")
    base = recipe.values.pop(BASE_KEY, None)
    if base is None:
        return [recipe]
    if not isinstance(base, str):
        raise UserError(f"{recipe.where((BASE_KEY,))}: base must be the path of one recipe, got {base!r}")
    return [*read_chain(path.parent / base, (*seen, path)), recipe]


def dump(values: Any) -> str:
    """Plain values as YAML that `parse` reads back; lists of scalars on one line, all else in block style."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not supported, write it out", problem_mark=mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
        node = super().represent_sequence(tag, sequence, flow_style)
        node.flow_style = all(isinstance(child, yaml.ScalarNode) for child in node.value)
        return node

    def ignore_aliases(self, data: Any) -> bool:
        return True  # a value that appears twice is written twice: `parse` takes no aliases


_NUMBER = r"(?:\.[0-9]+|(?:0|[1-9][0-9_]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
_SCALARS = {  # tag: pattern, letters it may begin with ("" for an empty scalar)
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (rf"[-+]?(?:{_NUMBER}|\.inf|\.Inf|\.INF)|\.nan|\.NaN|\.NAN", list("-+.0123456789")),
}

for _cls in (_Loader, _Dumper):
    _cls.yaml_implicit_resolvers = {}
    for _tag, (_pattern, _first) in _SCALARS.items():
        _cls.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)


def _plain(loader: _Loader, node: Any, path: Keys, recipe: Recipe) -> Any:
    """Python values of a YAML node; notes the lines of keys and list entries."""
    if isinstance(node, yaml.ScalarNode):
        return _scalar(loader, node)
    if isinstance(node, yaml.SequenceNode):
        for i, child in enumerate(node.value):
            recipe.lines[(*path, str(i))] = child.start_mark.line + 1
        return [_plain(loader, child, (*path, str(i)), recipe) for i, child in enumerate(node.value)]
    values: dict[Any, Any] = {}
    for key_node, child in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key must be a single word", problem_mark=key_node.start_mark)
        key, line = _scalar(loader, key_node), key_node.start_mark.line + 1
        below = (*path, str(key))
        if key in values:
            dotted = ".".join(below)
            recipe.errors.append(f"{recipe.name}:{line}: duplicate key {dotted}, first in line {recipe.lines[below]}")
        else:
            recipe.lines[below] = line
            values[key] = _plain(loader, child, below, recipe)
    return values


def _scalar(loader: _Loader, node: yaml.ScalarNode) -> Any:
    try:
        return loader.construct_object(node)
    except (ValueError, KeyError, AttributeError) as error:  # an explicit tag such as `!!int abc` or `!!bool abc`
        raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from error
