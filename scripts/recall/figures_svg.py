"""SVG files that stand alone: charts side by side under a title, with a legend and the style they need written out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from omnimem_train.charts import GLYPH, Level, Line, swatch
from omnimem_train.markup import STYLE, Markup, tag

GAP = 22  # units between panels
ROW = 18  # height of a row of the legend
PALETTE = dict(re.findall(r"--(\w+): (#\w+);", STYLE.split("@media")[0]))  # the report's colours on a light ground
CSS = (
    'text { font: 11px system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; fill: var(--soft); }'
    " text.head { font-weight: 600; font-size: 15px; fill: var(--ink); }"
    " text.title { font-weight: 600; font-size: 12px; fill: var(--ink); }"
    " text.strong { fill: var(--ink); } .rule { stroke: var(--line); } .axis { stroke: var(--soft); }"
    " .faint { opacity: .35; }"
)


@dataclass(frozen=True)
class Panel:
    """A picture with its title; width and height in units."""

    title: str
    picture: Markup
    width: int
    height: int


def sheet(
    title: str, panels: Sequence[Panel], columns: int, lines: Sequence[Line] = (), levels: Sequence[Level] = ()
) -> str:
    """A file: panels in rows of `columns`, a legend below."""
    width = max(p.width for p in panels)
    total = 2 * GAP + columns * width + (columns - 1) * GAP
    parts: list[Markup] = [tag("text", title, x=GAP, y=28, cls="head")]
    top = 44
    for start in range(0, len(panels), columns):
        row = panels[start : start + columns]
        for i, panel in enumerate(row):
            left = GAP + i * (width + GAP)
            head = 22 if panel.title else 0
            parts.append(tag("text", panel.title, x=left, y=top + 12, cls="title") if head else Markup(""))
            parts.append(placed(panel.picture, left, top + head, panel.width, panel.height))
        top += max(p.height + (22 if p.title else 0) for p in row) + GAP
    legend, height = legend_rows([*lines, *levels], total - 2 * GAP)
    parts.append(tag("g", legend, transform=f"translate({GAP} {top})"))
    return document(parts, total, top + height + 12)


def document(parts: Sequence[Markup], width: int, height: int) -> str:
    """An SVG file with a white ground; variables become colours, because not every viewer knows them."""
    style = tag("style", Markup(CSS))
    ground = tag("rect", width=width, height=height, fill="var(--page)")
    size = {"width": width, "height": height, "viewBox": f"0 0 {width} {height}"}
    text = tag("svg", style, ground, *parts, xmlns="http://www.w3.org/2000/svg", role="img", **size)
    return re.sub(r"var\(--(\w+)\)", lambda m: PALETTE[m[1]], text) + "\n"


def placed(picture: Markup, x: int, y: int, width: int, height: int) -> Markup:
    """A chart at a place in a larger picture."""
    start = f'<svg x="{x}" y="{y}" width="{width}" height="{height}" '
    return Markup(picture.replace("<svg ", start, 1))


def legend_rows(entries: Sequence[Line | Level], width: int) -> tuple[list[Markup], int]:
    """Swatches with names, in as many rows as they need; and the height of it all."""
    parts, x, y = [], 0, 0
    for entry in entries:
        need = 42 + round(GLYPH * len(entry.name)) + 18
        if x and x + need > width:
            x, y = 0, y + ROW
        shape = tag("g", swatch(entry), transform=f"translate({x} {y})")
        parts += [shape, tag("text", entry.name, x=x + 40, y=y + 10, cls="strong")]
        x += need
    return parts, y + ROW if entries else 0
