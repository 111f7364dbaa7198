# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Leave-one-out scores in four kernels; the map of probes and candidates is never written.

The numbers are those of `omnimem_train.memory.perturbation.Change.of_heads`, averaged over probes and heads:

1. `_attend`: for every query, part of the candidates at a time, the candidate with the largest logit, and the sums of
   weights and of weighted values of all others.
2. `_combine`: the parts together, giving for every query the offset of its softmax, its largest candidate with that
   one's exact norm, and what distances need of its output o: o^T G and o^T G o.
3. `_sizes`: v^T G v of every candidate and head.
4. `_score`: for some candidates, the mean of A / (1 - A) * ||v - o||_G over all queries and heads.

Products are in the precision of keys and values, with float32 sums. G is rounded to it once and used so in all three
terms, o^T G as a sum of two numbers of it, so that their differences hold.

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
PROGRAMS = 264  # parts are made until about so many programs run: two for each multiprocessor of an H200
# candidates and queries at a time, and how a program is laid out
ATTEND = {"BS": 64, "BP": 64, "num_warps": 4, "num_stages": 3}
COMBINE = {"BP": 16, "num_warps": 4}
SIZES = {"BS": 64, "num_warps": 4, "num_stages": 3}
SCORE = {"BS": 128, "BP": 32, "num_warps": 8, "num_stages": 2}


@triton.jit
def _logits(q, k_ptr, col, d, row, S, scale, D: tl.constexpr):
    """(BP, BS) logits in base 2 of queries at candidate rows `row` on keys `col`; -inf where they cannot see."""
    k = tl.load(k_ptr + col[None, :] * D + d[:, None], mask=col[None, :] < S, other=0.0)
    seen = (col[None, :] <= row[:, None]) & (col[None, :] < S)
    return tl.where(seen, tl.dot(q, k) * scale, float("-inf"))


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, row_ptr, best_ptr, rest_ptr, where_ptr, alone_ptr, S, P, N, part, scale,
    D: tl.constexpr, BP: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """A tile of the queries of a group, those of one head after those of another, on a part of the candidates."""
    i_part, i_tile, group = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    d, p = tl.arange(0, D), i_tile * BP + tl.arange(0, BP)
    inside = p < N * P
    k_ptr += group * S * D
    v_ptr += group * S * D
    q = tl.load(q_ptr + (group * N * P + p[:, None]) * D + d[None, :], mask=inside[:, None], other=0.0)
    row = tl.load(row_ptr + p % P, mask=inside, other=-1).to(tl.int32)
    start = i_part * part
    end = tl.minimum(tl.minimum(start + part, S), tl.max(row, 0) + 1)

    best = tl.full((BP,), float("-inf"), tl.float32)
    where = tl.full((BP,), -1, tl.int32)
    for s in range(start, end, BS):
        x = _logits(q, k_ptr, s + tl.arange(0, BS), d, row, S, scale, D)
        top, at = tl.max(x, 1, return_indices=True)
        where = tl.where(top > best, s + at, where)
        best = tl.maximum(best, top)

    base = tl.where(where >= 0, best, 0.0)
    rest = tl.zeros((BP,), tl.float32)
    alone = tl.zeros((BP, D), tl.float32)
    for s in range(start, end, BS):
        col = s + tl.arange(0, BS)
        x = _logits(q, k_ptr, col, d, row, S, scale, D)
        weight = tl.where(col[None, :] == where[:, None], 0.0, tl.exp2(x - base[:, None])).to(q.dtype)
        v = tl.load(v_ptr + col[:, None] * D + d[None, :], mask=col[:, None] < S, other=0.0)
        rest += tl.sum(weight.to(tl.float32), 1)
        alone = tl.dot(weight, v, alone)

    out = (i_part * tl.num_programs(2) + group) * N * P + p
    tl.store(best_ptr + out, best, mask=inside)
    tl.store(rest_ptr + out, rest, mask=inside)
    tl.store(where_ptr + out, where, mask=inside)
    tl.store(alone_ptr + out[:, None] * D + d[None, :], alone, mask=inside[:, None])


@triton.jit
def _through(x, gram):
    """(B, D) float32 times (D, D), `x` as a sum of two numbers of the precision of `gram`."""
    high = x.to(gram.dtype)
    return tl.dot((x - high.to(tl.float32)).to(gram.dtype), gram, tl.dot(high, gram))


