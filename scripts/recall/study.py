"""Runs the study on one GPU: tunes every rule, measures, fine-tunes, and leaves answers a results page is made from.

    python -m scripts.recall.study WORK --bases MODEL0 MODEL1 --results scripts/recall/results --budget-s 540

Work is a queue of small jobs for several processes on one GPU (a small model is bound by launches, not by the GPU).
What is done is not done again: a second call goes on where the time ran out. Then `python -m scripts.recall.results`
writes RESULTS.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import queue
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.world import WorldSettings
from omnimem_train.errors import UserError
from omnimem_train.memory.spec import MemorySpec
from scripts.recall.finetune import ABLATED, ARMS, MAIN_ARMS, MINUTE, SHORT, Scale
from scripts.recall.jobs import Answers, Context, Pictures, Precision, SetSpec, Tune, merge
from scripts.recall.load import load
from scripts.recall.methods import (
    BUDGETS,
    FULL,
    OPTIONS,
    TUNED_AT,
    Form,
    best_of,
    choose,
    learned,
    original_forms,
    other_forms,
)
from scripts.recall.modality import Modalities

WORLDS = tuple(
    (loudness, copies, share) for share in (0.3, 0.5, 0.7) for copies in (0.0, 0.5, 1.5) for loudness in (0.0, 1.0, 2.0)
)
LONG_S, SHORT_S = 240, 24
MOST_FAILED = 12  # with more, something is wrong with all of them


def sets(scale: float = 1.0) -> dict[str, SetSpec]:
    """All clip sets; `scale` shrinks them for a trial."""

    def n(count: int) -> int:
        return max(4, round(count * scale))

    found = {
        "val": SetSpec("val", n(100), 12),
        "test": SetSpec("test", n(216), 24),
        "pool": SetSpec("train", n(1024), 0, seed=1000),
        "short_pool": SetSpec("train", n(160), 0, WorldSettings(seconds=float(SHORT_S)), seed=1000),
        "short": SetSpec("test", n(80), 16, WorldSettings(seconds=float(SHORT_S)), seed=3),
        "long": SetSpec("test", n(32), 24, WorldSettings(seconds=float(LONG_S)), seed=1),
    }
    for loudness, copies, share in WORLDS:
        world = WorldSettings(loudness=loudness, copies=copies, sound_share=share)
        found[world_name(loudness, copies, share)] = SetSpec("test", n(48), 24, world, seed=2)
    return found


def world_name(loudness: float, copies: float, share: float) -> str:
    """Name of a world's clip set."""
    return f"sweep-l{loudness:g}-c{copies:g}-s{share:g}"


# Phases --------------------------------------------------------------------------------------------------------------


def at(forms: Iterable[Form], budgets: Sequence[int]) -> tuple[tuple[Form, int], ...]:
    """Every form at every budget."""
    return tuple((form, budget) for form in forms for budget in budgets)


def tuning_jobs(bases: int, forms: Sequence[Form], first_part: int) -> list[Any]:
    """One job a base and form."""
    return [
        Answers("tuning", base, "val", at([form], TUNED_AT), part=first_part + i)
        for i, form in enumerate(forms)
        for base in range(bases)
    ]


def mean_scores(found: Iterable[dict[Any, float]]) -> dict[Form, float]:
    """Mean accuracy of each form over budgets and bases."""
    sums: dict[Form, list[float]] = {}
    for scores in found:
        for (form, _), score in scores.items():
            sums.setdefault(form, []).append(score)
    return {form: sum(s) / len(s) for form, s in sums.items()}


