"""(time, row, column) indices of video-SALMONN 2+, by scheme.

Qwen2.5-VL backbone, two ticks a second:

`training` (default): what the published weights were trained with. Pictures and sounds share one clock: pair k of
frames
    stands at tick floor(2 * k * s), the i-th audio token at tick i. It is the default because it is what the weights
    learned and because a token's index depends only on what came before it, as a stream needs.
`generation`: what the published inference code really uses. It recomputes the indices without being told about sound or
    seconds: pair k stands at 2k at any frame rate, and with interleaved sound the first t*h*w/4 tokens of the block get
    the grid's indices in order, whether they are pictures or sounds; the rest counts as text. Published results follow
    this one: choose it to reproduce them.

Qwen3-VL backbone: `timestamps`, the only one. Time is written as text; each bracket's pictures stand at the next free
index, sounds count as text.

The public functions fail on two videos in a sample and on a text-only sample; here a sample has any number of blocks
(text between two blocks continues after the largest index on any axis).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omnimem_train.errors import UserError

TICKS_PER_S = 2
"""Audio tokens a second, and temporal indices a second."""


@dataclass(frozen=True)
class VideoGrid:
    """A video's tokens.

    Attributes:
        pairs: frame pairs.
        rows, columns: of tokens, after merging.
        seconds_per_pair: None if unknown.
    """

    pairs: int
    rows: int
    columns: int
    seconds_per_pair: float | None = None

    @property
    def per_pair(self) -> int:
        """Tokens of a frame pair."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Marks:
    """Token ids that give a sequence its structure."""

    video: int
    audio: int
    start: int
    end: int


def ticks(pairs: int, seconds_per_pair: float | None) -> Tensor:
    """(pairs,) int64, the tick at which each frame pair begins: floor(2 * (k * s)) in float32; s counts as 1 if
    unknown.

    float32 is part of the rule: with 0.21 s, float64 gives another tick for two of 384 pairs.
    """
    s = torch.tensor(1.0 if seconds_per_pair is None else seconds_per_pair, dtype=torch.float32)
    return (torch.arange(pairs, dtype=torch.float32) * s * TICKS_PER_S).long()


