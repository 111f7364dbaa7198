"""Bytes of device memory of a step, by what they are for."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Footprint:
    """Bytes of device memory at the peak of a step.

    Attributes:
        weights: of the whole model.
        adapter: LoRA weights, their gradients and the two moments of AdamW.
        clips: embeddings of the encoded clips of a step.
        snapshots: memories between chunks, in full or as the way back to them, for the backward pass.
        activations: of the chunk that is being recomputed, or of all chunks with gradient without checkpointing.
        passing: gradients of the memory, and what a layer needs for a moment.
        recordings: what recorded chunks take in and give, in places of its own (`omnimem_train.captured`).
        beside: activations of a chunk that is run launch by launch beside recordings, whose memory it cannot use: in
            the first steps, and where the last chunk of a clip is a shorter one.
    """

    weights: float = 0.0
    adapter: float = 0.0
    clips: float = 0.0
    snapshots: float = 0.0
    activations: float = 0.0
    passing: float = 0.0
    recordings: float = 0.0
    beside: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, f.name) for f in fields(self))
