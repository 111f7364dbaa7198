"""Which clips a rank visits in an epoch, and in which order: shuffled, or shuffled and balanced by length.

A *row* is what the ranks run at the same time: one clip each. Where all ranks must run the same number of forwards
(sharded weights, or gradients summed after each clip), a row takes as long as its longest clip, and the others wait or
run empty forwards. Of clips of 30 s to 90 min dealt out at random, two ranks waste 38 %, sixteen 75 %.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WINDOW_ROWS = 64
"""Rows that are sorted together. Of lengths spread over a factor f, clips of one row then differ by about f^(1/64); a
clip moves at most so far from where the shuffle had put it, before the rows are shuffled."""


def epoch_order(n: int, seed: int, epoch: int, world: int = 1, rank: int = 0) -> list[int]:
    """Indices that `rank` of `world` visits in `epoch`: a shuffle of all n by (seed, epoch), dealt out in turn.

    Every rank gets ceil(n / world). Where n is no multiple of world, the shuffle starts again from its beginning: up to
    world - 1 samples are seen twice in the epoch, none is left out. (`epoch_repeats` says how many.)
    """
    assert 0 <= rank < world
    return [int(i) for i in _shuffled(n, np.random.default_rng((seed, epoch)), world)[rank::world]]


def balanced_order(
    lengths: Sequence[float], seed: int, epoch: int, world: int = 1, rank: int = 0, window_rows: int = WINDOW_ROWS
) -> list[int]:
    """The same clips as `epoch_order`, each as often, dealt out so that clips of one row are of similar length.

    The shuffle is cut into windows of about `window_rows` rows; each is sorted by length, cut into rows of `world`
    neighbours, and the rows of the whole epoch are shuffled, and the ranks inside each row. All of it follows from
    (seed, epoch) and the lengths, which must be the same on all ranks.

    Args:
        lengths: of the clips, in any unit.
    """
    assert 0 <= rank < world
    generator = np.random.default_rng((seed, epoch))
    order = _shuffled(len(lengths), generator, world)
    measured, n_rows = np.asarray(lengths, np.float64), len(order) // world
    windows = np.array_split(order.reshape(n_rows, world), max(1, round(n_rows / window_rows)))
    ranked = [w.ravel()[np.argsort(measured[w.ravel()], kind="stable")].reshape(-1, world) for w in windows]
    rows = generator.permuted(np.concatenate(ranked), axis=1)
    return [int(i) for i in generator.permutation(rows)[:, rank]]


def _shuffled(n: int, generator: np.random.Generator, world: int) -> np.ndarray:
    """All n indices shuffled, and the first ones again up to a multiple of `world`."""
    assert n > 0
    return np.resize(generator.permutation(n), n + epoch_repeats(n, world))


def epoch_repeats(n: int, world: int) -> int:
    """How many samples an epoch shows twice so that all ranks have the same number."""
    return -n % world


def empty_share(chunks: np.ndarray) -> float:
    """Share of forwards that are empty when every rank runs as many as the longest clip of its row has chunks.

    Args:
        chunks: (rows, ranks) chunks of each clip.
    """
    rooms = chunks.max(axis=1).sum() * chunks.shape[1]
    return float(1 - chunks.sum() / rooms) if rooms else 0.0


def expected_empty_share(
    lengths: Sequence[float], chunk: float, seed: int, world: int, *, balanced: bool, epochs: int = 1
) -> float:
    """`empty_share` of the first `epochs` epochs, with chunks of `chunk` (in the unit of `lengths`)."""
    chunks = np.maximum(1, np.ceil(np.asarray(lengths, np.float64) / chunk))
    rows = []
    for epoch in range(epochs):
        if balanced:
            ranks = [balanced_order(lengths, seed, epoch, world, rank) for rank in range(world)]
        else:
            ranks = [epoch_order(len(lengths), seed, epoch, world, rank) for rank in range(world)]
        rows.append(chunks[np.array(ranks).T])
    return empty_share(np.concatenate(rows))
