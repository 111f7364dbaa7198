"""Sections of the results page about fine-tuning and the smaller studies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from omnimem_train.stats import Comparison
from scripts.recall.figures import World
from scripts.recall.load import KINDS, Condition, Run
from scripts.recall.results_scores import Grid, adjusted, grid
from scripts.recall.results_tuning import OURS, Lines, label, lines, smallest_budgets, tuned_pair, variants
from scripts.recall.tables import (
    BOLD,
    NOT_MEASURED,
    Page,
    accuracy_cell,
    budget_head,
    counted,
    decided,
    difference_cell,
    folded,
    spread,
    table,
    text_note,
)

# Fine-tuning ---------------------------------------------------------------------------------------------------------


def tuned_section(page: Page) -> str:
    """Every fine-tuned model: seeds, controls, all budgets."""
    title = "## Fine-tuning\n\n"
    study = lines(page.data)
    readers = [key for key in study if key[1] != "full"]
    own = [key for key in readers if key[0] == OURS] or readers
    if not readers:
        return title + NOT_MEASURED
    budgets = smallest_budgets(study, own)
    parts = [best_arms(page, study, readers, budgets), seeds_table(page, study, readers, budgets)] if budgets else []
    if page.second.rows:
        parts.append(controls_table(page, study))
    parts += [variants_table(page, study, own[0], budgets)] if budgets and variants(page.data) else []
    parts.append(folded("all budgets, mean of bases and seeds", all_budgets(page, study, readers)))
    return title + "\n".join(parts)


def best_arms(page: Page, study: Lines, readers: Sequence[tuple[str, str]], budgets: Sequence[int]) -> str:
    """A sentence: the arm with the highest mean at the two smallest budgets, and the next."""
    groups = {key: [c[b] for c in study[key].values() for b in budgets if b in c] for key in readers}
    means = {key: page.scores.accuracy(group) for key, group in groups.items() if group}
    ranked = sorted(means, key=lambda key: -means[key].value)[:2]
    told = ", then ".join(f"{label(key)} ({means[key]})" for key in ranked)
    return f"Highest at the two smallest budgets, mean of bases and seeds: {told}.\n"


def seeds_table(page: Page, study: Lines, readers: Sequence[tuple[str, str]], budgets: Sequence[int]) -> str:
    """A row an arm, selector and base: each seed, their mean and spread."""
    scores, rows = page.scores, []
    for arm, method in sorted(readers, key=_order):
        for base in sorted({base for base, _ in study[arm, method]}):
            runs = {s: c for (b, s), c in study[arm, method].items() if b == base and all(n in c for n in budgets)}
            if not runs:
                continue
            groups = {s: [cells[n] for n in budgets] for s, cells in sorted(runs.items(), key=str)}
            values = {s: scores.accuracy(group) for s, group in groups.items()}
            each = ", ".join(f"{100 * a.value:.1f}" for a in values.values())
            full = [c[None] for (b, _), c in study.get((arm, "full"), {}).items() if b == base]
            shown = "no seed" if set(values) == {None} else spread(list(values.values()))
            mean = accuracy_cell(scores, [c for group in groups.values() for c in group])
            rows.append(
                [arm, f"`{method}`", str(base), each, mean, shown, accuracy_cell(scores, full) if full else "-"]
            )
    told = " and ".join(map(str, budgets))
    note = (
        f"Accuracy in %, mean of the two smallest budgets ({told} tokens); intervals clustered by clip, seeds pooled "
        f"question by question; the spread is that over seeds. {text_note(page.data.conditions('finetune'))}"
    )
    head = ["arm", "memory read with", "base", "each seed", "mean of seeds", "spread", "full cache"]
    return table(head, rows, note)


def _order(key: tuple[str, str]) -> tuple[bool, bool, str, str]:
    return key[0] != OURS, key[0] != "base", *key


def controls_table(page: Page, study: Lines) -> str:
    """Ours minus every control, on each base and pooled."""
    verdict, rows = page.second, []
    bases = sorted({base for runs in study.values() for base, _ in runs})
    keys = {label(key): key for key in study}
    for row in verdict.rows:
        cells = []
        for base in bases:
            mine, theirs = tuned_pair(study, keys[row.ours], keys[row.other], row.budgets)
            pair = [c for c in theirs if c.base == base], [c for c in mine if c.base == base]
            cells.append(str(page.scores.compare(*pair)) if all(pair) else "-")
        rows.append([row.ours, row.other, *cells, difference_cell(row.found, row.every, row.p, bool(page.excluded))])
    words = counted(decided(row.found, row.p) for row in verdict.rows)
    note = (
        f"Points at the two smallest budgets, 95 % intervals clustered by clip, p by Holm over the table: {words}. "
        f"{BOLD} The untouched base stands beside every seed. {text_note(page.data.conditions('finetune'))}"
    )
    head = ["budget-aware", "minus", *(f"base {b}" for b in bases), "all bases and seeds"]
    return "### Budget-aware training minus each control\n\n" + table(head, rows, note)


def variants_table(page: Page, study: Lines, ours: tuple[str, str], budgets: Sequence[int]) -> str:
    """What was tried in the place of ours, against it on the same bases and seeds."""
    scores, both = page.scores, {**study, **variants(page.data)}
    found, cells = {}, {}
    for arm, method in sorted(variants(page.data)):
        mine, theirs = tuned_pair(both, (arm, method), ours, budgets)
        if method == "full" or not mine:
            continue
        full = tuned_pair(both, (arm, "full"), (ours[0], "full"), [None])
        found[arm] = scores.compare(theirs, mine), scores.compare(theirs, mine, every=True)
        runs = ", ".join(sorted({f"base {c.base} seed {c.seed}" for c in mine}))
        cells[arm] = [f"`{method}`", runs, accuracy_cell(scores, mine), accuracy_cell(scores, full[0])]
    p = adjusted({arm: c for arm, (c, _) in found.items()})
    rows = [[arm, *cells[arm], difference_cell(*found[arm], p[arm], bool(page.excluded))] for arm in found]
    note = (
        f"Accuracy in %, mean of {' and '.join(map(str, budgets))} tokens; last column in points, p by Holm over it. "
        f"{BOLD} {text_note(page.data.conditions('ablation'))}"
    )
    head = ["arm", "memory read with", "runs", "two smallest budgets", "full cache", f"minus `{ours[0]}`"]
    return "### What was tried in its place\n\n" + table(head, rows, note)


def all_budgets(page: Page, study: Lines, readers: Sequence[tuple[str, str]]) -> str:
    """Accuracy of every arm by budget, pooled."""
    conditions = page.data.conditions("finetune")
    budgets = sorted({c.budget for c in conditions if c.budget is not None}, reverse=True)
    rows = []
    for arm, method in sorted(readers, key=_order):
        full = [c[None] for c in study.get((arm, "full"), {}).values()]
        cells = [accuracy_cell(page.scores, full) if full else "-"]
        for b in budgets:
            group = [c[b] for c in study[arm, method].values() if b in c]
            cells.append(accuracy_cell(page.scores, group) if group else "-")
        rows.append([arm, f"`{method}`", *cells])
    head = ["arm", "memory read with", "full", *budget_head(conditions, budgets)]
    return table(head, rows, f"Accuracy in %, 95 % intervals. {text_note(conditions)}")


# The sweep of the world ----------------------------------------------------------------------------------------------

Found = dict[World, tuple[str, str, Comparison, Comparison, float]]


def sweep_found(page: Page) -> Found:
    """By world: our method, the best rival there, ours minus it (headline, all kinds), Holm's p over the worlds.

    Our method is that of goal 1 where it was measured in every world, else the best over all worlds; the rival is the
    best in each world by itself, which favours it.
    """
    grids: dict[World, Grid] = {}
    for run in page.data.study("sweep"):
        world = (run.world["loudness"], run.world["copies"], run.world["sound_share"])
        runs = [other for other in page.data.study("sweep") if other.world == run.world]
        grids.setdefault(world, grid(c for other in runs for c in other.conditions))
    grids = {w: g for w, g in sorted(grids.items()) if g.of("omnimem") and g.of("rival", "augmented")}
    if not grids:
        return {}
    scores = page.scores

    def mean(world: World, method: str) -> float:
        return scores.accuracy(grids[world].group(method, grids[world].cells[method])).value

    everywhere = [m for m in next(iter(grids.values())).of("omnimem") if all(m in g.cells for g in grids.values())]
    ours = max(everywhere, key=lambda m: (m == page.first.chosen, sum(mean(w, m) for w in grids)), default="")
    pairs = {}
    for world, own in grids.items():
        mine = ours or max(own.of("omnimem"), key=lambda m: mean(world, m))
        rivals = [m for m in own.of("rival", "augmented") if own.common(mine, m)]
        if rivals:
            rival = max(rivals, key=lambda m: mean(world, m))
            groups = own.group(rival, own.common(mine, rival)), own.group(mine, own.common(mine, rival))
            pairs[world] = mine, rival, scores.compare(*groups), scores.compare(*groups, every=True)
    p = adjusted({str(w): row[2] for w, row in pairs.items()})
    return {w: (*row, p[str(w)]) for w, row in pairs.items()}


def sweep_section(page: Page, found: Found, figure: str) -> str:
    """The map, and the numbers behind it."""
    title = "## Sweep of the world: where our method wins and loses\n\n"
    if not found:
        return title + NOT_MEASURED
    words = [decided(c, p) for _, _, c, _, p in found.values()]
    rows = []
    for world, (mine, rival, c, every, p) in found.items():
        cell = difference_cell(c, every, p, bool(page.excluded))
        rows.append([*(f"{v:g}" for v in world), f"`{mine}`", f"`{rival}`", cell, decided(c, p)])
    worst = min(found.items(), key=lambda item: item[1][2].value)
    best = max(found.items(), key=lambda item: item[1][2].value)

    def place(world: World) -> str:
        return f"loudness {world[0]:g}, copies {world[1]:g}, share of sound {world[2]:g}"

    told = (
        f"{len(found)} worlds: {counted(words)}. Best for ours: {place(best[0])} ({best[1][2]}); "
        f"worst: {place(worst[0])} ({worst[1][2]}). Frames mark worlds that are decided.\n\n"
    )
    note = (
        "Ours minus the best rival of that world, original or augmented, points averaged over the budgets of both; "
        f"p by Holm over the worlds. {BOLD} {text_note(page.data.conditions('sweep'))}"
    )
    head = ["loudness", "copies", "share of sound", "ours", "best rival", "difference", "verdict"]
    return title + told + figure + "\n" + folded("the numbers", table(head, rows, note))


# How methods were tuned ----------------------------------------------------------------------------------------------


def tuning_section(page: Page) -> str:
    """Options tried by method, on how many questions, and which were used."""
    title = "## How every method was tuned\n\n"
    runs = page.data.study("tuning")
    if not runs:
        return title + NOT_MEASURED
    used: dict[str, set[str]] = {}
    for c in page.data.conditions("main"):
        used.setdefault(c.method, set()).add(f"base {c.base}: {_short(c.tuned)}")
    tried: dict[str, list[Condition]] = {}
    for c in page.data.conditions("tuning"):
        if c.budget is not None:
            tried.setdefault(c.method, []).append(c)
    rows, effort = [], {}
    for method, own in tried.items():
        options = {_short(c.tuned) for c in own}
        effort[method] = len(options)
        best = max(own, key=lambda c: page.scores.accuracy([c]).value)
        at = f"{_short(best.tuned)} at {best.budget}: {page.scores.accuracy([best])}"
        budgets = ", ".join(map(str, sorted({c.budget for c in own if c.budget})))
        told = "; ".join(sorted(used[method])) if method in used else "not in the test"
        rows.append([f"`{method}`", str(len(options)), budgets, at, told])
    numbers = sorted(set(effort.values()))
    same = f"Every method was given {numbers[0]} sets of options." if len(numbers) == 1 else (
        f"Methods were given between {numbers[0]} and {numbers[-1]} sets of options: the effort differs."
    )  # fmt: skip
    sets = {run.clip_set: page.data.questions[run.clip_set] for run in runs}
    where = " and ".join(f"`{name}` ({len(q.ids):,} questions)" for name, q in sorted(sets.items()))
    note = f"Accuracy in %, 95 % intervals. {text_note(page.data.conditions('tuning'))}"
    head = ["method", "sets of options", "budgets", "best single setting", "options used in the test"]
    lacking = [f"`{m}`" for m in page.main.of("omnimem", "rival", "augmented") if m not in tried]
    missing = f" Not tuned: {', '.join(lacking)}." if lacking else ""
    return f"{title}{same} Tried on {where}.{missing}\n\n" + folded("what was tried", table(head, rows, note))


def _short(options: Mapping[str, object]) -> str:
    return ", ".join(f"{k}={json.dumps(v)}" for k, v in sorted(options.items())) or "no options"


# Smaller studies -----------------------------------------------------------------------------------------------------


def ablation_section(page: Page) -> str:
    """Every variant against the chosen method, or else against the first variant."""
    title = "## Ablation\n\n"
    own = grid(page.data.conditions("ablation"))
    if not own.cells:
        return title + NOT_MEASURED
    start = page.first.chosen if page.first.chosen in own.cells else next(iter(own.cells))
    conditions, scores = page.data.conditions("ablation"), page.scores
    found = {}
    for m in own.cells:
        if m != start and (budgets := own.common(start, m)):
            pair = own.group(start, budgets), own.group(m, budgets)
            found[m] = scores.compare(*pair), scores.compare(*pair, every=True)
    p = adjusted({m: c for m, (c, _) in found.items()})
    rows = []
    for m, cells in own.cells.items():
        values = [accuracy_cell(scores, cells[b]) if b in cells else "-" for b in reversed(own.budgets)]
        change = difference_cell(*found[m], p[m], bool(page.excluded)) if m in found else ""
        rows.append([f"`{m}`", *values, change])
    words = counted(decided(c, p[m]) for m, (c, _) in found.items())
    note = (
        f"Accuracy in %; last column: variant minus `{start}`, points averaged over the budgets of both, p by Holm "
        f"over the column: {words}. {BOLD} {text_note(conditions)}"
    )
    return title + table(["variant", *budget_head(conditions, reversed(own.budgets)), f"minus `{start}`"], rows, note)


def positions_section(page: Page) -> str:
    """Absolute against compact positions on the long clips."""
    title = "## Absolute and compact positions on long clips\n\n"
    places: dict[tuple[int, int, str], dict[str, Condition]] = {}
    for c in page.data.conditions("long"):
        places.setdefault((c.base, c.budget or 0, _without_positions(c)), {})[positions(c)] = c
    pairs = {k: v for k, v in places.items() if v.keys() == {"absolute", "compact"}}
    if not pairs:
        return title + NOT_MEASURED
    scores = page.scores
    found = {
        k: (
            scores.compare([v["absolute"]], [v["compact"]]),
            scores.compare([v["absolute"]], [v["compact"]], every=True),
        )
        for k, v in pairs.items()
    }
    p = adjusted({str(k): c for k, (c, _) in found.items()})
    rows = []
    for (base, budget, name), own in sorted(pairs.items(), key=lambda item: (item[0][0], item[0][2], -item[0][1])):
        cells = [accuracy_cell(scores, [own[k]]) for k in ("absolute", "compact")]
        key = (base, budget, name)
        change = difference_cell(*found[key], p[str(key)], bool(page.excluded))
        rows.append([str(base), f"`{name}`", str(budget or "full"), *cells, change])
    words = counted(decided(c, p[str(k)]) for k, (c, _) in found.items())
    note = (
        f"Accuracy in %; compact minus absolute in points, p by Holm over the column: {words}. "
        f"{BOLD} {text_note(page.data.conditions('long'))}"
    )
    return title + table(["base", "method", "budget", "absolute", "compact", "compact - absolute"], rows, note)


def positions(c: Condition) -> str:
    """The position policy of a setting: from its spec, else from its name."""
    return str(c.memory.get("positions") or ("compact" if "compact" in c.method + c.name else "absolute"))


def _without_positions(c: Condition) -> str:
    name = c.method.replace("absolute", "").replace("compact", "")
    return name.strip(" +-_,()@") or "full"


def precision_section(page: Page) -> str:
    """bfloat16 against float32: the same model, the same settings."""
    title = "## float32 and bfloat16\n\n"
    runs = {run.model: run for run in page.data.study("precision")}
    pairs: list[tuple[str, Run, Run]] = []
    for model, run in runs.items():
        stem = model.removesuffix("-float32")
        if stem != model and (other := runs.get(f"{stem}-bfloat16")):
            pairs.append((stem, run, other))
    found: dict[tuple[str, str], tuple[Condition, Condition]] = {}
    for stem, exact, half in pairs:
        by_name = {c.name: c for c in half.conditions}
        found |= {(stem, c.name): (c, by_name[c.name]) for c in exact.conditions if c.name in by_name}
    if not found:
        return title + NOT_MEASURED
    scores = page.scores
    changes = {k: (scores.compare([a], [b]), scores.compare([a], [b], every=True)) for k, (a, b) in found.items()}
    p = adjusted({str(k): c for k, (c, _) in changes.items()})
    rows = []
    for (stem, name), (a, b) in found.items():
        overlap = next((c.kept_overlap for c in (b, a) if c.kept_overlap is not None), None)
        kept = "-" if overlap is None else f"{100 * overlap:.1f} %"
        change = difference_cell(*changes[stem, name], p[str((stem, name))], bool(page.excluded))
        rows.append([stem, f"`{name}`", accuracy_cell(scores, [a]), accuracy_cell(scores, [b]), change, kept])
    note = f"Accuracy in %, points, p by Holm over the table. {BOLD} {text_note(page.data.conditions('precision'))}"
    head = ["model", "setting", "float32", "bfloat16", "bfloat16 - float32", "kept tokens in common"]
    return title + table(head, rows, note)


def modality_section(page: Page) -> str:
    """What the model answers with one modality, or none: kinds of question need what they claim to need."""
    title = "## What each modality is needed for\n\n"
    conditions = page.data.conditions("modality")
    if not conditions:
        return title + NOT_MEASURED
    kinds = [k for k in KINDS if any(k in c.questions.kinds for c in conditions)]
    rows = []
    for c in conditions:
        own = page.scores.kinds([c])
        cells = [str(own[k]) if k in own else "-" for k in kinds]
        rows.append([str(c.base), c.method, *cells, str(page.scores.accuracy([c], every=True))])
    note = "Accuracy in %, 95 % intervals, full cache; chance is 25 %. Full cache: nothing is dropped."
    return title + table(["base", "given", *kinds, "all kinds"], rows, note)
