"""Where the time of a LoRA step goes on a GPU: how long kernels and copies run, how long nothing does, by kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from cases import Bench, with_lora
from long import asked, blocks_of, step_on
from torch.profiler import ProfilerActivity, profile

from omnimem_train.gradient import Gradient

CHUNKS = 16
WAYS = {
    "chunk": Gradient("all"),
    "chunk.host": Gradient("all", offload="host"),
    "layer": Gradient("all", granularity="layer"),
    "layer.host": Gradient("all", granularity="layer", offload="host"),
}


@dataclass(frozen=True)
class Event:
    """Something that ran on the device, in seconds."""

    name: str
    start: float
    end: float

    @property
    def copies(self) -> bool:
        """Whether it goes between host and device."""
        return "HtoD" in self.name or "DtoH" in self.name


def timeline(bench: Bench) -> None:
    """Steps on a stream of `CHUNKS` chunks, recomputed by chunk and by layer, with what is stored on the device and in
    host memory: their time, and where it goes (timeline.txt)."""
    with_lora(bench)
    tokens, lines = min(bench.shape.tokens, CHUNKS * bench.shape.chunk), list[str]()
    for name, gradient in WAYS.items():
        stream = asked(bench, blocks_of(bench, tokens, host=gradient.offload == "host"))
        run = partial(step_on, bench, stream, gradient)
        for _ in range(3):  # recorded then
            run()
        bench.add(f"timeline.{name}", bench.clock.samples(run, 3))
        lines += [f"-- {name}", *told(traced(bench, run))]
    path = bench.results.path.with_name(f"timeline{bench.suffix}.txt")
    path.write_text("\n".join(lines) + "\n")
    print("wrote", path)


def traced(bench: Bench, run: Callable[[], object]) -> list[Event]:
    """What ran on the device meanwhile, in order."""
    with profile(activities=[ProfilerActivity.CUDA if bench.device.type == "cuda" else ProfilerActivity.CPU]) as found:
        run()
        bench.clock.synchronise()
    assert found.profiler is not None and found.profiler.kineto_results is not None
    events = [
        Event(e.name(), e.start_ns() / 1e9, (e.start_ns() + e.duration_ns()) / 1e9)
        for e in found.profiler.kineto_results.events()
        if e.device_type() == torch.autograd.DeviceType.CUDA
    ]
    return sorted(events, key=lambda e: e.start)


def told(events: list[Event], most: int = 25) -> list[str]:
    """Seconds in all, with kernels, with nothing but copies, with nothing; then kernels by time."""
    if not events:
        return ["nothing ran on a device"]
    kernels, copies = [e for e in events if not e.copies], [e for e in events if e.copies]
    whole = max(e.end for e in events) - events[0].start
    busy, either = covered(kernels), covered(events)
    gaps = sorted(pauses(kernels), reverse=True)
    lines = [
        f"{whole:.3f} s: kernels {busy:.3f}, copies alone {either - busy:.3f}, nothing {whole - either:.3f}",
        f"longest pauses of kernels, ms: {', '.join(f'{1e3 * g:.1f}' for g in gaps[:12])}; "
        f"{sum(g > 1e-4 for g in gaps)} over 0.1 ms with {sum(g for g in gaps if g > 1e-4):.3f} s in all",
    ]
    for way in ("HtoD", "DtoH"):
        those = [e for e in copies if way in e.name]
        lines.append(f"{way}: {len(those)} copies, {sum(e.end - e.start for e in those):.3f} s")
    spent, times = Counter[str](), Counter[str]()
    for e in kernels:
        spent[e.name] += e.end - e.start  # type: ignore[assignment]
        times[e.name] += 1
    lines += [f"{s:8.4f} s {times[name]:7d} x {name[:110]}" for name, s in spent.most_common(most)]
    return lines


def covered(events: list[Event]) -> float:
    """Seconds in which at least one of `events`, which are in order, runs."""
    total, until = 0.0, float("-inf")
    for e in events:
        total += max(0.0, e.end - max(e.start, until))
        until = max(until, e.end)
    return total


def pauses(events: list[Event]) -> list[float]:
    """Seconds between `events`, which are in order, where none runs."""
    found, until = [], events[0].start
    for e in events:
        if e.start > until:
            found.append(e.start - until)
        until = max(until, e.end)
    return found


TIMELINE_CASES: dict[str, Callable[[Bench], None]] = {"timeline": timeline}
