"""Budgets: what is drawn, that it repeats, and what bad settings get."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from omnimem_train.budget_sampling import BudgetSampler, BudgetSampling, Draw
from omnimem_train.errors import UserError


def draws(n: int = 4000, chunk_tokens: int = 1000, **settings: Any) -> list[Draw]:
    sampler = BudgetSampler(BudgetSampling(**settings), chunk_tokens)
    return [sampler.draw(step) for step in range(n)]


def budgets(n: int = 4000, **settings: Any) -> list[int]:
    found = [d.budget for d in draws(n, full_share=0.0, **settings)]
    assert all(isinstance(b, int) for b in found)
    return [b for b in found if b is not None]


def within_5_sigma(count: int, n: int, p: float) -> bool:
    return abs(count - n * p) <= 5 * math.sqrt(n * p * (1 - p))


def test_log_uniform_gives_every_octave_the_same_share() -> None:
    found = budgets(8000, low=64, high=1023)
    octaves = Counter(int(math.log2(b)) for b in found)
    assert sorted(octaves) == [6, 7, 8, 9]
    assert all(within_5_sigma(count, 8000, 1 / 4) for count in octaves.values()), octaves
    assert not within_5_sigma(sum(b >= 512 for b in found), 8000, 512 / 960), "uniform, not log-uniform"


def test_log_uniform_over_few_values_has_the_stated_probabilities() -> None:
    found = Counter(budgets(8000, low=1, high=3))
    for budget in (1, 2, 3):
        assert within_5_sigma(found[budget], 8000, math.log((budget + 1) / budget) / math.log(4)), found
    assert sum(found.values()) == found[1] + found[2] + found[3]


def test_uniform_reaches_both_ends_equally_often() -> None:
    found = Counter(budgets(7000, kind="uniform", low=3, high=9))
    assert sorted(found) == list(range(3, 10))
    assert all(within_5_sigma(count, 7000, 1 / 7) for count in found.values()), found


def test_list_and_fixed() -> None:
    found = Counter(budgets(3000, kind="list", choices=(64, 128, 512)))
    assert sorted(found) == [64, 128, 512]
    assert all(within_5_sigma(count, 3000, 1 / 3) for count in found.values()), found
    assert set(budgets(50, kind="fixed", choices=(77,))) == {77}
    assert set(budgets(50, low=5, high=5)) == {5}
    assert set(budgets(50, kind="uniform", low=5, high=5)) == {5}


def test_the_highest_quantile_stays_in_range() -> None:
    almost_one = 1 - 2**-53
    for low, high in ((64, 1024), (1, 1), (2, 2), (3, 64), (5, 5), (3, 10**6), (512, 8192)):
        for kind in ("log_uniform", "uniform"):
            sampler = BudgetSampler(BudgetSampling(kind=kind, low=low, high=high), 8)
            assert (sampler._budget(0.0), sampler._budget(almost_one)) == (low, high)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_share_without_compression(share: float) -> None:
    full = sum(d.budget is None for d in draws(full_share=share))
    assert within_5_sigma(full, 4000, share)


def test_full_steps_do_not_shift_the_other_draws() -> None:
    """With another share, the steps that are compressed in both keep their budget and chunk length."""
    few, many = draws(300, full_share=0.1, chunk_jitter=0.5), draws(300, full_share=0.6, chunk_jitter=0.5)
    assert [d.chunk_tokens for d in few] == [d.chunk_tokens for d in many]
    both = [
        (a.budget, b.budget) for a, b in zip(few, many, strict=True) if a.budget is not None and b.budget is not None
    ]
    assert len(both) > 50
    assert all(a == b for a, b in both)


def test_chunk_jitter_covers_its_range_evenly() -> None:
    lengths = [d.chunk_tokens for d in draws(chunk_tokens=1000, chunk_jitter=0.25)]
    assert min(lengths) >= 750
    assert max(lengths) <= 1250
    for first in range(750, 1250, 100):
        assert within_5_sigma(sum(first <= x < first + 100 for x in lengths), 4000, 0.2)
    assert {d.chunk_tokens for d in draws(50, chunk_tokens=1000)} == {1000}
    assert min(d.chunk_tokens for d in draws(200, chunk_tokens=1, chunk_jitter=0.9)) == 1


def test_chunk_length_and_budget_are_independent() -> None:
    found = [d for d in draws(4000, low=64, high=1023, chunk_jitter=0.5) if d.budget is not None]
    small = [d for d in found if d.budget is not None and d.budget < 256]
    assert within_5_sigma(sum(d.chunk_tokens > 1000 for d in small), len(small), 0.5)


def test_draws_depend_on_seed_and_step_alone() -> None:
    sampler = BudgetSampler(BudgetSampling(chunk_jitter=0.5), 100)
    forward = [sampler.draw(step) for step in range(40)]
    assert [BudgetSampler(BudgetSampling(chunk_jitter=0.5), 100).draw(s) for s in reversed(range(40))] == forward[::-1]
    assert len(set(forward)) > 30
    assert forward != [BudgetSampler(BudgetSampling(chunk_jitter=0.5, seed=1), 100).draw(s) for s in range(40)]


def test_draws_are_the_same_in_another_process() -> None:
    """Guards against Python's per-process hash seed, and against a change of the draws between versions."""
    code = (
        "from omnimem_train.budget_sampling import *\n"
        "s = BudgetSampler(BudgetSampling(low=64, high=512, chunk_jitter=0.5, seed=3), 64)\n"
        "print([(s.draw(i).budget, s.draw(i).chunk_tokens) for i in range(6)])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert found == "[(132, 95), (206, 86), (394, 33), (None, 75), (298, 54), (134, 49)]"


def test_state_is_json_and_accepted_by_the_same_settings() -> None:
    config = BudgetSampling(kind="list", choices=(1, 2))
    state = json.loads(json.dumps(BudgetSampler(config, 64).state_dict()))
    BudgetSampler(config, 64).load_state_dict(state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"high": 9000}, "high: 8192 then, 9000 now"),
        ({"seed": 1}, "seed: 0 then, 1 now"),
        ({"full_share": 0.2}, "full_share: 0.1 then, 0.2 now"),
        ({"kind": "list", "choices": (5,)}, r"kind: 'log_uniform' then, 'list' now; choices: \[\] then, \[5\] now"),
    ],
)
def test_state_of_other_settings_is_refused(changes: dict[str, Any], message: str) -> None:
    state = BudgetSampler(BudgetSampling(), 64).state_dict()
    with pytest.raises(UserError, match=message):
        BudgetSampler(replace(BudgetSampling(), **changes), 64).load_state_dict(state)


