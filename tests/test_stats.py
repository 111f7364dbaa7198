"""Statistics against values known from elsewhere, against brute force, and by simulation."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import pytest

from omnimem_train.errors import UserError
from omnimem_train.stats import (
    Accuracy,
    Outcome,
    accuracy,
    by_category,
    category_table,
    compare,
    holm,
    mcnemar,
    sign_flip,
    t_cdf,
    t_quantile,
    wilson,
)

Z = NormalDist().inv_cdf(0.975)


def outcomes(clips: Sequence[Sequence[bool | None]], category: str = "") -> list[Outcome]:
    """One inner list a clip, one entry a question."""
    return [
        Outcome(f"{category}{c}-{q}", f"clip{c}", correct, category)
        for c, clip in enumerate(clips)
        for q, correct in enumerate(clip)
    ]


def singles(right: int, n: int) -> list[Outcome]:
    return outcomes([[i < right] for i in range(n)])


# Quantiles and intervals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("df", "expected"),  # printed tables of Student's t, two-sided 95 %
    (
        {1: 12.7062047, 2: 4.30265273, 3: 3.18244631, 4: 2.77644511, 5: 2.57058184, 10: 2.22813885}
        | {29: 2.04522964, 30: 2.04227246, 100: 1.98397152, 1000: 1.96233908}
    ).items(),
)
def test_t_quantile(df: int, expected: float) -> None:
    assert t_quantile(0.975, df) == pytest.approx(expected, rel=1e-8)
    assert t_cdf(t_quantile(0.9, df), df) == pytest.approx(0.9, abs=1e-12)


def test_t_cdf_is_the_integral_of_its_density() -> None:
    for df in (1, 2, 5, 8):
        constant = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
        grid = np.linspace(0, 1.7, 20001)
        density = constant * (1 + grid**2 / df) ** (-(df + 1) / 2)
        assert t_cdf(1.7, df) == pytest.approx(0.5 + np.trapezoid(density, grid), abs=1e-8)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),  # Newcombe (1998), table I: score method without continuity correction
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_one_question_a_clip_is_wilson(right: int, n: int, low: float, high: float) -> None:
    found = accuracy(singles(right, n))
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert (found.value, found.n, found.clips, found.design_effect) == (right / n, n, n, 1.0)
    assert (found.low, found.high) == wilson(right / n, n, Z)


def test_wilson_contains_its_share_exactly() -> None:
    """0 of n and n of n are ends of the interval, not 1e-17 outside or inside."""
    for n in range(1, 200):
        assert wilson(0.0, n, Z)[0] == 0.0
        assert wilson(1.0, n, Z)[1] == 1.0


def test_clustered_interval_by_hand() -> None:
    """Clips with 2/2, 0/2, 1/1, 1/3 right: p = 1/2, residual sums 1, -1, 1/2, -1/2, variance 4/3 * 2.5 / 64."""
    found = accuracy(outcomes([[True, True], [False, False], [True], [True, False, False]]))
    variance = 4 / 3 * 2.5 / 64
    effect = variance / (0.25 / 7)
    assert found.value == 0.5
    assert found.design_effect == pytest.approx(effect)
    n_effective, t = 8 / effect, 3.18244631
    reach = t / (1 + t * t / n_effective) * math.sqrt(0.25 / n_effective + t * t / (4 * n_effective**2))
    assert (found.low, found.high) == (pytest.approx(0.5 - reach), pytest.approx(0.5 + reach))


def test_identical_answers_within_a_clip_count_as_one() -> None:
    """Five copies of each question: the interval is about that of the clips alone, not of five times the data."""
    clips = [i % 3 == 0 for i in range(60)]
    one, five = accuracy(outcomes([[c] for c in clips])), accuracy(outcomes([[c] * 5 for c in clips]))
    assert five.design_effect == pytest.approx(5, rel=0.02)
    assert (five.low, five.high) == (pytest.approx(one.low, abs=0.005), pytest.approx(one.high, abs=0.005))


def test_clustering_never_narrows_below_independent_questions() -> None:
    """One right and one wrong in every clip: negative correlation earns no credit."""
    found = accuracy(outcomes([[True, False]] * 30))
    assert found.design_effect == pytest.approx(0, abs=1e-12)
    assert (found.low, found.high) == wilson(0.5, 60, t_quantile(0.975, 29))


def test_all_right_keeps_a_width_that_clips_decide() -> None:
    found = accuracy(outcomes([[True] * 10] * 12))
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == wilson(1.0, 12, t_quantile(0.975, 11))[0]
    assert math.isnan(found.design_effect)
    none = accuracy(outcomes([[False] * 10] * 12))
    assert (none.low, none.high) == (0.0, pytest.approx(1 - found.low))


def test_one_clip_says_nothing_about_others() -> None:
    found = accuracy(outcomes([[True, False, True]]))
    assert (found.low, found.high) == (0.0, 1.0)


def test_level() -> None:
    narrow, wide = accuracy(singles(7, 20), level=0.5), accuracy(singles(7, 20), level=0.99)
    assert narrow.low > wide.low
    assert (wide.low, wide.high) == wilson(0.35, 20, NormalDist().inv_cdf(0.995))


def simulate(rng: random.Random, clips: int, shared: bool) -> tuple[list[Outcome], list[Outcome]]:
    """Accuracies .6 and .7 with independent questions; .6 and .65 where clips share their difficulty and their lift."""
    base, other = [], []
    for c in range(clips):
        ease, lift = (rng.choice((0.3, 0.9)), rng.choice((-0.1, 0.3))) if shared else (0.6, 0.1)
        for q in range(rng.randint(1, 8)):
            luck = rng.random()
            base.append(Outcome(f"{c}-{q}", f"{c}", luck < ease))
            other.append(Outcome(f"{c}-{q}", f"{c}", luck < ease + lift))
    return base, other


def test_intervals_cover_the_truth_95_times_in_100() -> None:
    """1,000 evaluations of 40 clips with 1 to 8 questions: coverage of 95 % +- 2 points; ignoring clips: below 85 %."""
    rng = random.Random(3)
    inside = {"accuracy": 0, "naive": 0, "difference": 0}
    for _ in range(1000):
        base, other = simulate(rng, 40, shared=True)
        found, change = accuracy(base), compare(base, other)
        naive = wilson(found.value, found.n, Z)
        inside["accuracy"] += found.low <= 0.6 <= found.high
        inside["naive"] += naive[0] <= 0.6 <= naive[1]
        # for easy clips the lift of .3 is cut off at certainty: the mean is (-.1 + .3 - .1 + .1) / 4
        inside["difference"] += change.low <= 0.05 <= change.high
    assert 930 <= inside["accuracy"] <= 975, inside
    assert 930 <= inside["difference"] <= 980, inside
    assert inside["naive"] < 850, "the simulation has no clustering to notice"


def test_intervals_of_few_independent_questions_cover() -> None:
    rng = random.Random(4)
    inside = 0
    for _ in range(1000):
        base, other = simulate(rng, 12, shared=False)
        found, change = accuracy(other), compare(base, other)
        inside += (found.low <= 0.7 <= found.high) + (change.low <= 0.1 <= change.high)
    assert 1880 <= inside <= 1990, inside


# Comparisons ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gained", "lost", "expected"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 0, 2 / 32),
        (0, 6, 2 / 64),
        (1, 9, 2 * 11 / 1024),  # (1 + 10) of 1,024 patterns on each side
        (4, 4, 1.0),
        (3, 12, 2 * (1 + 15 + 105 + 455) / 2**15),
    ],
)
def test_mcnemar_by_hand(gained: int, lost: int, expected: float) -> None:
    assert mcnemar(gained, lost) == pytest.approx(expected, rel=1e-14)
    assert mcnemar(lost, gained) == mcnemar(gained, lost)


def test_mcnemar_of_thousands_of_pairs() -> None:
    p = mcnemar(2100, 1900)
    z = (200 - 1) / math.sqrt(4000)
    assert p == pytest.approx(2 * (1 - NormalDist().cdf(z)), rel=0.01)
    assert 0 < mcnemar(3000, 1000) < 1e-200


def test_sign_flip_equals_mcnemar_with_one_question_a_clip() -> None:
    for gained, lost in ((5, 0), (3, 12), (4, 4), (0, 0), (60, 41)):
        assert sign_flip([1] * gained + [-1] * lost + [0] * 7) == pytest.approx(mcnemar(gained, lost), rel=1e-10)


def test_sign_flip_equals_trying_all_patterns() -> None:
    rng = random.Random(0)
    for _ in range(20):
        sums = [rng.randint(-4, 5) for _ in range(9)]
        totals = [
            abs(sum(s * f for s, f in zip(sums, flips, strict=True))) for flips in itertools.product((1, -1), repeat=9)
        ]
        assert sign_flip(sums) == pytest.approx(sum(t >= abs(sum(sums)) for t in totals) / 512, rel=1e-12)


def test_clip_level_test_is_the_more_cautious_when_questions_agree() -> None:
    """Four clips gain five questions each: 20 gains look overwhelming, four clips are not."""
    base, other = outcomes([[False] * 5] * 4 + [[True]] * 6), outcomes([[True] * 5] * 4 + [[True]] * 6)
    found = compare(base, other)
    assert (found.gained, found.lost, found.n, found.clips) == (20, 0, 26, 10)
    assert found.p_mcnemar == 2 / 2**20
    assert found.p_clustered == 2 / 2**4


def test_p_values_under_no_difference_are_not_too_small() -> None:
    """Clip-wise random winners: at the 5 % level the clip test rejects at most 5 %, McNemar far more."""
    rng = random.Random(1)
    rejected = {"clustered": 0, "mcnemar": 0}
    for _ in range(400):
        winner = [rng.random() < 0.5 for _ in range(20)]
        base = outcomes([[w] * 6 for w in winner])
        other = outcomes([[not w] * 6 for w in winner])
        found = compare(base, other)
        rejected["clustered"] += found.p_clustered <= 0.05
        rejected["mcnemar"] += found.p_mcnemar <= 0.05
    assert rejected["clustered"] <= 30, rejected
    assert rejected["mcnemar"] > 100, rejected


def test_difference_by_hand() -> None:
    """12 clips of one question, 4 gained, 1 lost. Bonett & Price: 5/14 and 2/14 against; here with 14/13 and t(11)."""
    base = outcomes([[False]] * 4 + [[True]] + [[True]] * 7)
    other = outcomes([[True]] * 4 + [[False]] + [[True]] * 7)
    found = compare(base, other)
    assert found.value == pytest.approx(3 / 12)
    centre = 3 / 14
    variance = (7 / 14 - centre**2) / 14 * 14 / 13
    reach = 2.20098516 * math.sqrt(variance)
    assert (found.low, found.high) == (pytest.approx(centre - reach), pytest.approx(centre + reach))


def test_no_change_is_not_certainty_and_extremes_stay_in_range() -> None:
    same = singles(5, 10)
    found = compare(same, same)
    assert (found.value, found.p_mcnemar, found.p_clustered) == (0.0, 1.0, 1.0)
    assert found.low == pytest.approx(-found.high)
    assert 0.1 < found.high < 0.5
    best = compare(singles(0, 4), singles(4, 4))
    assert best.value == 1.0
    assert best.high == 1.0
    alone = compare(outcomes([[True, False]]), outcomes([[True, True]]))
    assert (alone.low, alone.high) == (-1.0, 1.0)


def test_comparison_is_antisymmetric_and_pairs_by_question() -> None:
    rng = random.Random(2)
    base, other = simulate(rng, 15, shared=True)
    rng.shuffle(other)
    there, back = compare(base, other), compare(other, base)
    assert (there.gained, there.lost) == (back.lost, back.gained)
    assert (there.low, there.high) == (pytest.approx(-back.high), pytest.approx(-back.low))
    assert there.p_clustered == back.p_clustered
    assert there.value == pytest.approx(accuracy(other).value - accuracy(base).value)
    assert there.gained == sum(o.correct > {b.item: b for b in base}[o.item].correct for o in other)  # type: ignore[operator]


def test_failed_questions_count_as_wrong() -> None:
    found = accuracy(outcomes([[True], [None], [False], [None]]))
    assert (found.value, found.failed, found.coverage) == (0.25, 2, 0.5)
    change = compare(outcomes([[True], [None], [False]]), outcomes([[None], [True], [None]]))
    assert (change.gained, change.lost) == (1, 1)


def test_other_questions_duplicates_and_nothing_are_refused() -> None:
    with pytest.raises(UserError, match=r"not get the same questions; 1 are in one alone, e\.g\. '3-0'"):
        compare(singles(1, 3), singles(1, 4))
    with pytest.raises(UserError, match="'0-0' appears twice"):
        accuracy([*singles(1, 2), *singles(1, 1)])
    with pytest.raises(UserError, match="no questions"):
        accuracy([])
    with pytest.raises(UserError, match="no questions"):
        compare([], [])


def pool(runs: Sequence[Sequence[Outcome]]) -> list[Outcome]:
    """The runs' answers to each question as one outcome."""
    n = len(runs)
    return [Outcome(o[0].item, o[0].clip, sum(x.share for x in o) / n, answers=n) for o in zip(*runs, strict=True)]


