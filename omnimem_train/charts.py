"""Small charts as inline SVG: lines with whiskers over a linear or logarithmic axis. No dependencies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 72, 150, 14, 42
# Okabe & Ito's palette, told apart by colour-blind readers; lines also differ in label.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8a6d00", "#777777")


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: shown at its end.
        points: (x, y), in the order of x; values that are not finite are left out.
        spans: (low, high) for each point, drawn as whiskers; empty for none.
        dashed: drawn dashed.
        colour: index into `COLOURS`.
    """

    name: str
    points: Sequence[tuple[float, float]]
    spans: Sequence[tuple[float, float]] = ()
    dashed: bool = False
    colour: int = 0


def chart(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    y_range: tuple[float, float] | None = None,
    levels: Sequence[tuple[str, float]] = (),
) -> str:
    """An SVG element.

    Args:
        log_x: logarithmic x axis; every x must be above 0.
        y_range: of the y axis; by default what is drawn, and 0.
        levels: named horizontal lines.
    """
    points = [p for line in lines for p in line.points if math.isfinite(p[0]) and math.isfinite(p[1])]
    if not points:
        return "<p>Nothing was measured.</p>"
    ys = [y for _, y in points] + [y for line in lines for span in line.spans for y in span] + [y for _, y in levels]
    low, high = y_range or (min(0.0, *ys), max(ys) or 1.0)
    xs = [math.log2(x) if log_x else x for x, _ in points]
    first, last = min(xs), max(xs)
    margin = 0.04 * (last - first) or 0.5
    first, last = first - margin * log_x, last + margin

    def at_x(x: float) -> float:
        return LEFT + ((math.log2(x) if log_x else x) - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def at_y(y: float) -> float:
        return TOP + (high - min(max(y, low), high)) / ((high - low) or 1.0) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} by {escape(x_label)}">']
    for y in ticks(low, high):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at_y(y):.1f}" y2="{at_y(y):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at_y(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in sorted({x for x, _ in points}) if log_x else ticks(first, last):
        parts.append(f'<text x="{at_x(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:g}</text>')
    labels: list[tuple[float, str, str]] = []
    for name, y in levels:
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at_y(y):.1f}" y2="{at_y(y):.1f}"/>')
        labels.append((at_y(y), name, "currentColor"))
    for line in lines:
        colour, dash = COLOURS[line.colour % len(COLOURS)], ' stroke-dasharray="5 4"' if line.dashed else ""
        drawn = [(at_x(x), at_y(y)) for x, y in line.points if math.isfinite(x) and math.isfinite(y)]
        if not drawn:
            continue
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        for (x, y), span in zip(drawn, line.spans, strict=False):
            ends = f'y1="{at_y(span[0]):.1f}" y2="{at_y(span[1]):.1f}"'
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" {ends} stroke="{colour}" opacity="0.45"/>')
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        labels.append((drawn[-1][1], line.name, colour))
    for y, (_, name, colour) in zip(spread([y for y, _, _ in labels]), labels, strict=True):
        parts.append(f'<text x="{WIDTH - RIGHT + 8}" y="{y + 4:.1f}" fill="{colour}">{escape(name)}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    turned = f'transform="translate(12 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)"'
    parts.append(f'<text {turned} text-anchor="middle">{escape(y_label)}</text>')
    return "".join([*parts, "</svg>"])


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between `low` and `high`, about `about` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round((first + i) * step, 10) for i in range(int((high - first * step) / step + 1e-9) + 1)]


def spread(wanted: Sequence[float], gap: float = 14.0) -> list[float]:
    """Positions near the `wanted` ones, in the same order of size, at least `gap` apart: labels that do not overlap."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    last = -math.inf
    for i in order:
        last = placed[i] = max(wanted[i], last + gap)
    over = last - (HEIGHT - BOTTOM)
    for i in reversed(order):  # pushed out at the bottom: move up as far as needed
        if over <= 0:
            break
        placed[i] = min(placed[i], HEIGHT - BOTTOM - gap * (len(order) - 1 - order.index(i)))
    return placed