@triton.jit
def _combine(
    best_ptr, rest_ptr, where_ptr, alone_ptr, v_ptr, gram_ptr,
    shift_ptr, top_ptr, exact_ptr, size_ptr, high_ptr, low_ptr, S, P, N, G, parts, heads,
    D: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    i_tile, head = tl.program_id(0), tl.program_id(1)
    d, p = tl.arange(0, D), i_tile * BP + tl.arange(0, BP)
    inside = p < P
    v_ptr += (head // N).to(tl.int64) * S * D
    here = head.to(tl.int64) * P + p

    best = tl.full((BP,), float("-inf"), tl.float32)
    top = tl.zeros((BP,), tl.int32)
    at = here
    for _ in range(parts):
        found = tl.load(best_ptr + at, mask=inside, other=float("-inf"))
        top = tl.where(found > best, tl.load(where_ptr + at, mask=inside, other=0), top)
        best = tl.maximum(best, found)
        at += heads * P
    best = tl.where(inside, best, 0.0)

    rest = tl.zeros((BP,), tl.float32)
    alone = tl.zeros((BP, D), tl.float32)
    at = here
    for _ in range(parts):
        weight = tl.exp2(tl.load(best_ptr + at, mask=inside, other=float("-inf")) - best)
        own = tl.load(where_ptr + at, mask=inside, other=-1)
        second = inside & (own >= 0) & (own != top)  # the largest of its part, but not of all
        v = tl.load(v_ptr + own[:, None] * D + d[None, :], mask=second[:, None], other=0.0).to(tl.float32)
        rest += weight * (tl.load(rest_ptr + at, mask=inside, other=0.0) + tl.where(second, 1.0, 0.0))
        others = tl.load(alone_ptr + at[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
        alone += weight[:, None] * (others + v)
        at += heads * P

    v = tl.load(v_ptr + top[:, None] * D + d[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    share = 1 / (1 + rest)
    output = (v + alone) * share[:, None]
    change = (v - alone / tl.maximum(rest, 1e-37)[:, None]) * share[:, None]
    in_layer = head % (N * G)
    gram = tl.load(gram_ptr + (in_layer * D + d[:, None]) * D + d[None, :])
    projected = _through(output, gram)
    exact = tl.sqrt(tl.maximum(tl.sum(_through(change, gram) * change, 1), 0.0))

    tl.store(shift_ptr + here, best + tl.log2(1 + rest), mask=inside)
    tl.store(top_ptr + here, top, mask=inside)
    tl.store(exact_ptr + here, exact, mask=inside)
    tl.store(size_ptr + here, tl.sum(projected * output, 1), mask=inside)
    high = projected.to(gram.dtype)
    tl.store(high_ptr + here[:, None] * D + d[None, :], high, mask=inside[:, None])
    tl.store(low_ptr + here[:, None] * D + d[None, :], projected - high.to(tl.float32), mask=inside[:, None])


@triton.jit
def _sizes(v_ptr, gram_ptr, out_ptr, S, N, G, D: tl.constexpr, BS: tl.constexpr):
    """v^T G v of a tile of candidates, one head of the group after the other."""
    group = tl.program_id(1).to(tl.int64)
    d, col = tl.arange(0, D), tl.program_id(0) * BS + tl.arange(0, BS)
    v = tl.load(v_ptr + (group * S + col[:, None]) * D + d[None, :], mask=col[:, None] < S, other=0.0)
    for head in range(group * N, (group + 1) * N):
        gram = tl.load(gram_ptr + (head % (N * G) * D + d[:, None]) * D + d[None, :])
        tl.store(out_ptr + head * S + col, tl.sum(tl.dot(v, gram) * v.to(tl.float32), 1), mask=col < S)


@triton.jit
def _score(
    q_ptr, k_ptr, v_ptr, row_ptr, seen_ptr, of_value_ptr, shift_ptr, top_ptr, exact_ptr, size_ptr, high_ptr, low_ptr,
    out_ptr, S, P, N, tiles, scale, D: tl.constexpr, BP: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Of a tile of candidates: the mean over all heads of the group and all queries, one tile of those at a time."""
    i_tile, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d, col = tl.arange(0, D), i_tile * BS + tl.arange(0, BS)
    at = group * S + col
    k = tl.load(k_ptr + at[:, None] * D + d[None, :], mask=col[:, None] < S, other=0.0)
    v = tl.load(v_ptr + at[:, None] * D + d[None, :], mask=col[:, None] < S, other=0.0)
    total = tl.zeros((BS,), tl.float32)
    for i in range(N * tiles):
        head, p = group * N + i // tiles, i % tiles * BP + tl.arange(0, BP)
        inside = p < P
        here = head * P + p
        cell, mask = here[None, :] * D + d[:, None], inside[None, :]
        row = tl.load(row_ptr + p, mask=inside, other=-1).to(tl.int32)
        shift = tl.load(shift_ptr + here, mask=inside, other=0.0)
        top = tl.load(top_ptr + here, mask=inside, other=-1)
        exact = tl.load(exact_ptr + here, mask=inside, other=0.0)
        size = tl.load(size_ptr + here, mask=inside, other=0.0)
        of_value = tl.load(of_value_ptr + head * S + col, mask=col < S, other=0.0)
        x = tl.dot(k, tl.load(q_ptr + cell, mask=mask, other=0.0)) * scale
        others = tl.maximum(tl.exp2(shift[None, :] - x) - 1, 1e-6)  # (1 - A) / A
        cross = tl.dot(v, tl.load(high_ptr + cell, mask=mask, other=0.0))
        cross = tl.dot(v, tl.load(low_ptr + cell, mask=mask, other=0.0), cross)
        distance = tl.sqrt(tl.maximum(of_value[:, None] - 2 * cross + size[None, :], 0.0))
        change = tl.where(col[:, None] == top[None, :], exact[None, :], distance / others)
        total += tl.sum(tl.where(col[:, None] <= row[None, :], change, 0.0), 1)
    seen = tl.load(seen_ptr + col, mask=col < S, other=1)
    tl.store(out_ptr + at, total / (N * tl.maximum(seen, 1)).to(tl.float32), mask=col < S)


def change(c: Candidates, gram: Tensor) -> Tensor | None:
    """(B, G, S) float32: mean change over the probes that see a candidate and over the heads of its group.

    Args:
        c: queries, keys and values of one precision, with D of `WIDTHS`.
        gram: (G, N, D, D) float32, W_h^T W_h.

    Returns:
        None for other inputs.
    """
    keys, values = c.tokens.keys, c.tokens.values
    b, g, s, d = keys.shape
    h, p = c.queries.shape[1:3]
    if keys.dtype.itemsize > 4 or c.queries.dtype != keys.dtype or d not in WIDTHS or p == 0 or s == 0:
        return None
    keys, values, queries = keys.contiguous(), values.contiguous(), c.queries.contiguous()
    gram, rows = gram.to(keys.dtype).contiguous(), c.query_rows.contiguous()
    scale, n = c.scaling / math.log(2), h // g
    block_p, block_s = min(ATTEND["BP"], max(16, triton.next_power_of_2(n * p))), ATTEND["BS"]
    tiles = triton.cdiv(n * p, block_p)
    parts = max(1, min(triton.cdiv(s, block_s), PROGRAMS // (tiles * b * g)))
    part = triton.cdiv(triton.cdiv(s, parts), block_s) * block_s
    parts = triton.cdiv(s, part)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=keys.device)

    best, rest, where = empty(parts, b * h, p), empty(parts, b * h, p), empty(parts, b * h, p, dtype=torch.int32)
    alone = empty(parts, b * h, p, d)
    _attend[(parts, tiles, b * g)](
        queries, keys, values, rows, best, rest, where, alone, s, p, n, part, scale, D=d, **ATTEND | {"BP": block_p}
    )  # fmt: skip
    shift, exact, size = empty(b * h, p), empty(b * h, p), empty(b * h, p)
    top = empty(b * h, p, dtype=torch.int32)
    high, low = empty(b * h, p, d, dtype=keys.dtype), empty(b * h, p, d, dtype=keys.dtype)
    _combine[(triton.cdiv(p, COMBINE["BP"]), b * h)](
        best, rest, where, alone, values, gram, shift, top, exact, size, high, low, s, p, n, g, parts, b * h,
        D=d, **COMBINE,
    )  # fmt: skip
    score, of_value = empty(b, g, s), empty(b * h, s)
    _sizes[(triton.cdiv(s, SIZES["BS"]), b * g)](values, gram, of_value, s, n, g, D=d, **SIZES)
    _score[(triton.cdiv(s, SCORE["BS"]), b * g)](
        queries, keys, values, rows, c.probes_that_see(), of_value, shift, top, exact, size, high, low,
        score, s, p, n, triton.cdiv(p, SCORE["BP"]), scale, D=d, **SCORE,
    )  # fmt: skip
    return score
