"""Three pieces of arithmetic that every rule shares: precision, inner products, and taking the best n."""

from __future__ import annotations

import torch
from torch import Tensor


def real(x: Tensor) -> torch.dtype:
    """The precision scores of `x` are computed in: float64 for float64, float32 for all else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def products(x: Tensor, y: Tensor) -> Tensor:
    """Inner products (..., n, D) x (..., m, D) -> (..., n, m), in float32 or better. Leading sizes are equal.

    Half-precision inputs on an NVIDIA GPU go through its matrix units with float32 sums. A product of two such numbers
    is exact in float32, so this loses nothing against converting first, and is several times faster.
    """
    half = x.dtype == y.dtype and x.dtype in (torch.float16, torch.bfloat16)
    if half and x.is_cuda and torch.version.hip is None:
        flat = torch.bmm(x.flatten(0, -3), y.flatten(0, -3).mT, out_dtype=torch.float32)
        return flat.view(*x.shape[:-1], y.shape[-2])
    dtype = torch.promote_types(real(x), real(y))
    return x.to(dtype) @ y.to(dtype).mT


def best(score: Tensor, members: Tensor, count: Tensor) -> Tensor:
    """The `count` members with the highest scores, as a mask. A tie goes to the later token.

    Args:
        score: (..., S), not NaN.
        members: (..., S) bool. Members with a score of -inf still come before all others.
        count: (...) int64, at most the number of members.
    """
    lowest = torch.finfo(score.dtype).min
    ranked = score.clamp(min=lowest).masked_fill(~members, float("-inf"))
    order = ranked.flip(-1).argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    return torch.zeros_like(members).scatter(-1, order, places < count.unsqueeze(-1)).flip(-1)
