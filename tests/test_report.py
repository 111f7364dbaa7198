"""The report page: its numbers are those of the runs, and it claims no more than they allow."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from omnimem_train.errors import UserError
from omnimem_train.evaluate import ItemResult, Setting
from omnimem_train.evaluation import describe, summarise
from omnimem_train.memory.spec import MemorySpec
from omnimem_train.report import bucket, curves, duration, write_report
from omnimem_train.report_eval import headlines, verdict, without_folders

VOID = {"meta", "br"}
NASTY = "<script>alert('1')</script>&\"x"


class Page(HTMLParser):
    """Checks that tags are closed in order; collects text, table rows, classes and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} has an attribute twice: {names}"
        assert not any(name.startswith("on") for name in names)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            assert "url(" not in data
            assert "@import" not in data
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def settings_of(budgets: tuple[Any, ...], adapters: tuple[bool, ...] = (False, True)) -> list[Setting]:
    specs = {f"{s}@{b}": MemorySpec(selector=s, budget=b) for b in budgets for s in ("snapkv", "knorm")}
    specs["full"] = MemorySpec(selector="full", budget=None)
    return [Setting(n + "+adapter" * a, spec, a) for a in adapters for n, spec in specs.items()]


def write_eval(folder: Path, settings: list[Setting], *, clips: int = 12, gain: int = 0, scored: bool = True) -> Path:
    """An evaluation of three questions a clip: base right on the first, the adapter on `gain` more. One question of
    the last clip has no answer, for a reason full of markup and folders."""
    results = []
    for c, q, s in [(c, q, s) for c in range(clips) for q in range(3) for s in settings]:
        right = q <= (gain if s.adapter else 0)
        broken = (c, q) == (clips - 1, 2)
        results.append(
            ItemResult(
                f"clip{c}<&>.mp4", f"{c}-{q}", s.name, s.key(), "A", None if broken else "A" if right else "B",
                scores=dict.fromkeys("ABCDE"[: 4 + q % 2], -1.0) if scored and not broken else {},
                error=f"/home/someone/videos/a.mp4: {NASTY}" if broken else "",
                meta={"category": ("what", "when<")[q % 2]},
            )
        )  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "results-rank0.jsonl").write_text("".join(json.dumps(asdict(r)) + "\n" for r in results))
    (folder / "settings.json").write_text(json.dumps({s.key(): describe(s) for s in settings}))
    (folder / "summary.json").write_text(json.dumps(summarise(results, settings)))
    (folder / "config.yaml").write_text("items: a<b>.json\n")
    return folder


def write_train(folder: Path, lines: int, *, step: int = 5) -> Path:
    folder.mkdir(parents=True)
    bands = {f"loss_by_budget/{band}": 3.0 for band in ("128-255", "64-127", "full")}
    rows = [
        {"step": step * (i + 1), "time_s": 100.0 * (i + 1), "loss": "NaN" if i == 1 else 3.0 - i / lines, "lr": 1e-4,
         "grad_norm": 1.0, "tokens_per_s": 500.0, "wait_share": 0.01, "peak_gib": 1.5, "kept_share/visual": 0.2,
         "kept_share/audio": 0.4} | bands
        for i in range(lines)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "config.yaml").write_text(f"train:\n  steps: {step * lines}\n")
    return folder


def report(tmp_path: Path, **inputs: Any) -> tuple[str, Page]:
    out = tmp_path / "deep" / "report.html"
    write_report(out, **{"title": "t", "train": None, "evaluation": None} | inputs)
    text = out.read_text(encoding="utf-8")
    return text, Page(text)


# The page ------------------------------------------------------------------------------------------------------------


def test_the_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    settings = settings_of((32, 128))
    inputs = {"train": write_train(tmp_path / "t", 3), "evaluation": write_eval(tmp_path / "e", settings)}
    text, page = report(tmp_path, title=NASTY, notes=[f"note {NASTY}"], **inputs)
    assert text.startswith("<!doctype html>")
    assert not page.tags & {"script", "link", "img", "iframe", "object"}
    assert not page.links
    assert "http" not in text
    assert "prefers-color-scheme: dark" in text
    for words in (NASTY, f"note {NASTY}", "clip11<&>.mp4", "when<", "items: a<b>.json", f"…/a.mp4: {NASTY}"):
        assert words in page.text
    assert "someone" not in text
    assert str(tmp_path) not in text
    for title in ("Accuracy by budget", "Accuracy by category", "Failed", "Training", "Settings and versions"):
        assert title in page.text