def test_state_of_another_chunk_length_or_fingerprint_is_refused() -> None:
    state = BudgetSampler(BudgetSampling(), 64).state_dict()
    with pytest.raises(UserError, match="chunk_tokens: 64 then, 32 now"):
        BudgetSampler(BudgetSampling(), 32).load_state_dict(state)
    with pytest.raises(UserError, match="the fingerprints differ"):
        BudgetSampler(BudgetSampling(), 64).load_state_dict(state | {"fingerprint": "0" * 16})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "loguniform"}, "'loguniform' is not one of .*; did you mean 'log_uniform'"),
        ({"kind": "list"}, "needs choices"),
        ({"kind": "fixed", "choices": (1, 2)}, "exactly one entry"),
        ({"kind": "fixed"}, "exactly one entry"),
        ({"choices": (1, 2)}, "makes no use of choices"),
        ({"kind": "list", "choices": (0, 2)}, "1 token or more"),
        ({"low": 0}, "low=0"),
        ({"low": 9, "high": 8}, "low=9 and high=8"),
        ({"full_share": 1.1}, "full_share=1.1"),
        ({"full_share": -0.1}, "full_share=-0.1"),
        ({"chunk_jitter": 1.0}, "chunk_jitter=1.0"),
        ({"chunk_jitter": -0.1}, "chunk_jitter=-0.1"),
        ({"full_share": 2, "low": 0}, "low=0.*full_share=2"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BudgetSampling(**settings)


def test_bands_are_equally_likely_and_every_draw_falls_in_one() -> None:
    config = BudgetSampling(low=64, high=4095)
    assert config.bands() == ["64-255", "256-1023", "1024-4095", "full"]
    found = Counter(config.band_of(d.budget) for d in draws(6000, low=64, high=4095))
    assert set(found) == set(config.bands())
    assert all(within_5_sigma(found[band], 6000, 0.3) for band in config.bands()[:3]), found
    assert [config.band_of(b) for b in (64, 255, 256, 1023, 1024, 4095, None)] == [
        name for name in config.bands()[:3] for _ in range(2)
    ] + ["full"]


def test_bands_of_other_kinds() -> None:
    assert BudgetSampling(kind="uniform", low=1, high=90, full_share=0).bands() == ["1-30", "31-60", "61-90"]
    lists = BudgetSampling(kind="list", choices=(128, 64, 128), full_share=0)
    assert lists.bands() == ["64", "128"]
    assert lists.band_of(128) == "128"
    assert BudgetSampling(kind="fixed", choices=(9,)).bands() == ["9", "full"]


@pytest.mark.parametrize("kind", ["log_uniform", "uniform"])
@pytest.mark.parametrize(
    ("low", "high", "n"), [(1, 1, 3), (1, 2, 3), (5, 6, 4), (10, 11, 1), (1, 7, 5), (100, 3000, 6)]
)
def test_bands_tile_the_range(kind: str, low: int, high: int, n: int) -> None:
    config = BudgetSampling(kind=kind, low=low, high=high, full_share=0)
    names = config.bands(n)
    assert 1 <= len(names) <= n
    in_order = list(dict.fromkeys(config.band_of(b, n) for b in range(low, high + 1)))
    assert in_order == names
    ends = [[int(x) for x in name.split("-")] for name in names]
    assert sum(e[-1] - e[0] + 1 for e in ends) == high - low + 1
