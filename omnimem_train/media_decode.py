"""Files to frames, in order: what the decoding process of `omnimem_train.media` runs. (Sound: `media_sound`.)

Imports neither torch nor transformers, so the process starts fast. Two readers give the same windows (a test holds them
to equal numbers of frames, equal times, and near-equal values):

- decord: indexes all packets when it opens a file, then decodes every frame of the picture. Its `AudioReader` holds the
  whole sound track in memory.
- pyav: decodes picture and sound forward, window by window; memory does not depend on the length. It also notices
  damage inside a frame, which decord shows as FFmpeg has patched it.

Time: second 0 is the first picture (without a picture, the first sample). Frame k shows the picture at k / fps: the
last source frame whose time is below k / fps plus half the average distance of source frames, so for a constant rate
the nearest one (the earlier of two equally near). The last source frame lasts 1 / (average rate). Files that do not
stamp their frames are taken to show them at the average rate.
"""

from __future__ import annotations

import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

READERS = ("decord", "pyav")
SOUND_FILES = (".wav", ".flac", ".ogg")
THREADS = 2


class Unreadable(Exception):
    """A file, or a part of it, cannot be decoded."""


class Picture(ABC):
    """The frames of a file at `fps` a second, handed out in order from frame `next_frame` on."""

    width: int
    height: int
    source_fps: float
    zero_s: float  # time stamp of the first source frame
    end_s: float  # after zero_s; an estimate from the file's header until `ended`

    def __init__(self, fps: float, first_frame: int) -> None:
        self.fps, self.next_frame = fps, first_frame

    @abstractmethod
    def take(self, stop_frame: int) -> np.ndarray:
        """Frames next_frame to stop_frame (or the end): (n, height, width, 3) uint8."""

    @property
    @abstractmethod
    def ended(self) -> bool:
        """No further frame."""

    def _limit(self, frame: int) -> float:
        """The latest source time (from zero_s) that may serve as `frame`."""
        half = 0.5 / self.source_fps
        return frame / self.fps + half - min(1e-3, half / 4)

    def _empty(self) -> np.ndarray:
        return np.empty((0, self.height, self.width, 3), np.uint8)


class DecordPicture(Picture):
    """A picture read by decord, every frame of it in turn.

    decord's own ways to skip frames (`get_batch`, `skip_frames`, seeking) return wrong frames, without an error, where
    frames refer across a key frame: H.265 as it is usually encoded, H.264 with open groups of pictures. Decoding all
    frames costs about 1.8 times as much and is right.
    """

    def __init__(self, path: Path, fps: float, first_frame: int) -> None:
        import decord

        super().__init__(fps, first_frame)
        if _is_transport_stream(path):
            raise Unreadable("decord loses the first frames of MPEG transport streams; the pyav reader reads them")
        # Without fault_tol decord hands out copies of other frames for those it cannot decode; 0 would mean without.
        self._reader = decord.VideoReader(str(path), num_threads=THREADS, fault_tol="0.000001")
        rate = float(self._reader.get_avg_fps())
        self.source_fps = rate if math.isfinite(rate) and rate > 0 else 1.0
        times = self._reader.get_frame_timestamp(range(len(self._reader)))[:, 0].astype(np.float64)
        if np.diff(times).min(initial=0) < 0 or abs(times[0]) > 1e6:  # some files (AVI, say) do not stamp every frame
            times = np.arange(len(times)) / self.source_fps
        self.zero_s, self._times = float(times[0]), times - times[0]
        self.end_s = float(self._times[-1]) + 1 / self.source_fps
        self._frames = max(1, math.ceil((self.end_s - 1e-3) * fps))
        self._number, self._shown = 0, self._reader.next().asnumpy()
        self.height, self.width, channels = self._shown.shape
        if channels != 3:
            raise Unreadable(f"decord cannot hand out pictures {self.width} pixels wide; the pyav reader can")

    def take(self, stop_frame: int) -> np.ndarray:
        wanted = range(self.next_frame, max(self.next_frame, min(stop_frame, self._frames)))
        self.next_frame = wanted.stop
        if not wanted:
            return self._empty()
        sources = np.searchsorted(self._times, [self._limit(k) for k in wanted], side="right") - 1
        return np.stack([self._source_frame(max(0, int(number))) for number in sources])

    @property
    def ended(self) -> bool:
        return self.next_frame >= self._frames

    def _source_frame(self, number: int) -> np.ndarray:
        """Source frame `number`, not before the last one asked for."""
        while self._number < number:
            frame = self._reader.next()
            self._number += 1
            if self._number == number:
                self._shown = frame.asnumpy()
        return self._shown


