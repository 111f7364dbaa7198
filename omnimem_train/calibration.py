"""Budgets across layers, measured on a few clips: the paper's allocation between layers, for any model and selector.

Clips are streamed with the same budget in every layer. Wherever a layer has to drop something, its complexity
C_l = entropy(p_l) (1 - mean s_l) is noted, and the split between picture and sound that AVBA makes there. The budgets
are in proportion to softmax_l(C_l / T) (OmniMem, arXiv 2606.07577, which measures them once on a small set and keeps
them; T = 0.2). Entropies are in nats and not divided by log n: with equal budgets n is the same in all layers, so that
would only be another T.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, ClassVar

import torch

from omnimem_train.config import to_plain
from omnimem_train.data import DataConfig, LoadedClip, Sample, SkippedMedia, StreamDataset, StreamLoader
from omnimem_train.errors import UserError
from omnimem_train.memory.allocation import Avba, Counts, available, floor_tokens, layer_complexity, layer_table
from omnimem_train.memory.selector import Allocation, Candidates, Scored
from omnimem_train.memory.spec import MemorySpec
from omnimem_train.models.interface import MediaEncoder, MediaWindow, StreamingModel
from omnimem_train.models.loading import ModelConfig
from omnimem_train.rng import versions
from omnimem_train.session import model_fingerprint
from omnimem_train.streaming import Stream, encode
from omnimem_train.trainer import read_samples

FORMAT = 1
UNMEASURED = ("output", "model.device", "data.workers", "data.prefetch_windows", "data.time_limit_s")


@dataclass(frozen=True)
class CalibrationConfig:
    """A calibration.

    Attributes:
        model: with `adapter` to measure the model as the adapter has made it.
        data: clips, as in training; questions are not read. Do not measure on clips that are evaluated later.
        encoder: options of the model's encoder side.
        memory: how the clips are streamed. `budget` is the mean of the table, in tokens a layer.
        temperature: T. Low: layers differ much; high: all get nearly the same.
        clips: measured clips, taken evenly from the manifest; a file counts once.
        per_modality: give every layer [audio, visual] instead of one number. The split is that of `memory.allocation`,
            which must be avba: its prior and floor decide.
        output: the JSON file to write.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    encoder: dict[str, Any] = field(default_factory=dict)
    memory: MemorySpec = field(default_factory=MemorySpec)
    temperature: float = 0.2
    clips: int = 16
    per_modality: bool = False
    output: Path = Path("runs/layer_table.json")

    def __post_init__(self) -> None:
        m = self.memory
        if not self.temperature > 0 or self.clips < 1:
            raise UserError(f"temperature={self.temperature}, clips={self.clips}", remedy="give both above 0")
        if m.layer_table:
            raise UserError(
                "a calibration with memory.layer_table",
                cause="layers are compared at one budget",
                remedy="leave it out",
            )
        if m.unlimited or not isinstance(m.budget, int):
            raise UserError(
                f"a calibration with selector {m.selector!r} and memory.budget={m.budget!r}",
                cause="layers are measured where they drop tokens",
                remedy="choose a selector that drops some, and a budget in tokens a layer",
            )
        if not m.make_allocation().spends_all:
            raise UserError(
                f"a calibration with allocation {m.allocation!r}", remedy="choose one that spends the whole budget"
            )
        if self.per_modality and m.allocation != "avba":
            raise UserError(
                f"per_modality with allocation {m.allocation!r}",
                cause="the split between picture and sound is the one that AVBA measures",
                remedy="set memory.allocation=avba, with its prior in memory.allocation_options",
            )


class Recorder:
    """An allocation that notes what it sees of every layer and allots as `inner` does.

    Attributes:
        complexity: for each layer, C_l at every chunk after which it dropped something.
        audio_share: for each layer, AVBA's share of sound at those of them that had both modalities.
    """

    spends_all: ClassVar[bool] = True

    def __init__(self, inner: Allocation, n_layers: int) -> None:
        self.inner = inner
        self.avba = inner if isinstance(inner, Avba) else Avba()
        self.complexity: list[list[float]] = [[] for _ in range(n_layers)]
        self.audio_share: list[list[float]] = [[] for _ in range(n_layers)]

    def counts(self, c: Candidates, scored: Scored, budget: int) -> Counts:
        """Those of `inner`."""
        self.complexity[c.layer].append(layer_complexity(c, scored))
        if all(bool(n.amin() > 0) for n in available(c)):
            self.audio_share[c.layer].append(float(self.avba.audio_share(c, scored).mean()))
        return self.inner.counts(c, scored, budget)


