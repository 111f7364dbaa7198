"""Accuracies and paired differences of settings, of one or averaged over budgets, seeds and base models.

An average is taken question by question, then clustered by clip (see `omnimem_train.stats`). The headline leaves out
kinds of question that the model cannot answer even with its full cache; every number exists over all kinds as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from omnimem_train.errors import UserError
from omnimem_train.stats import Accuracy, Comparison, Outcome, accuracy, by_category, compare, holm
from scripts.recall.load import KINDS, Condition, Data

CHANCE = 0.25
AT_CHANCE = 0.35  # a kind whose full-cache accuracy is below this on any base stays out of the headline
RIVALS = {"snapkv": "SnapKV", "observed_attention": "H2O", "critical_kv": "CriticalKV",
          "infinipot_v": "InfiniPot-V", "key_difference": "key difference"}  # fmt: skip

Group = Sequence[Condition]


@dataclass
class Scores:
    """Statistics with the kinds that count; accuracies are kept, because most are asked for often."""

    excluded: frozenset[str] = frozenset()
    _kept: dict[tuple[Group, bool], Accuracy] = field(default_factory=dict)

    def outcomes(self, group: Group, every: bool = False) -> list[Outcome]:
        """One outcome a question, pooled over the group; with `every`, of the excluded kinds too."""
        own = pooled(tuple(group))
        return own if every or not self.excluded else [o for o in own if o.category not in self.excluded]

    def accuracy(self, group: Group, every: bool = False) -> Accuracy:
        """Mean accuracy of a group."""
        key = tuple(group), every or not self.excluded
        if key not in self._kept:
            self._kept[key] = accuracy(self.outcomes(group, every))
        return self._kept[key]

    def compare(self, base: Group, other: Group, every: bool = False) -> Comparison:
        """`other` minus `base`."""
        return compare(self.outcomes(base, every), self.outcomes(other, every))

    def kinds(self, group: Group) -> dict[str, Accuracy]:
        """Accuracy by kind, all kinds, in the usual order."""
        found = by_category(self.outcomes(group, every=True))
        return {kind: found[kind] for kind in KINDS if kind in found}


@lru_cache(maxsize=64)
def pooled(group: tuple[Condition, ...]) -> list[Outcome]:
    """One outcome a question: the share of the group's answers that is right.

    Raises:
        UserError: the group is empty, or about different clip sets.
    """
    sets = {c.questions.name: c.questions for c in group}
    if len(sets) != 1:
        found = ", ".join(sorted(sets)) or "none"
        cause = "an average needs the same questions everywhere"
        raise UserError(f"these answers are about the clip sets {found}", cause, "use one clip set in a study")
    q = next(iter(sets.values()))
    right = np.sum([c.right for c in group], axis=0).tolist()
    silent = np.all([c.predicted < 0 for c in group], axis=0).tolist()
    n = len(group)
    rows = zip(q.ids, q.clips, q.kinds, right, silent, strict=True)
    return [Outcome(i, clip, None if none else r / n, kind, n) for i, clip, kind, r, none in rows]


def excluded_kinds(scores: Scores, full: Mapping[int, Group]) -> dict[str, str]:
    """Kinds that stay out of the headline, with the reason; `full` is the full cache of each base."""
    reasons: dict[str, list[str]] = {}
    for base, group in full.items():
        for kind, a in scores.kinds(group).items():
            if a.value < AT_CHANCE or a.low <= CHANCE <= a.high:
                reasons.setdefault(kind, []).append(f"{a} on base {base}")
    return {kind: "; ".join(reasons[kind]) for kind in KINDS if kind in reasons}


# Tables of conditions ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """A study with one run a base: `cells[method][budget]` holds a condition of every base, or the cell is not there.

    Attributes:
        family: of each method.
        full: the reference with full cache, of every base; empty when a base lacks it.
        partial: methods and budgets that a base lacks; they are left out.
    """

    bases: tuple[int, ...]
    cells: Mapping[str, Mapping[int, Group]]
    family: Mapping[str, str]
    full: Group
    partial: tuple[str, ...]

    @property
    def budgets(self) -> list[int]:
        """Every budget of every method, ascending."""
        return sorted({b for own in self.cells.values() for b in own})

    def of(self, *families: str) -> list[str]:
        """Methods of some families, in the order of the data."""
        return [m for m in self.cells if self.family[m] in families]

    def group(self, method: str, budgets: Iterable[int]) -> list[Condition]:
        """All conditions of a method at some budgets."""
        return [c for b in budgets for c in self.cells[method][b]]

    def common(self, *methods: str) -> list[int]:
        """Budgets at which all of these methods were measured."""
        return sorted(set.intersection(*(set(self.cells[m]) for m in methods)))

    def on(self, base: int) -> Grid:
        """The same, of one base alone."""
        cells = {m: {b: [c for c in g if c.base == base] for b, g in own.items()} for m, own in self.cells.items()}
        return replace(self, bases=(base,), cells=cells, full=[c for c in self.full if c.base == base])


def grid(conditions: Iterable[Condition]) -> Grid:
    """Conditions by method and budget."""
    conditions = list(conditions)
    bases = tuple(sorted({c.base for c in conditions}))
    found: dict[str, dict[int, list[Condition]]] = {}
    for c in conditions:
        if c.budget is not None:
            found.setdefault(c.method, {}).setdefault(c.budget, []).append(c)
    whole = {m: {b for b, g in own.items() if sorted(c.base for c in g) == list(bases)} for m, own in found.items()}
    partial = [f"{m} at {b}" for m, own in found.items() for b in sorted(own) if b not in whole[m]]
    cells = {m: {b: own[b] for b in sorted(whole[m])} for m, own in found.items()}
    full = [c for c in conditions if c.budget is None and c.family == "reference"]
    family = {c.method: c.family for c in conditions}
    if sorted(c.base for c in full) != list(bases):
        full = []
    return Grid(bases, {m: own for m, own in cells.items() if own}, family, full, tuple(partial))


def full_caches(data: Data) -> dict[int, list[Condition]]:
    """The untouched model with its full cache, by base: of the main study, else of fine-tuning's base runs."""
    found: dict[int, list[Condition]] = {}
    for study in ("main", "finetune"):
        for c in data.conditions(study):
            if c.budget is None and c.arm == "base" and (study == "finetune" or c.family == "reference"):
                found.setdefault(c.base, [c])
    return dict(sorted(found.items()))


