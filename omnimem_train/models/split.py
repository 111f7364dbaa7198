"""Attention on a memory and on the chunk itself, one after the other, put together exactly.

The fastest attention kernels for recent GPUs (cuDNN's on Hopper) know causal attention from the first key on and
attention on all keys, but not causal attention that ends at the last key, which a chunk after a memory needs. Softmax
over both is a weighted sum of softmax over each, with weights from the sums of exponentials. The backward pass of
either part, given output and sums of both together, gives that part's share of the gradients: nothing is approximated.

Shape legend: see `omnimem_train.memory.state`; M memory tokens, n new ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from omnimem_train import kernels

SHORTEST = 256
"""New tokens from which on two calls pay off on a GPU."""
NEWEST = (9, 0)  # compute capability from which on cuDNN's kernels are the faster ones


def takes(query: Tensor, n_memory: int) -> bool:
    """Whether `attend_split` is for these queries (B, H, n, D) after `n_memory` tokens."""
    if n_memory == 0:
        return False
    if not query.is_cuda:
        return query.device.type == "cpu"
    half = query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] in (64, 128)
    return half and query.shape[2] >= SHORTEST and torch.cuda.get_device_capability(query.device) >= NEWEST


def attend_split(
    query: Tensor, memory: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """(B, H, n, D): queries on all of a memory, and causally on the new tokens; and (B, H, n) without gradient, the
    logarithms of each query's sum of exponentials.

    Args:
        query: (B, H, n, D).
        memory: keys and values (B, G, M, D).
        new: keys and values (B, G, n, D).
        scale: factor before the softmax.
    """
    group = query.shape[1] // new[0].shape[1]
    if not query.is_cuda and group > 1:
        memory, new = ((k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)) for k, v in (memory, new))
    out, total = _Split.apply(query, *memory, *new, scale)
    return out, total.reshape(query.shape[:3])


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, old_key: Tensor, old_value: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        old, old_sum, old_rest = _part(query, old_key, old_value, False, scale)
        own, own_sum, own_rest = _part(query, key, value, True, scale)
        out, total = joined(old, old_sum, own, own_sum)
        ctx.save_for_backward(query, old_key, old_value, key, value, out, total)
        ctx.scale, ctx.rest = scale, (old_rest, own_rest)
        ctx.mark_non_differentiable(total)
        return out, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        query, old_key, old_value, key, value, out, total = ctx.saved_tensors
        old_rest, own_rest = ctx.rest
        given = (out, total, ctx.scale)
        d_query, d_old_key, d_old_value = _part_back(grad, query, old_key, old_value, False, *given, old_rest)
        more, d_key, d_value = _part_back(grad, query, key, value, True, *given, own_rest)
        return d_query + more, d_old_key, d_old_value, d_key, d_value, None


def joined(a: Tensor, a_sum: Tensor, b: Tensor, b_sum: Tensor) -> tuple[Tensor, Tensor]:
    """Two outputs (B, H, n, D) over different keys, with the logarithms of their sums of exponentials (B, H, n) or
    (B, H, n, 1), as one."""
    if a.is_cuda and kernels.reason_not_to() is None:
        from omnimem_train.kernels.layer import merge

        return merge(a, a_sum, b, b_sum)
    total = torch.logaddexp(a_sum, b_sum)
    weights = [torch.exp(s - total).view(*a.shape[:3], 1) for s in (a_sum, b_sum)]
    real = torch.promote_types(a.dtype, torch.float32)
    out = torch.empty_like(a).copy_(a.to(real) * weights[0] + b.to(real) * weights[1])
    return out, total


def _part(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor, Any]:
    """Output, log of the sum of exponentials, and what the backward pass of the same kernel wants besides."""
    if query.is_cuda:
        out, total, *rest, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, causal, False, scale=scale
        )
        return out, total, rest
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, total = op(query, key, value, 0.0, causal, scale=scale)
    return out, total, None


def _part_back(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    out: Tensor,
    total: Tensor,
    scale: float,
    rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    if query.is_cuda:
        cum_query, cum_key, n_query, n_key, seed, offset = rest
        return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            grad, query, key, value, out, total, seed, offset, None, cum_query, cum_key, n_query, n_key, 0.0, causal,
            scale=scale,
        )  # fmt: skip
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return op(grad, query, key, value, out, total, 0.0, causal, scale=scale)
