"""One run at a time in an output folder: a lock of the operating system, which goes with the process that holds it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from omnimem_train.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = "run.lock"


@contextmanager
def run_lock(folder: Path, rank: int = 0) -> Iterator[None]:
    """Inside, no other run can use `folder`. Rank 0 takes the lock for its run; other ranks take none.

    The lock is `flock` on `run.lock` in the folder, a file that names the holder. The kernel drops it with the process,
    so after a crash or a kill -9 the folder is free at once, and the file left behind means nothing. A run that ends
    removes the file, and what folders were made for it if nothing was written into them.

    Where Python has no `fcntl` (Windows), or the file system no locks, runs are not kept apart.

    Raises:
        UserError: another run holds the folder.
    """
    if rank != 0 or fcntl is None:
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    file = _take(folder)
    os.register_at_fork(after_in_child=file.close)  # a child that outlives this process must not hold the lock
    try:
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}\n".encode())
        yield
    finally:
        if _is_at(file, folder / NAME):
            (folder / NAME).unlink()  # while it is locked; whoever has opened it meanwhile sees that it is gone
        file.close()
        with suppress(OSError):
            for path in made:
                path.rmdir()


def _take(folder: Path) -> FileIO:
    """The locked file."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = FileIO(folder / NAME, "a+")
        except FileNotFoundError:  # the run before has just removed the folder
            continue
        except FileExistsError:  # it was there, and is gone again before `mkdir` could look whether it is a folder
            if folder.exists() and not folder.is_dir():
                raise
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with file:
                raise _in_use(folder, file) from error
        except OSError:  # a file system without locks
            return file
        if _is_at(file, folder / NAME):
            return file
        file.close()


def _in_use(folder: Path, file: FileIO) -> UserError:
    time.sleep(0.1)  # the holder may have taken it this moment, and not yet written who it is
    file.seek(0)
    return UserError(
        f"{folder} is in use by another run, process {file.read().decode(errors='replace').strip() or 'unknown'}",
        cause="both would write the same files",
        remedy="choose another output folder, or wait for that run or stop it",
    )


def _is_at(file: FileIO, path: Path) -> bool:
    """Whether `file` is (still) what `path` names."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
