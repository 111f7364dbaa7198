"""What attention loses when a token is gone, exactly: leave-one-out in closed form.

Shape legend: see `omnimem_train.memory.state`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from omnimem_train.memory.fast import fast
from omnimem_train.memory.numeric import products, real
from omnimem_train.memory.options import one_of, within
from omnimem_train.memory.redundancy import EvidenceSelector
from omnimem_train.memory.selector import Candidates, Probes, Scored, register


@register
@dataclass(frozen=True)
class Perturbation(EvidenceSelector):
    """Change of the attention output when one candidate is removed and the softmax renormalised.

    For query head h, query q and candidate i, with attention A, head output o and that head's slice W of the output
    projection, the change is A / (1 - A) * ||W (v_i - o)||. Squared norms come from the Gram matrix W^T W, so the cost
    does not depend on the model's width. The score is the mean over the probes that can see i and over the query heads
    of a group, times (1 - rho) unless `redundancy="none"` (see `ScoringSelector`).

    A pair where i has nearly all attention would lose its digits in 1 - A and v_i - o. At most one candidate of a query
    can have more than half, so the largest of each query is computed from the others' sum instead, which is exact; if
    it is all the query sees, removing it leaves a zero output.

    Options:
        n_probes: queries spread over the chunk that are asked; 0 for all.
        group_norm: "mean" of the norms of a group's heads; or "sum", the norm of the sum of their changes, which is
            what evicting a kv head's token does to the layer. It needs the cross Gram matrices W_h^T W_h'.
        approximate: score by A * ||W v||_1, CriticalKV's bound, instead ("approximate perturbation" in ablations).
    """

    name: ClassVar[str] = "perturbation"
    records: ClassVar[bool] = True
    source: ClassVar[str] = "ours: exact leave-one-out; CriticalKV (arXiv 2502.03805) bounds the same quantity"
    cost: ClassVar[str] = "attention of 64 queries and their distances to all values; cosines of all pairs of keys"
    can_be_negative: ClassVar[bool] = False

    redundancy: str = "later_key"
    n_probes: int = 64
    group_norm: str = "mean"
    approximate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        within("n_probes", self.n_probes, 0)
        one_of("group_norm", self.group_norm, ("mean", "sum"))

    @property
    def needs(self) -> frozenset[str]:
        """The output projection, of which the Gram matrices are enough where heads count by themselves."""
        alone = self.group_norm == "mean" and not self.approximate
        return frozenset({"output_weight", "output_gram"} if alone else {"output_weight"})

    def probes(self) -> Probes:
        """`n_probes` spread over the chunk, or all."""
        return Probes("spread", self.n_probes) if self.n_probes else Probes("all")

    def measure(self, c: Candidates, keep: int) -> Scored:
        """Mean change over the probes that see a candidate."""
        fresh = c.mean_attention().mean(dim=2) * output_norm(c) if self.approximate else self._exact(c)
        importance = self.remembered(c, fresh)
        return Scored(importance, importance=importance)

    def _exact(self, c: Candidates) -> Tensor:
        change = Change(c)
        found = fast("change", c, change.own_gram) if self.group_norm == "mean" else None
        if found is not None:
            return found
        total = torch.zeros(c.shape, dtype=real(c.tokens.keys), device=c.tokens.keys.device)
        seen = torch.zeros(c.n, dtype=total.dtype, device=total.device)
        for attention, visible in c.attention_blocks():
            found = change.of_group(attention) if self.group_norm == "sum" else change.of_heads(attention).mean(dim=2)
            total += found.sum(dim=2)
            seen += visible.sum(dim=0)
        return total / seen.clamp(min=1)


def output_norm(c: Candidates) -> Tensor:
    """(B, G, S): L1 norm of a value after its head's slice of the output projection, averaged over the group."""
    weight, values = output_weight(c), c.tokens.values
    total = torch.zeros(c.shape, dtype=real(values), device=values.device)
    for head in range(weight.shape[1]):
        g = head // c.group
        part = weight[:, head].expand(values.shape[0], -1, -1)
        total[:, g] += products(values[:, g], part).abs().sum(-1)
    return total / c.group


