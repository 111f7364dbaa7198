"""InfiniPot-V's rule: what differs from the present, and what has strong values.

Shape legend: see `omnimem_train.memory.state`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from omnimem_train.memory.numeric import best, real
from omnimem_train.memory.options import one_of, within
from omnimem_train.memory.redundancy import ScoringSelector, ceiling
from omnimem_train.memory.selector import Candidates, Scored, register
from omnimem_train.memory.state import AUDIO, VISUAL


@dataclass(frozen=True)
class Frames:
    """Where the tokens of one modality stand in time and picture, per stream and kv head.

    Attributes:
        members: (B, G, S) bool, tokens of the modality.
        frame: (B, G, S) int64, number of the moment a member belongs to, counting only moments that are still there.
        n_frames: (B, G) int64.
        row, column: (B, G, S) int64 place in the picture from 0 (0 for sound).
        rows, columns: size of the picture; 1 x 1 for sound.
    """

    members: Tensor
    frame: Tensor
    n_frames: Tensor
    row: Tensor
    column: Tensor
    rows: int
    columns: int

    @property
    def slot(self) -> Tensor:
        """(B, G, S) place in the picture as one number."""
        return self.row * self.columns + self.column


def frames_of(c: Candidates, modality: int, moving: bool) -> Frames:
    """Moments of `modality` from the temporal positions; for pictures, places from rows and columns.

    Args:
        moving: rows and columns count from their frame's temporal position (Qwen3-VL) instead of from one origin.
    """
    members = c.tokens.modality == modality
    time = c.tokens.positions[..., 0]
    latest = time.masked_fill(~members, -1).cummax(dim=-1).values
    before = functional.pad(latest, (1, 0), value=-1)[..., :-1]
    frame = (members & (time > before)).cumsum(dim=-1) - 1
    n_frames = frame.amax(dim=-1) + 1 if c.n else frame.new_zeros(frame.shape[:2])
    if modality == AUDIO:
        place = torch.zeros_like(frame)
        return Frames(members, frame, n_frames, place, place, 1, 1)
    place = c.tokens.positions[..., 1:] - (time.unsqueeze(-1) if moving else 0)
    outside = ~members.unsqueeze(-1)
    far = torch.iinfo(torch.int64).max
    origin = place.masked_fill(outside, far).amin(dim=(1, 2), keepdim=True)  # of each stream
    place = (place - origin).masked_fill(outside, 0)
    rows, columns = (place.amax(dim=(0, 1, 2)) + 1).tolist()
    return Frames(members, frame, n_frames, place[..., 0], place[..., 1], rows, columns)


def novelty(keys: Tensor, frames: Frames, n_reference: Tensor) -> Tensor:
    """Minus the mean cosine of each key with the keys at the same place in the newest frames.

    Args:
        keys: (B, G, S, D), as cached.
        n_reference: (B, G) how many newest frames are the reference; frames that lost that place do not count, and
            where all did, the cosine is taken as 0.

    Returns:
        (B, G, S) in [-1, 1]; only those of members outside the reference mean anything.
    """
    keys = keys.to(real(keys))
    keys = keys / (keys.norm(dim=-1, keepdim=True) + 1e-9)
    reference = in_reference(frames, n_reference)
    slot = frames.slot
    b, g, _, d = keys.shape
    total = torch.zeros(b, g, frames.rows * frames.columns, d, dtype=keys.dtype, device=keys.device)
    total = total.scatter_add(2, slot.unsqueeze(-1).expand_as(keys), keys * reference.unsqueeze(-1))
    count = torch.zeros(total.shape[:3], dtype=keys.dtype, device=keys.device)
    count = count.scatter_add(2, slot, reference.to(keys.dtype))
    mean = total / count.clamp(min=1).unsqueeze(-1)
    return -(keys * mean.gather(2, slot.unsqueeze(-1).expand_as(keys))).sum(-1)


def in_reference(frames: Frames, n_reference: Tensor) -> Tensor:
    """(B, G, S) bool: members of the newest `n_reference` (B, G) frames."""
    return frames.members & (frames.frame >= (frames.n_frames - n_reference).unsqueeze(-1))


def pooled(score: Tensor, frames: Frames, layer: int, n_layers: int) -> Tensor:
    """Value norms (B, G, S) averaged over neighbours, over less of them the deeper the layer; zeros for non-members.

    The first quarter of the layers averages over frames, rows and columns (width 7), the second over rows and columns
    (5), the third over neighbours in the token line (3), the last not at all; the width shrinks to what the picture
    holds. The divisor is always the full window, so borders lose score. Where earlier selection left holes, the mean of
    the neighbours that are there stands in for them; on a complete grid that changes nothing.
    """
    level = min(3, layer // max(1, n_layers // 4))
    score = score.masked_fill(~frames.members, 0)
    if level == 3:
        return score
    if level == 2:
        return _pooled_line(score, frames.members)
    n_frames = int(frames.n_frames.amax())
    width = min(7 if level == 0 else 5, n_frames, frames.rows, frames.columns)
    width -= 1 - width % 2
    if width < 2:
        return score
    cell = frames.frame.clamp(min=0) * (frames.rows * frames.columns) + frames.slot
    grid = (score.shape[0] * score.shape[1], 1, n_frames, frames.rows, frames.columns)

    def window_mean(x: Tensor) -> Tensor:
        flat = torch.zeros(*x.shape[:2], grid[2] * grid[3] * grid[4], dtype=x.dtype, device=x.device)
        return _window_mean(flat.scatter_add(2, cell, x).view(grid), width, depth=level == 0)

    present = window_mean(frames.members.to(score.dtype))
    full = _window_mean(torch.ones(grid, dtype=score.dtype, device=score.device), width, depth=level == 0)
    mean = window_mean(score) * full / present.clamp(min=1e-9)
    return mean.view(*score.shape[:2], -1).gather(2, cell).masked_fill(~frames.members, 0)


def _window_mean(x: Tensor, width: int, depth: bool) -> Tensor:
    size = (width if depth else 1, width, width)
    return functional.avg_pool3d(x, size, stride=1, padding=tuple(n // 2 for n in size))


def _pooled_line(score: Tensor, members: Tensor) -> Tensor:
    """Mean over the member before, the member itself and the one after; zeros beyond the ends."""
    place = (members.cumsum(dim=-1) - 1).masked_fill(~members, score.shape[-1])
    line = torch.zeros(*score.shape[:2], score.shape[-1] + 1, dtype=score.dtype, device=score.device)
    line = line.scatter(2, place, score)
    return functional.avg_pool1d(line, 3, stride=1, padding=1).gather(2, place).masked_fill(~members, 0)


@register
@dataclass(frozen=True)
class InfiniPotV(ScoringSelector):
    """A share of the budget for the newest frames and what is unlike them, the rest for the strongest values.

    Of n tokens to keep, b = n - round((1 - tar_ratio) n) are forced: all tokens of the newest floor(F query_ratio) of F
    frames, then the keys least like those at the same place in these frames. The others are the largest value norms,
    pooled over neighbours in early layers.

    Where the original stops with an error, or was not made for it: if b does not hold the newest frames, it takes the
    newest tokens of them; at least one frame is the reference; beyond a multiple of 4 layers the last are not pooled.
    Frames that lost tokens in earlier rounds are read as far as they are there. Sound is treated as pictures of one
    token, without pooling, and each modality gets its part of n by its candidates (an allocation may still split
    otherwise).

    Options:
        tar_ratio: share of the budget that is forced; 0 is value norm alone.
        query_ratio: share of the frames that are the reference.
        adaptive_pooling: pool value norms.
        grid: "fixed": rows and columns of positions count from one origin for the whole stream (Qwen2.5-Omni,
            video-SALMONN 2+); "moving": from the temporal position of their frame (Qwen3-VL).
    """

    name: ClassVar[str] = "infinipot_v"
    source: ClassVar[str] = "InfiniPot-V, arXiv 2506.15745; code of aiha-lab (81a4dbe)"
    cost: ClassVar[str] = "norms of values, one cosine per key"

    tar_ratio: float = 0.5
    query_ratio: float = 0.25
    adaptive_pooling: bool = True
    grid: str = "fixed"

    def __post_init__(self) -> None:
        super().__post_init__()
        within("tar_ratio", self.tar_ratio, 0, 1)
        within("query_ratio", self.query_ratio, 0, 1)
        one_of("grid", self.grid, ("fixed", "moving"))

    def measure(self, c: Candidates, keep: int) -> Scored:
        """Value norms, pooled; importance is the same."""
        size = c.tokens.values.to(real(c.tokens.values)).norm(dim=-1)
        if self.adaptive_pooling:
            visual = self.frames(c, VISUAL)
            size = torch.where(visual.members, pooled(size, visual, c.layer, c.n_layers), size)
        return Scored(size, importance=size)

    def score(self, c: Candidates, keep: int) -> Scored:
        """Value norms, forced tokens above all."""
        found = super().score(c, keep)
        return Scored(ceiling(found.score, self.forced(c, keep)), found.importance, found.redundancy)

    def frames(self, c: Candidates, modality: int) -> Frames:
        """Moments and places of a modality."""
        return frames_of(c, modality, self.grid == "moving")

    def forced(self, c: Candidates, keep: int) -> Tensor:
        """(B, G, S) bool: the newest frames, and what is unlike them."""
        forced = torch.zeros_like(c.is_text)
        if self.tar_ratio == 0:
            return forced
        n_media = max(1, c.n - c.n_text)
        for modality in (VISUAL, AUDIO):
            frames = self.frames(c, modality)
            n = torch.div(frames.members.sum(-1) * keep, n_media, rounding_mode="floor")
            budget = n - ((1 - self.tar_ratio) * n.double()).round().long()
            n_reference = (frames.n_frames.double() * self.query_ratio).floor().long().clamp(min=1)
            unlike = novelty(c.tokens.keys, frames, n_reference)
            unlike = unlike.masked_fill(in_reference(frames, n_reference), float("inf"))
            forced = forced | best(unlike, frames.members, budget)
        return forced
