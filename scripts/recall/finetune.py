"""Budget-aware fine-tuning on the recall world, and its controls: the package's trainer on streams side by side.

The arms differ in what stands in the loop and in nothing else: steps, clips, questions, learning rate and adapter are
the same.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_prep.questions import NARRATE, QuestionMaker, narration
from data_prep.streams import PackedTurn, WorldStreams, pack
from data_prep.world import ClipSpec
from omnimem_train.budget_sampling import BudgetSampling
from omnimem_train.gradient import Gradient
from omnimem_train.losses import LossConfig
from omnimem_train.models.interface import RenderedTurn, StreamingModel, Turn
from omnimem_train.models.loading import ModelConfig
from omnimem_train.models.lora import LoraSettings
from omnimem_train.models.qwen2_5_omni import Qwen2_5OmniStreaming
from omnimem_train.run_config import RunConfig, TrainConfig
from omnimem_train.step import EncodedStream
from scripts.recall.asking import FORM
from scripts.recall.methods import BUDGETS, CHUNK, Form
from scripts.recall.turns import rendered


@dataclass(frozen=True)
class Scale:
    """How large a fine-tuning run is.

    Attributes:
        pool, clip_set: clip sets to train on and to measure on. asked: budgets to measure at, beside the full cache.
        low, high: of the random budgets. fixed: of the arm with one budget. chunk: tokens.
        steps: of the optimizer, each of `size` clips with `asks` questions.
        dtype: of the model.
    """

    pool: str = "pool"
    clip_set: str = "test"
    asked: tuple[int, ...] = BUDGETS[2:]
    low: int = 32
    high: int = 640
    fixed: int = BUDGETS[-2]
    chunk: int = CHUNK
    steps: int = 100
    size: int = 8
    asks: int = 24
    dtype: str = "bfloat16"

    def budgets(self, kind: str, seed: int) -> BudgetSampling:
        """ "random" budgets, the "fixed" one, or "full": none is compressed."""
        if kind == "random":
            return BudgetSampling("log_uniform", self.low, self.high, full_share=0.15, chunk_jitter=0.25, seed=seed)
        share = float(kind == "full")
        return BudgetSampling("fixed", choices=(self.fixed,), full_share=share, chunk_jitter=0.25, seed=seed)


MINUTE = Scale()  # clips of 60 s: for a GPU
SHORT = Scale("short_pool", "short", (49, 24), 12, 256, 24, 128, steps=40, size=4, asks=12, dtype="float32")  # CPU
ALL = Gradient("all", checkpointing=False)


@dataclass(frozen=True)
class Arm:
    """What one fine-tuning differs in.

    Attributes:
        rival: the rule in the loop, in its tuned original form; None for a method of ours.
        learned: ours with a learned importance, which is trained along; without it the study's best training-free one.
        budgets: how they are drawn (`Scale.budgets`).
        gradient, loss: of the loop.
        narrate: also ask for everything in order.
        drawn: low, high and share of full-cache steps of random budgets; None: those of the scale.
        one_budget: of "fixed" budgets; None: that of the scale.
        times: the scale's steps. lr: learning rate.
        rho, lam, audio: redundancy factor, lambda and share of sound of a learned importance; None: the study's share.
    """

    rival: str | None = None
    learned: bool = False
    budgets: str = "random"
    gradient: Gradient = ALL
    loss: LossConfig = field(default_factory=LossConfig)
    narrate: bool = False
    drawn: tuple[int, int, float] | None = None
    one_budget: int | None = None
    times: int = 1
    lr: float = 5e-4
    rho: bool = False
    lam: float = 0.3
    audio: float | None = None

    @property
    def retention(self) -> float:
        """Weight of the loss that teaches a learned importance."""
        return (self.loss.retention or 1.0) * self.learned

    def sampling(self, scale: Scale, seed: int) -> BudgetSampling:
        """How its budgets are drawn."""
        found = scale.budgets(self.budgets, seed)
        if self.drawn is not None and self.budgets == "random":
            low, high, full_share = self.drawn
            found = replace(found, low=low, high=high, full_share=full_share)
        if self.one_budget is not None and self.budgets == "fixed":
            found = replace(found, choices=(self.one_budget,))
        return found

    def told(self, scale: Scale) -> dict[str, Any]:
        """What a results page says of the training."""
        budgets = self.sampling(scale, 0)
        return {
            "steps": scale.steps * self.times,
            "lr": self.lr,
            "answer": self.loss.answer,
            "distill": self.loss.distill,
            "learned": self.learned,
            "retention": self.retention,
            "budgets": list(budgets.choices) or [budgets.low, budgets.high],
            "full_share": budgets.full_share,
        }


ARMS: dict[str, Arm] = {
    "budget_lora": Arm(learned=True),
    "budget_lora_plain": Arm(),
    "full_lora": Arm(budgets="full"),
    "critical_kv_lora": Arm(rival="critical_kv"),
    "window_lora": Arm(rival="sliding_window"),
    "fixed_lora": Arm(budgets="fixed"),
    "budget_lora_one_budget": Arm(learned=True, budgets="fixed"),
    "budget_lora_last1": Arm(learned=True, gradient=replace(ALL, kind="last", chunks=1)),
    "budget_lora_last4": Arm(learned=True, gradient=replace(ALL, kind="last", chunks=4)),
    "budget_lora_stop3": Arm(learned=True, gradient=replace(ALL, kind="stop_layer", layer=3)),
    "budget_lora_distill": Arm(learned=True, loss=LossConfig(answer=1.0, distill=0.5)),
    "budget_lora_narrate": Arm(learned=True, narrate=True),
}


CONTROLS = ("full_lora", "critical_kv_lora", "window_lora", "fixed_lora")
MAIN_ARMS = ("budget_lora", "budget_lora_plain", *CONTROLS)
ABLATED = tuple(arm for arm in ARMS if arm not in MAIN_ARMS)


# The last attempt at the goal: what single ablations pointed at, combined ---------------------------------------------

LOW, LOWER = (32, 160), (24, 96)  # tokens


def combined(
    distill: float = 0.5, drawn: tuple[int, int] = LOWER, full_share: float = 0.3, times: int = 2, lr: float = 1e-3,
    learned: bool = True, answer: float = 1.0, **options: Any,
) -> Arm:  # fmt: skip
    """A combination."""
    loss = LossConfig(answer=answer, distill=distill)
    return Arm(None, learned, "random", ALL, loss, drawn=(*drawn, full_share), times=times, lr=lr, **options)


COMBINATIONS: dict[str, Arm] = {
    "c01_center": combined(),
    "c02_without_distill": combined(distill=0.0),
    "c03_distill1": combined(distill=1.0),
    "c04_distill_alone": combined(distill=1.0, answer=0.0),
    "c05_low": combined(drawn=LOW),
    "c06_full_share_015": combined(full_share=0.15),
    "c07_lr5": combined(lr=5e-4),
    "c08_lr20": combined(lr=2e-3),
    "c09_100_steps": combined(times=1),
    "c10_rho": combined(rho=True),
    "c11_without_learned": combined(learned=False),
    "c12_lam1": combined(lam=1.0),
    "c13_audio03": combined(audio=0.3),
    "c14_audio04_distill1_lr5": combined(distill=1.0, lr=5e-4, audio=0.4),
    # around the best of these, and with more full-cache steps, since none kept its full-cache accuracy
    "c15_lam2": combined(lam=2.0),
    "c16_lam1_full_share_05": combined(lam=1.0, full_share=0.5),
    "c17_lam2_full_share_05": combined(lam=2.0, full_share=0.5),
    "c18_lam1_distill1_full_share_05": combined(lam=1.0, distill=1.0, full_share=0.5),
    "c19_lam1_lr5_full_share_05": combined(lam=1.0, lr=5e-4, full_share=0.5),
    "c20_lam4_full_share_05": combined(lam=4.0, full_share=0.5),
    "c21_lam1_full_share_07": combined(lam=1.0, full_share=0.7),
    "c22_lam2_low_full_share_05": combined(lam=2.0, drawn=LOW, full_share=0.5),
}
CONTROL_LRS = (5e-4, 1e-3, 2e-3)


def equal_name(control: str, times: int, lr: float) -> str:
    """Name of a control with as many steps and the learning rate of a combination."""
    return f"{control}_x{times}_lr{round(1e4 * lr)}"


EQUAL = {"fixed_74": Arm(budgets="fixed", one_budget=BUDGETS[-2]),
         "fixed_49": Arm(budgets="fixed", one_budget=BUDGETS[-1]),
         "full": Arm(budgets="full")}  # fmt: skip
EQUAL_ARMS = {
    equal_name(name, times, lr): replace(arm, times=times, lr=lr)
    for name, arm in EQUAL.items()
    for times in (1, 2)
    for lr in CONTROL_LRS
}


USUAL_LR = 5e-4  # of all other fine-tuning


def controls_of(name: str) -> list[str]:
    """Controls beside a combination: as many steps, its learning rate, and one budget at the usual rate as well."""
    arm = arm_of(name)
    found = [equal_name(control, arm.times, arm.lr) for control in EQUAL]
    if arm.lr != USUAL_LR:
        found += [equal_name(control, arm.times, USUAL_LR) for control in EQUAL if control != "full"]
    return found


def arm_of(name: str) -> Arm:
    """An arm by its name."""
    return {**ARMS, **COMBINATIONS, **EQUAL_ARMS}[name]


def configure(arm: str, base: Path, out: Path, loop: Form, scale: Scale, seed: int) -> RunConfig:
    """The run of an arm with the method `loop` in it."""
    a = arm_of(arm)
    return RunConfig(
        model=ModelConfig(path=str(base), dtype=scale.dtype),
        lora=LoraSettings(r=32, alpha=64.0),
        memory=loop.spec(scale.fixed, scale.chunk),
        budgets=a.sampling(scale, seed),
        gradient=a.gradient,
        loss=replace(a.loss, retention=a.retention),
        train=TrainConfig(
            output=out,
            steps=scale.steps * a.times,
            lr=a.lr,
            warmup_steps=10,
            seed=seed,
            log_every=20,
            keep=1,
            resume="auto",
        ),
    )


class WorldTurns(Dataset[bytes]):
    """Batch number i: numbers of some clips of a pool and questions about them, pickled; a function of (seed, i)."""

    def __init__(
        self, model: StreamingModel, specs: Sequence[ClipSpec], seed: int, size: int, asks: int, narrate: bool
    ) -> None:
        self.model, self.specs, self.seed = model, specs, seed
        self.size, self.asks, self.narrate = size, asks, narrate

    def __getitem__(self, number: int) -> bytes:
        rng = np.random.default_rng((self.seed, number))
        clips = rng.choice(len(self.specs), size=self.size, replace=False)
        maker = QuestionMaker(int(rng.integers(2**31)), 0)
        asked = [maker.ask(self.specs[c], self.asks) for c in clips]
        turns: list[PackedTurn] = []
        for slot in range(max(len(q) for q in asked)):
            row = [rendered(self.model, q[slot], FORM) if slot < len(q) else None for q in asked]
            turns.append(pack(row))
        if self.narrate:
            told: list[RenderedTurn] = [self.model.render(Turn(NARRATE, narration(self.specs[c]))) for c in clips]
            turns.append(pack(told, "narration"))
        return pickle.dumps((torch.from_numpy(clips), turns))


class WorldSource:
    """Batches of clips of a pool as a source for the trainer (`omnimem_train.source.StreamSource`).

    Args:
        model: renders; its towers made `media`.
        specs, media: the pool: what happens in its clips, and (N, T, E) their tokens.
        seed: of the order and the questions.
        size: clips side by side.
        asks: questions of each.
        narrate: add a narration.
        workers: processes that make the questions.
    """

    def __init__(
        self,
        model: StreamingModel,
        specs: Sequence[ClipSpec],
        media: Tensor,
        *,
        seed: int = 0,
        size: int = 8,
        asks: int = 24,
        narrate: bool = False,
        workers: int = 1,
    ) -> None:
        assert isinstance(model, Qwen2_5OmniStreaming)
        self.encoder = WorldStreams(model, specs[0].settings.size)
        self.turns = WorldTurns(model, specs, seed, size, asks, narrate)
        self.media, self.workers = media, workers
        self.position, self.waited_s = 0, 0.0

    def __len__(self) -> int:
        """Batches of an epoch."""
        return max(1, len(self.turns.specs) // self.turns.size)

    def streams(self, start: int) -> Generator[EncodedStream, None, None]:
        """Batches from number `start` on."""
        self.position = start
        seconds = self.turns.specs[0].settings.seconds
        loader = DataLoader(
            self.turns,
            batch_size=None,
            sampler=_from(start),
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
        )
        batches = iter(loader)
        while True:
            begun = time.perf_counter()
            clips, turns = pickle.loads(next(batches))
            self.waited_s += time.perf_counter() - begun
            self.position += 1
            yield self.encoder.stream(self.media[clips.to(self.media.device)], seconds, turns)

    def facts(self, chunk_tokens: int) -> list[tuple[str, object, str]]:
        """Nothing that is not said elsewhere."""
        return []

    def prefixes(self) -> Iterable[str]:
        """No text stands before the media."""
        return [""]

    def check(self) -> None:
        """Renders one batch: all questions are of the same few forms."""
        self.turns[0]

    def example(self) -> tuple[str, RenderedTurn]:
        """The first question of the first clip."""
        q = QuestionMaker(0, 0).ask(self.turns.specs[0], 1)[0]
        return q.text, rendered(self.turns.model, q, FORM)


class _from:
    """Numbers from `start` on, for a DataLoader."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        number = self.start
        while True:
            yield number
            number += 1


def source_for(arm: str, specs: Sequence[ClipSpec], media: Tensor, scale: Scale, seed: int) -> Any:
    """What `omnimem_train.trainer.train` takes as its source."""
    options: dict[str, Any] = {"size": scale.size, "asks": scale.asks, "narrate": arm_of(arm).narrate, "seed": seed}
    return lambda model: WorldSource(model, specs, media, **options)