def positions(
    ids: Tensor, grids: Sequence[VideoGrid], marks: Marks, scheme: str, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Indices of a batch.

    Args:
        ids: (B, n) token ids.
        grids: the videos of the batch in order.
        marks: ids of the marks.
        scheme: "training", "generation" or "timestamps".
        mask: (B, n), 0 where padded. Padding gets index 1 on all axes.

    Returns:
        (3, B, n) int64 indices; (B, 1) int64 `rope_deltas`: 1 + largest index - length, what is added to a token's
        number to get its index when decoding.

    Raises:
        UserError: the videos do not fit the tokens.
    """
    left = iter(grids)
    out = torch.ones(3, *ids.shape, dtype=torch.int64)
    deltas = []
    for row, tokens in enumerate(ids.cpu()):
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask[row].bool().cpu()
        index = _sequence(tokens[real], left, marks, scheme)
        out[:, row, real] = index
        deltas.append(_top(index) - int(real.sum()))
    if next(left, None) is not None:
        raise UserError(
            "more videos than blocks of video tokens", "each video needs its block in the ids", "check the prompt"
        )
    return out.to(ids.device), torch.tensor(deltas, device=ids.device)[:, None]


def _sequence(ids: Tensor, grids: Iterator[VideoGrid], marks: Marks, scheme: str) -> Tensor:
    """(3, n) indices of one sequence."""
    if scheme == "timestamps":
        return _timestamps(ids, grids, marks)
    place = {"training": _training_block, "generation": _generation_block}[scheme]
    blocks = [b for b in _blocks(ids, marks) if _is_media(ids[slice(*b)], marks)]
    parts: list[Tensor] = []
    done, free = 0, 0
    for number, (begin, end) in enumerate(blocks):
        parts.append(_text(begin - done, free))
        free += begin - done
        block = ids[begin:end]
        grid = _next_grid(block, grids, marks)
        parts.append(free + place(block, grid, marks))
        done = end
        last = number == len(blocks) - 1
        by_time = scheme == "training" and last and bool((block == marks.audio).any())
        free = int(parts[-1][0].max()) + 1 if by_time else _top(parts[-1])
    return torch.cat([*parts, _text(len(ids) - done, free)], dim=1)


def _training_block(block: Tensor, grid: VideoGrid | None, marks: Marks) -> Tensor:
    """(3, n) offsets of a block's tokens: pictures (tick, r, c), sounds (i, 0, i), or (i, i, 0) without pictures."""
    out = torch.zeros(3, len(block), dtype=torch.int64)
    audio = block == marks.audio
    clock = torch.arange(int(audio.sum()))
    out[0, audio] = clock
    if grid is None:
        out[1, audio] = clock
        return out
    out[2, audio] = clock
    out[:, block == marks.video] = _grid(ticks(grid.pairs, grid.seconds_per_pair), grid)
    return out


def _generation_block(block: Tensor, grid: VideoGrid | None, marks: Marks) -> Tensor:
    """(3, n) offsets: the grid over the first tokens, whatever they are; running indices over the rest."""
    if grid is None:
        return _text(len(block), 0)
    placed = _grid(ticks(grid.pairs, None), grid)
    return torch.cat([placed, _text(len(block) - placed.shape[1], _top(placed))], dim=1)


def _timestamps(ids: Tensor, grids: Iterator[VideoGrid], marks: Marks) -> Tensor:
    """(3, n) indices with one bracket per timestamp: pictures from the next free index, all else one by one."""
    parts: list[Tensor] = []
    done, free, pairs_left = 0, 0, 0
    grid: VideoGrid | None = None
    for begin, end in _blocks(ids, marks):
        n_visual = int((ids[begin:end] == marks.video).sum())
        if not n_visual:
            continue
        parts.append(_text(begin - done, free))
        free += begin - done
        if not pairs_left:
            grid = _take(grids)
            pairs_left = grid.pairs
        assert grid is not None
        pairs = n_visual // grid.per_pair
        pairs_left -= pairs
        if pairs_left < 0 or n_visual % grid.per_pair:
            raise _misfit(n_visual, grid)
        parts.append(free + _grid(torch.arange(pairs), grid))
        done, free = begin + n_visual, _top(parts[-1])
    if pairs_left:
        assert grid is not None
        raise _misfit((grid.pairs - pairs_left) * grid.per_pair, grid)
    return torch.cat([*parts, _text(len(ids) - done, free)], dim=1)


def _blocks(ids: Tensor, marks: Marks) -> Iterable[tuple[int, int]]:
    """[begin, end) of what stands between a start mark and the next end mark."""
    begin = None
    for at in ((ids == marks.start) | (ids == marks.end)).nonzero().flatten().tolist():
        if ids[at] == marks.start:
            begin = at + 1
        elif begin is not None:
            yield begin, at
            begin = None
    if begin is not None:
        yield begin, len(ids)


def _is_media(block: Tensor, marks: Marks) -> bool:
    return bool(((block == marks.video) | (block == marks.audio)).any())


def _next_grid(block: Tensor, grids: Iterator[VideoGrid], marks: Marks) -> VideoGrid | None:
    n_visual = int((block == marks.video).sum())
    if not n_visual:
        return None
    grid = _take(grids)
    if n_visual != grid.pairs * grid.per_pair:
        raise _misfit(n_visual, grid)
    return grid


def _take(grids: Iterator[VideoGrid]) -> VideoGrid:
    grid = next(grids, None)
    if grid is None:
        raise UserError(
            "video tokens without a video", "there are more blocks of them than videos", "pass each video's grid"
        )
    return grid


def _misfit(n_visual: int, grid: VideoGrid) -> UserError:
    return UserError(
        f"{n_visual} video tokens for a video of {grid.pairs} pairs of {grid.rows}x{grid.columns} tokens",
        "the ids and the grid are of different clips or settings",
        "take both from one call of the processor",
    )


def _grid(time: Tensor, grid: VideoGrid) -> Tensor:
    """(3, t*h*w) offsets of a grid whose pairs begin at `time`."""
    axes = torch.meshgrid(time, torch.arange(grid.rows), torch.arange(grid.columns), indexing="ij")
    return torch.stack(axes).flatten(1)


def _text(n: int, free: int) -> Tensor:
    """(3, n) running indices, the same on all axes."""
    return (torch.arange(n) + free).expand(3, -1)


def _top(index: Tensor) -> int:
    """1 + the largest index."""
    return int(index.max()) + 1 if index.numel() else 0
