"""Charts stand where their values are, at every value a run can give; markup escapes."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from omnimem_train.charts import Axis, Level, Line, Point, chart, legend, number, swatch, ticks
from omnimem_train.markup import Markup, details, tag


def numbers(svg: str, name: str) -> list[float]:
    return [float(v) for v in re.findall(rf'\b{name}="([-\d.]+)"', svg)]


def test_points_stand_where_their_values_are() -> None:
    line = Line("a", [Point(1, 0, 0, 10), Point(4, 50, 40, 60), Point(16, 100, 90, 100)], markers=True)
    svg = chart([line], Axis("x", log=True, at=(1, 4, 16)), Axis("y", low=0, high=100), [Level("half", 50)])
    ElementTree.fromstring(svg)  # well-formed
    xs, ys = numbers(svg, "cx"), numbers(svg, "cy")
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)
    assert ys[0] > ys[2]
    whiskers = re.findall(r'<line x1="([\d.]+)" x2="[\d.]+" y1="([\d.]+)" y2="([\d.]+)" stroke=', svg)
    assert [float(x) for x, _, _ in whiskers] == xs
    unit = (ys[0] - ys[2]) / 100
    assert [float(low) - float(high) for _, low, high in whiskers] == pytest.approx(
        [10 * unit, 20 * unit, 10 * unit], abs=0.2
    )
    level = re.search(r'<title>half: 50</title><line[^>]*y1="([\d.]+)"', svg)
    assert level is not None
    assert float(level[1]) == pytest.approx(ys[1])
    assert "a, 4: 50 [40, 60]" in svg


def test_larger_charts_and_lines_further_apart() -> None:
    lines = [Line(n, [Point(1, 50, 40, 60), Point(2, 50, 40, 60)], markers=True) for n in "abcde"]
    svg = chart(lines, Axis("x", log=True, at=(1, 2)), Axis("y", low=0, high=100), [Level("l", 50)], (760, 420), 6.0)
    assert 'viewBox="0 0 760 420"' in svg
    at = numbers(svg, "cx")
    assert [round(b - a, 1) for a, b in pairwise(at[::2])] == [6.0] * 4
    many = [replace(lines[0], name=str(i)) for i in range(15)]
    crowded = chart(many, Axis("x", log=True, at=(1, 2)), Axis("y", low=0, high=100), [], (760, 420), 6.0)
    assert [round(b - a, 1) for a, b in pairwise(numbers(crowded, "cx")[::2])] == [2.0] * 14  # 28 units in all
    assert min(at) > 46 and max(at) < 760 - 12  # whiskers stay on the chart however many lines there are
    assert re.search(r'x2="748" y1="[\d.]+" y2="[\d.]+" class="axis"', svg)


def test_values_that_are_not_finite_are_gaps() -> None:
    points = [Point(x, float("nan") if x == 3 else 1.0 + x) for x in range(6)] + [Point(7, float("inf")), Point(8, 2)]
    svg = chart([Line("a", points)], Axis("x"), Axis("y"))
    assert "nan" not in svg
    assert svg.count("<polyline") == 2
    assert svg.count("<circle") == 1  # a point without neighbours
    assert "Nothing was measured" in chart([Line("a", [Point(0, float("nan"))])], Axis("x"), Axis("y"))


def test_equal_values_and_single_points_are_drawn() -> None:
    for points in ([Point(5, 2.0)], [Point(5, 0.0), Point(6, 0.0)], [Point(1, -3e-9), Point(2, -3e-9)]):
        svg = chart([Line("a", points)], Axis("x", whole=True), Axis("y"))
        for name in ("x", "y", "x1", "y1", "cx", "cy"):
            assert all(0 <= v <= 360 for v in numbers(svg, name))


def test_many_lines_stay_apart() -> None:
    lines = [Line("a", (), i, dashed, markers=True) for i in range(16) for dashed in (False, True)]
    swatches = re.findall(r"<svg.*?</svg>", legend(lines))
    assert all(swatch(line) in own for line, own in zip(lines, swatches, strict=True))
    assert len(swatches) == len(set(swatches)) == 32


def test_tick_labels_do_not_touch() -> None:
    at = [2**i for i in range(20)]
    svg = chart([Line("a", [Point(x, 1) for x in at])], Axis("x", log=True, at=at), Axis("y"))
    shown = re.findall(r'<text x="([\d.]+)" y="210[.0]*" text-anchor="middle">([^<]+)</text>', svg)
    assert 3 < len(shown) < 20
    for (left, a), (right, b) in pairwise(shown):
        assert float(right) - float(left) > 6 * (len(a) + len(b)) / 2


def test_ticks_and_numbers() -> None:
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(3, 9) == [4, 6, 8]
    assert len(ticks(5, 5)) >= 2
    assert [number(v) for v in (0.25, 2e-5, 1234, 15000, 2.5e6)] == ["0.25", "2e-05", "1234", "15k", "2.5M"]


def test_elements_escape_all_but_markup() -> None:
    assert tag("p", "<", Markup("<b></b>"), [None, 1], cls='"', data_label="x", hidden=False) == (
        '<p class="&quot;" data-label="x">&lt;<b></b>1</p>'
    )
    assert tag("line", stroke_width=1.25) == '<line stroke-width="1.2"></line>'
    assert details("a", opened=True) == '<details open=""><summary>a</summary></details>'
    assert "&lt;i&gt;" in legend([Line("<i>", ())])
