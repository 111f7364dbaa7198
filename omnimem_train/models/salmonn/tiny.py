"""A small, randomly initialised video-SALMONN 2+ in the published layout, made offline: for tests and quick runs.

Patches, windows of sound, token rates, special tokens and file layout are the published ones; widths, depths and the
vocabulary are small. As in the published folders, `<|audio_pad|>` is not in the tokenizer's files: the processor adds
it, and it gets the next free id.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from omnimem_train.errors import UserError, nearest
from omnimem_train.models.salmonn.config import BACKBONES, VideoSalmonn2Config
from omnimem_train.models.salmonn.model import VideoSalmonn2ForConditionalGeneration
from omnimem_train.models.tiny import byte_pairs, fill

# Order as in the published tokenizers, whose ids start at 151643.
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def make_tiny_salmonn(folder: str | Path, seed: int = 0, backbone: str = "qwen2_5_vl") -> Path:
    """Write a video-SALMONN 2+ checkpoint of 0.4 million parameters to `folder`.

    Args:
        seed: of the weights; the same seed gives the same files.
        backbone: "qwen2_5_vl" or "qwen3_vl".

    Returns:
        The folder, with config.json, model.safetensors, generation_config.json and the tokenizer's files.

    Raises:
        UserError: unknown backbone.
    """
    if backbone not in BACKBONES:
        raise UserError(
            f"unknown backbone {backbone!r}{nearest(backbone, BACKBONES)}",
            remedy=f"choose one of: {', '.join(BACKBONES)}",
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_pairs(SPECIAL)
    tokenizer.save_pretrained(folder)
    module = VideoSalmonn2ForConditionalGeneration(tiny_config(tokenizer, backbone))
    fill(module, seed)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    module.generation_config = GenerationConfig(do_sample=False, eos_token_id=ends, pad_token_id=ends[1])
    module.save_pretrained(folder)
    return folder


def tiny_config(tokenizer: Any, backbone: str) -> VideoSalmonn2Config:
    """The configuration of a tiny model for `tokenizer`."""
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    newer = backbone == "qwen3_vl"
    text: dict[str, Any] = {
        "vocab_size": 8 * math.ceil((len(tokenizer) + 1) / 8),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
    }
    vision: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 64,
        "out_hidden_size": 64,
    }
    if newer:
        text |= {"head_dim": 16}
        vision |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    else:
        vision |= {"fullatt_block_indexes": [1]}
    audio = {
        "d_model": 32,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "encoder_layers": 2,
        "num_mel_bins": 128,
        "qformer_config": {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "intermediate_size": 64,
        },
    }
    return VideoSalmonn2Config(
        backbone=backbone,
        text_config=text,
        vision_config=vision,
        audio_config=audio,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        audio_token_id=len(tokenizer),
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        vision_token_id=ids["<|vision_pad|>"],
    )
