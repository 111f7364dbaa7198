"""The models that are measured: the real shape of a language model with random weights, made on the device itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from omnimem_train.costs import StreamStep
from omnimem_train.gradient import Gradient
from omnimem_train.memory import AUDIO, TEXT, VISUAL, MemorySpec
from omnimem_train.models.interface import StreamingModel, TokenBlock
from omnimem_train.models.lora import LoraSettings
from omnimem_train.models.preprocess import Settings
from omnimem_train.models.qwen2_5_omni import Qwen2_5OmniStreaming
from omnimem_train.models.shape import DecoderShape
from omnimem_train.models.tiny import Size, thinker_config, tiny_tokenizer
from omnimem_train.operations import forward
from omnimem_train.scoring_costs import Work


@dataclass(frozen=True)
class Shape:
    """What is run.

    Attributes:
        size: widths and depths of the language model; its towers are small, they are not run.
        vocabulary: rows of the output matrix.
        tokens: of the stream; a multiple of `chunk`.
        chunk, budget: of the memory.
        text: tokens of the prompt in front.
        rank: of the LoRA adapters on q, k, v, o.
    """

    size: Size
    vocabulary: int
    tokens: int
    chunk: int
    budget: int
    text: int = 32
    rank: int = 64

    @property
    def candidates(self) -> int:
        """Tokens a selector chooses from once the memory is full."""
        return self.budget + self.chunk

    @property
    def decoder(self) -> DecoderShape:
        """Sizes as plans take them."""
        s = self.size
        return DecoderShape(s.layers, s.hidden, s.heads, s.kv_heads, s.hidden // s.heads, s.mlp, self.vocabulary)

    @property
    def parameters(self) -> int:
        """Numbers of the language model: matrices, biases of q, k and v, norms, embeddings and output matrix."""
        d = self.decoder
        small = d.query_width + 2 * d.key_width + 2 * d.hidden
        return d.layers * (d.layer_weights + small) + d.hidden * (2 * d.vocabulary + 1)

    def step(self, spec: MemorySpec, gradient: Gradient, lora: LoraSettings | None = None) -> StreamStep:
        """What is run, as plans count it."""
        question = {"question": 16, "answer": 8}
        return StreamStep(self.decoder, 2, spec, self.tokens, self.text, self.text, gradient, lora, **question)

    def forward_flops(self) -> tuple[float, float]:
        """Floating-point operations of one streaming pass over `tokens`: of the matrices, and of attention."""
        step = self.step(MemorySpec("sliding_window", budget=self.budget, chunk_tokens=self.chunk), Gradient("none"))
        done = sum((c.count * forward(step, c, remembered=False) for c in step.chunks), Work())
        return done.matrix, done.attention

    def step_flops(self) -> float:
        """Of a LoRA step with everything recomputed once: three forwards, and 2.5 for the backward of attention."""
        weights, attention = self.forward_flops()
        return 3 * weights + 4.5 * attention


SHAPES = {
    "qwen2.5-omni-7b": Shape(
        Size(28, 3584, 28, 4, 18944, (16, 24, 24), 64, 2, 2, max_pixels=56 * 56), 152064, 131072, 2048, 6144
    ),
    # As deep and as narrow as it gets: the time is the host's, which launches the same steps for any width.
    "narrow": Shape(Size(28, 256, 4, 2, 256, (8, 12, 12), 32, 2, 2, max_pixels=56 * 56), 512, 1024, 64, 192, 8, 4),
    "tiny": Shape(Size(3, 64, 4, 2, 128, (2, 3, 3), 32, 2, 2, max_pixels=56 * 56), 512, 512, 64, 96, 8, 4),
}


REAL_TOWERS: dict[str, dict[str, Any]] = {
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "window_size": 112,
    },
    "audio_config": {
        "encoder_layers": 32,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "d_model": 1280,
        "output_dim": 3584,
        "n_window": 100,
    },
}
"""Those of Qwen2.5-Omni-7B."""


def make_model(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    attention: str = "sdpa",
    towers: dict[str, dict[str, Any]] | None = None,
) -> StreamingModel:
    """A stock thinker of `shape` with random weights, frozen, behind the package's own interface. `towers` replaces
    values of the encoders' configurations."""
    module = make_thinker(shape, device, dtype, towers)
    module.to(device).eval().requires_grad_(False)
    fill(module)
    model = Qwen2_5OmniStreaming(module, tiny_tokenizer(), Settings(), attention)
    if model.dtype != dtype or model.device.type != device.type:
        raise RuntimeError(f"the model came out as {model.dtype} on {model.device}")
    return model


