"""Section of the results page about the last attempt at the goal of fine-tuning."""

from __future__ import annotations

from scripts.recall.results_attempt import ON_TEST, ON_VALIDATION, Outcome, Tried, attempt_lines
from scripts.recall.results_goals import points
from scripts.recall.results_tuning import CONTROLS, label
from scripts.recall.tables import BOLD, Page, accuracy_cell, difference_cell, table, text_note

RULE = (
    "Chosen, by a rule: the highest mean accuracy at the two budgets among the combinations whose full-cache accuracy "
    "on validation clips drops by at most 0.5 points against the untouched base; if none does, the highest of all. The "
    "rule is older than every measurement; c15 to c22 were added after none of the first fourteen had kept its full "
    "cache. Validation clips hold no combination of attributes that was kept out of training, test clips do."
)


def attempt_section(page: Page) -> str:
    """The combinations on validation clips, the chosen one on the test; "" where there was no attempt."""
    last = page.last
    if last is None:
        return ""
    parts = [f"### The last attempt: combinations\n\n{last.told(page.scores)} {RULE}\n", tried_table(page, last)]
    if last.closest is not None:
        parts += [arms_table(page, last), versus_table(page, last)]
    return "\n".join(parts)


def tried_table(page: Page, last: Outcome) -> str:
    """A row a combination, best first."""
    rows = []
    for t in last.choice.tried:
        name = f"**{t.arm}**" if t.arm == last.choice.arm else t.arm
        full = f"{100 * t.full:.1f} ({100 * t.drop:+.1f})"
        rows.append([name, *trained(t), f"`{t.method}`", f"{100 * t.accuracy:.1f}", full, "yes" if t.kept else "no"])
    found = page.data.conditions(ON_VALIDATION)
    budgets = sorted({c.budget for c in found if c.budget is not None})
    base = [c for c in found if c.arm == "base" and c.budget is not None]
    untouched = f"{100 * sum(c.right.mean() for c in base) / len(base):.1f} %" if base else "not measured"
    note = (
        f"One seed each, base 0, validation clips; accuracy in %, mean of {' and '.join(map(str, budgets))} tokens; "
        f"the untouched base, read with its best training-free method: {untouched}. Bold: chosen. {text_note(found)}"
    )
    head = ["combination", "steps", "learning rate", "loss", "budgets", "full-cache steps", "memory read with"]
    return table([*head, "two smallest budgets", "full cache (change)", "kept"], rows, note)


def trained(t: Tried) -> list[str]:
    """How a combination was trained: steps, learning rate, loss, budgets, share of full-cache steps."""
    own = t.training
    parts = [("answer", own["answer"]), ("distil", own["distill"]), ("retention", own["retention"])]
    loss = " + ".join(f"{weight:g} {name}" for name, weight in parts if weight)
    budgets = " to ".join(map(str, own["budgets"]))
    return [str(own["steps"]), f"{own['lr']:g}", loss, budgets, f"{100 * own['full_share']:.0f} %"]


def arms_table(page: Page, last: Outcome) -> str:
    """Every arm on the test clips: each seed, their mean, the full cache."""
    study, rows = attempt_lines(page.data), []
    for arm, method in sorted(study, key=lambda key: (key[0] != last.choice.arm, key[0] in CONTROLS, key)):
        runs = {run: cells for run, cells in study[arm, method].items() if all(b in cells for b in last.budgets)}
        if method == "full" or not runs:
            continue
        groups = {run: [cells[b] for b in last.budgets] for run, cells in sorted(runs.items(), key=str)}
        values = {run: f"{100 * page.scores.accuracy(group).value:.1f}" for run, group in groups.items()}
        told = {base: ", ".join(v for (b, _), v in values.items() if b == base) for base in last.bases}
        each = "; ".join(f"base {base}: {seeds}" for base, seeds in told.items() if seeds)
        full = [cells[None] for cells in study.get((arm, "full"), {}).values() if None in cells]
        mean = accuracy_cell(page.scores, [c for group in groups.values() for c in group])
        rows.append([arm, f"`{method}`", each, mean, accuracy_cell(page.scores, full) if full else "-"])
    drop = "not measured" if last.drop is None else points(last.drop)
    note = (
        f"Test clips, accuracy in %, mean of {' and '.join(map(str, last.budgets))} tokens. `fixed_74`, `fixed_49` "
        f"(one budget) and `full` (full cache) were trained anew with as many steps and the learning rate in "
        f"their names (x2: 200, lr10: 0.001); arms without such an ending are those of the study above, 100 steps at "
        f"0.0005. Full cache "
        f"of `{last.choice.arm}`, after minus before: {drop}. {text_note(page.data.conditions(ON_TEST))}"
    )
    return table(["arm", "memory read with", "each seed", "mean of seeds", "full cache"], rows, note)


def versus_table(page: Page, last: Outcome) -> str:
    """The chosen combination minus every control."""
    bases = {label(key): sorted({base for base, _ in group}) for key, group in attempt_lines(page.data).items()}
    rows = [
        [
            r.ours,
            r.other,
            " and ".join(map(str, bases[r.other])),
            difference_cell(r.found, r.every, r.p, bool(page.excluded)),
        ]
        for r in sorted(last.rows, key=lambda row: row.found.value)
    ]
    note = (
        f"Points at {' and '.join(map(str, last.budgets))} tokens, paired by question and seed, 95 % intervals "
        f"clustered by clip, p by Holm over the table; {last.where()}. A row is about the bases it names; "
        f"rows on all of them decide. {BOLD}"
    )
    return table(["chosen", "minus", "bases", "difference"], rows, note)
