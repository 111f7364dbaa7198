"""What a training recipe takes on a GPU, before anything runs; `omnimem plan` prints it.

The model is read from its config.json, the counts are those of `omnimem_train.costs`, the seconds those of
`omnimem_train.gpus`. Memory is planned for the largest step that the recipe's random budgets can bring, time is the
mean over the budgets that its first steps draw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from omnimem_train.budget_sampling import BudgetSampler, Draw
from omnimem_train.costs import StreamStep
from omnimem_train.errors import UserError
from omnimem_train.footprint import Footprint
from omnimem_train.gpus import Gpu, phase_seconds, usable_gib
from omnimem_train.models.checks import paired_window_s
from omnimem_train.models.shape import ClipTokens, ModelShape, read_shape
from omnimem_train.operations import step_work
from omnimem_train.run_config import RunConfig
from omnimem_train.scoring_costs import Work

DEFAULT_S = 300.0
LONGEST_S = 86400.0
DRAWS = 40  # steps whose budgets the mean time is over
TOWER_LAUNCHES = 1500  # kernels of both towers for a window: 64 layers, about 24 each
ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Request:
    """What is planned.

    Attributes:
        config: the recipe.
        shape: of its model.
        gpu: that it is to run on.
        seconds: of a clip.
        width, height: pixels of its picture.
    """

    config: RunConfig
    shape: ModelShape
    gpu: Gpu
    seconds: float
    width: int = 1280
    height: int = 720

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the model."""
        dtype = self.config.model.dtype
        return ITEMSIZE[self.shape.dtype if dtype == "auto" else dtype]

    @property
    def watched_s(self) -> float:
        """Seconds of a clip that are watched."""
        return min(self.seconds, self.config.data.max_duration_s or math.inf)

    @property
    def clip(self) -> ClipTokens:
        """Tokens of a clip."""
        c = self.config
        size = self.width, self.height
        return self.shape.clip(self.watched_s, *size, c.data.fps, sound=c.data.use_audio, **c.encoder)

    def step(self, draw: Draw) -> StreamStep:
        """The step that `draw` makes of a clip."""
        c, clip = self.config, self.clip
        window_s = paired_window_s(c.data.fps)
        return StreamStep(
            shape=self.shape.decoder,
            itemsize=self.itemsize,
            spec=c.memory.at(draw.budget, draw.chunk_tokens),
            tokens=clip.total,
            text=clip.text,
            opening=min(clip.text, 16),
            gradient=c.gradient,
            lora=c.lora,
            window=math.ceil(clip.total * window_s / self.watched_s),
            split=c.model.attention == "split",
            packed=c.model.quantization != "none",
            recorded=c.model.graphs,
            teacher=c.loss.distill > 0 or (c.loss.retention > 0 and draw.budget is not None),
        )

    def corners(self) -> list[Draw]:
        """The draws of which one needs most memory: the largest budget, or none, with shortest and longest chunk."""
        b, chunk = self.config.budgets, self.config.memory.chunk_tokens
        jitter = b.chunk_jitter
        sizes = {max(1, round(chunk * (1 - jitter))), max(1, round(chunk * (1 + jitter)))}
        largest = max(b.choices) if b.choices else b.high
        budgets = ([None] if b.full_share > 0 else []) + ([largest] if b.full_share < 1 else [])
        return [Draw(budget, size) for budget in budgets for size in sorted(sizes)]

    def peak(self) -> tuple[Draw, Footprint]:
        """The draw that needs most memory, and how much."""
        clips = self.config.train.accumulation
        found = [(draw, self.step(draw).footprint(self.shape.parameters, clips)) for draw in self.corners()]
        return max(found, key=lambda pair: pair[1].total)

    def host_bytes(self) -> float:
        """Bytes of host memory that a process needs at most for what is not on the GPU; 0 unless that is asked for."""
        clips = self.config.train.accumulation
        return max(self.step(draw).host_bytes(clips) for draw in self.corners())

    def fits(self) -> bool:
        """Whether the largest step fits into the GPU."""
        return self.peak()[1].total <= usable_gib(self.gpu) * 2**30

    def encoding(self) -> Work:
        """The towers on one clip."""
        clip, shape = self.clip, self.shape
        positions = (
            50 * self.watched_s if self.config.data.use_audio else 0
        )  # the encoders halve 100 mel frames a second
        windows = math.ceil(self.watched_s / paired_window_s(self.config.data.fps))
        matrix = 2.0 * (shape.vision * clip.patches + shape.audio * positions)
        return Work(matrix=matrix, launches=TOWER_LAUNCHES * windows)

    def phases(self) -> dict[str, float] | None:
        """Seconds of a step by phase, mean over the draws of the first steps; None for a GPU of unknown rates."""
        c = self.config
        sampler = BudgetSampler(c.budgets, c.memory.chunk_tokens)
        draws = [sampler.draw(step) for step in range(min(DRAWS, c.train.steps))]
        total: dict[str, float] = {}
        for draw in draws:
            phases = {"encoders": self.encoding()} | step_work(self.step(draw))
            taken = phase_seconds(phases, self.gpu, self.itemsize, self.config.model.graphs)
            if taken is None:
                return None
            for name, taken_s in taken.items():
                total[name] = total.get(name, 0.0) + taken_s * c.train.accumulation / len(draws)
        return total


def request(config: RunConfig, gpu: Gpu, seconds: float | None, size: tuple[int, int] = (1280, 720)) -> Request:
    """A request, checked.

    Raises:
        UserError: a length of clips that cannot be planned; settings that training would refuse too.
    """
    length = seconds if seconds is not None else config.data.max_duration_s or DEFAULT_S
    if not 0 < length <= LONGEST_S:
        raise UserError(
            f"clips of {length:g} seconds cannot be planned", remedy=f"give --seconds above 0, {LONGEST_S:g} at most"
        )
    shape, gradient = read_shape(config.model.path), config.gradient
    if gradient.kind == "none":
        raise UserError("gradient.kind=none trains nothing", remedy="choose all, last or stop_layer")
    if gradient.kind == "stop_layer" and gradient.layer >= shape.decoder.layers:
        raise UserError(f"gradient stop layer {gradient.layer} of a model with {shape.decoder.layers} layers")
    shape.decoder.adapter_weights(config.lora.r, config.lora.targets)
    asked = Request(config, shape, gpu, length, *size)
    asked.peak()
    return asked


def picture_size(text: str) -> tuple[int, int]:
    """ "1280x720" as (width, height).

    Raises:
        UserError: not of that form.
    """
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdigit() and 0 < int(side) <= 16384 for side in sides):
        raise UserError(f"a picture of {text!r}", remedy="give WIDTHxHEIGHT in pixels, e.g. --picture 1280x720")
    return int(sides[0]), int(sides[1])
