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


# Alignment with the words -------------------------------------------------------------------------------------------

KEPT_SHARE = 0.5  # of the towers' own output beside what is aligned


def words_of(kind: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What the labels of a tower's tokens are called: (shapes, colours) or (patterns, pitches)."""
    return (SHAPES, tuple(COLOURS)) if kind == "visual" else (PATTERNS, tuple(PITCHES))


@torch.no_grad()
def align(streams: WorldStreams, groups: Sequence[Sequence[ClipSpec]], ridge: float = 1e-3) -> dict[str, float]:
    """Put what a token shows where the decoder has the words for it, as the contrastive training of published towers
    does: by least squares, the last matrix of each tower is changed so that an event's token becomes the sum of the
    embeddings of its two words (0 for no event), plus `KEPT_SHARE` of what it was.

    Args:
        groups: batches of clips to fit on; each batch of one world.

    Returns:
        share of the variance of the aligned part that the fit explains, for each tower.
    """
    model, table = streams.model, streams.model.parts.text.embed_tokens.weight  # type: ignore[union-attr]
    width, device = model.hidden_size, model.device
    explained = {}
    fits = {kind: [torch.zeros(width, width, device=device, dtype=torch.float64) for _ in range(3)] for kind in SIZES}
    words = {kind: [_word_vectors(model, names) for names in words_of(kind)] for kind in SIZES}
    for specs in groups:
        outputs, labels = tower_outputs(streams, specs), label_tensors(specs, device)
        for kind, (inner, cross, total) in fits.items():
            x = outputs[kind].double()
            y = sum(words[kind][i][labels[kind][:, i]] for i in range(2))
            assert isinstance(y, Tensor)
            weight = torch.where(labels[kind][:, :1] > 0, 1.0, NOTHING_WEIGHT).double()
            inner += (x * weight).T @ x
            cross += (x * weight).T @ y
            total += (y * weight).T @ y
    parts: Any = model.parts
    assert isinstance(table, Tensor)
    for kind, last in (("visual", parts.visual.merger.mlp[2]), ("audio", parts.audio.proj)):
        inner, cross, total = fits[kind]
        inner += ridge * inner.diagonal().mean() * torch.eye(width, device=device, dtype=torch.float64)
        to_words = torch.linalg.solve(inner, cross)  # output @ to_words is the sum of the words
        explained[kind] = float((to_words * cross).sum() / total.diagonal().sum())
        change = (to_words + KEPT_SHARE * torch.eye(width, device=device, dtype=torch.float64)).T
        last.weight.copy_((change @ last.weight.double()).to(last.weight.dtype))
        last.bias.copy_((change @ last.bias.double()).to(last.bias.dtype))
    return explained


def _word_vectors(model: Any, names: Sequence[str]) -> Tensor:
    """(1 + names, E) float64: 0, then the embedding of each word with a space in front."""
    ids = torch.tensor([model.tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in names])
    assert ids.shape[1] == 1, "every word of the world is one token"
    vectors = model.parts.text.embed_tokens.weight[ids[:, 0].to(model.device)].double()
    return torch.cat([torch.zeros_like(vectors[:1]), vectors])
