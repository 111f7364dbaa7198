"""Attention inside segments, for the towers: all segments of one length in one call.

The stock towers attend inside windows (pictures) or blocks of 2 s (sound) and, except with flash kernels, call their
attention once a segment and layer: over 7,000 calls for an hour of sound. Segments are nearly always equally long, so
they fit one batched call. `is_flash_attention_requested` of transformers looks for "flash" in the name of an attention
function; with such a name the towers hand over all segments at once, with their borders.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "omnimem_flash_segments"


def attend_segments(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[Tensor, None]:
    """Full attention inside each segment, with the signature transformers asks for.

    Args:
        module: the attention module that calls; unused.
        query, key, value: (1, H, L, D), the segments one after the other.
        attention_mask: must be None: the borders say all.
        scaling: factor before the softmax, D ** -0.5 when None.
        dropout: of attention weights.
        cu_seq_lens_q: (segments + 1,) borders, from 0 to L.
        max_length_q: length of the longest segment.

    Returns:
        (1, L, H, D), and None in place of attention weights.
    """
    if attention_mask is not None:
        raise ValueError(f"attention {NAME!r} takes no mask, it was given one of shape {attention_mask.shape}")
    heads, length, width = query.shape[1:]
    segments = cu_seq_lens_q.shape[0] - 1
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling}
    if segments * max_length_q == length:
        q, k, v = (x.view(heads, segments, max_length_q, width).transpose(0, 1) for x in (query, key, value))
        out = scaled_dot_product_attention(q, k, v, **options)
        return out.transpose(1, 2).reshape(1, length, heads, width), None
    sizes = (cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]).tolist()
    parts = zip(*(x.split(sizes, dim=2) for x in (query, key, value)), strict=True)
    out = torch.cat([scaled_dot_product_attention(q, k, v, **options) for q, k, v in parts], dim=2)
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, attend_segments)
