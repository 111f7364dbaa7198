"""The decoder side of the interface for stock transformers decoders: `embed_tokens`, `layers`, `norm`, `rotary_emb`.

Covers Qwen2.5-VL and Qwen3-VL text models: sections of M-RoPE one after the other or interleaved, and features of the
vision tower that are added to the output of the first layers (deepstack).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from omnimem_train.errors import UserError
from omnimem_train.memory.positions import Rotary
from omnimem_train.models.attention import NAME
from omnimem_train.models.fused import fuse
from omnimem_train.models.interface import Gathering, Tap
from omnimem_train.models.quantised import unpacked
from omnimem_train.models.unread import without_result

DEEPSTACK = "deepstack"
"""Name of the extras (B, n, layers, E) that are added to the output of layers 0, 1, ...; 0 for tokens without any."""


class StockDecoder:
    """A stock decoder, run layer by layer. Goes in front of `StreamingModel` among the bases of a model.

    Args:
        module: the whole model.
        text: the decoder inside it; its attention is switched to this package's, and its layers get the short steps of
            `omnimem_train.models.fused`.
        head: the output matrix inside it.
        attention: kernel of the decoder's attention, one of `omnimem_train.models.attention.KERNELS`.

    Raises:
        UserError: the decoder uses a sliding window, which a memory between chunks does not support.
    """

    graphs: bool = False  # see `StreamingModel`
    gathering: Gathering | None = None

    def __init__(self, module: nn.Module, text: nn.Module, head: nn.Module, attention: str = "sdpa") -> None:
        self.module, self.attention = module, attention
        self._text = cast(Any, text)
        self._head = head
        config = self._text.config
        if getattr(config, "use_sliding_window", False):
            raise UserError(
                "the checkpoint's decoder attends in a sliding window (use_sliding_window)",
                cause="tokens outside the window would be invisible however long they are remembered",
                remedy="set use_sliding_window to false in its config.json",
            )
        self._text.set_attn_implementation(NAME)
        for layer in self._text.layers:
            fuse(layer)
        self.n_layers: int = config.num_hidden_layers
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.hidden_size: int = config.hidden_size
        self.head_dim: int = getattr(config, "head_dim", None) or self.hidden_size // self.heads
        self._output_weights: dict[int, tuple[tuple[Any, ...], Tensor]] = {}
        self._rotary: tuple[Tensor, Rotary] | None = None

    @property
    def device(self) -> torch.device:
        """Where the decoder is."""
        return self._text.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of keys, values and embeddings."""
        return self._text.embed_tokens.weight.dtype

    def rotary(self) -> Rotary:
        """How keys are rotated: `mrope_section` frequencies go to time, row and column, in turn or interleaved."""
        frequencies = self._text.rotary_emb.inv_freq
        if self._rotary is None or self._rotary[0] is not frequencies:  # a recording must not copy from the host
            rope = self._text.config.rope_parameters
            axis = rotary_axes(rope["mrope_section"], interleaved=bool(rope.get("mrope_interleaved", False)))
            self._rotary = frequencies, Rotary(frequencies.detach().float(), axis.to(frequencies.device))
        return self._rotary[1]

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin for (B, n, 3) positions, in the form this version's layers take."""
        like = torch.empty(0, dtype=self.dtype, device=positions.device)
        return self._text.rotary_emb(like, positions.permute(2, 0, 1))

    def run_layer(
        self, layer: int, hidden: Tensor, rope: tuple[Tensor, Tensor], tap: Tap, extras: Mapping[str, Tensor]
    ) -> Tensor:
        """One decoder layer on (B, n, E); attention goes through `tap`, deepstack features are added to the output.

        Raises:
            UserError: gradient checkpointing of transformers is on: it drops keyword arguments that look like a cache.
        """
        block = self._text.layers[layer]
        if getattr(block, "gradient_checkpointing", False):
            raise UserError(
                "gradient checkpointing of transformers is switched on in the decoder",
                cause="it silently drops caches; streams checkpoint whole chunks instead",
                remedy="call gradient_checkpointing_disable() on the model",
            )
        self._gather(layer, tap)
        with without_result(block.mlp.down_proj) if tap.unread else nullcontext():
            out = block(hidden, **self._of_attention(rope, tap))
        out = out[0] if isinstance(out, tuple) else out
        features = extras.get(DEEPSTACK)
        if features is not None and layer < features.shape[2]:
            out = out + features[:, :, layer].to(out.dtype)
        return out if self.gathering is None else self.gathering.after(layer, out, tap)

    def run_states(
        self, layer: int, hidden: Tensor, rope: tuple[Tensor, Tensor], tap: Tap, extras: Mapping[str, Tensor]
    ) -> None:
        """Norm and projections of a layer; neither its attention nor its MLP is computed."""
        block, tap.states_only = self._text.layers[layer], True
        self._gather(layer, tap)
        out, _ = block.self_attn(hidden_states=block.input_layernorm(hidden), **self._of_attention(rope, tap))
        if self.gathering is not None:
            self.gathering.after(layer, out, tap)

    def _gather(self, layer: int, tap: Tap) -> None:
        if self.gathering is not None:
            (self.gathering.before_both if tap.unread else self.gathering.before)(layer)

    def _of_attention(self, rope: tuple[Tensor, Tensor], tap: Tap) -> dict[str, Any]:
        """What layers hand through to the attention call."""
        given = {"attention_mask": None, "position_embeddings": rope, "past_key_values": None, "use_cache": False}
        return given | {"tap": tap, "kernel": self.attention}

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and output matrix: (..., E) -> (..., vocabulary)."""
        return self._head(self._text.norm(hidden))

    def output_weight(self, layer: int) -> Tensor:
        """(E, H * D) output projection of a layer's attention, adapters included, detached. With weights spread over
        processes it can be asked for only between that layer and the next (see `Gathering`).

        With adapters that are being trained it is computed anew with each call: optimizers that write through `.data`
        (DeepSpeed) leave no trace by which a stored one could be known to be stale.
        """
        projection = self._text.layers[layer].self_attn.o_proj
        if not hasattr(projection, "get_delta_weight"):
            return unpacked(projection)
        base = projection.base_layer.weight
        active = () if projection.disable_adapters or projection.merged else tuple(projection.active_adapters)
        names = [name for name in active if name in projection.lora_A]
        if not names:
            return unpacked(projection.base_layer)
        parameters = [base] + [side[name].weight for side in (projection.lora_A, projection.lora_B) for name in names]
        state = (*names, *((id(p), p._version) for p in parameters))
        stored = self._output_weights.get(layer)
        trained = any(p.requires_grad for p in parameters[1:])
        if stored is not None and stored[0] == state and not trained:
            return stored[1]
        with torch.no_grad():
            delta = sum(projection.get_delta_weight(name).float() for name in names)
            held = unpacked(projection.base_layer)
            weight = (held.float() + delta).to(held.dtype)
        if not trained:
            self._output_weights[layer] = (state, weight)
        return weight

    def language_prefix(self) -> str:
        """Common prefix of the names of the decoder layers in `module`."""
        return next(name for name, m in self.module.named_modules() if m is self._text.layers) + "."


def rotary_axes(sections: list[int], *, interleaved: bool) -> Tensor:
    """(D/2,) int64, the axis (0 time, 1 row, 2 column) that turns each frequency.

    Blocks: the first `sections[0]` frequencies are time's, and so on. Interleaved (Qwen3-VL): time, row, column, time,
    ... as long as row and column have some left, then time alone.
    """
    if not interleaved:
        return torch.arange(len(sections)).remainder(3).repeat_interleave(torch.tensor(sections))
    axis = torch.zeros(sum(sections), dtype=torch.int64)
    for of in (1, 2):
        axis[of : 3 * sections[of] : 3] = of
    return axis
