"""The rules that look at attention: SnapKV, H2O, TOVA, CriticalKV, Expected Attention.

Shape legend: see `omnimem_train.memory.state`. Attention is that of chunk queries on memory and chunk. All follow
kvpress 0.5.5 (Apache-2.0), read as formulas; each keeps the identical set on one fresh sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from omnimem_train.errors import UserError
from omnimem_train.memory.numeric import best, real
from omnimem_train.memory.options import within
from omnimem_train.memory.perturbation import output_norm
from omnimem_train.memory.positions import Rotary
from omnimem_train.memory.redundancy import EvidenceSelector, ScoringSelector
from omnimem_train.memory.selector import Candidates, Probes, Scored, register


@register
@dataclass(frozen=True)
class SnapKV(EvidenceSelector):
    """Attention of the newest queries, smoothed over neighbouring candidates; the newest tokens themselves stay.

    s[j] is the mean attention of the last `window_size` queries on candidate j, averaged over `kernel_size` neighbours
    (zeros beyond the ends) and over the query heads of a group. Neighbours are neighbours in memory, not in time.

    Options:
        window_size: newest queries that are asked, and tokens that stay; at most the chunk.
        kernel_size: odd width of the smoothing.
    """

    name: ClassVar[str] = "snapkv"
    records: ClassVar[bool] = True
    can_be_negative: ClassVar[bool] = False
    source: ClassVar[str] = "SnapKV, arXiv 2404.14469; kvpress `SnapKVPress`"
    cost: ClassVar[str] = "attention of the last 64 queries"

    window_size: int = 64
    kernel_size: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        within("window_size", self.window_size, 1)
        within("kernel_size", self.kernel_size, 1)
        if self.kernel_size % 2 == 0:
            raise UserError(f"option kernel_size={self.kernel_size} is even", remedy="give an odd width")

    def probes(self) -> Probes:
        """The newest `window_size`."""
        return Probes("last", self.window_size)

    def protected(self, c: Candidates) -> Tensor:
        """The window."""
        return torch.arange(c.n, device=c.tokens.keys.device) >= c.n - c.query_rows.shape[0]

    def measure(self, c: Candidates, keep: int) -> Scored:
        """Smoothed attention before the window, plain attention inside it (where it only serves as importance)."""
        attention = c.mean_attention().mean(dim=2)
        before = c.n - c.query_rows.shape[0]
        smooth = attention.clone()
        if before > 0:
            smooth[..., :before] = torch.nn.functional.avg_pool1d(
                attention[..., :before], self.kernel_size, stride=1, padding=self.kernel_size // 2
            )
        importance = self.remembered(c, smooth)
        return Scored(importance, importance=importance)


@register
@dataclass(frozen=True)
class ObservedAttention(EvidenceSelector):
    """Mean attention a candidate gets from the chunk queries that can see it, averaged over a group's query heads.

    H2O adds attention up over all queries ever and protects recent tokens. Here, as in kvpress, it is a mean over the
    queries that see the token, with nothing protected; `history="average"` brings the past back.
    """

    name: ClassVar[str] = "observed_attention"
    records: ClassVar[bool] = True
    can_be_negative: ClassVar[bool] = False
    source: ClassVar[str] = "H2O style, arXiv 2306.14048; kvpress `ObservedAttentionPress`"
    cost: ClassVar[str] = "attention of all chunk queries"

    def probes(self) -> Probes:
        """All."""
        return Probes("all")

    def measure(self, c: Candidates, keep: int) -> Scored:
        """Group mean of the mean attention."""
        importance = self.remembered(c, c.mean_attention().mean(dim=2))
        return Scored(importance, importance=importance)


@register
@dataclass(frozen=True)
class Tova(EvidenceSelector):
    """Attention of the newest query, averaged over all heads. All kv heads keep the same tokens, the newest too."""

    name: ClassVar[str] = "tova"
    records: ClassVar[bool] = True
    can_be_negative: ClassVar[bool] = False
    source: ClassVar[str] = "TOVA, arXiv 2401.06104; kvpress `TOVAPress`"
    cost: ClassVar[str] = "attention of one query"
    shared_heads: ClassVar[bool] = True

    def probes(self) -> Probes:
        """The newest."""
        return Probes("last", 1)

    def protected(self, c: Candidates) -> Tensor:
        """The newest token."""
        return torch.arange(c.n, device=c.tokens.keys.device) >= c.n - c.query_rows.shape[0]

    def measure(self, c: Candidates, keep: int) -> Scored:
        """Mean over all heads."""
        attention = c.mean_attention().mean(dim=(1, 2)).unsqueeze(1).expand(c.shape)
        importance = self.remembered(c, attention)
        return Scored(importance, importance=importance)

    def score(self, c: Candidates, keep: int) -> Scored:
        """The same for all heads, also when the redundancy of their keys differs (then it is averaged)."""
        found = super().score(c, keep)
        return replace(found, score=found.score.mean(dim=1, keepdim=True).expand(c.shape))


@register
@dataclass(frozen=True)
class CriticalKV(SnapKV):
    """SnapKV in two stages: a share of the budget goes to its best tokens, the rest by attention x size of the output.

    The first stage takes the max(1, floor(keep x first_stage_ratio)) highest SnapKV scores y, the window at its ceiling
    (none if the ratio is 0). All others get (y + epsilon) x L1 norm of the projected value.

    Options:
        epsilon: added to the attention in the second stage.
        first_stage_ratio: share of the budget of the first stage.
    """

    name: ClassVar[str] = "critical_kv"
    source: ClassVar[str] = "CriticalKV, arXiv 2502.03805; kvpress `CriticalKVPress` over SnapKV"
    cost: ClassVar[str] = "SnapKV, and every value through the output projection"

    epsilon: float = 1e-4
    first_stage_ratio: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        within("epsilon", self.epsilon, 0)
        within("first_stage_ratio", self.first_stage_ratio, 0, 1)

    @property
    def needs(self) -> frozenset[str]:
        """The output projection."""
        return frozenset({"output_weight"})

    def score(self, c: Candidates, keep: int) -> Scored:
        """Two stages. First-stage tokens score above half the largest float, in the order of y."""
        found = super().score(c, keep)
        y = found.score
        n_first = max(1, math.floor(keep * self.first_stage_ratio)) if self.first_stage_ratio > 0 else 0
        n_first = min(n_first, c.n - c.n_text)
        count = torch.full(c.shape[:2], n_first, dtype=torch.int64, device=y.device)
        assured = best(y, ~c.is_text, count)
        huge = torch.finfo(y.dtype).max * (0.5 + 0.5 * y / y.amax().clamp(min=1e-30))
        return replace(found, score=torch.where(assured, huge, (y + self.epsilon) * output_norm(c)))


@register
@dataclass(frozen=True)
class ExpectedAttention(ScoringSelector):
    """Attention that future queries are expected to pay, from mean and covariance of the chunk's queries.

    Queries are turned back to position 0 (the first `n_sink` candidates left out), their mean p and covariance C taken
    per head, and both turned by R, the mean rotation of the next `n_future_positions` positions after the chunk. A
    key's logit is p' . k / sqrt(D), plus k^T C' k / (2 D) with covariance; softmax over all but the sinks, group mean,
    times the norm of the value.

    In a stream the statistics are those of the current chunk, and future positions start after the last position used
    on any axis, where the next text would be.

    Options:
        n_future_positions: how many.
        n_sink: first candidates that stay.
        use_covariance: add the second-order term.
        use_vnorm: multiply with the norm of the value.
        epsilon: added to the attention before that.
    """

    name: ClassVar[str] = "expected_attention"
    source: ClassVar[str] = "Expected Attention, arXiv 2510.00636; kvpress `ExpectedAttentionPress`"
    cost: ClassVar[str] = "moments of all chunk queries; a D x D product per key and head"

    n_future_positions: int = 512
    n_sink: int = 4
    use_covariance: bool = True
    use_vnorm: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        within("n_future_positions", self.n_future_positions, 1)
        within("n_sink", self.n_sink, 0)
        within("epsilon", self.epsilon, 0)

    @property
    def needs(self) -> frozenset[str]:
        """How keys are rotated."""
        return frozenset({"rotary"})

    def probes(self) -> Probes:
        """All."""
        return Probes("all")

    def protected(self, c: Candidates) -> Tensor:
        """The sinks."""
        return torch.arange(c.n, device=c.tokens.keys.device) < self.n_sink

    def measure(self, c: Candidates, keep: int) -> Scored:
        """Expected attention, times the norm of the value."""
        keys = c.tokens.keys.to(real(c.tokens.keys)).unsqueeze(2)
        mean, covariance = self._future_queries(c)
        logits = (keys @ mean.unsqueeze(-1)).squeeze(-1) * c.scaling
        if self.use_covariance:
            logits = logits + ((keys @ covariance) * keys).sum(-1) * (c.scaling**2 / 2)
        sinks = self.protected(c)
        attention = logits.masked_fill(sinks, float("-inf")).softmax(-1).nan_to_num(0).mean(dim=2)
        if self.use_vnorm:
            size = c.tokens.values.to(attention.dtype).norm(dim=-1)
            return Scored((attention + self.epsilon) * size, importance=attention)
        return Scored(attention, importance=attention)

    def _future_queries(self, c: Candidates) -> tuple[Tensor, Tensor]:
        """Mean (B, G, H/G, D) and covariance (B, G, H/G, D, D) of the queries at the average future position."""
        if c.rotary is None:
            raise ValueError("expected_attention turns queries back; give Candidates.rotary")
        b, g, _ = c.shape
        weight = (c.query_rows >= self.n_sink).to(real(c.queries))
        weight = (weight / weight.sum().clamp(min=1)).unsqueeze(-1)
        at = c.tokens.positions[:, :1, c.query_rows]
        queries = c.rotary.turn(c.queries.to(weight.dtype), -at).view(b, g, c.group, -1, c.queries.shape[-1])
        mean = (queries * weight).sum(dim=-2)
        centred = queries - mean.unsqueeze(-2)
        covariance = (centred * weight).mT @ centred
        turn = self._mean_turn(c, c.rotary)[:, None, None]
        return (turn @ mean.unsqueeze(-1)).squeeze(-1), turn @ covariance @ turn.mT

    def _mean_turn(self, c: Candidates, rotary: Rotary) -> Tensor:
        """(B, D, D): the rotation matrices of the future positions, averaged."""
        start = c.tokens.positions.amax(dim=(1, 2, 3)) + 1
        ahead = start[:, None] + torch.arange(self.n_future_positions, device=start.device)
        angles = rotary.angles(ahead.unsqueeze(-1).expand(-1, -1, 3)).to(real(c.queries))
        cos, sin = (torch.diag_embed(part.mean(dim=1)) for part in (angles.cos(), angles.sin()))
        return torch.cat([torch.cat([cos, -sin], dim=-1), torch.cat([sin, cos], dim=-1)], dim=-2)
