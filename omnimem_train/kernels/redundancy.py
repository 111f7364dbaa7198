# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The costly steps of `omnimem_train.memory.redundancy`: cosines of tokens with one other each, in one kernel, and rho
(`later_key`) without the map of all pairs of keys, in three.

For rho keys are compared within their modality alone, so they are parted first:

1. `_places`: the place of every token among those of its modality.
2. `_part`: keys in that order, with one over their length.
3. `_later`: of tiles of pairs of them the largest cosine.

Shape legend: see `omnimem_train.memory.state`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from omnimem_train.memory.state import AUDIO, VISUAL

WIDTHS = (64, 128)
SPAN = 1024  # columns of one program, a multiple of the rows of a tile
AT_ONCE = 4096  # tokens whose places are found at a time
PART = {"BS": 64, "num_warps": 4}
WIDEST = 16384  # numbers of a row of `earlier_cosine`
LATER = {"BR": 128, "BC": 128, "num_warps": 4, "num_stages": 2}  # rows and columns at a time; layout of a program


@triton.jit
def _places(
    modality_ptr, place_ptr, count_ptr, S, VISUAL: tl.constexpr, AUDIO: tl.constexpr, BS: tl.constexpr
):  # fmt: skip
    """Of one head: places among the visual tokens from 0 on, among those of sound from S on, -1 for others."""
    head = tl.program_id(0).to(tl.int64)
    n_visual, n_audio = 0, 0
    for s in range(0, S, BS):
        col = s + tl.arange(0, BS)
        kind = tl.load(modality_ptr + head * S + col, mask=col < S, other=-1)
        visual, audio = (kind == VISUAL).to(tl.int32), (kind == AUDIO).to(tl.int32)
        place = tl.where(visual != 0, n_visual + tl.cumsum(visual, 0) - 1, -1)
        place = tl.where(audio != 0, S + n_audio + tl.cumsum(audio, 0) - 1, place)
        tl.store(place_ptr + head * S + col, place, mask=col < S)
        n_visual += tl.sum(visual, 0)
        n_audio += tl.sum(audio, 0)
    tl.store(count_ptr + 2 * head, n_visual)
    tl.store(count_ptr + 2 * head + 1, n_audio)


@triton.jit
def _part(
    k_ptr, place_ptr, parted_ptr, inverse_ptr, origin_ptr, rho_ptr, S, D: tl.constexpr, BS: tl.constexpr
):  # fmt: skip
    """Keys and one over their length put in their places, and where each came from; rho is 0 so far."""
    head = tl.program_id(1).to(tl.int64)
    d, col = tl.arange(0, D), tl.program_id(0) * BS + tl.arange(0, BS)
    here = head * S + col
    k = tl.load(k_ptr + here[:, None] * D + d[None, :], mask=col[:, None] < S, other=0.0)
    place = tl.load(place_ptr + here, mask=col < S, other=-1)
    length = tl.sqrt(tl.sum(k.to(tl.float32) * k.to(tl.float32), 1))
    there, put = 2 * head * S + place, place >= 0
    tl.store(parted_ptr + there[:, None] * D + d[None, :], k, mask=put[:, None])
    tl.store(inverse_ptr + there, 1 / tl.maximum(length, 1e-12), mask=put)
    tl.store(origin_ptr + there, col, mask=put)
    tl.store(rho_ptr + here, tl.zeros((BS,), tl.float32), mask=col < S)


@triton.jit
def _cosines(own, k_ptr, inverse_ptr, col, d, count, D: tl.constexpr):
    """(BR, BC) products of keys with those at `col`, over the length of the latter; 0 beyond the last."""
    other = tl.load(k_ptr + col[None, :] * D + d[:, None], mask=col[None, :] < count, other=0.0)
    return tl.dot(own, other) * tl.load(inverse_ptr + col, mask=col < count, other=0.0)[None, :]