@dataclass(frozen=True)
class Chosen:
    """What tuning chose.

    Attributes:
        forms: the best of each kind. best: of our family; rival: of the rivals as published; augmented: of the rest.
        perturbation: the best form of that rule.
        strong: the three best of each of both kinds of rivals.
    """

    forms: dict[str, Form]
    best: Form
    rival: Form
    augmented: Form
    perturbation: Form
    strong: tuple[Form, ...] = ()

    def tune(self, base: int, arm: str, seed: int, scale: Scale = MINUTE) -> Tune:
        """The job of a fine-tuning arm. All are read with our best training-free method, but those with a learned
        importance with that; and one with CriticalKV in the loop also with CriticalKV."""
        rival = ARMS[arm].rival
        own = learned(self.best) if ARMS[arm].learned else self.best
        loop = own if rival is None else self.forms[rival]
        read = (own, loop) if rival == "critical_kv" else (own,)
        return Tune(base, arm, seed, loop, read, scale)

    @classmethod
    def of(cls, scores: dict[Form, float]) -> Chosen:
        """From the mean accuracy of every form on validation clips."""
        every = best_of(scores, "omnimem"), best_of(scores, "rival"), best_of(scores, "augmented")
        exact = {form: score for form, score in scores.items() if form.rule == "perturbation"}
        forms = choose(scores)
        ranked = sorted(forms.values(), key=lambda form: -scores[form])
        strong = [f for family in ("rival", "augmented") for f in [r for r in ranked if r.family == family][:3]]
        return cls(forms, *every, best_of(exact, "omnimem"), tuple(strong))

    @classmethod
    def from_results(cls, folder: Path) -> Chosen:
        """From the tuning that a results folder holds.

        Raises:
            UserError: it holds none.
        """
        tried = load(folder).conditions("tuning")
        if not tried:
            raise UserError(f"{folder} holds no tuning", remedy="run the study on a GPU first")
        return cls.of(mean_scores([{(Form.read(c.method, c.tuned), c.budget): float(c.right.mean())} for c in tried]))


def study_jobs(bases: int, chosen: Chosen, seeds: int) -> list[Any]:
    """Everything after tuning, most important first."""
    jobs: list[Any] = []
    tunes = [chosen.tune(b, arm, s) for s in range(seeds) for b in range(bases) for arm in MAIN_ARMS]
    mains: list[Any] = []
    for base in range(bases):
        mains.append(Answers("main", base, "test", full=True))
        for part, form in enumerate(chosen.forms.values(), 1):
            mains.append(Answers("main", base, "test", at([form], BUDGETS), part=part))
    jobs += interleave(tunes, mains)
    jobs += [Pictures(0, (chosen.best, chosen.rival, Form("sliding_window")), BUDGETS[2])]
    jobs += ablations(bases, chosen.perturbation)
    compared = at((chosen.best, *chosen.strong), TUNED_AT)
    jobs += [Answers("sweep", 0, world_name(*w), compared, True, model_name=world_name(*w)) for w in WORLDS]
    jobs += [Modalities(base, "test") for base in range(bases)]
    jobs += [long_job(base, chosen.best) for base in range(bases)]
    jobs += [Precision(base, at([chosen.best, chosen.rival], TUNED_AT)) for base in range(bases)]
    jobs += [chosen.tune(0, arm, 0) for arm in ABLATED]
    return jobs


def interleave(slow: Sequence[Any], fast: Sequence[Any]) -> list[Any]:
    """`slow` jobs spread evenly among the `fast` ones, beginning with a slow one."""
    rows = [(i / max(1, len(slow)), 0, job) for i, job in enumerate(slow)]
    rows += [(i / max(1, len(fast)), 1, job) for i, job in enumerate(fast)]
    return [job for _, _, job in sorted(rows, key=lambda r: r[:2])]


def ablations(bases: int, best: Form) -> list[Any]:
    """Variants of the best form of perturbation, and of the paper's rule, each a method of its own name."""
    base = best.spec(TUNED_AT[0])

    def variant(**changes: Any) -> MemorySpec:
        options = base.selector_options | changes.pop("options", {})
        return base.replace(selector_options=options, **changes)

    shared = {"allocation": "shared", "allocation_options": {}}
    variants = {
        best.kind: base,
        "one shared budget": variant(**shared),
        "a shared budget with a floor of 0.25": variant(allocation="shared", allocation_options={"floor": 0.25}),
        "split 0.3": variant(allocation="split", allocation_options={"audio": 0.3}),
        "split 0.5": variant(allocation="split", allocation_options={"audio": 0.5}),
        "split 0.7": variant(allocation="split", allocation_options={"audio": 0.7}),
        "avba": variant(allocation="avba", allocation_options={}),
        "avba with prior 1": variant(allocation="avba", allocation_options={"prior": 1.0}),
        "mass": variant(allocation="mass", allocation_options={}),
        "without rho": variant(options={"redundancy": "none"}),
        "with rho": variant(options={"redundancy": "later_key"}),
        "approximate perturbation": variant(options={"approximate": True}),
        "norm of the group's sum": variant(options={"group_norm": "sum"}),
        "fresh importance": variant(options={"history": "fresh"}),
        "average with the past": variant(options={"history": "average"}),
        **{f"{p or 'all'} probes": variant(options={"n_probes": p}) for p in (16, 32, 128, 0)},
        "similarity only": base.replace(selector="omnimem", selector_options={"lam": 0.0}),
        "the paper's rule, keys": base.replace(selector="omnimem", selector_options={"features": "keys"}),
        "late layers get twice as much": variant(layer_table=(99, 99, 99, 197, 197, 197)),
        "early layers get twice as much": variant(layer_table=(197, 197, 197, 99, 99, 99)),
        "compact positions": variant(positions="compact"),
        "chunks of 128": variant(chunk_tokens=128),
        "chunks of 512": variant(chunk_tokens=512),
    }
    variants = {name: spec for name, spec in variants.items() if spec != base or spec is base}  # what it is already
    jobs = []
    for b in range(bases):
        for part, (name, spec) in enumerate(variants.items()):
            specs = tuple((f"{name}@{budget}", spec.at(budget), name) for budget in TUNED_AT)
            jobs.append(Answers("ablation", b, "test", part=part, specs=specs))
    return jobs


