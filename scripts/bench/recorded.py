"""Steps whose chunks are recorded and replayed (`model.graphs`), against the same steps launch by launch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import Bench, clear, encoded, with_lora
from torch import Tensor

from omnimem_train.losses import LossConfig
from omnimem_train.step import StreamingStep
from omnimem_train.streaming import Gradient


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


RECORDED_CASES: dict[str, Callable[[Bench], None]] = {"graphs": graphs, "new_budgets": new_budgets}
