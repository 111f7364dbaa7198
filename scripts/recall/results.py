"""The results page of the recall experiments, from saved answers alone.

    python -m scripts.recall.results [--results scripts/recall/results] [--out RESULTS.md]

Writes the page and its pictures (`figures/` in the folder of results). The same files give the same page: nothing in it
is written by hand, and every sentence that states a result is made from the numbers. A study that is not there is "not
measured"; `scripts.recall.load` says what files are expected.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omnimem_train.errors import UserError
from omnimem_train.report_eval import without_folders
from scripts.recall import figures, tables, tables_studies
from scripts.recall.load import STUDIES, Condition, Data, Questions, load
from scripts.recall.results_attempt import ON_TEST, ON_VALIDATION, Outcome, judged
from scripts.recall.results_goals import (
    BARS,
    BASES,
    MET,
    UNMEASURED,
    Verdict,
    crowded,
    own_recall,
    training_free,
)
from scripts.recall.results_scores import Scores, excluded_kinds, full_caches, grid
from scripts.recall.results_tuning import fine_tuning, lines
from scripts.recall.tables import Page
from scripts.recall.tables_attempt import attempt_section

GOALS = {
    "Goal 1, training-free": "the best method of the OmniMem family beats the best original rival by at least 2 "
    "points, averaged over the budgets where full-cache accuracy is not yet reached, and the best augmented rival with "
    "an interval above 0",
    "Goal 2, fine-tuning": "budget-aware training adds at least 2 points over the best control at the two smallest "
    "budgets, and full-cache accuracy drops by no more than 0.5",
}
CHOSEN = {
    "validation": " Our method was chosen on validation clips.",
    "test": " Our method was chosen on the test clips; p is over all pairs that this could have shown.",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m scripts.recall.results", description="Make the results page.")
    parser.add_argument("--results", type=Path, default=Path("scripts/recall/results"), help="folder of saved answers")
    parser.add_argument("--out", type=Path, default=Path("RESULTS.md"), help="the page")
    chosen = parser.parse_args(arguments)
    try:
        write(chosen.results, chosen.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {chosen.out}")
    return 0


def write(results: Path, out: Path) -> None:
    """Make the page and its pictures; pictures of an earlier page that are not made any more are removed.

    Raises:
        UserError: see `load`.
    """
    page = prepare(load(results))
    sweep = tables_studies.sweep_found(page)
    folder = results / "figures"
    drawn = pictures(page, sweep)
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.svg"):
        if old.name not in drawn:
            old.unlink()
    for name, svg in drawn.items():
        (folder / name).write_text(svg, encoding="utf-8")
    out.parent.mkdir(parents=True, exist_ok=True)
    place = Path(os.path.relpath(folder, out.parent)).as_posix()
    out.write_text(text(page, sweep, {name: f"{place}/{name}" for name in drawn}), encoding="utf-8")


def prepare(data: Data) -> Page:
    """Which kinds count, and the verdicts."""
    full = full_caches(data)
    excluded = excluded_kinds(Scores(), full)
    kinds = {kind for group in full.values() for kind in group[0].questions.kinds}
    scores = Scores(frozenset(excluded) if set(excluded) != kinds else frozenset())
    if excluded and set(excluded) == kinds:
        nothing = Verdict(UNMEASURED, ("no kind of question is answered above chance with the full cache",))
        first, second, last = nothing, nothing, None
    else:
        first = training_free(data, scores)
        second = fine_tuning(data, scores, first)
        last = judged(data, scores)
    return Page(data, scores, excluded, full, first, second, grid(data.conditions("main")), last)


# Pictures ------------------------------------------------------------------------------------------------------------


def pictures(page: Page, sweep: tables_studies.Found) -> dict[str, str]:
    """SVG by file name, of what was measured."""
    main, scores = page.main, page.scores
    rivals = [name for name in page.first.opponents if name in main.cells]
    differences = {w: (100 * row[2].value, 100 * row[2].low, 100 * row[2].high) for w, row in sweep.items()}
    words = {w: tables.decided(row[2], row[4]) for w, row in sweep.items()}
    made: dict[str, str | None] = {
        "accuracy.svg": figures.accuracy_by_budget(main, scores, page.first.chosen),
        "rivals.svg": figures.rival_panels(main, scores, page.first.chosen),
        "kinds.svg": figures.kind_panels(main, scores, [page.first.chosen, *dict.fromkeys(rivals)] if rivals else []),
        "finetune.svg": figures.tuning_panels(lines(page.data), scores),
        "sweep.svg": figures.sweep_map(differences, words),
        "kept.svg": figures.kept_panels(page.data.kept),
        "map.svg": figures.memory_map(page.data.map),
    }
    return {name: svg for name, svg in made.items() if svg is not None}


# The page ------------------------------------------------------------------------------------------------------------


def text(page: Page, sweep: tables_studies.Found, paths: dict[str, str]) -> str:
    """The whole page. `paths` are those of the pictures as the page names them."""

    def shown(name: str, alt: str, told: str) -> str:
        return f"![{alt}]({paths[name]})\n\n{told}\n" if name in paths else ""

    sweep_figure = shown("sweep.svg", "Map of the worlds: ours minus the best rival", "")
    sections = [
        "# Recall inside a memory budget: results\n",
        headline(page),
        "Made by `python -m scripts.recall.results` from saved answers alone; do not edit.\n",
        measured(page),
        tables.recall_section(page),
        tables.main_section(page),
        shown("accuracy.svg", "Accuracy by budget, one line a selector", accuracy_told(page)),
        shown("rivals.svg", "Each rival in its own and its augmented forms", "What the split and the redundancy factor "
              "do for each rival; the same line of our chosen method is in every panel."),
        shown("kinds.svg", "Accuracy by kind of question", kinds_told(page)),
        tables.adds_section(page),
        tables_studies.tuned_section(page),
        attempt_section(page),
        shown("finetune.svg", "Fine-tuned models by budget", "One line an arm, mean of base models and seeds; the "
              "panel says which selector reads the memory."),
        tables_studies.sweep_section(page, sweep, sweep_figure),
        "## What is kept\n",
        shown("kept.svg", "Kept share of picture and sound over time", kept_told(page.data.kept))
        or "Kept share by modality over time: not measured.\n",
        shown("map.svg", "Memory map of one clip", map_told(page.data.map)) or "Memory map: not measured.\n",
        tables_studies.tuning_section(page),
        tables_studies.ablation_section(page),
        tables_studies.positions_section(page),
        tables_studies.precision_section(page),
        tables_studies.modality_section(page),
        HOW,
    ]  # fmt: skip
    return "\n".join(section for section in sections if section)


HOW = """## How the numbers are made

