"""What both stages of pre-training share: float32 master weights of a bfloat16 module, a learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class MasterWeights:
    """AdamW on float32 copies of a module's weights; after each step the module gets them back, rounded.

    Args:
        module: in bfloat16 (or any precision); its trainable weights are optimised.
        weight_decay: of matrices.
    """

    def __init__(self, module: nn.Module, weight_decay: float = 0.01) -> None:
        self.weights = [p for p in module.parameters() if p.requires_grad]
        self.master = [p.detach().float().clone() for p in self.weights]
        for copy in self.master:
            copy.grad = torch.zeros_like(copy)
        matrices = [m for m in self.master if m.ndim > 1]
        others = [m for m in self.master if m.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=self.master[0].is_cuda)

    @torch.no_grad()
    def step(self, lr: float, max_norm: float = 1.0) -> Tensor:
        """Take the gradients of the module, update, hand the weights back; returns the norm of the gradient."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.weights]
        torch._foreach_copy_([m.grad for m in self.master], grads)
        norm = nn.utils.clip_grad_norm_(self.master, max_norm, foreach=True)
        self.optimizer.step()
        torch._foreach_copy_(self.weights, self.master)
        for p in self.weights:
            p.grad = None
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Master weights and the optimizer's state."""
        return {"master": self.master, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; the module gets the weights too."""
        for own, held in zip(self.master, state["master"], strict=True):
            own.copy_(held)
        self.optimizer.load_state_dict(state["optimizer"])
        torch._foreach_copy_(self.weights, self.master)


def lr_at(peak: float, step: int, done: float, warmup: int = 200, decay_from: float = 0.75) -> float:
    """Warm-up over steps, then `peak`, then a cosine down to 2 % of it; `done` is the share of the time used."""
    if step < warmup:
        return peak * (step + 1) / warmup
    late = min(1.0, max(0.0, (done - decay_from) / (1 - decay_from)))
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * late)))