def test_the_table_is_the_summary(tmp_path: Path) -> None:
    folder = write_eval(tmp_path / "e", settings_of((128, 32)), gain=1)
    _, page = report(tmp_path, evaluation=folder)
    rows = {(r[0], r[1]): r for r in page.rows if len(r) == 10}
    head = rows.pop(("selector", "budget"))
    assert head[2:4] == ["base, %", "adapter, %"]
    assert list(rows) == [("snapkv", "32"), ("knorm", "32"), ("snapkv", "128"), ("knorm", "128"), ("full", "full")]
    summary = json.loads((folder / "summary.json").read_text())
    for row in summary["rows"]:
        shown = rows[row["method"], str(row["budget"])]
        value, low, high = (100 * row[k] for k in ("accuracy", "low", "high"))
        assert shown[3 if row["adapter"] else 2] == f"{value:.1f} [{low:.1f}, {high:.1f}]"
        assert shown[8] == "36 / 12"
        assert shown[9] == "97.2 %"
        if d := row.get("difference"):
            value, low, high = (100 * d[k] for k in ("value", "low", "high"))
            assert shown[5] == f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
            assert value == pytest.approx(100 / 3)
            assert shown[7] == ("< 0.001" if d["p_holm"] < 0.001 else f"{d['p_holm']:.3f}")


def test_base_alone_has_no_empty_columns(tmp_path: Path) -> None:
    _, page = report(tmp_path, evaluation=write_eval(tmp_path / "e", settings_of((32,), (False,))))
    head = next(r for r in page.rows if r[:2] == ["selector", "budget"])
    assert "adapter, %" not in head
    assert "p (Holm)" not in head
    assert "Only the base was measured: nothing can be said here about what the adapter changes." in page.text
    assert "better" not in page.text


def test_chance_follows_the_options(tmp_path: Path) -> None:
    folder = write_eval(tmp_path / "e", settings_of((32,)))
    _, page = report(tmp_path, evaluation=folder)
    level = (23 / 4 + 12 / 5) / 35  # the question without an answer has no scores
    assert f"Chance is {100 * level:.1f} % (1 / options, mean over 35 questions): 0 of 6 settings" in page.text
    _, page = report(tmp_path, evaluation=write_eval(tmp_path / "f", settings_of((32,)), scored=False))
    assert "hance is" not in page.text


def test_settings_above_chance_are_counted(tmp_path: Path) -> None:
    folder = write_eval(tmp_path / "e", settings_of((32,)), clips=12, gain=2)
    _, page = report(tmp_path, evaluation=folder)
    assert "3 of 6 settings have an interval above it" in page.text
    assert "Few clips (12)" in page.text
    _, page = report(tmp_path, evaluation=write_eval(tmp_path / "f", settings_of((32,)), clips=20))
    assert "Few clips" not in page.text


def test_answers_that_are_not_the_summarys_are_not_used(tmp_path: Path) -> None:
    folder = write_eval(tmp_path / "e", settings_of((32,)))
    path = folder / "results-rank0.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    _, page = report(tmp_path, evaluation=folder)
    assert "not those of its summary" in page.text
    assert "hance is" not in page.text
    assert "Accuracy by category" not in page.text


def test_settings_without_answers_are_named(tmp_path: Path) -> None:
    settings = settings_of((32,))
    folder = write_eval(tmp_path / "e", settings[:-1])
    (folder / "settings.json").write_text(json.dumps({s.key(): describe(s) for s in settings}))
    _, page = report(tmp_path, evaluation=folder)
    assert "Not measured yet: full+adapter." in page.text


