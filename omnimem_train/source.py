"""Where training gets its streams from: the files of a manifest, or whatever else makes encoded streams."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any, Protocol

from omnimem_train.data import SkippedMedia, StreamLoader
from omnimem_train.errors import UserError
from omnimem_train.models.interface import RenderedTurn, StreamingModel
from omnimem_train.step import EncodedStream, TimedTurn, encode_stream


class StreamSource(Protocol):
    """An endless, repeatable sequence of encoded streams (or of batches of streams side by side) for one rank.

    Attributes:
        position: how many were handed out, the state to save.
        waited_s: seconds that training spent waiting for input so far.
    """

    position: int

    @property
    def waited_s(self) -> float:
        """See above."""

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


MakeSource = Callable[[StreamingModel], StreamSource]


class ClipSource:
    """The clips of a manifest, decoded ahead, encoded one by one.

    Args:
        loader: of this rank.
        model: encodes and renders.
        fps: frames a second.
        options: of the model's encoder side.
        offload: as in `omnimem_train.step.encode_stream`.
    """

    def __init__(
        self, loader: StreamLoader, model: StreamingModel, fps: float, options: dict[str, Any], offload: str = "none"
    ) -> None:
        self.loader, self.model, self.fps, self.options, self.offload = loader, model, fps, options, offload

    @property
    def position(self) -> int:
        """Clips handed out."""
        return self.loader.position

    @position.setter
    def position(self, value: int) -> None:
        self.loader.position = value

    @property
    def waited_s(self) -> float:
        """Seconds spent waiting for decoding."""
        return self.loader.waited_s

    def __len__(self) -> int:
        return len(self.loader.dataset)

    def streams(self, start: int) -> Generator[EncodedStream, None, None]:
        """Encoded clips from number `start` on. A broken file within the declared limit is passed over; it is counted
        and listed by the loader."""
        for clip in self.loader.clips(start):
            turns = [TimedTurn(self.model.render(turn), turn.time_s) for turn in clip.sample.turns]
            try:
                encoder = self.model.open(clip.info, self.fps, prefix=clip.sample.prefix, **self.options)
                yield encode_stream(encoder, clip, turns, self.model.device, self.offload)
            except SkippedMedia as error:
                print(f"skipped: {error}", flush=True)

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
