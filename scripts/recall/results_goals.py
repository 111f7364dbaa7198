"""The two goals and the model's own recall: what was compared, and the verdict that the numbers give.

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
DROP = 0.005  # what full-cache accuracy may lose
QUESTIONS, BUDGETS, SMALLEST, SEEDS, BASES = 5000, 5, 0.02, 3, 2
CONTROLS = ("full_lora", "critical_kv_lora", "window_lora", "fixed_lora")
OURS = "budget_lora"
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


# Goal 2 --------------------------------------------------------------------------------------------------------------

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


Lines = Mapping[tuple[str, str], Mapping[tuple[int, int | None], Mapping[int | None, Condition]]]
"""By (arm, method), (base, seed) and budget; the full cache is budget None of the method "full" of its arm."""


def lines(data: Data) -> Lines:
    """The fine-tuning study."""
    found: dict[tuple[str, str], dict[tuple[int, int | None], dict[int | None, Condition]]] = {}
    for c in data.conditions("finetune"):
        method = "full" if c.budget is None else c.method
        found.setdefault((c.arm, method), {}).setdefault((c.base, c.seed), {})[c.budget] = c
    return found


def tuned_pair(
    lines: Lines, ours: tuple[str, str], other: tuple[str, str], budgets: Sequence[int | None]
) -> tuple[list[Condition], list[Condition]]:
    """Conditions of both at these budgets on the same bases and seeds; an arm without seeds stands beside each seed."""
    mine, theirs = [], []
    for (base, seed), own in lines.get(ours, {}).items():
        match = lines.get(other, {}).get((base, seed)) or lines.get(other, {}).get((base, None))
        if match and all(b in own and b in match for b in budgets):
            mine += [own[b] for b in budgets]
            theirs += [match[b] for b in budgets]
    return mine, theirs


def fine_tuning(data: Data, scores: Scores, first: Verdict) -> Verdict:
    """Budget-aware LoRA against the best control at the two smallest budgets, and its loss with the full cache.

    `first`: the verdict of goal 1, whose method reads our memory where fine-tuning was measured with several.
    """
    study = lines(data)
    family = {c.method: c.family for c in data.conditions("finetune")}
    own = [key for key in study if key[0] == OURS and key[1] != "full" and family[key[1]] == "omnimem"]
    controls = [key for key in study if not key[0].startswith("budget_") and key[1] != "full"]
    if not own:
        return unmeasured(f"no fine-tuned model of arm {OURS} with a selector of the OmniMem family")
    budgets = smallest_budgets(study, own)
    if len(budgets) < 2:
        return unmeasured(f"the runs of {OURS} have fewer than two reduced budgets in common")
    ours, how = _reader(data, scores, study, own, budgets, first)
    rows = _against_controls(scores, study, own if how == "test" else [ours], controls, budgets)
    mine = [row for row in rows if row.ours == label(ours)]
    if not mine or all(row.other.startswith("`base`") for row in mine):
        return unmeasured("no control of equal steps was measured at the same budgets")
    closest = min(mine, key=lambda row: row.found.value)
    gained = closest.above and closest.found.value >= ASKED - 1e-12
    told = f"minus the best control, {closest.other}: {difference(scores, closest)} over the two smallest budgets"
    reasons = [f"{label(ours)} {told}, {' and '.join(map(str, budgets))}"]
    drop = full_drop(data, scores, study)
    kept = drop is not None and drop.value >= -DROP - 1e-12
    if drop is None:
        reasons.append("full-cache accuracy before and after was not measured")
    else:
        reasons.append(f"full-cache accuracy after minus before: {points(drop)}")
    status = MISSED if not gained or (drop is not None and not kept) else MET if kept else UNMEASURED
    lacking = tuple(lacking_tuned(study, ours))
    return Verdict(status, tuple(reasons), lacking, tuple(rows), label(ours), how, (closest.other,))


def smallest_budgets(study: Lines, own: Sequence[tuple[str, str]]) -> list[int]:
    """The two smallest budgets of all runs of ours."""
    shared = set.intersection(*({b for b in cells if b} for key in own for cells in study[key].values()))
    return sorted(shared)[:2]


def _reader(
    data: Data, scores: Scores, study: Lines, own: Sequence[tuple[str, str]], budgets: Sequence[int], first: Verdict
) -> tuple[tuple[str, str], str]:
    """Which selector reads our memory, and where that was chosen."""
    if len(own) == 1:
        return own[0], "only one"
    if (OURS, first.chosen) in own and first.how == "validation":
        return (OURS, first.chosen), "validation"
    on_val = validation(scores, data.conditions("tuning"), data.conditions("main"))
    if all(method in on_val for _, method in own):
        return max(own, key=lambda key: on_val[key[1]]), "validation"
    value = {key: scores.accuracy([c[b] for c in study[key].values() for b in budgets]).value for key in own}
    return max(own, key=lambda key: value[key]), "test"


def _against_controls(
    scores: Scores,
    study: Lines,
    own: Sequence[tuple[str, str]],
    controls: Sequence[tuple[str, str]],
    budgets: Sequence[int],
) -> list[Versus]:
    found: dict[str, tuple[str, str, Comparison, Comparison]] = {}
    for a in own:
        for b in controls:
            mine, theirs = tuned_pair(study, a, b, budgets)
            if mine:
                pair = scores.compare(theirs, mine), scores.compare(theirs, mine, every=True)
                found[f"{a} {b}"] = label(a), label(b), *pair
    p = adjusted({key: row[2] for key, row in found.items()})
    return [Versus(a, b, tuple(budgets), c, every, p[key]) for key, (a, b, c, every) in found.items()]


def full_drop(data: Data, scores: Scores, study: Lines) -> Comparison | None:
    """Full cache after budget-aware training minus before, over bases and seeds."""
    before = {c.base: c for c in data.conditions("main") if c.budget is None and c.family == "reference"}
    before |= {base: cells[None] for (base, _), cells in study.get(("base", "full"), {}).items()}
    pairs = [(before[b], cells[None]) for (b, _), cells in study.get((OURS, "full"), {}).items() if b in before]
    return scores.compare([a for a, _ in pairs], [b for _, b in pairs]) if pairs else None


def lacking_tuned(study: Lines, ours: tuple[str, str]) -> list[str]:
    """What fine-tuning should have and has not."""
    told = []
    arms = {arm for arm, method in study if method != "full"}
    if missing := [arm for arm in CONTROLS if arm not in arms]:
        told.append(f"no control {', '.join(missing)}")
    short: dict[str, list[str]] = {}
    for arm in (OURS, *CONTROLS):
        runs = {run for key in study if key[0] == arm and key[1] != "full" for run in study[key]}
        seeds = {base: sum(b == base for b, _ in runs) for base, _ in sorted(runs, key=str)}
        if runs and (len(seeds) < BASES or min(seeds.values()) < SEEDS):
            each = ", ".join(f"{n} on base {base}" for base, n in seeds.items())
            short.setdefault(each, []).append(arm)
    for each, own in short.items():
        told.append(f"{SEEDS} seeds on {BASES} base models of {', '.join(own)} (there are {each})")
    first = next(iter(study[ours].values()))
    n = len(next(iter(first.values())).questions.ids)
    return [*told, f"{n:,} questions of {QUESTIONS:,}"] if n < QUESTIONS else told


def label(key: tuple[str, str]) -> str:
    """An arm and the selector that reads its memory."""
    return f"`{key[0]}` read with `{key[1]}`"


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
