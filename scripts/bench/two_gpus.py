"""Two GPUs against one: the same losses, no hang, complete adapters, exact resume, throughput.

    scripts/bench/two_gpus.sh [--out FOLDER] [--budget-s 420] [--parts losses,speed]

Part "losses": a small model in bfloat16 is trained on streams of unequal length, with and without sound, asked at
different times (`unequal.py`), by one process with two streams a step and by two processes with one each, under every
engine at the same time. No gradient is clipped unless --max-grad-norm says so: DeepSpeed adds the norm up in another
order than torch, and half precision makes much of a last bit. So it does of the order in which GPUs add up in the way
back, unless --deterministic forbids that: without it, the first steps alone are held against one process.

Part "speed": whole LoRA steps at the width and depth of the 7B model (`two_gpus_speed.py`), one engine after the other.
Every run is a process group of its own with a log and a time limit; one that fails is reported, the rest goes on, and
the exit status is then 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import Results, versions

from omnimem_train.checkpoint import find_checkpoint, load_checkpoint
from omnimem_train.export import export_adapter
from omnimem_train.models.tiny import make_tiny
from omnimem_train.runlog import read_metrics

HERE = Path(__file__).resolve().parent
LAUNCH = HERE.parents[1] / "recipes" / "launch"
RECIPE = """
model: {{path: {model}, dtype: {dtype}, device: {device}}}
lora: {{r: 8, alpha: 16}}
memory: {{selector: perturbation, budget: 64, chunk_tokens: {chunk}}}
budgets: {{kind: log_uniform, low: 16, high: 128, full_share: 0.1, chunk_jitter: 0.25}}
train: {{steps: {steps}, lr: 1e-3, warmup_steps: 4, log_every: 1, save_every: {save}, keep: 9, seed: 3,
  max_grad_norm: {norm}}}
