"""GPUs by name, and how long counted work takes on one.

Rates are those of NVIDIA's data sheets (dense, without sparsity); memory is what torch reports as total. What kernels
reach of a data sheet's rate is in `SHARES`, calibrated on one H200 (`scripts/bench/NOTES.md`). Other GPUs are taken to
reach the same shares; nothing has been measured there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from omnimem_train.errors import UserError, nearest
from omnimem_train.scoring_costs import Work


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: what a user types.
        memory_gib: total device memory.
        half: operations a second in bfloat16 and float16, with float32 sums; 0 for unknown, like the next two.
        single: operations a second in float32.
        bandwidth: bytes a second.
        words: parts of the name that torch reports, all of them in it.
    """

    name: str
    memory_gib: float
    half: float = 0.0
    single: float = 0.0
    bandwidth: float = 0.0
    words: tuple[str, ...] = ()


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H200", 139.8, 989e12, 67e12, 4.8e12, ("H200",)),
        Gpu("H100", 79.1, 989e12, 67e12, 3.35e12, ("H100", "HBM3")),
        Gpu("H100-PCIe", 79.1, 756e12, 51e12, 2.0e12, ("H100", "PCIe")),
        Gpu("A100", 79.2, 312e12, 19.5e12, 2.04e12, ("A100", "80GB")),
        Gpu("A100-40GB", 39.4, 312e12, 19.5e12, 1.56e12, ("A100", "40GB")),
        Gpu("L40S", 44.4, 362e12, 91.6e12, 0.864e12, ("L40S",)),
        Gpu("RTX-4090", 23.6, 165e12, 82.6e12, 1.01e12, ("RTX 4090",)),
    )
}

MEASURED = "H200"
"""The GPU that the following numbers are from."""
SHARES = {
    "matrix": 0.69,  # all products of a layer with 2,048 tokens in 1.4 ms
    "attention": 0.275,  # 2,048 queries on 8,224 keys in 776 us
    "attention_back": 0.28,  # the same in 1,892 us
    "split": 0.51,  # with model.attention=split in 418 us
    "split_back": 0.45,  # in 1,181 us
    "kernel": 0.35,  # `change` in 105 us, `later_key` in 68 us, columns of all queries in 225 us
    "single": 0.6,  # not measured
    "traffic": 0.75,  # not measured alone: SwiGLU and norms do better, from the cache
    "maps": 0.45,  # scoring in plain torch: `change` in 1,930 us, `later_key` in 2,812 us
}
"""Kind of work -> share of the data sheet's rate (`half`, `single` or `bandwidth`) that is reached. From the results of
`scripts/bench` on an H200, as the comments say."""
LAUNCH_S = 3e-6
"""Seconds a kernel costs however little it does: starting it, and the gap to the next. A guess."""
WITH_GRADIENT = ("forward", "recomputation", "backward")
WAITING = 1.29
"""What a phase with gradient takes for each second its kernels need: the device waits for Python, autograd and
launches. A step with gradient through all chunks took 20.6 s on an H200, its pieces add up to 16 s."""
CONTEXT_GIB = 0.6
"""Device memory that CUDA takes for itself. A guess."""
FRAGMENTS = 0.03
"""Share of the allocated memory that lies between allocations, with expandable segments. A guess."""


def seconds(work: Work, gpu: Gpu, itemsize: int) -> float | None:
    """How long `work` of a model whose numbers have `itemsize` bytes keeps the device busy; None for a GPU of unknown
    rates."""
    if not gpu.half or not gpu.single or not gpu.bandwidth:
        return None
    product = gpu.half if itemsize == 2 else gpu.single
    rates = dict.fromkeys(("matrix", "attention", "attention_back", "split", "split_back"), product)
    rates |= {"kernel": gpu.half, "single": gpu.single, "traffic": gpu.bandwidth, "maps": gpu.bandwidth}
    parts = [getattr(work, kind) / (rate * SHARES[kind]) for kind, rate in rates.items()]
    return sum(parts) + work.launches * LAUNCH_S


def phase_seconds(phases: dict[str, Work], gpu: Gpu, itemsize: int, recorded: bool = False) -> dict[str, float] | None:
    """How long each phase of a step takes (`omnimem_train.operations.step_work`), what it waits for included. Where
    chunks are `recorded` the device does not wait."""
    found = {name: seconds(work, gpu, itemsize) for name, work in phases.items()}
    return {
        name: busy_s * (WAITING if name in WITH_GRADIENT and not recorded else 1.0)
        for name, busy_s in found.items()
        if busy_s is not None
    } or None


def usable_gib(gpu: Gpu) -> float:
    """GiB that torch's allocations may take at most."""
    return (gpu.memory_gib - CONTEXT_GIB) / (1 + FRAGMENTS)


def find_gpu(name: str) -> Gpu:
    """The GPU called `name`, or with "auto" that of this machine.

    Raises:
        UserError: no such name; with "auto", no NVIDIA GPU here.
    """
    if name == "auto":
        return _this_machine()
    known = {key.lower(): gpu for key, gpu in GPUS.items()}
    if name.lower() not in known:
        raise UserError(
            f"unknown GPU {name!r}{nearest(name, GPUS)}", remedy=f"choose one of: {', '.join(GPUS)}, or auto"
        )
    return known[name.lower()]


def _this_machine() -> Gpu:
    if not torch.cuda.is_available():
        raise UserError(
            "there is no GPU here to plan for",
            cause="--gpu auto asks torch for the GPU of this machine, and it finds none",
            remedy=f"name the one you will use: --gpu {next(iter(GPUS))} (known: {', '.join(GPUS)})",
        )
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    memory_gib = found.total_memory / 2**30
    for gpu in GPUS.values():
        if all(word in found.name for word in gpu.words):
            return Gpu(gpu.name, memory_gib, gpu.half, gpu.single, gpu.bandwidth, gpu.words)
    return Gpu(found.name, memory_gib)
