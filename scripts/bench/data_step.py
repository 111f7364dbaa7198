"""A training step from file to optimizer: data_step.py --clip CLIP.mp4 [--budget-s 145] [--parts a,b] [--tiny]

Runs the shipped recipe (`recipes/qwen2_5_omni_7b.yaml`, one clip a step) on the shape of the real model with the real
encoders and random weights. First the parts of a step by themselves, each from an idle device to an idle device; then
whole steps with 8 decoding processes, and how much of them was spent waiting for data: encoding ahead of training while
the cache fills, from the full cache, and encoding in step. `make_clip.py` makes the clip. A part that fails or has no
time left is reported, the others go on; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import Clock, Results, median_and_spread, versions
from shape import REAL_TOWERS, SHAPES, make_model
from torch import Tensor

from omnimem_train.checksums import bit_sum
from omnimem_train.config import load_config
from omnimem_train.data import Sample
from omnimem_train.encoder_cache import tensors_of
from omnimem_train.media import read_windows
from omnimem_train.models.interface import MediaInfo, MediaWindow, StreamingModel, Turn
from omnimem_train.models.lora import add_lora, lora_parameters
from omnimem_train.replay import grouped
from omnimem_train.run_config import RunConfig
from omnimem_train.source import clip_source
from omnimem_train.step import EncodedStream, StreamingStep, TimedTurn, encode_stream

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parents[1] / "recipes" / "qwen2_5_omni_7b.yaml"
WORKERS = 8
PART_S = 300.0  # so much of the clip is decoded for the parts of a step; the rest repeats it
TINY = (
    "memory.chunk_tokens=64",
    "memory.budget=96",
    "budgets.low=48",
    "budgets.high=96",
    "gradient.chunks=2",
    "lora.r=4",
    "encoder.max_pixels=3136",
)
GOAL_SHARE = 3.0


@dataclass
class Rig:
    """What all parts share."""

    clip: Path
    config: RunConfig
    model: StreamingModel
    results: Results
    clock: Clock
    steps: int
    folder: Path
    sums: dict[str, list[list[int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        add_lora(self.model, self.config.lora)
        self.model.module.train()
        self.weights = [p for _, p in lora_parameters(self.model)]
        self.step = StreamingStep(self.model, self.config.loss)
        self.optimizer = torch.optim.AdamW(self.weights, self.config.train.lr)

    def train(self, stream: EncodedStream) -> None:
        """One step on one clip."""
        self.step(stream, self.config.memory, self.config.gradient).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def add(self, name: str, samples: list[float], unit: str = "s", goal: float | None = None, note: str = "") -> None:
        """Record the median of some samples."""
        value, spread = median_and_spread(samples)
        self.results.add(f"data.{name}", value, unit, goal=goal, spread=spread, note=note)


# The parts of a step --------------------------------------------------------------------------------------------------


def parts(rig: Rig) -> None:
    """Decoding, resizing, encoding, streaming, choosing, the way back, the optimizer: seconds for one clip."""
    data = rig.config.data
    windows, info = decoded(rig)
    n = round(info.duration_s / windows[-1].end_s)
    shrink = partial(rig.model.shrink, **rig.config.encoder)
    begun = time.perf_counter()
    small = [
        dataclasses.replace(w, frames=None if w.frames is None else shrink(w.frames), shrunk=True) for w in windows
    ]
    rig.add("resize", [n * (time.perf_counter() - begun)], note="one thread")

    def encode(at_once: int, repeats: int) -> EncodedStream:
        encoder = rig.model.open(info, data.fps, **rig.config.encoder)
        turn = TimedTurn(rig.model.render(Turn("What is shown?", "A square and a tone.")))
        return encode_stream(encoder, grouped(repeated(small, repeats), [], at_once), [turn], rig.model.device)

    rig.train(encode(data.encode_windows, 1))  # warms up
    rig.add("encode.1_window", [n * rig.clock.once(lambda: encode(1, 1))], note="a window at a time, from a part")
    made: list[EncodedStream] = []
    with timed_towers(rig) as towers:
        whole_s = rig.clock.once(lambda: made.append(encode(data.encode_windows, n)))
    rig.add("encode", [whole_s], note=f"{data.encode_windows} windows at once; synchronised at each call of a tower")
    for name, seconds in towers.items():
        rig.add(f"encode.{name}", [seconds])
    rig.results.add("data.tokens", made[0].n_tokens, "tokens", better="higher")
    step_parts(rig, made.pop())


def decoded(rig: Rig) -> tuple[list[MediaWindow], MediaInfo]:
    """The first minutes of the clip, as far as they are needed, and its length to a multiple of them."""
    data, window_s = rig.config.data, rig.model.window_s(rig.config.data.fps)
    begun = time.perf_counter()
    with read_windows(rig.clip, fps=data.fps, window_s=window_s, reader=data.reader) as reader:
        opened_s, whole_s, windows = time.perf_counter() - begun, reader.info.duration_s, []
        for window in reader:
            windows.append(window)
            if window.end_s >= min(PART_S, whole_s) - 1e-3:
                break
        info = reader.info
    n = max(1, round(whole_s / windows[-1].end_s))
    rig.add("decode", [opened_s + n * (time.perf_counter() - begun - opened_s)], note="one process, with opening")
    rig.add("decode.open", [opened_s], note="packets indexed, all of the sound decoded")
    return windows, dataclasses.replace(info, duration_s=n * windows[-1].end_s)


def repeated(windows: list[MediaWindow], n: int) -> Iterator[MediaWindow]:
    """Windows over and over, at times that follow each other."""
    length_s = windows[-1].end_s
    for k in range(n):
        for w in windows:
            last = k == n - 1 and w is windows[-1]
            yield MediaWindow(w.start_s + k * length_s, w.end_s + k * length_s, w.frames, w.samples, last, w.shrunk)


@contextmanager
def timed_towers(rig: Rig) -> Iterator[dict[str, float]]:
    """Seconds inside each tower, and what is left, filled in at the end."""
    found, model = {"vision": 0.0, "audio": 0.0}, rig.model

    def timed(name: str, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*given: Any) -> Tensor:
            out: list[Tensor] = []
            found[name] += rig.clock.once(lambda: out.append(run(*given)))
            return out[0]

        return call

    names = {"vision": "encode_pictures", "audio": "encode_sound"}
    begun = time.perf_counter()
    for name, method in names.items():
        setattr(model, method, timed(name, getattr(model, method)))
    try:
        yield found
    finally:
        for method in names.values():
            delattr(model, method)
        found["other"] = time.perf_counter() - begun - sum(found.values())


def step_parts(rig: Rig, stream: EncodedStream) -> None:
    """Forward without and with scoring, backward, optimizer, on the whole clip."""
    memory, gradient = rig.config.memory, rig.config.gradient
    plain = memory.replace(selector="sliding_window", selector_options={})
    stream_s = rig.clock.once(lambda: rig.step(stream, plain, gradient))
    out: list[Tensor] = []
    forward_s = rig.clock.once(lambda: out.append(rig.step(stream, memory, gradient).loss))
    rig.add("stream", [stream_s], note="forward without scoring")
    rig.add("select", [forward_s - stream_s], note=f"what {memory.selector} takes more than sliding_window")
    rig.add("backward", [rig.clock.once(lambda: out[0].backward())], note=f"through the last {gradient.chunks} chunks")
    rig.add("optimizer", [rig.clock.once(rig.optimizer.step)])
    rig.optimizer.zero_grad()


# Whole steps ----------------------------------------------------------------------------------------------------------


def whole_steps(rig: Rig, name: str, *, ahead: int, cached: bool) -> None:
    """Steps from file to optimizer, after one that warms up; the share of their time spent waiting for data."""
    cache = rig.folder / "cache" if cached else None
    data = dataclasses.replace(rig.config.data, encode_ahead=ahead, cache=cache, workers=WORKERS)
    # asked at other times, so each is an entry of its own in the cache
    samples = [
        Sample(
            f"clip{i}", rig.clip, None, True, (Turn("What is shown?", "A square.", 4.0 + 2 * i), Turn("And?", "No."))
        )
        for i in range(6)
    ]
    source = clip_source(samples, data, rig.config.encoder, rig.model, rig.folder / name)
    taken, shares = [], []
    with closing(source.streams(0)) as streams:
        begun = time.perf_counter()
        first = next(streams)
        first_s = source.waited_s
        note_sums(rig, name, first)
        rig.train(first)
        del first
        while len(taken) < rig.steps and (not taken or rig.clock.left_s > taken[-1]):
            settle(rig)
            start, before = time.perf_counter(), source.waited_s
            rig.train(next(streams))
            settle(rig)
            taken.append(time.perf_counter() - start)
            shares.append(100 * (source.waited_s - before) / taken[-1])
            print(f"   {taken[-1]:.2f} s, {shares[-1]:.1f} % waiting", flush=True)
    whole_s = time.perf_counter() - begun
    rig.add(f"step.{name}", taken, note=f"the first clip after {first_s:.1f} s; {whole_s:.0f} s in all")
    rig.add(f"wait.{name}", shares, "%", goal=GOAL_SHARE, note="of the step")
    if source.cached is not None:
        print(f"   {source.cached.cache.counts}", flush=True)
    compare(rig)


def settle(rig: Rig) -> None:
    """Wait for this thread's stream; not for what is encoded ahead on another."""
    if rig.model.device.type == "cuda":
        torch.cuda.current_stream(rig.model.device).synchronize()


