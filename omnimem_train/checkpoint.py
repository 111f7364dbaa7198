"""Checkpoints for exact resume: a folder of plain files, complete or absent, each with its checksum.

    step-00000120/
      meta.json             format, step, world size, what the caller adds, size and sha256 of every other file
      adapter.safetensors   a group of tensors each
      optimizer.pt          an object each, read with `weights_only=True`: tensors and plain values, no code
      rank-00000.pt         what differs between ranks, e.g. the state of random number generators

A checkpoint is written to `.tmp-step-00000120` and renamed when it is complete, `meta.json` last, everything flushed to
disk; a crash at any moment leaves the checkpoints before it as they were. Half-written ones are never listed.

What the trainer puts in `meta`: `config` (plain values), `memory` (the spec) and `memory_fingerprint`, `position`
(epoch, index in the epoch, samples seen), `budgets` (the sampler's state), `versions`, `base_fingerprint` (of the model
without its adapter, before anything was prepared or sharded).
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import json
import os
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from omnimem_train.config import flatten
from omnimem_train.errors import UserError

FORMAT = 1
META = "meta.json"
_PLAIN = (str, int, float, bool, bytes, type(None), torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        path: its folder; files that a `write` function added are read from there.
        step: optimizer steps done.
        meta: what the trainer saved as `meta`.
        tensors: groups of tensors by name, on the CPU.
        objects: the objects all ranks share.
        rank_objects: those of this rank.
    """

    path: Path
    step: int
    meta: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    objects: dict[str, Any]
    rank_objects: dict[str, Any]


# Saving --------------------------------------------------------------------------------------------------------------


def save_checkpoint(
    root: str | Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    objects: Mapping[str, Any],
    rank_objects: Mapping[str, Any],
    meta: Mapping[str, Any],
    keep: int = 2,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
    write: Callable[[Path], None] | None = None,
) -> Path:
    """Write `root/step-XXXXXXXX`. All ranks call it; they share a file system.

    Args:
        step: optimizer steps done.
        tensors, objects: written by rank 0, each under its name.
        rank_objects: written by every rank, of its own.
        meta: JSON values.
        keep: complete checkpoints to leave, this one included; older ones are removed. 0 keeps all.
        barrier: returns when all ranks have called it.
        write: called by every rank with the unfinished folder, for files of another format.

    Checkpoints of later steps belong to a run that was given up by resuming an older one: they are renamed to
    `step-XXXXXXXX.abandoned` so that they are not taken for the latest, and left for the user to remove.

    Returns:
        the folder.

    Raises:
        UserError: it cannot be written (disk full, say); earlier checkpoints are as they were.
        TypeError, ValueError: something cannot be read back without running code, or `meta` is not JSON.
    """
    assert keep >= 0
    for name, value in [*objects.items(), *rank_objects.items()]:
        _check_plain(value, name)
    json.dumps(meta, allow_nan=False)  # raises now rather than after the work is done
    root = Path(root)
    final, unfinished = root / f"step-{step:08d}", root / f".tmp-step-{step:08d}"
    try:
        if rank == 0:
            for left_over in root.glob(".tmp-*"):
                shutil.rmtree(left_over)
            unfinished.mkdir(parents=True)
        barrier()
        if rank == 0:
            for name, group in tensors.items():
                on_cpu = {key: value.detach().cpu().contiguous() for key, value in group.items()}
                _write(unfinished / f"{name}.safetensors", tensors_to_bytes(on_cpu))
            for name, value in objects.items():
                _write(unfinished / f"{name}.pt", _object_bytes(value))
        _write(unfinished / _rank_file(rank), _object_bytes(dict(rank_objects)))
        if write is not None:
            write(unfinished)
        barrier()
        if rank == 0:
            content: dict[str, Any] = {"format": FORMAT, "step": step, "world_size": world_size}
            content |= {"tensors": list(tensors), "objects": list(objects), "meta": dict(meta)}
            _finish(unfinished, final, content)
            _prune(root, step, keep)
        barrier()
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(
            f"cannot write the checkpoint {final}",
            cause=str(error),
            remedy="free space or choose another folder; earlier checkpoints are intact, resume from them",
        ) from error
    return final