def test_pooled_answers_are_no_further_questions() -> None:
    """The same answers three times: one set of questions, with the interval and the p-values of one run."""
    rng = random.Random(6)
    base, other = simulate(rng, 25, shared=True)
    thrice, again = pool([base] * 3), pool([other] * 3)
    assert accuracy(thrice) == accuracy(base)
    assert compare(thrice, again) == compare(base, other)
    assert compare(base, again) == compare(base, other)  # one answer against three


def test_pooled_difference_by_hand() -> None:
    """Two budgets; clips of one question gain 1, 1/2, 1/2 and lose 1/2, eight stay. Adjusted by +1 and -1 as ever."""
    base = pool([outcomes([[False]] * 4 + [[True]] * 8), outcomes([[False]] * 3 + [[True]] * 9)])
    other = pool([outcomes([[True]] * 3 + [[False]] + [[True]] * 8), outcomes([[True]] + [[False]] * 3 + [[True]] * 8)])
    found = compare(base, other)
    assert (found.n, found.gained, found.lost) == (12, 3, 1)
    assert found.value == pytest.approx(1.5 / 12)
    centre = 1.5 / 14
    variance = ((1 + 3 * 0.25 + 2) / 14 - centre**2) / 14 * 14 / 13
    reach = 2.20098516 * math.sqrt(variance)
    assert (found.low, found.high) == (pytest.approx(centre - reach), pytest.approx(centre + reach))
    assert found.p_clustered == sign_flip([2, 1, 1, -1])  # in halves
    assert found.p_mcnemar == mcnemar(3, 1)


