"""Training on made-up streams of unequal length, with and without sound, asked at different times.

    LAUNCHER scripts/bench/unequal.py RECIPE [dotted.name=value ...] [--deterministic]

where LAUNCHER is python, accelerate launch, torchrun or deepspeed. It is `omnimem train` with another source of
streams: pictures and sounds are noise, but they go through the model's own encoders. No file is decoded, so it runs
where no decoder is installed. Processes that share a step get streams whose numbers of chunks differ up to ten times.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState

from omnimem_train.config import load_config
from omnimem_train.errors import UserError
from omnimem_train.models.interface import MediaInfo, MediaWindow, RenderedTurn, StreamingModel, Turn
from omnimem_train.run_config import RunConfig
from omnimem_train.step import EncodedStream, TimedTurn, encode_stream
from omnimem_train.trainer import train

SAMPLES = 24
FPS = 2.0
SIDE = 56  # pixels


class UnequalSource:
    """A `StreamSource` that makes its streams up. Number p of rank r is sample p * world + r of one endless order, so
    the samples of a step are the same for any number of processes."""

    def __init__(self, model: StreamingModel, longest_s: float = 20.0) -> None:
        state = PartialState()
        self.model, self.longest_s = model, longest_s
        self.rank, self.world = state.process_index, state.num_processes
        self.position = 0
        self.waited_s = 0.0
        self._made: dict[int, EncodedStream] = {}

    def __len__(self) -> int:
        return SAMPLES

    def streams(self, start: int) -> Generator[EncodedStream, None, None]:
        """Streams from number `start` on."""
        self.position = start
        while True:
            began_s = time.perf_counter()
            number = (self.position * self.world + self.rank) % SAMPLES
            if number not in self._made:
                self._made[number] = self.sample(number)
            self.waited_s += time.perf_counter() - began_s
            self.position += 1
            yield self._made[number]

    def facts(self, chunk_tokens: int) -> list[tuple[str, object, str]]:
        """Nothing that is not said elsewhere."""
        return []

    def sample(self, number: int) -> EncodedStream:
        """Encode a sample: neighbours differ most in length, a third has no sound, some are not asked at their end."""
        draw = np.random.RandomState(number)
        seconds = float(round(self.longest_s / (1 if number % 2 else draw.randint(3, 11))))
        audio = number % 3 != 1
        info = MediaInfo(Path("made-up"), seconds, True, audio, SIDE, SIDE, 25.0, self.model.sampling_rate)
        times = [None] if number % 4 else [round(seconds * draw.uniform(0.2, 0.9), 1), seconds / 2]
        turns = [TimedTurn(self.model.render(self.turn(number + i)), t) for i, t in enumerate(times)]
        encoder = self.model.open(info, FPS)
        return encode_stream(encoder, self.windows(info, draw), turns, self.model.device)

    def windows(self, info: MediaInfo, draw: np.random.RandomState) -> Iterator[MediaWindow]:
        """Noise, cut as a reader would."""
        step, rate = self.model.window_s(FPS), self.model.sampling_rate
        for k in range(math.ceil(info.duration_s / step)):
            start, end = k * step, min((k + 1) * step, info.duration_s)
            n_frames = math.ceil(end * FPS) - math.ceil(start * FPS)
            frames = draw.randint(0, 256, (n_frames, SIDE, SIDE, 3), dtype=np.uint8)
            n_samples = round(end * rate) - round(start * rate)
            samples = (0.1 * draw.randn(n_samples)).astype(np.float32) if info.has_audio else None
            yield MediaWindow(start, end, frames, samples, end >= info.duration_s)

    def turn(self, number: int) -> Turn:
        """Question and answer number `number`."""
        return Turn(f"What is shown at event {number % 7}?", f"({'ABCD'[number % 4]}) a red circle"[: 4 + number % 9])

    def prefixes(self) -> Iterable[str]:
        """Nothing stands before the media."""
        return {""}

    def check(self) -> None:
        """The turns are fit to be rendered."""

    def example(self) -> tuple[str, RenderedTurn]:
        """The first turn."""
        return self.turn(0).question, self.model.render(self.turn(0))


def main() -> int:
    """Train as the command line says."""
    words = [w for w in sys.argv[1:] if not w.startswith("--local_rank")]  # the deepspeed launcher adds it
    if "--deterministic" in words:
        words.remove("--deterministic")
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)  # with warnings alone, attention would stay as it is
    try:
        print(f"checkpoint: {train(load_config(RunConfig, words[0], words[1:]), UnequalSource)}", flush=True)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
