"""Products of which only the way back is wanted.

Where a layer is run anew to be differentiated, the result of its last product is of no use: a residual is added to it,
and what that gives was known before. The gradient of its input needs the weight and nothing of the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from omnimem_train.models.quantised import is_packed, unpacked


@contextmanager
def without_result(linear: nn.Module) -> Iterator[None]:
    """Inside, `linear` gives numbers without meaning, whose gradient goes where that of the product would.

    Only a frozen linear map, packed or not, is left out; one that is trained or has an adapter needs its input for the
    gradient of that, and runs as usual.
    """
    plain = type(linear) is nn.Linear or (is_packed(linear) and not hasattr(linear, "base_layer"))
    if not plain or any(p.requires_grad for p in linear.parameters()):
        yield
        return
    before = vars(linear).get("forward")
    linear.forward = lambda x: _NoResult.apply(x, linear)
    try:
        yield
    finally:
        if before is None:
            del linear.forward
        else:
            linear.forward = before


class _NoResult(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: nn.Module) -> Tensor:
        ctx.linear = linear
        kind = x.device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return x.new_empty(*x.shape[:-1], int(ctx.linear.out_features), dtype=cast)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ unpacked(ctx.linear).to(grad.dtype), None