@triton.jit
def _later(
    k_ptr, inverse_ptr, origin_ptr, count_ptr, rho_ptr, S, span,
    D: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The largest cosine of a tile of keys with those of a span that come later, into `rho` by atomic maximum."""
    first, part = tl.program_id(0) * BR, tl.program_id(2).to(tl.int64)
    count = tl.load(count_ptr + part)
    start, end = tl.maximum(tl.program_id(1) * span, first), tl.minimum((tl.program_id(1) + 1) * span, count)
    if start < end:
        d, row = tl.arange(0, D), first + tl.arange(0, BR)
        k_ptr += part * S * D
        inverse_ptr += part * S
        own = tl.load(k_ptr + row[:, None] * D + d[None, :], mask=row[:, None] < count, other=0.0)
        largest = tl.zeros((BR,), tl.float32)
        if start == first:
            for s in range(first, tl.minimum(first + BR, end), BC):
                col = s + tl.arange(0, BC)
                found = _cosines(own, k_ptr, inverse_ptr, col, d, count, D)
                largest = tl.maximum(largest, tl.max(tl.where(col[None, :] > row[:, None], found, 0.0), 1))
            start += BR
        for s in range(start, end, BC):
            found = _cosines(own, k_ptr, inverse_ptr, s + tl.arange(0, BC), d, count, D)
            largest = tl.maximum(largest, tl.max(found, 1))
        cosine = largest * tl.load(inverse_ptr + row, mask=row < count, other=0.0)
        origin = tl.load(origin_ptr + part * S + row, mask=row < count, other=0)
        tl.atomic_max(rho_ptr + part // 2 * S + origin, tl.minimum(cosine, 1.0), mask=row < count)


def later_key(keys: Tensor, modality: Tensor) -> Tensor | None:
    """(B, G, S) float32 in [0, 1], or None for inputs it does not take: float64, or another width.

    Args:
        keys: (B, G, S, D).
        modality: (B, G, S).
    """
    b, g, s, d = keys.shape
    if keys.dtype.itemsize > 4 or d not in WIDTHS or s == 0:
        return None
    assert SPAN % LATER["BR"] == 0, "a span must not begin within a tile"
    keys, modality = keys.contiguous(), modality.contiguous()

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=keys.device)

    place, count, origin = empty(b * g, s), empty(b * g, 2), empty(b * g, 2, s)
    _places[(b * g,)](modality, place, count, s, VISUAL=VISUAL, AUDIO=AUDIO, BS=AT_ONCE, num_warps=8)
    parted, inverse = empty(b * g, 2, s, d, dtype=keys.dtype), empty(b * g, 2, s, dtype=torch.float32)
    rho = empty(b, g, s, dtype=torch.float32)
    _part[(triton.cdiv(s, PART["BS"]), b * g)](keys, place, parted, inverse, origin, rho, s, D=d, **PART)
    _later[(triton.cdiv(s, LATER["BR"]), triton.cdiv(s, SPAN), 2 * b * g)](
        parted, inverse, origin, count, rho, s, SPAN, D=d, **LATER
    )
    return rho


@triton.jit
def _earlier(x_ptr, earlier_ptr, out_ptr, S, W, D: tl.constexpr):
    """The cosine of one row of W numbers with the one named for it."""
    row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d = tl.arange(0, D)
    other = tl.load(earlier_ptr + head * S + row)
    inside = d < tl.where(other >= 0, W, 0)
    x = tl.load(x_ptr + (head * S + row) * W + d, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(x_ptr + (head * S + other) * W + d, mask=inside, other=0.0).to(tl.float32)
    lengths = tl.maximum(tl.sqrt(tl.sum(x * x, 0)), 1e-12) * tl.maximum(tl.sqrt(tl.sum(y * y, 0)), 1e-12)
    tl.store(out_ptr + head * S + row, tl.sum(x * y, 0) / lengths)


def earlier_cosine(x: Tensor, earlier: Tensor) -> Tensor | None:
    """(B, G, S) float32, or None for inputs it does not take: float64, or rows too wide.

    Args:
        x: (B, G, S, D).
        earlier: (B, G, S) int64, a row of the same stream and head; where it is negative the cosine is 0.
    """
    b, g, s, width = x.shape
    if x.dtype.itemsize > 4 or width > WIDEST or s == 0:
        return None
    x, earlier = x.contiguous(), earlier.contiguous()
    cosine = torch.empty(b, g, s, dtype=torch.float32, device=x.device)
    _earlier[(s, b * g)](x, earlier, cosine, s, width, D=triton.next_power_of_2(width), num_warps=8)
    return cosine