def test_sizes_and_tokens_are_drawn_apart(tmp_path: Path) -> None:
    _, page = report(tmp_path, evaluation=write_eval(tmp_path / "e", settings_of((32, 64, "900KiB", "2MiB"))))
    assert page.text.count("budget, tokens a layer (log scale)") == 4  # base, adapter, two selectors
    assert page.text.count("budget, memory of all layers (log scale)") == 4
    assert page.text.count("snapkv, base, 2MiB: ") == page.text.count("snapkv, base, 32: ") == 2  # hints of points
    order = [r[1] for r in page.rows if r[0] == "snapkv"]
    assert order == ["32", "64", "900KiB", "2MiB"]


def test_only_the_full_cache(tmp_path: Path) -> None:
    _, page = report(tmp_path, evaluation=write_eval(tmp_path / "e", settings_of(())))
    assert "Only the full cache was measured." in page.text


# What is claimed -----------------------------------------------------------------------------------------------------


def compared(value: float, low: float, high: float, p_holm: float, method: str = "knorm", budget: Any = 32) -> Any:
    difference = {"value": value, "low": low, "high": high, "p_holm": p_holm}
    return {"method": method, "budget": budget, "adapter": True, "difference": difference}


@pytest.mark.parametrize(
    ("row", "kind", "words"),
    [
        (compared(0.1, 0.02, 0.18, 0.01), "better", "+10.0 points [+2.0, +18.0], better with the adapter ("),
        (compared(0.1, 0.02, 0.18, 0.2), "open", "interval above 0, but the test over all comparisons"),
        (compared(0.1, -0.02, 0.22, 0.001), "open", "+10.0 points [-2.0, +22.0], not distinguishable from 0."),
        (compared(0.1, 0.0, 0.22, 0.001), "open", "not distinguishable from 0."),
        (compared(-0.1, -0.18, 0.0, 0.001), "open", "not distinguishable from 0."),
        (compared(-0.1, -0.18, -0.02, 0.04), "worse", "-10.0 points [-18.0, -2.0], worse with the adapter ("),
        (compared(-0.1, -0.18, -0.02, 0.06), "open", "interval below 0, but the test"),
        (compared(0.1, float("nan"), float("nan"), 0.01), "open", "not distinguishable from 0."),
        (compared(0.1, 0.02, 0.18, float("nan")), "open", "interval above 0, but the test"),
    ],
)  # fmt: skip
def test_verdicts_need_interval_and_test(row: Any, kind: str, words: str) -> None:
    assert verdict(row["difference"])[0] == kind
    (line,) = headlines([row])
    assert words in Page(line).text
    assert "at budget 32 with knorm" in line
    assert ("class=" in line) == (kind != "open")


def test_headlines_count_all_and_do_not_choose_the_best() -> None:
    rows = [
        compared(0.0, -0.1, 0.1, 1.0, "knorm", 64), compared(0.0, -0.1, 0.1, 1.0, "knorm", 32),
        compared(0.09, -0.01, 0.2, 1.0, "tova", 32), compared(-0.2, -0.3, -0.1, 0.001, "uniform", 32),
        compared(0.2, 0.1, 0.3, 0.001, "snapkv", 32),
        compared(-0.2, -0.3, -0.1, 0.001, "full", "full"),
    ]  # fmt: skip
    lines = [Page(line).text for line in headlines(rows)]
    assert lines[0].endswith("6 comparisons on the same questions: 1 better, 2 worse, 3 not distinguishable.")
    assert [re.findall(r"at budget (\d+) with (\w+)|(full cache)", line)[0] for line in lines[1:]] == [
        ("32", "knorm", ""), ("32", "uniform", ""), ("32", "snapkv", ""), ("64", "knorm", ""), ("", "", "full cache")
    ]  # fmt: skip
    assert "worse with the adapter" in lines[-1]


def test_adapter_alone_claims_nothing() -> None:
    (line,) = headlines([{"method": "knorm", "budget": 32, "adapter": True}])
    assert line.startswith("Only the adapter was measured: nothing can be said")


# Training ------------------------------------------------------------------------------------------------------------