def _finish(unfinished: Path, final: Path, content: dict[str, Any]) -> None:
    """Write `meta.json` and give the folder its name."""
    paths = sorted(p for p in unfinished.rglob("*") if p.is_file())
    if absent := [r for r in range(content["world_size"]) if unfinished / _rank_file(r) not in paths]:
        raise OSError(f"rank 0 does not see the files of ranks {absent}; all ranks must share a file system")
    content["files"] = {p.relative_to(unfinished).as_posix(): _measure(p) for p in paths}
    content["checksum"] = _checksum(content)
    _write(unfinished / META, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    _flush_folder(unfinished)
    replaced = _set_aside(final) if final.exists() else None
    os.rename(unfinished, final)
    _flush_folder(final.parent)
    if replaced is not None:
        shutil.rmtree(replaced)


def _prune(root: Path, step: int, keep: int) -> None:
    for path in checkpoints(root):
        if step_of(path) > step:
            _set_aside(path)
    for path in checkpoints(root)[: -keep if keep else 0]:
        # renamed first: a removal that is interrupted must not leave half a checkpoint under its name
        doomed = path.with_name(f".tmp-old-{path.name}")
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def _set_aside(path: Path) -> Path:
    """Rename to `*.abandoned`, `*.abandoned-2`, ..., whichever is free."""
    names = [f"{path.name}.abandoned", *(f"{path.name}.abandoned-{i}" for i in range(2, 1000))]
    free = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    os.rename(path, free)
    return free


# Finding and loading -------------------------------------------------------------------------------------------------


def checkpoints(root: str | Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    found = [p.parent for p in Path(root).glob(f"step-*/{META}") if re.fullmatch(r"step-\d+", p.parent.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def find_checkpoint(path: str | Path) -> Path:
    """`path` itself if it is a checkpoint, else the latest one in it.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if (path / META).is_file():
        return path
    found = checkpoints(path)
    if not found:
        unfinished = path.name.startswith(".tmp-") or re.fullmatch(r"step-\d+", path.name)
        raise UserError(
            f"no complete checkpoint at {path}",
            cause=f"it has no {META}" if unfinished else "the folder does not exist or holds no step-XXXXXXXX",
            remedy="name a checkpoint or the folder of a run that has saved one",
        )
    return found[-1]


def read_meta(path: str | Path) -> dict[str, Any]:
    """The content of `meta.json`, checked: `format`, `step`, `world_size`, `files`, and the caller's own as `meta`.

    Raises:
        UserError: it cannot be read, is damaged, or has another format.
    """
    path = Path(path)
    try:
        content = json.loads((path / META).read_bytes())
        whole = isinstance(content, dict) and content.get("checksum") == _checksum(content)
    except (OSError, ValueError) as error:
        raise _damaged(path, f"{META} cannot be read ({error})") from error
    if not whole:
        raise _damaged(path, f"{META} does not match its checksum")
    if content["format"] != FORMAT:
        raise UserError(
            f"checkpoint {path} has format {content['format']}, this version reads format {FORMAT}",
            remedy="resume with the version that wrote it",
        )
    return content


def load_checkpoint(path: str | Path, *, rank: int = 0, world_size: int = 1) -> Checkpoint:
    """Read a checkpoint after checking its files: each rank those it reads, rank 0 all.

    Raises:
        UserError: a file is missing or damaged (all of them are named, and the checkpoint before this one offered), or
            it was written by another number of processes.
    """
    path = Path(path)
    content = read_meta(path)
    if content["world_size"] != world_size:
        raise UserError(
            f"checkpoint {path} was written by {content['world_size']} processes, this run has {world_size}",
            cause="the order of the data and the random numbers of each process would differ",
            remedy=f"resume with {content['world_size']} processes, or start a new run from the exported adapter",
        )
    names = [f"{n}.safetensors" for n in content["tensors"]] + [f"{n}.pt" for n in content["objects"]]
    mine = [*names, _rank_file(rank)]
    faults = [fault for name in (content["files"] if rank == 0 else mine) if (fault := _fault(path, name, content))]
    if faults:
        raise _damaged(path, "; ".join(faults))
    return Checkpoint(
        path=path,
        step=content["step"],
        meta=content["meta"],
        tensors={n: tensors_from_bytes((path / f"{n}.safetensors").read_bytes()) for n in content["tensors"]},
        objects={n: _read_object(path / f"{n}.pt") for n in content["objects"]},
        rank_objects=_read_object(path / _rank_file(rank)),
    )


def check_same_run(path: str | Path, current: Mapping[str, Any], may_change: Sequence[str] = ()) -> list[str]:
    """Refuse to go on from a checkpoint with settings that would make it another run.

    Args:
        current: what the run would save as `meta`, as far as it is to be compared: `config`, `memory_fingerprint`, ...
        may_change: patterns of dotted names that may differ, e.g. `"config.train.steps"`, `"config.log.*"`.

    Returns:
        the permitted differences, a line each.

    Raises:
        UserError: others; lists them all.
    """
    saved = read_meta(path)["meta"]
    now = json.loads(json.dumps(current))  # tuples as lists, as they were saved
    then_flat, now_flat = flatten({k: saved.get(k) for k in now}), flatten(now)
    permitted: list[str] = []
    refused: list[str] = []
    for name in sorted({**then_flat, **now_flat}):
        then, new = then_flat.get(name, "(absent)"), now_flat.get(name, "(absent)")
        if then != new:
            allowed = any(fnmatch.fnmatchcase(name, pattern) for pattern in may_change)
            (permitted if allowed else refused).append(f"{name}: {then!r} in the checkpoint, {new!r} now")
    if refused:
        raise UserError(
            f"checkpoint {path} belongs to a run with other settings:\n    " + "\n    ".join(refused),
            cause="a resumed run must go on exactly as it would have without the stop",
            remedy="resume with the settings of the checkpoint, or start a new run in another folder",
        )
    return permitted


def check_base(path: str | Path, base: str, fingerprint: str) -> None:
    """Refuse to use a checkpoint with another base model than it was trained on. Older ones without a note pass.

    Args:
        base: path or name of the model at hand.
        fingerprint: `session.model_fingerprint` of it, without adapters.

    Raises:
        UserError: another one is noted.
    """
    noted = read_meta(path)["meta"].get("base_fingerprint", fingerprint)
    if noted != fingerprint:
        raise UserError(
            f"{base} is not the base model that checkpoint {path} was trained on",
            cause=f"the weights have fingerprint {fingerprint}, in training they had {noted}",
            remedy="give the base model it was trained on: model.path for a run, --model for an export",
        )


# Files ---------------------------------------------------------------------------------------------------------------


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.pt"


def _object_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _read_object(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _measure(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _fault(path: Path, name: str, content: Mapping[str, Any]) -> str:
    """What is wrong with a file of a checkpoint; empty if nothing."""
    wanted = content["files"][name]
    try:
        found = _measure(path / name)
    except OSError as error:
        return f"{name} is missing or unreadable ({error.strerror})"
    if found["bytes"] != wanted["bytes"]:
        return f"{name} has {found['bytes']:,} bytes instead of {wanted['bytes']:,}"
    if found["sha256"] != wanted["sha256"]:
        return f"{name} has changed (sha256 {found['sha256'][:12]}... instead of {wanted['sha256'][:12]}...)"
    return ""


def _checksum(content: Mapping[str, Any]) -> str:
    rest = {k: v for k, v in content.items() if k != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _damaged(path: Path, what: str) -> UserError:
    older = [p for p in checkpoints(path.parent) if re.fullmatch(r"step-\d+", path.name) and step_of(p) < step_of(path)]
    advice = f"resume from the one before it: {older[-1]}" if older else "there is none before it; start the run again"
    return UserError(f"checkpoint {path} is damaged: {what}", "it changed after it was written", advice)


def _check_plain(value: Any, where: str) -> None:
    """Refuse what `torch.load(weights_only=True)` could not read back, when there is still time."""
    kind = type(value)
    if kind in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(item, f"{where}[{key!r}]")
    elif kind in (list, tuple):
        for i, item in enumerate(value):
            _check_plain(item, f"{where}[{i}]")
    elif kind not in _PLAIN and kind not in (Tensor, torch.nn.Parameter):
        raise TypeError(
            f"{where} is a {kind.__module__}.{kind.__qualname__}; a checkpoint holds tensors and plain values"
        )
