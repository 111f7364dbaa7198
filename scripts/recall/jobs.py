"""Single measurements of the study, as functions that any worker process can run, and the files they leave."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.streams import WorldStreams
from data_prep.world import ClipSpec, WorldSettings, make_clip
from omnimem_train.errors import UserError
from omnimem_train.export import export_adapter
from omnimem_train.memory.spec import MemorySpec
from omnimem_train.models.loading import load_model
from omnimem_train.models.qwen2_5_omni import Qwen2_5OmniStreaming
from omnimem_train.rng import versions
from omnimem_train.trainer import train
from scripts.recall.asking import FORM, Asker, ClipSet, clip_set
from scripts.recall.finetune import ABLATED, MINUTE, Scale, arm_of, configure, source_for
from scripts.recall.methods import CHUNK, FULL, FULL_DESCRIBED, Form


@dataclass(frozen=True)
class SetSpec:
    """A clip set: `n` clips of a split and a world, `asks` questions of each."""

    split: str
    n: int
    asks: int
    world: WorldSettings = field(default_factory=WorldSettings)
    seed: int = 0

    def clips(self) -> list[ClipSpec]:
        """What happens in them."""
        return [make_clip(self.world, self.seed, self.split, i) for i in range(self.n)]


@dataclass(eq=False)
class Context:
    """What a worker knows: where things are, and what it has already loaded.

    Attributes:
        work: folder of encoded clips, runs and adapters. results: folder of the results.
        bases: the base models by number. sets: clip sets by name.
        command: what started the study, noted with the results.
    """

    work: Path
    results: Path
    bases: Mapping[int, Path]
    sets: Mapping[str, SetSpec]
    command: str
    device: str = "cuda"
    _askers: dict[Any, Asker] = field(default_factory=dict)

    @lru_cache(maxsize=8)  # noqa: B019 - a context lives as long as its process
    def model(self, base: int, dtype: str = "bfloat16", adapter: str | None = None) -> Qwen2_5OmniStreaming:
        """A base model, with an adapter of `work` if one is named."""
        path = None if adapter is None else self.work / "adapters" / adapter
        model = load_model(self.bases[base], dtype=dtype, device=self.device, adapter=path)
        assert isinstance(model, Qwen2_5OmniStreaming)
        return model

    def clips(self, base: int, name: str) -> ClipSet:
        """A clip set as the towers of a base model encode it; encoded once, then read from `work`."""
        spec = self.sets[name]
        path = self.work / f"{name}-base{base}.pt"
        streams = WorldStreams(self.model(base), spec.world.size)
        if not path.exists():
            found = clip_set(streams, spec.clips(), spec.asks, spec.seed)
            aside = path.with_suffix(".part")
            torch.save(found.media.cpu(), aside)
            aside.rename(path)
            return found
        media = torch.load(path, mmap=True).to(self.device)
        return clip_set(streams, spec.clips(), spec.asks, spec.seed, media)

    def asker(self, base: int, name: str, dtype: str = "bfloat16", adapter: str | None = None) -> Asker:
        """The questions of a clip set, ready to be asked."""
        key = (base, name, dtype, adapter)
        if key not in self._askers:
            if len(self._askers) >= 4:
                self._askers.clear()
            clips = self.clips(base, name)
            streams = WorldStreams(self.model(base, dtype, adapter), self.sets[name].world.size)
            media = clips.media.to(streams.model.dtype)
            self._askers[key] = Asker(streams, ClipSet(clips.specs, media, clips.questions), at_once=at_once(clips))
        return self._askers[key]


def at_once(clips: ClipSet) -> int:
    """Clips in a batch: fewer of long ones."""
    return max(4, round(108 * 60 / clips.seconds))


@dataclass(frozen=True)
class Answers:
    """Answers of one model to one clip set under some settings.

    Attributes:
        study, base, arm, seed: as in the results folder. clip_set: name.
        forms: (form, budget) pairs, measured in this order; with `full`, the full cache too.
        part: number of the part, where one file is measured in several.
        specs: further settings: (name, memory, method), all of one `family`.
        chunk: tokens of a chunk, for the forms.
        trained: scale of the training, to be noted; None: nothing is noted.
    """

    study: str
    base: int
    clip_set: str
    forms: tuple[tuple[Form, int], ...] = ()
    full: bool = False
    arm: str = "base"
    seed: int | None = None
    part: int = 0
    specs: tuple[tuple[str, MemorySpec, str], ...] = ()
    dtype: str = "bfloat16"
    model_name: str = ""
    chunk: int = CHUNK
    family: str = "omnimem"
    trained: Scale | None = None

    @property
    def model(self) -> str:
        """Name of the model in the results."""
        if self.model_name:
            return self.model_name
        return f"base{self.base}" + ("" if self.arm == "base" else f"-{self.arm}-s{self.seed}")

    def run(self, context: Context) -> dict[Any, float]:
        """Measure and write a part file; accuracy of each form and budget."""
        adapter = None if self.arm == "base" else adapter_name(self.base, self.arm, self.seed or 0)
        asker = context.asker(self.base, self.clip_set, self.dtype, adapter)
        media = asker.streams.tokens(asker.clips.seconds)
        found: dict[str, np.ndarray] = {}
        described: dict[str, dict[str, Any]] = {}
        scores: dict[Any, float] = {}
        right = asker.right()
        if self.full:
            found["full"], described["full"] = asker.answers(FULL), FULL_DESCRIBED
        for form, budget in self.forms:
            name = f"{form.kind} {json.dumps(form.tuned, sort_keys=True)}@{budget}"
            found[name] = asker.answers(form.spec(budget, self.chunk))
            described[name] = form.described(budget, media, self.chunk)
            scores[form, budget] = float((found[name] == right).mean())
        for name, spec, method in self.specs:
            found[name] = asker.answers(spec)
            budget = "full" if spec.unlimited else spec.budget
            share = 1.0 if spec.unlimited else float(spec.budget or 0) / media
            about = {"family": self.family, "budget": budget, "share": share, "tuned": {}, "memory": spec.to_dict()}
            described[name] = {"method": method} | about
        write_part(context, self, asker, found, described)
        return scores


def write_part(
    context: Context, job: Answers, asker: Asker, found: dict[str, np.ndarray], described: dict[str, dict[str, Any]]
) -> None:
    """Leave a part of an answers file, and the questions of its clip set."""
    folder = context.work / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    world = context.sets[job.clip_set].world
    about = {
        "study": job.study,
        "model": job.model,
        "base": job.base,
        "arm": job.arm,
        "seed": job.seed,
        "clip_set": job.clip_set,
        "full_tokens": asker.streams.stream_tokens(asker.clips.seconds),
        "settings": described,
        "machine": machine(context.device),
        "versions": versions(),
        "weights": weights_of(context.bases[job.base]),
        "command": context.command,
        "form": FORM,
    }
    if job.trained is not None:
        about["training"] = arm_of(job.arm).told(job.trained)
    if job.study == "sweep":
        about["world"] = {k: getattr(world, k) for k in ("loudness", "copies", "sound_share")}
    stem = folder / f"{job.study}__{job.model}.{job.part:03d}"
    np.savez_compressed(f"{stem}.npz", **found)
    Path(f"{stem}.json").write_text(json.dumps(about))
    questions = folder / f"{job.clip_set}.csv.gz"
    if not questions.exists():
        questions.write_bytes(question_table(asker.clips))


def question_table(clips: ClipSet) -> bytes:
    """The questions of a clip set as the results folder holds them."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "clip", "kind", "answer", "held_out"])
    for spec, questions in zip(clips.specs, clips.questions, strict=True):
        for number, q in enumerate(questions):
            writer.writerow([f"{spec.id}-{number:02d}", spec.id, q.kind, q.answer, int(q.held_out)])
    return gzip.compress(text.getvalue().encode(), mtime=0)


