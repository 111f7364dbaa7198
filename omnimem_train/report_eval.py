"""The evaluation's part of the report: what may be said, the table, accuracy by budget and by category, failures."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omnimem_train.charts import Axis, Level, Line, Point, bar_scale, chart, interval_bar, legend, rows_chart
from omnimem_train.errors import UserError
from omnimem_train.evaluate import ItemResult, collect
from omnimem_train.evaluation import FULL, outcomes, what_counts
from omnimem_train.markup import Markup, details, join, tag
from omnimem_train.memory.spec import parse_bytes
from omnimem_train.records import read_object
from omnimem_train.stats import by_category

Row = Mapping[str, Any]
ALPHA = 0.05
FEW_CLIPS = 20
SHOWN = 12  # failed items and panels that are shown unfolded

# of the table: heading, class
COLUMNS = (("selector", "left key"), ("budget", "key"), ("base, %", None), ("adapter, %", None), ("0 to 100 %", "bar"),
           ("difference, points", None), ("difference drawn", "bar"), ("p (Holm)", "number"),
           ("questions / clips", "number"), ("answered", "number"))  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation's folder holds.

    Attributes:
        rows: of `summary.json`.
        failed: of `summary.json`: items without an answer.
        planned: names of the settings of `settings.json`.
        answers: those the rows were made from, by the name of the setting; empty when they are not these any more.
        config: `config.yaml`, or empty.
    """

    rows: Sequence[Row]
    failed: Sequence[Mapping[str, str]]
    planned: Sequence[str]
    answers: Mapping[str, Sequence[ItemResult]]
    config: str

    @property
    def chance(self) -> tuple[float, int] | None:
        """Mean of 1 / options over the questions whose number of options is known, and how many those are."""
        options = {r.question: len(r.scores) for own in self.answers.values() for r in own if r.scores}
        return (sum(1 / n for n in options.values()) / len(options), len(options)) if options else None


