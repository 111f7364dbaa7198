"""The decoding process: `python -m omnimem_train.media_worker` answers requests of `omnimem_train.media` over pipes.

A message is 12 bytes (length of the head, 4; of the body, 8; little endian), a JSON head, and a body of raw bytes.
Requests have no body. It imports neither torch nor transformers. Requests:

    open   path, reader, fps, window_s, sampling_rate, start_s, max_s, audio_path, picture, sound -> {"info": ...}
    next   -> {"start_s", "end_s", "last", "frames": shape or null, "samples": length or null}, body: frames, samples
    close  -> {}

An error is answered by {"error": text}. The process ends with its standard input, or when its parent has gone.
"""

from __future__ import annotations

import json
import math
import os
import struct
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from omnimem_train.media_decode import Picture, Unreadable, check_complete, open_picture
from omnimem_train.media_sound import TAIL_S, Sound, open_sound

HEADER = struct.Struct("<IQ")
LOUDEST = 1e6  # full scale is 1; whole numbers of 16 bits that were written as floats still pass
Answer = tuple[dict[str, Any], list[np.ndarray]]


class OpenFile:
    """A file being read window by window."""

    def __init__(self, request: dict[str, Any]) -> None:
        path, reader, rate = Path(request["path"]), request["reader"], request["sampling_rate"]
        self._fps, self._window_s, self._rate = request["fps"], request["window_s"], rate
        self._start_s, self._max_s = request["start_s"], request["max_s"]
        apart = request["audio_path"]
        for file in filter(None, [path, apart]):
            check_complete(Path(file))
        self._picture: Picture | None = None
        self._sound: Sound | None = None
        if request["picture"]:
            self._picture = open_picture(path, reader, self._fps, self._frame_at(self._start_s))
        if request["sound"]:
            self._sound = open_sound(Path(apart) if apart else path, reader, rate)
        if apart and request["sound"] and self._sound is None:
            raise Unreadable(f"there is no sound in {apart}")
        if self._picture is None and self._sound is None:
            raise Unreadable("it has no picture and no sound")
        self._align(bool(apart))
        self.info = self._info()
        self._windows = self._cut()

    def next(self) -> Answer:
        """The next window."""
        return next(self._windows)

    def close(self) -> None:
        """Let go of the decoders. decord goes on decoding what it was given as long as it lives, read or not; and what
        cuts windows refers back to this object, so it would live until a collection."""
        self._windows.close()
        self._picture = self._sound = None

    def _align(self, apart: bool) -> None:
        if self._sound is None:
            return
        # A separate file starts with the picture; a sound track has time stamps on the picture's clock.
        zero_s = self._sound.start_s if apart or self._picture is None else self._picture.zero_s
        self._late_s = self._sound.start_s - zero_s
        self._sound.align(zero_s)
        self._sound.skip(round(self._start_s * self._rate))

    def _info(self) -> dict[str, Any]:
        picture, sound = self._picture, self._sound
        ends = [picture.end_s] if picture else []
        if sound:
            end_s = sound.declared_s + self._late_s
            tail = bool(ends) and 0 < end_s - ends[0] <= TAIL_S
            ends.append(ends[0] if tail else end_s)
        return {
            "duration_s": max(ends),
            "has_video": picture is not None,
            "has_audio": sound is not None,
            "width": picture.width if picture else 0,
            "height": picture.height if picture else 0,
            "video_fps": picture.source_fps if picture else 0.0,
            "sampling_rate": sound.source_rate if sound else 0,
        }

    def _frame_at(self, time_s: float) -> int:
        """The first frame not before time_s."""
        return math.ceil(time_s * self._fps - 1e-6)

    def _cut(self) -> Generator[Answer, None, None]:
        """All windows, and at least one."""
        stop_s = math.inf if self._max_s is None else self._start_s + self._max_s
        number, last, cut = 0, False, False
        while not last:
            start_s = self._start_s + number * self._window_s
            end_s = min(self._start_s + (number + 1) * self._window_s, stop_s)
            frames = self._picture.take(self._frame_at(end_s)) if self._picture else None
            if self._picture and self._picture.ended and self._sound and not cut:
                self._sound.cut_tail(round(self._picture.end_s * self._rate) - round(start_s * self._rate))
                cut = True
            samples = self._sound.take(round(end_s * self._rate) - round(start_s * self._rate)) if self._sound else None
            over = (self._picture is None or self._picture.ended) and (self._sound is None or self._sound.ended)
            last = over or end_s >= stop_s - 1e-6
            parts = [part for part in (frames, samples) if part is not None]
            if last and number == 0 and self._start_s == 0 and not any(part.size for part in parts):
                raise Unreadable("it holds no frame and no sample")
            if samples is not None and not np.abs(samples).max(initial=0) < LOUDEST:  # NaN is not below it either
                raise Unreadable(f"the sound from {start_s:g} s on is damaged: not numbers, or beyond all loudness")
            head = {
                "start_s": start_s,
                "end_s": end_s,
                "last": last,
                "frames": None if frames is None else frames.shape,
                "samples": None if samples is None else len(samples),
            }
            yield head, parts
            number += 1


def send(pipe: BinaryIO, head: dict[str, Any], parts: list[np.ndarray]) -> None:
    """Write one message."""
    text = json.dumps(head).encode()
    pipe.write(HEADER.pack(len(text), sum(part.nbytes for part in parts)) + text)
    for part in parts:
        pipe.write(np.ascontiguousarray(part).data.cast("B") if part.size else b"")
    pipe.flush()


def receive(pipe: BinaryIO) -> dict[str, Any] | None:
    """Read one request; None at the end."""
    header = pipe.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    return json.loads(pipe.read(HEADER.unpack(header)[0]))


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more."""
    current: OpenFile | None = None
    while (request := receive(requests)) is not None:
        head: dict[str, Any] = {}
        parts: list[np.ndarray] = []
        try:
            if request["op"] == "next":
                assert current is not None
                head, parts = current.next()
            else:
                if current is not None:
                    current.close()
                current = None
                if request["op"] == "open":
                    current = OpenFile(request)
                    head = {"info": current.info}
        except Exception as error:  # whatever a decoder throws at a bad file becomes an answer
            current, head = None, {"error": f"{error}" or type(error).__name__}
        send(answers, head, parts)


def _leave_with_parent() -> None:
    """End this process when its parent has gone, even while a decoder hangs."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    """Serve on what was standard output; decoders that print are sent to standard error."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
