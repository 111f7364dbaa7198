"""Statistics of a multiple-choice evaluation: accuracy with its interval, paired comparison, families of tests.

Questions about one clip are not independent: a clip that is understood gives several right answers. Intervals here are
clustered by clip, as Miller, "Adding Error Bars to Evals" (arXiv 2411.00640) advises for grouped questions.

    accuracy     Wilson interval on an effective sample size (Korn & Graubard 1998; Dean & Pagano 2015): the variance of
                 the mean is taken from the sums of residuals per clip (ratio estimator, G / (G - 1) correction), its
                 ratio to that of simple random sampling is the design effect, n_eff = n / design effect, at most n;
                 quantile of t with G - 1 degrees of freedom. With one question a clip it is Wilson's interval itself.
    difference   adjusted Wald interval of Bonett & Price (2012): one question gained and one lost are added, so the
                 interval keeps a width when nothing changed; variance from residuals per clip and quantile of t as
                 above. With one question a clip it is theirs with (n + 2) / (n + 1) and t.
    p-values     McNemar's exact test, which takes questions as independent, and an exact sign-flip test, which takes
                 clips as independent. They are equal with one question a clip.
    family       Holm's step-down adjustment.

A question that failed (broken file, unreadable answer) counts as wrong, and is counted.

Several answers to one question (budgets, seeds, models) are no further questions: they are pooled into one outcome, the
share of them that was right. The interval of an accuracy is at least as wide as if each question were right or wrong at
that rate; a difference is taken question by question, and its interval follows the pooled values.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from omnimem_train.errors import UserError


@dataclass(frozen=True)
class Outcome:
    """How one question went.

    Attributes:
        item: id of the question, unique within a run.
        clip: id of the file it is about.
        correct: None when it failed; the share that was right, where several answers are pooled.
        category: for tables.
        answers: how many are pooled; `correct` times this is a whole number.
    """

    item: str
    clip: str
    correct: bool | float | None
    category: str = ""
    answers: int = 1

    @property
    def share(self) -> float:
        """`correct` as a number; 0 when it failed."""
        return float(self.correct or 0)


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers.

    Attributes:
        n: questions. failed: of them without an answer (counted as wrong). clips: files they are about.
        value, low, high: share in [0, 1] and its interval.
        design_effect: variance relative to that of independent questions; nan where it cannot be estimated.
    """

    n: int
    failed: int
    clips: int
    value: float
    low: float
    high: float
    design_effect: float

    @property
    def coverage(self) -> float:
        """Share of the questions that were answered at all."""
        return 1 - self.failed / self.n

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class Comparison:
    """One condition against another on the same questions.

    Attributes:
        n, clips: questions and files.
        gained, lost: questions right now that were wrong, and the other way round; of pooled answers, questions whose
            share grew, and fell.
        value, low, high: difference of the shares in [-1, 1] and its interval.
        p_mcnemar: two-sided, questions independent (of pooled answers: the sign test of `gained` against `lost`).
        p_clustered: two-sided, clips independent.
    """

    n: int
    clips: int
    gained: int
    lost: int
    value: float
    low: float
    high: float
    p_mcnemar: float
    p_clustered: float

    def __str__(self) -> str:
        return f"{100 * self.value:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


def accuracy(outcomes: Iterable[Outcome], level: float = 0.95) -> Accuracy:
    """Share of right answers with its interval clustered by clip (see the head of this file).

    With one clip and several questions nothing is known about the variation between clips: the interval is [0, 1].

    Raises:
        UserError: no outcomes, or one question twice.
    """
    items = list(_by_item(outcomes).values())
    n, clips = len(items), len({o.clip for o in items})
    p = math.fsum(o.share for o in items) / n
    low, high, effect = 0.0, 1.0, math.nan
    if clips == n:
        low, high = wilson(p, n, NormalDist().inv_cdf((1 + level) / 2))
        effect = 1.0
    elif clips > 1:
        n_effective = float(clips)  # all right or all wrong: the design effect is unknown, the largest is assumed
        if 0 < p < 1:
            variance = _cluster_variance([(o.clip, o.share) for o in items])
            effect = variance * (n - 1) / (p * (1 - p))
            n_effective = n / max(effect, 1.0)
        low, high = wilson(p, n_effective, t_quantile((1 + level) / 2, clips - 1))
    return Accuracy(n, sum(o.correct is None for o in items), clips, p, low, high, effect)


def compare(base: Iterable[Outcome], other: Iterable[Outcome], level: float = 0.95) -> Comparison:
    """`other` minus `base` on the same questions (see the head of this file).

    With one clip the interval is [-1, 1].

    Raises:
        UserError: the two did not get the same questions, or one of them none.
    """
    before, after = _by_item(base), _by_item(other)
    if before.keys() != after.keys():
        only = sorted(before.keys() ^ after.keys())
        raise UserError(
            f"the two conditions did not get the same questions; {len(only)} are in one alone, e.g. {only[0]!r}",
            cause="a paired comparison needs every question in both; failed ones belong in as failed",
            remedy="finish both evaluations on the same manifest",
        )
    # differences as whole numbers of `unit`: what the exact test counts
    unit = math.lcm(*{o.answers for part in (before, after) for o in part.values()})
    pairs = [(o.clip, round(unit * after[key].share) - round(unit * o.share)) for key, o in before.items()]
    gained, lost = sum(d > 0 for _, d in pairs), sum(d < 0 for _, d in pairs)
    total = sum(d for _, d in pairs) / unit
    n, clips = len(pairs), len({clip for clip, _ in pairs})
    low, high = -1.0, 1.0
    if clips > 1:
        # tuples as keys: the two added questions are clips of their own and cannot meet a real one
        adjusted = [((clip,), d / unit) for clip, d in pairs] + [((), 1.0), ((0,), -1.0)]
        centre = total / (n + 2)
        reach = t_quantile((1 + level) / 2, clips - 1) * math.sqrt(_cluster_variance(adjusted))
        low, high = max(-1.0, centre - reach), min(1.0, centre + reach)
    sums: dict[str, int] = defaultdict(int)
    for clip, d in pairs:
        sums[clip] += d
    p_values = mcnemar(gained, lost), sign_flip(list(sums.values()))
    return Comparison(n, clips, gained, lost, total / n, low, high, *p_values)