# Rules behind names --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """What a setting does, read from its memory spec, else from words in its name. `allocation` is "" for one shared
    budget."""

    selector: str
    exact: bool
    redundancy: bool
    allocation: str

    @property
    def split(self) -> bool:
        """Whether picture and sound have budgets of their own."""
        return self.allocation != ""


def rule(c: Condition) -> Rule:
    """The rule of a setting: a spec leaves out what is its default."""
    words = re.split(r"[^a-z0-9_]+", c.method.lower())
    selector = str(c.memory.get("selector", words[0]))
    options = c.memory.get("selector_options") or {}
    if "selector" not in c.memory:
        redundant = any(w in ("rho", "redundancy") for w in words[1:])
        allocation = next((w for w in words if w in ("split", "avba", "mass")), "")
        return Rule(selector, "approximate" not in words, redundant, allocation)
    kind = options.get("redundancy", "later_key" if selector == "perturbation" else "none")
    exact = selector == "perturbation" and not options.get("approximate", False)
    allocation = str(c.memory.get("allocation", "shared"))
    return Rule(selector, exact, kind != "none", "" if allocation == "shared" else allocation)


# Choice on validation clips, families of tests -----------------------------------------------------------------------


def validation(scores: Scores, tuning: Iterable[Condition], used: Iterable[Condition]) -> dict[str, float]:
    """Accuracy on the tuning clips, by method, of the options that the test used; of the best where it used another.

    The mean over bases and budgets, over those that every method was tried at; empty when there are none.
    """
    tuned = {(c.base, c.method, _options(c)) for c in used}
    best: dict[str, dict[tuple[int, int], tuple[bool, float]]] = {}
    for c in tuning:
        if c.budget is not None:
            found = ((c.base, c.method, _options(c)) in tuned, scores.accuracy([c]).value)
            place = best.setdefault(c.method, {})
            place[c.base, c.budget] = max(found, place.get((c.base, c.budget), (False, -1.0)))
    if not best:
        return {}
    shared = set.intersection(*(set(own) for own in best.values()))
    return {m: sum(own[k][1] for k in shared) / len(shared) for m, own in best.items()} if shared else {}


def _options(c: Condition) -> str:
    return json.dumps(c.tuned, sort_keys=True)


def adjusted(found: Mapping[str, Comparison]) -> dict[str, float]:
    """Holm's p-values of a family of comparisons, from the test that takes clips as independent."""
    return holm({name: c.p_clustered for name, c in found.items()})