- Clips are rendered as arrays (`data_prep/arrays.py`), encoded by the model's own towers window by window and streamed
  through the package's loop, many side by side; a file of the same clip goes through H.264 and AAC besides.
- A question is asked at the end of its clip without its options, and the likelihoods of the four options are compared
  at the first token in which they differ (cloze): a model of this size knows more than it can tell by letters.
- Accuracy: Wilson interval on an effective sample size, variance clustered by clip. Differences: paired by question,
  adjusted Wald interval clustered by clip. p: exact sign-flip test over clips, Holm's adjustment over the family that
  the table names (`omnimem_train/stats.py`). A question without an answer counts as wrong.
- Averages over budgets, seeds or base models are taken question by question, then clustered by clip.
- A goal's difference must be as large as asked, with a 95 % interval above 0 and Holm's p at most 0.05. Our method is
  chosen on validation clips where all methods of its family were tuned there, else on the test clips, and then Holm's
  adjustment is over all pairs of the family and the rivals. Besides the rival best on validation clips, the one best on
  the test clips has to be beaten. The best control of fine-tuning is the closest on the test clips, the untouched base
  among them. The loss with the full cache is judged by its value; its interval stands beside it.
- A kind of question whose full-cache interval contains 25 %, or whose full-cache accuracy is below 35 %, on any base
  model stays out of the headline.
