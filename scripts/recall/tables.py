"""Sections of the results page about the main study: the model's own recall, accuracy by budget, what adds what."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from omnimem_train.stats import Accuracy, Comparison, accuracy
from scripts.recall.load import KINDS, Condition, Data
from scripts.recall.results_attempt import Outcome
from scripts.recall.results_goals import ALPHA, BARS, Verdict, own_recall, p_value
from scripts.recall.results_scores import Grid, Group, Rule, Scores, adjusted, grid, rule

NOT_MEASURED = "Not measured.\n"
BOLD = "Bold: interval and adjusted p both exclude 0; otherwise it is open."


@dataclass(frozen=True)
class Page:
    """What the sections are made from. `excluded` gives the reason of each kind that stays out of the headline; `last`
    is the last attempt at the second goal, if there was one."""

    data: Data
    scores: Scores
    excluded: Mapping[str, str]
    full: Mapping[int, Group]
    first: Verdict
    second: Verdict
    main: Grid
    last: Outcome | None = None


def table(head: Sequence[str], rows: Iterable[Sequence[str]], note: str = "") -> str:
    """A Markdown table with a note below."""
    lines = [list(head), ["---"] * len(head), *map(list, rows)]
    text = "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
    return text + (f"\n{note}\n" if note else "")


def folded(summary: str, content: str) -> str:
    """Something that unfolds."""
    return f"<details><summary>{summary}</summary>\n\n{content}\n</details>\n"


def text_note(conditions: Iterable[Condition]) -> str:
    """Whether pinned text is inside the budget, and how much it is: belongs under every table."""
    reduced = [c for c in conditions if c.budget is not None]
    inside = {bool(c.memory.get("count_text", False)) for c in reduced}
    if not reduced:
        return "Full cache: nothing is dropped."
    known = [c.text_tokens for c in reduced if c.text_tokens is not None and c.text_tokens >= 0.5]
    amount = f"about {statistics.median(known):.0f} tokens" if known else "number of tokens not recorded"
    if inside == {True}:
        return f"Text ({amount}) is pinned inside the budget."
    if inside == {False}:
        return f"Text ({amount}) is pinned on top of the budget."
    return f"Text ({amount}) is pinned inside the budget in some settings, on top of it in others: see their files."


def accuracy_cell(scores: Scores, group: Group) -> str:
    """Accuracy with interval; with the value over all kinds when some are left out."""
    every = f"; all {100 * scores.accuracy(group, every=True).value:.1f}" if scores.excluded else ""
    return f"{scores.accuracy(group)}{every}"


def difference_cell(found: Comparison, every: Comparison, p: float | None, excluded: bool) -> str:
    """A difference in points with interval and adjusted p; bold when both say the same."""
    shown = f"**{found}**" if p is not None and decided(found, p) != "open" else str(found)
    told = "" if p is None else f", p {p_value(p)}"
    return shown + told + (f"; all {100 * every.value:+.1f}" if excluded else "")


def decided(found: Comparison, p: float) -> str:
    """ "better", "worse" or "open": what interval and adjusted p both say."""
    if p <= ALPHA and found.low > 0:
        return "better"
    return "worse" if p <= ALPHA and found.high < 0 else "open"


def counted(words: Iterable[str]) -> str:
    """How many of each verdict."""
    words = list(words)
    return ", ".join(f"{words.count(w)} {w}" for w in ("better", "worse", "open"))


def budget_head(conditions: Iterable[Condition], budgets: Iterable[int]) -> list[str]:
    """Column heads: tokens, and the share of the media tokens they are."""
    conditions = list(conditions)
    heads = []
    for b in budgets:
        share = statistics.mean(c.share for c in conditions if c.budget == b)
        heads.append(f"{b} ({100 * share:.2g} %)")
    return heads


# The model's own recall ----------------------------------------------------------------------------------------------


def recall_section(page: Page) -> str:
    """Full-cache accuracy by kind against the bars, and on held-out combinations."""
    if not page.full:
        return "## Can the model do the task with its full cache?\n\n" + NOT_MEASURED
    judged = own_recall(page.scores, page.full)
    kinds = {base: page.scores.kinds(group) for base, group in page.full.items()}
    rows = []
    for kind in [k for k in KINDS if any(k in own for own in kinds.values())]:
        bar = f"{100 * BARS[kind]:.0f} %" if kind in BARS else "none"
        cells = []
        for base, own in kinds.items():
            verdict = judged.get((base, kind))
            word = "" if verdict is None else " reached" if verdict[1] else " **missed**"
            cells.append(f"{own[kind]}{word}" if kind in own else "-")
        rows.append([kind, bar, *cells, "left out" if kind in page.excluded else "yes"])
    for name, wanted in (("seen combinations", False), ("held-out combinations", True)):
        cells = [_part(page.scores, group, wanted) for group in page.full.values()]
        rows.append([f"all kinds, {name}", "", *cells, ""])
    head = ["kind", "asked", *(f"base {base}, %" for base in page.full), "in the headline"]
    told = (
        "Accuracy of the untouched model with everything in its cache, 95 % intervals clustered by clip; chance 25 %."
    )
    return f"## Can the model do the task with its full cache?\n\n{told}\n\n{table(head, rows, text_note([]))}"


def _part(scores: Scores, group: Group, held_out: bool) -> str:
    """Accuracy of the questions whose combination was, or was not, held out of training."""
    kept = set(group[0].questions.held_out.nonzero()[0].tolist())
    own = [o for i, o in enumerate(scores.outcomes(group, every=True)) if (i in kept) == held_out]
    return f"{accuracy(own)} (n={len(own):,})" if own else "-"


# Accuracy by budget --------------------------------------------------------------------------------------------------


def accuracy_table(main: Grid, scores: Scores) -> str:
    """A row a method, a column a budget."""
    conditions = [c for own in main.cells.values() for g in own.values() for c in g]
    rows = []
    if main.full:
        rows.append(["full cache", "reference", accuracy_cell(scores, main.full), *[""] * len(main.budgets)])
    for m in main.of("omnimem", "rival", "augmented", "reference"):
        own = main.cells[m]
        cells = [accuracy_cell(scores, own[b]) if b in own else "-" for b in reversed(main.budgets)]
        rows.append([f"`{m}`", main.family[m], "", *cells])
    head = ["selector", "family", "full", *budget_head(conditions, reversed(main.budgets))]
    return table(head, rows, f"Accuracy in %, 95 % intervals clustered by clip. {text_note(conditions)}")


def main_section(page: Page) -> str:
    """Accuracy of every selector at every budget; our chosen method against each."""
    title = "## Training-free selectors by budget\n\n"
    main, scores = page.main, page.scores
    if not main.cells:
        return title + NOT_MEASURED
    bases = " and ".join(map(str, main.bases))
    parts = [f"Mean of base models {bases}.\n\n" if len(main.bases) > 1 else f"Base model {bases} alone.\n\n"]
    parts.append(accuracy_table(main, scores))
    if len(main.bases) > 1:
        parts += ["\n" + folded(f"base model {b} alone", accuracy_table(main.on(b), scores)) for b in main.bases]
    if page.first.chosen:
        parts.append("\n" + against_table(page))
    return title + "".join(parts)


def against_table(page: Page) -> str:
    """Our chosen method minus each other one, by budget and averaged as in goal 1."""
    main, scores, ours = page.main, page.scores, page.first.chosen
    others = [m for m in main.cells if m != ours]
    found = {}
    for m in others:
        for b in main.common(ours, m):
            pair = main.cells[m][b], main.cells[ours][b]
            found[f"{m} {b}"] = scores.compare(*pair), scores.compare(*pair, every=True)
    p = adjusted({key: c for key, (c, _) in found.items()})
    averages = {row.other: row for row in page.first.rows if row.ours == ours}
    rows = []
    for m in others:
        cells = []
        for b in reversed(main.budgets):
            key = f"{m} {b}"
            cells.append(difference_cell(*found[key], p[key], bool(page.excluded)) if key in found else "-")
        row = averages.get(m)
        mean = difference_cell(row.found, row.every, row.p, bool(page.excluded)) if row else ""
        left = ", ".join(map(str, row.budgets)) if row else "none left" if main.family[m] in RIVAL_FAMILIES else ""
        rows.append([f"`{m}`", main.family[m], *cells, mean, left])
    conditions = [c for own in main.cells.values() for g in own.values() for c in g]
    heads = budget_head(conditions, reversed(main.budgets))
    words = counted(decided(c, p[key]) for key, (c, _) in found.items())
    where = {"validation": "chosen on validation clips", "test": "chosen on the test clips themselves",
             "only one": "the only one of its family"}[page.first.how]  # fmt: skip
    note = (
        f"Points, 95 % intervals clustered by clip; p by Holm over the {len(found)} cells by budget, and over the "
        f"{len(page.first.rows)} averages. {BOLD} By budget: {words}. The average is over the budgets where full-cache "
        "accuracy is not yet reached: it lies above the upper interval end of the better of the two. "
        f"{text_note(conditions)}"
    )
    head = ["minus", "family", *heads, "average", "over budgets"]
    return f"### `{ours}` ({where}) minus each other selector\n\n{table(head, rows, note)}{_all_pairs(page)}"


RIVAL_FAMILIES = ("rival", "augmented")


def _all_pairs(page: Page) -> str:
    """When our method was chosen on the test clips: every pair that this choice could have shown."""
    if page.first.how != "test":
        return ""
    rows = []
    for row in page.first.rows:
        cell = difference_cell(row.found, row.every, row.p, bool(page.excluded))
        rows.append([f"`{row.ours}`", f"`{row.other}`", ", ".join(map(str, row.budgets)), cell])
    note = text_note(page.data.conditions("main"))
    content = table(["method", "minus", "budgets", "difference"], rows, note)
    return "\n" + folded(f"all {len(rows)} pairs of the family, over which Holm's adjustment was made", content)


# What adds what ------------------------------------------------------------------------------------------------------

Pair = tuple[str, str, str, str]  # study, what adds, without it, with it


def adds_section(page: Page) -> str:
    """Pairs of settings that differ in exactness, in redundancy or in the split alone."""
    title = "## What exactness, redundancy and the split add\n\n"
    grids = {study: grid(page.data.conditions(study)) for study in ("main", "ablation")}
    pairs = [(study, *pair) for study, own in grids.items() for pair in _pairs(own, study == "ablation")]
    if not pairs:
        return title + NOT_MEASURED
    scores, found, least = page.scores, {}, {}
    for pair in pairs:
        study, _, without, with_it = pair
        own, budgets = grids[study], grids[study].common(without, with_it)
        groups = own.group(without, budgets), own.group(with_it, budgets)
        found[pair] = scores.compare(*groups), scores.compare(*groups, every=True)
        least[pair] = scores.compare(own.group(without, budgets[:2]), own.group(with_it, budgets[:2]))
    p = adjusted({str(pair): c for pair, (c, _) in found.items()})
    rows, told = [], []
    for what in ("exactness", "redundancy", "split"):
        words = [decided(c, p[str(pair)]) for pair, (c, _) in found.items() if pair[1] == what]
        if not words:
            told.append(f"- {what}: not measured.")
            continue
        middle = statistics.median(100 * c.value for pair, (c, _) in found.items() if pair[1] == what)
        told.append(f"- {what}: median of {len(words)} pairs {middle:+.1f} points; {counted(words)}.")
        for pair, (c, every) in found.items():
            if pair[1] == what:
                cell = difference_cell(c, every, p[str(pair)], bool(page.excluded))
                rows.append([what, f"`{pair[2]}`", f"`{pair[3]}`", pair[0], cell, str(least[pair])])
    note = (
        "With it minus without it, points, averaged over the budgets of both; 95 % intervals clustered by clip, p by "
        f"Holm over the table. {BOLD} {text_note([c for s in grids for c in page.data.conditions(s)])}"
    )
    told.append(
        "\nExactness is the exact leave-one-out effect against CriticalKV and against its bound in the same place; "
        "redundancy is the factor (1 - rho); the split gives picture and sound budgets of their own."
    )
    head = ["adds", "without", "with", "study", "all reduced budgets", "two smallest budgets"]
    return title + "\n".join(told) + "\n\n" + table(head, rows, note)


def _pairs(own: Grid, strict: bool) -> list[tuple[str, str, str]]:
    """(what, without, with) for methods that differ in one thing.

    In the main study each is tuned on its own, as a user would; `strict`, for an ablation, wants all else equal.
    """
    examples = {m: next(iter(cells.values()))[0] for m, cells in own.cells.items()}
    pairs = []
    for a, first in examples.items():
        for b, second in examples.items():
            for what, test in ADDS.items():
                alike = not strict or _rest(first, what) == _rest(second, what)
                if alike and test(rule(first), rule(second)) and own.common(a, b):
                    pairs.append((what, a, b))
    return pairs


def _rest(c: Condition, what: str) -> dict[str, object]:
    """A setting's memory spec without the keys that may differ, and without the budget."""
    options = dict(c.memory.get("selector_options") or {})
    options.pop({"exactness": "approximate", "redundancy": "redundancy", "split": ""}[what], None)
    varied = {"budget", "selector_options"} | ({"allocation", "allocation_options"} if what == "split" else set())
    return {"options": options} | {k: v for k, v in c.memory.items() if k not in varied}


def _same(a: Rule, b: Rule, *names: str) -> bool:
    return all(getattr(a, name) == getattr(b, name) for name in names)


def _exactness(a: Rule, b: Rule) -> bool:
    bound = a.selector == "critical_kv" or (a.selector == "perturbation" and not a.exact)
    return bound and b.selector == "perturbation" and b.exact and _same(a, b, "redundancy", "allocation")


ADDS: dict[str, Callable[[Rule, Rule], bool]] = {
    "exactness": _exactness,
    "redundancy": lambda a, b: b.redundancy and not a.redundancy and _same(a, b, "selector", "exact", "allocation"),
    "split": lambda a, b: b.split and not a.split and _same(a, b, "selector", "exact", "redundancy"),
}


def spread(values: Sequence[Accuracy]) -> str:
    """Standard deviation and range of accuracies of several seeds."""
    shares = [100 * a.value for a in values]
    if len(shares) < 2:
        return "one seed"
    return f"sd {statistics.stdev(shares):.1f}, range {max(shares) - min(shares):.1f}"
