"""First stage of pre-training: both towers learn to name what each of their tokens shows.

Linear heads read the towers' output: shape and colour of a picture token, pattern and pitch of a sound token. The heads
are thrown away; the towers are then frozen, as everywhere in this package, and their outputs scaled to unit size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from data_prep.arrays import token_labels
from data_prep.streams import WorldStreams
from data_prep.world import COLOURS, PATTERNS, PITCHES, SHAPES, ClipSpec
from scripts.recall.optimise import MasterWeights, lr_at

SIZES = {"visual": (len(SHAPES), len(COLOURS)), "audio": (len(PATTERNS), len(PITCHES))}
NOTHING_WEIGHT = 0.1  # of tokens without an event, which are most


class Heads(nn.Module):
    """Two linear readings of each tower's output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read = nn.ModuleDict(
            {kind: nn.ModuleList([nn.Linear(width, n + 1) for n in sizes]) for kind, sizes in SIZES.items()}
        )


def label_tensors(specs: Sequence[ClipSpec], device: torch.device) -> dict[str, Tensor]:
    """ "visual" (B * patches * cells, 2) and "audio" (B * tokens, 2) int64, as `token_labels`."""
    found = [token_labels(spec) for spec in specs]
    return {
        kind: torch.from_numpy(np.concatenate([f[kind].reshape(-1, 2) for f in found])).to(device) for kind in SIZES
    }


def tower_outputs(streams: WorldStreams, specs: Sequence[ClipSpec]) -> dict[str, Tensor]:
    """ "visual" (tokens, E) and "audio" (tokens, E), with gradient."""
    visual, audio = streams.towers(specs)
    return {"visual": visual.flatten(0, 1), "audio": audio.flatten(0, 1)}


def losses(heads: Heads, outputs: dict[str, Tensor], labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of the four weighted cross-entropies; and, by name, the share of event tokens named rightly."""
    total, right = torch.zeros((), device=outputs["visual"].device), {}
    for kind, names in (("visual", ("shape", "colour")), ("audio", ("pattern", "pitch"))):
        event = labels[kind][:, 0] > 0
        weight = torch.where(event, 1.0, NOTHING_WEIGHT)
        for i, name in enumerate(names):
            logits = heads.read[kind][i](outputs[kind]).float()  # type: ignore[index]
            each = cross_entropy(logits, labels[kind][:, i], reduction="none")
            total = total + (each * weight).sum() / weight.sum()
            hit = (logits.argmax(-1) == labels[kind][:, i]) & event
            right[name] = hit.sum() / event.sum().clamp(min=1)
    return total, right


def train_towers(
    streams: WorldStreams,
    batches: Callable[[int], Sequence[ClipSpec]],
    seconds: float,
    log: Callable[[dict[str, Any]], None],
    peak_lr: float = 2e-3,
    max_steps: int = 10**9,
) -> None:
    """Train the towers of `streams.model` for so many seconds on `batches(step)`, then freeze and scale them."""
    model, device = streams.model, streams.model.device
    towers = nn.ModuleList([model.parts.visual, model.parts.audio])
    towers.requires_grad_(True)
    torch.manual_seed(0)
    heads = Heads(model.hidden_size).to(device, model.dtype)
    weights = MasterWeights(nn.ModuleList([towers, heads]))
    begun, step = time.perf_counter(), 0
    while (used := time.perf_counter() - begun) < seconds and step < max_steps:
        specs = batches(step)
        total, right = losses(heads, tower_outputs(streams, specs), label_tensors(specs, device))
        total.backward()
        norm = weights.step(lr_at(peak_lr, step, max(used / seconds, step / max_steps), warmup=50))
        step += 1
        if step % 50 == 0:
            row = {"stage": "towers", "step": step, "loss": float(total), "grad_norm": float(norm)}
            log(row | {f"right/{name}": float(x) for name, x in right.items()} | {"seconds": used})
    towers.requires_grad_(False)
    _scale_outputs(streams, batches(step))


@torch.no_grad()
def _scale_outputs(streams: WorldStreams, specs: Sequence[ClipSpec]) -> None:
    """Make the mean square of each tower's output 1, by its last matrix."""
    outputs = tower_outputs(streams, specs)
    parts: Any = streams.model.parts
    for kind, last in (("visual", parts.visual.merger.mlp[2]), ("audio", parts.audio.proj)):
        size = outputs[kind].float().square().mean().sqrt()
        for parameter in (last.weight, last.bias):
            parameter.div_(size)
