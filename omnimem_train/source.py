"""Where training gets its streams from: the files of a manifest, or whatever else makes encoded streams."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from omnimem_train.clip_lengths import clip_lengths
from omnimem_train.clip_order import expected_empty_share
from omnimem_train.data import (
    BrokenMedia,
    DataConfig,
    LoadedClip,
    Sample,
    SkippedMedia,
    StreamDataset,
    StreamLoader,
)
from omnimem_train.encoder_cache import Damaged, EncoderCache, tensors_of
from omnimem_train.errors import UserError
from omnimem_train.models.interface import (
    MediaEncoder,
    MediaInfo,
    MediaWindow,
    RenderedTurn,
    StreamingModel,
)
from omnimem_train.replay import CacheLookup, RecordingEncoder, ReplayedEncoder, grouped, info_of
from omnimem_train.run_ahead import run_ahead
from omnimem_train.step import EncodedStream, TimedTurn, encode_stream


class StreamSource(Protocol):
    """An endless, repeatable sequence of encoded streams (or of batches of streams side by side) for one rank.

    Attributes:
        position: how many were handed out, the state to save.
        waited_s: seconds that training spent waiting for input so far.
    """

    position: int
    waited_s: float

    def __len__(self) -> int:
        """Samples of an epoch, over all ranks."""

    def streams(self, start: int) -> Generator[EncodedStream, None, None]:
        """Streams from number `start` on; closing the generator ends what runs ahead."""

    def prefixes(self) -> Iterable[str]:
        """The texts that may stand before the media, each once."""

    def check(self) -> None:
        """Raises UserError if a turn cannot be rendered."""

    def example(self) -> tuple[str, RenderedTurn]:
        """A question and its turn, to be shown."""

    def facts(self, chunk_tokens: int) -> list[tuple[str, object, str]]:
        """What a run reports about its data: name, value, how it follows."""


MakeSource = Callable[[StreamingModel], StreamSource]


class ClipSource:
    """The clips of a manifest: decoded ahead, encoded one by one in step with training or ahead of it, or read from a
    cache.

    Args:
        loader: of this rank. With a cache its `lookup` is `cached`.
        model: encodes and renders.
        options: of the model's encoder side.
        cached: the cache that new clips go to.
        offload: as in `omnimem_train.step.encode_stream`.

    Attributes:
        position: clips handed out, those passed over included. What is encoded ahead is not counted, so a run that
            resumes here goes on with the next clip.
        waited_s: seconds spent waiting for decoding and encoding, or for a cache.
    """

    def __init__(
        self,
        loader: StreamLoader,
        model: StreamingModel,
        options: dict[str, Any],
        cached: CacheLookup | None = None,
        offload: str = "none",
    ) -> None:
        self.loader, self.model, self.options, self.cached, self.offload = loader, model, options, cached, offload
        self.position, self.waited_s = 0, 0.0

    @property
    def ahead(self) -> int:
        """Clips encoded ahead: as the configuration says, by default 1 on a GPU."""
        asked = self.loader.dataset.config.encode_ahead
        return int(self.model.device.type == "cuda") if asked is None else asked

    def __len__(self) -> int:
        return len(self.loader.dataset)

    def streams(self, start: int) -> Generator[EncodedStream, None, None]:
        """Encoded clips from number `start` on. A broken file within the declared limit is passed over; it is counted
        and listed by the loader."""
        device, depth = self.model.device, self.ahead

        def encoded() -> Generator[tuple[EncodedStream, int], None, None]:
            return self._encoded(start)

        with closing(run_ahead(encoded, depth, device, self.loader.interrupt) if depth else encoded()) as numbered:
            while True:
                begun = time.perf_counter()
                stream, self.position = next(numbered)
                if device.type == "cuda":
                    torch.cuda.current_stream(device).synchronize()
                    if depth:
                        hand_over(stream, device)
                self.waited_s += time.perf_counter() - begun
                yield stream
                del stream

    def _encoded(self, start: int) -> Generator[tuple[EncodedStream, int], None, None]:
        """Encoded clips, and the position after each."""
        for clip in self.loader.clips(start):
            try:
                yield self._stream(clip), self.loader.position
            except SkippedMedia as error:
                print(f"skipped: {error}", flush=True)

    def _stream(self, clip: LoadedClip) -> EncodedStream:
        """A clip from the cache, or encoded and put there."""
        if (entry := clip.entry) is not None:
            assert self.cached is not None
            try:
                encoder = ReplayedEncoder(
                    entry, self.model, self._opener(clip.sample, info_of(entry, clip.sample.path))
                )
                return self._placed(encoder, encoder.windows(), clip.sample)
            except Damaged as damage:
                self.cached.cache.drop(entry.folder, damage)
            clip = self.loader.load(clip.sample)
        config, opened = self.loader.dataset.config, self._opener(clip.sample, clip.info)
        times = [turn.time_s for turn in clip.sample.turns if turn.time_s is not None]
        windows = grouped(iter(clip), times, config.encode_windows)
        key = None if self.cached is None else self.cached.key(clip.sample)
        if self.cached is None or key is None:
            return self._placed(opened(), windows, clip.sample)
        writer = self.cached.cache.writer(key)
        try:
            recording = RecordingEncoder(opened(), opened, writer)
            stream = self._placed(recording, windows, clip.sample)
            recording.publish(clip.info)
            return stream
        except BaseException:
            writer.abort()
            raise

    def _opener(self, sample: Sample, info: MediaInfo) -> Callable[[], MediaEncoder]:
        fps = self.loader.dataset.config.fps
        return lambda: self.model.open(info, fps, prefix=sample.prefix, **self.options)

    def _placed(self, encoder: MediaEncoder, windows: Iterable[MediaWindow], sample: Sample) -> EncodedStream:
        turns = [TimedTurn(self.model.render(turn), turn.time_s) for turn in sample.turns]
        return encode_stream(encoder, windows, turns, self.model.device, self.offload)

    def facts(self, chunk_tokens: int) -> list[tuple[str, object, str]]:
        """What a run reports about its data: name, value, how it follows."""
        loader, config = self.loader, self.loader.dataset.config
        found: list[tuple[str, object, str]] = [("clips encoded ahead", self.ahead, "data.encode_ahead")]
        if self.cached is not None:
            found.append(("cache, GiB", config.cache_gib, f"the most {config.cache} may hold"))
        if loader.lengths is not None and loader.world > 1:
            info = MediaInfo(Path(), 1.0, has_video=True, has_audio=config.use_audio, width=1280, height=720)
            limits = {k: v for k, v in self.options.items() if k in ("min_pixels", "max_pixels")}
            chunk_s = chunk_tokens / sum(self.model.tokens_per_s(info, config.fps, **limits).values())
            before, now = (
                expected_empty_share(loader.lengths, chunk_s, loader.seed, loader.world, balanced=balanced)
                for balanced in (False, True)
            )
            why = f"first epoch, ranks in step, chunks of about {chunk_s:.0f} s; {before:.1%} without data.balance"
            found.append(("empty forwards", f"{now:.1%}", why))
        return found

    def prefixes(self) -> Iterable[str]:
        """Of all samples."""
        return {sample.prefix for sample in self.loader.dataset.samples}

    def check(self) -> None:
        """Raises UserError naming a sample with a turn that holds a control token."""
        for sample in self.loader.dataset.samples:
            try:
                for turn in sample.turns:
                    self.model.render(turn)
            except UserError as error:
                raise UserError(f"sample {sample.id!r}: {error.what}", error.cause, error.remedy) from error

    def example(self) -> tuple[str, RenderedTurn]:
        """The first turn of the first sample."""
        turn = self.loader.dataset[0].turns[0]
        return turn.question, self.model.render(turn)


def clip_source(
    samples: Sequence[Sample],
    data: DataConfig,
    options: dict[str, Any],
    model: StreamingModel,
    output: Path,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    share: Callable[[list[Any]], object] = id,
    offload: str = "none",
) -> ClipSource:
    """The clips of a manifest, as rank `rank` of `world` sees them.

    Args:
        options: of the model's encoder side.
        output: folder of the run, for what is found out about the clips.
        seed: of the order.
        share: replaces the entries of a list by those that rank 0 has.
        offload: as in `omnimem_train.step.encode_stream`.

    Raises:
        UserError: a cache folder that cannot be used.
    """
    lengths: list[list[float] | None] = [None]
    if data.balance == "length" and world > 1:
        if rank == 0:
            lengths = [clip_lengths(samples, data, output / "lengths.json")]
        share(lengths)
    cached = None
    if data.cache is not None:
        cached = CacheLookup(EncoderCache(data.cache, data.cache_gib), model, data, options)
    shrink = partial(model.shrink, **options)
    dataset = StreamDataset(samples, data, model.window_s(data.fps), model.sampling_rate, shrink)
    broken = BrokenMedia(data.max_broken, output / f"broken-rank{rank}.jsonl")
    loader = StreamLoader(dataset, seed, world, rank, broken, lengths=lengths[0], lookup=cached)
    return ClipSource(loader, model, options, cached, offload)


def hand_over(stream: EncodedStream, device: torch.device) -> None:
    """Tell the allocator that tensors made on another stream are used on the current one: their memory is not given to
    anything else before that use is over."""
    reader = torch.cuda.current_stream(device)
    waiting = [m.waiting for m in stream.moments if m.waiting is not None]
    for block in [*stream.blocks, *waiting, *(q.block for q in stream.questions)]:
        for x in tensors_of(block).values():
            if x.is_cuda:  # some may wait in host memory
                x.record_stream(reader)
    for question in stream.questions:
        question.read.record_stream(reader)
        question.targets.record_stream(reader)
