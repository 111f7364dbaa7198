"""The training loop: one function, read from top to bottom.

Every step draws one memory budget and one chunk length (the same on all ranks), streams `train.accumulation` clips a
rank through the model with that memory, and updates the adapter on the answers.
"""

from __future__ import annotations

import math
import random
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from omnimem_train.budget_sampling import BudgetSampler, Draw
from omnimem_train.checkpoint import (
    check_base,
    check_same_run,
    checkpoints,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from omnimem_train.config import save_resolved, to_plain
from omnimem_train.data import DataConfig, load_manifest
from omnimem_train.engines import check_saved, is_deepspeed, make_accelerator, make_whole, prepare, shard
from omnimem_train.errors import UserError
from omnimem_train.models.importance import add_importance_head, load_importance_head, trained_parameters
from omnimem_train.models.interface import MediaInfo, StreamingModel
from omnimem_train.models.loading import load
from omnimem_train.models.lora import add_lora, disable_adapter, load_adapter, settings_of
from omnimem_train.rng import rng_state, set_rng_state, versions
from omnimem_train.run_config import MAY_CHANGE, RunConfig, TrainConfig
from omnimem_train.runlock import run_lock
from omnimem_train.runlog import Meter, RunLog
from omnimem_train.session import model_fingerprint
from omnimem_train.sharding import Rota
from omnimem_train.source import MakeSource, StreamSource, clip_source
from omnimem_train.step import StepResult, StreamingStep
from omnimem_train.streaming import Stream

BANDS = 3


def train(config: RunConfig, make_source: MakeSource | None = None) -> Path:
    """Fine-tune an adapter as `config` says. Returns the folder of the last checkpoint.

    Args:
        make_source: gives the streams to train on, from the loaded model; by default the clips of `data.manifest`.

    Raises:
        UserError: another run in the same folder, anything about the settings, the model or the data that can be known
            before training, broken media beyond the declared limit, or a loss or gradient that is not finite (the
            optimizer is not stepped then; under DeepSpeed that holds for the loss, the engine steps before the gradient
            is known).
    """
    accelerator = make_accelerator(config.train)
    with run_lock(config.train.output, accelerator.process_index):
        accelerator.wait_for_everyone()  # no rank looks for a checkpoint before the folder is this run's alone
        return run_steps(config, accelerator, make_source)


def run_steps(config: RunConfig, accelerator: Accelerator, make_source: MakeSource | None) -> Path:
    """What `train` does, in a folder that no other run can use."""
    t = config.train
    rank, world = accelerator.process_index, accelerator.num_processes
    samples = [] if make_source else read_samples(config.data)
    found = find_resume(t)

    torch.manual_seed(t.seed)  # the same adapter on every rank
    device = str(accelerator.device) if config.model.device == "auto" else config.model.device
    model = load(replace(config.model, device=device, adapter=None))
    base = model_fingerprint(model, adapters=False)
    if config.model.adapter is None:
        modules = len(add_lora(model, config.lora))
    else:
        modules = load_adapter(model, config.model.adapter, trainable=True)["modules"]
        load_importance_head(model, config.model.adapter)
    if config.loss.retention > 0:
        add_importance_head(model)
    model.module.train()
    if make_source:
        source = make_source(model)
    else:
        share = broadcast_object_list
        place = rank, world, share, config.gradient.offload
        source = clip_source(samples, config.data, config.encoder, model, t.output, t.seed, *place)
    sampler = BudgetSampler(config.budgets, config.memory.chunk_tokens)
    weights = [p for p in model.module.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.AdamW(weights, t.lr, (t.beta1, t.beta2), t.eps, t.weight_decay)
    shapes = {name: tuple(p.shape) for name, p in trained_parameters(model)}
    numbers = sum(p.numel() for p in model.module.parameters())
    rota = shard(accelerator, model, t)
    stepper: Any = StreamingStep(model, config.loss, partial(disable_adapter, model))
    stepper, optimizer = prepare(accelerator, stepper, optimizer, rota, weights)
    run = Run(config, accelerator, model, base, stepper, optimizer, source, sampler, shapes, rota)
    seed_rank(t.seed, rank)
    start = run.restore(found) if found else 0
    meter = Meter(accelerator.device)
    preflight(run)
    # a run that stopped before its first checkpoint begins anew over what it had logged
    resumed_at = start if found or t.resume == "auto" else None
    with (
        RunLog(t.output, rank, total_steps=t.steps, resumed_at=resumed_at) as log,
        closing(source.streams(source.position)) as clips,  # whatever happens, decoding ahead ends with the run
    ):
        introduce(run, log, modules, numbers)
        folder = found
        for step in range(start, t.steps):
            draw = sampler.draw(step)
            spec = config.memory.at(draw.budget, draw.chunk_tokens)
            waited_s = source.waited_s
            batch = [next(clips) for _ in range(t.accumulation)]
            meter.waited(source.waited_s - waited_s)
            targets = run.sum_over_ranks(sum(len(q.targets) for encoded in batch for q in encoded.questions))
            for group in optimizer.param_groups:
                group["lr"] = t.lr_at(step)
            for encoded in batch:
                with accelerator.accumulate(stepper):
                    result = stepper(encoded, spec, config.gradient)
                    # accelerate divides by the accumulation, the engine averages over ranks; undo both, then divide
                    # by the answer tokens of the whole step
                    if is_deepspeed(accelerator):
                        check_finite(step, result.loss, None, draw)  # the engine updates inside backward
                    accelerator.backward(result.loss * (world * t.accumulation / targets))
                    note_result(meter, result, config, draw)
                    if rota is not None:
                        meter.mean("empty_share", *rota.read())
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(weights, t.max_grad_norm)
                        check_finite(step, result.loss, norm, draw)
                        meter.mean("grad_norm", norm)
                    optimizer.step()
                    optimizer.zero_grad()
            done = step + 1
            if done % t.log_every == 0 or done == t.steps:
                row = {"budget": draw.budget or 0, "chunk_tokens": draw.chunk_tokens, "lr": t.lr_at(step)}
                log.log(done, meter.read(run.sum_over_ranks_exact) | row)
            del batch, encoded, result  # the next clips are encoded before anything else replaces these
            if done == t.steps or (t.save_every and done % t.save_every == 0):
                with meter.paused():
                    folder = run.save(done)
    accelerator.end_training()
    assert folder is not None
    return folder


@dataclass
class Run:
    """What a run consists of, and how it is saved and restored.

    Attributes:
        base: fingerprint of the base model.
        shapes: of the trained weights, before an engine had them.
        rota: who gathers which layer when, where the frozen weights are sharded.
    """

    config: RunConfig
    accelerator: Accelerator
    model: StreamingModel
    base: str
    stepper: Any
    optimizer: Any
    source: StreamSource
    sampler: BudgetSampler
    shapes: dict[str, tuple[int, ...]]
    rota: Rota | None = None

    def sum_over_ranks(self, n: int) -> int:
        """A whole number, summed."""
        return int(self.sum_over_ranks_exact(torch.tensor(n, device=self.accelerator.device)))

    def sum_over_ranks_exact(self, values: Tensor) -> Tensor:
        """A tensor, summed elementwise."""
        summed = self.accelerator.reduce(values.clone(), "sum")
        assert isinstance(summed, Tensor)
        return summed

    def settings(self) -> dict[str, Any]:
        """What a checkpoint is held against when a run is resumed."""
        return {"config": to_plain(self.config), "memory_fingerprint": self.config.memory.fingerprint()}

    def save(self, step: int) -> Path:
        """Write a checkpoint after `step` steps, and read the trained weights in it back."""
        engine = is_deepspeed(self.accelerator)
        about = {
            "budgets": self.sampler.state_dict(),
            "versions": versions(),
            "lora": to_plain(settings_of(self.model)),
            "base_fingerprint": self.base,
        }
        folder = save_checkpoint(
            self.config.train.output / "checkpoints",
            step,
            tensors={"adapter": dict(trained_parameters(self.model))},
            objects={} if engine else {"optimizer": self.optimizer.state_dict()},
            rank_objects={"rng": rng_state(), "position": self.source.position},
            meta=self.settings() | about,
            keep=self.config.train.keep,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            barrier=self.accelerator.wait_for_everyone,
            write=self._save_engine if engine else None,
        )
        if self.accelerator.is_main_process:
            check_saved(folder / "adapter.safetensors", dict(trained_parameters(self.model)), self.shapes)
        return folder

    def _save_engine(self, folder: Path) -> None:
        self.stepper.save_checkpoint(str(folder / "deepspeed"), tag="engine", exclude_frozen_parameters=True)

    def restore(self, path: Path) -> int:
        """Go on from the checkpoint at `path`; the step it stands at."""
        check_same_run(path, self.settings(), MAY_CHANGE)
        check_base(path, self.config.model.path, self.base)
        held = load_checkpoint(path, rank=self.accelerator.process_index, world_size=self.accelerator.num_processes)
        self.sampler.load_state_dict(held.meta["budgets"])
        with torch.no_grad():
            for name, parameter in trained_parameters(self.model):
                parameter.copy_(held.tensors["adapter"][name])
        if is_deepspeed(self.accelerator):
            self.stepper.load_checkpoint(str(path / "deepspeed"), tag="engine", load_module_strict=False)
            make_whole(self.stepper)
        else:
            self.optimizer.load_state_dict(held.objects["optimizer"])
        set_rng_state(held.rank_objects["rng"])
        self.source.position = held.rank_objects["position"]
        return held.step


# Set-up --------------------------------------------------------------------------------------------------------------


def read_samples(data: DataConfig) -> list[Any]:
    """The samples of the manifest.

    Raises:
        UserError: none is named.
    """
    if data.manifest is None:
        raise UserError("no training data", remedy="name a manifest: data.manifest=PATH")
    return load_manifest(data.manifest, data.media_root)


def find_resume(t: TrainConfig) -> Path | None:
    """The checkpoint to go on from, or None for a new run."""
    if t.resume == "never":
        return None
    if t.resume == "auto":
        return find_checkpoint(t.output / "checkpoints") if checkpoints(t.output / "checkpoints") else None
    return find_checkpoint(t.resume)


def seed_rank(seed: int, rank: int) -> None:
    """Different random numbers (dropout) on every rank."""
    random.seed(seed * 1009 + rank)
    np.random.seed((seed * 1009 + rank) % 2**32)
    torch.manual_seed(seed * 1009 + rank)


def preflight(run: Run) -> None:
    """Find out now what would fail in the first steps, or in a later one with a small budget.

    Raises:
        UserError: encoder options, gradient settings or layer budgets that do not fit the model, or a budget that may
            be drawn and is below the text it has to hold; a turn that holds a control token.
    """
    config, model = run.config, run.model
    if config.gradient.kind == "none":
        raise UserError("gradient.kind=none trains nothing", remedy="choose all, last or stop_layer")
    if config.loss.retention > 0 and "importance_head" not in config.memory.make_selector().needs:
        raise UserError(
            f"loss.retention={config.loss.retention} trains an importance that memory.selector does not read",
            remedy="set memory.selector=omnimem and memory.selector_options.importance=learned, or loss.retention=0",
        )
    if run.rota is not None and not config.gradient.checkpointing:
        raise UserError(
            "gradient.checkpointing=false with sharded weights",
            cause="some gradients would be complete, and reduced, while other layers still have to be gathered",
            remedy="set gradient.checkpointing=true, or do without train.sharding and ZeRO-3",
        )
    Stream(model, config.memory, config.gradient, total_tokens=1)
    budgets = Stream(model, config.memory.at(config.budgets.smallest)).chooser.budgets
    info = MediaInfo(Path(), 1.0, has_video=True, has_audio=True)
    for prefix in run.source.prefixes():
        opening = model.open(info, config.data.fps, prefix=prefix, **config.encoder).start()
        for budget in budgets:
            if budget is not None:
                config.memory.media_budget(budget, opening.n)
    run.source.check()


def introduce(run: Run, log: RunLog, modules: int, numbers: int) -> None:
    """Save the resolved configuration, and say what follows from it (the model has `numbers` in all); check that there
    is something to learn.

    Raises:
        UserError: the first sample has no supervised token.
    """
    config, world = run.config, run.accelerator.num_processes
    if log.active:
        save_resolved(config, config.train.output / "config.yaml")
    samples = len(run.source)
    step_clips = world * config.train.accumulation
    log.derived("adapted modules", modules, "adapter targets x decoder layers, counted in the model")
    log.derived("trained weights", sum(math.prod(shape) for shape in run.shapes.values()), f"of {numbers:,}")
    log.derived("clips a step", step_clips, f"{world} processes x {config.train.accumulation} accumulated")
    log.derived(
        "epochs",
        config.train.steps * step_clips / samples,
        f"{config.train.steps} steps x {step_clips} clips / {samples} samples",
    )
    for name, value, how in run.source.facts(config.memory.chunk_tokens):
        log.derived(name, value, how)
    question, rendered = run.source.example()
    learned = rendered.ids[rendered.labels != -100]
    if not len(learned):
        raise UserError("the first sample has no supervised token", remedy="check that its turns have answers")
    log.note(
        f"first sample: asked {question!r}, learns {run.model.tokenizer.decode(learned)!r} ({len(learned)} tokens)"
    )


# Inside the loop -----------------------------------------------------------------------------------------------------


def note_result(meter: Meter, result: StepResult, config: RunConfig, draw: Draw) -> None:
    """Add one stream's numbers to the meter."""
    loss = result.answer_loss / result.targets
    meter.mean("loss", loss, result.targets)
    meter.mean(f"loss_by_budget/{config.budgets.band_of(draw.budget, BANDS)}", loss, result.targets)
    if config.loss.distill > 0:
        meter.mean("distill_loss", result.distill_loss / result.targets, result.targets)
    if config.loss.retention > 0:  # every rank notes it, chosen or not
        lost = result.retention_loss
        meter.mean("retention_loss", 0.0 if lost is None else lost, float(lost is not None))
    meter.count("tokens", result.stream_tokens)
    for name, kept in result.kept.items():
        seen = result.seen[name]  # every rank notes every name, seen or not: the meter sums over ranks by place
        meter.mean(f"kept_share/{name}", kept / max(seen, 1), float(seen > 0))


def check_finite(step: int, loss: Tensor, norm: Tensor | float | None, draw: Draw) -> None:
    """Stop before the optimizer takes a step that would ruin the adapter.

    Raises:
        UserError: the loss or the norm of the gradient is not finite.
    """
    norm = torch.as_tensor(0.0 if norm is None else norm)
    if not bool(torch.isfinite(loss.detach()).all() & torch.isfinite(norm).all()):
        raise UserError(
            f"step {step}: loss {float(loss):g}, gradient norm {float(norm):g} (budget {draw.budget})",
            cause="the update would spoil the adapter; it was not made",
            remedy="resume from the last checkpoint with a lower train.lr, or look at the samples of this step",
        )
