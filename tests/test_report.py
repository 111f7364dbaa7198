"""The report page: its numbers are those of the runs, and it claims no more than they allow."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from omnimem_train.charts import Line, chart, spread, ticks
from omnimem_train.errors import UserError
from omnimem_train.report import headlines, write_report

VOID = {"meta", "br", "line", "circle", "polyline"}


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects text and table cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        assert tag in VOID

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def row(budget: Any, adapter: bool, accuracy: float, **difference: float) -> dict[str, Any]:
    found = {
        "name": f"snapkv@{budget}{'+adapter' if adapter else ''}", "method": "snapkv", "budget": budget,
        "adapter": adapter, "n": 40, "clips": 10, "accuracy": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1,
        "coverage": 0.975, "memory": {"count_text": True},
    }  # fmt: skip
    return found | (
        {"difference": {"gained": 5, "lost": 1, "p": 0.01, "p_holm": 0.02} | difference} if difference else {}
    )


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    folder = tmp_path / "eval"
    folder.mkdir()
    rows = [row(32, False, 0.4), row(32, True, 0.523, value=0.123, low=0.05, high=0.2), row("full", False, 0.6)]
    failed = [{"clip": "a<b.mp4", "question": "q&1", "why": "<script>alert(1)</script>"}]
    (folder / "summary.json").write_text(json.dumps({"rows": rows, "failed": failed}))
    (folder / "config.yaml").write_text("selectors: [snapkv]\n")
    result = {
        "clip": "c", "question": "1", "setting": "snapkv@32", "key": "base:x", "answer": "A", "predicted": "A",
        "text": "", "scores": {}, "error": "", "meta": {"category": "colour"},
    }  # fmt: skip
    (folder / "results-rank0.jsonl").write_text(json.dumps(result) + "\n")
    return folder


@pytest.fixture
def train(tmp_path: Path) -> Path:
    folder = tmp_path / "train"
    folder.mkdir()
    rows = [
        {"step": s, "time_s": 2.0 * s, "loss": 3.0 - s / 10, "loss_by_budget/8-16": 3.1, "lr": 1e-4, "grad_norm": 1.0,
         "tokens_per_s": 500.0, "wait_share": 0.01, "peak_gib": 1.5, "kept_share/visual": 0.2}
        for s in (5, 10)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def test_the_page_shows_what_was_measured(evaluation: Path, train: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "report.html"
    write_report(out, title="A & B", train=train, evaluation=evaluation, notes=["random <model>"])
    text = out.read_text()
    assert "<script>" not in text
    assert "http" not in text.replace("http-equiv", "")
    page = Page(text)
    for cell in ("40.0", "52.3", "60.0", "+12.3 [+5.0, +20.0]", "0.020", "40 / 10", "98 %"):
        assert cell in page.cells
    for words in (
        "A & B",
        "random <model>",
        "a<b.mp4",
        "<script>alert(1)</script>",
        "colour",
        "loss 2.500 at step 5",
        "counted inside",
    ):
        assert words in page.text
    assert text.count("<svg") == 7
    assert "1.50 GiB" in page.text


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [
        ({"value": 0.1, "low": 0.02, "high": 0.18}, "+10.0 points [+2.0, +18.0], above 0."),
        ({"value": 0.1, "low": 0.02, "high": 0.18, "p_holm": 0.2}, "above 0, but not after correcting"),
        ({"value": 0.1, "low": -0.02, "high": 0.22}, "not distinguishable from 0."),
        ({"value": -0.1, "low": -0.18, "high": -0.02}, "below 0."),
    ],
)
def test_headlines_say_what_the_interval_allows(difference: dict[str, float], verdict: str) -> None:
    (line,) = headlines([row(32, False, 0.4), row(32, True, 0.5, **difference)])
    assert verdict in line
    assert "snapkv at a budget of 32" in line


def test_without_a_comparison_nothing_is_claimed() -> None:
    assert headlines([row(32, False, 0.4)]) == ["The adapter was not compared with its base model here."]


def test_missing_pieces(evaluation: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to report"):
        write_report(tmp_path / "r.html", title="", train=None, evaluation=None)
    with pytest.raises(UserError, match="no finished evaluation"):
        write_report(tmp_path / "r.html", title="", train=None, evaluation=tmp_path)
    empty = tmp_path / "new"
    empty.mkdir()
    (empty / "metrics.jsonl").write_text("")
    write_report(tmp_path / "r.html", title="t", train=empty, evaluation=None)
    assert "has not logged anything yet" in (tmp_path / "r.html").read_text()


def test_charts_place_points_by_value() -> None:
    svg = chart([Line("a", [(1, 0), (4, 50), (16, 100)], [(0, 1), (40, 60), (90, 100)])], "x", "y", log_x=True)
    xs = [float(p.split('"')[0]) for p in svg.split('cx="')[1:]]
    ys = [float(p.split('"')[0]) for p in svg.split('cy="')[1:]]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)
    assert ys[0] > ys[2]
    assert "Nothing was measured" in chart([], "x", "y")
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(5, 5) == [5]
    labels = spread([100, 101, 102, 300])
    assert all(abs(a - b) >= 14 for i, a in enumerate(labels) for b in labels[:i])