def read_evaluation(folder: Path) -> Evaluation:
    """Read an evaluation's folder.

    Raises:
        UserError: there is no summary, or it is not one.
    """
    path = folder / "summary.json"
    if not path.is_file():
        cause = "there is no summary.json, which is written at the end"
        raise UserError(f"{folder} holds no finished evaluation", cause, "finish `omnimem eval`, or name its folder")
    try:
        summary = read_object(path)
        rows, failed = list(summary["rows"]), list(summary["failed"])
        for row in rows:
            _ = [row[k] for k in ("name", "method", "budget", "adapter", "memory", "n", "clips", "coverage")]
            _ = [float(row[k]) for k in ("accuracy", "low", "high")]
            _ = [float(row["difference"][k]) for k in ("value", "low", "high", "p_holm") if "difference" in row]
        _ = [item[k] for item in failed for k in ("question", "clip", "why")]
        settings = read_object(about) if (about := folder / "settings.json").is_file() else {}
        names = {key: str(setting["name"]) for key, setting in settings.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{path}, or settings.json beside it, is no summary of an evaluation"
        raise UserError(what, cause=repr(error), remedy="run the evaluation again: it rewrites them") from error
    answers: dict[str, list[ItemResult]] = {}
    for result in collect(folder):
        if result.key in names:
            answers.setdefault(names[result.key], []).append(result)
    same = all(_answers_give(answers.get(row["name"], []), row) for row in rows)
    config = folder / "config.yaml"
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    return Evaluation(rows, failed, list(names.values()), answers if same else {}, text)


def _answers_give(answers: Sequence[ItemResult], row: Row) -> bool:
    """Whether these answers are those that a row of the summary was made from."""
    right = sum(r.correct for r in answers)
    return len(answers) == row["n"] and math.isclose(right, row["accuracy"] * row["n"], abs_tol=1e-6)


# What may be said ----------------------------------------------------------------------------------------------------


def verdict(d: Mapping[str, float]) -> tuple[str, str]:
    """A class ("better", "worse" or "open") and words for a difference; only what interval and test both carry."""
    if not (d["low"] > 0 or d["high"] < 0):
        return "open", "not distinguishable from 0"
    side = "above" if d["low"] > 0 else "below"
    if not d["p_holm"] <= ALPHA:
        return "open", f"interval {side} 0, but the test over all comparisons does not exclude 0 (p {_p(d['p_holm'])})"
    word = "better" if d["low"] > 0 else "worse"
    return word, f"{word} with the adapter (interval {side} 0, p {_p(d['p_holm'])})"


def headlines(rows: Sequence[Row]) -> list[Markup]:
    """The adapter against its base, as sentences: all comparisons counted, then those of the first selector and
    whatever is not "not distinguishable". Which ones are named does not depend on how well they went."""
    compared = sorted((r for r in rows if "difference" in r), key=_size)
    if not compared:
        kinds = {bool(r["adapter"]) for r in rows}
        what = {frozenset({True}): "Only the adapter was measured", frozenset({False}): "Only the base was measured"}
        start = what.get(frozenset(kinds), "The adapter was not compared with its base on the same memory")
        return [Markup(f"{start}: nothing can be said here about what the adapter changes.")]
    counts = Counter(verdict(r["difference"])[0] for r in compared)
    tested = "1 comparison" if len(compared) == 1 else f"{len(compared)} comparisons"
    told = f"{counts['better']} better, {counts['worse']} worse, {counts['open']} not distinguishable"
    lines = [join(f"Adapter against base, {tested} on the same questions: {told}.")] if len(compared) > 1 else []
    first = next((r["method"] for r in rows if r["method"] != FULL), FULL)
    for row in compared:
        kind, words = verdict(row["difference"])
        if kind == "open" and row["method"] not in (first, FULL):
            continue
        memory = "with the full cache" if row["budget"] == FULL else f"at budget {row['budget']} with {row['method']}"
        difference = f"Adapter minus base {memory}: {_difference(row['difference'], ' points')}, "
        lines.append(join([difference, tag("span", words, cls=None if kind == "open" else kind), "."]))
    return lines


def context(e: Evaluation) -> list[Markup]:
    """What the reader must know before believing the headlines."""
    lines = []
    clips = max((r["clips"] for r in e.rows), default=0)
    if 0 < clips < FEW_CLIPS:
        told = f"Few clips ({clips}): questions about one clip are not independent, so the intervals are wide."
        lines.append(join(told))
    if e.chance is not None:
        level, known = e.chance
        above = sum(r["low"] > level for r in e.rows)
        told = f"Chance is {100 * level:.1f} % (1 / options, mean over {known} questions): "
        lines.append(join(f"{told}{above} of {len(e.rows)} settings have an interval above it."))
    if e.failed:
        lines.append(join(f"{_items(len(e.failed))} gave no answer under one setting or more and count as wrong."))
    if missing := set(e.planned) - {r["name"] for r in e.rows}:
        lines.append(join(f"Not measured yet: {', '.join(sorted(missing))}."))
    return lines


def _size(row: Row) -> float:
    """For sorting by budget: tokens or bytes; the full cache last."""
    if row["budget"] == FULL:
        return math.inf
    return float(parse_bytes(row["budget"]) if isinstance(row["budget"], str) else row["budget"])


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def _difference(d: Mapping[str, float], unit: str = "") -> str:
    return f"{100 * d['value']:+.1f}{unit} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]"


def _items(n: int) -> str:
    return "1 question" if n == 1 else f"{n} questions"


# The sections --------------------------------------------------------------------------------------------------------


def evaluation_section(e: Evaluation) -> list[Markup]:
    """Everything about an evaluation but the headlines."""
    if not e.rows:
        return [tag("h2", "Evaluation"), tag("p", "No setting has an answer yet.", cls="note")]
    parts = [tag("h2", "Accuracy"), results_table(e.rows)]
    told = f"95 % intervals, clustered by clip. p: McNemar's exact test, Holm's adjustment. {what_counts(e.rows)}"
    parts.append(tag("p", told, " Hollow marks: base; filled: adapter.", cls="soft"))
    parts += [tag("h2", "Accuracy by budget"), *budget_charts(e)]
    return [*parts, *category_charts(e), *failures(e.failed)]


def _pairs(rows: Sequence[Row]) -> dict[str, tuple[Row | None, Row | None]]:
    """(base, adapter) by the name of the memory, in the order of the budget."""
    pairs: dict[str, tuple[Row | None, Row | None]] = {}
    for row in sorted(rows, key=_size):
        name = row["name"].removesuffix("+adapter") if row["adapter"] else row["name"]
        base, adapter = pairs.get(name, (None, None))
        pairs[name] = (base, row) if row["adapter"] else (row, adapter)
    return pairs


def results_table(rows: Sequence[Row]) -> Markup:
    """A row for each selector and budget; columns without content are left out."""
    differences = [r["difference"] for r in rows if "difference" in r]
    widest = 100 * max((abs(d[k]) for d in differences for k in ("low", "high")), default=0.1)
    reach = float(min(100, 5 * math.ceil(widest / 5)))
    pairs = [(base, adapter) for base, adapter in _pairs(rows).values()]
    lines = [_cells(base, adapter, reach) for base, adapter in pairs]
    used = [i for i in range(len(COLUMNS)) if any(cells[i] is not None for cells in lines)]
    scales = {"0 to 100 %": bar_scale(0, 100, False), "difference drawn": bar_scale(-reach, reach, True)}
    heads = [tag("th", scales.get(label, label), cls=cls, scope="col") for label, cls in COLUMNS]
    labels = [label if label != "difference drawn" else f"-{reach:g} to +{reach:g}" for label, _ in COLUMNS]
    body = []
    for i, cells in enumerate(lines):
        new = i == 0 or cells[1] != lines[i - 1][1]
        named = [tag("td", cells[k], cls=COLUMNS[k][1], data_label=labels[k]) for k in used]
        body.append(tag("tr", named, cls="first" if new else None))
    return tag("table", tag("thead", tag("tr", [heads[k] for k in used])), tag("tbody", body))


def _cells(base: Row | None, adapter: Row | None, reach: float) -> list[object]:
    """Contents for `COLUMNS`, None for nothing. `reach` is the end of the differences' scale, in points."""
    row = base or adapter
    assert row is not None
    found = [r for r in (base, adapter) if r is not None]
    marks = [(100 * r["accuracy"], 100 * r["low"], 100 * r["high"], _style(r["adapter"])) for r in found]
    cells: list[object] = [row["method"], row["budget"], _accuracy(base), _accuracy(adapter)]
    cells.append(interval_bar(marks, 0, 100, False))
    if adapter is not None and (d := adapter.get("difference")):
        drawn = interval_bar([(100 * d["value"], 100 * d["low"], 100 * d["high"], _style(True))], -reach, reach, True)
        cells += [_spans(_difference(d)), drawn, _p(d["p_holm"]).removeprefix("= ")]
    else:
        cells += [None, None, None]
    answered = dict.fromkeys("100 %" if r["coverage"] == 1 else f"{100 * r['coverage']:.1f} %" for r in found)
    return [*cells, f"{row['n']} / {row['clips']}", " / ".join(answered)]


def _accuracy(row: Row | None) -> Markup | None:
    if row is None:
        return None
    return _spans(f"{100 * row['accuracy']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]")


def _spans(text: str) -> Markup:
    """ "value [low, high]" with the interval set back."""
    value, interval = text.split(" ", 1)
    return tag("span", value, " ", tag("span", interval, cls="soft"))


def _style(adapter: bool, colour: int = 0) -> Line:
    return Line("adapter" if adapter else "base", (), colour, dashed=not adapter, markers=True)


def budget_charts(e: Evaluation) -> list[Markup]:
    """Accuracy by budget: all selectors together, then each with its intervals. Tokens and bytes apart."""
    parts: list[Markup] = []
    for sizes in (False, True):
        rows = [r for r in e.rows if r["budget"] != FULL and isinstance(r["budget"], str) == sizes]
        if rows:
            parts += _budget_panels(e, sorted(rows, key=_size), sizes)
    return parts or [tag("p", "Only the full cache was measured.", cls="note")]


def _budget_panels(e: Evaluation, rows: Sequence[Row], sizes: bool) -> list[Markup]:
    levels = [
        Level(
            f"full cache, {'adapter' if r['adapter'] else 'base'}", 100 * r["accuracy"], None if r["adapter"] else "5 3"
        )
        for r in e.rows
        if r["budget"] == FULL
    ]
    if e.chance is not None:
        levels.append(Level("chance", 100 * e.chance[0], "1 4"))
    names = {_size(r): str(r["budget"]) for r in rows}
    label = "budget, memory of all layers (log scale)" if sizes else "budget, tokens a layer (log scale)"
    x = Axis(label, log=True, at=sorted(names), text=lambda v: names[v])
    highest = 100 * max(r["high"] for r in rows)
    y = Axis("accuracy, %", low=0.0, high=min(100.0, 10 * math.ceil(highest / 10)), text=lambda v: f"{v:.4g}")
    methods = list(dict.fromkeys(r["method"] for r in rows))
    figures = {m: _method_lines(m, [r for r in rows if r["method"] == m], i) for i, m in enumerate(methods)}
    every = [line for own in figures.values() for line in own]
    panels = _overview(every, x, y, levels) if len(methods) > 1 else []
    panels += [_figure(m, chart(lines, x, y, levels)) for m, lines in figures.items()]
    return [legend(every, levels), tag("div", panels[:SHOWN], cls="grid"), *_more(panels[SHOWN:])]


def _overview(lines: Sequence[Line], x: Axis, y: Axis, levels: Sequence[Level]) -> list[Markup]:
    """All selectors without intervals, base and adapter apart; the scale stays that of the other panels, so that
    differences do not look larger than beside their intervals."""
    panels = []
    for dashed, what in ((True, "base"), (False, "adapter")):
        own = [replace(n, points=[Point(p.x, p.y) for p in n.points]) for n in lines if n.dashed == dashed]
        if own:
            near = [v for v in levels if not v.name.startswith(FULL) or v.name.endswith(what)]
            panels.append(_figure(f"all selectors, {what}, without intervals", chart(own, x, y, near)))
    return panels


def _method_lines(method: str, rows: Sequence[Row], colour: int) -> list[Line]:
    lines = []
    for adapter in (False, True):
        own = [r for r in rows if r["adapter"] == adapter]
        points = [Point(_size(r), *(100 * r[k] for k in ("accuracy", "low", "high"))) for r in own]
        if points:
            lines.append(Line(f"{method}, {'adapter' if adapter else 'base'}", points, colour, not adapter, True))
    return lines


def category_charts(e: Evaluation) -> list[Markup]:
    """Accuracy by category; nothing when questions have none."""
    if not e.answers:
        said = "The answers in the folder are not those of its summary; accuracy by category and chance are left out."
        return [tag("p", said, " Run the evaluation again to bring them together.", cls="note")]
    tables = {name: by_category(outcomes(own)) for name, own in e.answers.items()}
    kinds = sorted({kind for table in tables.values() for kind in table})
    if not any(kinds):
        return []
    panels = []
    for name, pair in _pairs(e.rows).items():
        rows = []
        for kind in kinds:
            marks = []
            for row in pair:
                if row is not None and (a := tables[row["name"]].get(kind)):
                    marks.append((Point(0, 100 * a.value, 100 * a.low, 100 * a.high), _style(row["adapter"]), a.n))
            if marks:
                rows.append((kind or "(none)", _items(marks[0][2]), [(p, s) for p, s, _ in marks]))
        panels.append(_figure(name.replace("@", ", budget ") if name != FULL else "full cache", rows_chart(rows)))
    adapters = {bool(r["adapter"]) for r in e.rows}
    told = "Per cent with 95 % intervals. Many intervals at once: some lie apart by chance alone."
    shown = [tag("div", panels[:3], cls="grid"), *_more(panels[3:])]
    return [tag("h2", "Accuracy by category"), tag("p", told, cls="soft"),
            legend([_style(a) for a in sorted(adapters)]), *shown]  # fmt: skip


def _figure(title: str, content: Markup) -> Markup:
    return tag("figure", tag("figcaption", title), content)


def _more(panels: Sequence[Markup]) -> list[Markup]:
    return [details(f"{len(panels)} more", tag("div", panels, cls="grid"))] if panels else []


def failures(failed: Sequence[Mapping[str, str]]) -> list[Markup]:
    """Items without an answer, with the reason."""
    if not failed:
        return []
    keys = ("question", "clip", "why")
    rows = []
    for item in failed:
        cells = [tag("td", without_folders(str(item[key])), data_label=key, cls="left") for key in keys]
        rows.append(tag("tr", cells))
    heads = tag("tr", [tag("th", key, cls="left", scope="col") for key in keys])
    summary = f"{_items(len(failed))} without an answer"
    table = tag("table", tag("thead", heads), tag("tbody", rows))
    return [tag("h2", "Failed"), details(summary, table, opened=len(failed) <= SHOWN)]


def without_folders(text: str) -> str:
    """Absolute paths by their last part: a page that is passed on should not tell where files lay."""
    return re.sub(r"(?<![\w.:/])/(?:[^/\s'\"]+/)+(?=[^/\s'\"])", "…/", text)
