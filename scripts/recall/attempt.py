"""The last attempt at the goal of fine-tuning: combinations tried on validation clips, the chosen one on the test.

What is tried is `finetune.COMBINATIONS`, one seed each. Chosen is, by `results_attempt.choose_combination`, what is
best at the two smallest budgets among those that keep their full-cache accuracy. That one is trained with all seeds
beside controls of as many steps and the same learning rate, which see full caches or one fixed budget. Answers that the
folder of results holds already are not given again.
"""

from __future__ import annotations

import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from scripts.recall.finetune import COMBINATIONS, MINUTE, Scale, arm_of, controls_of
from scripts.recall.jobs import Answers, Context, Tune, adapter_name, merge, weights_of
from scripts.recall.load import Data, load
from scripts.recall.methods import BUDGETS, Form, learned
from scripts.recall.phases import at
from scripts.recall.results_attempt import ON_TEST, ON_VALIDATION, choose_combination

SMALLEST = BUDGETS[-2:]
ASKED = BUDGETS[-3:]  # on the test clips


@dataclass(frozen=True)
class Attempt:
    """Its jobs.

    Attributes:
        best: the training-free method that reads a memory without learned importance.
        scale: of the training. seeds: of the chosen combination and the controls.
        bases: numbers of the base models. Combinations are tried on base 0 alone.
    """

    best: Form
    scale: Scale = MINUTE
    seeds: int = 3
    bases: tuple[int, ...] = (0,)

    def form(self, arm: str) -> Form:
        """The method in the loop of an arm, which also reads its memory."""
        own = arm_of(arm)
        return learned(self.best, own.lam, own.rho, own.audio) if own.learned else self.best

    def tune(self, arm: str, seed: int, clip_set: str, asked: tuple[int, ...], study: str, base: int = 0) -> Tune:
        """A training and its answers."""
        scale = replace(self.scale, clip_set=clip_set, asked=asked)
        return Tune(base, arm, seed, self.form(arm), (self.form(arm),), scale, study)

    def tried(self) -> list[Any]:
        """The untouched base and every combination, on validation clips; long trainings first."""
        if 0 not in self.bases:
            return []
        arms = sorted(COMBINATIONS, key=lambda arm: -COMBINATIONS[arm].times)
        jobs: list[Any] = [self.tune(arm, 0, "val", SMALLEST, ON_VALIDATION) for arm in arms]
        return [self._untouched(ON_VALIDATION, 0, "val", SMALLEST), *jobs]

    def tested(self, chosen: str, trained: bool) -> list[Any]:
        """The chosen combination and its controls, on the test clips; base models beside 0 also untouched. Where the
        adapter of base 0 and seed 0 is still there (`trained`), it is not trained again."""
        names = [chosen, *controls_of(chosen)]
        jobs: list[Any] = [self._untouched(ON_TEST, base, "test", ASKED) for base in self.bases if base]
        for name, seed, base in product(names, range(self.seeds), self.bases):
            if trained and (name, seed, base) == (chosen, 0, 0):
                forms = at([self.form(chosen)], ASKED)
                options: dict[str, Any] = {"dtype": self.scale.dtype, "trained": self.scale}
                jobs.append(Answers(ON_TEST, 0, "test", forms, full=True, arm=chosen, seed=0, **options))
            else:
                jobs.append(self.tune(name, seed, "test", ASKED, ON_TEST, base))
        return jobs

    def _untouched(self, study: str, base: int, clip_set: str, asked: tuple[int, ...]) -> Answers:
        return Answers(study, base, clip_set, at([self.best], asked), full=True, dtype=self.scale.dtype)


def lacking(jobs: Sequence[Any], data: Data, weights: Mapping[int, str]) -> list[Any]:
    """The jobs whose answers `data` does not hold: of the same base weights (their digests by number), trained in the
    same way, read with the same memories, about the same clips."""
    held = {(r.study, r.base, r.arm, r.seed): r for r in data.runs}

    def done(job: Any) -> bool:
        run, tune = held.get((job.study, job.base, job.arm, job.seed)), isinstance(job, Tune)
        scale = job.scale if tune else job.trained
        training = {} if scale is None else arm_of(job.arm).told(scale)
        clip_set = job.scale.clip_set if tune else job.clip_set
        about = (weights[job.base], clip_set, training)
        if run is None or (run.weights, run.clip_set, run.training) != about:
            return False
        forms = at(job.read, job.scale.asked) if tune else job.forms
        memories = [c.memory for c in run.conditions]
        return all(
            form.spec(budget, job.scale.chunk if tune else job.chunk).to_dict() in memories for form, budget in forms
        )

    return [job for job in jobs if not done(job)]


def run_attempt(context: Context, jobs: Any, attempt: Attempt, pack: Path | None) -> list[str]:
    """Try, choose, test; what failed. `jobs` is the study's queue, which ends when this does.

    A job that failed is begun a second time once the others are done: memory of the card may have been short.
    """
    begun, lost = time.perf_counter(), list[str]()
    if pack is not None:
        jobs.kept = lambda: pack_up(context, pack)  # what ends this from outside loses no job that is done
    try:
        for jobs_of in (attempt.tried, lambda: tests_of_chosen(context, attempt)):
            weights = {number: weights_of(base) for number, base in context.bases.items()}
            part = lacking(jobs_of(), load(context.results), weights)
            jobs.run(part)
            if jobs.failed and time.perf_counter() < jobs.until:
                print(f"again: {len(jobs.failed)} jobs", flush=True)
                jobs.failed.clear()
                jobs.run(part)
            lost += jobs.failed
            jobs.failed.clear()
            merge(context.work, context.results)
            print(f"{time.perf_counter() - begun:.0f} s: a part is done", flush=True)
            if pack is not None:
                pack_up(context, pack)
    finally:
        jobs.close()
        merge(context.work, context.results)
        if pack is not None:
            pack_up(context, pack)
    return lost


def tests_of_chosen(context: Context, attempt: Attempt) -> list[Any]:
    """The jobs that follow from what was found on validation clips; none when nothing was."""
    choice = choose_combination(load(context.results))
    if choice is None:
        return []
    print(f"chosen: {choice.told()}", flush=True)
    return attempt.tested(choice.arm, (context.work / "adapters" / adapter_name(0, choice.arm, 0)).exists())


def pack_up(context: Context, path: Path) -> None:
    """Everything new in one file: `results/` for the folder of results, `work/` for a call that goes on.

    Of the adapters only that of the chosen combination.
    """
    choice = choose_combination(load(context.results))
    own = [context.work / name for name in ("done.json", "identity.json", "parts")]
    if choice is not None:
        own.append(context.work / "adapters" / adapter_name(0, choice.arm, 0))
    aside = path.with_suffix(".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(aside, "w:gz") as tar:
        for study in (ON_VALIDATION, ON_TEST):
            for file in sorted((context.results / "answers").glob(f"{study}__*")):
                tar.add(file, f"results/answers/{file.name}")
        for item in filter(Path.exists, own):
            tar.add(item, f"work/{item.relative_to(context.work)}")
    aside.rename(path)
    print(f"packed {path}: {path.stat().st_size / 2**20:.1f} MiB", flush=True)
