"""Render a small world of real clips with questions: `python -m data_prep.render OUT --clips 48 --seconds 16 --seed 0`.

Writes into OUT:

    clips/{train,val,test}-00000.mp4   H.264 and AAC
    train.json                         training manifest (LLaVA style, with "turns" that share one streamed clip)
    val_choices.jsonl                  multiple-choice questions, one a line, of clips not used for training
    test_choices.jsonl
    events.jsonl                       what happens in each clip
    settings.json                      how all this was made

The JSON files are the same bytes for the same settings. Clips already there with the same content are kept (each
carries a fingerprint of its content), so an interrupted or enlarged rendering goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_prep.encode import comment_of, write_clip
from data_prep.questions import Question, QuestionMaker, narration
from data_prep.world import SPLITS, VERSION, ClipSpec, WorldSettings, clip_arrays, make_clip
from omnimem_train.benchmarks import choice_prompt
from omnimem_train.errors import UserError

NARRATE = "Name everything that was seen and heard, in order."


@dataclass(frozen=True)
class RenderConfig:
    """What to render.

    Attributes:
        world: what clips look and sound like.
        clips: number of clips over all splits.
        val, test: how many of them are for validation and test; -1 for a sixth each (at least 1).
        seed: everything follows from it.
        early: share of the training questions asked as soon as they can be answered; the others come at the end.
        narrate: add a narration turn to every training clip.
        workers: processes that render.
    """

    world: WorldSettings
    clips: int = 48
    val: int = -1
    test: int = -1
    seed: int = 0
    early: float = 0.25
    narrate: bool = True
    workers: int = 1

    def counts(self) -> dict[str, int]:
        """Clips per split."""
        sixth = max(1, self.clips // 6)
        val, test = (sixth if n < 0 else n for n in (self.val, self.test))
        if self.clips - val - test < 1 or not 0 <= self.early <= 1 or self.seed < 0 or self.workers < 1:
            raise UserError(
                f"clips {self.clips}, val {val}, test {test}, early {self.early}, seed {self.seed}, "
                f"workers {self.workers}",
                "at least one training clip must remain, early is a share, seed is not negative, workers at least 1",
                "change these options",
            )
        return {"train": self.clips - val - test, "val": val, "test": test}


def specs(config: RenderConfig) -> list[ClipSpec]:
    """The clips of all splits."""
    counts = config.counts()
    return [make_clip(config.world, config.seed, split, i) for split in SPLITS for i in range(counts[split])]


def render(out: Path, config: RenderConfig) -> dict[str, int]:
    """Render clips and write the manifests into `out`.

    Returns: number of clips "rendered" and "kept" from an earlier call.
    Raises: UserError for impossible settings or a folder that cannot be written.
    """
    clips = specs(config)
    try:
        (out / "clips").mkdir(parents=True, exist_ok=True)
        todo = [spec for spec in clips if comment_of(clip_path(out, spec)) != spec.fingerprint()]
        _render_all(out, todo, config.workers)
        _write_manifests(out, clips, config)
    except OSError as error:
        raise UserError(f"{out}: cannot be written", str(error), "choose a writable folder with free space") from error
    return {"rendered": len(todo), "kept": len(clips) - len(todo)}


def clip_path(out: Path, spec: ClipSpec) -> Path:
    """Where a clip lies."""
    return out / "clips" / f"{spec.id}.mp4"


def render_clip(job: tuple[Path, ClipSpec]) -> str:
    """Render one clip into its file; returns its id."""
    path, spec = job
    frames, samples = clip_arrays(spec)
    write_clip(path, frames, samples, spec.settings.fps, spec.settings.sampling_rate, spec.fingerprint())
    return spec.id


def _render_all(out: Path, todo: list[ClipSpec], workers: int) -> None:
    jobs = [(clip_path(out, spec), spec) for spec in todo]
    bar = tqdm(total=len(jobs), desc="rendering clips", unit="clip", disable=not jobs)
    if workers == 1:
        for job in jobs:
            render_clip(job)
            bar.update()
    else:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            for _ in pool.imap_unordered(render_clip, jobs):
                bar.update()
    bar.close()


def _write_manifests(out: Path, clips: Sequence[ClipSpec], config: RenderConfig) -> None:
    makers = {split: QuestionMaker(config.seed, SPLITS.index(split)) for split in SPLITS}
    asked = {spec.id: makers[spec.split].ask(spec) for spec in clips}
    rng = np.random.default_rng((config.seed, 2**31))
    train = [_training_entry(spec, asked[spec.id], config, rng) for spec in clips if spec.split == "train"]
    (out / "train.json").write_text(json.dumps(train, indent=1) + "\n")
    for split in ("val", "test"):
        lines = (line for spec in clips if spec.split == split for line in _choice_lines(spec, asked[spec.id]))
        _write_lines(out / f"{split}_choices.jsonl", lines)
    _write_lines(out / "events.jsonl", ({"fingerprint": spec.fingerprint(), **asdict(spec)} for spec in clips))
    settings = {k: v for k, v in asdict(config).items() if k != "workers"}
    (out / "settings.json").write_text(json.dumps({"version": VERSION, **settings}, indent=1) + "\n")


def _training_entry(
    spec: ClipSpec, questions: list[Question], config: RenderConfig, rng: np.random.Generator
) -> dict[str, Any]:
    """A clip as an entry of the training manifest."""
    turns: list[dict[str, Any]] = [
        {
            "question": choice_prompt(q.text, q.options),
            "answer": q.answer,
            "time_s": q.known_s if rng.random() < config.early else None,
            "kind": q.kind,
        }
        for q in questions
    ]
    if config.narrate:
        turns.append({"question": NARRATE, "answer": narration(spec), "time_s": None, "kind": "narration"})
    return {"id": spec.id, "video": f"clips/{spec.id}.mp4", "use_audio": True, "turns": turns}


def _choice_lines(spec: ClipSpec, questions: list[Question]) -> Iterable[dict[str, Any]]:
    for number, q in enumerate(questions):
        yield {
            "id": f"{spec.id}-{number:02d}",
            "video": f"clips/{spec.id}.mp4",
            "question": q.text,
            "options": list(q.options),
            "answer": q.answer,
            "time_s": None,
            "category": q.kind,
        }


def _write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="data_prep.render", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write into")
    for owner, names in ((WorldSettings, ("seconds", "size", "grid", "fps", "slot_s", "distractors_per_s")),
                         (RenderConfig, ("clips", "val", "test", "seed", "early", "workers"))):  # fmt: skip
        for name in names:
            default = owner.__dataclass_fields__[name].default
            parser.add_argument(
                f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"default {default}"
            )
    parser.add_argument("--no-narrate", dest="narrate", action="store_false", help="no narration turn")
    given = vars(parser.parse_args(argv))
    out = given.pop("out")
    world = {name: given.pop(name) for name in WorldSettings.__dataclass_fields__ if name in given}
    try:
        done = render(out, RenderConfig(WorldSettings(**world), **given))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {done['rendered']} clips rendered, {done['kept']} kept")
    return 0


if __name__ == "__main__":
    sys.exit(main())
