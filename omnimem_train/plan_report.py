"""A plan as a short table, and as plain values for JSON."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from omnimem_train.budget_sampling import Draw
from omnimem_train.costs import StreamStep
from omnimem_train.gpus import MEASURED, usable_gib
from omnimem_train.operations import step_work
from omnimem_train.plan import Request
from omnimem_train.plan_advice import Remedy, remedies

GIB, MIB = 2**30, 2**20


def report(asked: Request) -> dict[str, Any]:
    """All that is predicted, as plain values; `remedies` is empty where the plan fits."""
    clip, watched_s = asked.clip, asked.watched_s
    draw, footprint = asked.peak()
    largest, phases = asked.step(draw), asked.phases()
    usual = asked.step(Draw(_budget(asked), asked.config.memory.chunk_tokens))
    fits = asked.fits()
    return {
        "model": {"path": asked.shape.path, "parameters": asked.shape.parameters, "bytes_a_number": asked.itemsize}
        | {"quantization": asked.config.model.quantization},
        "gpu": {"name": asked.gpu.name, "memory_gib": asked.gpu.memory_gib, "usable_gib": usable_gib(asked.gpu)},
        "clip": {"watched_s": watched_s, "width": asked.width, "height": asked.height, "fps": asked.config.data.fps}
        | asdict(clip)
        | {"total": clip.total},
        "tokens_per_s": {"visual": clip.visual / watched_s, "audio": clip.audio / watched_s},
        "chunks": {
            "tokens": usual.spec.chunk_tokens,
            "seconds": usual.spec.chunk_tokens * watched_s / clip.total,
            "count": usual.n_chunks,
            "with_gradient": sum(c.count for c in usual.chunks if c.due == "all"),
        },
        "memory": _memory(usual),
        "largest_step": {
            "budget": draw.budget,
            "chunk_tokens": draw.chunk_tokens,
            "gib": {f.name: getattr(footprint, f.name) / GIB for f in fields(footprint)},
            "peak_gib": footprint.total / GIB,
            "host_gib": asked.host_bytes() / GIB,
            "fits": fits,
        },
        "step_s": None if phases is None else {**phases, "total": sum(phases.values())},
        "remedies": [] if fits else [asdict(r) for r in remedies(asked)],
    } | {"operations": sum(work.operations for work in step_work(largest).values())}


def _budget(asked: Request) -> int | None:
    """The largest budget of the recipe; None where nothing is ever compressed."""
    b = asked.config.budgets
    return None if b.full_share >= 1 else max(b.choices, default=b.high)


def _memory(step: StreamStep) -> dict[str, Any]:
    """What is remembered between chunks with the largest budget."""
    tokens = step.chunks[-1].kept if step.chunks else 0.0
    return {
        "bytes_a_token_and_layer": step.token_bytes,
        "stored_bytes_a_token_and_layer": step.stored_bytes,
        "tokens_a_layer": tokens,
        "layer_bytes": tokens * step.token_bytes,
        "layers": step.shape.layers,
        "total_bytes": tokens * step.token_bytes * step.shape.layers,
    }


def table(found: dict[str, Any]) -> str:
    """The report as text."""
    clip, chunks, memory, largest, gpu = (found[k] for k in ("clip", "chunks", "memory", "largest_step", "gpu"))
    rate = found["tokens_per_s"]
    budget = "full memory" if largest["budget"] is None else f"budget {largest['budget']:,}"
    rows = [
        ("", f"{found['model']['path']}, clips of {clip['watched_s']:g} s, {clip['width']} x {clip['height']}"),
        ("visual tokens a second", f"{rate['visual']:.1f}", f"{clip['rows']} x {clip['columns']} for two frames"),
        ("audio tokens a second", f"{rate['audio']:.1f}"),
        ("tokens of a clip", f"{clip['total']:,}", f"{clip['text']:,} of them text"),
        (
            "chunks",
            f"{chunks['count']:,}",
            f"of {chunks['tokens']:,} tokens, {chunks['seconds']:.1f} s; gradient through {chunks['with_gradient']:,}",
        ),
        (),
        ("memory of a token and layer", f"{memory['bytes_a_token_and_layer'] / 2**10:.2f} KiB", "keys and values"),
        ("memory of a layer", f"{memory['layer_bytes'] / MIB:.1f} MiB", f"{memory['tokens_a_layer']:,.0f} tokens kept"),
        (f"memory of {memory['layers']} layers", f"{memory['total_bytes'] / GIB:.2f} GiB"),
        (),
        ("", f"largest step: {budget}, chunks of {largest['chunk_tokens']:,}"),
        *((name, f"{gib:,.2f} GiB", _WHAT[name]) for name, gib in largest["gib"].items()),
        ("peak", f"{largest['peak_gib']:,.1f} GiB", f"{gpu['name']} has {gpu['usable_gib']:.1f} GiB for it"),
        *_host(largest["host_gib"]),
        (),
        *_times(found["step_s"], gpu["name"]),
    ]
    return "\n".join([_line(row) for row in rows] + _verdict(found))


_WHAT = {
    "weights": "of the whole model",
    "adapter": "weights, gradients, AdamW",
    "clips": "encoded, waiting for their turn",
    "snapshots": "memories between chunks, for the backward pass",
    "activations": "of the chunk that is recomputed",
    "passing": "gradients and buffers of a moment",
    "recordings": "inputs and results of recorded chunks (model.graphs)",
    "beside": "a chunk that is not recorded, beside those that are",
}


def _line(row: tuple[str, ...]) -> str:
    if not row:
        return ""
    if not row[0]:
        return row[1]
    return f"  {row[0]:<28}{row[1]:>12}   {row[2] if len(row) > 2 else ''}".rstrip()


def _host(gib: float) -> list[tuple[str, ...]]:
    return [("host memory", f"{gib:,.1f} GiB", "of each process, pinned (gradient.offload)")] if gib else []


def _times(step_s: dict[str, float] | None, gpu: str) -> list[tuple[str, ...]]:
    if step_s is None:
        return [("time of a step", "unknown", f"no rates are known for {gpu}")]
    parts = ", ".join(f"{name} {s:.1f}" for name, s in step_s.items() if name != "total" and s > 0)
    rows: list[tuple[str, ...]] = [("time of a step", f"{step_s['total']:.1f} s", parts)]
    if gpu != MEASURED:
        rows.append(("", f"  (by the data sheet of the {gpu}; only an {MEASURED} has been measured)"))
    return rows


def _verdict(found: dict[str, Any]) -> list[str]:
    largest, gpu = found["largest_step"], found["gpu"]
    if largest["fits"]:
        return ["", f"It fits: {largest['peak_gib']:.1f} of {gpu['usable_gib']:.1f} GiB."]
    lines = ["", f"It does not fit: {largest['peak_gib']:,.1f} GiB, {gpu['usable_gib']:.1f} GiB are there. What would:"]
    entries = [Remedy(**{**r, "overrides": tuple(r["overrides"])}) for r in found["remedies"]]
    for r in entries:
        time = "" if r.step_s is None else f", {r.step_s:.1f} s a step"
        host = f", {r.host_gib:.1f} GiB of host memory" if r.host_gib else ""
        lines.append(f"  {'yes' if r.fits else 'no ':<5}{' '.join(r.overrides):<44} {r.peak_gib:6.1f} GiB{time}{host}")
    if not any(r.fits for r in entries):
        lines.append("  No setting is enough: use a smaller model or a larger GPU.")
    return lines
