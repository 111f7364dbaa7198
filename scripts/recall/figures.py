"""The pictures of the results page; each function returns SVG text, or None when its data was not measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from omnimem_train.charts import HEIGHT, WIDTH, Axis, Level, Line, Point, chart
from omnimem_train.markup import Markup, tag
from scripts.recall.figures_svg import Panel, sheet
from scripts.recall.load import Condition
from scripts.recall.results_scores import CHANCE, RIVALS, Grid, Scores, rule
from scripts.recall.results_tuning import OURS, Lines

WIDE, TALL = (760, 500), (WIDTH, 320)  # sizes of charts
FORMS = {(False, False): "own form", (False, True): "with the split", (True, False): "with redundancy",
         (True, True): "with both"}  # fmt: skip


def accuracy_by_budget(main: Grid, scores: Scores, chosen: str) -> str | None:
    """One line a selector: our chosen method, and every rule in its own form, and the references."""
    methods = [m for m in main.of("omnimem", "rival", "reference") if "+" not in m or m == chosen]
    if not methods:
        return None
    own = [line_of(main, scores, m, i, m in main.of("reference")) for i, m in enumerate(methods)]
    own = [replace(line, name=f"{line.name} (chosen)") if line.name == chosen else line for line in own]
    levels = _levels(main, scores, low := lowest(own))
    panel = Panel("", _by_budget(own, main, levels, WIDE, 6.0, low), *WIDE)
    return sheet("Accuracy by budget, 95 % intervals", [panel], 1, own, levels)


def rival_panels(main: Grid, scores: Scores, chosen: str) -> str | None:
    """A panel a rival: its own form and its augmented ones, beside our chosen method."""
    if chosen not in main.cells:
        return None
    ours = line_of(main, scores, chosen, 0)
    charts: dict[str, list[Line]] = {}
    entries = {ours.name: ours}
    for selector, name in RIVALS.items():
        drawn = [ours]
        for m in main.of("rival", "augmented"):
            r = rule(main.cells[m][main.common(m)[0]][0])
            if r.selector == selector:
                form = list(FORMS).index((r.redundancy, r.split))
                line = line_of(main, scores, m, 1 + form, dashed=main.family[m] == "augmented")
                drawn.append(line)
                shown = replace(line, name=FORMS[r.redundancy, r.split])
                entries[shown.name] = shown
        if len(drawn) > 1:
            charts[name] = drawn
    low = lowest(line for drawn in charts.values() for line in drawn)
    levels = _levels(main, scores, low)
    panels = [Panel(n, _by_budget(drawn, main, levels, TALL, low=low), *TALL) for n, drawn in charts.items()]
    title = "Each rival, augmented, against our method"
    return sheet(title, panels, 2, list(entries.values()), levels) if panels else None


def kind_panels(main: Grid, scores: Scores, methods: Sequence[str]) -> str | None:
    """A panel a kind of question, every kind: accuracy by budget of a few methods."""
    if not methods or not main.full:
        return None
    full = scores.kinds(main.full)
    entries = [Line(m, (), i, markers=True) for i, m in enumerate(methods)]
    tables = {(m, b): scores.kinds(main.cells[m][b]) for m in methods for b in main.cells[m]}
    panels = []
    for kind in full:
        drawn = []
        for entry in entries:
            found = {b: tables[entry.name, b][kind] for b in main.cells[entry.name]}
            points = [Point(b, 100 * a.value, 100 * a.low, 100 * a.high) for b, a in found.items()]
            drawn.append(replace(entry, points=points))
        levels = [Level("full cache", 100 * full[kind].value), Level("chance", 100 * CHANCE, "1 4")]
        left_out = ", not in the headline" if kind in scores.excluded else ""
        panels.append(Panel(kind + left_out, _by_budget(drawn, main, levels), WIDTH, HEIGHT))
    return sheet("Accuracy by kind of question", panels, 2, entries, _levels(main, scores))


def line_of(main: Grid, scores: Scores, method: str, colour: int, dashed: bool = False) -> Line:
    """A method's accuracy over the kinds that count, by budget."""
    found = {b: scores.accuracy(group) for b, group in main.cells[method].items()}
    points = [Point(b, 100 * a.value, 100 * a.low, 100 * a.high) for b, a in found.items()]
    return Line(method, points, colour, dashed, markers=True)