def test_training_curves_and_headline(tmp_path: Path) -> None:
    _, page = report(tmp_path, train=write_train(tmp_path / "t", 40))
    assert "No evaluation in this report" in page.text
    assert "200 steps; loss on training clips 3.000 at step 5, 2.025 at step 200 (not a held-out measure)" in page.text
    assert "in 66.7 min" in page.text
    assert "not finished" not in page.text
    for title in ("Loss by budget band", "Learning rate", "Gradient norm", "Throughput", "Waiting", "Kept share"):
        assert title in page.text
    assert "running mean of 4 log lines" in page.text
    assert page.text.index("64-127") < page.text.index("128-255")
    assert "Points are means" not in page.text


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    folder = write_train(tmp_path / "t", 3)
    (folder / "config.yaml").write_text("train: {steps: 1000}\n")
    _, page = report(tmp_path, train=folder)
    assert "not finished, 15 of 1,000 steps" in page.text


def test_no_metrics_yet(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    (folder / "config.yaml").write_text("train: {steps: 10}\n")
    _, page = report(tmp_path, train=folder)
    assert "The run has not logged anything yet" in page.text
    assert "no metrics yet" in page.text


def test_long_runs_are_averaged() -> None:
    rows = [{"step": i, "lr": float(i), "x/a": 1.0} for i in range(1000)]
    (line,) = curves(rows, "lr", factor=2)
    assert [bucket(n) for n in (1, 300, 301, 1000)] == [1, 1, 2, 4]
    assert len(line.points) == 250
    assert (line.points[0].x, line.points[0].y) == (1.5, 3.0)
    assert [n.name for n in curves(rows, "x/")] == ["a"]
    assert curves(rows, "absent") == []
    raw, mean = curves([{"step": i, "loss": float(i)} for i in range(50)], "loss")
    assert raw.faint
    assert (mean.points[0].x, mean.points[0].y) == (4, 2.0)
    assert mean.points[-1].y == 47.0


def test_versions_are_those_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from omnimem_train.checkpoint import save_checkpoint

    folder = write_train(tmp_path / "t", 3)
    meta = {"versions": {"torch": "9.9.9<"}}
    save_checkpoint(folder / "checkpoints", 15, tensors={}, objects={}, rank_objects={}, meta=meta)
    monkeypatch.setattr("omnimem_train.report.os.cpu_count", lambda: 77)
    _, page = report(tmp_path, train=folder)
    assert "from its checkpoint at step 15" in page.text
    assert "9.9.9<" in page.text
    assert re.search(r"CPU cores +77", page.text)


def test_durations() -> None:
    assert [duration(s) for s in (12, 210, 7560)] == ["12 s", "3.5 min", "2.1 h"]


# What is missing -----------------------------------------------------------------------------------------------------


def test_missing_inputs(tmp_path: Path) -> None:
    for inputs, words in (
        ({}, "nothing to report"),
        ({"train": tmp_path}, "not the folder of a training run"),
        ({"train": tmp_path / "absent"}, "not the folder of a training run"),
        ({"evaluation": tmp_path}, "holds no finished evaluation"),
    ):
        with pytest.raises(UserError, match=words):
            report(tmp_path, **inputs)
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"rows": [{}], "failed": []}', '{"rows": []}', '{"rows": [], "failed": [{}]}']
)
def test_a_damaged_summary(tmp_path: Path, content: str) -> None:
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(UserError, match=r"no summary of an evaluation|is damaged"):
        report(tmp_path, evaluation=tmp_path)


def test_metrics_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": [1]}\n')
    with pytest.raises(UserError, match="lines of another kind"):
        report(tmp_path, train=tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lr": 0.5}\n')  # a run that logged little
    (tmp_path / "config.yaml").write_bytes(b"\xff: [")
    _, page = report(tmp_path, train=tmp_path)
    assert "Training: 1 step." in page.text


def test_no_answers_at_all(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"rows": [], "failed": []}')
    _, page = report(tmp_path, evaluation=tmp_path)
    assert "No setting has an answer yet." in page.text


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"):
        write_report(tmp_path, title="t", train=write_train(tmp_path / "t", 2), evaluation=None)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/a/b/c.mp4: broken", "…/c.mp4: broken"),
        ("cannot read '/data/x/y.mp4'", "cannot read '…/y.mp4'"),
        ("clips/a.mp4 12/34", "clips/a.mp4 12/34"),
        ("see https://a.org/b/c", "see https://a.org/b/c"),
    ],
)
def test_folders_are_left_out(text: str, shown: str) -> None:
    assert without_folders(text) == shown
