"""The choice of a stream: after each chunk and for each layer, which tokens stay.

`omnimem_train.memory` chooses among tensors; here it meets the model. Shape legend: see `omnimem_train.memory.state`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from omnimem_train.errors import UserError
from omnimem_train.memory.allocation import Fixed
from omnimem_train.memory.perturbation import own_gram
from omnimem_train.memory.selector import Candidates, choose
from omnimem_train.memory.spec import MemorySpec
from omnimem_train.memory.state import LayerMemory
from omnimem_train.models.interface import StreamingModel


class Chooser:
    """The selector, the allocation and the budgets of a spec, for one model.

    Raises:
        UserError: a spec that does not fit the model.
    """

    def __init__(self, model: StreamingModel, spec: MemorySpec) -> None:
        self.model, self.spec = model, spec
        self.selector = spec.make_selector()
        self.allocation = spec.make_allocation()
        itemsize = torch.finfo(model.dtype).bits // 8
        self.budgets = spec.layer_budgets(model.n_layers, model.kv_heads, model.head_dim, itemsize)
        self._grams: dict[int, Tensor] = {}
        if "importance_head" in self.selector.needs and model.importance_head is None and not spec.unlimited:
            raise UserError(
                "the memory asks for a learned importance, and the model has no head to read it with",
                remedy="load an adapter that was trained with loss.retention, or train one",
            )

    def start(self) -> None:
        """For a new stream: what is derived from the weights alone is made anew, they may have changed."""
        self._grams.clear()

    @contextmanager
    def holding(self, grams: list[Tensor]) -> Iterator[None]:
        """Inside, `gram` of the layers is what is given; nothing changes for an empty list."""
        before = self._grams
        self._grams = before | dict(enumerate(grams))
        try:
            yield
        finally:
            self._grams = before

    @property
    def counts_text(self) -> bool:
        """Whether it matters how many candidates are text."""
        return any(budget is not None for budget in self.budgets)

    @torch.no_grad()
    def choose(
        self, layer: int, tokens: LayerMemory, queries: Tensor, chunk: int, n_text: int, sums: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Choose among memory and chunk.

        Args:
            tokens: the candidates, memory first.
            queries: (B, H, n, D) of the chunk.
            chunk: its number. n_text: text tokens among the candidates.
            sums: (B, H, n) see `Tap`, if the layer's attention has them.

        Returns:
            rows (B, G, K) to keep (None: all), and the evidence (B, G, S) to store (None: none measured).
        """
        budget = self.budgets[layer]
        if budget is None:
            return None, None
        left = self.spec.media_budget(budget, n_text)
        allocation = self.allocation
        if left.audio is not None and left.visual is not None:
            allocation = Fixed(audio=left.audio, visual=left.visual)
        view = self._candidates(layer, tokens.detach(), queries.detach(), chunk, n_text, sums)
        rows, scored = choose(view, self.selector, allocation, left.total)
        evidence = None if scored is None or scored.importance is None else scored.importance.float()
        return (None if rows.shape[-1] == tokens.n_tokens else rows), evidence

    def _candidates(
        self, layer: int, tokens: LayerMemory, queries: Tensor, chunk: int, n_text: int, sums: Tensor | None
    ) -> Candidates:
        n_memory, needs = tokens.n_tokens - queries.shape[2], self.selector.needs
        gram = self.gram(layer) if "output_gram" in needs else None
        probes = self.selector.probes().rows(queries.shape[2], queries.device)
        return Candidates(
            tokens=tokens,
            n_memory=n_memory,
            queries=queries if probes.shape[0] == queries.shape[2] else queries[:, :, probes],
            query_rows=probes + n_memory,
            scaling=self.model.head_dim**-0.5,
            output_weight=self.model.output_weight(layer) if "output_weight" in needs and gram is None else None,
            layer=layer,
            n_layers=self.model.n_layers,
            seed=hash((self.spec.seed, chunk, layer)) & 0x7FFFFFFF,
            rotary=self.model.rotary() if "rotary" in needs else None,
            known_text=n_text,
            output_gram=gram,
            log_sums=sums if probes.shape[0] == queries.shape[2] else None,  # of a few they are soon computed
            importance_head=self._head(layer) if "importance_head" in needs else None,
        )

    def _head(self, layer: int) -> Tensor | None:
        head = self.model.importance_head
        return None if head is None else head[layer].detach()

    def gram(self, layer: int) -> Tensor:
        """W_h^T W_h of a layer's output projection, made once a stream."""
        if layer not in self._grams:
            with torch.autocast(self.model.device.type, enabled=False):
                weight = self.model.output_weight(layer)
                self._grams[layer] = own_gram(weight, self.model.kv_heads, self.model.heads)
        return self._grams[layer]
