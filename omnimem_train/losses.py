"""Losses on the answers of a stream: cross-entropy, and distillation from the same model with a full cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from omnimem_train.errors import UserError


@dataclass(frozen=True)
class LossConfig:
    """What a step minimises.

    Attributes:
        answer: weight of the cross-entropy of the answer tokens.
        distill: weight of the divergence from the teacher: the same model, adapters off, with an unlimited memory
            (our design; the released OmniMem code carries a hook for distillation that it never uses).
        retention: weight of the loss that teaches a learned importance (`omnimem_train.retention`), a mean over all
            choices that counts once for each answer token. It trains a head of its own, so its size matters little.
        temperature: both distributions are softened by it; the divergence is multiplied by its square (Hinton et al.,
            arXiv 1503.02531).
    """

    answer: float = 1.0
    distill: float = 0.0
    retention: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("answer", "distill", "retention"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"loss.{name}={getattr(self, name)} is negative or not finite")
        if self.answer == 0 and self.distill == 0:
            raise UserError("loss.answer and loss.distill are both 0", cause="nothing would be learned")
        if self.temperature <= 0:
            raise UserError(f"loss.temperature={self.temperature} must be above 0")


def supervised(labels: Tensor) -> Tensor:
    """(n,) int64 positions whose *next* token is supervised: `labels` (n,) is not shifted, -100 means not learned."""
    return (labels[1:] != -100).nonzero()[:, 0]


def answer_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropies of (n, vocabulary) logits against (n,) targets, in float32 or better."""
    real = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(real), targets, reduction="sum")


def distillation_loss(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Sum over tokens of KL(teacher || student) at `temperature`, times its square. Both (n, vocabulary)."""
    real = torch.promote_types(logits.dtype, torch.float32)
    student = F.log_softmax(logits.to(real) / temperature, -1)
    target = F.log_softmax(teacher.detach().to(real) / temperature, -1)
    return F.kl_div(student, target, reduction="sum", log_target=True) * temperature**2
