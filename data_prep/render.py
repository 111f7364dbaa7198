"""Render the recall world as real clips with questions: `python -m data_prep.render OUT --clips 1000 --workers 2`.

Writes into OUT:

    clips/{train,val,test}-00000.mp4   H.264 and AAC
    train.json                         training manifest with "turns": the questions of a clip share one stream
    train_llava.json                   the same in LLaVA style ("conversations"), an entry a question
    {val,test}_choices.jsonl           multiple-choice questions, one a line, of clips not used for training
    {val,test}_lvomnibench.json        the same in the format of LVOmniBench (form "lvomnibench", media root OUT/clips)
    events.jsonl                       what happens in each clip
    settings.json                      how all this was made, and digests of the files above

The JSON files are the same bytes for the same settings. Clips already there with the same content are kept (each
carries a fingerprint of its content), so an interrupted or enlarged rendering goes on where it stopped.
"""

from __future__ import annotations

import argparse
import multiprocessing
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data_prep.arrays import render_frames, render_sound
from data_prep.encode import comment_of, write_clip
from data_prep.manifests import check_unchanged, manifests, write
from data_prep.world import SPLITS, VERSION, ClipSpec, WorldSettings, make_clip
from omnimem_train.errors import UserError

FRAMES_AT_ONCE = 64


@dataclass(frozen=True)
class RenderConfig:
    """What to render.

    Attributes:
        world: what clips look and sound like.
        clips: number of clips over all splits.
        val, test: how many of them are for validation and test; -1 for a sixth each (at least 1).
        seed: everything follows from it.
        questions_per_clip: so many, chosen at random and balanced over kinds; 0 for all that a clip can answer.
        early: share of the training questions asked as soon as they can be answered; the others come at the end.
        narrate: add a narration turn to every training clip.
        words: training answers are words, not letters (see `data_prep.manifests`).
        workers: processes that render.
    """

    world: WorldSettings
    clips: int = 48
    val: int = -1
    test: int = -1
    seed: int = 0
    questions_per_clip: int = 0
    early: float = 0.25
    narrate: bool = True
    words: bool = False
    workers: int = 1

    def counts(self) -> dict[str, int]:
        """Clips per split."""
        sixth = max(1, self.clips // 6)
        val, test = (sixth if n < 0 else n for n in (self.val, self.test))
        least = min(self.seed, self.questions_per_clip, self.workers - 1)
        if self.clips - val - test < 1 or not 0 <= self.early <= 1 or least < 0:
            raise UserError(
                f"clips {self.clips}, val {val}, test {test}, early {self.early}, seed {self.seed}, "
                f"questions_per_clip {self.questions_per_clip}, workers {self.workers}",
                "at least one training clip must remain, early is a share, seed and questions_per_clip are not "
                "negative, workers at least 1",
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
    Raises: UserError for impossible settings, a folder that cannot be written or is full, a manifest changed by hand,
        a process that died.
    """
    clips = specs(config)
    c = config
    files = manifests(clips, c.seed, c.questions_per_clip, c.early, c.narrate, c.words)
    try:
        check_unchanged(out, files)
        (out / "clips").mkdir(parents=True, exist_ok=True)
        todo = [spec for spec in clips if comment_of(clip_path(out, spec)) != spec.fingerprint()]
        _render_all(out, todo, config.workers)
        settings = {k: v for k, v in asdict(config).items() if k != "workers"}
        write(out, files, {"version": VERSION, **settings})
    except OSError as error:
        raise UserError(f"{out}: cannot be written", str(error), "choose a writable folder with free space") from error
    return {"rendered": len(todo), "kept": len(clips) - len(todo)}


def clip_path(out: Path, spec: ClipSpec) -> Path:
    """Where a clip lies."""
    return out / "clips" / f"{spec.id}.mp4"


def frame_blocks(spec: ClipSpec) -> Iterator[np.ndarray]:
    """All frames of a clip at its file's rate, (up to 64, size, size, 3) uint8 at a time."""
    fps = spec.settings.fps
    n = round(spec.settings.seconds * fps)
    for first in range(0, n, FRAMES_AT_ONCE):
        yield render_frames([spec], fps, part=(first, min(first + FRAMES_AT_ONCE, n)))[0].numpy()


def render_clip(path: Path, spec: ClipSpec) -> None:
    """Render one clip into its file."""
    s = spec.settings
    write_clip(path, frame_blocks(spec), render_sound([spec])[0].numpy(), s.fps, s.sampling_rate, spec.fingerprint())


def _render_all(out: Path, todo: list[ClipSpec], workers: int) -> None:
    with tqdm(total=len(todo), desc="rendering clips", unit="clip", disable=not todo) as bar:
        if workers == 1:
            for spec in todo:
                render_clip(clip_path(out, spec), spec)
                bar.update()
            return
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
        try:
            for done in as_completed([pool.submit(render_clip, clip_path(out, spec), spec) for spec in todo]):
                done.result()
                bar.update()
        except BrokenProcessPool as error:
            remedy = "call again (what is finished is kept), with fewer workers if memory is short"
            raise UserError(f"{out}: a rendering process died", str(error), remedy) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """One thread a process; Ctrl-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="data_prep.render", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write into")
    for owner, names in (
        (WorldSettings, tuple(WorldSettings.__dataclass_fields__)),
        (RenderConfig, ("clips", "val", "test", "seed", "questions_per_clip", "early", "workers")),
    ):
        for name in names:
            default = owner.__dataclass_fields__[name].default
            parser.add_argument(
                f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"default {default}"
            )
    parser.add_argument("--no-narrate", dest="narrate", action="store_false", help="no narration turn")
    parser.add_argument("--words", action="store_true", help="train on answers in words, not letters")
    given = vars(parser.parse_args(argv))
    out = given.pop("out")
    world = {name: given.pop(name) for name in WorldSettings.__dataclass_fields__}
    torch.set_num_threads(1)  # as in worker processes: clips are small, threads would wait for each other
    try:
        done = render(out, RenderConfig(WorldSettings(**world), **given))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{out}: interrupted; the same call goes on from here", file=sys.stderr)
        return 130
    print(f"{out}: {done['rendered']} clips rendered, {done['kept']} kept")
    return 0


if __name__ == "__main__":
    sys.exit(main())
