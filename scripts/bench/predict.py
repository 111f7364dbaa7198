"""What `omnimem plan` predicts for the bench's cases, beside what was measured: predict.py [RESULTS] [--gpu H200]

Prints the table of NOTES.md. Peaks of prefill cases include the memory that the bench still holds from warming up.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import replace
from pathlib import Path

from shape import SHAPES, Shape

from omnimem_train.gpus import GPUS, Gpu, find_gpu, phase_seconds
from omnimem_train.gradient import Gradient
from omnimem_train.memory import MemorySpec
from omnimem_train.models.lora import LoraSettings
from omnimem_train.operations import step_work

HERE = Path(__file__).resolve().parent
SHAPE = SHAPES["qwen2.5-omni-7b"]
NONE = Gradient("none")
CASES = {
    "prefill.sliding_window": ("sliding_window", {}, NONE),
    "prefill.perturbation": ("perturbation", {}, NONE),
    "prefill.perturbation_no_rho": ("perturbation", {"redundancy": "none"}, NONE),
    "prefill.perturbation_all_queries": ("perturbation", {"n_probes": 0}, NONE),
    "prefill.observed_attention": ("observed_attention", {}, NONE),
    "prefill.omnimem": ("omnimem", {}, NONE),
    "lora.last_8": ("perturbation", {}, Gradient("last", chunks=8)),
    "lora.all": ("perturbation", {}, Gradient("all")),
    "lora.last_8_by_layer": ("perturbation", {}, Gradient("last", chunks=8, granularity="layer")),
    "lora.all_by_layer": ("perturbation", {}, Gradient("all", granularity="layer", offload="host")),
    "lora.all_nf4": ("perturbation", {}, Gradient("all")),
}
"""Result of the bench -> selector, its options, gradient; with "nf4" in its name on a decoder in 4 bits."""


def predict(
    name: str, gpu: Gpu, shape: Shape = SHAPE, split: bool = False, recorded: bool = False
) -> tuple[float, float]:
    """Seconds and GiB of a case, with split attention or without, with chunks recorded or launch by launch."""
    selector, options, gradient = CASES[name]
    spec = MemorySpec(selector, options, budget=shape.budget, chunk_tokens=shape.chunk)
    lora = None if gradient.kind == "none" else LoraSettings(r=shape.rank, alpha=2 * shape.rank)
    step = replace(shape.step(spec, gradient, lora), split=split, packed="nf4" in name, recorded=recorded)
    taken_s = sum((phase_seconds(step_work(step), gpu, step.itemsize, recorded) or {}).values())
    found = step.footprint(shape.parameters, moments=False)
    held = found.total - found.beside  # the bench's chunks are all recorded when it measures
    if gradient.kind == "none":
        held += step.snapshot(step.chunks[-1].kept)
    return taken_s, held / 2**30


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("results", type=Path, nargs="?", default=HERE / "results.json")
    parser.add_argument("--gpu", default="H200", help=f"one of: {', '.join(GPUS)}")
    args = parser.parse_args()
    gpu, rows = find_gpu(args.gpu), json.loads(args.results.read_text())
    measured = {row["name"]: row["value"] for row in rows if row["value"] is not None}
    print("| case | predicted | measured | ratio |\n|---|---|---|---|")
    for name, suffix in itertools.product(CASES, ("", ".split", ".graphs")):
        values = predict(name, gpu, split=bool(suffix), recorded=suffix == ".graphs")
        for result, value, unit in zip((name + suffix, f"{name}.peak{suffix}"), values, ("s", "GiB"), strict=True):
            if found := measured.get(result):
                print(f"| {result} | {value:.1f} {unit} | {found:.1f} {unit} | {value / found:.2f} |")


if __name__ == "__main__":
    main()
