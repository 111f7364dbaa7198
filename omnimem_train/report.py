"""One HTML page of a training run and an evaluation: self-contained, no scripts, light and dark, fit for a phone."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from omnimem_train.charts import Axis, Line, Point, chart, legend
from omnimem_train.checkpoint import checkpoints, read_meta
from omnimem_train.errors import UserError
from omnimem_train.markup import Markup, details, join, page, tag
from omnimem_train.report_eval import Evaluation, context, evaluation_section, headlines, read_evaluation
from omnimem_train.rng import versions
from omnimem_train.runlog import read_metrics

POINTS = 300  # of a curve; longer ones are averaged
SMOOTHED = 30  # log lines from which on a curve gets a running mean

# title, unit, metric or "prefix/" of several, least and greatest value of the axis, factor
CURVES: tuple[tuple[str, str, str, float | None, float | None, float], ...] = (
    ("Loss", "nats an answer token", "loss", None, None, 1),
    ("Loss by budget band", "nats an answer token; bands in tokens", "loss_by_budget/", None, None, 1),
    ("Distillation loss", "nats an answer token", "distill_loss", None, None, 1),
    ("Learning rate", "learning rate", "lr", 0, None, 1),
    ("Gradient norm", "before clipping", "grad_norm", 0, None, 1),
    ("Kept share by modality", "% of the tokens seen", "kept_share/", 0, 100, 100),
    ("Throughput", "stream tokens a second, all processes", "tokens_per_s", 0, None, 1),
    ("Waiting for data", "% of the time", "wait_share", 0, None, 100),
    ("Peak memory", "GiB, first process", "peak_gib", 0, None, 1),
)


@dataclass(frozen=True)
class Training:
    """What a training run's folder holds.

    Attributes:
        metrics: lines of `metrics.jsonl`; empty before the first.
        config: `config.yaml`, or empty.
        steps: planned, if the configuration says.
        versions: of the newest checkpoint, with its step.
    """

    metrics: Sequence[Mapping[str, float]]
    config: str
    steps: int | None
    versions: tuple[int, Mapping[str, str]] | None


def write_report(
    out: Path, *, title: str, train: Path | None, evaluation: Path | None, notes: Sequence[str] = ()
) -> None:
    """Write the page.

    Args:
        train: folder of a training run, or None.
        evaluation: folder of an evaluation, or None.
        notes: sentences for its top.

    Raises:
        UserError: neither is given, a folder does not hold what it should, or the page cannot be written.
    """
    if train is None and evaluation is None:
        raise UserError("nothing to report", remedy="name a training run, an evaluation, or both")
    run = read_training(train) if train is not None else None
    measured = read_evaluation(evaluation) if evaluation is not None else None
    parts = [tag("h1", title), tag("p", overview(run, measured), cls="soft")]
    parts.append(tag("div", tag("ul", [tag("li", line) for line in lead(run, measured)]), cls="lead"))
    parts += [tag("p", note, cls="note") for note in notes]
    if measured is not None:
        parts += evaluation_section(measured)
    if run is not None:
        parts += training_section(run)
    parts += settings_section(run, measured)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page(title, *parts), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {out}", cause=str(error)) from error


def read_training(folder: Path) -> Training:
    """Read a training run's folder.

    Raises:
        UserError: it is not one, or its metrics are damaged.
    """
    config, metrics = folder / "config.yaml", folder / "metrics.jsonl"
    if not config.is_file() and not metrics.is_file():
        cause = "there is neither config.yaml nor metrics.jsonl"
        raise UserError(f"{folder} is not the folder of a training run", cause, "name what train.output was")
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    rows = read_metrics(metrics) if metrics.is_file() else []
    if not all(isinstance(value, int | float) for row in rows for value in row.values()):
        raise UserError(f"{metrics} holds lines of another kind", remedy="name the folder of a training run")
    found = checkpoints(folder / "checkpoints")
    used = None
    if found:
        content = read_meta(found[-1])
        used = (int(content["step"]), content["meta"].get("versions", {}))
    return Training(rows, text, _planned_steps(text), used)


def _planned_steps(config: str) -> int | None:
    try:
        return int(yaml.safe_load(config)["train"]["steps"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        return None


# The top -------------------------------------------------------------------------------------------------------------


def overview(run: Training | None, measured: Evaluation | None) -> str:
    """What this is about, in a line."""
    parts = []
    if measured is not None and measured.rows:
        questions, clips = (max(r[k] for r in measured.rows) for k in ("n", "clips"))
        methods = len({r["method"] for r in measured.rows if r["budget"] != "full"})
        parts.append(f"{questions} questions on {clips} clips, {len(measured.rows)} settings")
        parts.append(f"{methods} selector{'' if methods == 1 else 's'}")
    if run is not None and run.metrics:
        last = run.metrics[-1]
        parts.append(f"{last['step']:,.0f} steps" + (f" in {duration(last['time_s'])}" if "time_s" in last else ""))
    return " · ".join(parts) or "Nothing measured yet"


def lead(run: Training | None, measured: Evaluation | None) -> list[Markup]:
    """The headlines."""
    lines = [] if measured is None else [*headlines(measured.rows), *context(measured)]
    if measured is None:
        lines.append(join("No evaluation in this report: nothing is said here about how well the model answers."))
    if run is not None:
        lines.append(join(training_headline(run)))
    return lines


def training_headline(run: Training) -> str:
    """First and last loss, and how far the run got."""
    if not run.metrics:
        return "Training: no metrics yet."
    first, last = run.metrics[0], run.metrics[-1]
    done = f"Training: {last['step']:,.0f} step{'' if last['step'] == 1 else 's'}"
    if run.steps is not None and last["step"] < run.steps:
        done = f"Training: not finished, {last['step']:,.0f} of {run.steps:,} steps"
    if "loss" not in first or "loss" not in last or first is last:
        return f"{done}." if "loss" not in last else f"{done}; loss {last['loss']:.3f}."
    values = f"{first['loss']:.3f} at step {first['step']:,.0f}, {last['loss']:.3f} at step {last['step']:,.0f}"
    return f"{done}; loss on training clips {values} (not a held-out measure)."


def duration(seconds: float) -> str:
    """12 s, 3.5 min, 2.1 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# Training ------------------------------------------------------------------------------------------------------------


