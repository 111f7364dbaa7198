"""A small, real, randomly initialised Qwen2.5-Omni thinker in the ordinary Hugging Face layout, made offline.

Tests and the quickstart run on it through the code that loads `Qwen/Qwen2.5-Omni-7B`; only the path differs. Window
sizes, token rates, special tokens and file layout are those of the published checkpoint; widths, depths and the
vocabulary are small. Weights are scaled by fan-in: with the customary 0.02 attention would be uniform and hide
mistakes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    GenerationConfig,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2Tokenizer,
)

from omnimem_train.errors import UserError, nearest

# Order and meaning as in the published tokenizer, whose ids start at 151643.
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_bos|>",
    "<|vision_eos|>",
    "<|vision_pad|>",
    "<|IMAGE|>",
    "<|VIDEO|>",
)

# What the byte-pair merges are learned from; any other text falls back to bytes.
WORDS = """
system user assistant You are a helpful assistant. What which when where who how many was were is the of and in to at
video audio sound picture colour color red green blue yellow white black shape square circle triangle cross star shown
heard seen tone beep pitch high low middle loud quiet first second third last before after during while same time event
events happened happens appears moves left right top bottom minute seconds question answer option options letter only
Respond with correct choices given directly Select best following multiple-choice based on A. B. C. D. E. (A) (B) (C)
(D) The answer is yes no none one two three four five six seven eight nine ten narrate describe all order there it this
that
"""

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% elif part['type'] == 'video' %}<|vision_bos|><|VIDEO|><|vision_eos|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Size:
    """Widths and depths. Every head has an even number of frequency pairs for each of the three axes.

    Attributes:
        layers, hidden, heads, kv_heads, mlp: of the decoder.
        sections: frequencies for time, row and column; they sum to half of hidden / heads.
        tower, tower_heads, tower_layers: of both towers.
        max_pixels: of a frame after resizing.
        theta: base of the rotary frequencies. Time gets the fastest ones; the published value, made for 16 of them,
            would leave a head with few of them blind to distances beyond some seconds.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    mlp: int
    sections: tuple[int, int, int]
    tower: int
    tower_heads: int
    tower_layers: int
    max_pixels: int
    theta: float = 1e6


SIZES = {
    "nano": Size(3, 64, 4, 2, 128, (2, 3, 3), 32, 2, 2, max_pixels=56 * 56),
    "tiny": Size(4, 192, 6, 2, 512, (4, 6, 6), 96, 4, 2, max_pixels=112 * 112),
    "recall": Size(6, 256, 8, 2, 768, (8, 4, 4), 128, 4, 3, max_pixels=112 * 112, theta=1e7),
}


def make_tiny(folder: str | Path, seed: int = 0, size: str = "tiny") -> Path:
    """Write a thinker checkpoint to `folder`.

    Args:
        seed: of the weights; the same seed gives the same files.
        size: "tiny" (2.5 million parameters), "nano" (0.3 million), or "recall" (7 million: the shape of
            `checkpoints/tiny-omni`).

    Returns:
        The folder, with config.json, model.safetensors, generation_config.json, the tokenizer's files,
        preprocessor_config.json and the chat template.

    Raises:
        UserError: unknown size.
    """
    if size not in SIZES:
        raise UserError(f"unknown size {size!r}{nearest(size, SIZES)}", remedy=f"choose one of: {', '.join(SIZES)}")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed {seed} is out of range", remedy="give a whole number, 0 or more, below 2^63")
    tokenizer = tiny_tokenizer()
    module = Qwen2_5OmniThinkerForConditionalGeneration(thinker_config(SIZES[size], tokenizer))
    fill(module, seed)
    return write_thinker(folder, module, tokenizer, SIZES[size].max_pixels)


