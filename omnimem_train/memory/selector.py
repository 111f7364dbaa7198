"""The contract between a stream and a selector, and the one routine that turns scores into kept tokens.

A selector is a small frozen dataclass: its fields are its options, `score` reads a `Candidates` view and returns one
number per candidate. It holds no stream state. `choose` owns the policy that is the same for all selectors: text is
pinned, an allocation splits the budget over modalities, the best of each share are kept, in stream order.

Shape legend: see `omnimem_train.memory.state`.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from omnimem_train.errors import UserError, nearest
from omnimem_train.memory.state import AUDIO, TEXT, VISUAL, LayerMemory


@dataclass(frozen=True)
class Probes:
    """Which queries of the chunk a selector wants to see.

    `kind` is "none", "all", "last" (the newest `count`) or "spread" (`count` spread evenly, the newest included).
    """

    kind: str = "all"
    count: int = 0

    def rows(self, n_chunk: int, device: torch.device | str = "cpu") -> Tensor:
        """Ascending unique int64 rows of the chunk, between 0 and `n_chunk - 1`."""
        if self.kind == "none":
            return torch.zeros(0, dtype=torch.int64, device=device)
        if self.kind == "all" or self.count >= n_chunk:
            return torch.arange(n_chunk, device=device)
        if self.kind == "last":
            return torch.arange(n_chunk - self.count, n_chunk, device=device)
        if self.kind == "spread":
            steps = torch.arange(1, self.count + 1, device=device)
            return torch.div(steps * n_chunk, self.count, rounding_mode="floor") - 1
        raise ValueError(f"unknown kind of probes {self.kind!r}")


@dataclass(frozen=True)
class Candidates:
    """What a selector sees of one layer after a chunk: plain tensors, no model.

    Attributes:
        tokens: memory followed by chunk, S tokens.
        n_memory: how many of them were memory before the chunk.
        queries: (B, H, P, D) rotated probe queries of the chunk.
        query_rows: (P,) int64, the candidate row of each probe; a probe sees rows 0 to its own.
        scaling: factor on query . key before the softmax, usually D ** -0.5.
        output_weight: (E, H * D) effective output projection, or None when the selector does not need it.
        layer, n_layers: which layer this is.
        seed: for selectors that draw at random; differs by chunk and layer, repeats with the run.
    """

    tokens: LayerMemory
    n_memory: int
    queries: Tensor
    query_rows: Tensor
    scaling: float
    output_weight: Tensor | None = None
    layer: int = 0
    n_layers: int = 1
    seed: int = 0

    @property
    def n(self) -> int:
        """Number of candidates S."""
        return self.tokens.n_tokens

    @property
    def group(self) -> int:
        """Query heads that read one kv head, H / G."""
        return self.queries.shape[1] // self.tokens.keys.shape[1]

    @cached_property
    def is_text(self) -> Tensor:
        """(B, G, S) bool."""
        return self.tokens.modality == TEXT

    def attention_blocks(self, block: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        """Attention of the probes on all candidates, `block` probes at a time.

        Yields:
            probabilities (B, G, H/G, p, S) float32 (float64 for float64 keys; 0 where a probe cannot see) and
            visibility (p, S) bool.
        """
        keys = self.tokens.keys
        real = torch.float64 if keys.dtype == torch.float64 else torch.float32
        b, g, s, d = keys.shape
        grouped = self.queries.view(b, g, self.group, -1, d)
        columns = torch.arange(s, device=keys.device)
        for start in range(0, self.query_rows.shape[0], block):
            rows = self.query_rows[start : start + block]
            q = grouped[:, :, :, start : start + block]
            logits = torch.einsum("bghpd,bgsd->bghps", q.to(real), keys.to(real)) * self.scaling
            visible = columns[None, :] <= rows[:, None]
            yield logits.masked_fill_(~visible, float("-inf")).softmax(-1), visible


@dataclass(frozen=True)
class Scored:
    """A selector's answer.

    Attributes:
        score: (B, G, S) float; the highest are kept. Must be finite or +-inf, never NaN.
        importance: (B, G, S) non-negative, or None: how much the probes used each token, before redundancy. Stored as
            the evidence of what is kept, and read by allocations.
        redundancy: (B, G, S) in [-1, 1], or None: how much a token repeats others. Read by allocations.
    """

    score: Tensor
    importance: Tensor | None = None
    redundancy: Tensor | None = None


@dataclass(frozen=True)
class Selector(ABC):
    """Base of all selectors. A subclass sets the class attributes and implements `score`.

    Class attributes:
        name: what a user types.
        source: paper, equation or code it follows, and where it departs.
        cost: what it computes per layer and chunk, in a phrase.
        shared_heads: True when all kv heads keep the same tokens.
        needs: of {"hidden", "output_weight"}, the costly inputs it reads.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    cost: ClassVar[str]
    shared_heads: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()

    def probes(self) -> Probes:
        """Which queries `score` wants; none unless overridden."""
        return Probes("none")

    @abstractmethod
    def score(self, c: Candidates, keep: int) -> Scored:
        """Scores of all S candidates. `keep` is the number of media tokens that will be kept in all (a hint for rules
        whose score depends on it); scores of text tokens are ignored."""

    def pick(self, score: Tensor, members: Tensor, count: int) -> Tensor:
        """(G,) x S -> the `count` rows of one stream to keep among `members` (G, S) bool: the highest scores. Every
        head has at least `count` members. Ties go to the earlier row. Returns (G, count) int64, any order."""
        masked = score.masked_fill(~members, float("-inf"))
        # members scored -inf must still beat non-members: sort by (member, score)
        order = torch.argsort(masked, dim=-1, descending=True, stable=True)
        is_member = members.gather(-1, order)
        order = order.gather(-1, torch.argsort((~is_member).to(torch.int8), dim=-1, stable=True))
        return order[..., :count]

    def options(self) -> dict[str, Any]:
        """The options as plain JSON values, also the defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


class Allocation(Protocol):
    """Splits the media budget of one layer over modalities (see `omnimem_train.memory.allocation`)."""

    def counts(self, c: Candidates, scored: Scored, budget: int) -> list[dict[tuple[int, ...], int]]:
        """For each stream: how many tokens to keep of each group of modalities. `(VISUAL, AUDIO)` as one group is a
        shared budget. Counts sum to min(budget, media candidates) and never exceed a group's candidates."""