def _levels(main: Grid, scores: Scores, low: float = 0.0) -> list[Level]:
    """Full cache and chance, where they are on a scale that begins at `low`."""
    full = [Level("full cache", 100 * scores.accuracy(main.full).value)] if main.full else []
    return [v for v in (*full, Level("chance", 100 * CHANCE, "1 4")) if v.y >= low]


def _by_budget(
    drawn: Sequence[Line],
    main: Grid,
    levels: Sequence[Level],
    size: tuple[int, int] = (WIDTH, HEIGHT),
    apart: float = 5.0,
    low: float = 0.0,
) -> Markup:
    x = Axis("budget, tokens a layer (log scale)", log=True, at=main.budgets, text=lambda v: f"{v:g}")
    return chart(drawn, x, _per_cent(low), levels, size, apart)


def lowest(drawn: Iterable[Line]) -> float:
    """Where a scale may begin so that intervals can be told apart: the tens below all of them."""
    return 10.0 * min((p.y if p.low is None else p.low) // 10 for line in drawn for p in line.points)


def _per_cent(low: float) -> Axis:
    return Axis("accuracy, %", low=low, high=100.0, text=lambda v: f"{v:.4g}")


def tuning_panels(study: Lines, scores: Scores) -> str | None:
    """Fine-tuning: a panel a selector, a line an arm, averaged over bases and seeds."""
    arms = sorted({arm for arm, _ in study}, key=lambda a: (a != OURS, a == "base", a))
    entries = [Line(arm, (), i, dashed=arm == "base", markers=True) for i, arm in enumerate(arms)]
    charts: dict[str, list[Line]] = {}
    budgets = sorted({b for runs in study.values() for cells in runs.values() for b in cells if b})
    for method in sorted({method for _, method in study} - {"full"}):
        drawn = []
        for entry in entries:
            runs = study.get((entry.name, method), {})
            found: dict[int, list[Condition]] = {}
            for cells in runs.values():
                for budget, c in cells.items():
                    found.setdefault(budget or 0, []).append(c)
            values = {b: scores.accuracy(found[b]) for b in sorted(found)}
            points = [Point(b, 100 * a.value, 100 * a.low, 100 * a.high) for b, a in values.items()]
            drawn.append(replace(entry, points=points))
        charts[method] = [line for line in drawn if line.points]
    if not charts:
        return None
    low = lowest(line for drawn in charts.values() for line in drawn)
    x = Axis("budget, tokens a layer (log scale)", log=True, at=budgets, text=lambda v: f"{v:g}")
    panels = []
    for method, drawn in charts.items():
        picture = chart(drawn, x, _per_cent(low), size=TALL, apart=5.0)
        panels.append(Panel(f"memory read with {method}", picture, *TALL))
    return sheet("Fine-tuned models by budget", panels, min(2, len(panels)), entries)


# Sweep of the world --------------------------------------------------------------------------------------------------

World = tuple[float, float, float]
CELL = (94, 46)


def sweep_map(found: Mapping[World, tuple[float, float, float]], decided: Mapping[World, str]) -> str | None:
    """A panel a share of sound; columns loudness, rows copies; colour and number are ours minus the best rival.

    Args:
        found: difference with interval, in points, by (loudness, copies, sound_share).
        decided: "better", "worse" or "open" after Holm's adjustment.
    """
    if not found:
        return None
    reach = max(1.0, *(abs(v) for v, _, _ in found.values()))
    loud, copies, shares = (sorted({w[i] for w in found}) for i in range(3))
    width, height = 74 + CELL[0] * len(loud), CELL[1] * len(copies) + 40
    panels = []
    for share in shares:
        parts = [tag("text", "copies", x=0, y=10), tag("text", "loudness", x=64, y=height - 4)]
        for i, c in enumerate(reversed(copies)):
            parts.append(tag("text", f"{c:g}", x=56, y=CELL[1] * (i + 0.5) + 4, text_anchor="end"))
            parts += [_cell(found, decided, (v, c, share), 64 + CELL[0] * j, CELL[1] * i, reach)
                      for j, v in enumerate(loud)]  # fmt: skip
        for j, v in enumerate(loud):
            at = 64 + CELL[0] * (j + 0.5)
            parts.append(tag("text", f"{v:g}", x=at, y=height - 22, text_anchor="middle"))
        svg = tag("svg", parts, viewBox=f"0 0 {width} {height}")
        panels.append(Panel(f"share of sound {share:g}", svg, width, height))
    columns = max(1, min(len(panels), 720 // (width + 22)))
    return sheet("Ours minus the best rival, points", panels, columns)


def _cell(
    found: Mapping[World, tuple[float, float, float]],
    decided: Mapping[World, str],
    world: World,
    x: float,
    y: float,
    reach: float,
) -> Markup:
    """A world's difference; a frame where it is decided; an empty cell where nothing was measured."""
    box: dict[str, Any] = {"x": x + 1, "y": y + 1, "width": CELL[0] - 2, "height": CELL[1] - 2}
    if world not in found:
        return tag("rect", fill="var(--band)", **box)
    value, low, high = found[world]
    tint = f"{0.08 + 0.5 * min(1, abs(value) / reach):.2f}"
    colour = "var(--s0)" if value >= 0 else "var(--s1)"
    frame = {} if decided[world] == "open" else {"stroke": colour, "stroke_width": "2"}
    texts = [
        tag("text", f"{value:+.1f}", x=x + CELL[0] / 2, y=y + 21, text_anchor="middle", cls="strong"),
        tag("text", f"[{low:+.1f}, {high:+.1f}]", x=x + CELL[0] / 2, y=y + 36, text_anchor="middle", cls="strong"),
    ]
    return tag("g", tag("rect", fill=colour, fill_opacity=tint, **frame, **box), texts)


# What was kept -------------------------------------------------------------------------------------------------------


def kept_panels(kept: Mapping[str, Any] | None) -> str | None:
    """Kept share over time, a panel a modality, a line a method."""
    if kept is None:
        return None
    panels, entries = [], [Line(name, (), i) for i, name in enumerate(kept["methods"])]
    highest = max(100 * v for m in kept["methods"].values() for k in ("visual", "audio") for v in m[k])
    for key, title in (("visual", "picture"), ("audio", "sound")):
        drawn = []
        for entry in entries:
            values = zip(kept["seconds"], kept["methods"][entry.name][key], strict=True)
            drawn.append(replace(entry, points=[Point(s, 100 * v) for s, v in values]))
        y = Axis("kept, %", low=0.0, high=highest, text=lambda v: f"{v:.3g}")
        panels.append(Panel(title, chart(drawn, Axis("time in the clip, s"), y), WIDTH, HEIGHT))
    return sheet("Kept share of each modality over time", panels, 2, entries)


LANE, BARS, NAMES = 17, 30, 150


def memory_map(found: Mapping[str, Any] | None) -> str | None:
    """One clip: what happened when, and below it, for each method, from which second its kept tokens come."""
    if found is None:
        return None
    width, seconds = WIDE[0], float(found["seconds"])

    def at(s: float) -> float:
        return NAMES + (width - NAMES - 8) * s / seconds

    parts, top = [], 4.0
    for kind, colour in (("sight", "var(--s0)"), ("sound", "var(--s1)"), ("distractor", "var(--s7)")):
        own = sorted((e for e in found["events"] if e["kind"] == kind), key=lambda e: e["start_s"])
        drawn, height = _events(own, at, top, colour, width)
        parts += [tag("text", f"{kind}s", x=0, y=top + 12, cls="strong"), *drawn] if own else []
        top += height + 6 if own else 0
    events_end = top
    for name, own in found["methods"].items():
        parts.append(tag("text", f"{name}, layer {own['layer']}", x=0, y=top + 12, cls="title"))
        for key, word, colour in (("visual_s", "picture", "var(--s0)"), ("audio_s", "sound", "var(--s1)")):
            top += 20 if key == "visual_s" else 4
            parts.append(tag("text", f"{word}, {len(own[key])} kept", x=8, y=top + BARS - 4))
            parts += _bars(own[key], seconds, at, top, colour)
            top += BARS
        top += 12
    step = next(s for s in (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 3600) if seconds / s <= 12 or s == 3600)
    for i in range(int(seconds // step) + 1):
        parts.insert(0, tag("line", x1=at(i * step), x2=at(i * step), y1=0, y2=top, cls="rule"))
        anchor = "end" if i * step > 0.97 * seconds else "middle"
        parts.append(
            tag("text", f"{i * step:g}" + (" s" if not i else ""), x=at(i * step), y=top + 14, text_anchor=anchor)
        )
    parts.append(tag("line", x1=0, x2=width, y1=events_end - 2, y2=events_end - 2, cls="axis"))
    height = round(top) + 20
    svg = tag("svg", parts, viewBox=f"0 0 {width} {height}")
    title = f"What was kept of clip {found['clip']}: tokens by the second they come from"
    return sheet(title, [Panel("", svg, width, height)], 1)


def _events(
    own: Sequence[Mapping[str, Any]], at: Any, top: float, colour: str, width: int
) -> tuple[list[Markup], float]:
    """Boxes in as many lanes as overlaps need, names inside or beside; and the height."""
    parts: list[Markup] = []
    ends: list[float] = []
    for e in own:
        left, right = at(e["start_s"]), max(at(e["end_s"]), at(e["start_s"]) + 2)
        name = e["name"] + (" (faint)" if e["faint"] else "")
        need = 6.0 * len(name) + 8
        inside = right - left >= need
        back = not inside and right + need > width  # no room on the right: the name stands before its box
        begin, stop = left - (need if back else 0), right + (0 if inside or back else need)
        lane = next((i for i, end in enumerate(ends) if end <= begin), len(ends))
        ends[lane : lane + 1] = [stop]
        y = top + LANE * lane
        opacity, dash = (".25", "3 2") if e["faint"] else (".45", None)
        parts.append(tag("rect", x=left, y=y, width=right - left, height=LANE - 3, fill=colour, fill_opacity=opacity,
                         stroke=colour, stroke_dasharray=dash))  # fmt: skip
        x = left + 4 if inside else left - 4 if back else right + 4
        parts.append(tag("text", name, x=x, y=y + 11, text_anchor="end" if back else None, cls="strong"))
    return parts, LANE * len(ends)


def _bars(kept: Sequence[float], seconds: float, at: Any, top: float, colour: str) -> list[Markup]:
    """A histogram in at most 120 bins of whole seconds, highest bin as high as its lane."""
    bin_s = max(1, -(-int(seconds) // 120))
    counts: dict[int, int] = {}
    for s in kept:
        counts[int(s // bin_s)] = counts.get(int(s // bin_s), 0) + 1
    parts = [tag("line", x1=at(0), x2=at(seconds), y1=top + BARS, y2=top + BARS, cls="rule")]
    for i, n in sorted(counts.items()):
        tall = (BARS - 2) * n / max(counts.values())
        left, right = at(i * bin_s), at(min(seconds, (i + 1) * bin_s))
        parts.append(
            tag("rect", x=left, y=top + BARS - tall, width=max(0.6, right - left - 0.6), height=tall, fill=colour)
        )
    return parts
