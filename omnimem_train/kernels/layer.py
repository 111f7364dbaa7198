# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The small steps of a decoder layer in one pass over memory each, with their gradients: SwiGLU and rotation.

A stock layer writes every intermediate result out. Here inputs are read once, sums and products are float32, and the
result is rounded once. What is kept for the backward pass is the input alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # numbers of one SwiGLU program
ROTATE_WARPS = 4


@triton.jit
def _swiglu(gate_ptr, up_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, gate / (1 + tl.exp(-gate)) * up, mask=at < n)


@triton.jit
def _swiglu_back(grad_ptr, gate_ptr, up_ptr, d_gate_ptr, d_up_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(grad_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    share = 1 / (1 + tl.exp(-gate))
    tl.store(d_gate_ptr + at, grad * up * share * (1 + gate * (1 - share)), mask=at < n)
    tl.store(d_up_ptr + at, grad * gate * share, mask=at < n)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        _swiglu[(triton.cdiv(gate.numel(), BLOCK),)](gate, up, out, gate.numel(), BLOCK=BLOCK)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        _swiglu_back[(triton.cdiv(gate.numel(), BLOCK),)](
            grad.contiguous(), gate, up, d_gate, d_up, gate.numel(), BLOCK=BLOCK
        )
        return d_gate, d_up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of two tensors of one shape and precision."""
    return _SwiGLU.apply(gate.contiguous(), up.contiguous())


@triton.jit
def _rotate(
    x_ptr, cos_ptr, sin_ptr, out_ptr, n, x_b, x_h, x_n, out_b, out_h, out_n, sign,
    H: tl.constexpr, PADDED: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One token: all heads, channels i and i + HALF turned by the angle of frequency i."""
    token = tl.program_id(0).to(tl.int64)
    batch, place = token // n, token % n
    head, i = tl.arange(0, PADDED)[:, None], tl.arange(0, HALF)[None, :]
    inside = head < H
    cos = tl.load(cos_ptr + token * 2 * HALF + i).to(tl.float32)
    sin = tl.load(sin_ptr + token * 2 * HALF + i).to(tl.float32) * sign
    source = x_ptr + batch * x_b + place * x_n + head * x_h + i
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    target = out_ptr + batch * out_b + place * out_n + head * out_h + i
    tl.store(target, first * cos - second * sin, mask=inside)
    tl.store(target + HALF, second * cos + first * sin, mask=inside)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    b, h, n, d = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = torch.empty_like(x)
    _rotate[(b * n,)](
        x, cos, sin, out, n, x.stride(0), x.stride(1), x.stride(2), out.stride(0), out.stride(1), out.stride(2), sign,
        H=h, PADDED=triton.next_power_of_2(h), HALF=d // 2, num_warps=ROTATE_WARPS,
    )  # fmt: skip
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1.0), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys (B, H, n, D) turned by (B, n, D) cos and sin, whose second halves repeat the first. D is twice a
    power of two; the strides of `x` stay."""
    size = (x.shape[0], x.shape[2], x.shape[3])
    return _Rotate.apply(x, cos.expand(size).contiguous(), sin.expand(size).contiguous())


@triton.jit
def _merge(
    a_ptr, a_sum_ptr, b_ptr, b_sum_ptr, out_ptr, sum_ptr, n, a_b, a_h, a_n, b_b, b_h, b_n, out_b, out_h, out_n,
    H: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One token: all heads."""
    token = tl.program_id(0).to(tl.int64)
    batch, place = token // n, token % n
    heads, d = tl.arange(0, PADDED), tl.arange(0, D)[None, :]
    inside = heads < H
    at = (batch * H + heads) * n + place
    a_sum = tl.load(a_sum_ptr + at, mask=inside, other=0.0)
    b_sum = tl.load(b_sum_ptr + at, mask=inside, other=0.0)
    largest = tl.maximum(a_sum, b_sum)
    a_share, b_share = tl.exp(a_sum - largest), tl.exp(b_sum - largest)
    both = a_share + b_share
    head = heads[:, None]
    a = tl.load(a_ptr + batch * a_b + place * a_n + head * a_h + d, mask=head < H, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + batch * b_b + place * b_n + head * b_h + d, mask=head < H, other=0.0).to(tl.float32)
    out = a * (a_share / both)[:, None] + b * (b_share / both)[:, None]
    tl.store(out_ptr + batch * out_b + place * out_n + head * out_h + d, out, mask=head < H)
    tl.store(sum_ptr + at, largest + tl.log(both), mask=inside)


def merge(a: Tensor, a_sum: Tensor, b: Tensor, b_sum: Tensor) -> tuple[Tensor, Tensor]:
    """See `omnimem_train.models.split.joined`; the result lies in memory as (B, n, H, D)."""
    batch, heads, n, d = a.shape
    a, b = (x if x.stride(-1) == 1 else x.contiguous() for x in (a, b))
    a_sum, b_sum = a_sum.contiguous(), b_sum.contiguous()
    out = torch.empty(batch, n, heads, d, dtype=a.dtype, device=a.device).transpose(1, 2)
    total = torch.empty_like(a_sum)
    strides = [x.stride(i) for x in (a, b, out) for i in range(3)]
    _merge[(batch * n,)](
        a, a_sum, b, b_sum, out, total, n, *strides, H=heads, PADDED=triton.next_power_of_2(heads), D=d,
        num_warps=ROTATE_WARPS,
    )  # fmt: skip
    return out, total
