"""Runs the study on one GPU: tunes every rule, measures, fine-tunes, and leaves answers a results page is made from.

    python -m scripts.recall.study WORK --bases MODEL0 MODEL1 --results scripts/recall/results --budget-s 540

Work is a queue of small jobs for several processes on one GPU (a small model is bound by launches, not by the GPU).
What is done is not done again: a second call goes on where the time ran out. Then `python -m scripts.recall.results`
writes RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omnimem_train.errors import UserError
from scripts.recall.attempt import Attempt, run_attempt
from scripts.recall.finetune import MAIN_ARMS, MINUTE, SHORT
from scripts.recall.jobs import Answers, Context, merge, weights_of
from scripts.recall.methods import (
    OPTIONS,
    choose,
    original_forms,
    other_forms,
)
from scripts.recall.modality import Modalities
from scripts.recall.phases import Chosen, at, mean_scores, sets, study_jobs, tuning_jobs

MOST_FAILED = 12  # with more, something is wrong with all of them


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
    """Hands jobs to worker processes and keeps the record of what is done in `work/done.json`.

    Attributes:
        kept: called after each job that is done and on record.
    """

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
        self.kept: Callable[[], object] = lambda: None

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
            self.kept()
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
    weights = {str(number): weights_of(base) for number, base in context.bases.items()}
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
    bases = list(context.bases)
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


def run_last(context: Context, workers: int, budget_s: float, attempt: Attempt, pack: Path | None) -> list[str]:
    """The last attempt at the goal of fine-tuning, with the method that an earlier tuning chose; what failed."""
    begun = time.perf_counter()
    check_work(context)
    jobs = Queue(context, workers, begun + budget_s)
    jobs.run([Encode(base, name) for base in context.bases for name in ("pool", "val", "test")])
    if jobs.failed:
        jobs.close()
        return jobs.failed
    print(f"{time.perf_counter() - begun:.0f} s: encoded", flush=True)
    return run_attempt(context, jobs, attempt, pack)


@dataclass(frozen=True)
class Encode:
    """Encode a clip set with the towers of a base model."""

    base: int
    name: str

    def run(self, context: Context) -> dict[Any, float]:
        """Leave it in `work`."""
        context.clips(self.base, self.name)
        return {}


def numbered(bases: Sequence[str]) -> dict[int, Path]:
    """Base models by the number they have in the results: `NUMBER=MODEL`, or one after the other."""
    found: dict[int, Path] = {}
    for place, given in enumerate(bases):
        number, named, path = given.partition("=")
        if named and number.isdigit():
            found[int(number)] = Path(path)
        else:
            found[place] = Path(given)
    if len(found) < len(bases):
        raise UserError(f"--bases {' '.join(bases)}", "two base models have one number", "give each its own")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts.recall.study", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("work", type=Path, help="folder of encoded clips, runs, parts")
    parser.add_argument(
        "--bases", nargs="+", required=True, help="pre-trained models; with --attempt also NUMBER=MODEL"
    )
    parser.add_argument("--results", type=Path, default=Path("scripts/recall/results"))
    parser.add_argument("--budget-s", type=float, default=1e9, help="no job begins after so many seconds")
    parser.add_argument("--workers", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3, help="of fine-tuning")
    parser.add_argument("--short", action="store_true", help="fine-tuning alone, on clips of 24 s: for a CPU")
    parser.add_argument("--attempt", action="store_true", help="the last attempt at fine-tuning")
    parser.add_argument("--tuned", type=Path, help="with --attempt: results of the tuning, if not in --results")
    parser.add_argument("--pack", type=Path, help="with --attempt: everything new in one file, .tar.gz")
    parser.add_argument("--steps", type=int, default=MINUTE.steps, help="with --attempt: fewer, for a trial")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the clips, for a trial")
    parser.add_argument("--device", default="cuda")
    a = parser.parse_args(argv)
    command = "python -m scripts.recall.study " + " ".join(sys.argv[1:] if argv is None else argv)
    context = Context(a.work, a.results, numbered(a.bases), sets(a.scale), command, a.device)
    if not a.attempt and list(context.bases) != list(range(len(context.bases))):
        raise UserError(f"--bases {' '.join(a.bases)}", "the study numbers its base models from 0", "leave numbers out")
    if a.attempt:
        size = min(MINUTE.size, context.sets["pool"].n)
        scale = replace(MINUTE, steps=a.steps, size=size, dtype="bfloat16" if a.device == "cuda" else "float32")
        attempt = Attempt(Chosen.from_results(a.tuned or a.results).best, scale, a.seeds, tuple(context.bases))
        failed = run_last(context, a.workers, a.budget_s, attempt, a.pack)
    else:
        failed = (run_short if a.short else run)(context, a.workers, a.budget_s, a.seeds)
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
