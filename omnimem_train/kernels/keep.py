# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The best of each modality in one kernel, without sorting; `omnimem_train.memory.selector.choose` does it with masks.

Scores become whole numbers of the same order. The `count`-th largest is found bit by bit, ties go to the later token,
and a running sum of what is kept gives each kept token its place.

Shape legend: see `omnimem_train.memory.state`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from omnimem_train.memory.state import TEXT

LARGEST = 32768  # candidates of one program


@triton.jit
def _ordered(score):
    """float32 -> uint32 above 0 in the same order; -inf is the lowest finite number, -0 is 0."""
    finite = tl.where(score == 0.0, 0.0, tl.maximum(score, -3.4028234663852886e38))
    bits = finite.to(tl.int32, bitcast=True)
    # the bits of negative numbers run backwards
    ordered = tl.where(bits < 0, ~bits, bits | -2147483648)
    return ordered.to(tl.uint32, bitcast=True)


@triton.jit
def _keep(
    score_ptr, modality_ptr, count_ptr, taken_ptr, rows_ptr, S, K, members,
    TEXT: tl.constexpr, BS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Mark the best `count` candidates whose modality is among the bits of `members`; the last group writes rows."""
    head = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BS)
    inside = col < S
    kind = tl.load(modality_ptr + head * S + col, mask=inside, other=31).to(tl.int32)
    taken = (kind == TEXT) & inside
    if not FIRST:
        taken = tl.load(taken_ptr + head * S + col, mask=inside, other=0) != 0
    count = tl.load(count_ptr + head).to(tl.int32)
    is_member = inside & (((members >> kind) & 1) != 0) & (taken == 0)
    rank = _ordered(tl.load(score_ptr + head * S + col, mask=inside, other=0.0))
    rank = tl.where(is_member, rank, 0)

    least = tl.full((), 0, tl.uint32)
    bit = tl.full((), 2147483648, tl.uint32)
    for _ in range(32):
        tried = least | bit
        least = tl.where(tl.sum((rank >= tried).to(tl.int32), 0) >= count, tried, least)
        bit = bit >> 1
    above = is_member & (rank > least)
    tie = is_member & (rank == least)
    ties = tl.cumsum(tie.to(tl.int32), 0)
    wanted = count - tl.sum(above.to(tl.int32), 0)
    taken = taken | above | (tie & (ties > tl.sum(tie.to(tl.int32), 0) - wanted))
    if LAST:
        place = tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(rows_ptr + head * K + place, col.to(tl.int64), mask=taken & (place < K))
    else:
        tl.store(taken_ptr + head * S + col, taken.to(tl.int8), mask=inside)


def keep(score: Tensor, modality: Tensor, groups: list[tuple[tuple[int, ...], Tensor]], n: int) -> Tensor | None:
    """(B, G, n) int64 rows, ascending: all text and the best of each group of modalities, the later token in a tie.

    Args:
        score: (B, G, S) float32, not NaN.
        modality: (B, G, S) int8.
        groups: modalities and (B, G) int64 counts, served in order; no count exceeds what its group still has.
        n: tokens kept in all, text included.

    Returns:
        None for other precisions, more candidates than one program takes, or no group.
    """
    b, g, s = score.shape
    if score.dtype != torch.float32 or not 0 < s <= LARGEST or not groups or n == 0:
        return None
    score, modality = score.contiguous(), modality.contiguous()
    rows = torch.empty(b, g, n, dtype=torch.int64, device=score.device)
    taken = torch.empty(b, g, s if len(groups) > 1 else 0, dtype=torch.int8, device=score.device)
    block = max(16, triton.next_power_of_2(s))
    for i, (kinds, count) in enumerate(groups):
        _keep[(b * g,)](
            score, modality, count.expand(b, g).contiguous(), taken, rows, s, n, sum(1 << kind for kind in set(kinds)),
            TEXT=TEXT, BS=block, FIRST=i == 0, LAST=i == len(groups) - 1, num_warps=min(16, max(4, block // 512)),
        )  # fmt: skip
    return rows
