"""Orders of an epoch balanced by length, how many forwards they leave empty, and how lengths are found."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from clips import numbered_frames, tone, write_media

from omnimem_train import clip_lengths as module
from omnimem_train.clip_lengths import clip_lengths
from omnimem_train.clip_order import balanced_order, empty_share, epoch_order, expected_empty_share
from omnimem_train.data import DataConfig, Sample, StreamDataset, StreamLoader
from omnimem_train.errors import UserError
from omnimem_train.models.interface import Turn

CHUNK_S = 13.4  # 2,048 tokens of the 7B recipe


def lengths_of(n: int, seed: int = 0) -> np.ndarray:
    """Log-uniform from 30 s to 90 min."""
    return np.exp(np.random.default_rng(seed).uniform(np.log(30), np.log(5400), n))


@pytest.mark.parametrize("world", [2, 8, 16])
def test_under_a_tenth_of_forwards_is_empty(world: int) -> None:
    lengths = lengths_of(1000)
    before, now = (expected_empty_share(lengths, CHUNK_S, 3, world, balanced=b, epochs=3) for b in (False, True))
    assert now < 0.1 < 0.3 < before


def test_what_counts_as_empty() -> None:
    """By hand: rows of (4, 2), (3, 3) and (1, 5) chunks run 4, 3 and 5 forwards on both ranks."""
    assert empty_share(np.array([[4, 2], [3, 3], [1, 5]])) == pytest.approx((2 + 0 + 4) / 24)
    # two clips on two ranks, in whatever order: 1 and ceil(25 / 10) = 3 chunks
    assert expected_empty_share([5.0, 25.0], 10.0, 0, 2, balanced=True) == pytest.approx(2 / 6)


@pytest.mark.parametrize(("n", "world"), [(1000, 8), (1001, 8), (10, 3), (2, 5), (1, 1), (300, 1)])
def test_every_clip_is_seen_as_often_as_without(n: int, world: int) -> None:
    lengths = lengths_of(n)
    counts = [
        Counter(i for rank in range(world) for i in make(world, rank))
        for make in (
            lambda w, r: epoch_order(n, 3, 5, w, r),
            lambda w, r: balanced_order(lengths, 3, 5, w, r),
        )
    ]
    assert counts[0] == counts[1]
    assert set(counts[0]) == set(range(n))


def test_the_order_is_a_shuffle_by_seed_and_epoch() -> None:
    lengths = lengths_of(512)
    order = balanced_order(lengths, 1, 2, 4, 3)
    assert order == balanced_order(lengths, 1, 2, 4, 3)
    assert len({tuple(balanced_order(lengths, seed, epoch, 4, 3)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    # neither rows nor ranks are sorted: long and short clips come mixed, and no rank has the long ones
    seen = np.array([lengths[balanced_order(lengths, 1, 2, 4, rank)] for rank in range(4)])
    assert abs(np.corrcoef(seen[0], np.arange(128))[0, 1]) < 0.3
    assert sorted(Counter(seen.argmax(axis=0).tolist())) == [0, 1, 2, 3]
    # in the next epoch clips meet others
    met = [set(zip(*(balanced_order(lengths, 1, epoch, 4, r) for r in range(2)), strict=True)) for epoch in (0, 1)]
    assert len(met[0] & met[1]) < 20


def test_a_loader_with_lengths_resumes_by_position(tmp_path: Path) -> None:
    samples = [Sample(str(i), tmp_path / f"{i}.mp4", None, True, (Turn("q", "a"),)) for i in range(20)]
    dataset, lengths = StreamDataset(samples, DataConfig(), 1.0), lengths_of(20).tolist()
    whole = [StreamLoader(dataset, 7, 2, 1, lengths=lengths).sample_at(i).id for i in range(25)]
    again = StreamLoader(dataset, 7, 2, 1, lengths=lengths)
    assert [again.sample_at(i).id for i in (24, 3, 11, 10, 9)] == [whole[i] for i in (24, 3, 11, 10, 9)]
    assert whole[:10] == [str(i) for i in balanced_order(lengths, 7, 0, 2, 1)]
    assert whole[10:20] == [str(i) for i in balanced_order(lengths, 7, 1, 2, 1)]


def test_lengths_come_from_manifest_listing_and_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, n in (("a", 16), ("b", 8)):
        write_media(tmp_path / f"{name}.mp4", numbered_frames(n), 4, tone(n / 4))
    (tmp_path / "bad.mp4").write_text("no film")

    def sample(name: str, **extra: float) -> Sample:
        return Sample(name, tmp_path / f"{name}.mp4", None, True, (Turn("q", "a"),), "", extra)

    samples, listing = [sample("a"), sample("gone", duration_s=70.0), sample("b"), sample("bad")], tmp_path / "x/l.json"
    assert clip_lengths(samples, DataConfig(max_duration_s=60), listing) == [4.0, 60.0, 2.0, 0.0]
    probed = []
    monkeypatch.setattr(module, "_probe", lambda path, *_: probed.append(path.name) or 9.0)
    assert clip_lengths(samples, DataConfig(), listing) == [4.0, 70.0, 2.0, 0.0]
    assert probed == []
    (tmp_path / "a.mp4").write_bytes(b"another file")
    assert clip_lengths(samples, DataConfig(), listing) == [9.0, 70.0, 2.0, 0.0]
    assert probed == ["a.mp4"]
    for damage in ("{", "[]", '{"a": 3}', json.dumps({"a": ["x", "y"]})):
        listing.write_text(damage)
        assert clip_lengths(samples, DataConfig(), listing) == [9.0, 70.0, 9.0, 9.0]


def test_an_unknown_balance_is_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'length'"):
        DataConfig(balance="lenght")
