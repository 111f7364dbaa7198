# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""How much attention each candidate gets, without the map: the sums of `Candidates.attention_blocks` over probes.

One kernel finds the offset of every query's softmax, unless the layer's attention has left it, a second adds up the
columns, a tile of candidates at a time.

Shape legend: see `omnimem_train.memory.state`; N = H/G.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from omnimem_train.memory.selector import Candidates

WIDTHS = (64, 128)
OFFSETS = {"BS": 64, "num_warps": 8, "num_stages": 3}  # candidates at a time; layout of a program
COLUMNS = {"BS": 128, "BP": 128, "num_warps": 4, "num_stages": 2}  # candidates and queries at a time


@triton.jit
def _offsets(
    q_ptr, k_ptr, row_ptr, shift_ptr, S, P, N, scale, D: tl.constexpr, BP: tl.constexpr, BS: tl.constexpr
):  # fmt: skip
    """log2 of the sum of 2^logit of every query over what it sees."""
    i_tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d, p = tl.arange(0, D), i_tile * BP + tl.arange(0, BP)
    k_ptr += head // N * S * D
    q = tl.load(q_ptr + (head * P + p[:, None]) * D + d[None, :], mask=p[:, None] < P, other=0.0)
    row = tl.load(row_ptr + p, mask=p < P, other=-1).to(tl.int32)
    best = tl.full((BP,), -1e30, tl.float32)
    total = tl.zeros((BP,), tl.float32)
    for s in range(0, tl.minimum(tl.max(row, 0) + 1, S), BS):
        col = s + tl.arange(0, BS)
        k = tl.load(k_ptr + col[None, :] * D + d[:, None], mask=col[None, :] < S, other=0.0)
        x = tl.where(col[None, :] <= row[:, None], tl.dot(q, k) * scale, float("-inf"))
        new = tl.maximum(best, tl.max(x, 1))
        total = total * tl.exp2(best - new) + tl.sum(tl.exp2(x - new[:, None]), 1)
        best = new
    tl.store(shift_ptr + head * P + p, best + tl.log2(total), mask=p < P)


@triton.jit
def _weights(q_ptr, shift_ptr, k, p, d, P, scale, D: tl.constexpr):
    """(BS, BP) attention of queries `p` on keys `k`; 0 beyond the last query."""
    q = tl.load(q_ptr + p[None, :] * D + d[:, None], mask=p[None, :] < P, other=0.0)
    return tl.exp2(tl.dot(k, q) * scale - tl.load(shift_ptr + p, mask=p < P, other=float("inf"))[None, :])


@triton.jit
def _columns(
    q_ptr, k_ptr, row_ptr, shift_ptr, blind_ptr, out_ptr, S, P, N, scale,
    D: tl.constexpr, BP: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Of a tile of candidates: the first queries see none of them and are passed over, the last ones see all."""
    i_tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d, col = tl.arange(0, D), i_tile * BS + tl.arange(0, BS)
    k_ptr += head // N * S * D
    q_ptr += head * P * D
    shift_ptr += head * P
    k = tl.load(k_ptr + col[:, None] * D + d[None, :], mask=col[:, None] < S, other=0.0)
    total = tl.zeros((BS,), tl.float32)
    begin = tl.load(blind_ptr + 2 * i_tile) // BP * BP
    sighted = tl.cdiv(tl.load(blind_ptr + 2 * i_tile + 1), BP) * BP
    for start in range(begin, sighted, BP):
        p = start + tl.arange(0, BP)
        row = tl.load(row_ptr + p, mask=p < P, other=-1).to(tl.int32)
        weights = _weights(q_ptr, shift_ptr, k, p, d, P, scale, D)
        total += tl.sum(tl.where(col[:, None] <= row[None, :], weights, 0.0), 1)
    for start in range(sighted, P, BP):
        total += tl.sum(_weights(q_ptr, shift_ptr, k, start + tl.arange(0, BP), d, P, scale, D), 1)
    tl.store(out_ptr + head * S + col, total, mask=col < S)


def attention_sum(c: Candidates) -> Tensor | None:
    """(B, G, N, S) float32: attention each candidate gets, summed over the probes; None for inputs it does not take."""
    keys = c.tokens.keys
    b, g, s, d = keys.shape
    h, p = c.queries.shape[1:3]
    if keys.dtype.itemsize > 4 or c.queries.dtype != keys.dtype or d not in WIDTHS or p == 0 or s == 0:
        return None
    keys, queries, rows = keys.contiguous(), c.queries.contiguous(), c.query_rows.contiguous()
    total = torch.empty(b, g, h // g, s, dtype=torch.float32, device=keys.device)
    scale, block_p = c.scaling / math.log(2), (128 if p > 64 else 64 if p > 16 else 16)
    if c.log_sums is None:
        shift = torch.empty(b * h, p, dtype=torch.float32, device=keys.device)
        _offsets[(triton.cdiv(p, block_p), b * h)](
            queries, keys, rows, shift, s, p, h // g, scale, D=d, BP=block_p, **OFFSETS
        )
    else:
        shift = (c.log_sums.float() / math.log(2)).contiguous()
    first = torch.arange(0, s, COLUMNS["BS"], device=keys.device)
    blind = torch.searchsorted(rows, torch.stack([first, first + COLUMNS["BS"] - 1], -1), out_int32=True)
    _columns[(first.shape[0], b * h)](queries, keys, rows, shift, blind, total, s, p, h // g, scale, D=d, **COLUMNS)
    return total
