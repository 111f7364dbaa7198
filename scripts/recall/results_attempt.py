"""The last attempt at the goal of fine-tuning: the combination that validation clips chose, and what it came to.

The rule, written down before anything was measured: the highest mean accuracy at the budgets asked on validation clips,
among the combinations whose full-cache accuracy there drops by at most half a point against the untouched base; if none
does, the highest of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from omnimem_train.stats import Comparison
from scripts.recall.finetune import COMBINATIONS, controls_of
from scripts.recall.load import Condition, Data, Run
from scripts.recall.results_goals import ASKED, MET, MISSED, UNMEASURED, Versus, difference, points
from scripts.recall.results_scores import Scores, adjusted
from scripts.recall.results_tuning import CONTROLS, DROP, Lines, label, lines, tuned_pair

ON_VALIDATION, ON_TEST = "combination", "attempt"  # studies
UNIT = 1e-12


@dataclass(frozen=True)
class Tried:
    """One combination on validation clips, in shares.

    Attributes:
        accuracy: mean over its budgets and all questions. full: with the full cache. drop: that minus the base's.
        training: how it was trained.
    """

    arm: str
    method: str
    accuracy: float
    full: float
    drop: float
    training: Mapping[str, Any]

    @property
    def kept(self) -> bool:
        """Whether full-cache accuracy was kept."""
        return self.drop >= -DROP - UNIT


@dataclass(frozen=True)
class Choice:
    """What was chosen, among how many, and whether it keeps its full-cache accuracy on validation clips."""

    arm: str
    kept: bool
    tried: tuple[Tried, ...]

    @property
    def own(self) -> Tried:
        """Its row."""
        return next(t for t in self.tried if t.arm == self.arm)

    def told(self) -> str:
        """The choice in words."""
        t, none = self.own, "" if self.kept else "; none kept its full-cache accuracy there, so it is the best of all"
        return (
            f"`{t.arm}`, best of {len(self.tried)} combinations on validation clips ({100 * t.accuracy:.1f} %, full "
            f"cache {100 * t.drop:+.1f}{none})"
        )


def choose_combination(data: Data) -> Choice | None:
    """By the rule above; None where no combination, or no untouched base beside them, was measured."""
    runs = [run for run in data.study(ON_VALIDATION) if run.arm != "base"]
    before = {run.base: full_share(run) for run in data.study(ON_VALIDATION) if run.arm == "base"}
    tried = []
    for run in runs:
        cells = [c for c in run.conditions if c.budget is not None]
        was, now = before.get(run.base), full_share(run)
        if cells and was is not None and now is not None:
            value = float(np.mean([c.right.mean() for c in cells]))
            tried.append(Tried(run.arm, cells[0].method, value, now, now - was, run.training))
    if not tried:
        return None
    kept = [t for t in tried if t.kept]
    best = max(kept or tried, key=lambda t: t.accuracy)
    return Choice(best.arm, bool(kept), tuple(sorted(tried, key=lambda t: -t.accuracy)))


def full_share(run: Run) -> float | None:
    """Accuracy with the full cache; None where it was not measured."""
    found = [float(c.right.mean()) for c in run.conditions if c.budget is None]
    return found[0] if found else None


@dataclass(frozen=True)
class Outcome:
    """What the chosen combination came to on the test clips.

    Attributes:
        status: "met", "missed" or "not measured", on the bases it was tried on.
        rows: it minus every control. closest: the best control among those of every base, which decides; each: it
            minus that one, base by base. lacking: controls that were not measured on every base.
        drop: full cache after minus before. runs: its (base, seed) pairs. budgets: the two smallest.
    """

    choice: Choice
    status: str
    rows: tuple[Versus, ...] = ()
    closest: Versus | None = None
    each: tuple[tuple[int, Versus], ...] = ()
    lacking: tuple[str, ...] = ()
    drop: Comparison | None = None
    runs: tuple[tuple[int, int | None], ...] = ()
    budgets: tuple[int, ...] = ()

    @property
    def bases(self) -> list[int]:
        """Base models it was measured on."""
        return sorted({base for base, _ in self.runs})

    def where(self) -> str:
        """Bases and seeds in words."""
        return " and ".join(f"{sum(b == base for b, _ in self.runs)} seeds on base {base}" for base in self.bases)

    def apart(self) -> str:
        """What each base model by itself came to, in words; "" for a single one."""
        found = ", ".join(f"base {base} alone {points(row.found)}" for base, row in self.each)
        return f" ({found})" if len(self.each) > 1 else ""

    def open(self) -> str:
        """What is not known yet, in words; "" for nothing."""
        names = ", ".join(f"`{name}`" for name in self.lacking)
        return f", **against the controls that were measured**; not measured: {names}" if names else ""

    def told(self, scores: Scores) -> str:
        """The outcome in a sentence."""
        begun = f"Last attempt: {self.choice.told()}"
        if self.closest is None:
            return f"{begun}: on the test clips not measured beside controls of equal steps."
        drop = "not measured" if self.drop is None else points(self.drop)
        return (
            f"{begun}; on the test clips ({self.where()}) minus the best control, {self.closest.other}: "
            f"{difference(scores, self.closest)} over {' and '.join(map(str, self.budgets))} tokens{self.apart()}; "
            f"full-cache accuracy after minus before: {drop}: {self.status} there{self.open()}."
        )


def attempt_lines(data: Data) -> Lines:
    """The attempt's models on the test clips, and the study's controls and untouched bases on the same base models."""
    own = data.conditions(ON_TEST)
    bases = {c.base for c in own}
    found: dict[tuple[str, str], dict[tuple[int, int | None], dict[int | None, Condition]]] = {}
    for key, runs in lines(data).items():
        kept = {run: cells for run, cells in runs.items() if run[0] in bases}
        if kept and key[0] in ("base", *CONTROLS):
            found[key] = kept
    for c in own:
        method = "full" if c.budget is None else c.method
        found.setdefault((c.arm, method), {}).setdefault((c.base, c.seed), {})[c.budget] = c
    return found


def judged(data: Data, scores: Scores) -> Outcome | None:
    """The outcome of the attempt; None where there was none."""
    choice = choose_combination(data)
    if choice is None:
        return None
    study = attempt_lines(data)
    ours = (choice.arm, choice.own.method)
    mine = study.get(ours, {})
    arms = {run.arm for run in data.study(ON_TEST)} - {choice.arm}
    if not mine or not arms:
        return Outcome(choice, UNMEASURED)
    budgets = sorted(set.intersection(*({b for b in cells if b} for cells in mine.values())))[:2]
    rows = against(scores, study, ours, budgets)
    if not any(row.other.startswith(f"`{arm}`") for row in rows for arm in arms):
        return Outcome(choice, UNMEASURED)
    bases = {base for base, _ in mine}
    there = {label(key): {base for base, _ in group} for key, group in study.items()}
    everywhere = [row for row in rows if there[row.other] >= bases]
    closest = min(everywhere or rows, key=lambda row: row.found.value)
    named = controls_of(choice.arm) if choice.arm in COMBINATIONS else []
    lacking = [name for name in named if bases - {b for b, _ in study.get((name, "full"), {})}]
    before = {base: cells[None] for (base, _), cells in study.get(("base", "full"), {}).items() if None in cells}
    pairs = [(before[b], c[None]) for (b, _), c in study.get((choice.arm, "full"), {}).items() if b in before]
    drop = scores.compare([a for a, _ in pairs], [b for _, b in pairs]) if pairs else None
    gained = closest.above and closest.found.value >= ASKED - UNIT
    kept = drop is not None and drop.value >= -DROP - UNIT
    status = MISSED if not gained or (drop is not None and not kept) else MET if kept else UNMEASURED
    runs = tuple(sorted(mine, key=str))
    each = []
    for base in sorted(bases):
        own = {key: {run: cells for run, cells in group.items() if run[0] == base} for key, group in study.items()}
        each += [(base, row) for row in against(scores, own, ours, budgets) if row.other == closest.other]
    return Outcome(choice, status, tuple(rows), closest, tuple(each), tuple(lacking), drop, runs, tuple(budgets))


def against(scores: Scores, study: Lines, ours: tuple[str, str], budgets: Sequence[int]) -> list[Versus]:
    """Ours minus every other arm on the same bases and seeds."""
    found = {}
    for other in study:
        mine, theirs = tuned_pair(study, ours, other, budgets)
        if other[1] != "full" and other != ours and mine:
            found[other] = scores.compare(theirs, mine), scores.compare(theirs, mine, every=True)
    p = adjusted({label(key): c for key, (c, _) in found.items()})
    return [Versus(label(ours), label(k), tuple(budgets), c, e, p[label(k)]) for k, (c, e) in found.items()]
