"""The contract between a stream and a selector, and the one routine that turns scores into kept tokens.

A selector is a small frozen dataclass: its fields are its options, `score` reads a `Candidates` view and returns one
number per candidate. It holds no stream state. `choose` owns the policy that is the same for all selectors: text is
pinned, an allocation splits the budget over modalities, the best of each share are kept, in stream order.

Shape legend: see `omnimem_train.memory.state`.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from omnimem_train.memory.fast import fast
from omnimem_train.memory.numeric import best, products, real
from omnimem_train.memory.options import build, values
from omnimem_train.memory.positions import Rotary
from omnimem_train.memory.state import AUDIO, TEXT, VISUAL, LayerMemory

BLOCK_NUMBERS = 2**24  # attention held at once: 64 MiB in float32


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
        query_rows: (P,) int64, ascending, the candidate row of each probe; a probe sees rows 0 to its own.
        scaling: factor on query . key before the softmax, usually D ** -0.5.
        output_weight: (E, H * D) effective output projection W, or None when the selector does not need it.
        output_gram: (G, H/G, D, D) W_h^T W_h of each query head, or None. It changes with the weights alone, so a
            stream makes it once (`omnimem_train.memory.perturbation.own_gram`); without it a selector makes it from W.
        importance_head: (2, E) what reads a learned importance off layer inputs, or None.
        log_sums: (B, H, P) float32, the logarithm of each probe's sum of exponentials over what it sees, where the
            layer's own attention has it at hand; None where it would have to be computed.
        rotary: how the model rotates keys, or None when the selector does not need it.
        layer, n_layers: which layer this is.
        seed: for selectors that draw at random; differs by chunk and layer, repeats with the run.
        known_text: number of text tokens, the same in every stream and head. Counting it here when it is not given
            makes the host wait for the device.
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
    rotary: Rotary | None = None
    known_text: int | None = None
    output_gram: Tensor | None = None
    importance_head: Tensor | None = None
    log_sums: Tensor | None = None

    @property
    def n(self) -> int:
        """Number of candidates S."""
        return self.tokens.n_tokens

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, G, S), the shape of scores."""
        b, g, s = self.tokens.modality.shape
        return b, g, s

    @property
    def group(self) -> int:
        """Query heads that read one kv head, H / G."""
        return self.queries.shape[1] // self.tokens.keys.shape[1]

    @cached_property
    def is_text(self) -> Tensor:
        """(B, G, S) bool."""
        return self.tokens.modality == TEXT

    @cached_property
    def n_text(self) -> int:
        """Text tokens of each stream and head."""
        if self.known_text is not None:
            return self.known_text
        low, high = torch.stack(self.is_text.sum(-1).aminmax()).tolist()
        if low != high:
            raise ValueError(f"streams of one batch hold between {low} and {high} text tokens; run them apart")
        return int(high)

    def members(self, modalities: Sequence[int]) -> Tensor:
        """(B, G, S) bool: candidates of one of `modalities`."""
        found = torch.zeros_like(self.is_text)
        for modality in modalities:
            found = found | (self.tokens.modality == modality)
        return found

    def media_among(self, rows: Tensor) -> Tensor:
        """(B, G, S) bool: candidates among `rows` (B, G, K) that are not text."""
        return torch.zeros_like(self.is_text).scatter(-1, rows, True) & ~self.is_text

    def asked_by(self, asked: Tensor) -> Candidates:
        """The same candidates seen by some of the queries, `asked` (p,) int64 among them."""
        sums = None if self.log_sums is None else self.log_sums[:, :, asked]
        return replace(self, queries=self.queries[:, :, asked], query_rows=self.query_rows[asked], log_sums=sums)

    def attention_blocks(self, block: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Attention of the probes on all candidates, `block` probes at a time (by default as many as fit 64 MiB).

        Yields:
            probabilities (B, G, H/G, p, S) float32 (float64 for float64 keys; 0 where a probe cannot see) and
            visibility (p, S) bool.
        """
        keys = self.tokens.keys
        b, g, s, d = keys.shape
        grouped = self.queries.reshape(b, g, self.group, -1, d)
        columns = torch.arange(s, device=keys.device)
        block = block or max(1, BLOCK_NUMBERS // (b * g * self.group * s))
        for start in range(0, self.query_rows.shape[0], block):
            rows = self.query_rows[start : start + block]
            q = grouped[:, :, :, start : start + block]
            logits = products(q.flatten(2, 3), keys).mul_(self.scaling).view(*q.shape[:4], s)
            visible = columns <= rows[:, None]
            yield logits.masked_fill_(~visible, float("-inf")).softmax(-1), visible

    def mean_attention(self) -> Tensor:
        """(B, G, H/G, S): attention each candidate gets, averaged over the probes that can see it."""
        b, g, s = self.shape
        found = fast("attention", self)
        if found is not None:
            return found / self.probes_that_see().clamp(min=1)
        total = torch.zeros(b, g, self.group, s, dtype=real(self.tokens.keys), device=self.tokens.keys.device)
        seen = torch.zeros(s, dtype=total.dtype, device=total.device)
        for attention, visible in self.attention_blocks():
            total += attention.sum(dim=3)
            seen += visible.sum(dim=0)
        return total / seen.clamp(min=1)

    def probes_that_see(self) -> Tensor:
        """(S,) number of probes that can see each candidate."""
        columns = torch.arange(self.n, device=self.query_rows.device)
        return self.query_rows.shape[0] - torch.searchsorted(self.query_rows, columns)


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

    A rule that can take a redundancy factor derives from `omnimem_train.memory.redundancy.ScoringSelector` instead.

    Class attributes:
        name: what a user types.
        source: paper, equation or code it follows, and where it departs.
        cost: what it computes per layer and chunk, in a phrase.
        shared_heads: True when all kv heads keep the same tokens.
        keeps_all: True when nothing is ever dropped.
        records: True when `score` waits for no result on the host and draws no random numbers, so that its launches can
            be recorded and replayed.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    cost: ClassVar[str]
    shared_heads: ClassVar[bool] = False
    keeps_all: ClassVar[bool] = False
    records: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[str]:
        """Of {"hidden", "output_weight", "output_gram", "rotary", "importance_head"}, the inputs it reads beside keys,
        values and queries. One that names both "output_weight" and "output_gram" makes do with either."""
        return frozenset()

    @property
    def keeps_evidence(self) -> bool:
        """True when the score reads the stored evidence, so that it is measured even if nothing has to go."""
        return False

    def probes(self) -> Probes:
        """Which queries `score` wants; none unless overridden."""
        return Probes("none")

    @abstractmethod
    def score(self, c: Candidates, keep: int) -> Scored:
        """Scores of all S candidates. `keep` is the number of media tokens that will be kept in all (a hint for rules
        whose score depends on it); scores of text tokens are ignored."""

    def pick(self, c: Candidates, score: Tensor, members: Tensor, count: Tensor) -> Tensor:
        """Mask (B, G, S) of the `count` (B, G) tokens to keep among `members` (B, G, S) bool: the highest scores, the
        later token in a tie. Every stream and head has at least `count` members."""
        return best(score, members, count)

    def options(self) -> dict[str, Any]:
        """The options as plain JSON values, also the defaults."""
        return values(self)


class Allocation(Protocol):
    """Splits the media budget of one layer over modalities (see `omnimem_train.memory.allocation`)."""

    spends_all: ClassVar[bool]
    """True when the counts always sum to the budget."""

    def counts(self, c: Candidates, scored: Scored, budget: int) -> list[tuple[tuple[int, ...], Tensor]]:
        """How many tokens to keep of each group of modalities: pairs of a group and a (B, G) int64 count.

        `(VISUAL, AUDIO)` as one group is a shared budget. Groups are served in order, each from what the earlier ones
        left. A count never exceeds what its group still has; `budget` is at most the number of media candidates.
        """


def choose(c: Candidates, selector: Selector, allocation: Allocation, budget: int) -> tuple[Tensor, Scored | None]:
    """Which candidates stay: all text, and `budget` media tokens.

    Args:
        c: the candidates of one layer.
        budget: media tokens to keep per kv head; text is on top.

    Returns:
        rows (B, G, K) int64, ascending and unique, K = text + min(budget, media) (fewer with an allocation that does
        not pass on what a modality leaves unused, see `Fixed`); and the scores (None when nothing had to go and no
        evidence was measured).
    """
    n_media = c.n - c.n_text
    keep = min(budget, n_media)
    if "hidden" in selector.needs and not selector.shared_heads:
        raise ValueError(f"{selector.name} reads layer inputs, so it has to keep the same tokens in all heads")
    everything = selector.keeps_all or (allocation.spends_all and keep == n_media)
    # an autocast region around the forward would do the sums of scores in half precision
    with torch.no_grad(), torch.autocast(c.tokens.keys.device.type, enabled=False):
        unread = everything and not (selector.keeps_evidence and n_media > 0)
        scored = None if unread else selector.score(c, keep)
        if everything or scored is None:
            return torch.arange(c.n, device=c.tokens.keys.device).expand(c.shape), scored
        groups = allocation.counts(c, scored, keep)
        n = c.n_text + keep if allocation.spends_all else None
        if n is not None and type(selector).pick is Selector.pick:
            rows = fast("keep", scored.score, c.tokens.modality, groups, n)
            if rows is not None:
                return rows, scored
        taken = c.is_text
        for group, count in groups:
            taken = taken | selector.pick(c, scored.score, c.members(group) & ~taken, count)
        return _rows(taken, n), scored


def _rows(taken: Tensor, n: int | None) -> Tensor:
    """(B, G, n) rows of a (B, G, S) mask. Without `n` they are counted, which makes the host wait for the device."""
    if n is None:
        low, n = torch.stack(taken.sum(-1).aminmax()).tolist()
        if low != n:
            raise ValueError(f"streams of one batch would keep between {low} and {n} tokens; run them apart")
    s = taken.shape[-1]
    return torch.arange(s, device=taken.device).masked_fill(~taken, s).sort(dim=-1).values[..., :n]


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
        UserError: unknown name, unknown option, or a value an option cannot take.
    """
    return build("selector", _SELECTORS, name, options)


def describe(selector: Selector) -> str:
    """`name` and the options, as canonical JSON."""
    return json.dumps({"name": selector.name, "options": selector.options()}, sort_keys=True)


class SelectorRow(NamedTuple):
    """A line of the list a user chooses from."""

    name: str
    source: str
    cost: str
    options: dict[str, Any]


def selector_table() -> list[SelectorRow]:
    """All registered selectors by name, with source, cost and the defaults of their options."""
    return [SelectorRow(name, cls.source, cls.cost, cls().options()) for name, cls in sorted(_SELECTORS.items())]


__all__ = [
    "AUDIO",
    "TEXT",
    "VISUAL",
    "Allocation",
    "Candidates",
    "Probes",
    "Scored",
    "Selector",
    "SelectorRow",
    "choose",
    "describe",
    "make_selector",
    "register",
    "selector_table",
    "selectors",
]
