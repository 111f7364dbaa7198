"""What encoders made of clips, kept on disk: a folder of bounded size that several processes may use at once.

    FOLDER/
      KEY/                       an entry: one clip under one set of settings (`omnimem_train.replay` makes the key)
        index.json               what is in the parts, with sums over their bits; its time is that of the last use
        part-00000.safetensors   token blocks, one after the other: about 120 MB each
        moments.safetensors      what questions see and where they go
      tmp-...                    an entry being written; renamed to its key when it is complete
      lock                       held while room is made

An entry appears and disappears by renaming, so it is never seen half written. Its parts are read one after the other
and checked against their sums on the model's device; one that is missing or damaged makes the entry `Damaged`: it is
removed, and the clip is encoded again. Before a part is written, entries used longest ago make room for it.

A disk that fills up, or a folder that can no longer be written, costs a warning, and training goes on without storing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from omnimem_train.checksums import bit_sum
from omnimem_train.errors import UserError
from omnimem_train.models.interface import TokenBlock

GIB = 2**30
STALE_S = 6 * 3600.0  # an entry being written gets a part every few minutes; one this old was left by a crash
FIELDS = ("embeds", "positions", "modality", "time_s")


class Damaged(Exception):
    """An entry that cannot be used (any more)."""


@dataclass
class Counts:
    """What happened in this process."""

    hits: int = 0
    misses: int = 0
    stored: int = 0
    not_stored: int = 0
    damaged: int = 0
    evicted: int = 0


class EncoderCache:
    """A cache folder.

    Args:
        folder: made if missing.
        limit_gib: size of all entries together, those being written included (GiB).

    Attributes:
        counts: hits, misses, ... of this process.

    Raises:
        UserError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path, limit_gib: float) -> None:
        self.folder, self.limit = folder, int(limit_gib * GIB)
        self.counts = Counts()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._remove_stale()
        except OSError as error:
            raise UserError(
                f"the cache {folder} cannot be used", str(error), "give data.cache a folder that can be written"
            ) from error

    def find(self, key: str) -> Entry | None:
        """The entry under `key`, now the one used last; None if there is none, or none that can be read."""
        folder = self.folder / key
        try:
            entry = Entry.open(folder)
            os.utime(folder / "index.json")
        except FileNotFoundError:
            self.counts.misses += 1
            return None
        except Damaged as damage:
            self.drop(folder, damage)
            return None
        except OSError as error:
            self.warn(f"{folder} cannot be read ({error})")
            return None
        self.counts.hits += 1
        return entry

    def drop(self, folder: Path, damage: Exception) -> None:
        """Count and remove an entry that cannot be used."""
        self.counts.damaged += 1
        self.warn(f"{folder.name} is encoded again: {damage} (damaged so far: {self.counts.damaged})")
        self._remove(folder)

    def writer(self, key: str) -> EntryWriter:
        """Begin an entry."""
        return EntryWriter(self, key)

    def make_room(self, n_bytes: int) -> bool:
        """Remove entries until `n_bytes` more fit in; False if they never will (more than the limit is being written).

        Raises:
            OSError: the folder cannot be changed.
        """
        with self._locked():
            sizes = {f: _size(f) for f in self.folder.iterdir() if f.is_dir()}
            excess = sum(sizes.values()) + n_bytes - self.limit
            entries = [f for f in sizes if not f.name.startswith("tmp-")]
            if excess > sum(sizes[f] for f in entries):
                return False
            for folder in sorted(entries, key=_used_s):
                if excess <= 0:
                    break
                self._remove(folder)
                self.counts.evicted += 1
                excess -= sizes[folder]
            return True

    def warn(self, text: str) -> None:
        """A line for whoever watches the run."""
        print(f"encoder cache: {text}", flush=True)

    def _remove(self, folder: Path) -> None:
        """Remove an entry at once for others, then from the disk. Another process may have been faster."""
        aside = self.folder / f"tmp-{uuid.uuid4().hex}"
        try:
            os.rename(folder, aside)
        except FileNotFoundError:
            return
        except OSError as error:
            self.warn(f"{folder} cannot be removed ({error})")
            return
        shutil.rmtree(aside, ignore_errors=True)

    def _remove_stale(self) -> None:
        for folder in self.folder.glob("tmp-*"):
            if time.time() - _newest_s(folder) > STALE_S:
                shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among all processes and threads that make room."""
        with (self.folder / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


@dataclass(frozen=True)
class Entry:
    """A stored clip; nothing but its index is in memory.

    Attributes:
        about: what was given to `EntryWriter.publish`.
    """

    folder: Path
    about: dict[str, Any]
    block_sizes: list[int]
    parts: list[dict[str, Any]]

    @classmethod
    def open(cls, folder: Path) -> Entry:
        """Raises FileNotFoundError if there is none, Damaged if its index cannot be read."""
        text = (folder / "index.json").read_bytes()
        try:
            content = json.loads(text)
            body = content["body"]
            if _digest(body) != content["digest"]:
                raise Damaged("its index does not match its digest")
            return cls(folder, body["about"], body["block_sizes"], body["parts"])
        except (ValueError, KeyError, TypeError) as error:
            raise Damaged(f"its index cannot be read ({error!r})") from error

    def blocks(self, device: torch.device) -> Iterator[TokenBlock]:
        """The blocks in order, on `device`; one part at a time is read.

        Raises:
            Damaged: a part is missing or does not match its sums.
        """
        sizes, parts = iter(self.block_sizes), iter(self.parts[:-1])
        left: TokenBlock | None = None
        for size in sizes:
            if left is None or left.n == 0:
                part = next(parts, None)
                if part is None:
                    raise Damaged("it has fewer tokens than blocks ask for")
                left = block_of(self._read(part, device))
            if left.n < size:
                raise Damaged("a block crosses the border of two parts")
            yield left[:size]
            left = left[size:]

    def moments(self, device: torch.device) -> dict[str, Tensor]:
        """The tensors kept beside the blocks. Raises: Damaged."""
        return self._read(self.parts[-1], device)

    def _read(self, part: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
        try:
            tensors = {k: x.to(device) for k, x in load_file(self.folder / part["file"]).items()}
        except (OSError, SafetensorError) as error:
            raise Damaged(f"{part['file']} cannot be read ({error})") from error
        if {k: _print(x) for k, x in tensors.items()} != part["prints"]:
            raise Damaged(f"{part['file']} is not what was written")
        return tensors


@dataclass
class EntryWriter:
    """Writes an entry as its blocks come. Once something fails, the rest is ignored and nothing is published."""

    cache: EncoderCache
    key: str
    part_tokens: int = 16384
    failed: bool = False
    _sizes: list[int] = field(default_factory=list)
    _parts: list[dict[str, Any]] = field(default_factory=list)
    _held: list[TokenBlock] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder = self.cache.folder / f"tmp-{uuid.uuid4().hex}"

    def add(self, block: TokenBlock) -> None:
        """The next block of the stream."""
        if self.failed:
            return
        self._sizes.append(block.n)
        self._held.append(block)
        if sum(b.n for b in self._held) >= self.part_tokens:
            self._flush()

    def publish(self, about: dict[str, Any], moments: Mapping[str, Tensor]) -> None:
        """Finish the entry; if another process was faster, its entry stays.

        Args:
            about: JSON, comes back as `Entry.about`.
            moments: tensors to keep beside the blocks.
        """
        self._flush()
        self._write("moments.safetensors", moments)
        if self.failed:
            return
        body = {"about": about, "block_sizes": self._sizes, "parts": self._parts}
        try:
            (self.folder / "index.json").write_text(json.dumps({"digest": _digest(body), "body": body}))
            os.rename(self.folder, self.cache.folder / self.key)
            self.cache.counts.stored += 1
        except OSError as error:
            exists = (self.cache.folder / self.key).exists()
            self.abort("" if exists else str(error))

    def abort(self, why: str = "") -> None:
        """Leave nothing behind; `why` is printed the first time it happens in this process."""
        if not self.failed and why:
            self.cache.counts.not_stored += 1
            if self.cache.counts.not_stored == 1:
                self.cache.warn(f"a clip was not stored: {why}; training goes on, this is said once")
        self.failed = True
        self._held.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _flush(self) -> None:
        if self._held and not self.failed:
            block = TokenBlock.cat(self._held)
            self._held.clear()
            self._write(f"part-{len(self._parts):05}.safetensors", tensors_of(block))

    def _write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        if self.failed:
            return None
        prints = {k: _print(x) for k, x in tensors.items()}
        # copies: safetensors refuses tensors that share storage or are expanded
        copies = {k: x.detach().clone(memory_format=torch.contiguous_format).cpu() for k, x in tensors.items()}
        try:
            self.folder.mkdir(exist_ok=True)
            n_bytes = sum(x.numel() * x.element_size() for x in copies.values()) + 4096
            if not self.cache.make_room(n_bytes):
                return self.abort(f"clips are larger than data.cache_gib={self.cache.limit / GIB:g}")
            save_file(copies, self.folder / name)
        except (OSError, SafetensorError) as error:
            return self.abort(str(error))
        self._parts.append({"file": name, "prints": prints})
        return None


def tensors_of(block: TokenBlock, prefix: str = "") -> dict[str, Tensor]:
    """A block as named tensors."""
    named = {f"{prefix}{k}": getattr(block, k) for k in FIELDS}
    return named | {f"{prefix}extras.{k}": x for k, x in block.extras.items()}


def block_of(tensors: Mapping[str, Tensor], prefix: str = "") -> TokenBlock:
    """The block that `tensors_of` took apart."""
    part = {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}
    extras = {k.removeprefix("extras."): x for k, x in part.items() if k.startswith("extras.")}
    return TokenBlock(part["embeds"], part["positions"], part["modality"], part["time_s"], extras)


def _print(x: Tensor) -> str:
    """What a tensor must agree in to be the one that was written."""
    return f"{x.dtype} {tuple(x.shape)} {bit_sum(x)}"


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _size(folder: Path) -> int:
    """Bytes of the files of an entry; 0 if it has gone."""
    try:
        return sum(file.stat().st_size for file in folder.iterdir())
    except FileNotFoundError:
        return 0


def _used_s(folder: Path) -> float:
    """When an entry was used last."""
    try:
        return (folder / "index.json").stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _newest_s(folder: Path) -> float:
    try:
        return max([folder.stat().st_mtime, *(file.stat().st_mtime for file in folder.iterdir())])
    except FileNotFoundError:
        return time.time()
