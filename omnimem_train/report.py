"""One HTML page of a training run and an evaluation: self-contained, no scripts, light and dark."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from omnimem_train.charts import Line, chart
from omnimem_train.errors import UserError
from omnimem_train.evaluate import collect
from omnimem_train.evaluation import FULL, outcomes, read_object, what_counts
from omnimem_train.rng import versions
from omnimem_train.runlog import read_metrics
from omnimem_train.stats import by_category

ROW_KEYS = {"name", "method", "budget", "adapter", "memory", "n", "clips", "accuracy", "low", "high", "coverage"}
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 0.85rem; display: block; overflow-x: auto; }
th, td { padding: 0.25rem 0.5rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
svg { width: 100%; max-width: 46rem; height: auto; } svg text { font-size: 11px; }
svg text:not([fill]) { fill: currentColor; }
svg .grid { stroke: var(--line); } svg .level { stroke: currentColor; stroke-dasharray: 2 3; opacity: 0.6; }
pre { background: var(--soft); padding: 0.8rem; overflow-x: auto; font-size: 0.8rem; }
.lead { background: var(--soft); padding: 0.6rem 1rem; border-left: 4px solid #0072B2; }
"""


def write_report(
    out: Path, *, title: str, train: Path | None, evaluation: Path | None, notes: Sequence[str] = ()
) -> None:
    """Write the page.

    Args:
        train: folder of a training run, or None.
        evaluation: folder of an evaluation, or None.
        notes: sentences for its top.

    Raises:
        UserError: neither is given, or a folder does not hold what it should.
    """
    if train is None and evaluation is None:
        raise UserError("nothing to report", remedy="name a training run, an evaluation, or both")
    parts = [f"<h1>{escape(title)}</h1>", *(f'<p class="lead">{escape(note)}</p>' for note in notes)]
    if evaluation is not None:
        parts += evaluation_parts(evaluation)
    if train is not None:
        parts += training_parts(train)
    parts += ["<h2>Where it ran</h2>", pre(machine())]
    page = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
    page += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    page += f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")


def pre(text: str) -> str:
    """Text as it is."""
    return f"<pre>{escape(text)}</pre>"


def text_of(path: Path) -> str:
    """A text file as it is, also if some of its bytes are damaged."""
    return pre(path.read_text(encoding="utf-8", errors="replace"))


