"""Streams of a manifest: the same to the bit whether encoded in step, ahead in a thread, or read from a cache."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clips import numbered_frames, tone, write_media
from test_run_ahead import threads_end
from torch import Tensor

from omnimem_train.broken_media import SkippedMedia
from omnimem_train.data import DataConfig, Sample, StreamDataset
from omnimem_train.encoder_cache import EncoderCache, tensors_of
from omnimem_train.errors import UserError
from omnimem_train.media import MediaError
from omnimem_train.models.interface import MediaInfo, MediaWindow, StreamingModel, Turn
from omnimem_train.models.loading import load_model
from omnimem_train.replay import grouped
from omnimem_train.source import ClipSource, clip_source
from omnimem_train.step import EncodedStream

TURNS = (Turn("What is first?", "A.", 3.1), Turn("What is second?", "B.", 2.0), Turn("And at the end?", "C."))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of 6 s, 9 s and, silent, 5 s."""
    folder = tmp_path_factory.mktemp("clips")
    for name, seconds in (("a", 6), ("b", 9), ("silent", 5)):
        sound = None if name == "silent" else tone(seconds)
        write_media(folder / f"{name}.mp4", numbered_frames(4 * seconds), 4, sound)
    write_media(folder / "sound.mp4", None, 4, tone(7))
    (folder / "bad.mp4").write_text("no film")
    return folder


def samples_of(folder: Path) -> list[Sample]:
    a = Sample("a", folder / "a.mp4", None, True, TURNS, "Watch: ")
    return [
        a,
        Sample("b", folder / "b.mp4", None, True, TURNS[2:]),
        Sample("deaf", folder / "b.mp4", None, False, TURNS[:2]),
        Sample("silent", folder / "silent.mp4", None, True, TURNS),
        Sample("sound", None, folder / "sound.mp4", True, TURNS[::-1]),
    ]


def source_of(model: StreamingModel, samples: list[Sample], tmp_path: Path, **data: Any) -> ClipSource:
    settings = {"fps": 2.0, "workers": 1} | data
    return clip_source(samples, DataConfig(**settings), {}, model, tmp_path / "run")


def streams(source: ClipSource, n: int, start: int = 0) -> list[EncodedStream]:
    with closing(source.streams(start)) as found:
        return list(itertools.islice(found, n))


def flat(stream: EncodedStream) -> dict[str, Tensor]:
    """Everything a stream consists of, by name."""
    named: dict[str, Tensor] = {}
    for i, block in enumerate(stream.blocks):
        named |= tensors_of(block, f"block {i} ")
    for i, moment in enumerate(stream.moments):
        named[f"moment {i} after"] = torch.tensor(moment.after)
        if moment.waiting is not None:
            named |= tensors_of(moment.waiting, f"moment {i} waiting ")
        for j, question in enumerate(moment.questions):
            name = f"moment {i} question {j} "
            named |= tensors_of(question.block, name) | {f"{name}read": question.read, f"{name}to": question.targets}
    return named


def assert_equal(found: list[EncodedStream], wanted: list[EncodedStream]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        a, b = flat(one), flat(other)
        assert a.keys() == b.keys()
        for name, x in a.items():
            assert x.dtype == b[name].dtype and torch.equal(x, b[name]), name


def ids(source: ClipSource, n: int) -> list[str]:
    return [source.loader.sample_at(i).id for i in range(n)]


# the same in every way ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("windows", [1, 3])
def test_ahead_and_cached_streams_are_bit_equal(
    nano_session: StreamingModel, folder: Path, tmp_path: Path, windows: int
) -> None:
    samples, n = samples_of(folder), 12  # more than two epochs of five
    plain = streams(source_of(nano_session, samples, tmp_path, encode_windows=windows), n)
    for ahead in (1, 3):
        source = source_of(nano_session, samples, tmp_path, encode_ahead=ahead, encode_windows=windows)
        assert_equal(streams(source, n), plain)
        assert source.position == n
    for ahead in (0, 1):
        options: dict[str, Any] = {"cache": tmp_path / f"cache{ahead}", "encode_windows": windows}
        source = source_of(nano_session, samples, tmp_path, encode_ahead=ahead, **options)
        assert_equal(streams(source, n), plain)
        counts = source.cached.cache.counts
        assert (counts.stored, counts.damaged) == (5, 0)
        assert counts.hits >= 5


@pytest.mark.slow
def test_cached_streams_of_video_salmonn_are_bit_equal(salmonn_folder: Path, folder: Path, tmp_path: Path) -> None:
    """Deepstack features, time stamps as text, windows of sound that wait for 30 s."""
    model = load_model(salmonn_folder, device="cpu")
    samples = samples_of(folder)
    plain = streams(source_of(model, samples, tmp_path), 5)
    source = source_of(model, samples, tmp_path, cache=tmp_path / "cache")
    assert_equal(streams(source, 10), plain + streams(source_of(model, samples, tmp_path), 5, start=5))
    assert source.cached.cache.counts.hits == 5


def test_windows_encoded_at_once_give_the_same_tokens(
    nano_session: StreamingModel, folder: Path, tmp_path: Path
) -> None:
    plain, joined = (
        streams(source_of(nano_session, samples_of(folder), tmp_path, encode_windows=n), 5) for n in (1, 4)
    )
    fewer = 0
    for one, other in zip(plain, joined, strict=True):
        assert [m.questions[0].block.n for m in one.moments] == [m.questions[0].block.n for m in other.moments]
        for name, x in tensors_of(type(one.blocks[0]).cat(one.blocks)).items():
            y = tensors_of(type(one.blocks[0]).cat(other.blocks))[name]
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4, msg=name)
        for q, r in zip(one.questions, other.questions, strict=True):
            assert torch.equal(q.block.positions, r.block.positions)
        fewer += len(one.blocks) - len(other.blocks)
    assert fewer > 0


