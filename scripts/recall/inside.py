"""Measurements that look into the memory: what is kept in float32 and bfloat16, how much of each modality over time,
and which seconds of one clip."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data_prep.world import ClipSpec
from omnimem_train.memory.spec import MemorySpec
from omnimem_train.memory.state import AUDIO, VISUAL
from omnimem_train.streaming import Stream, StreamState
from scripts.recall.asking import Asker
from scripts.recall.jobs import Answers, Context
from scripts.recall.methods import Form


def final_state(asker: Asker, spec: MemorySpec, media: Tensor, every: Any = None) -> StreamState:
    """The state after streaming clips (B, T, E); `every(state)` is called after each chunk."""
    encoded = asker.streams.stream(media, asker.clips.seconds, [])
    stream = Stream(asker.streams.model, spec)
    with torch.no_grad():
        state = stream.start(len(media))
        for block in encoded.blocks:
            for first in range(0, block.n, spec.chunk_tokens):
                state = stream.feed(state, block[first : first + spec.chunk_tokens])
                if every is not None:
                    every(state)
        return stream.flush(state)


@dataclass(frozen=True)
class Precision:
    """The same settings in float32 and bfloat16: answers, and how much of what is kept agrees."""

    base: int
    forms: tuple[tuple[Form, int], ...]

    def run(self, context: Context) -> dict[Any, float]:
        """Measure and write a part file for each precision."""
        overlap = {}
        askers = [context.asker(self.base, "test", dtype) for dtype in ("float32", "bfloat16")]
        for form, budget in self.forms:
            spec = form.spec(budget)
            ends = [final_state(a, spec, a.clips.media[:32]) for a in askers]
            overlap[form, budget] = shared_rows(ends[0], ends[1])
        for dtype in ("float32", "bfloat16"):
            name = f"base{self.base}-{dtype}"
            job = Answers("precision", self.base, "test", self.forms, dtype=dtype, model_name=name)
            job.run(context)
            path = context.work / "parts" / f"precision__{name}.000.json"
            about = json.loads(path.read_text())
            for (form, budget), share in overlap.items():
                key = f"{form.kind} {json.dumps(form.tuned, sort_keys=True)}@{budget}"
                about["settings"][key]["kept_overlap"] = share
            path.write_text(json.dumps(about))
        return overlap


def shared_rows(a: StreamState, b: StreamState) -> float:
    """Share of the tokens that two states both keep, mean over layers, streams and heads."""
    shares = []
    for x, y in zip(a.layers, b.layers, strict=True):
        media = (x.modality != 0).unsqueeze(-1)
        same = ((x.index.unsqueeze(-1) == y.index.unsqueeze(-2)) & media).any(-1)
        shares.append(float(same.sum() / media.sum()))
    return sum(shares) / len(shares)


@dataclass(frozen=True)
class Pictures:
    """Kept share by modality over time, and what is kept of one clip."""

    base: int
    forms: tuple[Form, ...]
    budget: int
    layer: int = 3

    def run(self, context: Context) -> dict[Any, float]:
        """Write kept.json and map.json."""
        asker = context.asker(self.base, "test")
        spec_of_clip = asker.clips.specs[0]
        kept: dict[str, Any] = {}
        maps: dict[str, Any] = {}
        seconds: list[float] = []
        for form in self.forms:
            rows: list[tuple[float, float, float]] = []

            def note(state: StreamState, rows: list[tuple[float, float, float]] = rows) -> None:
                rows.append(self._shares(asker, state))

            end = final_state(asker, form.spec(self.budget), asker.clips.media[:32], note)
            whole = [r for i, r in enumerate(rows) if r[0] > (rows[i - 1][0] if i else 0.0)]
            seconds = [r[0] for r in whole]
            kept[form.kind] = {"visual": [r[1] for r in whole], "audio": [r[2] for r in whole]}
            layer = end.layers[self.layer]
            times, modality = layer.time_s[0, 0], layer.modality[0, 0]
            maps[form.kind] = {
                "layer": self.layer,
                "visual_s": sorted(times[modality == VISUAL].tolist()),
                "audio_s": sorted(times[modality == AUDIO].tolist()),
            }
        context.results.mkdir(parents=True, exist_ok=True)
        (context.results / "kept.json").write_text(json.dumps({"seconds": seconds, "methods": kept}) + "\n")
        about = {"clip": spec_of_clip.id, "seconds": spec_of_clip.settings.seconds, "events": events(spec_of_clip)}
        (context.results / "map.json").write_text(json.dumps(about | {"methods": maps}) + "\n")
        return {}

    @staticmethod
    def _shares(asker: Asker, state: StreamState) -> tuple[float, float, float]:
        """Seconds streamed, and the share kept of the picture and sound tokens streamed so far."""
        layout = asker.streams.layout(asker.clips.seconds)
        n = max(0, state.n_run - asker.streams.opening_tokens)
        seen = layout.modality[:n]
        found = []
        for kind in (VISUAL, AUDIO):
            held = torch.stack([(m.modality == kind).sum(-1).float().mean() for m in state.layers]).mean()
            found.append(float(held) / max(1, int((seen == kind).sum())))
        return float(layout.time_s[n - 1]) if n else 0.0, found[0], found[1]


def events(spec: ClipSpec) -> list[dict[str, Any]]:
    """The events of a clip for its map."""
    rows = [("sight", f"{s.colour} {s.shape}", s, s.faint) for s in spec.sights]
    rows += [("sound", f"{s.pitch} {s.pattern}", s, s.faint) for s in spec.sounds]  # type: ignore[misc]
    rows += [("distractor", d.kind, d, False) for d in spec.distractors]  # type: ignore[misc]
    return [
        {"kind": kind, "name": name, "start_s": e.start_s, "end_s": e.end_s, "faint": faint}
        for kind, name, e, faint in rows
    ]