"""


@dataclass(frozen=True)
class Engine:
    """A way to start two processes, and what the recipe says with it."""

    name: str
    launcher: str  # "accelerate", "torchrun" or "deepspeed"
    settings: dict[str, str] = field(default_factory=dict)


ZERO2, ZERO3 = str(LAUNCH / "zero2.json"), str(LAUNCH / "zero3.json")
ENGINES = [
    Engine("ddp", "accelerate"),
    Engine("zero2", "torchrun", {"deepspeed": ZERO2}),
    Engine("fsdp2", "accelerate", {"sharding": "fsdp"}),
    Engine("zero3", "torchrun", {"deepspeed": ZERO3}),
    Engine("zero2_launcher", "deepspeed", {"deepspeed": ZERO2}),
]


@dataclass
class Job:
    """A run in progress."""

    process: subprocess.Popen[bytes]
    log: Path
    ends_s: float
    began_s: float = field(default_factory=time.monotonic)
    took_s: float = 0.0

    def wait(self) -> str:
        """Wait for its end; what went wrong, empty for nothing. The whole group is ended when its time is up."""
        try:
            code = self.process.wait(max(self.ends_s - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            code = None
            for kind in (signal.SIGTERM, signal.SIGKILL):
                if self.process.poll() is None:
                    os.killpg(self.process.pid, kind)
                    time.sleep(3)
            self.process.wait()
        self.took_s = time.monotonic() - self.began_s
        if code == 0:
            return ""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line and "ChildFailedError" not in line]
        told = (errors or lines or ["no output"])[-1].strip()[:160]
        return f"{'no end within its time' if code is None else f'exit status {code}'}: {told}"


class Bench:
    """What the parts share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.cuda = args.device == "cuda"
        self.work: Path = args.out / "two_gpus"
        self.work.mkdir(parents=True, exist_ok=True)
        self.results = Results(args.out / "results.json", versions(torch.device(args.device)))
        self.ends_s = time.monotonic() + args.budget_s
        self.args, self.failures = args, list[str]()
        self.ports = 29600
        named = args.engines.split(",")
        self.engines = [e for e in ENGINES if args.engines == "all" or e.name in named]

    def left_s(self) -> float:
        """Seconds until no run is begun any more."""
        return self.ends_s - time.monotonic()

    def fail(self, name: str, why: str) -> None:
        """Note that something did not work."""
        self.failures.append(name)
        self.results.add(f"two_gpus.{name}", None, "failed", note=why)

    def check(self, name: str, value: float, unit: str, goal: float, better: str = "lower", note: str = "") -> None:
        """Note a number; one that misses its goal is a failure."""
        self.results.add(f"two_gpus.{name}", value, unit, goal=goal, better=better, note=note)
        if not (value <= goal if better == "lower" else value >= goal):
            self.failures.append(name)

    def start(self, name: str, engine: Engine | None, script: str, words: Sequence[str], limit_s: float) -> Job:
        """Start `script` with one process (no engine) or two."""
        env = dict(os.environ)
        if engine is not None and engine.settings.get("deepspeed") and not self.cuda:
            env["DS_ACCELERATOR"] = "cpu"
        elif not self.cuda:
            env["ACCELERATE_USE_CPU"] = "true"
        log = self.work / f"{name}.log"
        command = [*self.launcher(engine), str(HERE / script), *words]
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        return Job(process, log, time.monotonic() + min(limit_s, max(self.left_s(), 1)))

    def launcher(self, engine: Engine | None) -> list[str]:
        """The words in front of a script."""
        python = [sys.executable]
        if engine is None:
            return python
        self.ports += 1
        if engine.launcher == "deepspeed":
            where = ["--num_gpus" if self.cuda else "--num_accelerators", "2"]
            return [*python, "-m", "deepspeed.launcher.runner", *where, "--master_port", str(self.ports)]
        if engine.launcher == "accelerate" and self.cuda:
            file = str(LAUNCH / "ddp_2gpu.yaml")
            command = ["-m", "accelerate.commands.launch", "--config_file", file]
            return [*python, *command, "--main_process_port", str(self.ports)]
        return [*python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


# The same losses, no hang, resume -------------------------------------------------------------------------------------


def losses(bench: Bench) -> None:
    """All engines: on GPUs at the same time, they are small, and the processes' start takes most of their time."""
    steps, engines = bench.args.steps, bench.engines
    save = steps - max(steps // 8, 2)
    recipe = bench.work / "recipe.yaml"
    model = make_tiny(bench.work / "model", size="tiny" if bench.cuda else "nano")
    dtype = bench.args.dtype or ("bfloat16" if bench.cuda else "float32")
    device = "auto" if bench.cuda else "cpu"
    chunk = 96 if bench.cuda else 48
    given = {"dtype": dtype, "device": device, "chunk": chunk, "steps": steps, "save": save}
    recipe.write_text(RECIPE.format(model=model, norm=bench.args.max_grad_norm, **given))

    def begin(name: str, engine: Engine | None, *more: str) -> Job:
        settings = {} if engine is None else engine.settings
        words = [str(recipe), f"train.output={bench.work / name}", *(f"train.{k}={v}" for k, v in settings.items())]
        words.append(f"train.accumulation={2 if engine is None else 1}")
        words += ["--deterministic"] if bench.args.deterministic else []
        return bench.start(name, engine, "unequal.py", [*words, *more], bench.args.limit_s)

    twice = [("one", None), *((e.name, e) for e in engines[:1])]
    runs = {"one": lambda: begin("one", None)} | {e.name: partial(begin, e.name, e) for e in engines}
    runs |= {f"{name}-again": partial(begin, f"{name}-again", engine) for name, engine in twice}
    started = run_all(bench, runs)
    if why := started.pop("one")[0]:
        bench.fail("losses.one", why)
        return
    one = read_metrics(bench.work / "one" / "metrics.jsonl")
    for name, _ in twice:
        if why := started.pop(f"{name}-again")[0]:
            bench.fail(f"run_to_run.{name}", why)
        else:
            apart = differences(*(read_metrics(bench.work / n / "metrics.jsonl") for n in (name, f"{name}-again")))
            note = f"the same run twice, largest of {steps} steps; of the first 4 {max(apart[:4]):.1e}"
            bench.results.add(f"two_gpus.run_to_run.{name}", max(apart), "nat", note=note)
    for name, (why, took_s) in started.items():
        if why:
            bench.fail(f"steps.{name}", why)
        else:
            compare(bench, name, one, took_s)
    done = [e for e in engines if not started[e.name][0]]
    half = {e.name: bench.work / e.name / "checkpoints" / f"step-{save:08d}" for e in done}
    again = {e.name: partial(begin, f"{e.name}-resumed", e, f"train.resume={half[e.name]}") for e in done}
    for name, (why, _) in run_all(bench, again).items():
        if why:
            bench.fail(f"resume.{name}", why)
        else:
            reopened(bench, name, save)


def run_all(bench: Bench, runs: dict[str, Callable[[], Job]]) -> dict[str, tuple[str, float]]:
    """What went wrong with each run, and its seconds; one after the other without GPUs, where memory is short."""
    jobs = {name: begin() for name, begin in runs.items()} if bench.cuda else {}
    ended = {}
    for name, begin in runs.items():
        job = jobs[name] if bench.cuda else begin()
        why = job.wait()
        ended[name] = why, job.took_s
    return ended


def compare(bench: Bench, name: str, one: list[dict[str, float]], took_s: float) -> None:
    """The losses of a run of two processes beside those of one."""
    rows = read_metrics(bench.work / name / "metrics.jsonl")
    steps = len(one)
    bench.check(f"steps.{name}", len(rows), "steps", steps, "higher", f"unequal streams, no hang, {took_s:.0f} s")
    apart = differences(one, rows)
    exact = bench.args.deterministic or not bench.cuda
    note = f"largest of {steps} steps {max(apart):.1e}, of the first 4 {max(apart[:4]):.1e}"
    bench.check(f"loss_difference.{name}", max(apart if exact else apart[:4]), "nat", 1e-3, note=note)
    empty = [row["empty_share"] for row in rows if "empty_share" in row]
    if empty:
        share = 100 * sum(empty) / len(empty)
        bench.results.add(f"two_gpus.empty_passes.{name}", share, "%", note="neighbours of most unequal length")


def differences(a: list[dict[str, float]], b: list[dict[str, float]]) -> list[float]:
    """Of the losses of two runs, step by step."""
    return [abs(x["loss"] - y["loss"]) for x, y in zip(a, b, strict=False)]


def reopened(bench: Bench, name: str, save: int) -> None:
    """A resumed run beside the one that was not interrupted; its adapter, read back and exported."""
    straight = read_metrics(bench.work / name / "metrics.jsonl")[save:]
    resumed = read_metrics(bench.work / f"{name}-resumed" / "metrics.jsonl")
    assert [row["step"] for row in resumed] == [row["step"] for row in straight]
    apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(straight, resumed, strict=True))
    bench.check(f"resume_difference.{name}", apart, "nat", 1e-3, note=f"from step {save} on; 0 is exact")
    last = find_checkpoint(bench.work / f"{name}-resumed" / "checkpoints")
    held = load_checkpoint(last, world_size=2).tensors["adapter"]
    alone = load_checkpoint(find_checkpoint(bench.work / "one" / "checkpoints")).tensors["adapter"]
    same = {k: v.shape for k, v in held.items()} == {k: v.shape for k, v in alone.items()}
    report = export_adapter(last, bench.work / f"{name}-adapter")
    whole = report["trained"] if same else 0
    bench.check(
        f"adapter.{name}", whole, "modules", report["modules"], "higher", "trained ones, exported and read back"
    )


# Throughput -----------------------------------------------------------------------------------------------------------


def speed(bench: Bench) -> None:
    """One GPU, then two with each engine."""
    args, rates = bench.args, dict[str, float]()
    runs: list[tuple[str, Engine | None]] = [("one", None)]
    runs += [(e.name, e) for e in bench.engines if e.launcher != "deepspeed"]
    for name, engine in runs:
        if bench.left_s() < 30:
            bench.fail(f"throughput.{name}", "no time left")
            continue
        out = bench.work / f"speed-{name}.json"
        out.unlink(missing_ok=True)
        settings = {} if engine is None else engine.settings
        words = ["--out", str(out), "--shape", args.shape, "--tokens", str(args.tokens)]
        words += [w for k, v in settings.items() for w in (f"--{k}", v)]
        if why := bench.start(f"speed-{name}", engine, "two_gpus_speed.py", words, args.limit_s).wait():
            bench.fail(f"throughput.{name}", why)
            continue
        found: dict[str, Any] = json.loads(out.read_text())
        if found["processes"] != (wanted := 1 if engine is None else 2):
            bench.fail(f"throughput.{name}", f"{found['processes']} processes instead of {wanted}")
            continue
        rates[name] = found["tokens_per_s"]
        note = f"{found['steps']} steps of {found['tokens']:,} tokens a GPU, {found['processes']} GPUs"
        row = f"two_gpus.throughput.{name}"
        bench.results.add(row, rates[name], "tokens/s", better="higher", spread=tuple(found["spread"]), note=note)
        if found["peak_gib"] is not None:
            bench.results.add(f"two_gpus.peak.{name}", found["peak_gib"], "GiB", note="of one GPU")
        if engine is not None and "one" in rates:
            gain, goal = rates[name] / rates["one"], 1.8 if name in ("ddp", "zero2") else None
            bench.results.add(f"two_gpus.gain.{name}", gain, "x", goal=goal, better="higher")
            if goal is not None and gain < goal and bench.cuda:
                bench.failures.append(f"gain.{name}")


PARTS: dict[str, Callable[[Bench], None]] = {"losses": losses, "speed": speed}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results.json and of two_gpus/")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--parts", default="losses,speed")
    parser.add_argument(
        "--dtype", default="", help="of the losses' model, by default bfloat16 on a GPU, float32 on a CPU"
    )
    parser.add_argument("--max-grad-norm", type=float, default=1e9, help="of the losses' runs; by default above any")
    parser.add_argument("--deterministic", action="store_true", help="kernels of the losses' runs; not tried on a GPU")
    parser.add_argument("--engines", default="all", help=f"comma-separated, of: {', '.join(e.name for e in ENGINES)}")
    parser.add_argument("--steps", type=int, default=50, help="of the unequal streams")
    parser.add_argument("--shape", default="", help="of the throughput, by default 7B on a GPU and tiny on a CPU")
    parser.add_argument("--tokens", type=int, default=0, help="of a stream of the throughput, by default 65,536 (512)")
    parser.add_argument("--budget-s", type=float, default=420.0, help="seconds after which every run is ended")
    parser.add_argument("--limit-s", type=float, default=180.0, help="seconds of one run at most")
    return parser.parse_args()


def main() -> int:
    """Run the parts; 1 if anything failed or missed its goal."""
    args, began = arguments(), time.monotonic()
    args.shape = args.shape or ("qwen2.5-omni-7b" if args.device == "cuda" else "tiny")
    args.tokens = args.tokens or (65536 if args.device == "cuda" else 512)
    bench = Bench(args)
    if args.device == "cuda" and torch.cuda.device_count() < 2:
        print(f"this needs two GPUs, {torch.cuda.device_count()} are here", file=sys.stderr)
        return 2
    if importlib.util.find_spec("deepspeed") is None:
        without = [e for e in bench.engines if "deepspeed" in e.settings]
        bench.engines = [e for e in bench.engines if e not in without]
        for engine in without:
            bench.fail(f"steps.{engine.name}", "deepspeed is not installed")
    for part in args.parts.split(","):
        try:
            PARTS[part](bench)
        except Exception as error:  # the other part is still worth having
            bench.fail(part, f"{type(error).__name__}: {str(error)[:160]}")
    print()
    for row in bench.results.table().splitlines():
        if row.startswith("two_gpus."):
            print(row)
    failed = ", ".join(bench.failures) or "none"
    print(f"{time.monotonic() - began:.0f} s; failed or missed: {failed}")
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