@torch.no_grad()
def measure(model: StreamingModel, spec: MemorySpec, encoder: MediaEncoder, windows: Iterable[MediaWindow]) -> Recorder:
    """Stream one clip, and note what its layers drop from."""
    stream = Stream(model, spec)
    stream.chooser.allocation = recorder = Recorder(stream.chooser.allocation, model.n_layers)
    stream.flush(stream.feed_all(stream.start(), encode(encoder, windows)))
    return recorder


def calibrate(
    config: CalibrationConfig,
    model: StreamingModel,
    progress: Callable[[Iterable[LoadedClip]], Iterable[LoadedClip]] = iter,
) -> dict[str, Any]:
    """Measure a layer table and write it to `config.output`.

    Returns:
        what was written: "layer_table" (see `MemorySpec.layer_table`), "layers" (per layer its complexity and AVBA's
        share of sound, mean over clips of the mean over chunks, with the standard deviation over clips), "clips" (id,
        file and measured chunks of each), "fingerprints" of weights, memory spec and settings, "settings", "versions".

    Raises:
        UserError: no clips, a broken one beyond `data.max_broken`, or none that fills the memory.
    """
    samples = spread(read_samples(config.data), config.clips)
    dataset = StreamDataset(samples, config.data, model.window_s(config.data.fps), model.sampling_rate)
    clips, found = [], []
    for clip in progress(StreamLoader(dataset).clips(stop=len(samples))):
        try:
            encoder = model.open(clip.info, config.data.fps, prefix=clip.sample.prefix, **config.encoder)
            recorder = measure(model, config.memory, encoder, clip)
        except SkippedMedia as error:
            print(f"skipped: {error}", flush=True)
            continue
        chunks = len(recorder.complexity[0])
        clips.append({"id": clip.sample.id, "path": str(clip.sample.path), "chunks": chunks})
        found += [recorder] if chunks else []
    layers = statistics(found, config)
    settings = to_plain(config)
    report = {
        "format": FORMAT,
        "layer_table": table(layers, config),
        "layers": layers,
        "clips": clips,
        "fingerprints": {
            "model": model_fingerprint(model),
            "memory": config.memory.fingerprint(),
            "settings": settings_fingerprint(settings),
        },
        "settings": settings,
        "versions": versions(),
    }
    config.output.parent.mkdir(parents=True, exist_ok=True)
    config.output.write_text(json.dumps(report, indent=2) + "\n")
    return report


def spread(samples: list[Sample], n: int) -> list[Sample]:
    """`n` samples of different files, evenly spaced in their order; all of them if there are fewer."""
    files = list({(s.media, s.audio, s.use_audio): s for s in reversed(samples)}.values())[::-1]
    n = min(n, len(files))
    return [files[i * len(files) // n] for i in range(n)]


def statistics(found: list[Recorder], config: CalibrationConfig) -> list[dict[str, Any]]:
    """Per layer: "complexity" and "audio_share" (None without sound), each with "_std" over clips.

    Raises:
        UserError: nothing was measured, or no sound beside picture where the table needs both.
    """
    if not found:
        raise UserError(
            f"no clip fills a memory of {config.memory.budget} tokens, so nothing was measured",
            remedy="take longer clips, more frames a second, or a smaller memory.budget",
        )
    layers = []
    for layer in range(len(found[0].complexity)):
        complexities = [fmean(r.complexity[layer]) for r in found]
        shares = [fmean(r.audio_share[layer]) for r in found if r.audio_share[layer]]
        if config.per_modality and not shares:
            raise UserError(
                "no clip has picture and sound together", remedy="set per_modality=false, or take clips that have both"
            )
        layers.append(
            {
                "complexity": fmean(complexities),
                "complexity_std": pstdev(complexities),
                "audio_share": fmean(shares) if shares else None,
                "audio_share_std": pstdev(shares) if shares else None,
            }
        )
    return layers


def table(layers: list[dict[str, Any]], config: CalibrationConfig) -> list[Any]:
    """The entries of the layer table: numbers that sum to layers x budget, or [audio, visual]."""
    budget, allocation = config.memory.budget, config.memory.make_allocation()
    assert isinstance(budget, int)
    totals = layer_table([layer["complexity"] for layer in layers], budget * len(layers), config.temperature)
    if not config.per_modality:
        return list(totals)
    assert isinstance(allocation, Avba)
    entries = []
    for layer, total in zip(layers, totals, strict=True):
        low = floor_tokens(allocation.floor, total)
        audio = min(max(round(layer["audio_share"] * total), low), total - low)
        entries.append([audio, total - audio])
    return entries


def settings_fingerprint(settings: dict[str, Any]) -> str:
    """16 hex digits that change with every setting that may change the table."""
    kept = json.loads(json.dumps(settings))
    for name in UNMEASURED:
        *path, key = name.split(".")
        inner = kept
        for part in path:
            inner = inner[part]
        del inner[key]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
