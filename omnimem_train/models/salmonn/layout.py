"""Which tokens stand for a sample's media, and in what order. No tensors of media here, only counts and text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from omnimem_train.models.salmonn.positions import VideoGrid, ticks


@dataclass(frozen=True)
class Segment:
    """A bracket, or a part of one: text before it, then pictures, then sounds."""

    text: str
    visual_tokens: int
    audio_tokens: int


def audio_groups(audio_tokens: int, pairs: int, seconds_per_pair: float | None) -> list[int]:
    """How many audio tokens follow each frame pair; the last pair takes all that remain. Sums to `audio_tokens`.

    With unknown seconds they are spread evenly: every pair gets the same number and the r that are left go to pairs
    floor(i * pairs / r) - 1, i = 1 ... r.

    Where the sound is shorter than the picture the public code computes a negative last share and fails; here the
    shares stop when the sound is used up.
    """
    if seconds_per_pair is None:
        share, left = divmod(audio_tokens, pairs)
        groups = [share] * pairs
        for i in range(1, left + 1):
            # Float steps as in the public code: at some counts exact integers give a neighbouring pair.
            groups[math.floor(i * (pairs / left)) - 1] += 1
        return groups
    begins = [min(t, audio_tokens) for t in ticks(pairs, seconds_per_pair).tolist()] + [audio_tokens]
    return [after - before for before, after in pairwise(begins)]


def interleaved(grid: VideoGrid, audio_tokens: int) -> list[Segment]:
    """Qwen2.5-VL backbone: the pairs of one bracket, each with its share of sound."""
    shares = audio_groups(audio_tokens, grid.pairs, grid.seconds_per_pair)
    return [Segment("", grid.per_pair, share) for share in shares]


def timestamped(grid: VideoGrid, times_s: Sequence[float], audio_tokens: int, max_timestamps: int) -> list[Segment]:
    """Qwen3-VL backbone: one bracket per frame pair, with its time as text before it.

    Args:
        grid: the video's grid.
        times_s: time of each pair, seconds.
        audio_tokens: of the whole clip, 0 without sound.
        max_timestamps: with more pairs than this, ceil(pairs / max_timestamps) neighbours share a bracket and the first
            one's time.
    """
    shares = audio_groups(audio_tokens, grid.pairs, grid.seconds_per_pair)
    step = math.ceil(grid.pairs / max_timestamps)
    return [
        Segment(f"<{times_s[k]:.1f} seconds>", grid.per_pair * len(shares[k : k + step]), sum(shares[k : k + step]))
        for k in range(0, grid.pairs, step)
    ]