def own_gram(weight: Tensor, kv_heads: int, heads: int) -> Tensor:
    """(E, H * D) output projection -> (G, H/G, D, D): W_h^T W_h of each query head, in float32 or better."""
    by_head = weight.to(real(weight)).unflatten(1, (kv_heads, heads // kv_heads, -1))
    return torch.einsum("xghd,xghe->ghde", by_head, by_head)


def output_weight(c: Candidates) -> Tensor:
    """(E, H, D): the output projection, head by head."""
    if c.output_weight is None:
        raise ValueError("this selector reads the output projection; give Candidates.output_weight")
    return c.output_weight.unflatten(1, (c.queries.shape[1], -1))


class Change:
    """Norms of the change of the attention output, for the values and the output projection of `c`.

    Symbols in the code: h, k heads of a group (size N), p probes, s candidates, d and e channels of a head.
    """

    def __init__(self, c: Candidates) -> None:
        self.candidates = c

    @cached_property
    def values(self) -> Tensor:
        """(B, G, S, D)."""
        return self.candidates.tokens.values.to(real(self.candidates.tokens.values))

    @cached_property
    def weight(self) -> Tensor:
        """(E, G, N, D): W."""
        c = self.candidates
        return output_weight(c).to(real(c.tokens.values)).unflatten(1, (-1, c.group))

    @cached_property
    def gram(self) -> Tensor:
        """(G, N, N, D, D): W_h^T W_k, for the group norm alone."""
        return torch.einsum("xghd,xgke->ghkde", self.weight, self.weight)

    @cached_property
    def size(self) -> Tensor:
        """(B, G, N, 1, S): squared norm of each projected value."""
        values = self.values.unsqueeze(2)
        return ((values @ self.own_gram) * values).sum(-1).unsqueeze(-2)

    @cached_property
    def own_gram(self) -> Tensor:
        """(G, N, D, D): W_h^T W_h."""
        given = self.candidates.output_gram
        return torch.einsum("xghd,xghe->ghde", self.weight, self.weight) if given is None else given

    def of_heads(self, attention: Tensor) -> Tensor:
        """(B, G, N, p, S) attention -> (B, G, N, p, S): the norm for each query head by itself."""
        values = self.values.unsqueeze(2)  # (B, G, 1, S, D)
        gram = self.own_gram
        largest = Largest(attention, values)
        output = largest.output

        projected = output @ gram
        square = self.size - 2 * (projected @ values.mT) + (projected * output).sum(-1, keepdim=True)
        change = _odds(attention) * square.clamp(min=0).sqrt()

        own = largest.change
        return change.scatter(-1, largest.where, _length(own, own @ gram))

    def of_group(self, attention: Tensor) -> Tensor:
        """(B, G, N, p, S) attention -> (B, G, p, S): the norm of the sum of the changes of a group's heads."""
        values, gram, heads = self.values, self.gram, attention.shape[2]
        largest = Largest(attention, values.unsqueeze(2))
        output, odds = largest.output, _odds(attention)
        square = torch.zeros_like(attention[:, :, 0])
        for h in range(heads):
            for k in range(h + 1):
                left, right = output[:, :, h] @ gram[:, h, k], output[:, :, k] @ gram[:, h, k].mT
                both = ((values @ gram[:, h, k]) * values).sum(-1).unsqueeze(-2) - (left + right) @ values.mT
                both = both + (left * output[:, :, k]).sum(-1, keepdim=True)
                square += (1 if h == k else 2) * odds[:, :, h] * odds[:, :, k] * both
        where, exact = self._of_group_at_largest(attention, largest)
        return square.clamp(min=0).sqrt().scatter(-1, where, exact)

    def _of_group_at_largest(self, attention: Tensor, largest: Largest) -> tuple[Tensor, Tensor]:
        """The candidates (B, G, p, N) that are the largest of one of the N heads, and their exact group norms."""
        where = largest.where.squeeze(-1).transpose(2, 3)  # (B, G, p, N)
        index = where.unsqueeze(2).expand(-1, -1, attention.shape[2], -1, -1)  # (B, G, h, p, N)
        value = largest.value.transpose(2, 3).unsqueeze(2)  # (B, G, 1, p, N, D)
        change = _odds(attention.gather(-1, index)).unsqueeze(-1) * (value - largest.output.unsqueeze(-2))
        is_own = (index == largest.where).unsqueeze(-1)
        change = torch.where(is_own, largest.change.unsqueeze(-2), change)
        change = change.permute(0, 1, 3, 4, 2, 5).flatten(-2)  # (B, G, p, N, h * D)
        gram = self.gram.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (G, h * D, k * E)
        return where, _length(change, change @ gram.unsqueeze(1)).squeeze(-1)


class Largest:
    """The candidate that gets most of each query's attention, and what is left without it.

    Args:
        attention: (B, G, N, p, S).
        values: (B, G, 1, S, D).

    Attributes:
        where: (B, G, N, p, 1) its row.
        value: (B, G, N, p, D) its value.
        output: (B, G, N, p, D) output of the head with it.
        change: (B, G, N, p, D) output with it minus output without it.
    """

    def __init__(self, attention: Tensor, values: Tensor) -> None:
        top, self.where = attention.max(dim=-1, keepdim=True)
        others = attention.scatter(-1, self.where, 0)
        rest, alone = others.sum(-1, keepdim=True), others @ values
        d = values.shape[-1]
        all_values = values.expand(*attention.shape[:3], -1, d)
        self.value = all_values.gather(3, self.where.expand(-1, -1, -1, -1, d))
        self.output = alone + top * self.value
        self.change = top * (self.value - alone / rest.clamp(min=torch.finfo(rest.dtype).tiny))


def _odds(attention: Tensor) -> Tensor:
    """A / (1 - A), finite."""
    return attention / (1 - attention).clamp(min=1e-6)


def _length(x: Tensor, x_gram: Tensor) -> Tensor:
    """(..., D), (..., D) -> (..., 1): square root of their inner product, which rounding may have made negative."""
    return (x * x_gram).sum(-1, keepdim=True).clamp(min=0).sqrt()
