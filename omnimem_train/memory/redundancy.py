"""How much a token repeats others, and the part that lets every scoring rule take that into account.

Shape legend: see `omnimem_train.memory.state`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from omnimem_train.memory.fast import fast
from omnimem_train.memory.numeric import products, real
from omnimem_train.memory.options import one_of
from omnimem_train.memory.selector import Candidates, Scored, Selector
from omnimem_train.memory.state import MODALITIES, TEXT

BLOCK_NUMBERS = 2**24  # cosines held at once: 64 MiB in float32


def unit(x: Tensor) -> Tensor:
    """`x` (..., D) scaled to length 1, in float32 or better; a zero vector stays zero."""
    return torch.nn.functional.normalize(x.to(real(x)), dim=-1)


def later_key(keys: Tensor, modality: Tensor, block: int | None = None) -> Tensor:
    """rho_i: the largest cosine, not below 0, of key i with a *later* key of the same modality.

    Of near-duplicates all but the newest get a rho near 1. The map of all pairs is never held: `block` keys at a time
    (by default as many as fit 64 MiB) are compared with what comes after them.

    Args:
        keys: (B, G, S, D).
        modality: (B, G, S). Text gets 0; it is pinned anyway.

    Returns:
        (B, G, S) in [0, 1], float32 or better.
    """
    found = fast("later_key", keys, modality) if block is None else None
    if found is not None:
        return found
    b, g, s, _ = keys.shape
    length = keys.to(real(keys)).norm(dim=-1).clamp(min=1e-12)
    rho = torch.zeros_like(length)
    block = block or max(1, BLOCK_NUMBERS // max(1, b * g * s))
    row = torch.arange(s, device=keys.device)
    for start in range(0, s, block):
        here = slice(start, start + block)
        cosine = products(keys[:, :, here], keys[:, :, start:])
        cosine = cosine / (length[:, :, here, None] * length[:, :, None, start:])
        counts = (row[start:] > row[here, None]) & (modality[:, :, here, None] == modality[:, :, None, start:])
        rho[:, :, here] = cosine.masked_fill_(~counts, 0).amax(dim=-1)
    return rho.clamp(0, 1).masked_fill(modality == TEXT, 0)


def previous_of_kind(modality: Tensor) -> Tensor:
    """(B, G, S) -> (B, G, S) int64: row of the nearest earlier token of the same modality, -1 where there is none."""
    row = torch.arange(modality.shape[-1], device=modality.device).expand(modality.shape)
    previous = torch.full_like(row, -1)
    for kind in MODALITIES.values():
        here = modality == kind
        last = row.masked_fill(~here, -1).cummax(dim=-1).values
        before = torch.nn.functional.pad(last, (1, 0), value=-1)[..., :-1]
        previous = torch.where(here, before, previous)
    return previous


def neighbour_cosine(x: Tensor, modality: Tensor) -> Tensor:
    """Mean cosine of each token with the tokens before and after it of the same modality.

    The first and last of a modality have one neighbour, which counts alone; a token without any gets 0.

    Args:
        x: (B, G, S, D) what is compared.
        modality: (B, G, S).

    Returns:
        (B, G, S) in [-1, 1], float32 or better.
    """
    previous = previous_of_kind(modality)
    has = previous >= 0
    cosine = fast("earlier_cosine", x, previous)
    if cosine is None:
        x = unit(x)
        cosine = (x * x.gather(2, previous.clamp(min=0).unsqueeze(-1).expand_as(x))).sum(-1).masked_fill(~has, 0)
    s = x.shape[2]
    # each token is the previous one of at most one other: hand the cosine over to it (column s takes the rest)
    target = previous.masked_fill(~has, s)
    spare = torch.zeros(*modality.shape[:2], s + 1, dtype=cosine.dtype, device=x.device)
    after = spare.scatter(2, target, cosine)[..., :s]
    neighbours = has.to(cosine.dtype) + spare.scatter(2, target, has.to(cosine.dtype))[..., :s]
    return (cosine + after) / neighbours.clamp(min=1)


def sequence_cosine(x: Tensor) -> Tensor:
    """Mean cosine with the tokens just before and after, whatever they are; a missing neighbour at either end of the
    sequence counts as 1. (B, S, D) -> (B, S). This is the reading of the released OmniMem code."""
    x = unit(x)
    step = (x[:, 1:] * x[:, :-1]).sum(-1)
    before, after = (torch.nn.functional.pad(step, side, value=1.0) for side in ((1, 0), (0, 1)))
    return (before + after) / 2


def above_zero(score: Tensor, is_text: Tensor) -> Tensor:
    """Scores of each stream and head moved up until the lowest media score is 0; unchanged where none is negative."""
    lowest = score.masked_fill(is_text, float("inf")).amin(dim=-1, keepdim=True)
    return score - lowest.clamp(max=0)


@dataclass(frozen=True)
class ScoringSelector(Selector):
    """A rule whose score can be multiplied with (1 - rho), so that rules are compared fairly.

    Options:
        redundancy: "none", or "later_key": score x (1 - rho), rho as in `later_key`. A rule whose scores can be
            negative is first moved up until its lowest media score is 0. Tokens a rule protects stay protected.
    """

    can_be_negative: ClassVar[bool] = True
    """False for a rule whose scores never are, so that nothing has to be moved up."""

    redundancy: str = "none"

    def __post_init__(self) -> None:
        one_of("redundancy", self.redundancy, ("none", "later_key"))

    @abstractmethod
    def measure(self, c: Candidates, keep: int) -> Scored:
        """The rule's own scores, before redundancy and protection."""

    def protected(self, c: Candidates) -> Tensor | None:
        """Mask (S,) of the tokens that are kept before all others, or None."""
        return None

    def score(self, c: Candidates, keep: int) -> Scored:
        """`measure`, then the redundancy factor, then a score above all others for protected tokens."""
        found = self.measure(c, keep)
        score, redundancy = found.score, found.redundancy
        if self.redundancy == "later_key":
            rho = later_key(c.tokens.keys, c.tokens.modality)
            redundancy = rho if redundancy is None else redundancy
            score = above_zero(score, c.is_text) if self.can_be_negative else score
            score = score * (1 - rho)
        protected = self.protected(c)
        if protected is not None:
            score = ceiling(score, protected)
        return Scored(score, found.importance, redundancy)


def ceiling(score: Tensor, protected: Tensor) -> Tensor:
    """`protected` tokens get 1 + the largest score of the others, over all streams and heads of the layer."""
    others = score.masked_fill(protected, float("-inf")).amax()
    return torch.where(protected, 1 + torch.where(others.isinf(), 0, others), score)


@dataclass(frozen=True)
class EvidenceSelector(ScoringSelector):
    """A scoring rule built on an importance that can remember.

    Options:
        history: "fresh": a kept token's importance is measured anew with each chunk; "average": it is averaged with the
            stored one, (new + stored) / 2, as in the released OmniMem code.
    """

    history: str = "fresh"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("history", self.history, ("fresh", "average"))

    @property
    def keeps_evidence(self) -> bool:
        """True when averaging."""
        return self.history == "average"

    def remembered(self, c: Candidates, fresh: Tensor) -> Tensor:
        """Importance (B, G, S) with the past mixed in as `history` says. Without probes the past stays as it is."""
        if self.history == "fresh":
            return fresh
        stored = c.tokens.evidence.to(fresh.dtype)
        if c.query_rows.numel() == 0:
            return stored
        old = torch.arange(c.n, device=fresh.device) < c.n_memory
        return torch.where(old, (fresh + stored) / 2, fresh)
