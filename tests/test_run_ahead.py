"""A generator run ahead by a thread: bounded, in order, nothing left behind; on a GPU the same to the bit."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from omnimem_train.checksums import bit_sum
from omnimem_train.models.interface import MediaInfo, MediaWindow, Turn
from omnimem_train.models.loading import load_model
from omnimem_train.run_ahead import run_ahead
from omnimem_train.source import hand_over
from omnimem_train.step import EncodedStream, TimedTurn, encode_stream


def threads_end() -> bool:
    """Whether no thread that runs ahead or decodes is left after a while."""
    for _ in range(50):
        if not any(t.name.startswith(("run ahead", "decode")) for t in threading.enumerate()):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("depth", [1, 2])
def test_no_more_is_made_than_was_allowed(depth: int) -> None:
    made: list[int] = []

    def make() -> Generator[int, None, None]:
        for i in range(10):
            made.append(i)
            yield i

    with closing(run_ahead(make, depth, torch.device("cpu"))) as found:
        for i in range(4):
            assert next(found) == i
            time.sleep(0.1)
            assert len(made) == i + 1 + depth
        assert list(found) == list(range(4, 10))
    assert threads_end()


def test_closing_ends_what_is_waited_for() -> None:
    closed, waiting = threading.Event(), threading.Event()

    def make() -> Generator[int, None, None]:
        try:
            yield 0
            waiting.wait(10)
            if waiting.is_set():
                raise RuntimeError("interrupted")
            yield 1
        finally:
            closed.set()

    found = run_ahead(make, 1, torch.device("cpu"), waiting.set)
    assert next(found) == 0
    begun = time.monotonic()
    found.close()
    assert closed.is_set() and time.monotonic() - begun < 5
    assert threads_end()


class Item:
    """Something that can be seen to go."""


def test_nothing_holds_on_to_what_was_handed_over() -> None:
    """A clip on the device is gigabytes: the thread must not keep the last one while it makes the next."""
    seen: list[weakref.ref[Item]] = []
    asked, gone = threading.Event(), []

    def make() -> Generator[Item, None, None]:
        yield note()
        assert asked.wait(10)
        time.sleep(0.3)  # until the reader waits for what comes next
        gone.append(seen[0]() is None)
        yield note()

    def note() -> Item:
        item = Item()
        seen.append(weakref.ref(item))
        return item

    with closing(run_ahead(make, 1, torch.device("cpu"))) as found:
        item = next(found)
        assert seen[0]() is item
        del item
        asked.set()
        assert isinstance(next(found), Item)
    assert gone == [True]


def test_an_error_comes_after_what_was_made_before() -> None:
    def make() -> Generator[int, None, None]:
        yield 0
        yield 1
        raise ValueError("broken")

    with closing(run_ahead(make, 3, torch.device("cpu"))) as found:
        assert [next(found), next(found)] == [0, 1]
        with pytest.raises(ValueError, match="broken"):
            next(found)
    assert threads_end()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_streams_encoded_ahead_on_a_gpu_are_bit_equal(nano_folder: Path) -> None:
    """While the reader's stream is kept busy and its memory is given back and taken again all the time."""
    model = load_model(nano_folder, device="cuda")
    info = MediaInfo(Path(), 20.0, has_video=True, has_audio=True, width=64, height=48)

    def encoded(seed: int) -> EncodedStream:
        generator = np.random.default_rng(seed)
        windows = [
            MediaWindow(
                2.0 * k,
                2.0 * k + 2,
                generator.integers(0, 256, (4, 48, 64, 3), np.uint8),
                generator.standard_normal(32000).astype(np.float32) / 10,
                k == 9,
            )
            for k in range(10)
        ]
        return encode_stream(model.open(info, 2.0), windows, [TimedTurn(model.render(Turn("q", "a")))], model.device)

    def sums(stream: EncodedStream) -> list[int]:
        return [bit_sum(x.embeds) for x in [*stream.blocks, *(q.block for q in stream.questions)]]

    wanted = [sums(encoded(seed)) for seed in range(12)]
    noise = torch.randn(2048, 2048, device="cuda")
    found = []
    with closing(run_ahead(lambda: (encoded(seed) for seed in range(12)), 1, model.device)) as streams:
        for stream in streams:
            hand_over(stream, model.device)
            for _ in range(20):
                noise = torch.tanh(noise @ noise / 45)
            found.append(sums(stream))
            del stream
    assert found == wanted
