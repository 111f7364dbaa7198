"""A loss that teaches the selector: tokens that questions will look at should count as important when it chooses.

A loss on answers reaches the keys and values that were kept. It says nothing about a token that was dropped, and
choosing has no gradient. Here the model itself, without adapters and with its full cache, shows what the questions of a
stream attend to; at each chunk a small head that reads the candidates' layer inputs (`omnimem_train.memory.learned`) is
trained to foresee that. The design is ours; Locret (arXiv 2410.01805) trains heads on keys and values to a similar end.

Shape legend: see `omnimem_train.memory.state`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omnimem_train.memory.learned import learned_logits
from omnimem_train.memory.numeric import products, real
from omnimem_train.memory.state import AUDIO, VISUAL, LayerMemory


@dataclass(frozen=True)
class Attended:
    """What the questions of streams look at.

    Attributes:
        layers: for each layer (B, T) float32: the most attention that any query head and any token of any question pays
            to each of the T tokens of a stream, mean over kv heads. A token matters if one question needs it; a mean
            over many questions is nearly even.
    """

    layers: Sequence[Tensor]


class Watch:
    """Notes what questions look at while they are asked.

    Args:
        n_tokens: of each stream, T.
        n_layers: of the model.

    Attributes:
        known: tokens of the stream that stand where they will stay; later ones, which an encoder still held back when
            the questions came, are not noted.
    """

    def __init__(self, n_tokens: int, n_layers: int) -> None:
        self.n_tokens, self.known = n_tokens, n_tokens
        self._layers: list[Tensor | None] = [None] * n_layers

    def add(
        self, layer: int, queries: Tensor, keys: Tensor, memory: LayerMemory, asks: Tensor, mask: Tensor | None
    ) -> None:
        """Note one layer.

        Args:
            queries: (B, H, n, D) of the questions. keys: (B, G, S + n, D) of memory and questions.
            memory: its S tokens.
            asks: (B, n) bool, tokens of the questions that count. mask: (n, n) bool, who sees whom among them; None for
                one question.
        """
        b, g, total, d = keys.shape
        n = queries.shape[2]
        grouped = queries.reshape(b, g, -1, n, d)
        mask = torch.ones(n, n, dtype=torch.bool, device=keys.device).tril() if mask is None else mask
        sees = torch.nn.functional.pad(mask, (total - n, 0), value=True)
        found = torch.zeros(b, g, total - n, dtype=real(keys), device=keys.device)
        for head in range(grouped.shape[2]):  # a head at a time: (B, G, n, S) numbers
            logits = products(grouped[:, :, head], keys) * d**-0.5
            attention = logits.masked_fill(~sees, float("-inf")).softmax(-1)[..., : total - n]
            found = found.maximum((attention * asks[:, None, :, None]).amax(2))
        found = found.masked_fill((memory.index < 0) | (memory.index >= self.known), 0)
        whole = torch.zeros(b, g, self.n_tokens, dtype=found.dtype, device=found.device)
        whole = whole.scatter_add(2, memory.index.clamp(0, self.n_tokens - 1), found)
        before = self._layers[layer]
        self._layers[layer] = whole if before is None else before.maximum(whole)

    def attended(self) -> Attended:
        """What was noted, over all questions."""
        assert all(layer is not None for layer in self._layers), "no question was watched"
        return Attended([layer.mean(1).float() for layer in self._layers if layer is not None])


def retention_loss(tokens: LayerMemory, head: Tensor, attended: Tensor) -> Tensor:
    """Cross-entropy of the learned importance against attention, both normalised over the candidates of a modality.

    How many tokens of each modality stay is the allocation's affair, so each is normalised by itself. A modality that
    no question looks at teaches nothing. The gradient reaches the head alone.

    Args:
        tokens: the candidates of a layer, with their layer inputs.
        head: (2, E).
        attended: (B, T) of the layer.

    Returns:
        scalar, mean over modalities and streams.
    """
    assert tokens.hidden is not None
    modality, wanted = tokens.modality[:, 0], attended.gather(1, tokens.index[:, 0])
    logits = learned_logits(tokens.hidden.detach(), modality, head)
    losses, counted = [], []
    for kind in (VISUAL, AUDIO):
        members = modality == kind
        target = wanted.masked_fill(~members, 0)
        mass = target.sum(-1)
        told = logits.masked_fill(~members, -1e4).log_softmax(-1)
        losses.append(-(target * told).sum(-1) / mass.clamp(min=1e-9))
        counted.append(mass > 1e-9)
    counts = torch.stack(counted)
    return (torch.stack(losses) * counts).sum() / counts.sum().clamp(min=1)