"""


def headline(page: Page) -> str:
    """The goals, the kinds left out, the model's own recall."""
    told = []
    for (goal, asked), verdict in zip(GOALS.items(), (page.first, page.second), strict=True):
        last = page.last if verdict is page.second and goal.startswith("Goal 2") else None
        words, found = goal_words(verdict, last), f"{'; '.join(verdict.reasons)}.{CHOSEN.get(verdict.how, '')}"
        if verdict.lacking and verdict.status != UNMEASURED:
            found += f" Asked for and not measured: {'; '.join(verdict.lacking)}."
        if last is None:
            found = f"Found: {found}"
        elif words.startswith(MET) and verdict.status != MET:
            found = f"{last.told(page.scores)} The study before it ({verdict.words}) found: {found}"
        else:
            found = f"Found: {found} {last.told(page.scores)}"
        told.append(f"**{goal}: {words.upper()}.** Asked: {asked}. {found}")
    if page.excluded:
        reasons = "; ".join(f"{kind} ({why})" for kind, why in page.excluded.items())
        why = "because the model does not answer it with its full cache"
        told.append(f'**Left out of the headline**, {why}: {reasons}. Numbers after "all" are over all kinds.')
    elif page.full:
        told.append("**No kind of question is left out**: every number is over all kinds.")
    else:
        told.append("**The full cache was not measured**: no kind of question could be left out.")
    judged = own_recall(page.scores, page.full)
    for reached, word in ((False, "missed"), (True, "reached")):
        own: dict[str, list[str]] = {}
        for (base, kind), (a, ok) in judged.items():
            if ok == reached:
                seen = seen_combinations(page.full[base], kind)
                own.setdefault(kind, []).append(f"{100 * a.value:.1f} % on base {base}{seen}")
        each = [f"{kind} (asked: {100 * BARS[kind]:.0f} %) {', '.join(values)}" for kind, values in own.items()]
        if each:
            told.append(f"**The model's own recall with its full cache, {word}:** {'; '.join(each)}.")
    if crowded := full_windows(page.data):
        told.append(f"**Unfair to rivals:** {crowded}")
    return "\n\n".join(told) + "\n"


def goal_words(verdict: Verdict, last: Outcome | None) -> str:
    """The status of a goal; what a later attempt met on fewer base models than were asked is called just that."""
    if last is None or last.status != MET or verdict.status == MET:
        return verdict.words
    if len(last.bases) < BASES:
        return f"{verdict.words}; met by a later attempt on {len(last.bases)} base model of {BASES}"
    if last.lacking:
        return f"{MET} against the controls measured, {len(last.lacking)} is open"
    return MET


def seen_combinations(group: Sequence[Condition], kind: str) -> str:
    """Accuracy of a kind on the combinations of attributes that training had, in words."""
    right = [c.right[(np.array(c.questions.kinds) == kind) & ~c.questions.held_out] for c in group]
    values = np.concatenate(right)
    return f" ({100 * values.mean():.1f} % on combinations seen in training)" if len(values) else ""


def full_windows(data: Data) -> str:
    """Rivals that always keep their newest tokens, at budgets of which these take half or more; "" for none."""
    told = []
    for name, own in crowded(data).items():
        shares = ", ".join(f"{100 * x:.0f} % of {b}" for b, x in sorted(own.items()))
        told.append(f"`{name}` spends {shares} tokens on the newest ones")
        smaller = [c for c in data.conditions("ablation") if c.memory.get("selector") == name]
        if smaller:
            found = ", ".join(f"{100 * c.right.mean():.1f} % at {c.budget}" for c in smaller)
            told[-1] += f" (measured since, `{smaller[0].method}`: {found})"
    return f"{'; '.join(told)}. Tuning did not choose, or was not offered, a smaller window." if told else ""


def measured(page: Page) -> str:
    """Studies, clip sets, machines, versions and commands."""
    data = page.data
    title = "## What was measured\n\n"
    if not data.runs:
        return title + tables.NOT_MEASURED
    rows = []
    for study in STUDIES:
        runs = data.study(study)
        if not runs and study in (ON_VALIDATION, ON_TEST):
            continue
        answers = sum(c.predicted.size for c in data.conditions(study))
        silent = sum(int((c.predicted < 0).sum()) for c in data.conditions(study))
        names = sorted({run.clip_set for run in runs})
        sets = ", ".join(names) if len(names) < 5 else f"{len(names)} sets"
        tokens = f"{statistics.mean(run.full_tokens for run in runs):,.0f}" if runs else ""
        own = [str(len(runs)), str(len(data.conditions(study))), sets, tokens, f"{answers:,}", f"{silent:,}"]
        rows.append([study, *(own if runs else ["not measured", *[""] * 5])])
    head = ["study", "runs", "settings", "clip sets", "tokens a stream", "answers", "without an answer"]
    parts = [title, tables.table(head, rows), "\n"]
    parts.append(clip_sets(data))
    machines = "; ".join(sorted({without_folders(run.machine) for run in data.runs}))
    versions = sorted({f"{k} {v}" for run in data.runs for k, v in run.versions.items()})
    parts.append(f"\nMachines: {machines}. Versions: {', '.join(versions)}.\n\n")
    commands = sorted({without_folders(run.command) for run in data.runs})
    parts.append(tables.folded("commands", "```\n" + "\n".join(commands) + "\n```\n"))
    return "".join(parts)


