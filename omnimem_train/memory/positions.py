"""Rotary positions of a memory: rotating a key further, and closing the gaps that eviction leaves.

A rotary embedding turns each pair of channels by an angle that is linear in the position, so a key at position p turned
by the angle of (q - p) equals the key computed at q. With three axes (time, row, column: M-RoPE, Qwen2-VL,
arXiv 2409.12191) every frequency belongs to one axis.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from omnimem_train.memory.state import VISUAL, LayerMemory


@dataclass(frozen=True)
class Rotary:
    """How a model rotates keys.

    Attributes:
        inverse_frequencies: (D/2,) angle per unit of position.
        axis: (D/2,) int64, which of (time, row, column) turns each frequency.

    Channels i and i + D/2 form a pair (the "half-split" layout of Llama, Qwen and most others).
    """

    inverse_frequencies: Tensor
    axis: Tensor

    def angles(self, positions: Tensor) -> Tensor:
        """(..., 3) positions (or differences) -> (..., D/2) angles, in the frequencies' precision, at least float32."""
        frequencies = self.inverse_frequencies.to(positions.device)
        if frequencies.dtype not in (torch.float32, torch.float64):
            frequencies = frequencies.float()
        return positions[..., self.axis.to(positions.device)].to(frequencies.dtype) * frequencies

    def turn(self, keys: Tensor, by: Tensor) -> Tensor:
        """Keys (..., D) turned by the angle of `by` (..., 3), computed in at least float32. Differentiable."""
        angle = self.angles(by)
        return _rotated(keys, angle.cos(), angle.sin())

    def move(self, keys: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """Keys (..., D) that are rotated to positions `old` (..., 3), rotated to `new` instead. Differentiable.

        In float32 an angle far into a stream is itself rounded (by 0.003 at 90,000), for the stored key and for a key
        computed at `new` alike. So the two rounded angles are combined, rather than rounding their difference anew: the
        result is the key that the model would compute at `new`, however far the move.
        """
        old_angle, new_angle = self.angles(old), self.angles(new)
        old_cos, old_sin, new_cos, new_sin = old_angle.cos(), old_angle.sin(), new_angle.cos(), new_angle.sin()
        return _rotated(keys, new_cos * old_cos + new_sin * old_sin, new_sin * old_cos - new_cos * old_sin)


def compact(memory: LayerMemory, rotary: Rotary, max_gap: int = 1) -> LayerMemory:
    """Close the temporal gaps between kept tokens and move their keys there.

    Tokens keep their order. Going along a head's tokens by temporal position, a step of more than `max_gap` becomes
    `max_gap`; tokens of one moment stay at one moment. Row and column of a picture token stay (they are offsets in the
    frame); for text and sound all three axes move together, as the models number them.

    StreamingLLM (arXiv 2309.17453) renumbers kept tokens 0, 1, 2, ... in the cache; this is the same idea for three
    axes, with `max_gap` = 1, without renumbering within a frame. A key is rounded to its precision each time it moves.

    Returns:
        The memory with `positions` and `keys` updated; unchanged where there was no larger step.
    """
    old = memory.positions
    time, order = old[..., 0].sort(dim=-1, stable=True)
    step = torch.diff(time, dim=-1).clamp(max=max_gap)
    moved = torch.cat([time[..., :1], step], dim=-1).cumsum(-1)
    new_time = torch.empty_like(moved).scatter_(-1, order, moved)
    shift = new_time - old[..., 0]
    flat = memory.modality != VISUAL
    new = old + torch.stack([shift, shift * flat, shift * flat], dim=-1)
    moved_keys = torch.where((shift == 0).unsqueeze(-1), memory.keys, rotary.move(memory.keys, old, new))
    return replace(memory, keys=moved_keys, positions=new)


def end(memory: LayerMemory) -> Tensor:
    """(B,) int64: the first free temporal position after a memory, over all its heads; 0 for an empty one."""
    if memory.n_tokens == 0:
        return torch.zeros(memory.keys.shape[0], dtype=torch.int64, device=memory.keys.device)
    return memory.positions[..., 0].amax(dim=(1, 2)) + 1


def _rotated(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = keys.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(keys.dtype)
