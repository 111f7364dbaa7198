"""What each modality is needed for: the same questions with picture and sound, with one of them, and with neither."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.streams import WorldStreams
from scripts.recall.asking import Asker, ClipSet
from scripts.recall.jobs import Answers, Context, at_once, write_part
from scripts.recall.methods import FULL, FULL_DESCRIBED

PERCEIVED = {
    "both": (True, True),
    "vision only": (True, False),
    "audio only": (False, True),
    "question only": (False, False),
}


@dataclass(frozen=True)
class Modalities:
    """Answers with the full cache when some of a clip is not perceived. The model never saw such clips in training, so
    what it says without a modality is no bound on what could be known; that one alone suffices is."""

    base: int
    clip_set: str
    dtype: str = "bfloat16"

    def run(self, context: Context) -> dict[Any, float]:
        """Measure and write a part file."""
        clips, model = context.clips(self.base, self.clip_set), context.model(self.base, self.dtype)
        size = context.sets[self.clip_set].world.size
        found: dict[str, np.ndarray] = {}
        for name, (picture, sound) in PERCEIVED.items():
            streams = WorldStreams(model, size, picture=picture, sound=sound)
            media = streams.encode(clips.specs, 8).to(model.dtype)
            asker = Asker(streams, ClipSet(clips.specs, media, clips.questions), at_once=at_once(clips))
            found[name] = asker.answers(FULL)
        job = Answers("modality", self.base, self.clip_set)
        described = {name: FULL_DESCRIBED | {"method": name} for name in PERCEIVED}
        write_part(context, job, context.asker(self.base, self.clip_set, self.dtype), found, described)
        return {}
