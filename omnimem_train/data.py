"""From a manifest to streams of windows, decoded ahead in the background, in an order that a run can resume.

Every clip is decoded by a process of its own (see `omnimem_train.media`), driven by a thread; a bounded queue holds
what is ahead, so neither a long clip nor a slow step fills the memory.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from omnimem_train.benchmarks import ChoiceItem, load_choices
from omnimem_train.errors import UserError
from omnimem_train.manifest import Sample, load_manifest
from omnimem_train.media import MediaError, MediaReader, read_windows
from omnimem_train.media_decode import READERS
from omnimem_train.models.interface import MediaInfo, MediaWindow

__all__ = [
    "BrokenMedia",
    "ChoiceItem",
    "DataConfig",
    "LoadedClip",
    "Sample",
    "SkippedMedia",
    "StreamDataset",
    "StreamLoader",
    "epoch_order",
    "load_choices",
    "load_manifest",
]


@dataclass(frozen=True)
class DataConfig:
    """What is watched, and how.

    Attributes:
        manifest: the training manifest (see `omnimem_train.manifest`).
        media_root: where its relative paths start; its own folder without it.
        fps: frames a second.
        reader: "decord" or "pyav".
        time_limit_s: for opening a file and for each window of it.
        max_broken: so many files may turn out broken in a run (on each rank); they are skipped, counted and listed. One
            more stops the run.
        use_audio: False leaves out all sound.
        max_duration_s: watch only the first so many seconds of each clip; a turn timed later is an error.
        workers: clips decoded at the same time, the current one included; 0 decodes in step with training.
        prefetch_windows: windows held ready for each of them.
    """

    manifest: Path | None = None
    media_root: Path | None = None
    fps: float = 2.0
    reader: str = "decord"
    time_limit_s: float = 60.0
    max_broken: int = 0
    use_audio: bool = True
    max_duration_s: float | None = None
    workers: int = 2
    prefetch_windows: int = 16

    def __post_init__(self) -> None:
        if self.reader not in READERS:
            raise UserError(f"data.reader={self.reader!r} is not known", remedy=f"one of {', '.join(READERS)}")
        for name, least in (("max_broken", 0), ("workers", 0), ("prefetch_windows", 1)):
            if getattr(self, name) < least:
                raise UserError(f"data.{name}={getattr(self, name)} must be {least} or more")
        for name in ("fps", "time_limit_s", "max_duration_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"data.{name}={value} must be above 0, and finite")


class SkippedMedia(MediaError):
    """A broken file within the declared limit: skip this clip and go on."""


class BrokenMedia:
    """Counts broken files against a limit and lists them in a file, one JSON object a line.

    A file that is met again in a later epoch, or after resuming with the same list, counts once.

    Args:
        limit: `DataConfig.max_broken`.
        listing: where to list them; None for no list. With several ranks, one each.
    """

    def __init__(self, limit: int, listing: Path | None = None) -> None:
        self._limit, self._listing = limit, listing
        self._ids: set[str] = set()
        if listing is not None and listing.exists():
            try:
                self._ids = {json.loads(line)["id"] for line in listing.read_text().splitlines()}
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{listing} is damaged", repr(error), "delete it: broken files are then counted anew"
                ) from error

    def __len__(self) -> int:
        return len(self._ids)

    def note(self, sample: Sample, error: MediaError) -> MediaError:
        """The error to raise for a broken clip: SkippedMedia within the limit, beyond it a MediaError that ends all."""
        if sample.id not in self._ids:
            self._ids.add(sample.id)
            if self._listing is not None:
                path = str(error.path or sample.path)
                line = {"id": sample.id, "path": path, "what": error.what, "cause": error.cause}
                self._listing.parent.mkdir(parents=True, exist_ok=True)
                with self._listing.open("a") as out:
                    out.write(json.dumps(line) + "\n")
        count = f"broken file {len(self._ids)}, {self._limit} allowed"
        if len(self._ids) <= self._limit:
            return SkippedMedia(error.what, f"{error.cause} ({count})", error.remedy, error.path)
        remedy = f"{error.remedy}; or allow some broken files: data.max_broken={len(self._ids)}"
        return MediaError(error.what, f"{error.cause} ({count})", remedy, error.path)


def epoch_order(n: int, seed: int, epoch: int, world: int = 1, rank: int = 0) -> list[int]:
    """Indices that `rank` of `world` visits in `epoch`: a shuffle of all n by (seed, epoch), dealt out in turn.

    Every rank gets ceil(n / world). Where n is no multiple of world, the shuffle starts again from its beginning: up to
    world - 1 samples are seen twice in the epoch, none is left out. (`epoch_repeats` says how many.)
    """
    assert n > 0
    assert 0 <= rank < world
    order = np.random.default_rng((seed, epoch)).permutation(n)
    return [int(i) for i in np.resize(order, n + epoch_repeats(n, world))[rank::world]]


def epoch_repeats(n: int, world: int) -> int:
    """How many samples an epoch shows twice so that all ranks have the same number."""
    return -n % world


class StreamDataset(Dataset[Sample]):
    """The samples of a manifest, and how to open them. Map-style; holds no media.

    Args:
        samples: from `load_manifest`.
        config: how they are read.
        window_s: seconds of a window (`StreamingModel.window_s`).
        sampling_rate: of the sound (Hz).
    """

    def __init__(
        self, samples: Sequence[Sample], config: DataConfig, window_s: float, sampling_rate: int = 16000
    ) -> None:
        if not samples:
            raise UserError("there are no samples to train on", remedy="check data.manifest")
        self.samples, self.config, self.window_s, self.sampling_rate = samples, config, window_s, sampling_rate

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def open(self, sample: Sample) -> MediaReader:
        """Start reading a sample; the reader has `info` and gives the windows.

        Raises: MediaError if the file cannot be read, has no sound where that is all there is to perceive, or ends
            before a turn is asked.
        """
        c = self.config
        hear = c.use_audio and sample.use_audio
        if sample.media is None and not hear:
            what = f"{sample.path}: nothing to perceive (sample {sample.id!r})"
            raise MediaError(what, "it has sound alone, and data.use_audio is off", "take it off the list", sample.path)
        reader = read_windows(
            sample.path,
            fps=c.fps,
            window_s=self.window_s,
            sampling_rate=self.sampling_rate,
            reader=c.reader,
            time_limit_s=c.time_limit_s,
            max_s=c.max_duration_s,
            audio_path=sample.audio if sample.media and hear else None,
            picture=sample.media is not None,
            sound=hear,
        )
        end_s = min(reader.info.duration_s, c.max_duration_s or float("inf"))
        late = [turn.time_s for turn in sample.turns if turn.time_s is not None and turn.time_s > end_s + 0.5]
        if late:
            reader.close()
            raise MediaError(
                f"{sample.path}: a turn is asked at {late[0]:g} s",
                f"only {end_s:g} s of the clip are watched (sample {sample.id!r})",
                "correct time_s in the manifest, or raise data.max_duration_s",
                sample.path,
            )
        return reader


class LoadedClip:
    """A clip being decoded in the background: its sample, `info`, and its windows by iterating (once).

    Attributes:
        sample: what is asked about it.
        waited_s: seconds spent waiting for decoding so far.
    """

    def __init__(self, dataset: StreamDataset, sample: Sample, broken: BrokenMedia, ahead: int) -> None:
        self.sample, self.waited_s = sample, 0.0
        self._dataset, self._broken = dataset, broken
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=max(1, ahead) + 1)
        self._stop = threading.Event()
        self._info: MediaInfo | None = None
        self._failure: MediaError | None = None
        self._source = self._produce() if ahead == 0 else self._from_thread()

    @property
    def info(self) -> MediaInfo:
        """What is known of the file. Raises: MediaError, or SkippedMedia within the limit, if it is broken."""
        if self._info is None:
            self._info = self._next()
        assert self._info is not None
        return self._info

    def __iter__(self) -> Iterator[MediaWindow]:
        """The windows. Raises: MediaError, or SkippedMedia within the limit, where decoding fails."""
        _ = self.info
        while True:
            window = self._next()
            yield window
            if window.last:
                return

    def close(self) -> None:
        """Stop decoding. Safe to call twice."""
        self._stop.set()

    def _next(self) -> Any:
        begun = time.perf_counter()
        try:
            if self._failure is None:
                found = next(self._source, None)
                assert found is not None, "the windows of a clip can be read once"
                return found
        except MediaError as error:
            self._failure = self._broken.note(self.sample, error)
        finally:
            self.waited_s += time.perf_counter() - begun
        raise self._failure

    def _produce(self) -> Iterator[MediaInfo | MediaWindow]:
        """The info, then the windows."""
        with self._dataset.open(self.sample) as reader:
            yield reader.info
            yield from reader

    def _from_thread(self) -> Iterator[MediaInfo | MediaWindow]:
        """The same, produced by a thread that starts now."""
        thread = threading.Thread(target=self._fill, daemon=True, name=f"decode {self.sample.id}")
        thread.start()
        return self._drain()

    def _drain(self) -> Iterator[MediaInfo | MediaWindow]:
        while True:
            try:
                found = self._queue.get(timeout=0.5)
            except queue.Empty:
                if self._stop.is_set():
                    raise RuntimeError("this clip was closed: the loader has gone on to the next one") from None
                continue
            if isinstance(found, Exception):
                raise found
            yield found

    def _fill(self) -> None:
        try:
            for found in self._produce():
                if not self._put(found):
                    return
        except Exception as error:  # handed to the thread that reads the windows
            self._put(error)

    def _put(self, found: MediaInfo | MediaWindow | Exception) -> bool:
        """Whether there was room for it before `close`."""
        while not self._stop.is_set():
            try:
                self._queue.put(found, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


class StreamLoader:
    """Clips in the order of training, epoch after epoch, decoded ahead.

    Args:
        dataset: what to load.
        seed: of the order.
        world, rank: number of processes, and which this is; all get the same number of clips.
        broken: counts broken files; by default against `DataConfig.max_broken`, without a list.

    Attributes:
        position: clips handed out so far by this rank, over all epochs: the state to save.
        waited_s: seconds spent waiting for decoding, over all clips handed out.
    """

    def __init__(
        self, dataset: StreamDataset, seed: int = 0, world: int = 1, rank: int = 0, broken: BrokenMedia | None = None
    ) -> None:
        self.dataset, self.position = dataset, 0
        self.broken = BrokenMedia(dataset.config.max_broken) if broken is None else broken
        self._seed, self._world, self._rank = seed, world, rank
        self._handed_out_s = 0.0
        self._current: LoadedClip | None = None

    @property
    def clips_per_epoch(self) -> int:
        """Clips of an epoch for this rank."""
        return -(-len(self.dataset) // self._world)

    @property
    def waited_s(self) -> float:
        """Seconds spent waiting for decoding."""
        return self._handed_out_s + (self._current.waited_s if self._current else 0.0)

    def sample_at(self, position: int) -> Sample:
        """The sample that is handed out as number `position`."""
        epoch, index = divmod(position, self.clips_per_epoch)
        return self.dataset[epoch_order(len(self.dataset), self._seed, epoch, self._world, self._rank)[index]]

    def clips(self, start: int = 0, stop: int | None = None) -> Iterator[LoadedClip]:
        """Clips from number `start` on, without end or up to `stop`. A clip is closed when the next one is asked for.

        Closing the iterator stops the decoding of what is ahead. `start` costs nothing: no clip before it is opened.

        Raises: UserError if every clip turned out to be broken.
        """
        config, ahead = self.dataset.config, deque[LoadedClip]()
        self.position = following = start
        depth = config.prefetch_windows if config.workers else 0
        try:
            while stop is None or self.position < stop:
                while len(ahead) < max(1, config.workers) and (stop is None or following < stop):
                    ahead.append(LoadedClip(self.dataset, self.sample_at(following), self.broken, depth))
                    following += 1
                self._current = ahead[0]
                self.position += 1
                yield self._current
                self._handed_out_s, self._current = self.waited_s, None
                ahead.popleft().close()
                if len(self.dataset) <= len(self.broken) <= config.max_broken:  # all may be skipped: never ends
                    raise UserError(
                        f"all {len(self.dataset)} clips are broken",
                        cause="there is nothing to train on",
                        remedy="see what is wrong with the first of them: data.max_broken=0",
                    )
        finally:
            for clip in ahead:
                clip.close()