def test_pooled_accuracy_by_hand() -> None:
    """Residual sums of clips with shares (1, 1/2), (0, 1/2): 1/2 and -1/2, variance 2 * (1/4 + 1/4) / 16."""
    runs = outcomes([[True, True], [False, True]]), outcomes([[True, False], [False, False]])
    found = accuracy(pool(runs))
    assert (found.value, found.n, found.failed) == (0.5, 4, 0)
    assert found.design_effect == pytest.approx(2 * 0.5 / 16 / (0.25 / 3))


# Families and tables --------------------------------------------------------------------------------------------------


def test_holm_by_hand() -> None:
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(found) == ["a", "b", "c", "d"]
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}
    assert holm({"only": 0.04}) == {"only": 0.04}


def test_holm_keeps_the_error_of_the_family() -> None:
    rng = random.Random(5)
    wrong = sum(min(holm({str(i): rng.random() for i in range(10)}).values()) <= 0.05 for _ in range(2000))
    assert 60 <= wrong <= 140


def test_categories_and_table() -> None:
    base = outcomes([[True, False], [True]], "sound") + outcomes([[None]], "order|x")
    other = outcomes([[True, True], [True]], "sound") + outcomes([[True]], "order|x")
    parts = by_category(base)
    assert list(parts) == ["order|x", "sound"]
    assert isinstance(parts["sound"], Accuracy)
    assert (parts["sound"].value, parts["sound"].n, parts["sound"].clips) == (pytest.approx(2 / 3), 3, 2)
    lines = category_table({"base": base, "adapter": other}).splitlines()
    assert lines[0] == "| condition | all | order\\|x (n=1) | sound (n=3) | answered |"
    assert lines[1] == "| --- | --- | --- | --- | --- |"
    assert lines[2].startswith("| base | 50.0 [")
    assert lines[2].endswith("| 3/4 |")
    assert lines[3].startswith("| adapter | 100.0 [")
    assert f"| {parts['sound']} |" in lines[2]


def test_text_of_results() -> None:
    assert str(accuracy(singles(15, 148))) == "10.1 [6.2, 16.0]"
    assert str(compare(singles(5, 10), singles(5, 10))).startswith("+0.0 [-")