def merge(work: Path, results: Path) -> int:
    """Join the part files into the results folder; the number of files.

    Raises:
        UserError: the folder holds other questions of the same clip set, which earlier answers are about.
    """
    for path in (work / "parts").glob("*.csv.gz"):
        there = results / "questions" / path.name
        if there.exists() and gzip.decompress(there.read_bytes()) != gzip.decompress(path.read_bytes()):
            raise UserError(f"{there} holds other questions than {path}", remedy="name another folder with --results")
    groups: dict[str, list[Path]] = {}
    for path in sorted((work / "parts").glob("*.json")):
        groups.setdefault(path.name.rsplit(".", 2)[0], []).append(path)
    (results / "answers").mkdir(parents=True, exist_ok=True)
    (results / "questions").mkdir(exist_ok=True)
    for stem, parts in groups.items():
        about = [json.loads(p.read_text()) for p in parts]
        arrays: dict[str, np.ndarray] = {}
        for p in parts:
            with np.load(p.with_suffix(".npz")) as file:
                arrays |= {name: file[name] for name in file.files}
        whole = about[0] | {"settings": {k: v for a in about for k, v in a["settings"].items()}}
        (results / "answers" / f"{stem}.json").write_text(json.dumps(whole, indent=1) + "\n")
        np.savez_compressed(results / "answers" / f"{stem}.npz", **arrays)
    for path in (work / "parts").glob("*.csv.gz"):
        if not (results / "questions" / path.name).exists():
            (results / "questions" / path.name).write_bytes(path.read_bytes())
    return len(groups)


@lru_cache
def weights_of(base: Path) -> str:
    """Short digest of a base model's weights."""
    return hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()[:16]


def machine(device: str) -> str:
    """The card."""
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


# Fine-tuning ---------------------------------------------------------------------------------------------------------


def adapter_name(base: int, arm: str, seed: int) -> str:
    """Folder of an adapter in `work/adapters`."""
    return f"base{base}-{arm}-s{seed}"


@dataclass(frozen=True)
class Tune:
    """A fine-tuning run, its export, and the answers of what came out.

    Attributes:
        base, arm, seed: which run. scale: how large.
        loop: the method in the loop. read: what the answers are measured with.
        study: of the answers; "": that of the arm.
    """

    base: int
    arm: str
    seed: int
    loop: Form
    read: tuple[Form, ...]
    scale: Scale = MINUTE
    study: str = ""

    def run(self, context: Context) -> dict[Any, float]:
        """Train, export, measure."""
        name, scale = adapter_name(self.base, self.arm, self.seed), self.scale
        out = context.work / "runs" / name
        pool = context.clips(self.base, scale.pool)
        config = configure(self.arm, context.bases[self.base], out, self.loop, scale, self.seed)
        train(config, source_for(self.arm, pool.specs, pool.media.to(getattr(torch, scale.dtype)), scale, self.seed))
        export_adapter(out, context.work / "adapters" / name, device=context.device)
        forms = tuple((form, budget) for form in self.read for budget in scale.asked)
        study = self.study or ("ablation" if self.arm in ABLATED else "finetune")
        options: dict[str, Any] = {"full": True, "dtype": scale.dtype, "chunk": scale.chunk}
        options["trained"] = scale if self.study else None
        return Answers(study, self.base, scale.clip_set, forms, arm=self.arm, seed=self.seed, **options).run(context)
