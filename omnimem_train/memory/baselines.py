"""The rules that look at keys, values or nothing at all: the cheap rivals.

Shape legend: see `omnimem_train.memory.state`. Rules that look at attention are in `attention_rules`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from omnimem_train.memory.numeric import real
from omnimem_train.memory.options import within
from omnimem_train.memory.redundancy import ScoringSelector, unit
from omnimem_train.memory.selector import Candidates, Scored, Selector, register


def zeros(c: Candidates) -> Tensor:
    """(B, G, S) zeros in the precision of scores."""
    return torch.zeros(c.shape, dtype=real(c.tokens.keys), device=c.tokens.keys.device)


def media_order(c: Candidates) -> tuple[Tensor, Tensor]:
    """(B, G, S) number of each token among the media tokens of its head, in stream order; and the mask of media."""
    media = ~c.is_text
    return media.cumsum(dim=-1) - 1, media


@register
@dataclass(frozen=True)
class Full(Selector):
    """Keeps everything, whatever the budget: the upper bound of every table."""

    name: ClassVar[str] = "full"
    source: ClassVar[str] = "no compression"
    cost: ClassVar[str] = "none; memory grows with the stream"
    shared_heads: ClassVar[bool] = True
    keeps_all: ClassVar[bool] = True

    def score(self, c: Candidates, keep: int) -> Scored:
        """All equal."""
        return Scored(zeros(c))


@register
@dataclass(frozen=True)
class Random(Selector):
    """A uniform sample of the whole stream (reservoir sampling): a token draws a number once, when it arrives; it is
    stored as its evidence, and the highest numbers so far are kept.

    Drawing anew for old tokens with each chunk would thin out the past exponentially and make a weaker baseline; that
    is what happens if the caller does not store evidence. All streams of a batch draw alike, so a result does not
    depend on the batch.
    """

    name: ClassVar[str] = "random"
    source: ClassVar[str] = "reservoir sampling (Vitter 1985), per kv head"
    cost: ClassVar[str] = "one random number per token"

    @property
    def keeps_evidence(self) -> bool:
        """Its draws."""
        return True

    def score(self, c: Candidates, keep: int) -> Scored:
        """The draws, in (0, 1]."""
        generator = torch.Generator().manual_seed(c.seed)
        draw = 1 - torch.rand(c.shape[1:], generator=generator)
        draw = draw.to(c.tokens.keys.device, real(c.tokens.keys))
        stored = c.tokens.evidence.to(draw.dtype)
        score = torch.where(stored > 0, stored, draw)
        return Scored(score, importance=score)


@register
@dataclass(frozen=True)
class Uniform(Selector):
    """Tokens spread evenly over the stream: pick i of n is the candidate nearest to stream index
    first + floor(i N / n), where N is the length of the stream from the first to the last candidate.

    On one fresh cache that is InfiniPot-V's `uniform`, floor(i N / n) of N tokens. Counting stream indices instead of
    candidates keeps the spacing even when the rule is applied again to what it kept.
    """

    name: ClassVar[str] = "uniform"
    source: ClassVar[str] = "InfiniPot-V code (aiha-lab, 81a4dbe), method `uniform`; on stream indices here"
    cost: ClassVar[str] = "sorting indices"

    def score(self, c: Candidates, keep: int) -> Scored:
        """All equal; `pick` decides."""
        return Scored(zeros(c))

    def pick(self, c: Candidates, score: Tensor, members: Tensor, count: Tensor) -> Tensor:
        """Evenly spaced members."""
        far = torch.iinfo(torch.int64).max
        at, row = c.tokens.index.masked_fill(~members, far).sort(dim=-1, stable=True)
        n_members, wanted = members.sum(-1, keepdim=True), count.unsqueeze(-1)
        first, last = at[..., :1], at.gather(-1, (n_members - 1).clamp(min=0))
        i = torch.arange(c.n, device=at.device).expand(c.shape)
        target = (i * ((last - first + 1).double() / wanted.clamp(min=1))).floor().long() + first
        after = torch.searchsorted(at, target).clamp(max=c.n - 1)
        before = (after - 1).clamp(min=0)
        is_nearer = target - at.gather(-1, before) < at.gather(-1, after) - target
        place = torch.where(is_nearer, before, after)
        place = i + (place - i).cummax(dim=-1).values  # two targets in one gap: the later one takes the next member
        place = torch.minimum(place, n_members - wanted + i).clamp(0, c.n - 1)
        return torch.zeros_like(members).scatter(-1, row, _marks(place, i < wanted))


def _marks(place: Tensor, valid: Tensor) -> Tensor:
    """Mask with True at every valid `place`."""
    s = place.shape[-1]
    marks = torch.zeros(*place.shape[:-1], s + 1, dtype=torch.bool, device=place.device)
    return marks.scatter(-1, place.masked_fill(~valid, s), True)[..., :s]


@register
@dataclass(frozen=True)
class SlidingWindow(Selector):
    """The first `n_sink` media tokens and the newest ones.

    The attention sinks at the start of a real stream are prompt tokens, which are pinned anyway.

    Options:
        n_sink: media tokens at the start that stay.
    """

    name: ClassVar[str] = "sliding_window"
    records: ClassVar[bool] = True
    source: ClassVar[str] = "StreamingLLM, arXiv 2309.17453; kvpress `StreamingLLMPress` counts sinks over all tokens"
    cost: ClassVar[str] = "none"
    shared_heads: ClassVar[bool] = True

    n_sink: int = 4

    def __post_init__(self) -> None:
        within("n_sink", self.n_sink, 0)

    def score(self, c: Candidates, keep: int) -> Scored:
        """Stream order; sinks above all, the first highest."""
        order, _ = media_order(c)
        score = torch.where(order < self.n_sink, 2 * c.n - order, order)
        return Scored(score.to(real(c.tokens.keys)))


@register
@dataclass(frozen=True)
class KNorm(ScoringSelector):
    """Keeps keys of small norm: score -||k||."""

    name: ClassVar[str] = "knorm"
    records: ClassVar[bool] = True
    source: ClassVar[str] = "Devoto et al., arXiv 2406.11430; kvpress `KnormPress`"
    cost: ClassVar[str] = "norms of keys"

    def measure(self, c: Candidates, keep: int) -> Scored:
        """-||k||."""
        return Scored(-c.tokens.keys.to(real(c.tokens.keys)).norm(dim=-1))


@register
@dataclass(frozen=True)
class KeyDifference(ScoringSelector):
    """Keeps keys unlike the average key: score -cos(k, mean of unit keys)."""

    name: ClassVar[str] = "key_difference"
    records: ClassVar[bool] = True
    source: ClassVar[str] = "KeyDiff, arXiv 2504.15364; kvpress `KeyDiffPress`"
    cost: ClassVar[str] = "one cosine per key"

    def measure(self, c: Candidates, keep: int) -> Scored:
        """-cos(k, mean of unit keys); the mean is over all candidates of a head, text included."""
        keys = unit(c.tokens.keys)
        mean = unit(keys.mean(dim=2, keepdim=True))
        return Scored(-(keys * mean).sum(-1))


@register
@dataclass(frozen=True)
class LagKV(ScoringSelector):
    """Keeps tokens that stick out of their block once it is rescaled by the range of the block that follows.

    Candidates after the first `n_sink` are cut into blocks of `lag_size`. A block is rescaled channel by channel to the
    minimum and maximum of the next one; a token's standard deviation over the channels, softmax within the block,
    averaged over keys and values, is its score (or, without `cross_scoring`, its rank in the block / `lag_size`).
    Sinks, the last block and the rest get 1. With fewer than two blocks: sinks 1, the others by recency.

    Blocks run over all candidates in stream order, text and both modalities alike.

    Options:
        n_sink: first candidates that stay.
        lag_size: tokens in a block.
        cross_scoring: compare scores across blocks instead of ranks within a block.
    """

    name: ClassVar[str] = "lagkv"
    source: ClassVar[str] = "LagKV, arXiv 2504.04704; kvpress `LagKVPress`"
    cost: ClassVar[str] = "range and deviation of keys and values by block"

    n_sink: int = 4
    lag_size: int = 128
    cross_scoring: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        within("n_sink", self.n_sink, 0)
        within("lag_size", self.lag_size, 1)

    def measure(self, c: Candidates, keep: int) -> Scored:
        """Ranks or softmaxed deviations by block."""
        score = zeros(c) + 1
        rest = max(0, c.n - self.n_sink)
        n_blocks = rest // self.lag_size
        if n_blocks < 2:
            age = torch.arange(rest, device=score.device, dtype=score.dtype) / max(1, rest)
            score[..., c.n - rest :] = age
            return Scored(score)
        part = slice(self.n_sink, self.n_sink + n_blocks * self.lag_size)
        found = sum(self._deviation(x[:, :, part]) for x in (c.tokens.keys, c.tokens.values)) / 2
        assert isinstance(found, Tensor)
        if not self.cross_scoring:
            found = found.argsort(dim=-1).argsort(dim=-1).to(score.dtype) / self.lag_size
        score[..., self.n_sink : self.n_sink + (n_blocks - 1) * self.lag_size] = found.flatten(-2)
        return Scored(score)

    def _deviation(self, x: Tensor) -> Tensor:
        """(B, G, blocks * lag, D) -> (B, G, blocks - 1, lag)."""
        x = x.to(real(x)).unflatten(2, (-1, self.lag_size))
        low, high = x[:, :, 1:].aminmax(dim=3, keepdim=True)
        scaled = (x[:, :, :-1] - low) / (high - low).clamp(min=1e-6)
        return scaled.std(dim=-1).softmax(dim=-1)