def choose(
    c: Candidates, selector: Selector, allocation: Allocation, budget: int
) -> tuple[Tensor, Scored | None]:
    """Which candidates stay: all text, and `budget` media tokens.

    Args:
        c: the candidates of one layer.
        budget: media tokens to keep per kv head; text is on top.

    Returns:
        rows (B, G, K) int64, ascending and unique, K = text + min(budget, media); and the scores (None when nothing
        had to go and no evidence was measured).
    """
    b, g, s = c.tokens.modality.shape
    n_text = int(c.is_text[0, 0].sum())
    n_media = s - n_text
    budget = min(budget, n_media)
    with torch.no_grad():
        scored = selector.score(c, budget)
        if budget == n_media:
            return torch.arange(s, device=c.tokens.keys.device).expand(b, g, s), scored
        kept = []
        for stream, counts in enumerate(allocation.counts(c, scored, budget)):
            modality = c.tokens.modality[stream]
            parts = [c.is_text[stream].nonzero()[:, 1].view(g, n_text)]
            for group, count in counts.items():
                members = torch.isin(modality, torch.tensor(group, dtype=modality.dtype, device=modality.device))
                parts.append(selector.pick(scored.score[stream], members, count))
            kept.append(torch.cat(parts, dim=-1).sort(dim=-1).values)
        return torch.stack(kept), scored


_SELECTORS: dict[str, type[Selector]] = {}


def register(cls: type[Selector]) -> type[Selector]:
    """Class decorator: makes a selector available by its `name`, to users and to the contract tests."""
    if cls.name in _SELECTORS and _SELECTORS[cls.name] is not cls:
        raise ValueError(f"two selectors are called {cls.name!r}")
    _SELECTORS[cls.name] = cls
    return cls


def selectors() -> dict[str, type[Selector]]:
    """All registered selectors by name, in the order of registration."""
    return dict(_SELECTORS)


def make_selector(name: str, **options: Any) -> Selector:
    """The selector `name` with `options`.

    Raises:
        UserError: unknown name or option.
    """
    if name not in _SELECTORS:
        raise UserError(
            f"unknown selector {name!r}{nearest(name, _SELECTORS)}",
            remedy=f"choose one of: {', '.join(_SELECTORS)}",
        )
    cls = _SELECTORS[name]
    known = [f.name for f in fields(cls)]
    for key in options:
        if key not in known:
            raise UserError(
                f"selector {name!r} has no option {key!r}{nearest(key, known)}",
                remedy=f"its options are: {', '.join(known) or '(none)'}",
            )
    return cls(**options)


def describe(selector: Selector) -> str:
    """`name` and the options, as canonical JSON."""
    return json.dumps({"name": selector.name, "options": selector.options()}, sort_keys=True)


__all__ = [
    "AUDIO",
    "TEXT",
    "VISUAL",
    "Allocation",
    "Candidates",
    "Probes",
    "Scored",
    "Selector",
    "choose",
    "describe",
    "make_selector",
    "register",
    "selectors",
]
