"""Steps whose chunks are recorded and replayed (`model.graphs`), against the same steps launch by launch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from cases import Bench, clear, encoded, with_lora
from torch import Tensor

from omnimem_train.budget_sampling import BudgetSampler
from omnimem_train.config import load_config
from omnimem_train.gradient import Gradient
from omnimem_train.losses import LossConfig
from omnimem_train.run_config import RunConfig
from omnimem_train.step import StreamingStep

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "qwen2_5_omni_7b.yaml"


def graphs(bench: Bench) -> None:
    """A step on a third of the stream with chunks recorded and replayed, against the same launch by launch: relative
    difference of loss and gradients (beside that of two plain runs: gradients of attention are added up in any
    order), seconds of both, and memory that is set aside."""
    parameters = with_lora(bench)
    for p in parameters:
        torch.nn.init.normal_(p, std=0.01, generator=torch.Generator(p.device).manual_seed(0))
    shape, spec = bench.shape, bench.spec("perturbation")
    stream, found, before = encoded(bench, shape.tokens // shape.chunk // 3 * shape.chunk), {}, bench.model.graphs

    def run() -> list[Tensor]:
        result = StreamingStep(bench.model, LossConfig())(stream, spec, Gradient("all"))
        result.loss.backward()
        gradients = [p.grad for p in parameters if p.grad is not None]
        clear(parameters)
        return [result.loss.detach(), torch.cat([g.flatten() for g in gradients])]

    again = run()
    for recorded in (False, True):
        bench.model.graphs = recorded
        label = "step_third" + ".graphs" * recorded
        run()
        found[recorded] = run()
        bench.add(label, bench.clock.samples(run, 3))
        if bench.device.type == "cuda":
            bench.add_peak(label, torch.cuda.max_memory_reserved() / 2**30)
    bench.model.graphs = before
    for name, plain, other, noise in zip(("loss", "gradients"), found[False], found[True], again, strict=True):
        errors = [float((plain.double() - x.double()).norm() / plain.double().norm()) for x in (other, noise)]
        note = f"two runs launch by launch: {errors[1]:.2g}"
        bench.results.add(f"step_third.difference.{name}{bench.suffix}", errors[0], "relative", note=note)


def new_budgets(bench: Bench) -> None:
    """Steps on half of the stream, each with a budget and a chunk length it has not met: what training with random
    budgets costs, where nothing recorded or planned in one step is of use in the next."""
    parameters, shape = with_lora(bench), bench.shape
    step, before = StreamingStep(bench.model, LossConfig()), bench.model.graphs
    stream = encoded(bench, shape.tokens // 2 // shape.chunk * shape.chunk)
    unit = max(1, shape.budget // 64)
    budgets = iter(range(shape.budget - 24 * unit, shape.budget + 1, unit))

    def run() -> None:
        spec = bench.spec("perturbation").replace(budget=next(budgets))
        step(stream, spec, Gradient("all")).loss.backward()
        clear(parameters)

    for recorded in (False, True):
        bench.model.graphs = recorded
        run()
        bench.add("step_half.new_budgets" + ".graphs" * recorded, bench.clock.samples(run, 3))
    bench.model.graphs = before


def as_recipe(bench: Bench) -> None:
    """Steps as `recipes/qwen2_5_omni_7b.yaml` has them: budgets and chunk lengths drawn anew for each, dropout, compact
    positions, gradient through the newest 16 chunks."""
    parameters = with_lora(bench)
    recipe = load_config(RunConfig, RECIPE, ["data.manifest=none.json"])
    sampler, steps = BudgetSampler(recipe.budgets, bench.shape.chunk), itertools.count()
    step, before, stream = (
        StreamingStep(bench.model, LossConfig()),
        bench.model.graphs,
        encoded(bench, bench.shape.tokens),
    )
    unit = bench.shape.budget / recipe.memory.budget if recipe.memory.budget else 1.0

    def run() -> None:
        draw = sampler.draw(next(steps))
        budget = None if draw.budget is None else max(1, round(unit * draw.budget))
        spec = bench.spec("perturbation").at(budget, draw.chunk_tokens).replace(positions=recipe.memory.positions)
        step(stream, spec, recipe.gradient).loss.backward()
        clear(parameters)

    with dropping(bench, recipe.lora.dropout):
        for recorded in (False, True):
            bench.model.graphs, steps = recorded, itertools.count()
            found = bench.clock.samples(run, bench.reps + 1)
            bench.add(
                "step.as_recipe" + ".graphs" * recorded, found[1:], note=f"{len(found) - 1} draws, the same in both"
            )
            bench.add_peak("step.as_recipe" + ".graphs" * recorded, bench.clock.peak_gib(run, recorded))
    bench.model.graphs = before


@contextmanager
def dropping(bench: Bench, share: float) -> Iterator[None]:
    """Inside, adapters train with dropout of their input."""
    held = [m.lora_dropout for m in bench.model.module.modules() if hasattr(m, "lora_dropout")]
    kept = [dict(of.items()) for of in held]
    training = bench.model.module.training
    for of in held:
        of.update({name: torch.nn.Dropout(share) for name in of})
    bench.model.module.train()
    try:
        yield
    finally:
        for of, before in zip(held, kept, strict=True):
            of.update(before)
        bench.model.module.train(training)


RECORDED_CASES: dict[str, Callable[[Bench], None]] = {
    "graphs": graphs,
    "new_budgets": new_budgets,
    "as_recipe": as_recipe,
}
