"""The cache folder by itself: size, eviction, several processes, sums over bits."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from omnimem_train.checksums import bit_sum
from omnimem_train.encoder_cache import GIB, Damaged, EncoderCache, EntryWriter, _size
from omnimem_train.models.interface import TokenBlock

CPU = torch.device("cpu")


def block(n: int, seed: int) -> TokenBlock:
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(1, n, 16, generator=generator).to(torch.bfloat16)
    positions = torch.arange(n)[None, :, None].expand(1, n, 3)
    return TokenBlock(
        embeds, positions, torch.ones(1, n, dtype=torch.int8), torch.zeros(1, n), {"deep": embeds[..., None]}
    )


def store(cache: EncoderCache, key: str, blocks: list[TokenBlock], part_tokens: int = 40) -> EntryWriter:
    writer = cache.writer(key)
    writer.part_tokens = part_tokens
    for each in blocks:
        writer.add(each)
    writer.publish({"key": key}, {"seed": torch.tensor(7)})
    return writer


def test_blocks_come_back_as_they_were(tmp_path: Path) -> None:
    blocks = [block(n, n) for n in (30, 5, 17, 60, 3)]
    cache = EncoderCache(tmp_path, 1.0)
    store(cache, "a", blocks)
    entry = cache.find("a")
    assert entry is not None and entry.about == {"key": "a"}
    assert len(list((tmp_path / "a").glob("part-*"))) == 3  # of 52, 60 and 3 tokens: parts end where blocks do
    for found, wanted in zip(entry.blocks(CPU), blocks, strict=True):
        assert torch.equal(found.embeds, wanted.embeds) and found.embeds.dtype == torch.bfloat16
        assert torch.equal(found.positions, wanted.positions) and torch.equal(found.time_s, wanted.time_s)
        assert torch.equal(found.modality, wanted.modality) and torch.equal(found.extras["deep"], wanted.extras["deep"])
    assert int(entry.moments(CPU)["seed"]) == 7
    assert cache.find("b") is None
    assert (cache.counts.hits, cache.counts.misses) == (1, 1)


def test_the_longest_unused_entries_make_room(tmp_path: Path) -> None:
    cache = EncoderCache(tmp_path, 1.0)
    store(cache, "a", [block(400, 0)])
    size = _size(tmp_path / "a")
    cache.limit = 3 * size + 8192  # room for three, and what is reserved for a file's header
    for i, key in enumerate("bc"):
        store(cache, key, [block(400, i)])
    for i, key in enumerate("abc"):
        os.utime(tmp_path / key / "index.json", (1000 + i, 1000 + i))
    assert cache.find("a") is not None  # now the newest
    store(cache, "d", [block(400, 3)])
    assert sorted(f.name for f in tmp_path.iterdir() if f.is_dir()) == ["a", "c", "d"]
    assert cache.counts.evicted == 1
    assert sum(_size(f) for f in tmp_path.iterdir() if f.is_dir()) <= cache.limit


def test_a_clip_larger_than_the_cache_is_not_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = EncoderCache(tmp_path, 60_000 / GIB)
    store(cache, "small", [block(100, 0)])
    assert store(cache, "large", [block(400, i) for i in range(4)]).failed
    assert "larger than data.cache_gib" in capsys.readouterr().out
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(("tmp", "large"))] == []


def test_what_a_crash_left_is_removed_when_it_is_old(tmp_path: Path) -> None:
    cache = EncoderCache(tmp_path, 1.0)
    for name, age_s in (("old", 7 * 3600), ("new", 60)):
        writer = cache.writer(name)
        writer.part_tokens = 1
        writer.add(block(10, 0))
        for path in (*writer.folder.iterdir(), writer.folder):
            os.utime(path, (time.time() - age_s,) * 2)
    EncoderCache(tmp_path, 1.0)
    assert len(list(tmp_path.glob("tmp-*"))) == 1


def test_an_entry_removed_while_it_is_read_is_damaged(tmp_path: Path) -> None:
    cache = EncoderCache(tmp_path, 1.0)
    store(cache, "a", [block(50, i) for i in range(4)])
    entry = cache.find("a")
    assert entry is not None
    blocks = entry.blocks(CPU)
    next(blocks)
    cache._remove(tmp_path / "a")
    with pytest.raises(Damaged, match="cannot be read"):
        list(blocks)


HAMMER = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_encoder_cache import CPU, block, store
from omnimem_train.encoder_cache import Damaged, EncoderCache
cache = EncoderCache(Path(sys.argv[1]), float(sys.argv[2]))
whole = 0
for round in range(40):
    key = (7 * round + int(sys.argv[4])) % 9
    entry = cache.find(str(key))
    if entry is None:
        store(cache, str(key), [block(100, key), block(100, key + 1)])
        continue
    try:
        first, second = entry.blocks(CPU)
    except Damaged as damage:
        assert "No such file" in str(damage), damage  # removed by another process, never half written
        continue
    assert torch.equal(first.embeds, block(100, key).embeds) and torch.equal(second.embeds, block(100, key + 1).embeds)
    whole += 1
print(whole, cache.counts.evicted, cache.counts.damaged)
"""


@pytest.mark.slow
def test_several_processes_share_a_folder(tmp_path: Path) -> None:
    """Three processes read and write nine entries where there is room for five."""
    probe = EncoderCache(tmp_path / "probe", 1.0)
    store(probe, "a", [block(100, 0), block(100, 1)])
    limit = (5 * _size(tmp_path / "probe" / "a") + 8192) / GIB
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", HAMMER, str(tmp_path / "shared"), str(limit), str(Path(__file__).parent)]
    running = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True, env=env) for i in range(3)]
    said = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    whole, evicted, damaged = (sum(int(line.split()[i]) for line in said) for i in range(3))
    assert whole > 0 and evicted > 0 and damaged == 0  # how many depends on who comes first
    left = [f for f in (tmp_path / "shared").iterdir() if f.is_dir()]
    assert sum(_size(f) for f in left) <= limit * GIB and not [f for f in left if f.name.startswith("tmp")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float64])
def test_every_bit_counts(dtype: torch.dtype) -> None:
    x = torch.randn(7, 13, generator=torch.Generator().manual_seed(0)).mul(50).to(dtype)
    whole = bit_sum(x)
    assert whole == bit_sum(x.clone()) == bit_sum(x.T.contiguous().T) == bit_sum(torch.stack([x, x])[1])
    for place in range(x.numel() * x.element_size()):
        for bit in (0, 7):
            changed = x.clone().flatten().view(torch.uint8)
            changed[place] ^= 1 << bit
            assert bit_sum(changed.view(dtype)) != whole
    assert bit_sum(x.flip(0)) != whole
    assert bit_sum(torch.zeros(3)) == bit_sum(torch.zeros(0)) == 0


def test_a_sum_goes_through_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1001, generator=torch.Generator().manual_seed(0))
    whole = bit_sum(x)
    monkeypatch.setattr("omnimem_train.checksums._PIECE", 64)
    assert bit_sum(x) == whole
