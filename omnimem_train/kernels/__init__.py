"""Triton kernels for scoring and selection, plugged into `omnimem_train.memory` on GPUs that can run them.

`install` is called by a stream on a CUDA device; `scripts/bench/NOTES.md` has what they gain. With OMNIMEM_KERNELS=0 in
the environment, without triton, on older GPUs and for other precisions than bfloat16, the plain torch code of
`omnimem_train.memory` runs.

Shape legend: see `omnimem_train.memory.state`; N = H/G query heads of a group.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from functools import cache, wraps

import torch
from torch import Tensor

from omnimem_train.memory.fast import provide

ENVIRONMENT = "OMNIMEM_KERNELS"
OFF = f"{ENVIRONMENT} is 0"
OLDEST = (8, 0)  # compute capability with bfloat16 matrix units


@cache
def reason_not_to() -> str | None:
    """Why the kernels cannot be used on the current device, in words; None if they can."""
    if os.environ.get(ENVIRONMENT, "1") == "0":
        return OFF
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "there is no NVIDIA GPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    found = torch.cuda.get_device_capability()
    if found < OLDEST:
        return f"the GPU has compute capability {found[0]}.{found[1]}, the kernels need {OLDEST[0]}.{OLDEST[1]}"
    return None


@cache
def install() -> bool:
    """Provide all kernels to `omnimem_train.memory`, once; False where they cannot be used."""
    reason = reason_not_to()
    if reason is not None:
        if reason != OFF:
            warnings.warn(f"selection runs in plain torch, which is slower: {reason}", stacklevel=2)
        return False
    from omnimem_train.kernels import attention, change, keep, redundancy

    provide("change", _guarded("change", change.change, torch.bfloat16))
    provide("attention", _guarded("attention", attention.attention_sum, torch.bfloat16))
    provide("later_key", _guarded("later_key", redundancy.later_key, torch.bfloat16))
    provide("earlier_cosine", _guarded("earlier_cosine", redundancy.earlier_cosine, torch.bfloat16))
    provide("keep", _guarded("keep", keep.keep, torch.float32))
    return True


def _guarded(step: str, kernel: Callable[..., Tensor | None], dtype: torch.dtype) -> Callable[..., Tensor | None]:
    """`kernel` for tensors of `dtype` on a GPU: float16 would overflow in a Gram matrix, float32 is for exactness.
    Should it not compile or not fit this GPU, that is said once and torch takes over.

    The first argument of every step is a tensor or holds the keys.
    """
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    @wraps(kernel)
    def run(first: Tensor, *rest: object) -> Tensor | None:
        data = first if isinstance(first, Tensor) else first.tokens.keys
        if not data.is_cuda or data.dtype != dtype:
            return None
        try:
            return kernel(first, *rest)
        except (CompilationError, OutOfResources, PTXASError) as error:
            provide(step, None)
            warnings.warn(f"the kernel {step!r} does not run here, plain torch takes over: {error}", stacklevel=2)
            return None

    return run
