"""Work beside the next layers: a branch of a recording.

What a layer keeps is read by the next chunk and by no other layer, so the choice need not stand in the way of the next
layer. On a GPU a recording (`omnimem_train.captured`) holds it in a second branch, whose many small kernels run while
the large ones of the next layers leave room.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

import torch

T = TypeVar("T")
BEHIND = 2
"""Layers whose choice may still be under way; their queries and candidates are held meanwhile."""


class Beside:
    """A second stream beside the one that is current. A context manager: after it the current stream has all results.

    Args:
        stream: the second one.
        behind: pieces of work that may be under way when another begins.
    """

    def __init__(self, stream: torch.cuda.Stream, behind: int = BEHIND) -> None:
        self.stream, self.behind = stream, behind
        self._begun = False
        self._under_way: deque[tuple[torch.cuda.Event, Callable[[], object]]] = deque()

    def __enter__(self) -> Beside:
        return self

    def do(self, work: Callable[[], T]) -> T:
        """`work()` on the second stream, after all that is on the current one so far. Its results may be read there
        from the end of the context on. What `work` closes over is held until it is done, so nothing else gets that
        memory meanwhile."""
        self._begun = True
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            found = work()
        self._under_way.append((self.stream.record_event(), work))
        while len(self._under_way) > self.behind:
            event, _ = self._under_way.popleft()
            torch.cuda.current_stream().wait_event(event)
        return found

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        # a recording can only end, also after an error, when its branches are joined; one that never began is none
        if self._begun:
            try:
                torch.cuda.current_stream().wait_stream(self.stream)
            except RuntimeError:
                if kind is None:  # otherwise what went wrong first is what is told
                    raise
        self._under_way.clear()
