"""The lock of an output folder: one run at a time, and never stuck."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from omnimem_train import runlock
from omnimem_train.errors import UserError
from omnimem_train.runlock import NAME, run_lock

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(runlock.fcntl is None, reason="this system has no fcntl")

HOLD = """
import os, sys, time
from pathlib import Path
from omnimem_train.runlock import run_lock
with run_lock(Path(sys.argv[1])):
    child = os.fork() if "fork" in sys.argv else 0
    if child or "fork" not in sys.argv:
        print(child, flush=True)
    time.sleep(100)
"""
TAKE_TURNS = """
import os, sys
from pathlib import Path
from omnimem_train.errors import UserError
from omnimem_train.runlock import run_lock, time
time.sleep = lambda seconds: None
folder, inside = Path(sys.argv[1]), Path(sys.argv[2])
held = 0
print("ready", flush=True)
sys.stdin.readline()
for _ in range(3000):
    try:
        with run_lock(folder):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails if another is inside
            inside.unlink()
            held += 1
    except UserError:
        pass
print(held)
"""


def start(script: str, *arguments: Any) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_second_run_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        with pytest.raises(UserError) as error, run_lock(tmp_path):
            pytest.fail("both are inside")
        assert f"{tmp_path} is in use by another run, process {os.getpid()} on " in str(error.value)
    with run_lock(tmp_path):
        pass


@pytest.mark.parametrize("fork", [[], ["fork"]], ids=["alone", "with a child that lives on"])
def test_a_killed_run_leaves_the_folder_free(tmp_path: Path, fork: list[str]) -> None:
    holder = start(HOLD, tmp_path, *fork)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(UserError, match=f"process {holder.pid} on "), run_lock(tmp_path):
            pytest.fail("both are inside")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert (tmp_path / NAME).exists()
        with run_lock(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} on "), run_lock(tmp_path):
            pytest.fail("both are inside")
    finally:
        holder.kill()
        holder.stdout.close()
        if child:
            os.kill(child, signal.SIGKILL)


def test_runs_that_begin_and_end_all_the_time_never_meet(tmp_path: Path) -> None:
    """Also while lock file and folder are removed and made again."""
    runs = [start(TAKE_TURNS, tmp_path / "a" / "out", tmp_path / "inside") for _ in range(3)]
    for run in runs:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
    for run in runs:  # at once
        assert run.stdin is not None
        run.stdin.close()
    held = [int(run.stdout.read()) for run in runs if run.stdout is not None]
    codes = [run.wait(timeout=100) for run in runs]
    assert codes == [0, 0, 0]
    assert min(held) > 0
    assert not list(tmp_path.rglob(NAME))


def test_a_folder_that_goes_while_it_is_made_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir, calls = Path.mkdir, []

    def once_gone(self: Path, *args: Any, **options: Any) -> None:
        calls.append(self)
        if len(calls) == 1:
            raise FileExistsError(self)
        mkdir(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", once_gone)
    with run_lock(tmp_path / "run"):
        assert (tmp_path / "run" / NAME).exists()
    assert len(calls) >= 2
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError), run_lock(tmp_path / "file"):
        pass


def test_a_run_that_fails_frees_the_folder_and_leaves_nothing_empty(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    with pytest.raises(FileNotFoundError), run_lock(folder):
        (folder / "config.yaml").read_text()
    assert not list(tmp_path.iterdir())
    with run_lock(folder):
        (folder / "metrics.jsonl").write_text("x")
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]
    (tmp_path / "mine").mkdir()
    with run_lock(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir(), "it was there before"


def test_the_file_of_another_run_is_left_alone(tmp_path: Path) -> None:
    """The folder was removed and a new run begun in it, while the first still ran."""
    with run_lock(tmp_path):
        (tmp_path / NAME).unlink()
        later = run_lock(tmp_path)
        later.__enter__()
    assert (tmp_path / NAME).exists()
    later.__exit__(None, None, None)


def test_other_ranks_take_no_lock(tmp_path: Path) -> None:
    with run_lock(tmp_path / "a", rank=1):
        assert not (tmp_path / "a").exists()
    with run_lock(tmp_path), run_lock(tmp_path, rank=1):
        pass


def test_where_there_are_no_locks_runs_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(runlock.fcntl, "flock", refuse)
    with run_lock(tmp_path), run_lock(tmp_path):
        pass
    monkeypatch.setattr(runlock, "fcntl", None)
    with run_lock(tmp_path), run_lock(tmp_path):
        pass
