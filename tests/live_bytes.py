"""The largest sum of bytes of tensors that are alive at once, on any device: what a GPU's allocator would report."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside, tensors that operations make are followed until they are gone.

    Args:
        known: tensors that were there before and do not count.
        leave_out: tensors that do not count, by shape.

    Attributes:
        peak: the largest sum so far.
    """

    def __init__(self, known: Iterable[Tensor], leave_out: Callable[[tuple[int, ...]], bool]) -> None:
        super().__init__()
        self.known, self.leave_out = {t.untyped_storage()._cdata for t in known}, leave_out
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and not self.leave_out(tuple(t.shape)):
                storage = t.untyped_storage()
                if storage._cdata not in self.known:
                    self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: (ref, n) for key, (ref, n) in self.live.items() if not ref.expired()}
        self.peak = max(self.peak, sum(n for _, n in self.live.values()))
        return out
