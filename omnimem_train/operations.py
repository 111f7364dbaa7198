"""What a training step on a stream computes: operations and bytes moved, counted from how the step works.

Beside `omnimem_train.costs`, whose chunks it goes through; `omnimem_train.gpus` turns the counts into seconds. Tests
hold the operations against those that torch counts on a small model. Bytes moved are those of elementwise operations:
each reads its inputs and writes its output once.
"""

from __future__ import annotations

from dataclasses import replace

from omnimem_train.costs import MARKS, NORMS, Chunk, StreamStep
from omnimem_train.gradient import Gradient
from omnimem_train.models.quantised import BYTES_A_WEIGHT
from omnimem_train.models.shape import PROJECTIONS
from omnimem_train.scoring_costs import Work, scoring

LAUNCHES = {"layer": (17, 50), "choice": (45, 45), "adapter": (4, 6), "backward": (35, 60), "adapter_backward": (10, 9)}
"""Kernels started for a layer and chunk with the package's own kernels and without, and for each adapter; counted on a
small model with a dispatch mode."""
UNPACKING = 3  # kernels that unpack a 4-bit matrix: its scales, their offset, itself
KEYS = ("k_proj", "v_proj")


def forward(
    step: StreamStep, chunk: Chunk, layers: int | None = None, *, select: bool = True, remembered: bool = True
) -> Work:
    """A pass over `layers` layers (all of them), with selection or without (recomputation). When the chunk is
    `remembered`, nothing but the projections of its attention is computed of the model's last layer."""
    s, b, n, short = step.shape, step.itemsize, chunk.n, step.short
    adapters = _adapters(step)
    per_token = NORMS * s.hidden * (2 * b if short else 24 + 4 * b)
    per_token += (2 if short else 10) * b * (s.query_width + s.key_width)  # rotation
    per_token += 6 * b * s.hidden + (3 if short else 5) * b * s.mlp  # residuals, SwiGLU
    per_token += sum(b * i + (2 * b if b == 2 else 6 * b) * o for _, i, o in adapters)
    joined = 2 * chunk.candidates * step.token_bytes if chunk.memory else 0
    gathered = 2 * chunk.kept * step.stored_bytes if chunk.kept < chunk.candidates else 0
    low_rank = sum(2.0 * n * step.rank * (i + o) for _, i, o in adapters)
    layer = Work(
        matrix=2.0 * s.layer_weights * n + low_rank,
        **{"split" if step.split else "attention": 4.0 * s.query_width * chunk.pairs},
        traffic=n * per_token + joined + gathered + 2 * chunk.candidates * MARKS * s.kv_heads,
        launches=_launches(step, "layer") + _launches(step, "adapter") * len(adapters),
    )
    layer += _unpacking(step)
    if chunk.kept < chunk.candidates:
        layer += Work(launches=_launches(step, "choice"))
        if select:
            layer += scoring(step.spec, s, b, n, chunk.candidates, step.kernels, step.split and chunk.memory > 0)
    layers = s.layers if layers is None else layers
    if not remembered or layers < s.layers:
        return layers * layer
    skipped = 2.0 * n * (s.layer_weights - 2 * s.hidden * (s.query_width + s.key_width))
    part = Work(matrix=skipped, **{"split" if step.split else "attention": 4.0 * s.query_width * chunk.pairs})
    return layers * layer + (-1) * part


def backward(step: StreamStep, chunk: Chunk, *, remembered: bool = True) -> Work:
    """The backward pass itself: matrices once (their weights are frozen), adapters twice, attention 2.5 times.

    Of the last layer with gradient only keys and values go on when the chunk is `remembered`; the first layer's input
    needs no gradient.
    """
    s, b, n, layers, short = step.shape, step.itemsize, chunk.n, step.gradient_layers(chunk), step.short
    if layers == 0:
        return Work()
    whole = layers - 1 if remembered else layers
    used = [(i, o, whole + int(remembered and t in KEYS)) for t, i, o in _adapters(step)]
    first = s.hidden * (s.query_width + 2 * s.key_width)
    matrix = whole * s.layer_weights + (layers - whole) * 2 * s.hidden * s.key_width - first
    low_rank = sum(4.0 * n * step.rank * (i + o) * times for i, o, times in used)
    per_token = NORMS * s.hidden * (6 * b if short else 80 + 7 * b) + 3 * b * s.hidden
    per_token += (4 if short else 14) * b * (s.query_width + s.key_width) + (5 if short else 9) * b * s.mlp
    adapters = sum((5 * b * i + (2 if b == 2 else 6) * b * o) * times for i, o, times in used)
    moved = step.token_bytes * (4 * chunk.candidates + 5 * chunk.kept)
    launches = layers * _launches(step, "backward")
    launches += _launches(step, "adapter_backward") * sum(times for *_, times in used)
    return whole * _unpacking(step) + Work(
        matrix=2.0 * n * matrix + low_rank,
        **{"split_back" if step.split else "attention_back": 10.0 * s.query_width * chunk.pairs * whole},
        traffic=n * (whole * per_token + adapters) + layers * moved,
        launches=launches,
    )


def unread(step: StreamStep, chunk: Chunk) -> Work:
    """What a recomputation layer by layer leaves out: the last products of the layers' MLPs, where they are frozen."""
    s, layers = step.shape, min(step.gradient_layers(chunk), step.shape.layers - 1)
    if step.lora is not None and "down_proj" in step.lora.targets:
        return Work()
    return layers * Work(
        matrix=2.0 * chunk.n * s.mlp * s.hidden, traffic=chunk.n * s.hidden * step.itemsize, launches=1
    )


def step_work(step: StreamStep) -> dict[str, Work]:
    """The phases of a step: "watching" (chunks without gradient), "forward", "recomputation" and "backward" of those
    with gradient and of the question, and the "teacher" of a distillation."""
    done = {name: Work() for name in ("watching", "forward", "recomputation", "backward", "teacher")}
    for c, remembered in [*((c, True) for c in step.chunks), (step.asked, False)]:
        done["watching" if c.due == "none" else "forward"] += c.count * forward(step, c, remembered=remembered)
        if c.due == "none":
            continue
        if step.recomputes:
            again = forward(step, c, step.gradient_layers(c), select=False, remembered=remembered)
            if step.by_layer and remembered:
                again += (-1) * unread(step, c)
            done["recomputation"] += c.count * again
        done["backward"] += c.count * backward(step, c, remembered=remembered)
    head = Work(matrix=2.0 * step.answer * step.shape.hidden * step.shape.vocabulary, launches=10)
    for name in ("watching",) if step.gradient.kind == "none" else ("forward", "backward"):
        done[name] += head
    if step.teacher:
        full = step.spec.replace(selector="full", selector_options={})
        done["teacher"] = step_work(replace(step, spec=full, gradient=Gradient("none"), lora=None, teacher=False))[
            "watching"
        ]
    return done


def _adapters(step: StreamStep) -> list[tuple[str, int, int]]:
    """Targets with channels in and out."""
    return [(t, *step.shape.projections[t]) for t in (step.lora.targets if step.lora else ())]


def _unpacking(step: StreamStep) -> Work:
    """Unpacking all matrices of a layer once: read in 4 bits, written in the precision of the model."""
    if not step.packed:
        return Work()
    weights = step.shape.layer_weights
    return Work(traffic=weights * (BYTES_A_WEIGHT + step.itemsize), launches=UNPACKING * len(PROJECTIONS))


def _launches(step: StreamStep, what: str) -> int:
    return LAUNCHES[what][0 if step.short else 1]
