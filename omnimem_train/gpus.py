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

SHARES = {
    "matrix": 0.66,
    "attention": 0.38,
    "attention_back": 0.30,
    "kernel": 0.20,
    "single": 0.60,
    "traffic": 0.75,
    "maps": 0.45,
}
"""Kind of work -> share of the data sheet's rate (`half`, `single` or `bandwidth`) that is reached."""
LAUNCH_S = 3e-6
"""Seconds a kernel costs however little it does: starting it, and the gap to the next."""
CONTEXT_GIB = 0.6
"""Device memory that CUDA takes for itself."""
FRAGMENTS = 0.03
"""Share of the allocated memory that lies between allocations, with expandable segments."""


def seconds(work: Work, gpu: Gpu, itemsize: int) -> float | None:
    """How long `work` of a model whose numbers have `itemsize` bytes takes; None for a GPU of unknown rates."""
    if not gpu.half or not gpu.single or not gpu.bandwidth:
        return None
    product = gpu.half if itemsize == 2 else gpu.single
    rates = {"matrix": product, "attention": product, "attention_back": product, "kernel": gpu.half}
    rates |= {"single": gpu.single, "traffic": gpu.bandwidth, "maps": gpu.bandwidth}
    parts = [getattr(work, kind) / (rate * SHARES[kind]) for kind, rate in rates.items()]
    return sum(parts) + work.launches * LAUNCH_S


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
