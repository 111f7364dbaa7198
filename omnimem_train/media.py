"""From a file to timed windows of frames and samples; decoding runs in a process that a time limit can kill.

    with read_windows("talk.mp4", fps=2.0, window_s=2.0) as reader:
        print(reader.info)
        for window in reader:
            ...

How frames and samples are chosen, and what the two readers cost, is said in `omnimem_train.media_decode`. There is no
fallback from one reader to the other. A decoding process serves one file at a time and is reused for the next; every
reader that is open at the same time has its own. A file that crashes or hangs it costs that process, nothing else.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from omnimem_train.errors import UserError, nearest
from omnimem_train.media_decode import READERS
from omnimem_train.media_worker import HEADER
from omnimem_train.models.interface import MediaInfo, MediaWindow

REMEDY = "check that the file plays; convert it (ffmpeg -i FILE -c:v libx264 -c:a aac OUT.mp4), or take it off the list"


class MediaError(UserError):
    """A file that cannot be read. `path` is the file."""

    def __init__(self, what: str, cause: str = "", remedy: str = "", path: Path | None = None) -> None:
        super().__init__(what, cause, remedy)
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.cause, self.remedy, self.path)


class MediaReader:
    """The windows of one file, in order: an iterator and a context manager. Made by `read_windows`.

    Attributes:
        info: what is known of the file. With the pyav reader the length is what the file's header states.
    """

    def __init__(self, path: Path, request: dict[str, Any], time_limit_s: float) -> None:
        self._path, self._limit_s = path, time_limit_s
        self._worker: _Worker | None = _acquire()
        self._last = False
        answer, _ = self._call({"op": "open", "path": str(path), **request})
        self.info = MediaInfo(path=path, **answer["info"])

    def __iter__(self) -> Iterator[MediaWindow]:
        return self

    def __next__(self) -> MediaWindow:
        if self._last or self._worker is None:
            raise StopIteration
        head, body = self._call({"op": "next"})
        self._last = head["last"]
        n_pixels = 0 if head["frames"] is None else int(np.prod(head["frames"]))
        frames = None if head["frames"] is None else body[:n_pixels].reshape(head["frames"])
        samples = None if head["samples"] is None else body[n_pixels:].copy().view(np.float32)
        if self._last:
            self.close()
        return MediaWindow(head["start_s"], head["end_s"], frames, samples, head["last"])

    def __enter__(self) -> MediaReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_worker", None) is not None:  # left half-read: its process still has the file open
            self._worker.kill()  # type: ignore[union-attr]

    def close(self) -> None:
        """Give the decoding process back. Safe to call twice."""
        if self._worker is None:
            return
        try:
            self._call({"op": "close"})
        finally:
            worker, self._worker = self._worker, None
            if worker is not None:
                _release(worker)

    def _call(self, request: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
        """Ask the process; a failure of any kind ends this reader with a MediaError."""
        assert self._worker is not None
        failure, lost = None, True
        try:
            head, body = self._worker.call(request, self._limit_s)
            failure, lost = head.get("error"), False
            if failure is None:
                return head, body
        except TimeoutError:
            failure = f"decoding gave no answer for {self._limit_s:g} s; the decoding process was stopped"
        except EOFError:
            failure = "the decoding process died"
        worker, self._worker = self._worker, None
        said = worker.said()
        worker.kill() if lost else _release(worker)
        raise MediaError(
            f"{self._path}: cannot be decoded", "; ".join(filter(None, [failure, said])), REMEDY, self._path
        )


def read_windows(
    path: Path | str,
    *,
    fps: float,
    window_s: float,
    sampling_rate: int = 16000,
    reader: str = "decord",
    time_limit_s: float = 60.0,
    start_s: float = 0.0,
    max_s: float | None = None,
    audio_path: Path | str | None = None,
    picture: bool = True,
    sound: bool = True,
) -> MediaReader:
    """Read a file as windows of `window_s` seconds that follow each other without gaps.

    Args:
        path: video or sound file.
        fps: frames a second; frame k shows the picture at k / fps seconds of the file.
        window_s: seconds of a window. The last one may hold less (its borders are nearer only where `max_s` cuts it).
        sampling_rate: of the samples handed out (Hz).
        reader: "decord" or "pyav".
        time_limit_s: for opening, and for each window; after it the decoding process is killed.
        start_s: begin here; times in windows stay those of the file.
        max_s: end this many seconds after start_s, if the file is longer.
        audio_path: take the sound from this file instead; it starts with the picture.
        picture, sound: whether to look for them at all.

    Returns: an iterator of `MediaWindow`. Windows go on until picture and sound have both ended: where the picture has
        ended `frames` has n = 0, where the sound has ended `samples` is shorter or empty. No silence is made up.

    Raises:
        MediaError: a file is missing or cannot be decoded (also while iterating).
        UserError: impossible values.
    """
    path = Path(path)
    _check_values(fps, window_s, sampling_rate, reader, start_s, max_s)
    for file in (path, *([Path(audio_path)] if audio_path else [])):
        _check_file(file)
    request = {
        "reader": reader,
        "fps": fps,
        "window_s": window_s,
        "sampling_rate": sampling_rate,
        "start_s": start_s,
        "max_s": max_s,
        "audio_path": str(audio_path) if audio_path else None,
        "picture": picture,
        "sound": sound,
    }
    return MediaReader(path, request, time_limit_s)


def probe(path: Path | str, reader: str = "decord", time_limit_s: float = 60.0) -> MediaInfo:
    """What is known of a file. decord has to decode the sound track to know of it (kept for a read that follows).

    Raises: MediaError if the file is missing or cannot be decoded.
    """
    with read_windows(path, fps=1.0, window_s=1.0, reader=reader, time_limit_s=time_limit_s) as opened:
        return opened.info


def read_audio_blocks(
    path: Path | str,
    sampling_rate: int = 16000,
    block_s: float = 30.0,
    reader: str = "decord",
    time_limit_s: float = 60.0,
) -> Iterator[np.ndarray]:
    """The sound of a file in blocks of `block_s` seconds, (n,) float32 mono; nothing for a file without sound.

    The sound track alone, from its own first sample on: not moved to the picture's start, no tail cut.
    """
    info = probe(path, reader, time_limit_s)
    if not info.has_audio:
        return
    options: dict[str, Any] = {"sampling_rate": sampling_rate, "reader": reader, "time_limit_s": time_limit_s}
    with read_windows(path, fps=1.0, window_s=block_s, picture=False, **options) as opened:
        for window in opened:
            assert window.samples is not None
            if len(window.samples):
                yield window.samples


def _check_values(
    fps: float, window_s: float, sampling_rate: int, reader: str, start_s: float, max_s: float | None
) -> None:
    package = {"decord": "decord", "pyav": "av"}
    if reader in package and importlib.util.find_spec(package[reader]) is None:
        raise UserError(
            f"reader {reader!r} is not installed",
            f"there is no package {package[reader]!r}",
            f"pip install {package[reader]}, or choose another reader",
        )
    if reader not in READERS:
        raise UserError(
            f"reader {reader!r} is not known{nearest(reader, READERS)}", remedy=f"one of {', '.join(READERS)}"
        )
    if fps <= 0 or window_s <= 0 or sampling_rate <= 0 or start_s < 0 or (max_s is not None and max_s <= 0):
        raise UserError(
            f"fps {fps}, window_s {window_s}, sampling_rate {sampling_rate}, start_s {start_s}, max_s {max_s}",
            "fps, window_s, sampling_rate and max_s must be above 0, start_s not below",
            "change these values",
        )


def _check_file(path: Path) -> None:
    """Causes that can be told without a decoder."""
    cause = ""
    if not path.exists():
        cause = "there is no such file"
    elif not path.is_file():
        cause = "this is no file but a folder or a device"
    elif path.stat().st_size == 0:
        cause = "the file is empty (0 bytes)"
    if cause:
        raise MediaError(f"{path}: cannot be read", cause, "correct the path, or fetch the file again", path)


class _Worker:
    """One decoding process."""

    def __init__(self) -> None:
        root = str(Path(__file__).resolve().parents[1])
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
        # Opened for appending, so that it can be emptied while the process lives.
        self._log = tempfile.TemporaryFile(mode="a+b")  # noqa: SIM115
        self._pid = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "omnimem_train.media_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=env,
            start_new_session=True,  # Ctrl-C is for the parent
            bufsize=0,
        )

    def call(self, request: dict[str, Any], limit_s: float) -> tuple[dict[str, Any], np.ndarray]:
        """Send a request and wait for head and body (bytes as uint8).

        Raises: TimeoutError after limit_s seconds, EOFError if the process has ended.
        """
        if request["op"] == "open":
            self._log.truncate(0)
        deadline = time.monotonic() + limit_s
        text = json.dumps(request).encode()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(HEADER.pack(len(text), 0) + text)
        except BrokenPipeError as error:
            raise EOFError from error
        head_bytes, body_bytes = HEADER.unpack(self._read(HEADER.size, deadline).tobytes())
        head = json.loads(self._read(head_bytes, deadline).tobytes())
        return head, self._read(body_bytes, deadline)

    def said(self) -> str:
        """The last line the decoder wrote about the current file."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""

    def kill(self) -> None:
        """Stop the process at once."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            assert pipe is not None
            pipe.close()

    def _read(self, n: int, deadline: float) -> np.ndarray:
        assert self._process.stdout is not None
        pipe, out, have = self._process.stdout, np.empty(n, np.uint8), 0
        view = memoryview(out)  # type: ignore[arg-type]
        while have < n:
            if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            got = pipe.readinto(view[have:])  # type: ignore[attr-defined]
            if not got:
                raise EOFError
            have += got
        return out

    def __del__(self) -> None:
        if self._process.returncode is None and self._pid == os.getpid():
            self.kill()


_lock = threading.Lock()
_idle: list[_Worker] = []
_owner = os.getpid()


def _acquire() -> _Worker:
    """An idle decoding process of this process, or a new one. (After a fork the parent's are left to the parent.)"""
    global _owner
    with _lock:
        if _owner != os.getpid():
            _owner = os.getpid()
            _idle.clear()
        return _idle.pop() if _idle else _Worker()


def _release(worker: _Worker) -> None:
    with _lock:
        if _owner == os.getpid():
            _idle.append(worker)


@atexit.register
def close_workers() -> None:
    """Stop the idle decoding processes. Called at exit."""
    with _lock:
        if _owner == os.getpid():
            while _idle:
                _idle.pop().kill()