def clip_sets(data: Data) -> str:
    """Sizes of the clip sets; those of the sweep together."""
    groups: dict[str, list[Questions]] = {}
    for name, q in data.questions.items():
        groups.setdefault("sweep, all worlds" if name.startswith("sweep-") else name, []).append(q)
    rows = []
    for name, own in groups.items():
        kinds = [kind for q in own for kind in q.kinds]
        each = ", ".join(f"{k} {kinds.count(k):,}" for k in tables.KINDS if k in kinds)
        held_out = sum(int(q.held_out.sum()) for q in own) / len(kinds)
        clips = sum(len(set(q.clips)) for q in own)
        rows.append([name, f"{clips:,}", f"{len(kinds):,}", each, f"{100 * held_out:.0f} %"])
    return tables.table(["clip set", "clips", "questions", "by kind", "held-out combinations"], rows)


# Words on pictures ---------------------------------------------------------------------------------------------------


def accuracy_told(page: Page) -> str:
    """The ends of the smallest budget."""
    main, scores = page.main, page.scores
    smallest = min(main.budgets, default=0)
    drawn = [m for m in main.of("omnimem", "rival", "reference") if smallest in main.cells[m]]
    if not drawn:
        return ""
    value = {m: scores.accuracy(main.cells[m][smallest]) for m in drawn}
    top, bottom = max(value, key=lambda m: value[m].value), min(value, key=lambda m: value[m].value)
    ends = f"`{top}` is highest ({value[top]}), `{bottom}` lowest ({value[bottom]})"
    told = f"At the smallest budget, {smallest} tokens, {ends}"
    full = f"; the full cache has {scores.accuracy(main.full)}" if main.full else ""
    return f"{told}{full}. Augmented rivals are in the next picture. {tables.text_note(page.data.conditions('main'))}"


def kinds_told(page: Page) -> str:
    """Which kind our method loses most on."""
    main, ours = page.main, page.first.chosen
    if ours not in main.cells or not main.full:
        return ""
    full, least = page.scores.kinds(main.full), page.scores.kinds(next(iter(main.cells[ours].values())))
    loss = {kind: full[kind].value - least[kind].value for kind in full if kind not in page.excluded}
    kind = max(loss, key=lambda k: loss[k])
    return f"Between full cache and smallest budget, `{ours}` loses most on {kind} ({100 * loss[kind]:.1f} points)."


def kept_told(kept: Any) -> str:
    """Mean kept shares."""
    if kept is None:
        return ""
    mean = {name: [100 * statistics.mean(m[k]) for k in ("visual", "audio")] for name, m in kept["methods"].items()}
    told = [f"{name}: picture {picture:.1f} %, sound {sound:.1f} %" for name, (picture, sound) in mean.items()]
    return f"Mean over the time shown, of each modality's tokens: {'; '.join(told)}."


def map_told(found: Any) -> str:
    """How much of what is kept comes from events, against the time that they take."""
    if found is None:
        return ""

    def inside(seconds: Sequence[float], kind: str) -> float:
        spans = [(e["start_s"], e["end_s"]) for e in found["events"] if e["kind"] == kind]
        return 100 * statistics.mean(any(a <= s < b for a, b in spans) for s in seconds) if seconds else 0.0

    time = [found["seconds"] * (i + 0.5) / 1000 for i in range(1000)]
    told = []
    for name, m in found["methods"].items():
        picture, sound = inside(m["visual_s"], "sight"), inside(m["audio_s"], "sound")
        told.append(f"{name}: {picture:.0f} % of the kept picture, {sound:.0f} % of the kept sound")
    cover = f"sights take {inside(time, 'sight'):.0f} % of the time and sounds {inside(time, 'sound'):.0f} %"
    return f"Kept tokens from within sights and sounds ({cover}): {'; '.join(told)}."


if __name__ == "__main__":
    sys.exit(main())
