"""From a manifest to streams of windows, decoded ahead in the background, in an order that a run can resume.

Every clip is decoded by a process of its own (see `omnimem_train.media`), driven by a thread; a bounded queue holds
what is ahead, so neither a long clip nor a slow step fills the memory.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from omnimem_train.benchmarks import ChoiceItem, load_choices
from omnimem_train.broken_media import BrokenMedia, SkippedMedia
from omnimem_train.clip_order import balanced_order, epoch_order
from omnimem_train.encoder_cache import Entry
from omnimem_train.errors import UserError, nearest
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
    "load_choices",
    "load_manifest",
]


BALANCES = ("none", "length")
Lookup = Callable[[Sample], Entry | None]


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
        prefetch_windows: windows held ready for each of them, frames resized: 1.2 MB for 2 s at 100,352 pixels. So that
            clips after the next one are decoded as a whole meanwhile, as many as they have windows. decord decodes on
            into its own memory while a long clip waits for room (source frames as they are); pyav waits.
        encode_windows: windows encoded at once, unless something is asked between them. More have less to launch.
        encode_ahead: clips encoded while the ones before them are trained on, each kept on the device (7 KB a token
            of the 7B model); `train.accumulation` are needed at once. None: 1 on a GPU, else 0. Training only.
        cache: folder for what encoders gave, so that an epoch after the first neither decodes nor encodes (see
            `omnimem_train.encoder_cache`); None for none. Training only.
        cache_gib: its largest size; the clips used longest ago are removed.
        balance: "none": clips are shuffled. "length": and dealt out so that those that the ranks run at the same time
            are of similar length (see `omnimem_train.clip_order`). Training only.
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
    encode_windows: int = 1
    encode_ahead: int | None = None
    cache: Path | None = None
    cache_gib: float = 100.0
    balance: str = "none"

    def __post_init__(self) -> None:
        if self.reader not in READERS:
            raise UserError(f"data.reader={self.reader!r} is not known", remedy=f"one of {', '.join(READERS)}")
        if self.balance not in BALANCES:
            raise UserError(
                f"data.balance={self.balance!r} is not known{nearest(self.balance, BALANCES)}",
                remedy=f"one of {', '.join(BALANCES)}",
            )
        leasts = {"max_broken": 0, "workers": 0, "prefetch_windows": 1, "encode_windows": 1, "encode_ahead": 0}
        for name, least in leasts.items():
            if (getattr(self, name) or 0) < least and getattr(self, name) is not None:
                raise UserError(f"data.{name}={getattr(self, name)} must be {least} or more")
        for name in ("fps", "time_limit_s", "max_duration_s", "cache_gib"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"data.{name}={value} must be above 0, and finite")


class StreamDataset(Dataset[Sample]):
    """The samples of a manifest, and how to open them. Map-style; holds no media.

    Args:
        samples: from `load_manifest`.
        config: how they are read.
        window_s: seconds of a window (`StreamingModel.window_s`).
        sampling_rate: of the sound (Hz).
        shrink: resizes frames as soon as they are decoded (`StreamingModel.shrink`).
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        config: DataConfig,
        window_s: float,
        sampling_rate: int = 16000,
        shrink: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        if not samples:
            raise UserError("there are no samples to train on", remedy="check data.manifest")
        self.samples, self.config, self.window_s, self.sampling_rate = samples, config, window_s, sampling_rate
        self.shrink = shrink

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

    Args:
        ahead: windows held ready; 0 decodes when asked.
        lookup: tells what is cached of a clip; such a clip has an `entry`, and is not decoded.

    Attributes:
        sample: what is asked about it.
        waited_s: seconds spent waiting for decoding so far.
    """

    def __init__(
        self,
        dataset: StreamDataset,
        sample: Sample,
        broken: BrokenMedia,
        ahead: int,
        lookup: Lookup | None = None,
    ) -> None:
        self.sample, self.waited_s = sample, 0.0
        self._dataset, self._broken, self._lookup = dataset, broken, lookup
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=max(1, ahead) + 1)
        self._stop = threading.Event()
        self._first: MediaInfo | Entry | None = None
        self._failure: MediaError | None = None
        self._source = self._produce() if ahead == 0 else self._from_thread()

    @property
    def entry(self) -> Entry | None:
        """What is cached of it, if there is something: then it has no info and no windows. Raises: as `info`."""
        if self._first is None:
            self._first = self._next()
        return self._first if isinstance(self._first, Entry) else None

    @property
    def info(self) -> MediaInfo:
        """What is known of the file. Raises: MediaError, or SkippedMedia within the limit, if it is broken."""
        assert self.entry is None, "a cached clip is not decoded"
        assert isinstance(self._first, MediaInfo)
        return self._first

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

    def _produce(self) -> Iterator[MediaInfo | MediaWindow | Entry]:
        """The info, then the windows; or the cached entry alone."""
        if self._lookup is not None and (entry := self._lookup(self.sample)) is not None:
            yield entry
            return
        shrink = self._dataset.shrink
        with self._dataset.open(self.sample) as reader:
            yield reader.info
            for window in reader:
                if shrink is not None and window.frames is not None and len(window.frames):
                    window = replace(window, frames=shrink(window.frames), shrunk=True)
                yield window

    def _from_thread(self) -> Iterator[MediaInfo | MediaWindow | Entry]:
        """The same, produced by a thread that starts now."""
        thread = threading.Thread(target=self._fill, daemon=True, name=f"decode {self.sample.id}")
        thread.start()
        return self._drain()

    def _drain(self) -> Iterator[MediaInfo | MediaWindow | Entry]:
        while True:
            if self._stop.is_set():
                raise RuntimeError("this clip was closed: the loader has gone on to the next one")
            try:
                found = self._queue.get(timeout=0.5)
            except queue.Empty:
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

    def _put(self, found: MediaInfo | MediaWindow | Entry | Exception) -> bool:
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
        lengths: of all samples: clips that ranks run at the same time are of similar length. None: shuffled.
        lookup: see `LoadedClip`.

    Attributes:
        position: clips handed out so far by this rank, over all epochs: the state to save.
        waited_s: seconds spent waiting for decoding, over all clips handed out.
    """

    def __init__(
        self,
        dataset: StreamDataset,
        seed: int = 0,
        world: int = 1,
        rank: int = 0,
        broken: BrokenMedia | None = None,
        *,
        lengths: Sequence[float] | None = None,
        lookup: Lookup | None = None,
    ) -> None:
        self.dataset, self.position, self.lengths = dataset, 0, lengths
        self.broken = BrokenMedia(dataset.config.max_broken) if broken is None else broken
        self.seed, self.world, self.rank, self._lookup = seed, world, rank, lookup
        self._handed_out_s = 0.0
        self._current: LoadedClip | None = None
        self._ahead: deque[LoadedClip] = deque()
        self._epoch, self._order = -1, list[int]()

    @property
    def clips_per_epoch(self) -> int:
        """Clips of an epoch for this rank."""
        return -(-len(self.dataset) // self.world)

    @property
    def waited_s(self) -> float:
        """Seconds spent waiting for decoding."""
        return self._handed_out_s + (self._current.waited_s if self._current else 0.0)

    def sample_at(self, position: int) -> Sample:
        """The sample that is handed out as number `position`."""
        epoch, index = divmod(position, self.clips_per_epoch)
        if epoch != self._epoch:
            where = (self.seed, epoch, self.world, self.rank)
            lengths = self.lengths
            self._order = epoch_order(len(self.dataset), *where) if lengths is None else balanced_order(lengths, *where)
            self._epoch = epoch
        return self.dataset[self._order[index]]

    def load(self, sample: Sample) -> LoadedClip:
        """A clip to be decoded when asked, whatever is cached of it."""
        return LoadedClip(self.dataset, sample, self.broken, 0)

    def interrupt(self) -> None:
        """End the decoding of all clips that are open. Safe from another thread than the one that iterates, which then
        gets a RuntimeError where it would have waited."""
        for clip in list(self._ahead):
            clip.close()

    def clips(self, start: int = 0, stop: int | None = None) -> Iterator[LoadedClip]:
        """Clips from number `start` on, without end or up to `stop`. A clip is closed when the next one is asked for.

        Closing the iterator stops the decoding of what is ahead. `start` costs nothing: no clip before it is opened.

        Raises: UserError if every clip turned out to be broken.
        """
        config, ahead = self.dataset.config, self._ahead
        self.position = following = start
        depth = config.prefetch_windows if config.workers else 0
        try:
            while stop is None or self.position < stop:
                while len(ahead) < max(1, config.workers) and (stop is None or following < stop):
                    ahead.append(LoadedClip(self.dataset, self.sample_at(following), self.broken, depth, self._lookup))
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
            self.interrupt()
            ahead.clear()