def note_sums(rig: Rig, name: str, stream: EncodedStream) -> None:
    """Note what a stream consists of, to the bit."""
    blocks = [*stream.blocks, *(q.block for q in stream.questions)]
    rig.sums[name] = [[bit_sum(x) for x in tensors_of(block).values()] for block in blocks]


def compare(rig: Rig) -> None:
    """Whether the first clip came out the same to the bit in all ways so far."""
    first, *others = rig.sums.values()
    if others:
        same = float(all(other == first for other in others))
        rig.results.add("data.bit_equal", same, "1 = yes", goal=1.0, better="higher", note=", ".join(rig.sums))


PARTS: dict[str, Callable[[Rig], None]] = {
    "parts": parts,
    "ahead_cold": partial(whole_steps, name="ahead_cold", ahead=1, cached=True),
    "ahead_warm": partial(whole_steps, name="ahead_warm", ahead=1, cached=True),
    "in_step_warm": partial(whole_steps, name="in_step_warm", ahead=0, cached=True),
    "ahead": partial(whole_steps, name="ahead", ahead=1, cached=False),
    "in_step": partial(whole_steps, name="in_step", ahead=0, cached=False),
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clip", type=Path, required=True, help="from make_clip.py")
    parser.add_argument("--parts", default="parts,ahead_cold,ahead_warm,in_step", help=f"of: {', '.join(PARTS)}")
    parser.add_argument("--budget-s", type=float, default=145, help="seconds after which no part or step is begun")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a part")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results.json")
    parser.add_argument("--tiny", action="store_true", help="a small model, for a look at the bench itself")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def make_rig(args: argparse.Namespace, folder: Path, deadline: float) -> Rig:
    """The model and the recipe's settings."""
    device = torch.device(args.device)
    config = load_config(RunConfig, RECIPE, TINY if args.tiny else ())
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape, towers = (SHAPES["tiny"], None) if args.tiny else (SHAPES["qwen2.5-omni-7b"], REAL_TOWERS)
    model = make_model(shape, device, dtype, config.model.attention, towers)
    results = Results(args.out / "results.json", versions(device))
    return Rig(args.clip, config, model, results, Clock(device, deadline), args.steps, folder)


def main() -> int:
    """Run the parts; 1 if one of them failed or had no time."""
    args, begun = arguments(), time.perf_counter()
    names = args.parts.split(",")
    if unknown := set(names) - set(PARTS):
        raise SystemExit(f"unknown parts: {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        rig = make_rig(args, Path(folder), begun + args.budget_s)
        print(f"-- model, {time.perf_counter() - begun:.0f} s", flush=True)
        for name in names:
            try:
                if rig.clock.left_s < 0:
                    raise TimeoutError("no time left")
                PARTS[name](rig)
            except Exception as error:  # the other parts are still worth having
                traceback.print_exc()
                failed.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
            rig.clock.clean()
            print(f"-- {name}, {time.perf_counter() - begun:.0f} s", flush=True)
    print("\n" + "\n".join(line for line in rig.results.table().splitlines() if line.startswith("data.")))
    print("\n".join(["", *(f"FAILED {text}" for text in failed), f"{time.perf_counter() - begun:.0f} s"]))
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
