"""The attention call of the decoder layers, registered with transformers under the name "omnimem".

Two things go wrong with the stock calls when a stream is run chunk by chunk: they build a dense (queries x keys) mask
as soon as there are fewer queries than keys, and they offer no place to put remembered keys in front. So this package
owns the call. It is registered through the public `AttentionInterface`; nothing of transformers is replaced, and a
model uses it only when its text configuration names it.

Shape legend: see `omnimem_train.memory.state`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from omnimem_train.errors import UserError
from omnimem_train.models.interface import Tap
from omnimem_train.models.split import attend_split, takes

NAME = "omnimem"
KERNELS = ("sdpa", "split", "eager")


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    tap: Tap | None = None,
    kernel: str = "sdpa",
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of new tokens on a memory and on themselves, with the signature transformers asks for.

    Args:
        module: the attention module that calls; unused.
        query: (B, H, n, D), rotated.
        key, value: (B, G, n, D), of the new tokens; without a tap they may also hold the past (a stock cache), and
            queries are then the last n of them.
        attention_mask: must be None; the registered mask function sees to that.
        scaling: factor before the softmax, D ** -0.5 when None.
        dropout: must be 0; dropped attention would make what a selector sees differ from what was used.
        tap: where memory comes from and new queries, keys and values go to; None for a stock forward pass.
        kernel: "sdpa"; "split": memory and new tokens one after the other, see `omnimem_train.models.split`, and "sdpa"
            where that does not apply; or "eager": the plain formula with a softmax in at least float32, as a reference.

    Returns:
        (B, n, H, D) contiguous, and None in place of attention weights.
    """
    if attention_mask is not None:
        raise ValueError(f"attention {NAME!r} takes no dense mask, it was given one of shape {attention_mask.shape}")
    if dropout:
        raise ValueError(f"attention {NAME!r} has no dropout, it was asked for {dropout}")
    mask, parted = None, False
    if tap is not None:
        tap.queries, tap.keys, tap.values = query, key, value
        past = tap.memory if tap.memory is not None and tap.memory.n_tokens > 0 else None
        parted = kernel == "split" and tap.mask is None and past is not None and takes(query, past.n_tokens)
        if past is not None and not parted and not (tap.unread and tap.states_only):
            key, value = torch.cat([past.keys, key], dim=2), torch.cat([past.values, value], dim=2)
        if past is None or key is not tap.keys:
            tap.joined = key, value
        if tap.states_only:
            return query.transpose(1, 2).contiguous(), None  # of the right shape, and read by nobody
        if tap.mask is not None:
            n_memory = key.shape[2] - query.shape[2]
            mask = torch.nn.functional.pad(tap.mask, (n_memory, 0), value=True)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if parted:
        assert tap is not None and tap.memory is not None and tap.keys is not None and tap.values is not None
        memory = tap.memory.keys, tap.memory.values
        out, tap.sums = attend_split(query, memory, (tap.keys, tap.values), scale)
    else:
        out = (_eager if kernel == "eager" else _sdpa)(query, key, value, mask, scale)
    return out.transpose(1, 2).contiguous(), None


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(B, H, n, D) through the fused kernels; on a GPU no path without `mask` builds an (n, S) tensor."""
    # On a GPU the flash kernel alone reads grouped heads, and only in half precision and without a mask; the others
    # would fall back to the kernel that writes out all attention weights.
    grouped = not query.is_cuda or (mask is None and query.dtype in (torch.float16, torch.bfloat16))
    if not grouped:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    n, total = query.shape[2], key.shape[2]
    options: dict[str, Any] = {"scale": scale, "enable_gqa": grouped}
    if mask is not None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)
    if n == 1:
        return scaled_dot_product_attention(query, key, value, **options)
    if n == total:
        return scaled_dot_product_attention(query, key, value, is_causal=True, **options)
    if query.is_cuda:
        return scaled_dot_product_attention(query, key, value, attn_mask=causal_lower_right(n, total), **options)
    return scaled_dot_product_attention(query, key, value, attn_mask=_lower_right(n, total, query.device), **options)


def _eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(B, H, n, D) by the formula."""
    b, g, total, d = key.shape
    n = query.shape[2]
    real = torch.promote_types(query.dtype, torch.float32)
    grouped = query.reshape(b, g, -1, n, d)
    logits = torch.einsum("bghnd,bgsd->bghns", grouped.to(real), key.to(real)) * scale
    visible = _lower_right(n, total, query.device) if mask is None else mask
    weights = logits.masked_fill(~visible, -math.inf).softmax(-1)
    return torch.einsum("bghns,bgsd->bghnd", weights, value.to(real)).reshape(b, -1, n, d).to(query.dtype)


def _lower_right(n: int, total: int, device: torch.device) -> Tensor:
    """(n, total) bool: query i sees keys 0 to total - n + i."""
    return torch.ones(n, total, dtype=torch.bool, device=device).tril(total - n)


def no_mask(
    *, q_length: int, kv_length: int, q_offset: Any = 0, attention_mask: Tensor | None = None, **_: Any
) -> None:
    """The mask function registered with `attend`: it never builds one, and refuses what would need one.

    Raises:
        UserError: padded input, or a cache longer than what it holds (a static cache).
    """
    if attention_mask is not None and not bool(attention_mask[:, :kv_length].all()):
        raise UserError(
            "padded input reached a model that was loaded for streaming",
            cause=f"attention {NAME!r} builds no mask and would attend to the padding",
            remedy="pass sequences of equal length, or one at a time",
        )
    if int(q_offset) + q_length != kv_length:
        raise UserError(
            f"a cache of {kv_length} places holds {int(q_offset) + q_length} tokens",
            cause=f"attention {NAME!r} takes every place for a token; a static cache has empty ones",
            remedy="use a dynamic cache",
        )


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, no_mask)
