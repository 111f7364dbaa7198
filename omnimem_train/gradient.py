"""Which part of a stream the loss reaches, and what a step holds to get there."""

from __future__ import annotations

from dataclasses import dataclass

from omnimem_train.errors import UserError


@dataclass(frozen=True)
class Gradient:
    """Through which chunks the loss reaches the weights.

    Attributes:
        kind: "none" (inference), "all" chunks, "last" (the newest `chunks`), or "stop_layer": the OmniMem paper's
            scheme (section on fine-tuning), where intermediate chunks give gradient only below layer `layer` and the
            final chunk and the questions give it in all layers.
        chunks: for "last"; they are counted from the end of the stream, also for questions asked earlier in it.
        layer: for "stop_layer".
        checkpointing: recompute each chunk in the backward pass instead of storing its activations, see
            `omnimem_train.recompute`; what is stored then is the memory between chunks, see `omnimem_train.snapshots`.
            The recomputation reuses the selection of the first pass. The backward pass can be run once.
        granularity: of that recomputation, if there is one. "chunk": a chunk is run anew as a whole and then
            differentiated, so the activations of all layers are there at once. "layer": the input of every layer is
            stored as well (200 KB a token of the 7B model in bfloat16), and each layer in turn, from the last to the
            first, is run anew and differentiated, without the MLP's last product, whose result nobody needs then. Less
            time and fewer activations for more that is stored; gradients are the same. See `omnimem_train.layerwise`.
        offload: "none", or "host": what is stored for the recomputation and the embeddings of the stream wait in pinned
            host memory, see `omnimem_train.offload`. Device memory then does not grow with the stream, host memory does
            (about 70 KB a token of the 7B model, 270 KB with granularity "layer"). Results are the same to the bit; on
            a CPU nothing changes.
    """

    kind: str = "all"
    chunks: int = 4
    layer: int = 0
    checkpointing: bool = True
    granularity: str = "chunk"
    offload: str = "none"

    def __post_init__(self) -> None:
        kinds = ("none", "all", "last", "stop_layer")
        if self.kind not in kinds:
            raise UserError(f"unknown gradient kind {self.kind!r}", remedy=f"choose one of: {', '.join(kinds)}")
        if self.kind == "last" and self.chunks < 1:
            raise UserError(f"gradient through the last {self.chunks} chunks", remedy="give chunks >= 1")
        if self.layer < 0:
            raise UserError(f"gradient stop layer {self.layer} is negative")
        if self.granularity not in ("chunk", "layer"):
            raise UserError(f"unknown gradient granularity {self.granularity!r}", remedy="choose one of: chunk, layer")
        if self.offload not in ("none", "host"):
            raise UserError(f"unknown gradient offload {self.offload!r}", remedy="choose one of: none, host")
        if self.offload == "host" and not self.checkpointing:
            raise UserError(
                "gradient.offload=host without gradient.checkpointing",
                cause="activations stay on the device; only what a recomputation needs can wait elsewhere",
                remedy="set gradient.checkpointing=true, or gradient.offload=none",
            )

    def due(self, after: int) -> str:
        """What a chunk that is followed by `after` others gets: "none", "all", or "below" the stop layer."""
        if self.kind == "stop_layer":
            return "below" if after > 0 else "all"
        return "none" if self.kind == "none" or (self.kind == "last" and after >= self.chunks) else "all"
