"""The first goal and the model's own recall: what was compared, and the verdict that the numbers give. The second is
in `results_tuning`.

A goal is met when the difference is at least what was asked, its 95 % interval lies above 0, and Holm's adjusted p over
all comparisons of its family is at most 0.05. The rival's side is given every benefit: besides the rival that is best
on the validation clips, the one that is best on the test clips itself has to be beaten; of the controls of fine-tuning
the one that comes closest on the test clips counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from omnimem_train.stats import Accuracy, Comparison
from scripts.recall.load import Condition, Data
from scripts.recall.results_scores import RIVALS, Grid, Scores, adjusted, grid, rule, validation

ALPHA = 0.05
ASKED = 0.02  # of both goals, in shares
QUESTIONS, BUDGETS, SMALLEST, SEEDS, BASES = 5000, 5, 0.02, 3, 2
BARS = {"colour": 0.97, "pitch": 0.97, "together": 0.85, "order": 0.85, "count": 0.85}

MET, MISSED, UNMEASURED = "met", "missed", "not measured"


@dataclass(frozen=True)
class Versus:
    """Ours against one other method, averaged over `budgets` (and base models, and seeds).

    Attributes:
        found: ours minus other, over the kinds that count; `every` over all kinds.
        p: Holm's, over the whole family.
    """

    ours: str
    other: str
    budgets: tuple[int, ...]
    found: Comparison
    every: Comparison
    p: float

    @property
    def above(self) -> bool:
        """Whether interval and test both say that ours is better."""
        return self.found.low > 0 and self.p <= ALPHA


@dataclass(frozen=True)
class Verdict:
    """What a goal came to.

    Attributes:
        status: "met", "missed" or "not measured".
        reasons: sentences with the numbers.
        lacking: what was asked for and is not in the data; with it, "met" is only "met so far".
        rows: all comparisons of the family.
        chosen: our method. how: where it was chosen.
        opponents: names of the rows that decide.
    """

    status: str
    reasons: tuple[str, ...]
    lacking: tuple[str, ...] = ()
    rows: tuple[Versus, ...] = ()
    chosen: str = ""
    how: str = ""
    opponents: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """The status as it may be said."""
        return "met on what is measured so far" if self.status == MET and self.lacking else self.status


def unmeasured(*reasons: str) -> Verdict:
    """Nothing to judge."""
    return Verdict(UNMEASURED, reasons)


# Goal 1 --------------------------------------------------------------------------------------------------------------


def training_free(data: Data, scores: Scores) -> Verdict:
    """Best method of the OmniMem family against the best original and the best augmented rival."""
    main = grid(data.conditions("main"))
    families = {name: main.of(name) for name in ("omnimem", "rival", "augmented")}
    if missing := [name for name, own in families.items() if not own]:
        return unmeasured(f"the main study has no method of: {', '.join(missing)}")
    if not main.full:
        return unmeasured("the main study has no full cache on every base model")
    on_val = validation(scores, data.conditions("tuning"), data.conditions("main"))
    ours, how = choose(scores, main, families["omnimem"], on_val)
    candidates = [ours] if how != "test" else families["omnimem"]
    rows = _against(scores, main, candidates, families["rival"] + families["augmented"])
    own = {row.other: row for row in rows if row.ours == ours}
    parts = [_beats(scores, main, own, families[name], on_val, name) for name in ("rival", "augmented")]
    if any(status == UNMEASURED for status, _, _ in parts):
        status = UNMEASURED
    else:
        status = MET if all(status == MET for status, _, _ in parts) else MISSED
    reasons = tuple(sentence for _, sentences, _ in parts for sentence in sentences)
    opponents = tuple(name for _, _, names in parts for name in names)
    return Verdict(status, reasons, tuple(lacking_main(data, main)), tuple(rows), ours, how, opponents)


def choose(scores: Scores, main: Grid, methods: Sequence[str], on_val: Mapping[str, float]) -> tuple[str, str]:
    """The best of some methods and where it was chosen: "only one", "validation" or "test"."""
    if len(methods) == 1:
        return methods[0], "only one"
    if all(m in on_val for m in methods):
        return max(methods, key=lambda m: on_val[m]), "validation"
    return best_on_test(scores, main, methods), "test"


def best_on_test(scores: Scores, main: Grid, methods: Sequence[str]) -> str:
    """The method with the highest mean over the budgets that all of them have (else each over its own)."""
    shared = main.common(*methods)
    return max(methods, key=lambda m: scores.accuracy(main.group(m, shared or main.cells[m])).value)


def not_reached(scores: Scores, main: Grid, a: str, b: str) -> list[int]:
    """Budgets at which full-cache accuracy lies above the upper interval end of the better of two methods."""
    full, left = scores.accuracy(main.full).value, []
    for budget in main.common(a, b):
        better = max((scores.accuracy(main.group(m, [budget])) for m in (a, b)), key=lambda x: x.value)
        if full > better.high:
            left.append(budget)
    return left


def _against(scores: Scores, main: Grid, candidates: Sequence[str], others: Sequence[str]) -> list[Versus]:
    """Every candidate against every other method, over the budgets where full-cache accuracy is not reached."""
    found: dict[str, tuple[str, str, list[int], Comparison, Comparison]] = {}
    for a in candidates:
        for b in others:
            if budgets := not_reached(scores, main, a, b):
                pair = main.group(b, budgets), main.group(a, budgets)
                found[f"{a} {b}"] = a, b, budgets, scores.compare(*pair), scores.compare(*pair, every=True)
    p = adjusted({key: row[3] for key, row in found.items()})
    return [Versus(a, b, tuple(n), c, every, p[key]) for key, (a, b, n, c, every) in found.items()]


def _beats(
    scores: Scores,
    main: Grid,
    own: Mapping[str, Versus],
    methods: Sequence[str],
    on_val: Mapping[str, float],
    kind: str,
) -> tuple[str, list[str], list[str]]:
    """Status, sentences and opponents: against the best of `methods` on validation and the best on the test clips."""
    on_test = best_on_test(scores, main, methods)
    best, how = choose(scores, main, methods, on_val)
    where = {"validation": "on validation clips", "test": "on the test clips", "only one": "the only one"}
    opponents = {best: where[how]}
    if on_test != best:
        opponents[on_test] = "on the test clips"
    name = {"rival": "original", "augmented": "augmented"}[kind]
    statuses, sentences = [], []
    for other, place in opponents.items():
        if other not in own:
            statuses.append(UNMEASURED)
            told = f"no budget is left at which the full cache is better than both it and `{other}`"
            sentences.append(f"against the best {name} rival ({place}), {told}")
            continue
        row = own[other]
        enough = row.above and (kind == "augmented" or row.found.value >= ASKED - 1e-12)
        statuses.append(MET if enough else MISSED)
        budgets = ", ".join(map(str, row.budgets))
        told = f"minus the best {name} rival, `{other}` ({place}): {difference(scores, row)} over the budgets {budgets}"
        sentences.append(f"`{row.ours}` {told}")
    status = MISSED if MISSED in statuses else UNMEASURED if UNMEASURED in statuses else MET
    return status, sentences, list(opponents)


def lacking_main(data: Data, main: Grid) -> list[str]:
    """What the main study should have and has not."""
    told = []
    if (n := len(main.full[0].questions.ids)) < QUESTIONS:
        told.append(f"{n:,} test questions of {QUESTIONS:,}")
    if len(main.bases) < BASES:
        told.append(f"{len(main.bases)} base model of {BASES}")
    if (n := len(main.budgets) + 1) < BUDGETS:
        told.append(f"{n} budgets of {BUDGETS}, the full cache counted")
    smallest = min((c.share for c in data.conditions("main") if c.budget is not None), default=1.0)
    if smallest > SMALLEST * 1.1:
        told.append(f"the smallest budget is {100 * smallest:.1f} % of the media tokens, not {100 * SMALLEST:.0f} %")
    rules = [rule(c) for c in data.conditions("main") if c.family in ("rival", "augmented")]
    for selector, name in RIVALS.items():
        own = {(r.redundancy, r.split) for r in rules if r.selector == selector}
        forms = {(False, False): "original", (False, True): "split", (True, False): "redundancy"}
        if missing := [word for form, word in forms.items() if form not in own]:
            told.append(f"{name} without its {' and '.join(missing)} form")
    if crowded(data):
        told.append(f"windows of {' and '.join(RIVALS[name] for name in crowded(data))} that leave room to choose")
    if main.partial:
        told.append(f"settings that a base model lacks: {len(main.partial)}, e.g. {main.partial[0]}")
    if not data.conditions("tuning"):
        told.append("tuning on validation clips")
    return told


WINDOWS = {"snapkv": 64, "critical_kv": 64}  # newest tokens that are kept whatever they score, by default


def crowded(data: Data) -> dict[str, dict[int, float]]:
    """Rivals with a protected window, and by budget the share it takes, where that is half or more."""
    rows: dict[str, dict[int, float]] = {}
    for c in data.conditions("main"):
        name, options = c.memory.get("selector"), c.memory.get("selector_options") or {}
        if name in WINDOWS and c.budget is not None:
            share = options.get("window_size", WINDOWS[name]) / c.budget
            if share >= 0.5:
                rows.setdefault(name, {})[c.budget] = min(1.0, share)
    return rows


# The model's own recall ----------------------------------------------------------------------------------------------


def own_recall(scores: Scores, full: Mapping[int, Sequence[Condition]]) -> dict[tuple[int, str], tuple[Accuracy, bool]]:
    """By base and kind with a bar: full-cache accuracy, and whether it reaches the bar."""
    found = {}
    for base, group in full.items():
        for kind, a in scores.kinds(group).items():
            if kind in BARS:
                found[base, kind] = a, a.value >= BARS[kind] - 1e-12
    return found


def difference(scores: Scores, row: Versus) -> str:
    """A row's difference with its p; over all kinds as well when some are left out."""
    every = f"; {100 * row.every.value:+.1f} over all kinds" if scores.excluded else ""
    return f"{points(row.found)} (p {p_value(row.p)}{every})"


def points(c: Comparison) -> str:
    """A difference in points."""
    value, interval = str(c).split(" ", 1)
    return f"{value} points {interval}"


def p_value(p: float) -> str:
    """With its sign: `< 0.001`, `= 0.012`."""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"
