"""Files to frames and samples, in order: what the decoding process of `omnimem_train.media` runs.

Imports neither torch nor transformers, so the process starts fast. Two readers give the same windows (a test holds them
to equal numbers of frames, equal times, and near-equal values):

- decord: indexes all packets when it opens a file, and its `AudioReader` holds the whole sound track, resampled, in
  memory: 4 bytes x sampling_rate x seconds (0.35 GB for 90 minutes at 16 kHz; more than twice that while it loads).
  The last track is kept for the next call on the same file.
- pyav: decodes picture and sound forward, window by window; memory does not depend on the length.

Files that end in .wav, .flac or .ogg are read by soundfile, block by block, whichever reader is chosen.

Time: second 0 is the first picture (without a picture, the first sample). Frame k shows the picture at k / fps: the
last source frame whose time is below k / fps plus half the average distance of source frames, so for a constant rate
the nearest one (the earlier of two equally near). The last source frame lasts 1 / (average rate). Sound that starts
later than the picture is preceded by zeros, sound from before it is cut, and so is a tail of up to `TAIL_S` seconds
behind the last picture, because codecs pad it.

Sound: FFmpeg converts rates and mixes channels for decord and pyav, `Resampler` converts rates for soundfile. Two
channels become (left + right) / sqrt 2, as FFmpeg has it: 3 dB more than their mean, so values above 1 can occur.
More channels are mixed by FFmpeg's table, or by their mean where soundfile reads them.
"""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from omnimem_train.resampling import Resampler

READERS = ("decord", "pyav")
SOUND_FILES = (".wav", ".flac", ".ogg")
TAIL_S = 0.1
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
    """A picture read by decord."""

    def __init__(self, path: Path, fps: float, first_frame: int) -> None:
        import decord

        super().__init__(fps, first_frame)
        # fault_tol=0: without it decord hands out copies of other frames for those it cannot decode.
        self._reader = decord.VideoReader(str(path), num_threads=THREADS, fault_tol=0)
        times = self._reader.get_frame_timestamp(range(len(self._reader)))[:, 0].astype(np.float64)
        rate = float(self._reader.get_avg_fps())
        self.source_fps = rate if math.isfinite(rate) and rate > 0 else 1.0
        self.zero_s, self._times = float(times[0]), times - times[0]
        self.end_s = float(self._times[-1]) + 1 / self.source_fps
        self.height, self.width = self._reader[0].shape[:2]
        self._frames = max(1, math.ceil((self.end_s - 1e-3) * fps))

    def take(self, stop_frame: int) -> np.ndarray:
        wanted = range(self.next_frame, max(self.next_frame, min(stop_frame, self._frames)))
        self.next_frame = wanted.stop
        if not wanted:
            return self._empty()
        source = np.searchsorted(self._times, [self._limit(k) for k in wanted], side="right") - 1
        return self._reader.get_batch(np.maximum(source, 0).tolist()).asnumpy()

    @property
    def ended(self) -> bool:
        return self.next_frame >= self._frames


class PyavPicture(Picture):
    """A picture read by PyAV."""

    def __init__(self, path: Path, fps: float, first_frame: int) -> None:
        super().__init__(fps, first_frame)
        self._container = _open_av(path)
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


class Sound(ABC):
    """Mono samples at `rate`, handed out in order."""

    source_rate: int
    start_s: float = 0.0  # time stamp of the first sample
    declared_s: float = 0.0  # length as far as it is known, seconds

    def __init__(self, rate: int) -> None:
        self.rate = rate
        self._buffer = np.empty(0, np.float32)
        self._source: Iterator[np.ndarray] = iter(())
        self._finished = False

    def take(self, n: int) -> np.ndarray:
        """The next n samples, fewer at the end."""
        self._fill(n)
        taken, self._buffer = self._buffer[:n], self._buffer[n:]
        return taken

    @property
    def ended(self) -> bool:
        """No further sample."""
        self._fill(1)
        return len(self._buffer) == 0

    def align(self, zero_s: float) -> None:
        """Make `zero_s` the time of the first sample: zeros in front, or samples cut."""
        missing = round((self.start_s - zero_s) * self.rate)
        if missing > 0:
            self._buffer = np.concatenate([np.zeros(missing, np.float32), self._buffer])
        else:
            self.skip(-missing)

    def skip(self, n: int) -> None:
        """Drop n samples."""
        while n > 0 and not self.ended:
            n -= len(self.take(min(n, self.rate)))

    def cut_tail(self, n: int) -> None:
        """End after n more samples if no more than `TAIL_S` seconds would follow them."""
        n = max(0, n)
        self._fill(n + round(TAIL_S * self.rate) + 1)
        if len(self._buffer) <= n + round(TAIL_S * self.rate):
            self._buffer = self._buffer[:n]

    def _fill(self, n: int) -> None:
        parts, have = [self._buffer], len(self._buffer)
        while have < n and not self._finished:
            block = next(self._source, None)
            if block is None:
                self._finished = True
            else:
                parts.append(block)
                have += len(block)
        if len(parts) > 1:
            self._buffer = np.concatenate(parts)


_last_track: tuple[tuple[Any, ...], np.ndarray, int, float] | None = None  # key, samples, source rate, start_s


