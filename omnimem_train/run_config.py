"""Settings of a training run, as a recipe writes them: one dataclass a component."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omnimem_train.budget_sampling import BudgetSampling
from omnimem_train.data import DataConfig
from omnimem_train.errors import UserError, nearest
from omnimem_train.gradient import Gradient
from omnimem_train.losses import LossConfig
from omnimem_train.memory.spec import MemorySpec
from omnimem_train.models.loading import ModelConfig
from omnimem_train.models.lora import LoraSettings

# Settings that may differ between a checkpoint and the run that resumes it: they change no number of the run.
MAY_CHANGE = (
    "config.train.resume",
    "config.train.output",
    "config.train.log_every",
    "config.train.save_every",
    "config.train.keep",
    "config.data.workers",
    "config.data.prefetch_windows",
    "config.data.time_limit_s",
    "config.data.max_broken",
    "config.data.encode_ahead",
    "config.data.cache",
    "config.data.cache_gib",
    "config.model.device",
    "config.gradient.offload",
)
SHARDING = ("none", "fsdp")


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation.

    Attributes:
        output: folder of the run.
        steps: optimizer steps.
        lr: peak learning rate of AdamW.
        warmup_steps: linear warm-up, then a cosine down to `lr * min_lr_share` at the last step.
        weight_decay, beta1, beta2, eps: of AdamW.
        max_grad_norm: gradients are clipped to this norm.
        accumulation: clips a rank runs for one step.
        log_every, save_every: steps between log lines and checkpoints (0: only at the end).
        keep: checkpoints kept.
        seed: of adapter weights and data order.
        deepspeed: a DeepSpeed JSON config; None for plain data parallelism (or what `accelerate launch` says).
        sharding: "none", or "fsdp": FSDP2 spreads the decoder layers' frozen weights over the processes. With several
            processes, for a model that does not fit otherwise: it saves memory and costs time.
        resume: "never", "auto" (the newest checkpoint of `output`, if there is one), or a checkpoint folder.
    """

    output: Path = Path("runs/train")
    steps: int = 100
    lr: float = 2e-5
    min_lr_share: float = 0.1
    warmup_steps: int = 10
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    accumulation: int = 1
    log_every: int = 10
    save_every: int = 0
    keep: int = 2
    seed: int = 0
    deepspeed: Path | None = None
    sharding: str = "none"
    resume: str = "never"

    def __post_init__(self) -> None:
        for name in ("steps", "accumulation", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name}={getattr(self, name)} must be 1 or more")
        for name in ("lr", "max_grad_norm", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"train.{name}={getattr(self, name)} must be above 0, and finite")
        for name in ("warmup_steps", "save_every", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"train.{name}={getattr(self, name)} is negative or not finite")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"train.{name}={getattr(self, name)} must be from 0 to below 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"train.seed={self.seed} must be from 0 to {2**32 - 1}")
        if self.sharding not in SHARDING:
            raise UserError(
                f"train.sharding={self.sharding}{nearest(self.sharding, SHARDING)}",
                remedy=f"choose one of: {', '.join(SHARDING)} (ZeRO-3 is a matter of train.deepspeed)",
            )
        if not 0 <= self.min_lr_share <= 1:
            raise UserError(f"train.min_lr_share={self.min_lr_share} is not a share between 0 and 1")

    def lr_at(self, step: int) -> float:
        """Learning rate of step `step` (from 0)."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - 1 - self.warmup_steps)
        return self.lr * (self.min_lr_share + (1 - self.min_lr_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


@dataclass(frozen=True)
class RunConfig:
    """Everything a training run is made of; a recipe is a YAML file of this shape.

    `encoder` holds options of the model's encoder side (system prompt, `max_pixels`, ...).
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    data: DataConfig = field(default_factory=DataConfig)
    encoder: dict[str, Any] = field(default_factory=dict)
    memory: MemorySpec = field(default_factory=MemorySpec)
    budgets: BudgetSampling = field(default_factory=BudgetSampling)
    gradient: Gradient = field(default_factory=Gradient)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
