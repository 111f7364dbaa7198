"""A generator run ahead of its reader by a thread, with a stream of its own on a GPU."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from contextlib import closing, nullcontext
from typing import Any, TypeVar

import torch

T = TypeVar("T")
POLL_S = 0.2


def run_ahead(
    make: Callable[[], Generator[T, None, None]],
    depth: int,
    device: torch.device,
    interrupt: Callable[[], None] = lambda: None,
) -> Generator[T, None, None]:
    """The items of `make()` in their order, up to `depth` of them made before they are asked for.

    An item is handed over when its work on the device is done, so waiting for it is waiting on the host. What it raises
    is raised here, in the item's place. Closing this generator ends the thread.

    The thread begins with the first item asked for, and sees what the reader's stream had been given until then.
    Tensors of an item belong to the thread's stream: give them to the reader's (`Tensor.record_stream`) before they are
    dropped.

    Args:
        make: runs in the thread, closed there too.
        depth: items made or being made that were not yet asked for; 1 or more.
        interrupt: called when the reader has gone, to end what an item waits for.
    """
    made: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    slots, stop = threading.Semaphore(depth), threading.Event()
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(device))

    def work() -> None:
        try:
            if stream is not None:
                torch.cuda.set_device(stream.device)  # of this thread
            with nullcontext() if stream is None else torch.cuda.stream(stream), closing(make()) as items:
                while slots.acquire() and not stop.is_set():
                    found: Any = next(items, stop)
                    if found is stop:
                        break
                    if stream is not None:
                        stream.synchronize()
                    made.put(("item", found))
                    del found  # what is made next is all that this thread holds on to
            made.put(("end", None))
        except BaseException as error:  # belongs to the reader
            made.put(("error", error))

    thread = threading.Thread(target=work, daemon=True, name="run ahead")
    thread.start()
    try:
        while True:
            kind, found = made.get()
            if kind == "end":
                return
            if kind == "error":
                raise found
            slots.release()
            yield found
            del found
    finally:
        stop.set()
        slots.release()
        while thread.is_alive():
            interrupt()
            thread.join(POLL_S)
