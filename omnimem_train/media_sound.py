"""Sound tracks and sound files to mono samples, in order; runs in the decoding process, as `media_decode` does.

- decord: its `AudioReader` holds the whole track, resampled: 4 bytes x sampling_rate x seconds (0.35 GB for 90 minutes
  at 16 kHz; more than twice that while it loads). The last track is kept for the next call on the same file.
- pyav: forward, window by window.
- Files that end in .wav, .flac or .ogg are read by soundfile, block by block, whichever reader is chosen.

Sound that starts later than the picture is preceded by zeros, sound from before it is cut, and so is a tail of up to
`TAIL_S` seconds behind the last picture, because codecs pad it. FFmpeg converts rates and mixes channels for decord
and pyav, `Resampler` converts rates for soundfile. Two channels become (left + right) / sqrt 2, as FFmpeg has it: 3
dB more than their mean, so values above 1 can occur. More channels are mixed by FFmpeg's table, or by their mean
where soundfile reads them.
"""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from omnimem_train.media_decode import SOUND_FILES, Unreadable, open_av, tolerate
from omnimem_train.resampling import Resampler

TAIL_S = 0.1


class Sound:
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
        self._container = open_av(path)
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


def open_sound(path: Path, reader: str, rate: int) -> Sound | None:
    """The sound of a file, or None if it has none."""
    if path.suffix.lower() in SOUND_FILES:
        return SoundFileSound(path, rate)
    if reader == "pyav":
        with open_av(path) as container:
            if not container.streams.audio:
                return None
        return PyavSound(path, rate)
    return tolerate("Can't find audio stream", lambda: DecordSound(path, rate))


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
