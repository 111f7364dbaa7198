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