def make_thinker(
    shape: Shape, device: torch.device, dtype: torch.dtype, towers: dict[str, dict[str, Any]] | None = None
) -> Any:
    """A stock thinker as its class makes it, on `device`."""
    config = thinker_config(shape.size, tiny_tokenizer())
    config.text_config.vocab_size = shape.vocabulary
    for part, values in (towers or {}).items():
        for name, value in values.items():
            if not hasattr(getattr(config, part), name):
                raise ValueError(f"{part} has no {name}")
            setattr(getattr(config, part), name, value)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Qwen2_5OmniThinkerForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def fill(module: nn.Module, seed: int = 0) -> None:
    """Normal numbers scaled by fan-in, in place; queries and keys larger, so that attention is not uniform."""
    generator: torch.Generator | None = None
    for name, parameter in module.named_parameters():
        if generator is None:
            generator = torch.Generator(parameter.device).manual_seed(seed)
        if "embed_tokens" in name:
            parameter.normal_(generator=generator)
        elif parameter.ndim > 1:
            sharp = ".q_proj." in name or ".k_proj." in name
            std = (1.5 if sharp else 1.0) / math.sqrt(parameter[0].numel())
            parameter.normal_(0, std, generator=generator)
        else:
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)


def stream_block(
    shape: Shape, model: StreamingModel, tokens: int, seed: int = 1, width: int | None = None
) -> TokenBlock:
    """A prompt, then moments of a second: 25 tokens of sound after 112 of a picture (about the 4.5 to 1 that
    Qwen2.5-Omni makes of them), with random embeddings; of another `width` than the model's if said."""
    device, width = model.device, model.hidden_size if width is None else width
    generator = torch.Generator(device).manual_seed(seed)
    place = torch.arange(tokens, device=device)
    second, inside = torch.div(place, 137, rounding_mode="floor"), place % 137
    modality = torch.where(inside < 112, VISUAL, AUDIO)
    modality = torch.where(place < shape.text, TEXT, modality)
    flat = modality != VISUAL
    time = 25 * second + torch.where(flat, (inside - 112).clamp(min=0), 0)
    row = torch.where(flat, time, torch.div(inside, 14, rounding_mode="floor"))
    column = torch.where(flat, time, inside % 14)
    return TokenBlock(
        embeds=torch.randn(1, tokens, width, generator=generator, device=device, dtype=model.dtype),
        positions=torch.stack([time, row, column], -1)[None],
        modality=modality.to(torch.int8)[None],
        time_s=second.float()[None],
    )


def text_block(model: StreamingModel, tokens: int, position: int, seed: int = 2) -> TokenBlock:
    """A question of `tokens` random tokens that starts at temporal position `position`."""
    device = model.device
    generator = torch.Generator(device).manual_seed(seed)
    place = position + torch.arange(tokens, device=device)
    return TokenBlock(
        embeds=torch.randn(1, tokens, model.hidden_size, generator=generator, device=device, dtype=model.dtype),
        positions=place[None, :, None].expand(1, tokens, 3),
        modality=torch.full((1, tokens), TEXT, dtype=torch.int8, device=device),
        time_s=torch.zeros(1, tokens, device=device),
    )


def end_of(block: TokenBlock) -> int:
    """The first temporal position after `block`."""
    positions: Tensor = block.positions
    return int(positions.amax()) + 1