class PyavPicture(Picture):
    """A picture read by PyAV."""

    def __init__(self, path: Path, fps: float, first_frame: int) -> None:
        super().__init__(fps, first_frame)
        self._container = open_av(path)
        self._stream = _video_stream(self._container)
        self._stream.thread_type, self._stream.codec_context.thread_count = "AUTO", THREADS
        rate = self._stream.average_rate
        self.source_fps = float(rate) if rate else 1.0
        self._decoded = self._decode()
        self._ahead = next(self._decoded, None)
        if self._ahead is None:
            raise Unreadable(f"no frame of the picture in {path} can be decoded")
        turned = self._ahead[1].rotation % 180 != 0
        self.width, self.height = self._ahead[1].width, self._ahead[1].height
        if turned:
            self.width, self.height = self.height, self.width
        self.zero_s = self._ahead[0]
        self.end_s = self._declared_s or self._ahead[0]
        self._picks = self._pick()
        self._next = next(self._picks, None)

    def take(self, stop_frame: int) -> np.ndarray:
        taken = []
        while self.next_frame < stop_frame and self._next is not None:
            taken.append(_rgb(self._next))
            self._next = next(self._picks, None)
            self.next_frame += 1
        return np.stack(taken) if taken else self._empty()

    @property
    def ended(self) -> bool:
        return self._next is None

    @property
    def _declared_s(self) -> float:
        """Length the header states, or 0."""
        stream = self._stream
        return float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0

    def _decode(self) -> Iterator[tuple[float, Any]]:
        """(time, source frame), in order of presentation."""
        for number, frame in enumerate(self._container.decode(self._stream)):
            if frame.is_corrupt:
                raise Unreadable(f"frame {number} of the picture is damaged")
            yield (number / self.source_fps if frame.time is None else float(frame.time)), frame

    def _pick(self) -> Iterator[Any]:
        """The source frame of frame next_frame, next_frame + 1, ... to the end."""
        assert self._ahead is not None
        shown, k, time_s = self._ahead[1], self.next_frame, 0.0
        for stamp, frame in self._decoded:
            time_s = stamp - self.zero_s
            while time_s > self._limit(k):
                yield shown
                k += 1
            shown = frame
        self.end_s = time_s + 1 / self.source_fps
        if self._declared_s - self.end_s > max(1.0, 3 / self.source_fps):
            raise Unreadable(f"the picture stops after {self.end_s:.2f} s of {self._declared_s:.2f} s")
        while k < max(1, math.ceil((self.end_s - 1e-3) * self.fps)):
            yield shown
            k += 1


def open_picture(path: Path, reader: str, fps: float, first_frame: int) -> Picture | None:
    """The picture of a file, or None if it has none."""
    if path.suffix.lower() in SOUND_FILES:
        return None
    if reader == "pyav":
        with open_av(path) as container:
            if _video_stream(container) is None:
                return None
        return PyavPicture(path, fps, first_frame)
    return tolerate("cannot find video stream", lambda: DecordPicture(path, fps, first_frame))


def check_complete(path: Path) -> None:
    """Raises Unreadable if an mp4, mov or m4a was cut off: decoders may take that for its end."""
    size, at = path.stat().st_size, 0
    with path.open("rb") as file:
        while at + 16 <= size:
            file.seek(at)
            length, kind, long_length = struct.unpack(">I4sQ", file.read(16))
            length = long_length if length == 1 else length
            if length < 8 or (at == 0 and kind != b"ftyp"):
                return  # the last box goes to the end of the file, or this is no such file
            at += length
            if at > size and kind in (b"mdat", b"moov", b"moof"):
                raise Unreadable(f"the file is cut off: {at - size:,} bytes are missing")


def tolerate(absent: str, opener: Callable[[], Any]) -> Any:
    """What `opener` returns; None if decord says that the track is `absent`."""
    import decord

    try:
        return opener()
    except decord.DECORDError as error:
        if absent in str(error):
            return None
        raise


def open_av(path: Path) -> Any:
    import av

    return av.open(str(path))


def _video_stream(container: Any) -> Any:
    """The first video stream that is no cover picture, or None."""
    from av.stream import Disposition

    real = (s for s in container.streams.video if not s.disposition & Disposition.attached_pic)
    return next(real, None)


def _rgb(frame: Any) -> np.ndarray:
    """A source frame as (height, width, 3) uint8, turned upright."""
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90 % 4)


def _is_transport_stream(path: Path) -> bool:
    """Whether sync bytes stand where packets of 188 (or, with a stamp of 4 before each, 192) bytes begin."""
    with path.open("rb") as file:
        head = file.read(600)
    return head[:377:188] == b"GGG" or head[4:389:192] == b"GGG"
