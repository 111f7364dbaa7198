"""Sums over the bits of tensors, computed where the tensor is: to tell weights apart, and to notice damage."""

from __future__ import annotations

import torch
from torch import Tensor

_STEP = (
    -7046029254386353131
)  # odd, 2^64 / golden ratio as a signed number: multipliers of neighbours have little in common
_PIECE = 2**24  # words at a time, so that a large tensor needs little memory beside it


@torch.no_grad()
def bit_sum(x: Tensor) -> int:
    """A sum over all bits of `x` modulo 2^64, the same on every device.

    Words of 8 bytes, each times an odd number of its place, so any change inside one word shows for certain, and others
    do but for chance. Nothing is rounded: the order of summation does not matter. Waits for the device.
    """
    flat = x.detach().contiguous().flatten().view(torch.uint8)
    whole = flat.numel() // 8 * 8
    words, rest = flat[:whole], flat[whole:]
    if words.storage_offset() % 8:
        words = words.clone()
    words = words.view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for start in range(0, len(words), _PIECE):
        part = words[start : start + _PIECE]
        total += (part * _multipliers(start, len(part), x.device)).sum()
    if len(rest):
        last = torch.zeros(8, dtype=torch.uint8, device=x.device)
        last[: len(rest)] = rest
        total += (last.view(torch.int64) * _multipliers(len(words), 1, x.device)).sum()
    return int(total) % 2**64


def _multipliers(start: int, n: int, device: torch.device) -> Tensor:
    return torch.arange(start + 1, start + 1 + n, dtype=torch.int64, device=device).mul_(_STEP).bitwise_or_(1)
