"""How a budget is split over picture and sound: exact sums, floors, hand-over of the unused, the paper's formula."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from candidates import candidates, stream_of
from torch import Tensor

from omnimem_train.errors import UserError
from omnimem_train.memory import (
    AUDIO,
    TEXT,
    VISUAL,
    Candidates,
    Fixed,
    Scored,
    allocations,
    choose,
    layer_complexity,
    layer_table,
    make_allocation,
    make_selector,
)
from omnimem_train.memory.redundancy import neighbour_cosine

SPENDERS = [
    ("shared", {}),
    ("shared", {"floor": 0.3}),
    ("split", {}),
    ("split", {"audio": 0.0}),
    ("split", {"audio": 1.0, "floor": 0.0}),
    ("avba", {}),
    ("avba", {"prior": 0.0}),
    ("mass", {}),
    ("mass", {"floor": 0.5}),
]


def scored_at_random(c: Candidates, seed: int = 0) -> Scored:
    draw = torch.Generator().manual_seed(seed)
    score, importance = (torch.rand(c.shape, generator=draw, dtype=torch.float64) for _ in range(2))
    return Scored(score, importance, 2 * torch.rand(c.shape, generator=draw, dtype=torch.float64) - 1)


def kept(c: Candidates, name: str, budget: int, scored_by: str = "knorm", **options: Any) -> tuple[Tensor, Tensor]:
    """(B, G) numbers of visual and audio tokens that stay."""
    rows, _ = choose(c, make_selector(scored_by), make_allocation(name, **options), budget)
    modality = c.tokens.modality.gather(-1, rows)
    return (modality == VISUAL).sum(-1), (modality == AUDIO).sum(-1)


def counts_of(c: Candidates, name: str, scored: Scored, budget: int, **options: Any) -> dict[Any, Tensor]:
    return dict(make_allocation(name, **options).counts(c, scored, budget))


@pytest.mark.parametrize(("name", "options"), SPENDERS, ids=str)
@pytest.mark.parametrize("mix", ["both", "visual", "audio"])
def test_sums_are_exact_and_possible(name: str, options: dict[str, Any], mix: str) -> None:
    c = candidates(mix=mix)
    scored, n_media = scored_at_random(c), c.n - c.n_text
    for budget in range(1, n_media + 1):
        total, taken = torch.zeros(2, 2, dtype=torch.int64), torch.zeros_like(c.is_text)
        for group, count in make_allocation(name, **options).counts(c, scored, budget):
            left = (c.members(group) & ~taken).sum(-1)
            assert (count >= 0).all()
            assert (count <= left).all()
            picked = make_selector("knorm").pick(c, scored.score, c.members(group) & ~taken, count.expand(2, 2))
            taken = taken | picked
            total = total + count
        assert (total == budget).all()
        assert (taken.sum(-1) == budget).all()


def test_heads_may_differ_in_what_they_hold() -> None:
    """A memory that a shared budget has made uneven can go on under a split."""
    uneven = candidates(make_selector("knorm"), n_old=45, n_forgotten=15, n_chunk=9, seed=4)
    assert ((uneven.tokens.modality == VISUAL).sum(-1).diff(dim=-1) != 0).any()
    for name, options in SPENDERS:
        for budget in (1, 5, 20, uneven.n - uneven.n_text - 1):
            visual, audio = kept(uneven, name, budget, **options)
            assert (visual + audio == budget).all()


@pytest.mark.parametrize(("share", "wanted"), [(0.0, (10, 0)), (0.25, (8, 2)), (0.3, (7, 3)), (1.0, (2, 8))])
def test_split_rounds_and_hands_over(share: float, wanted: tuple[int, int]) -> None:
    c = candidates(n_old=9, n_forgotten=0, n_chunk=27)  # 24 visual, 8 audio, 4 text
    visual, audio = kept(c, "split", 10, audio=share, floor=0.0)
    assert (visual[0, 0], audio[0, 0]) == wanted


def test_floors_keep_both() -> None:
    c = candidates(n_old=9, n_forgotten=0, n_chunk=27)
    for name in ("split", "avba", "mass", "shared"):
        loud = make_selector("knorm").score(c, 10).score.masked_fill(c.tokens.modality == AUDIO, -1e6)
        importance = (c.tokens.modality == VISUAL).double()
        scored = Scored(loud, importance, torch.zeros_like(importance))
        options = {"audio": 0.0} if name == "split" else {}
        for floor, least in ((0.0, 0), (0.01, 1), (0.25, 2), (0.5, 5)):
            if name == "shared" and floor == 0:
                continue
            counts = counts_of(c, name, scored, 10, floor=floor, **options)
            assert (counts[(AUDIO,)] == least).all(), (name, floor)
        assert (counts_of(c, name, scored, 1, floor=0.5, **options)[(AUDIO,)] == 0).all(), "one token cannot be both"


def test_shared_floor_takes_the_best_of_each_then_the_best_of_all() -> None:
    c = candidates(n_old=0, n_forgotten=0, n_chunk=36, batch=1, kv_heads=1)
    is_audio = c.tokens.modality == AUDIO
    score = torch.arange(c.n, dtype=torch.float32).expand(c.shape) - 1000 * is_audio

    @dataclasses.dataclass(frozen=True)
    class Given(type(make_selector("full"))):  # type: ignore[misc]
        name = "given"
        keeps_all = False

        def score(self, c: Candidates, keep: int) -> Scored:
            return Scored(score)

    rows, _ = choose(c, Given(), make_allocation("shared", floor=0.2), 10)
    modality = c.tokens.modality[0, 0]
    audio = [r for r in rows[0, 0].tolist() if modality[r] == AUDIO]
    visual = [r for r in rows[0, 0].tolist() if modality[r] == VISUAL]
    assert audio == (modality == AUDIO).nonzero().flatten().tolist()[-2:]
    assert visual == (modality == VISUAL).nonzero().flatten().tolist()[-8:]


def test_fixed_leaves_unused_share_unused() -> None:
    c = candidates(n_old=9, n_forgotten=0, n_chunk=27)  # 24 visual, 8 audio
    for audio, visual in ((3, 5), (20, 5), (3, 99), (0, 7), (20, 99)):
        rows, _ = choose(c, make_selector("knorm"), Fixed(audio=audio, visual=visual), audio + visual)
        modality = c.tokens.modality.gather(-1, rows)
        assert ((modality == AUDIO).sum(-1) == min(8, audio)).all()
        assert ((modality == VISUAL).sum(-1) == min(24, visual)).all()
        assert ((modality == TEXT).sum(-1) == 4).all()


def test_fixed_needs_equal_streams() -> None:
    c = candidates(make_selector("knorm"), n_old=45, n_forgotten=15, n_chunk=9, seed=4)
    with pytest.raises(ValueError, match="would keep between"):
        choose(c, make_selector("knorm"), Fixed(audio=99, visual=8), 107)


def test_avba_is_the_papers_formula() -> None:
    """C_m = entropy (1 - mean s) / log n, shares C_v r : C_a; two kv heads are averaged."""
    c, budget, prior = candidates(dtype=torch.float64), 20, 3.0
    scored = scored_at_random(c)
    assert scored.importance is not None
    assert scored.redundancy is not None
    for b in range(2):
        found = {}
        for kind in (VISUAL, AUDIO):
            per_head = []
            for g in range(2):
                here = c.tokens.modality[b, g] == kind
                p = scored.importance[b, g][here] / scored.importance[b, g][here].sum()
                entropy = -sum(float(x) * math.log(float(x)) for x in p)
                mean = float(scored.redundancy[b, g][here].mean())
                per_head.append(entropy * (1 - mean) / math.log(int(here.sum())))
            found[kind] = sum(per_head) / 2
        share = found[AUDIO] / (found[VISUAL] * prior + found[AUDIO])
        counts = counts_of(c, "avba", scored, budget, prior=prior, floor=0.0)
        assert counts[(AUDIO,)][b].tolist() == [round(share * budget)] * 2


def test_avba_measures_redundancy_itself() -> None:
    c = candidates(dtype=torch.float64)
    given = scored_at_random(c)
    without = Scored(given.score, given.importance)
    spelled = Scored(given.score, given.importance, neighbour_cosine(c.tokens.keys, c.tokens.modality))
    for budget in (10, 25):
        for left, right in zip(
            counts_of(c, "avba", without, budget).values(), counts_of(c, "avba", spelled, budget).values(), strict=True
        ):
            assert torch.equal(left, right)


def test_avba_prior_moves_the_share() -> None:
    c = candidates()
    audio = [
        int(counts_of(c, "avba", scored_at_random(c), 20, prior=r, floor=0.0)[(AUDIO,)][0, 0]) for r in (0.1, 1, 5)
    ]
    assert audio[0] >= audio[1] > audio[2]


def test_mass_is_proportional_to_what_was_measured() -> None:
    c = candidates(n_old=9, n_forgotten=0, n_chunk=27)
    importance = torch.where(c.tokens.modality == AUDIO, 3.0, 1.0).masked_fill(c.is_text, 1e6)
    counts = counts_of(c, "mass", Scored(importance, importance), 20)
    assert (counts[(AUDIO,)] == 10 - 2).all()  # 24 x 1 : 8 x 3 asks for 10; only 8 are there
    counts = counts_of(c, "mass", Scored(importance, importance), 12)
    assert (counts[(AUDIO,)] == 6).all()
    repeated = torch.where(c.tokens.modality == AUDIO, 0.5, 0.0)
    counts = counts_of(c, "mass", Scored(importance, importance, repeated), 12)
    assert (counts[(AUDIO,)] == 4).all()  # 24 : 12


def test_mass_of_a_rule_without_importance_is_its_score_above_the_lowest() -> None:
    c = candidates(n_old=9, n_forgotten=0, n_chunk=27)
    score = torch.where(c.tokens.modality == AUDIO, -1.0, -4.0)
    counts = counts_of(c, "mass", Scored(score), 12, floor=0.0)
    assert (counts[(VISUAL,)] == 12 - 8).all()  # all mass is audio's, of which there are 8
    for name in ("avba", "mass"):  # nothing measured at all: shares of the candidates
        counts = counts_of(c, name, Scored(torch.zeros(c.shape)), 12, floor=0.0)
        assert (counts[(AUDIO,)] == 3).all()


@pytest.mark.parametrize(("name", "options"), SPENDERS, ids=str)
def test_a_split_does_not_depend_on_the_batch(name: str, options: dict[str, Any]) -> None:
    selector = make_selector("perturbation")
    c = candidates(selector, dtype=torch.float64)
    together = choose(c, selector, make_allocation(name, **options), 9)[0]
    for b in range(2):
        assert torch.equal(choose(stream_of(c, b), selector, make_allocation(name, **options), 9)[0][0], together[b])


def test_layer_complexity_ignores_text() -> None:
    c = candidates(dtype=torch.float64, batch=1, kv_heads=1)
    scored = scored_at_random(c)
    assert scored.importance is not None
    assert scored.redundancy is not None
    media = ~c.is_text
    p = scored.importance[media] / scored.importance[media].sum()
    wanted = -(p * p.log()).sum() * (1 - scored.redundancy[media].mean())
    assert layer_complexity(c, scored) == pytest.approx(float(wanted))


def test_layer_table_is_a_softmax_with_an_exact_sum() -> None:
    assert layer_table([1.0, 1.0, 1.0], 9) == [3, 3, 3]
    assert layer_table([0.0, 0.2 * math.log(3)], 2 + 400, temperature=0.2) == [101, 301]
    assert layer_table([0.0, 100.0], 10) == [1, 9]
    assert layer_table([0.0, 0.2 * math.log(4)], 4) == [
        1,
        3,
    ]  # 0.4 and 1.6 of the 2 to spare: the larger rest rounds up
    for total in range(5, 60):
        table = layer_table([0.1, 0.5, 0.2, 0.9, 0.3], total)
        assert sum(table) == total
        assert min(table) >= 1
    with pytest.raises(UserError, match="total=2 is out of range"):
        layer_table([1.0, 1.0, 1.0], 2)


def test_all_names_are_known() -> None:
    assert {"shared", "split", "avba", "mass", "fixed"} <= set(allocations())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("splt", {}, "unknown allocation 'splt'; did you mean 'split'?"),
        ("split", {"audoi": 0.5}, "allocation 'split' has no option 'audoi'; did you mean 'audio'?"),
        ("split", {"audio": "half"}, "option audio='half' of allocation 'split' is not of type float"),
        ("split", {"audio": 1.5}, "option audio=1.5 is out of range"),
        ("split", {"floor": 0.6}, "option floor=0.6 is out of range"),
        ("shared", {"floor": -0.1}, "option floor=-0.1 is out of range"),
        ("avba", {"prior": -1.0}, "option prior=-1.0 is out of range"),
        ("avba", {"floor": 0.9}, "give between 0 and 0.5"),
        ("mass", {"floor": 0.9}, "give between 0 and 0.5"),
        ("fixed", {"audio": 3}, "allocation 'fixed' needs the option 'visual'"),
        ("fixed", {"audio": -3, "visual": 3}, "option audio=-3 is out of range"),
        ("fixed", {"audio": 3, "visual": -3}, "option visual=-3 is out of range"),
        ("fixed", {"audio": "3", "visual": 3}, "option audio='3' of allocation 'fixed' is not of type int"),
    ],
)
def test_wrong_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        make_allocation(name, **options)
    assert message in str(error.value)