class DecordSound(Sound):
    """A sound track read by decord: all of it at once."""

    def __init__(self, path: Path, rate: int) -> None:
        global _last_track
        super().__init__(rate)
        status = path.stat()
        key = (path, status.st_mtime_ns, status.st_size, rate)
        if _last_track is None or _last_track[0] != key:
            _last_track = None  # frees the old track before the new one is loaded
            _last_track = (key, *self._load(path, rate))
        _, self._buffer, self.source_rate, self.start_s = _last_track
        self.declared_s = len(self._buffer) / rate

    @staticmethod
    def _load(path: Path, rate: int) -> tuple[np.ndarray, int, float]:
        import decord

        # Never mono=False: with more than one channel decord 0.6 then hands out memory it does not own.
        reader, log = _captured(lambda: decord.AudioReader(str(path), sample_rate=rate, mono=True))
        if "ERROR" in log:  # at a packet it cannot decode, decord says so in its log and goes on as if the track ended
            raise Unreadable("the sound track is damaged: " + log.strip().splitlines()[-1])
        samples = reader._array[0]
        start_s = reader.add_padding() / rate
        _, info = _captured(reader.get_info)
        words = info.split("original sample rate:")
        source_rate = int(words[1].split()[0]) if len(words) > 1 else 0
        if source_rate != rate and source_rate > 0:
            # Its resampler comes late by half its filter: 16 taps, more of them where FFmpeg's cutoff (0.97) is lower.
            ratio = rate / source_rate
            samples = samples[round(16 / min(0.97 * ratio, 1.0) * ratio) :]
        return samples, source_rate, start_s


class PyavSound(Sound):
    """A sound track read by PyAV, forward."""

    def __init__(self, path: Path, rate: int) -> None:
        super().__init__(rate)
        self._container = _open_av(path)
        self._stream = self._container.streams.audio[0]
        self.source_rate = self._stream.rate
        decoded = self._container.decode(self._stream)
        first = next(decoded, None)
        if first is not None:
            self.start_s = float(first.time or 0.0)
            self._source = self._samples(first, decoded)
        length, unit = self._stream.duration, self._stream.time_base
        end_s = ((self._container.start_time or 0) + (self._container.duration or 0)) / 1e6
        self.declared_s = float(length * unit) if length and unit else max(0.0, end_s - self.start_s)

    def _samples(self, first: Any, decoded: Iterator[Any]) -> Iterator[np.ndarray]:
        import av

        resampler = av.AudioResampler(format="fltp", layout="mono", rate=self.rate)
        for frame in itertools.chain([first], decoded, [None]):
            for part in resampler.resample(frame):
                yield part.to_ndarray()[0]


class SoundFileSound(Sound):
    """A .wav, .flac or .ogg file read by soundfile, block by block, resampled by `Resampler`."""

    def __init__(self, path: Path, rate: int) -> None:
        import soundfile

        super().__init__(rate)
        self._file = soundfile.SoundFile(str(path))
        self.source_rate = self._file.samplerate
        self.declared_s = self._file.frames / self.source_rate
        self._source = self._blocks()

    def _blocks(self) -> Iterator[np.ndarray]:
        resampler = Resampler(self.source_rate, self.rate)
        while len(block := self._file.read(self.source_rate, dtype="float32", always_2d=True)):
            gain = math.sqrt(2) if block.shape[1] == 2 else 1.0  # as FFmpeg mixes two channels
            yield resampler.push(block.mean(1, dtype=np.float32) * np.float32(gain))
        yield resampler.finish()


def open_picture(path: Path, reader: str, fps: float, first_frame: int) -> Picture | None:
    """The picture of a file, or None if it has none."""
    if path.suffix.lower() in SOUND_FILES:
        return None
    if reader == "pyav":
        with _open_av(path) as container:
            if _video_stream(container) is None:
                return None
        return PyavPicture(path, fps, first_frame)
    return _tolerate("cannot find video stream", lambda: DecordPicture(path, fps, first_frame))


def open_sound(path: Path, reader: str, rate: int) -> Sound | None:
    """The sound of a file, or None if it has none."""
    if path.suffix.lower() in SOUND_FILES:
        return SoundFileSound(path, rate)
    if reader == "pyav":
        with _open_av(path) as container:
            if not container.streams.audio:
                return None
        return PyavSound(path, rate)
    return _tolerate("Can't find audio stream", lambda: DecordSound(path, rate))


def _tolerate(absent: str, opener: Callable[[], Any]) -> Any:
    """What `opener` returns; None if decord says that the track is `absent`."""
    import decord

    try:
        return opener()
    except decord.DECORDError as error:
        if absent in str(error):
            return None
        raise


def _open_av(path: Path) -> Any:
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


def _captured(call: Callable[[], Any]) -> tuple[Any, str]:
    """The result of `call` and what native code wrote to stdout and stderr meanwhile."""
    with tempfile.TemporaryFile() as aside:
        saved = [os.dup(1), os.dup(2)]
        try:
            os.dup2(aside.fileno(), 1)
            os.dup2(aside.fileno(), 2)
            result = call()
        finally:
            for number, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, number)
                os.close(copy)
        aside.seek(0)
        return result, aside.read().decode(errors="replace")
