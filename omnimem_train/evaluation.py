"""An evaluation run: settings from a recipe, clips from a benchmark file, results as JSON lines, and a table of them.

The run's folder:

    config.yaml            the resolved settings
    identity.json          what results depend on beside the memory: weights, questions, frames a second, ...
    settings.json          what was measured: key -> name, selector, budget, adapter, memory spec
    results-rank*.jsonl    one answer a line
    summary.json           accuracies with intervals, paired differences
    table.md               the same, to read
    run.lock               while the run goes on: who it is
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from omnimem_train.benchmarks import ChoiceItem, load_choices
from omnimem_train.config import save_resolved
from omnimem_train.errors import UserError
from omnimem_train.evaluate import ChoiceQuestion, Clip, Evaluator, ItemResult, Setting, collect, run
from omnimem_train.media import read_audio_blocks, read_windows
from omnimem_train.media_decode import READERS
from omnimem_train.memory.spec import MemorySpec
from omnimem_train.models.interface import MediaEncoder, MediaInfo, MediaWindow, StreamingModel, Turn
from omnimem_train.models.loading import ModelConfig
from omnimem_train.records import read_object
from omnimem_train.runlock import run_lock
from omnimem_train.session import model_fingerprint
from omnimem_train.stats import Outcome, accuracy, compare, holm
from omnimem_train.streaming import Stream

FULL, TABLE = "full", "table"


@dataclass(frozen=True)
class EvalData:
    """What is watched and asked.

    Attributes:
        items: file with the questions.
        form: its format: "manifest", "videomme", "lvbench" or "lvomnibench" (see `omnimem_train.benchmarks`).
        media_root: folder of the videos; the file's own folder without it.
        fps, reader, time_limit_s, use_audio: as in training (`omnimem_train.data.DataConfig`).
        exact_mel: take one pass over each clip's sound first, so that the log-mel floor is that of the whole clip, as
            in the stock processor; without it the floor follows the stream.
        require_media: a missing video stops the run before it begins; without it its questions count as wrong.
        limit: only the first so many clips; 0 for all.
    """

    items: Path | None = None
    form: str = "manifest"
    media_root: Path | None = None
    fps: float = 2.0
    reader: str = "decord"
    time_limit_s: float = 60.0
    use_audio: bool = True
    exact_mel: bool = False
    require_media: bool = True
    limit: int = 0

    def __post_init__(self) -> None:
        if self.reader not in READERS:
            raise UserError(f"data.reader={self.reader!r} is not known", remedy=f"one of {', '.join(READERS)}")
        for name in ("fps", "time_limit_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"data.{name}={getattr(self, name)} must be above 0, and finite")
        if self.limit < 0:
            raise UserError(f"data.limit={self.limit} is negative", remedy="give a number of clips, or 0 for all")


@dataclass(frozen=True)
class EvalConfig:
    """An evaluation.

    Attributes:
        model: with `adapter` for a comparison of base and adapter.
        data: questions and clips.
        encoder: options of the model's encoder side.
        memory: what all settings share (chunk, positions, allocation, ...).
        selectors: names, or mappings of memory fields with a "name" for the table, e.g.
            {name: snapkv-split, selector: snapkv, allocation: split, allocation_options: {audio: 0.25}}. Fields under
            "base" hold for the base model alone, which has no learned importance, say.
        budgets: tokens a layer (or sizes such as "64MiB"), "full" for no compression, and "table" for
            `memory.layer_table` as it is. With a table, a number is the mean that it is scaled to.
        with_base, with_adapter: measure without and (if there is one) with the adapter.
        method, max_new_tokens: how an answer is read (see `omnimem_train.evaluate.Evaluator`).
        output: folder of the run. Answers already there are not measured again.
        retry_failed: measure failed items again.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: EvalData = field(default_factory=EvalData)
    encoder: dict[str, Any] = field(default_factory=dict)
    memory: MemorySpec = field(default_factory=MemorySpec)
    selectors: tuple[Any, ...] = ("perturbation",)
    budgets: tuple[int | str, ...] = (FULL,)
    with_base: bool = True
    with_adapter: bool = True
    method: str = "letters"
    max_new_tokens: int = 16
    output: Path = Path("runs/eval")
    retry_failed: bool = False

    def __post_init__(self) -> None:
        if not self.selectors or not self.budgets:
            raise UserError("nothing to evaluate", remedy="name at least one selector and one budget")
        if not (self.with_base or (self.with_adapter and self.model.adapter)):
            raise UserError(
                "nothing to evaluate: with_base is off and there is no adapter",
                remedy="set with_base=true or model.adapter",
            )
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens} must be 1 or more")
        self.settings()

    def settings(self) -> list[Setting]:
        """Selectors x budgets x (base, adapter); without compression all selectors are one setting."""
        both = [False] * self.with_base + [True] * bool(self.with_adapter and self.model.adapter)
        return [Setting(f"{n}{'+adapter' if a else ''}", spec, a) for a in both for n, spec in self._specs(a).items()]

    def _specs(self, adapter: bool) -> dict[str, MemorySpec]:
        """Selectors x budgets, for the model with or without the adapter."""
        specs: dict[str, MemorySpec] = {}
        for budget in self.budgets:
            for entry in self.selectors:
                name, fields, base = _named(entry)
                spec = MemorySpec.from_dict(self.memory.to_dict() | fields | ({} if adapter else base))
                full = budget == FULL  # one setting, whatever the entries are, so it takes nothing from them
                label, spec = (FULL, _at(self.memory, FULL)) if full else (f"{name}@{budget}", _at(spec, budget))
                if specs.get(label, spec) != spec:
                    raise UserError(f"two selectors are called {name!r}", remedy="give each a name of its own")
                specs[label] = spec
        return specs