def by_category(outcomes: Iterable[Outcome], level: float = 0.95) -> dict[str, Accuracy]:
    """Accuracy of each category, in alphabetical order."""
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        groups[outcome.category].append(outcome)
    return {name: accuracy(groups[name], level) for name in sorted(groups)}


def category_table(runs: Mapping[str, Sequence[Outcome]], level: float = 0.95) -> str:
    """A Markdown table: a row each condition; accuracy in % with interval, overall and by category; coverage.

    Raises:
        UserError: as `accuracy`.
    """
    parts = {name: by_category(outcomes, level) for name, outcomes in runs.items()}
    categories = sorted({category for part in parts.values() for category in part})
    counts = {c: max(part[c].n for part in parts.values() if c in part) for c in categories}
    head = ["condition", "all", *(f"{c or '(none)'} (n={counts[c]})" for c in categories), "answered"]
    rows = []
    for name, outcomes in runs.items():
        whole = accuracy(outcomes, level)
        cells = [str(parts[name][c]) if c in parts[name] else "-" for c in categories]
        rows.append([name, str(whole), *cells, f"{whole.n - whole.failed}/{whole.n}"])
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


# Tests ---------------------------------------------------------------------------------------------------------------


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p-value: as many or more on one side of `gained + lost` fair coins, doubled, at most 1."""
    n, few = gained + lost, min(gained, lost)
    term, total = 1, 0
    for k in range(few + 1):
        total += term
        term = term * (n - k) // (k + 1)
    return min(1.0, 2 * total / 2**n)


def sign_flip(sums: Sequence[int]) -> float:
    """Two-sided exact p-value of a total over clips, when each clip's sum may as well have had the other sign.

    The distribution of the total over all sign patterns is built up clip by clip.
    """
    parts = [abs(s) for s in sums if s]
    reach, observed = sum(parts), abs(sum(sums))
    share = np.zeros(2 * reach + 1)  # of the sign patterns with a total of -reach, ..., reach
    share[reach] = 1.0
    for part in parts:
        share = (np.roll(share, part) + np.roll(share, -part)) / 2  # nothing wraps around: the ends are still 0
    totals = np.abs(np.arange(-reach, reach + 1))
    return min(1.0, float(share[totals >= observed].sum()))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values (Holm 1979), in the order given: comparable with the level for the whole family."""
    adjusted, highest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda k: p_values[k])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


# Intervals -----------------------------------------------------------------------------------------------------------


def wilson(p: float, n: float, z: float) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share `p` of `n` (which need not be whole) at the quantile `z`."""
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, min(p, centre - reach)), min(1.0, max(p, centre + reach))


@lru_cache(maxsize=256)
def t_quantile(p: float, df: int) -> float:
    """Quantile of Student's t, 0.5 <= p < 1, by bisection of `t_cdf`; to 1e-12 relative."""
    assert 0.5 <= p < 1
    low, high = 0.0, 1.0
    while t_cdf(high, df) < p:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return high


def t_cdf(t: float, df: int) -> float:
    """Distribution function of Student's t for whole `df` and t >= 0 (finite sums, Abramowitz & Stegun 26.7.3-4)."""
    angle = math.atan(t / math.sqrt(df))
    sine, cosine2 = math.sin(angle), math.cos(angle) ** 2
    odd = df % 2
    term = math.cos(angle) if odd else 1.0
    total = term if df > 1 else 0.0
    for k in range(3 if odd else 2, df - 1, 2):
        term *= cosine2 * (k - 1) / k
        total += term
    inside = (angle + sine * total) * 2 / math.pi if odd else sine * total
    return 0.5 + inside / 2


def _cluster_variance(values: Sequence[tuple[object, float]]) -> float:
    """Variance of the mean of (cluster, value) pairs: a ratio of two sums over clusters, linearised."""
    n = len(values)
    mean = math.fsum(v for _, v in values) / n
    residuals: dict[object, float] = defaultdict(float)
    for cluster, value in values:
        residuals[cluster] += value - mean
    groups = len(residuals)
    return groups / (groups - 1) * math.fsum(r * r for r in residuals.values()) / n**2


def _by_item(outcomes: Iterable[Outcome]) -> dict[str, Outcome]:
    items: dict[str, Outcome] = {}
    for outcome in outcomes:
        if outcome.item in items:
            raise UserError(f"question {outcome.item!r} appears twice", "each counts once", "give questions unique ids")
        items[outcome.item] = outcome
    if not items:
        raise UserError("there are no questions to evaluate", remedy="check the manifest and its filters")
    return items
