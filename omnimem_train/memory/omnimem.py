"""The selector of the OmniMem paper, with the readings of its released code as options.

Shape legend: see `omnimem_train.memory.state`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from omnimem_train.memory.fast import fast
from omnimem_train.memory.learned import learned_logits
from omnimem_train.memory.numeric import products, real
from omnimem_train.memory.options import one_of, within
from omnimem_train.memory.redundancy import EvidenceSelector, neighbour_cosine, sequence_cosine
from omnimem_train.memory.selector import Candidates, Probes, Scored, register

RELEASED: dict[str, Any] = {
    "formula": "sqrt_product",
    "importance": "approximate",
    "history": "average",
    "neighbours": "sequence",
    "features": "hidden",
}
"""Options with which `omnimem` is the released code (commit de44792): `make_selector("omnimem", **RELEASED)`."""


@register
@dataclass(frozen=True)
class OmniMem(EvidenceSelector):
    """Importance a and redundancy s of every candidate, one set for all kv heads; the defaults are the paper's.

    At lambda = 0.02 the choice is almost all redundancy. Near-equal neighbours make 1 - s negative by rounding; the
    released code then keeps NaN rows, here 1 - s is clamped at 0.

    Options:
        lam: lambda. With 0 no attention is computed and the score is minus the redundancy.
        formula: "product" a^lambda (1 - s), the paper; "sqrt_product" a^lambda sqrt(1 - s), the released code; "sum"
            lambda a / sum(a) - 2 s, the released code's other form (sum over all candidates, text included).
        importance: how attention A of the chunk's queries is reduced. "exact" sum over queries of A averaged over
            heads, the paper; "exact_mean" the same divided by the number of queries, the released code's "exact";
            "approximate" one softmax of logits averaged over heads, summed over queries, its default. "learned" needs
            no queries: a linear reading of the layer input, trained with `loss.retention` (ours; at lambda 0.02 it
            counts for little, 0.3 suits it).
        neighbours: "modality" s_i is the mean cosine with the neighbours of the same modality, the paper (the first and
            last have one neighbour); "sequence" with the neighbours in the whole sequence, a missing one counting as 1,
            the released code.
        features: what is compared. "hidden" the layer inputs, both sources; they have to be kept in memory, 3.5 times
            the size of keys and values in a 7B model. "keys" or "values" of all heads side by side need nothing extra.
    """

    name: ClassVar[str] = "omnimem"
    records: ClassVar[bool] = True
    source: ClassVar[str] = "OmniMem, arXiv 2606.07577; options follow its released code (commit de44792)"
    cost: ClassVar[str] = "attention of all chunk queries; layer inputs kept in memory"
    shared_heads: ClassVar[bool] = True

    lam: float = 0.02
    formula: str = "product"
    importance: str = "exact"
    neighbours: str = "modality"
    features: str = "hidden"

    def __post_init__(self) -> None:
        super().__post_init__()
        within("lam", self.lam, 0)
        one_of("formula", self.formula, ("product", "sqrt_product", "sum"))
        one_of("importance", self.importance, ("exact", "exact_mean", "approximate", "learned"))
        one_of("neighbours", self.neighbours, ("modality", "sequence"))
        one_of("features", self.features, ("hidden", "keys", "values"))

    @property
    def needs(self) -> frozenset[str]:
        """Layer inputs, if they are what is compared or read, and what reads them."""
        learned = self.importance == "learned" and self.lam > 0
        hidden = {"hidden"} if learned or self.features == "hidden" else set()
        return frozenset(hidden | ({"importance_head"} if learned else set()))

    def probes(self) -> Probes:
        """All, or none where nothing is asked."""
        return Probes("all" if self.lam > 0 and self.importance != "learned" else "none")

    def measure(self, c: Candidates, keep: int) -> Scored:
        """The formula; `Scored.redundancy` is s."""
        s = self._redundancy(c)
        if self.lam == 0:
            return Scored(self._for_heads(c, -2 * s), redundancy=self._for_heads(c, s))
        fresh = self._for_heads(c, self._importance(c))
        a = (fresh if self.importance == "learned" else self.remembered(c, fresh))[:, 0]
        if self.formula == "sum":
            score = self.lam * a / a.sum(dim=-1, keepdim=True).clamp(min=1e-30) - 2 * s
        else:
            unlike = (1 - s).clamp(min=0)
            score = a**self.lam * (unlike.sqrt() if self.formula == "sqrt_product" else unlike)
        return Scored(*(self._for_heads(c, x) for x in (score, a, s)))

    def score(self, c: Candidates, keep: int) -> Scored:
        """The same for all heads, also when an extra redundancy factor differs between them (then it is averaged)."""
        found = super().score(c, keep)
        return Scored(self._for_heads(c, found.score.mean(dim=1)), found.importance, found.redundancy)

    @staticmethod
    def _for_heads(c: Candidates, x: Tensor) -> Tensor:
        return x.unsqueeze(1).expand(c.shape)

    def _importance(self, c: Candidates) -> Tensor:
        """(B, S)."""
        if self.importance == "learned":
            return self._learned(c)
        if self.importance == "approximate":
            return self._attention_of_mean_logits(c)
        total = self._attention_sum(c)
        return total / max(1, c.query_rows.shape[0]) if self.importance == "exact_mean" else total

    @staticmethod
    def _learned(c: Candidates) -> Tensor:
        """(B, S), 1 for the most important candidate."""
        if c.tokens.hidden is None or c.importance_head is None:
            raise ValueError("a learned importance reads layer inputs with Candidates.importance_head; give both")
        logits = learned_logits(c.tokens.hidden, c.tokens.modality[:, 0], c.importance_head)
        return (logits - logits.amax(-1, keepdim=True)).exp()

    @staticmethod
    def _attention_sum(c: Candidates) -> Tensor:
        """(B, S): attention averaged over all query heads, summed over queries."""
        found = fast("attention", c)
        if found is not None:
            return found.mean(dim=(1, 2))
        total = torch.zeros(c.shape[0], c.n, dtype=real(c.tokens.keys), device=c.tokens.keys.device)
        for attention, _ in c.attention_blocks():
            total += attention.sum(dim=3).mean(dim=(1, 2))
        return total

    def _attention_of_mean_logits(self, c: Candidates) -> Tensor:
        """(B, S): softmax over candidates of logits averaged over all query heads, summed over queries."""
        b, g, s, d = c.tokens.keys.shape
        dtype = real(c.tokens.keys)
        queries = c.queries.reshape(b, g, c.group, -1, d).to(dtype).sum(dim=2)  # q . k is linear: add heads first
        columns = torch.arange(s, device=queries.device)
        total = torch.zeros(b, s, dtype=dtype, device=queries.device)
        block = max(1, 2**22 // (b * s))
        for start in range(0, c.query_rows.shape[0], block):
            logits = products(queries[:, :, start : start + block], c.tokens.keys.to(dtype)).sum(dim=1)
            logits = logits * (c.scaling / c.queries.shape[1])
            hidden = columns > c.query_rows[start : start + block, None]
            total += logits.masked_fill_(hidden, float("-inf")).softmax(-1).sum(dim=1)
        return total

    def _redundancy(self, c: Candidates) -> Tensor:
        """(B, S): s."""
        if self.features == "hidden":
            if c.tokens.hidden is None:
                raise ValueError("omnimem with features='hidden' reads layer inputs; keep LayerMemory.hidden")
            x = c.tokens.hidden
        else:
            x = getattr(c.tokens, self.features).transpose(1, 2).flatten(2)
        if self.neighbours == "sequence":
            return sequence_cosine(x)
        return neighbour_cosine(x.unsqueeze(1), c.tokens.modality[:, :1])[:, 0]
