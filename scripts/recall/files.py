"""Do clips as arrays, which the study runs on, stand for files? Compares the answers of an evaluation of files with
those to the same clips as arrays:

    python -m scripts.recall.files runs/recall     # after the commands in recipes/eval_recall.yaml
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from data_prep.questions import QuestionMaker
from data_prep.streams import WorldStreams
from data_prep.world import SPLITS, WorldSettings, make_clip
from omnimem_train.evaluate import collect
from omnimem_train.models.loading import load_model
from omnimem_train.models.qwen2_5_omni import Qwen2_5OmniStreaming
from scripts.recall.asking import Asker, ClipSet
from scripts.recall.methods import FULL, Form


def compare(folder: Path, model: Qwen2_5OmniStreaming, split: str = "val") -> dict[str, dict[str, float]]:
    """Accuracy from files and from arrays, and the share of equal answers, by setting.

    Args:
        folder: what `data_prep.render` wrote, with an evaluation in its folder `eval`.
    """
    made = json.loads((folder / "settings.json").read_text())
    counts = {"val": made["val"], "test": made["test"]}
    world = WorldSettings(**made["world"])
    specs = [make_clip(world, made["seed"], split, i) for i in range(counts[split])]
    maker = QuestionMaker(made["seed"], SPLITS.index(split))
    asked = [maker.ask(spec, made["questions_per_clip"] or None) for spec in specs]
    streams = WorldStreams(model, world.size)
    asker = Asker(streams, ClipSet(specs, streams.encode(specs, 8), asked), at_once=8)
    ids = [f"{spec.id}-{i:02d}" for spec, questions in zip(specs, asked, strict=True) for i in range(len(questions))]
    held = {(r.setting, r.question): r.predicted for r in collect(folder / "eval")}
    right, found = asker.right(), {}
    for name, spec in (("full", FULL), ("omnimem@148", Form("omnimem", allocation=0.5).spec(148))):
        arrays = asker.answers(spec)
        files = np.array(["ABCD".find(held[name, i] or "-") for i in ids])
        shares = {"files": files == right, "arrays": arrays == right, "equal": files == arrays}
        found[name] = {what: float(share.mean()) for what, share in shares.items()} | {"questions": float(len(ids))}
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="checkpoints/tiny-omni")
    given = parser.parse_args()
    loaded = load_model(given.model, dtype="float32", device="cpu")
    assert isinstance(loaded, Qwen2_5OmniStreaming)
    for setting, shares in compare(given.folder, loaded).items():
        print(setting, {what: round(share, 4) for what, share in shares.items()})