def write_thinker(folder: str | Path, module: nn.Module, tokenizer: Any, max_pixels: int) -> Path:
    """Write a thinker checkpoint in the ordinary Hugging Face layout: weights, tokenizer, preprocessing."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    thinker: Any = module
    thinker.generation_config = GenerationConfig(do_sample=False, eos_token_id=ends, pad_token_id=ends[1])
    thinker.save_pretrained(folder)
    content = json.dumps(preprocessor_config(max_pixels), indent=2)
    (folder / "preprocessor_config.json").write_text(content + "\n")
    return folder


def tiny_tokenizer(words: str = WORDS, vocabulary: int = 498) -> Qwen2Tokenizer:
    """The tokenizer of the tiny thinker. `words` (separated by spaces) and `vocabulary` decide on its merges."""
    named = {
        "image_token": "<|IMAGE|>",
        "audio_token": "<|AUDIO|>",
        "video_token": "<|VIDEO|>",
        "vision_bos_token": "<|vision_bos|>",
        "vision_eos_token": "<|vision_eos|>",
        "audio_bos_token": "<|audio_bos|>",
        "audio_eos_token": "<|audio_eos|>",
    }
    tokenizer = byte_pairs(SPECIAL, words, vocabulary, extra_special_tokens=named)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def byte_pairs(special: Sequence[str], words: str = WORDS, vocabulary: int = 498, **options: Any) -> Qwen2Tokenizer:
    """A byte-pair tokenizer of Qwen's kind: 256 bytes, merges learned from `words` up to `vocabulary` entries, the
    `special` tokens in their order."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    learner.train_from_iterator([" " + w for w in words.split()] + words.split(), trainer)
    model = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"] | {token: len(model["vocab"]) + i for i, token in enumerate(special)},
        merges=[tuple(pair) for pair in model["merges"]],
        eos_token="<|im_end|>",
        model_max_length=32768,
        **options,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def thinker_config(size: Size, tokenizer: Any) -> Qwen2_5OmniThinkerConfig:
    """The configuration of a thinker of `size` with the published window sizes and rates."""
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    vocabulary = 8 * math.ceil(len(tokenizer) / 8)
    rope = {"rope_type": "default", "mrope_section": list(size.sections), "rope_theta": size.theta}
    return Qwen2_5OmniThinkerConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": size.hidden,
            "intermediate_size": size.mlp,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "max_position_embeddings": 32768,
            "rope_parameters": rope,
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": size.tower_layers,
            "hidden_size": size.tower,
            "intermediate_size": 2 * size.tower,
            "num_heads": size.tower_heads,
            "out_hidden_size": size.hidden,
            "fullatt_block_indexes": [size.tower_layers - 1],
            "window_size": 112,
        },
        audio_config={
            "encoder_layers": size.tower_layers,
            "encoder_attention_heads": size.tower_heads,
            "encoder_ffn_dim": 2 * size.tower,
            "d_model": size.tower,
            "output_dim": size.hidden,
            "n_window": 100,
        },
        audio_token_index=ids["<|AUDIO|>"],
        image_token_index=ids["<|IMAGE|>"],
        video_token_index=ids["<|VIDEO|>"],
        audio_start_token_id=ids["<|audio_bos|>"],
        audio_end_token_id=ids["<|audio_eos|>"],
        vision_start_token_id=ids["<|vision_bos|>"],
        vision_end_token_id=ids["<|vision_eos|>"],
        user_token_id=tokenizer("user")["input_ids"][0],
    )


def fill(module: nn.Module, seed: int) -> None:
    """Random weights scaled by fan-in, in place; queries and keys larger, so that attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "embed_tokens" in name:
            value = noise
        elif parameter.ndim > 1:
            sharp = any(part in name for part in (".q_proj.", ".k_proj.", ".q.", ".k."))
            value = noise * (1.5 if sharp else 1.0) / math.sqrt(parameter[0].numel())
        elif "norm" in name or "ln_" in name:
            value = 0.1 * noise + (1 if name.endswith("weight") else 0)
        else:
            value = 0.1 * noise
        parameter.data.copy_(value)


def preprocessor_config(max_pixels: int) -> dict[str, Any]:
    """preprocessor_config.json with the keys of the published checkpoint; only the pixel limits are smaller."""
    return {
        "chunk_length": 300,
        "dither": 0.0,
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": 128,
        "hop_length": 160,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "max_pixels": max_pixels,
        "merge_size": 2,
        "min_pixels": 28 * 28,
        "n_fft": 400,
        "n_samples": 4800000,
        "nb_max_frames": 30000,
        "padding_side": "left",
        "padding_value": 0.0,
        "patch_size": 14,
        "processor_class": "Qwen2_5OmniProcessor",
        "return_attention_mask": True,
        "sampling_rate": 16000,
        "temporal_patch_size": 2,
    }
