"""Lists of records on disk (JSON, JSON lines, Parquet, datasets), and the collecting of problems found in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omnimem_train.errors import UserError

SHOWN = 20


@dataclass
class Problems:
    """Collects what is wrong with a file, so that all of it is reported at once."""

    path: Path
    found: list[str] = field(default_factory=list)

    def add(self, where: str, what: str, remedy: str) -> None:
        """Note one problem: where it is, what was found and why it is wrong, what to do."""
        self.found.append(f"{where}: {what}; {remedy}")

    def check(self) -> None:
        """Raises UserError naming the first problems and the count, if there are any."""
        if not self.found:
            return
        n = len(self.found)
        more = [f"  ... and {n - SHOWN} more"] if n > SHOWN else []
        lines = [f"{self.path}: {n} problem{'s' * (n > 1)}", *(f"  {text}" for text in self.found[:SHOWN]), *more]
        raise UserError("\n".join(lines))


@dataclass(frozen=True)
class Record:
    """One record, and where it stands, for messages ("line 3", "entry 3", both from 1). Null values are left out."""

    where: str
    values: dict[str, Any]


def is_file(path: Path) -> bool:
    """Whether there is such a file; a name that no file can have (too long, say) is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_seconds(value: Any) -> bool:
    """Whether a value of a record is a time: a number, finite, 0 or more."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e9


def read_records(path: Path | str) -> list[Record]:
    """All records of a file.

    Args:
        path: .json (a list), .jsonl, .parquet, a folder of Parquet files, or a folder written by
            `datasets.Dataset.save_to_disk`.

    Raises: UserError for a missing, empty, unreadable or differently built file; for JSON lines all bad lines at once.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder", remedy="correct the path")
    if path.is_dir() or path.suffix == ".parquet":
        records = _read_dataset(path)
    elif path.suffix == ".jsonl":
        records = _read_lines(path)
    elif path.suffix == ".json":
        records = _read_list(path)
    else:
        kinds = "use .json, .jsonl or .parquet"
        raise UserError(f"{path}: unknown kind of file", f"the name ends in {path.suffix!r}", kinds)
    if not records:
        raise UserError(f"{path}: holds no entries", remedy="write at least one")
    return records


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object that an evaluation wrote.

    Raises:
        UserError: it is none any more.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged", str(error), "delete that folder and run the evaluation again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged", "it holds no object", "delete that folder and run the evaluation again")
    return content


def _read_list(path: Path) -> list[Record]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        remedy = "mend the file; with one object a line its name must end in .jsonl"
        raise UserError(f"{path}: no valid JSON", str(error), remedy) from error
    if not isinstance(values, list):
        raise UserError(f"{path}: holds a {type(values).__name__}", "entries stand in a list", "write [{...}, ...]")
    problems = Problems(path)
    records = list(_objects(((f"entry {i}", v) for i, v in enumerate(values, 1)), problems))
    problems.check()
    return records


def _read_lines(path: Path) -> list[Record]:
    problems, values = Problems(path), []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                values.append((f"line {number}", json.loads(line)))
            except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
                problems.add(f"line {number}", f"no valid JSON ({error})", "mend or remove the line")
    records = list(_objects(iter(values), problems))
    problems.check()
    return records


def _objects(values: Iterator[tuple[str, Any]], problems: Problems) -> Iterator[Record]:
    for where, value in values:
        if isinstance(value, dict):
            yield Record(where, {k: v for k, v in value.items() if v is not None})
        else:
            problems.add(where, f"{value!r:.60} is a {type(value).__name__}", "an entry is an object {...}")


def _read_dataset(path: Path) -> list[Record]:
    import datasets

    try:
        if (path / "dataset_info.json").exists():
            table = datasets.Dataset.load_from_disk(str(path))
        else:
            files = sorted(map(str, path.rglob("*.parquet"))) if path.is_dir() else [str(path)]
            if not files:
                raise UserError(f"{path}: no data in this folder", "no *.parquet, no dataset_info.json", "name a file")
            table = datasets.Dataset.from_parquet(files, keep_in_memory=True)
    except UserError:
        raise
    except Exception as error:  # datasets and pyarrow raise many kinds
        raise UserError(f"{path}: cannot be read", f"{type(error).__name__}: {error}", "check the file") from error
    return [Record(f"row {i}", _without_nulls(row)) for i, row in enumerate(table, 1)]


def _without_nulls(value: Any) -> Any:
    """Parquet gives every row every key: drop those that are null, at any depth."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value