def test_windows_are_joined_up_to_questions() -> None:
    def windows() -> Iterator[MediaWindow]:
        for k in range(7):
            yield MediaWindow(
                2.0 * k, 2.0 * k + 2, np.full((4, 1, 1, 3), k, np.uint8), np.full(8, k, np.float32), k == 6
            )

    borders = [w.end_s for w in grouped(windows(), [], 3)]
    assert borders == [6.0, 12.0, 14.0]
    # asked at 4.0: after the window that ends there. At 9.5: before the one from 8 to 10.
    asked = list(grouped(windows(), [4.0, 9.5], 5))
    assert [w.end_s for w in asked] == [4.0, 8.0, 14.0]
    assert asked[1].frames[:, 0, 0, 0].tolist() == [2] * 4 + [3] * 4
    assert asked[1].samples.tolist() == [2.0] * 8 + [3.0] * 8
    assert (asked[1].start_s, asked[1].last, asked[2].last) == (4.0, False, True)


@pytest.mark.parametrize("size", [(48, 64), (360, 640), (37, 211), (1080, 1920), (28, 28)])
def test_frames_shrunk_before_are_left_as_they_are(nano_session: StreamingModel, size: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    frames = generator.integers(0, 256, (2, *size, 3), np.uint8)
    for options in ({}, {"max_pixels": 784}, {"min_pixels": 200704, "max_pixels": 401408}):
        small = nano_session.shrink(frames, **options)
        assert small.dtype == np.uint8 and small.flags.c_contiguous
        seen = []
        for given, shrunk in ((frames, False), (small, True)):
            encoder = nano_session.open(picture(given), 2.0, **options)
            seen.append(encoder.push(MediaWindow(0.0, 1.0, given, None, shrunk=shrunk)))
        assert torch.equal(seen[0].embeds, seen[1].embeds) and torch.equal(seen[0].positions, seen[1].positions)


def picture(frames: np.ndarray) -> MediaInfo:
    return MediaInfo(Path(), 1.0, has_video=True, has_audio=False, width=frames.shape[2], height=frames.shape[1])


# positions, errors, waiting -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_positions_count_what_was_handed_out(
    nano_session: StreamingModel, folder: Path, tmp_path: Path, ahead: int
) -> None:
    """Passed over or not, whatever is encoded ahead; a run that goes on from there gets what comes next."""
    samples = samples_of(folder)
    samples.insert(2, Sample("bad", folder / "bad.mp4", None, True, TURNS))
    source = source_of(nano_session, samples, tmp_path, encode_ahead=ahead, max_broken=1)
    order = ids(source, 12)
    expected = [i + 1 for i, name in enumerate(order) if name != "bad"]
    positions, lengths = [], []
    with closing(source.streams(0)) as found:
        for stream in itertools.islice(found, len(expected)):
            positions.append(source.position)
            lengths.append(stream.n_tokens)
            time.sleep(0.5 if len(positions) < 4 else 0)  # the thread goes on meanwhile
    assert positions == expected
    again = source_of(nano_session, samples, tmp_path, encode_ahead=ahead, max_broken=1)
    assert [s.n_tokens for s in streams(again, 4, start=positions[3])] == lengths[4:8]


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_an_error_comes_in_its_place(nano_session: StreamingModel, folder: Path, tmp_path: Path, ahead: int) -> None:
    samples = [*samples_of(folder), Sample("bad", folder / "bad.mp4", None, True, TURNS)]
    source = source_of(nano_session, samples, tmp_path, encode_ahead=ahead)
    before = ids(source, 6).index("bad")
    with closing(source.streams(0)) as found:
        got = list(itertools.islice(found, before))
        with pytest.raises(MediaError, match=r"bad\.mp4: cannot be decoded") as caught:
            next(found)
    assert not isinstance(caught.value, SkippedMedia)
    assert len(got) == source.position == before
    assert threads_end()


