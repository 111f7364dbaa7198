"""How a layer's media budget is split over picture and sound."""
from __future__ import annotations
from typing import Any
from omnimem_train.memory.selector import Allocation, Candidates, Scored
from omnimem_train.memory.state import AUDIO, VISUAL
from dataclasses import dataclass


@dataclass(frozen=True)
class Shared:
    """One budget for both: the best tokens win, whatever they are."""

    def counts(self, c: Candidates, scored: Scored, budget: int) -> list[dict[tuple[int, ...], int]]:
        return [{(VISUAL, AUDIO): budget}] * c.tokens.keys.shape[0]


def make_allocation(name: str, **options: Any) -> Allocation:
    return Shared()
