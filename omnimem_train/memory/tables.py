"""Files with layer tables: what `omnimem calibrate` writes, and the published OmniMem tables.

A table has one entry a layer: a number of tokens or [audio, visual]; entries of both kinds may be mixed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omnimem_train.errors import UserError, nearest


def load_layer_table(source: str | Path) -> tuple[Any, ...]:
    """The entries of a table file.

    Args:
        source: a JSON file with a list, with an object that has "layer_table" (`omnimem calibrate`), or with several
            tables by name (the published budgets); of the last, "FILE#NAME" is the table NAME.

    Raises:
        UserError: the file cannot be read, or holds no such table.
    """
    file, _, name = str(source).partition("#")
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read the layer table {file!r}",
            cause=str(error),
            remedy="name a JSON file as `omnimem calibrate` writes it, or give one entry a layer, e.g. [512, 512]",
        ) from error
    if isinstance(content, dict):
        content = _named(content, file, name)
    elif name:
        raise UserError(f"{file} holds one layer table, without names", remedy=f"leave out #{name}")
    if not isinstance(content, list) or not content:
        raise UserError(f"{source} is not a layer table", remedy="a table is a list with one entry a layer")
    return tuple(tuple(entry) if isinstance(entry, list) else entry for entry in content)


def _named(content: dict[str, Any], file: str, name: str) -> Any:
    """The one table of an object, or that called `name`."""
    if not name and "layer_table" in content:
        return content["layer_table"]
    names = [key for key, value in content.items() if isinstance(value, list)]
    if name in names:
        return content[name]
    hint = nearest(name, names) if name else ""
    raise UserError(
        f"{file} holds {len(names)} tables, none of them {name!r}{hint}" if name else f"{file}: which of its tables?",
        remedy=f"write {file}#NAME; names: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}",
    )
