"""An importance that is learned: a linear reading of a token's layer input, one for each layer and modality.

Shape legend: see `omnimem_train.memory.state`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omnimem_train.memory.numeric import real
from omnimem_train.memory.state import AUDIO

WIDTH = 1024.0  # logits are scaled by WIDTH / E: a step of Adam then moves them alike, however wide the model is


def learned_logits(hidden: Tensor, modality: Tensor, weight: Tensor) -> Tensor:
    """Logarithm of the importance, up to a constant.

    Args:
        hidden: (B, S, E) layer inputs; each is scaled to a mean square of 1 first.
        modality: (B, S); text is read as picture, it is pinned anyway.
        weight: (2, E), for picture and for sound.

    Returns:
        (B, S), float32 or better.
    """
    x = hidden.to(real(hidden))
    x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    both = x @ weight.to(x.dtype).T * (WIDTH / x.shape[-1])
    return torch.where(modality == AUDIO, both[..., 1], both[..., 0])