def training_section(run: Training) -> list[Markup]:
    """The curves."""
    parts = [tag("h2", "Training")]
    if not run.metrics:
        said = "The run has not logged anything yet: the first line comes after train.log_every steps."
        return [*parts, tag("p", said, cls="note")]
    panels = []
    for title, unit, key, low, high, factor in CURVES:
        lines = curves(run.metrics, key, factor)
        if not lines:
            continue
        x = Axis("optimizer step", whole=True)
        drawn = chart(lines, x, Axis(unit, low=low, high=high))
        panels.append(
            tag("figure", tag("figcaption", title), drawn, legend(lines) if len(lines) > 1 or key[-1] == "/" else None)
        )
    told = "Means since the log line before. Loss and kept share also follow the budgets that were drawn."
    if (size := bucket(len(run.metrics))) > 1:
        told += f" Points are means of {size} log lines."
    return [*parts, tag("p", told, cls="soft"), tag("div", panels, cls="grid")]


def curves(metrics: Sequence[Mapping[str, float]], key: str, factor: float = 1) -> list[Line]:
    """The lines of a metric, or of all that begin with a prefix ending in "/", bands of budgets in their order."""
    names = [key] if key[-1] != "/" else sorted({k for row in metrics for k in row if k.startswith(key)}, key=_band)
    size = bucket(len(metrics))
    lines: list[Line] = []
    for name in names:
        pairs = [(row["step"], factor * row[name]) for row in metrics if name in row]
        groups = [pairs[i : i + size] for i in range(0, len(pairs), size)]
        points = [Point(*(sum(v) / len(v) for v in zip(*group, strict=True))) for group in groups]
        if not points:
            continue
        long = key == "loss" and len(points) >= SMOOTHED
        shown = name.removeprefix(key) if key[-1] == "/" else name
        lines.append(Line(shown, points, len(lines), faint=long, markers=key[-1] == "/" and len(points) <= 20))
        if long:
            width = len(points) // 10
            lines.append(Line(f"running mean of {width * size} log lines", _smoothed(points, width)))
    return lines


def bucket(n: int) -> int:
    """How many log lines make a point of a curve."""
    return -(-n // POINTS)


def _smoothed(points: Sequence[Point], width: int) -> list[Point]:
    """Mean of the last `width` points, from the first full one on."""
    windows = [points[i - width : i] for i in range(width, len(points) + 1)]
    return [Point(window[-1].x, sum(p.y for p in window) / width) for window in windows]


def _band(name: str) -> tuple[float, str]:
    """Bands by their first budget, "full" and words behind."""
    first = name.split("/", 1)[1].split("-")[0]
    return (float(first) if first.isdigit() else float("inf"), name)


# Settings ------------------------------------------------------------------------------------------------------------


def settings_section(run: Training | None, measured: Evaluation | None) -> list[Markup]:
    """Resolved configurations, versions, machine."""
    parts = [tag("h2", "Settings and versions")]
    for what, held in (("training", run), ("evaluation", measured)):
        if held is not None:
            text = held.config or f"The folder holds no config.yaml of the {what}."
            parts.append(details(f"Settings of the {what}, defaults included", tag("pre", text)))
    if run is not None and run.versions is not None:
        step, used = run.versions
        parts.append(
            details(f"Versions of the training, from its checkpoint at step {step:,}", tag("pre", _lines(used)))
        )
    return [*parts, details("Where this page was written", tag("pre", _lines(machine() | versions())))]


def machine() -> dict[str, Any]:
    """Processor and accelerators; no names."""
    about = {"platform": f"{platform.system()} {platform.machine()}", "CPU cores": os.cpu_count()}
    for i in range(torch.cuda.device_count()):
        about[f"GPU {i}"] = torch.cuda.get_device_name(i)
    return about


def _lines(about: Mapping[str, Any]) -> str:
    width = max(map(len, about), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in about.items())