def long_job(base: int, best: Form) -> Answers:
    """Absolute against compact positions on clips four times longer than any in training."""
    specs = [("full", FULL, "full cache")]
    for budget in (4 * TUNED_AT[0], 4 * TUNED_AT[1], TUNED_AT[0]):
        for positions in ("absolute", "compact"):
            spec = best.spec(budget).replace(positions=positions)
            specs.append((f"{positions}@{budget}", spec, f"{best.kind}, {positions}"))
    return Answers("long", base, "long", specs=tuple(specs))


# The queue -----------------------------------------------------------------------------------------------------------


def key(job: Any) -> str:
    """Identifies a job in the record of what is done."""
    return repr(job)


def worker(context: Context, jobs: Any, answers: Any) -> None:
    """Run jobs until there is none; every failure is reported, none is passed over."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    while (job := jobs.get()) is not None:
        begun = time.perf_counter()
        try:
            answers.put((job, job.run(context), time.perf_counter() - begun, ""))
        except Exception:  # reported by the main process, which ends with an error
            answers.put((job, {}, time.perf_counter() - begun, traceback.format_exc()))


class Queue:
    """Hands jobs to worker processes and keeps the record of what is done in `work/done.jsonl`."""

    def __init__(self, context: Context, workers: int, until: float) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.jobs, self.answers, self.until = spawn.Queue(), spawn.Queue(), until
        self.record = context.work / "done.json"
        self.done: dict[str, list[tuple[str, float]]] = (
            json.loads(self.record.read_text()) if self.record.exists() else {}
        )
        self.processes = [spawn.Process(target=worker, args=(context, self.jobs, self.answers)) for _ in range(workers)]
        for process in self.processes:
            process.start()
        self.failed: list[str] = []

    def run(self, jobs: Sequence[Any]) -> list[dict[Any, float]]:
        """Run what is not done, as far as the time goes; the scores of all that are done, in the order of `jobs`."""
        scores: dict[str, dict[Any, float]] = {}
        left = [job for job in jobs if key(job) not in self.done]
        flying = 0
        while left or flying:
            while left and flying < len(self.processes) and time.perf_counter() < self.until:
                self.jobs.put(left.pop(0))
                flying += 1
            if not flying:
                break
            job, found, seconds, error = self._next()
            flying -= 1
            if error:
                self.failed.append(key(job))
                print(f"FAILED {key(job)}\n{error}", flush=True)
                if len(self.failed) > MOST_FAILED:
                    left.clear()
                continue
            scores[key(job)] = found
            self.done[key(job)] = [(repr(k), v) for k, v in found.items()]
            self.record.write_text(json.dumps(self.done))
            name = f"{type(job).__name__} {getattr(job, 'study', '')} {getattr(job, 'arm', '')} base {job.base}"
            print(f"{seconds:6.1f} s  {name}  {len(left)} left", flush=True)
        if left:
            print(f"time is over: {len(left)} jobs left", flush=True)
        return [scores.get(key(job)) or self._held(job) for job in jobs if key(job) in self.done]

    def _next(self) -> Any:
        """The next answer; waits as long as all workers live."""
        while True:
            try:
                return self.answers.get(timeout=10)
            except queue.Empty:
                if dead := [p.exitcode for p in self.processes if p.exitcode is not None]:
                    raise UserError(
                        f"{len(dead)} worker processes died (exit codes {dead})",
                        cause="most often the machine ran out of memory",
                        remedy="call again with fewer --workers; what is done is kept",
                    ) from None

    def _held(self, job: Any) -> dict[Any, float]:
        """Scores of a job done in an earlier call."""
        forms = {repr(pair): pair for pair in getattr(job, "forms", ())}
        return {forms[k]: v for k, v in self.done[key(job)] if k in forms}

    def close(self) -> None:
        """End the workers."""
        for _ in self.processes:
            self.jobs.put(None)
        for process in self.processes:
            process.join()


def check_work(context: Context) -> None:
    """Clips encoded and answers given by other models or about other clips must not be taken for those of this call.

    Raises:
        UserError: `work` holds such.
    """
    context.work.mkdir(parents=True, exist_ok=True)
    weights = [hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()[:16] for base in context.bases]
    now, path = {"bases": weights, "sets": repr(dict(context.sets))}, context.work / "identity.json"
    if path.exists() and json.loads(path.read_text()) != now:
        raise UserError(f"{context.work} holds work on other models or clips", remedy="name another folder")
    path.write_text(json.dumps(now))


def run(context: Context, workers: int, budget_s: float, seeds: int) -> list[str]:
    """The whole study; what failed."""
    begun = time.perf_counter()
    check_work(context)
    bases = len(context.bases)
    jobs = Queue(context, workers, begun + budget_s)
    try:
        jobs.run([Encode(base, name) for base in range(bases) for name in ("val", "test", "pool")])
        if jobs.failed:
            return jobs.failed
        first = [form for rule in OPTIONS for form in original_forms(rule)]
        scores = mean_scores(jobs.run(tuning_jobs(bases, first, 0)))
        chosen = choose(scores)
        if lacking := [rule for rule in OPTIONS if rule not in chosen]:
            raise UserError(f"not tuned: {', '.join(lacking)}", "the time was over", "call again: what is done is kept")
        more = [form for rule in OPTIONS for form in other_forms(chosen[rule])]
        scores |= mean_scores(jobs.run(tuning_jobs(bases, more, len(first))))
        choice = Chosen.of(scores)
        print(f"{time.perf_counter() - begun:.0f} s: tuned", *(f"{f.kind} {f.tuned}" for f in (
            choice.best, choice.rival, choice.augmented)), sep="\n  ", flush=True)  # fmt: skip
        jobs.run(study_jobs(bases, choice, seeds))
    finally:
        jobs.close()
    merge(context.work, context.results)
    return jobs.failed


def run_short(context: Context, workers: int, budget_s: float, seeds: int) -> list[str]:
    """Fine-tuning and its controls on short clips, with the method that an earlier tuning chose; what failed."""
    begun, chosen = time.perf_counter(), Chosen.from_results(context.results)
    check_work(context)
    bases = range(len(context.bases))
    jobs = Queue(context, workers, begun + budget_s)
    try:
        jobs.run([Encode(base, name) for base in bases for name in ("short", "short_pool")])
        jobs.run([Modalities(base, SHORT.clip_set, SHORT.dtype) for base in bases])
        untouched: dict[str, Any] = {"full": True, "dtype": SHORT.dtype, "chunk": SHORT.chunk}
        asked = at([chosen.best], SHORT.asked)
        jobs.run([Answers("finetune", base, SHORT.clip_set, asked, **untouched) for base in bases])
        jobs.run([chosen.tune(b, arm, s, SHORT) for s in range(seeds) for b in bases for arm in MAIN_ARMS])
    finally:
        jobs.close()
    merge(context.work, context.results)
    return jobs.failed


@dataclass(frozen=True)
class Encode:
    """Encode a clip set with the towers of a base model."""

    base: int
    name: str

    def run(self, context: Context) -> dict[Any, float]:
        """Leave it in `work`."""
        context.clips(self.base, self.name)
        return {}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts.recall.study", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("work", type=Path, help="folder of encoded clips, runs, parts")
    parser.add_argument("--bases", type=Path, nargs="+", required=True, help="pre-trained models")
    parser.add_argument("--results", type=Path, default=Path("scripts/recall/results"))
    parser.add_argument("--budget-s", type=float, default=1e9, help="no job begins after so many seconds")
    parser.add_argument("--workers", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3, help="of fine-tuning")
    parser.add_argument("--short", action="store_true", help="fine-tuning alone, on clips of 24 s: for a CPU")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the clips, for a trial")
    parser.add_argument("--device", default="cuda")
    a = parser.parse_args(argv)
    command = "python -m scripts.recall.study " + " ".join(sys.argv[1:] if argv is None else argv)
    context = Context(a.work, a.results, a.bases, sets(a.scale), command, a.device)
    failed = (run_short if a.short else run)(context, a.workers, a.budget_s, a.seeds)
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