def _at(spec: MemorySpec, budget: int | str) -> MemorySpec:
    """`spec` with an entry of `EvalConfig.budgets`."""
    if budget == FULL:
        return spec.replace(selector="full", selector_options={}, budget=None, layer_table=())
    if budget != TABLE:
        return spec.at(budget)
    if not spec.layer_table:
        raise UserError("budget 'table' without a layer table", remedy="name a table file: memory.layer_table=PATH")
    return spec


def _named(entry: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The name of a selector entry, the memory fields it sets, and those it sets otherwise for the base model."""
    if isinstance(entry, str):
        return entry, {"selector": entry, "selector_options": {}}, {}
    if not isinstance(entry, Mapping) or "selector" not in entry:
        raise UserError(
            f"selector entry {entry!r} is neither a name nor a mapping with a selector",
            remedy="write e.g. snapkv, or {name: snapkv-split, selector: snapkv, allocation: split}",
        )
    base = entry.get("base", {})
    if not isinstance(base, Mapping):
        raise UserError(f"selector entry {entry!r}: base={base!r} is no mapping of memory fields")
    if "budget" in entry or "budget" in base:
        raise UserError(f"selector entry {entry!r} sets a budget", remedy="budgets are named in the list `budgets`")
    fields = {"selector_options": {}} | {k: v for k, v in entry.items() if k not in ("name", "base")}
    return str(entry.get("name", entry["selector"])), fields, dict(base)


def _question(i: ChoiceItem) -> ChoiceQuestion:
    return ChoiceQuestion(i.id, i.prompt, len(i.options), i.answer, i.time_s, i.meta, i.question, i.options)


def clips_of(items: list[ChoiceItem], model: StreamingModel, config: EvalConfig) -> list[Clip]:
    """Questions grouped by the file (and sound) they are about, in the order of the items."""
    groups: dict[tuple[Any, ...], list[ChoiceItem]] = {}
    for item in items:
        groups.setdefault((item.media, item.audio, item.use_audio), []).append(item)
    clips = []
    for (media, audio, use_audio), members in groups.items():
        questions = tuple(_question(i) for i in members)
        opened = partial(open_file, model, config.data, config.encoder, media, audio, use_audio)
        clips.append(Clip(str(members[0].meta.get("cluster") or (media or audio)), questions, opened))
    return clips[: config.data.limit or None]


def open_file(
    model: StreamingModel,
    data: EvalData,
    options: Mapping[str, Any],
    media: Path | None,
    audio: Path | None = None,
    use_audio: bool = True,
) -> tuple[MediaEncoder, Iterable[MediaWindow]]:
    """An encoder and the windows of a file.

    Raises:
        UserError: it cannot be read.
    """
    path = media or audio
    assert path is not None
    hear = use_audio and data.use_audio
    windows = read_windows(
        path,
        fps=data.fps,
        window_s=model.window_s(data.fps),
        sampling_rate=model.sampling_rate,
        reader=data.reader,
        time_limit_s=data.time_limit_s,
        audio_path=audio if media is not None and hear else None,
        picture=media is not None,
        sound=hear,
    )
    extra: dict[str, Any] = {}
    if data.exact_mel and windows.info.has_audio:
        sound = read_audio_blocks(
            audio or path, model.sampling_rate, reader=data.reader, time_limit_s=data.time_limit_s
        )
        extra = model.prepass(sound)
    return model.open(windows.info, data.fps, **options, **extra), windows


def evaluate(
    config: EvalConfig,
    model: StreamingModel,
    evaluator: Evaluator,
    *,
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], None] = lambda: None,
    progress: Callable[[list[Clip]], Iterable[Clip]] = iter,
) -> dict[str, Any]:
    """Measure what is missing and summarise. All ranks get the summary; rank 0 writes it.

    Raises:
        UserError: the questions cannot be read, or another run holds the output folder.
    """
    if config.data.items is None:
        raise UserError("no questions to evaluate on", remedy="name a file: data.items=PATH")
    items = load_choices(config.data.items, config.data.media_root, config.data.form, config.data.require_media)
    clips = clips_of(items, model, config)
    settings = config.settings()
    preflight(config, model, items, settings)
    with run_lock(config.output, rank):
        if rank == 0:
            config.output.mkdir(parents=True, exist_ok=True)
            check_identity(config, model)
            save_resolved(config, config.output / "config.yaml")
            about = {s.key(): describe(s) for s in settings}
            (config.output / "settings.json").write_text(json.dumps(about, indent=2) + "\n")
        barrier()
        retry = config.retry_failed
        run(evaluator, clips, config.output, rank=rank, world=world, retry_failed=retry, progress=progress)
        barrier()
        wanted = {(q.id, s.key()) for clip in clips for q in clip.questions for s in settings}
        results = [r for r in collect(config.output) if (r.question, r.key) in wanted]
        summary = summarise(results, settings)
        if rank == 0:
            (config.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
            (config.output / "table.md").write_text(table(summary) + "\n")
    return summary


def preflight(
    config: EvalConfig, model: StreamingModel, items: Sequence[ChoiceItem], settings: Sequence[Setting]
) -> None:
    """Find out now what would make every answer fail, and so count as wrong.

    Raises:
        UserError: a frame rate or encoder options that cannot be used, a budget below the text it has to hold, or a
            question with a control token.
    """
    model.window_s(config.data.fps)
    info = MediaInfo(Path(), 1.0, has_video=True, has_audio=True)
    opening = model.open(info, config.data.fps, **config.encoder).start()
    for setting in settings:
        for budget in Stream(model, setting.spec).chooser.budgets:
            if budget is not None:
                setting.spec.media_budget(budget, opening.n)
    for item in items:
        try:
            model.render(Turn(item.prompt))
        except UserError as error:
            raise UserError(f"question {item.id!r}: {error.what}", error.cause, error.remedy) from error


def check_identity(config: EvalConfig, model: StreamingModel) -> None:
    """Results already in the output folder must be of the same weights, questions and settings.

    Raises:
        UserError: they are not; says what differs.
    """
    assert config.data.items is not None
    now = {
        "weights": model_fingerprint(model),
        "questions": hashlib.sha256(config.data.items.read_bytes()).hexdigest()[:16],
        "data": {k: getattr(config.data, k) for k in ("form", "fps", "reader", "use_audio", "exact_mel")},
        "numbers": [config.model.dtype, config.model.attention],  # quantization is in the fingerprint
        "encoder": config.encoder,
        "method": [config.method, config.max_new_tokens],
    }
    path = config.output / "identity.json"
    held = read_object(path) if path.exists() else now
    differs = [f"{k}: {held.get(k)!r} there, {now[k]!r} now" for k in now if held.get(k) != now[k]]
    if differs:
        raise UserError(
            f"{config.output} holds results of another evaluation ({'; '.join(differs)})",
            cause="its answers would be taken for those of this one",
            remedy="choose another output folder, or delete that one",
        )
    path.write_text(json.dumps(now, indent=2) + "\n")


def describe(s: Setting) -> dict[str, Any]:
    """A setting as plain values."""
    name, _, _ = s.name.removesuffix("+adapter").partition("@")
    budget = FULL if s.spec.unlimited else s.spec.mean_tokens
    return {"name": s.name, "method": name, "budget": budget, "adapter": s.adapter, "memory": s.spec.to_dict()}


def outcomes(results: Iterable[ItemResult]) -> list[Outcome]:
    """Results as the statistics take them; a failed item has no answer."""
    return [
        Outcome(r.question, r.clip, None if r.predicted is None else r.correct, str(r.meta.get("category", "")))
        for r in results
    ]


def summarise(results: list[ItemResult], settings: list[Setting]) -> dict[str, Any]:
    """Accuracy of every setting, and adapter against base where both were measured.

    Returns:
        "rows": per setting its description, "n", "clips", "accuracy", "low", "high", "coverage"; with the adapter also
        "difference" (value, low, high, gained, lost, p, p_holm) to the setting of the same name without it. "failed":
        items that gave no answer, each once, with the reason.
    """
    held: dict[str, list[Outcome]] = {}
    for s in settings:
        held[s.key()] = outcomes(r for r in results if r.key == s.key())
    rows, p_values, bases = [], {}, {s.name: s.key() for s in settings if not s.adapter}
    for s in settings:
        if not held[s.key()]:
            continue
        a = accuracy(held[s.key()])
        row = describe(s) | {
            "n": a.n, "clips": a.clips, "accuracy": a.value, "low": a.low, "high": a.high, "coverage": a.coverage,
        }  # fmt: skip
        base = bases.get(s.name.removesuffix("+adapter"), "")
        if s.adapter and held.get(base):
            c = compare(held[base], held[s.key()])
            p_values[s.name] = c.p_mcnemar
            row["difference"] = {
                "value": c.value, "low": c.low, "high": c.high, "gained": c.gained, "lost": c.lost, "p": c.p_mcnemar,
            }  # fmt: skip
        rows.append(row)
    adjusted = holm(p_values) if p_values else {}
    for row in rows:
        if row["name"] in adjusted:
            row["difference"]["p_holm"] = adjusted[row["name"]]
    failed = {(r.clip, r.question): r.error or "no letter in the answer" for r in results if r.predicted is None}
    listed = [{"clip": c, "question": q, "why": why} for (c, q), why in sorted(failed.items())]
    return {"rows": rows, "failed": listed}


def table(summary: Mapping[str, Any]) -> str:
    """The summary as a Markdown table: a row for each method and budget."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in summary["rows"]:
        cell = cells.setdefault((row["method"], str(row["budget"])), {})
        cell["adapter" if row["adapter"] else "base"] = _percent(row["accuracy"], row["low"], row["high"])
        cell["coverage"] = f"{100 * row['coverage']:.0f} %"
        cell["n"] = f"{row['n']} / {row['clips']}"
        if d := row.get("difference"):
            cell["difference"] = _percent(d["value"], d["low"], d["high"], signed=True)
            cell["p"] = f"{d['p_holm']:.3f}"
    columns = ["base", "adapter", "difference", "p", "n", "coverage"]
    columns = [c for c in columns if any(c in cell for cell in cells.values())]
    heads = {"base": "base, % [95 %]", "adapter": "adapter, % [95 %]", "p": "p (Holm)", "n": "questions / clips"}
    lines = ["| " + " | ".join(["selector", "budget", *(heads.get(c, c) for c in columns)]) + " |"]
    lines.append("|" + "---|" * (len(columns) + 2))
    for (method, budget), cell in cells.items():
        lines.append("| " + " | ".join([method, budget, *(cell.get(c, "") for c in columns)]) + " |")
    return "\n".join([*lines, "", what_counts(summary["rows"])])


def what_counts(rows: Sequence[Mapping[str, Any]]) -> str:
    """What a budget of these rows is a number of."""
    inside = {bool(row["memory"]["count_text"]) for row in rows}
    text = {
        frozenset({True}): "pinned text (prompt, marks) is counted inside",
        frozenset({False}): "pinned text (prompt, marks) comes on top and is not counted",
    }.get(frozenset(inside), "pinned text is counted in some rows and not in others, see settings.json")
    return f"Budget: tokens a kv head of a layer keeps between chunks; {text}."


def _percent(value: float, low: float, high: float, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{100 * value:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"