def machine() -> str:
    """Processor, cores and versions; no names."""
    lines = [f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"]
    return "\n".join(lines + [f"{name} {version}" for name, version in versions().items()])


# Evaluation ----------------------------------------------------------------------------------------------------------


def evaluation_parts(folder: Path) -> list[str]:
    """Headlines, table, accuracy by budget and by category, failures, settings."""
    path = folder / "summary.json"
    if not path.is_file():
        raise UserError(
            f"{folder} holds no finished evaluation", cause="there is no summary.json", remedy="run it first"
        )
    summary = read_object(path)
    rows, failed = summary.get("rows"), summary.get("failed")
    if not isinstance(rows, list) or not isinstance(failed, list) or not all(set(row) >= ROW_KEYS for row in rows):
        raise UserError(f"{path} is no summary of an evaluation", remedy="run the evaluation again: it rewrites it")
    parts = ["<h2>Evaluation</h2>", "<ul>", *(f"<li>{escape(line)}</li>" for line in headlines(rows)), "</ul>"]
    parts += [results_table(rows), "<h2>Accuracy by budget</h2>", accuracy_chart(rows)]
    parts.append(
        "<p>Lines: selectors; dashed: base model, solid: with the adapter. Whiskers: 95 % intervals, clustered by "
        f"clip. {escape(what_counts(rows))}</p>"
    )
    parts += category_part(folder, rows)
    if failed:
        items = "".join(f"<li>{escape(f['question'])} ({escape(f['clip'])}): {escape(f['why'])}</li>" for f in failed)
        parts.append(
            f"<details><summary>{len(failed)} questions failed and count as wrong</summary><ul>{items}</ul></details>"
        )
    config = folder / "config.yaml"
    if config.is_file():
        parts.append(f"<details><summary>Settings of the evaluation</summary>{text_of(config)}</details>")
    return parts


def headlines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the differences between adapter and base allow to be said, no more; smallest budget first."""
    compared = sorted((r for r in rows if "difference" in r), key=lambda r: _size(r["budget"]))
    if not compared:
        return ["The adapter was not compared with its base model here."]
    lines = []
    for row in compared:
        d = row["difference"]
        verdict = "not distinguishable from 0"
        if d["low"] > 0 or d["high"] < 0:
            verdict = "above 0" if d["low"] > 0 else "below 0"
            if d.get("p_holm", 1.0) > 0.05:
                verdict += ", but not after correcting for the number of comparisons"
        memory = "the full cache" if row["budget"] == FULL else f"{row['method']} at a budget of {row['budget']}"
        interval = f"{100 * d['value']:+.1f} points [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]"
        lines.append(f"Adapter minus base, {memory}: {interval}, {verdict}.")
    return lines


def results_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """All settings."""
    head = [
        "memory",
        "budget",
        "model",
        "accuracy, %",
        "95 % interval",
        "adapter - base",
        "p (Holm)",
        "n / clips",
        "answered",
    ]
    body = []
    for row in rows:
        d = row.get("difference")
        shown = f"{100 * d['value']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]" if d else ""
        cells = [
            row["method"], row["budget"], "adapter" if row["adapter"] else "base", f"{100 * row['accuracy']:.1f}",
            f"{100 * row['low']:.1f} to {100 * row['high']:.1f}", shown, f"{d['p_holm']:.3f}" if d else "",
            f"{row['n']} / {row['clips']}", f"{100 * row['coverage']:.0f} %",
        ]  # fmt: skip
        body.append("<tr>" + "".join(f"<td>{escape(str(c))}</td>" for c in cells) + "</tr>")
    return f"<table><tr>{''.join(f'<th>{escape(h)}</th>' for h in head)}</tr>{''.join(body)}</table>"


def accuracy_chart(rows: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy over budget, a line for each selector with and without adapter; the full cache as a level."""
    numbered = [r for r in rows if isinstance(r["budget"], int)]
    methods = list(dict.fromkeys(r["method"] for r in numbered))
    lines = []
    for method in methods:
        for adapter in (False, True):
            own = sorted(
                (r for r in numbered if r["method"] == method and r["adapter"] == adapter), key=lambda r: r["budget"]
            )
            if own:
                points = [(r["budget"], 100 * r["accuracy"]) for r in own]
                spans = [(100 * r["low"], 100 * r["high"]) for r in own]
                name = method + (" + adapter" if adapter else "")
                lines.append(Line(name, points, spans, dashed=not adapter, colour=methods.index(method)))
    levels = [
        (f"full cache{' + adapter' if r['adapter'] else ''}", 100 * r["accuracy"]) for r in rows if r["budget"] == FULL
    ]
    return chart(lines, "budget, tokens", "accuracy, %", log_x=True, y_range=(0, 100), levels=levels)


def category_part(folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Accuracy by kind of question, if questions have kinds."""
    keys = {r["name"]: r for r in rows}
    results = [r for r in collect(folder) if r.setting in keys]
    tables = {}
    for name in keys:
        if own := [r for r in results if r.setting == name]:
            tables[name] = by_category(outcomes(own))
    kinds = sorted({kind for table in tables.values() for kind in table} - {""})
    if not kinds:
        return []
    head = "".join(f"<th>{escape(k)}</th>" for k in kinds)
    body = ""
    for name, table in tables.items():
        cells = "".join(f"<td>{escape(str(table[k])) if k in table else ''}</td>" for k in kinds)
        body += f"<tr><td>{escape(name)}</td>{cells}</tr>"
    return [f"<details><summary>By kind of question</summary><table><tr><th></th>{head}</tr>{body}</table></details>"]


def _size(budget: Any) -> float:
    return float(budget) if isinstance(budget, int) else float("inf")


# Training ------------------------------------------------------------------------------------------------------------

CURVES = (
    ("Loss", "loss an answer token", ("loss",), "loss_by_budget/"),
    ("Share of the stream kept", "tokens kept / tokens seen", (), "kept_share/"),
    ("Gradient norm", "before clipping", ("grad_norm",), ""),
    ("Learning rate", "learning rate", ("lr",), ""),
    ("Throughput", "stream tokens a second", ("tokens_per_s",), ""),
    ("Waiting for data", "share of the time", ("wait_share",), ""),
)


def training_parts(folder: Path) -> list[str]:
    """Curves and settings of a training run."""
    rows = read_metrics(folder / "metrics.jsonl")
    parts = ["<h2>Training</h2>"]
    if rows and not all({"time_s", "loss", "peak_gib"} <= row.keys() for row in rows):
        raise UserError(
            f"{folder / 'metrics.jsonl'} holds lines of another kind", remedy="name the folder of a training run"
        )
    if not rows:
        return [*parts, "<p>The run has not logged anything yet.</p>"]
    last, first = rows[-1], rows[0]
    parts.append(
        f"<p>{last['step']:.0f} steps in {last['time_s']:.0f} s; loss {first['loss']:.3f} at step {first['step']:.0f}, "
        f"{last['loss']:.3f} at the end; peak memory {max(r['peak_gib'] for r in rows):.2f} GiB.</p>"
    )
    for title, label, names, prefix in CURVES:
        found = [*names, *sorted({k for r in rows for k in r if prefix and k.startswith(prefix)})]
        lines = [
            Line(
                name.removeprefix(prefix) if name not in names else name,
                [(r["step"], r[name]) for r in rows if name in r],
                dashed=bool(names) and name not in names,
                colour=i,
            )
            for i, name in enumerate(found)
        ]
        parts += [f"<h3>{escape(title)}</h3>", chart(lines, "step", label)]
    config = folder / "config.yaml"
    if config.is_file():
        parts.append(f"<details><summary>Settings of the training</summary>{text_of(config)}</details>")
    return parts
