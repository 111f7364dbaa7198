# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""rho without the map of all pairs of keys: `omnimem_train.memory.redundancy.later_key` in one kernel.

Shape legend: see `omnimem_train.memory.state`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from omnimem_train.memory.state import TEXT

WIDTHS = (64, 128)
SPAN = 1024  # columns of one program
LATER = {"BR": 128, "BC": 64, "num_warps": 4, "num_stages": 3}  # rows and columns at a time; layout of a program


@triton.jit
def _later(
    k_ptr, inverse_ptr, modality_ptr, rho_ptr, S, span,
    TEXT: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The largest cosine of the keys of a tile with those of a span of later columns, into `rho` by atomic maximum."""
    first, head = tl.program_id(0) * BR, tl.program_id(2)
    start = tl.maximum(tl.program_id(1) * span, first // BC * BC)
    end = tl.minimum((tl.program_id(1) + 1) * span, S)
    if start < end:
        d, row = tl.arange(0, D), first + tl.arange(0, BR)
        k_ptr += head.to(tl.int64) * S * D
        inverse_ptr += head.to(tl.int64) * S
        modality_ptr += head.to(tl.int64) * S
        own = tl.load(k_ptr + row[:, None] * D + d[None, :], mask=row[:, None] < S, other=0.0)
        kind = tl.load(modality_ptr + row, mask=row < S, other=TEXT)
        largest = tl.zeros((BR, BC), tl.float32)
        for s in range(start, end, BC):
            col = s + tl.arange(0, BC)
            other = tl.load(k_ptr + col[None, :] * D + d[:, None], mask=col[None, :] < S, other=0.0)
            inverse = tl.load(inverse_ptr + col, mask=col < S, other=0.0)
            counts = kind[:, None] == tl.load(modality_ptr + col, mask=col < S, other=-1)[None, :]
            if s < first + BR:
                counts = counts & (col[None, :] > row[:, None])
            found = tl.dot(own, other) * inverse[None, :]
            largest = tl.where(counts, tl.maximum(largest, found), largest)
        cosine = tl.max(largest, 1) * tl.load(inverse_ptr + row, mask=row < S, other=0.0)
        inside = (row < S) & (kind != TEXT)
        tl.atomic_max(rho_ptr + head.to(tl.int64) * S + row, tl.minimum(cosine, 1.0), mask=inside)


def later_key(keys: Tensor, modality: Tensor) -> Tensor | None:
    """(B, G, S) float32 in [0, 1], or None for inputs it does not take: float64, or another width.

    Args:
        keys: (B, G, S, D).
        modality: (B, G, S).
    """
    b, g, s, d = keys.shape
    if keys.dtype.itemsize > 4 or d not in WIDTHS or s == 0:
        return None
    keys, modality = keys.contiguous(), modality.contiguous()
    inverse = torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32).clamp_(min=1e-12).reciprocal_()
    rho = torch.zeros(b, g, s, dtype=torch.float32, device=keys.device)
    _later[(triton.cdiv(s, LATER["BR"]), triton.cdiv(s, SPAN), b * g)](
        keys, inverse, modality, rho, s, SPAN, TEXT=TEXT, D=d, **LATER
    )
    return rho
