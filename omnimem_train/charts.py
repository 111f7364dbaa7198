"""Small charts as inline SVG. They are 360 units wide, the width of a phone, so their text is never scaled down."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from omnimem_train.markup import Markup, join, tag

WIDTH, HEIGHT = 360, 236
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 24, 42
WIDEST = 14.0  # how far a marker may be moved aside, so that it still stands over its place
COLOURS = 8  # series colours in the page's style
BAR = 104  # width of a picture in a table cell, as in the page's style
GLYPH = 6.4  # width of a character at the size of labels, units


@dataclass(frozen=True)
class Point:
    """A value, with an interval or without. A value that is not finite is a gap."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: for the legend.
        points: in the order of x.
        colour: number of a colour and of a marker; 32 pairs differ.
        dashed: drawn dashed, with hollow markers.
        markers: draw a marker at each point; points without a neighbour always get one.
        faint: drawn thin and pale.
    """

    name: str
    points: Sequence[Point]
    colour: int = 0
    dashed: bool = False
    markers: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Level:
    """A named horizontal line; `dash` as in SVG."""

    name: str
    y: float
    dash: str | None = None


@dataclass(frozen=True)
class Axis:
    """An axis.

    Attributes:
        label: with its unit.
        log: logarithmic; every value above 0.
        low, high: must be inside; the data widen it.
        at: where ticks go, if not at round numbers; needed when logarithmic.
        whole: ticks at whole numbers alone.
        text: a tick's label.
    """

    label: str
    log: bool = False
    low: float | None = None
    high: float | None = None
    at: Sequence[float] = ()
    whole: bool = False
    text: Callable[[float], str] | None = None


def chart(
    lines: Sequence[Line],
    x: Axis,
    y: Axis,
    levels: Sequence[Level] = (),
    size: tuple[int, int] = (WIDTH, HEIGHT),
    apart: float = 7.0,
) -> Markup:
    """Lines, with whiskers where points have intervals; those of one x stand side by side, `apart` units."""
    finite = [p for line in lines for p in line.points if math.isfinite(p.y)]
    if not finite:
        return tag("p", "Nothing was measured.", cls="soft")
    heights = [v for p in finite for v in (p.y, p.low, p.high) if v is not None] + [level.y for level in levels]
    width, height = size
    whiskers = sum(any(p.low is not None for p in line.points) for line in lines)
    apart = min(apart, 2 * WIDEST / max(1, len(lines) - 1))
    spread = apart * (len(lines) - 1) / 2 if whiskers > 1 else 0.0
    margin = max(18.0, spread + 4) if x.log else 4.0
    to_x, x_ticks = _scale(x, [p.x for p in finite], LEFT, width - RIGHT, margin)
    to_y, y_ticks = _scale(y, heights, height - BOTTOM, TOP)
    parts = _frame(x, y, to_x, to_y, x_ticks, y_ticks, size)
    for level in levels:
        at = to_y(level.y)
        shape = tag("line", x1=LEFT, x2=width - RIGHT, y1=at, y2=at, cls="axis", stroke_dasharray=level.dash)
        parts.append(tag("g", tag("title", f"{level.name}: {_text(y, level.y)}"), shape))
    for i, line in enumerate(lines):
        shift = apart * i - spread if whiskers > 1 else 0.0
        parts.append(_draw(line, x, y, to_x, to_y, shift))
    return tag("svg", parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=f"{y.label} over {x.label}")


def swatch(line: Line | Level) -> Markup:
    """How a line looks, 34 by 12 units."""
    if isinstance(line, Level):
        return tag("line", x1=0, x2=34, y1=6, y2=6, cls="axis", stroke_dasharray=line.dash)
    marker = _marker(line, 17, 6) if line.markers else None
    return join([tag("line", x1=0, x2=34, y1=6, y2=6, **_stroke(line)), marker])


def legend(lines: Sequence[Line], levels: Sequence[Level] = ()) -> Markup:
    """What the lines are."""
    entries: list[Line | Level] = [*lines, *levels]
    items = [tag("li", tag("svg", swatch(e), viewBox="0 0 34 12", aria_hidden="true"), e.name) for e in entries]
    return tag("ul", items, cls="legend")


def interval_bar(marks: Sequence[tuple[float, float, float, Line]], low: float, high: float, zero: bool) -> Markup:
    """A small picture of intervals for a table cell: (value, low, high, style) under one another.

    Args:
        low, high: ends of the scale; the same in all rows.
        zero: mark 0.
    """
    lane = 11
    height = lane * len(marks) + 4

    def at(v: float) -> float:
        return 4 + (BAR - 8) * (min(max(v, low), high) - low) / (high - low)

    ends = (low, 0.0, high) if zero else (low, high)
    parts = [tag("line", x1=at(v), x2=at(v), y1=0, y2=height, cls="axis" if zero and not v else "rule") for v in ends]
    for i, (value, first, last, style) in enumerate(marks):
        y = 2 + lane * (i + 0.5)
        thin = _stroke(style) | {"stroke_dasharray": None, "stroke_width": "1.6"}
        parts += [tag("line", x1=at(first), x2=at(last), y1=y, y2=y, **thin), _marker(style, at(value), y)]
    return tag("svg", parts, viewBox=f"0 0 {BAR} {height}", aria_hidden="true")


def bar_scale(low: float, high: float, zero: bool) -> Markup:
    """The scale of `interval_bar`, for the head of its column."""
    ends = [(0, "start", low), (BAR, "end", high)] + ([(BAR // 2, "middle", 0.0)] if zero else [])
    texts = [tag("text", f"{v:+g}" if zero and v else f"{v:g}", x=x, y=11, text_anchor=a) for x, a, v in ends]
    return tag("svg", texts, viewBox=f"0 0 {BAR} 14", aria_hidden="true")


def rows_chart(rows: Sequence[tuple[str, str, Sequence[tuple[Point, Line]]]], high: float = 100.0) -> Markup:
    """Intervals by row, values in per cent from 0 to `high`: a label, a word on it, intervals with their numbers."""
    first, last, lane, space = 112, 250, 15, 9
    parts, top = [], 6.0
    for name, word, marks in rows:
        shown = name if len(name) <= 17 else name[:16] + "…"
        label = [tag("text", shown, x=0, y=top + 11, cls="strong"), tag("text", word, x=0, y=top + 11 + lane)]
        parts.append(tag("g", tag("title", name), label))
        for i, (point, style) in enumerate(marks):
            assert point.low is not None
            assert point.high is not None
            y = top + lane * (i + 0.5)
            left, at, right = (first + (last - first) * v / high for v in (point.low, point.y, point.high))
            thin = _stroke(style) | {"stroke_dasharray": None, "stroke_width": "1.6"}
            text = f"{point.y:.0f} [{point.low:.0f}, {point.high:.0f}]"
            parts += [tag("line", x1=left, x2=right, y1=y, y2=y, **thin), _marker(style, at, y)]
            parts.append(tag("text", text, x=WIDTH, y=y + 4, text_anchor="end", cls="strong"))
        top += lane * max(2, len(marks)) + space
    frame = []
    for v in (0.0, high / 2, high):
        x = first + (last - first) * v / high
        frame.append(tag("line", x1=x, x2=x, y1=2, y2=top - 4, cls="rule"))
        frame.append(tag("text", f"{v:g}" + (" %" if v == high else ""), x=x, y=top + 10, text_anchor="middle"))
    return tag(
        "svg", frame, parts, viewBox=f"0 0 {WIDTH} {top + 16:.0f}", role="img", aria_label="accuracy by category"
    )


# Parts ---------------------------------------------------------------------------------------------------------------


def _frame(
    x: Axis,
    y: Axis,
    to_x: Callable[[float], float],
    to_y: Callable[[float], float],
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    size: tuple[int, int],
) -> list[Markup]:
    """Rules, axes and their labels."""
    parts, (width, height) = [], size
    for v in y_ticks:
        parts.append(tag("line", x1=LEFT, x2=width - RIGHT, y1=to_y(v), y2=to_y(v), cls="rule"))
        parts.append(tag("text", _text(y, v), x=LEFT - 5, y=to_y(v) + 4, text_anchor="end"))
    bottom, free = height - BOTTOM, -math.inf
    for v in x_ticks:
        text, at = _text(x, v), to_x(v)
        half = GLYPH * len(text) / 2
        parts.append(tag("line", x1=at, x2=at, y1=bottom, y2=bottom + 4, cls="axis"))
        middle = min(at, width - half)
        if middle - half > free:  # a label that would touch the last one is left out
            parts.append(tag("text", text, x=middle, y=bottom + 16, text_anchor="middle"))
            free = middle + half + GLYPH
    parts.append(tag("line", x1=LEFT, x2=width - RIGHT, y1=bottom, y2=bottom, cls="axis"))
    parts.append(tag("text", x.label, x=(LEFT + width - RIGHT) / 2, y=height - 8, text_anchor="middle"))
    parts.append(tag("text", y.label, x=0, y=11))
    return parts


def _draw(
    line: Line, x: Axis, y: Axis, to_x: Callable[[float], float], to_y: Callable[[float], float], shift: float
) -> Markup:
    """Runs of finite points as polylines, lone points as markers, whiskers."""
    parts: list[Markup] = []
    runs = [list(run) for finite, run in groupby(line.points, lambda p: math.isfinite(p.y)) if finite]
    for run in runs:
        if len(run) > 1:
            path = " ".join(f"{to_x(p.x) + shift:.1f},{to_y(p.y):.1f}" for p in run)
            parts.append(tag("polyline", points=path, fill="none", **_stroke(line)))
        for p in run:
            at, hint = to_x(p.x) + shift, f"{line.name}, {_text(x, p.x)}: {_text(y, p.y)}"
            shapes: list[Markup] = []
            if p.low is not None and p.high is not None:
                hint += f" [{_text(y, p.low)}, {_text(y, p.high)}]"
                thin = _stroke(line) | {"stroke_dasharray": None, "stroke_width": "1.2", "opacity": ".6"}
                shapes.append(tag("line", x1=at, x2=at, y1=to_y(p.low), y2=to_y(p.high), **thin))
            if line.markers or len(run) == 1:
                shapes.append(_marker(line, at, to_y(p.y)))
            if shapes:
                parts.append(tag("g", tag("title", hint), shapes))
    return tag("g", parts)


def _stroke(line: Line) -> dict[str, str | None]:
    return {
        "stroke": f"var(--s{line.colour % COLOURS})",
        "stroke_width": "1" if line.faint else "2",
        "stroke_dasharray": "5 3" if line.dashed else None,
        "cls": "faint" if line.faint else None,
    }


def _marker(line: Line, x: float, y: float) -> Markup:
    """Circle, square, triangle or diamond by colour; hollow when dashed."""
    colour, r = f"var(--s{line.colour % COLOURS})", 3.6
    style = {"fill": "var(--page)" if line.dashed else colour, "stroke": colour, "stroke_width": "1.6"}
    shape = (line.colour + line.colour // COLOURS) % 4  # when colours come round again, shapes do not
    if shape == 0:
        return tag("circle", cx=float(x), cy=float(y), r=r, **style)
    square, triangle = ((-1, -1), (1, -1), (1, 1), (-1, 1)), ((0, -1.3), (1.2, 1), (-1.2, 1))
    diamond = ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0))
    corners = (square, triangle, diamond)[shape - 1]
    return tag("polygon", points=" ".join(f"{x + r * a:.1f},{y + r * b:.1f}" for a, b in corners), **style)


def _scale(
    axis: Axis, values: Sequence[float], start: float, stop: float, margin: float = 0.0
) -> tuple[Callable[[float], float], list[float]]:
    """A function from values to units between `start` and `stop`, and the ticks."""
    low = min([*values, *([] if axis.low is None else [axis.low])])
    high = max([*values, *([] if axis.high is None else [axis.high])])
    move: Callable[[float], float] = math.log if axis.log else lambda v: v
    marks = sorted(axis.at)
    assert marks or not axis.log
    if not marks:
        marks = ticks(low, high) if high > low or not margin else [low]
        marks = [v for v in marks if not axis.whole or v == round(v)]
        if not margin:  # a vertical axis ends at ticks
            step = marks[1] - marks[0]
            marks = ([marks[0] - step] if low < marks[0] - step * 1e-6 else []) + marks
            marks += [marks[-1] + step] if high > marks[-1] + step * 1e-6 else []
            low, high = marks[0], marks[-1]
    first, last = move(low), move(high)
    direction = 1 if stop > start else -1
    start, stop = start + direction * margin, stop - direction * margin

    def place(v: float) -> float:
        share = (move(v) - first) / (last - first) if last > first else 0.5
        return start + (stop - start) * share

    return place, marks


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Two round numbers or more between `low` and `high`, about `about` of them; around it when both are equal."""
    if not high > low:
        spare = abs(low) / 2 or 0.5
        low, high = low - spare, high + spare
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first
    return [round((first + i) * step, 12 - math.floor(math.log10(step))) for i in range(count + 1)]


def number(v: float) -> str:
    """A short number: 0.25, 1.5k, 2e-05."""
    if abs(v) >= 1e6:
        return f"{v / 1e6:.4g}M"
    return f"{v / 1e3:.4g}k" if abs(v) >= 1e4 else f"{v:.4g}"


def _text(axis: Axis, v: float) -> str:
    return (axis.text or number)(v)