def test_waiting_for_the_encoder_counts(
    nano_session: StreamingModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In step all of it is waited for; ahead of a slow reader none but for the first clip."""
    slow = type(nano_session).encode_pictures

    def encode_pictures(self: Any, *given: Any) -> Tensor:
        time.sleep(0.1)
        return slow(self, *given)

    monkeypatch.setattr(type(nano_session), "encode_pictures", encode_pictures)
    waited = {}
    for ahead in (0, 1):
        source = source_of(nano_session, samples_of(folder)[:1], tmp_path, encode_ahead=ahead)
        with closing(source.streams(0)) as found:
            next(found)
            first = source.waited_s
            assert first > 0.3  # three windows
            time.sleep(1.5)
            next(found)
            waited[ahead] = source.waited_s - first
    assert waited[0] > 0.3
    assert waited[1] < 0.05


# the thread -----------------------------------------------------------------------------------------------------------


def test_leaving_early_leaves_nothing_behind(nano_session: StreamingModel, folder: Path, tmp_path: Path) -> None:
    source = source_of(nano_session, samples_of(folder), tmp_path, encode_ahead=2, workers=3, cache=tmp_path / "cache")
    found = source.streams(0)
    next(found)
    found.close()
    assert threads_end()
    assert not list((tmp_path / "cache").glob("tmp-*"))


# the cache ------------------------------------------------------------------------------------------------------------


def test_a_second_epoch_neither_decodes_nor_encodes(
    nano_session: StreamingModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = samples_of(folder)
    plain = streams(source_of(nano_session, samples, tmp_path), 5)
    streams(source_of(nano_session, samples, tmp_path, cache=tmp_path / "cache"), 5)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("this was not needed")

    for name in ("encode_pictures", "encode_sound"):
        monkeypatch.setattr(type(nano_session), name, refuse)
    monkeypatch.setattr(StreamDataset, "open", refuse)
    assert_equal(streams(source_of(nano_session, samples, tmp_path, cache=tmp_path / "cache"), 5), plain)


def test_what_a_clip_is_found_by(nano: StreamingModel, folder: Path, tmp_path: Path) -> None:
    """Content and settings, and nothing else: each change that could change a token makes another key."""
    here = tmp_path / "a.mp4"
    here.write_bytes((folder / "a.mp4").read_bytes())
    sample = Sample("a", here, None, True, TURNS, "Watch: ")

    def key(given: Sample = sample, options: dict[str, Any] | None = None, **data: Any) -> str:
        config = DataConfig(**({"fps": 2.0, "cache": tmp_path / "cache"} | data))
        cached = clip_source([given], config, options or {}, nano, tmp_path / "run").cached
        assert cached is not None
        name = cached.key(given)
        assert name is not None
        return name

    first = key()
    # questions, ids, file names, dates, and how fast it is read do not matter
    moved = tmp_path / "moved.mp4"
    moved.write_bytes(here.read_bytes())
    os.utime(moved, (1, 1))
    other_words = tuple(Turn("Other?", "Words.", turn.time_s) for turn in TURNS)
    for same in (replace(sample, id="x"), replace(sample, media=moved), replace(sample, turns=other_words)):
        assert key(same) == first
    assert key(workers=0, prefetch_windows=3, encode_ahead=1, max_broken=2, cache_gib=3.0) == first
    others = [
        key(replace(sample, prefix="See: ")),
        key(replace(sample, turns=TURNS[:2])),
        key(replace(sample, turns=(replace(TURNS[0], time_s=3.2), *TURNS[1:]))),
        key(replace(sample, use_audio=False)),
        key(replace(sample, audio=folder / "sound.mp4")),
        key(use_audio=False, max_duration_s=5.0),
        key(fps=1.0),
        key(max_duration_s=5.0),
        key(reader="pyav"),
        key(encode_windows=2),
        key(options={"max_pixels": 784}),
        key(options={"system": "Be brief."}),
    ]
    with torch.no_grad():
        nano.parts.visual.patch_embed.proj.weight.view(-1)[17].mul_(1 + 2**-23)  # a single bit of a single weight
    others.append(key())
    # a file replaced by another of the same size and date
    state = here.stat()
    content = bytearray(here.read_bytes())
    content[len(content) // 2] ^= 1
    here.write_bytes(content)
    os.utime(here, ns=(state.st_atime_ns, state.st_mtime_ns))
    others.append(key())
    assert len({first, *others}) == 1 + len(others)


def test_adapters_do_not_change_the_key(nano: StreamingModel, folder: Path, tmp_path: Path) -> None:
    from omnimem_train.models.importance import add_importance_head
    from omnimem_train.models.lora import LoraSettings, add_lora
    from omnimem_train.replay import encoder_fingerprint

    before = encoder_fingerprint(nano)
    add_lora(nano, LoraSettings(r=4, alpha=8))
    add_importance_head(nano)
    assert encoder_fingerprint(nano) == before


def spoil_byte(entry: Path) -> None:
    part = entry / "part-00000.safetensors"
    content = bytearray(part.read_bytes())
    content[-100] ^= 4
    part.write_bytes(content)


def spoil_kind(entry: Path) -> None:
    """The same bits under another type."""
    part = entry / "part-00000.safetensors"
    part.write_bytes(part.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"I32"'))


def cut(entry: Path) -> None:
    part = entry / "moments.safetensors"
    part.write_bytes(part.read_bytes()[:-7])


def lose(entry: Path) -> None:
    (entry / "part-00000.safetensors").unlink()


def garble(entry: Path) -> None:
    (entry / "index.json").write_text("{")


def alter(entry: Path) -> None:
    index = entry / "index.json"
    index.write_text(index.read_text().replace('"duration_s": 6.0', '"duration_s": 8.0'))


@pytest.mark.parametrize("damage", [spoil_byte, spoil_kind, cut, lose, garble, alter])
@pytest.mark.parametrize("ahead", [0, 1])
def test_a_damaged_entry_is_made_again(
    nano_session: StreamingModel,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Any,
    ahead: int,
) -> None:
    samples, cache = samples_of(folder)[:1], tmp_path / "cache"
    plain = streams(source_of(nano_session, samples, tmp_path), 1)
    streams(source_of(nano_session, samples, tmp_path, cache=cache), 1)
    (entry,) = (f for f in cache.iterdir() if f.is_dir())
    index = (entry / "index.json").read_text()
    damage(entry)
    if damage is alter:
        assert (entry / "index.json").read_text() != index
    source = source_of(nano_session, samples, tmp_path, cache=cache, encode_ahead=ahead)
    assert_equal(streams(source, 3), plain * 3)
    counts = source.cached.cache.counts
    assert (counts.damaged, counts.stored) == (1, 1)
    assert counts.hits >= 2
    assert "is encoded again" in capsys.readouterr().out


def test_a_cache_that_cannot_be_written_does_not_stop_a_run(
    nano_session: StreamingModel,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    samples = samples_of(folder)[:2]
    plain = streams(source_of(nano_session, samples, tmp_path), 4)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be used(?s:.*)data\.cache"):
        source_of(nano_session, samples, tmp_path, cache=tmp_path / "file")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("omnimem_train.encoder_cache.save_file", full)
    source = source_of(nano_session, samples, tmp_path, cache=tmp_path / "cache")
    assert_equal(streams(source, 4), plain)
    assert source.cached.cache.counts.stored == 0
    assert source.cached.cache.counts.not_stored == 4
    said = capsys.readouterr().out
    assert said.count("No space left") == 1  # not with every clip
    assert [f.name for f in (tmp_path / "cache").iterdir()] == ["lock"]


def test_a_broken_clip_leaves_no_entry(nano_session: StreamingModel, folder: Path, tmp_path: Path) -> None:
    samples = [*samples_of(folder)[:1], Sample("bad", folder / "bad.mp4", None, True, TURNS)]
    source = source_of(nano_session, samples, tmp_path, cache=tmp_path / "cache", max_broken=1)
    streams(source, 3)
    assert source.cached.cache.counts.stored == 1
    assert len([f for f in (tmp_path / "cache").iterdir() if f.is_dir()]) == 1


@pytest.mark.parametrize("ahead", [0, 1])
def test_an_encoder_that_fails_leaves_no_part_of_an_entry(
    nano_session: StreamingModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    parts, writer = [], EncoderCache.writer

    def encode_pictures(self: Any, *given: Any) -> Tensor:
        parts[:] = (tmp_path / "cache").glob("tmp-*/part-*")
        if len(parts) == 2:
            raise RuntimeError("the device has failed")
        return whole(self, *given)

    whole = type(nano_session).encode_pictures
    monkeypatch.setattr(type(nano_session), "encode_pictures", encode_pictures)
    monkeypatch.setattr(EncoderCache, "writer", lambda self, key: replace(writer(self, key), part_tokens=1))
    source = source_of(nano_session, samples_of(folder)[1:2], tmp_path, cache=tmp_path / "cache", encode_ahead=ahead)
    with pytest.raises(RuntimeError, match="the device has failed"):
        streams(source, 1)
    assert len(parts) == 2
    assert [f.name for f in (tmp_path / "cache").iterdir()] == ["lock"]
