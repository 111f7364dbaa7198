"""The second goal: what budget-aware fine-tuning adds over its controls, and the verdict that the numbers give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from omnimem_train.stats import Comparison
from scripts.recall.load import Condition, Data
from scripts.recall.results_goals import (
    ASKED,
    BASES,
    MET,
    MISSED,
    QUESTIONS,
    SEEDS,
    UNMEASURED,
    Verdict,
    Versus,
    difference,
    points,
    unmeasured,
)
from scripts.recall.results_scores import Scores, adjusted, validation

DROP = 0.005  # what full-cache accuracy may lose
CONTROLS = ("full_lora", "critical_kv_lora", "window_lora", "fixed_lora")
OURS = "budget_lora"

Lines = Mapping[tuple[str, str], Mapping[tuple[int, int | None], Mapping[int | None, Condition]]]
"""By (arm, method), (base, seed) and budget; the full cache is budget None of the method "full" of its arm."""


def lines(data: Data) -> Lines:
    """The fine-tuning study, and beside it the untouched base models where the main study asked them the same."""
    found: dict[tuple[str, str], dict[tuple[int, int | None], dict[int | None, Condition]]] = {}
    tuned = data.conditions("finetune")
    asked = {(c.base, c.questions.name, repr(c.memory)) for c in tuned}
    same = [c for c in data.conditions("main") if (c.base, c.questions.name, repr(c.memory)) in asked]
    for c in [*same, *tuned]:
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
    if not gained and (others := tried(data, scores, study, ours, budgets)):
        reasons.append(f"tried in its place, minus `{ours[0]}` on the same base and seed: {', '.join(others)}")
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


def variants(data: Data) -> Lines:
    """What was tried in the place of `OURS`: other gradients, losses, budgets. Each on few bases and seeds."""
    found: dict[tuple[str, str], dict[tuple[int, int | None], dict[int | None, Condition]]] = {}
    for c in data.conditions("ablation"):
        if c.arm != "base":
            method = "full" if c.budget is None else c.method
            found.setdefault((c.arm, method), {}).setdefault((c.base, c.seed), {})[c.budget] = c
    return found


def tried(data: Data, scores: Scores, study: Lines, ours: tuple[str, str], budgets: Sequence[int]) -> list[str]:
    """A phrase for each variant: its accuracy minus that of `ours` on the same bases and seeds."""
    told = []
    both = {**study, **variants(data)}
    for key in sorted(variants(data)):
        mine, theirs = tuned_pair(both, key, ours, budgets)
        if key[1] != "full" and mine:
            told.append(f"`{key[0]}` {points(scores.compare(theirs, mine))}")
    return told


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
