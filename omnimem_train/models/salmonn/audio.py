"""The audio part of video-SALMONN 2+: a Whisper encoder, and a Q-Former that turns each half second into one token.

Source: video-SALMONN 2 (arXiv 2506.15220); windowed Q-Former from SALMONN (arXiv 2310.13289). Module names are those of
the published checkpoints. Departure: no dropout in the Q-Former (the public code drops 10 % there in training mode,
which would make a training pass differ from an inference pass in a part that is frozen by default).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from omnimem_train.models.salmonn.config import VideoSalmonn2AudioConfig


class _Attention(nn.Module):
    """Multi-head attention under BERT's names: `self.{query,key,value}`, `output.{dense,LayerNorm}`; post-norm."""

    def __init__(self, width: int, memory_width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.self = nn.ModuleDict(
            {
                "query": nn.Linear(width, width),
                "key": nn.Linear(memory_width, width),
                "value": nn.Linear(memory_width, width),
            }
        )
        self.output = _Output(width, width, eps)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """(B, q, width) attending to (B, m, memory_width)."""

        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.self["query"](x)), split(self.self["key"](memory)), split(self.self["value"](memory))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.output(out, x)


class _Output(nn.Module):
    """Linear map, residual, layer norm."""

    def __init__(self, width_in: int, width: int, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width_in, width)
        self.LayerNorm = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)


class _Layer(nn.Module):
    """Self-attention among the queries, cross-attention to the piece, feed-forward."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        width, heads, eps = c["hidden_size"], c["num_attention_heads"], c["layer_norm_eps"]
        self.attention = _Attention(width, width, heads, eps)
        self.crossattention = _Attention(width, c["encoder_width"], heads, eps)
        self.intermediate_query = nn.ModuleDict({"dense": nn.Linear(width, c["intermediate_size"])})
        self.output_query = _Output(c["intermediate_size"], width, eps)
        self.act = ACT2FN[c["hidden_act"]]

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = self.crossattention(self.attention(x, x), memory)
        return self.output_query(self.act(self.intermediate_query["dense"](x)), x)


class _Embeddings(nn.Module):
    """A layer norm on the queries. `position_ids` is saved in every published checkpoint and has no effect."""

    position_ids: Tensor

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.LayerNorm = nn.LayerNorm(c["hidden_size"], eps=c["layer_norm_eps"])
        self.register_buffer("position_ids", torch.arange(c["max_position_embeddings"])[None])


class _Encoder(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(_Layer(c) for _ in range(c["num_hidden_layers"]))


class _Bert(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.embeddings, self.encoder = _Embeddings(c), _Encoder(c)


class QFormer(nn.Module):
    """BERT without words: (B, q, width) queries and (B, m, encoder_width) memory -> (B, q, width)."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.bert = _Bert(c)

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        x = self.bert.embeddings.LayerNorm(queries)
        for layer in self.bert.encoder.layer:
            x = layer(x, memory)
        return x


class VideoSalmonn2Audio(WhisperEncoder):
    """The stock Whisper encoder with `q_tokens`, `qformer` and `audio_proj` beside its own modules."""

    config: VideoSalmonn2AudioConfig

    def __init__(self, config: VideoSalmonn2AudioConfig) -> None:
        super().__init__(config)
        c = config.qformer_config
        self.q_tokens = nn.Parameter(c["initializer_range"] * torch.randn(1, c["query_length"], c["hidden_size"]))
        self.qformer = QFormer(c)
        self.audio_proj = nn.Linear(c["hidden_size"], c["out_hidden_size"])
        self.post_init()

    def encode(self, audio_feature: Tensor) -> Tensor:
        """Log-mel (windows, 128, 3000) -> encoder states (windows, 1500, d_model), after the last layer norm."""
        return super().forward(audio_feature.to(self.conv1.weight.dtype)).last_hidden_state

    def forward(self, audio_feature: Tensor) -> Tensor:
        """Log-mel of whole 30 s windows (windows, 128, 3000) -> audio tokens (windows * 60, decoder width).

        Padding counts: silence gets tokens too, and nothing is masked (as in the public code).
        """
        hidden = self.encode(audio_feature)
        size, stride = self.config.piece_frames()
        pieces = hidden.unfold(1, size, stride).transpose(2, 3).flatten(0, 1)
        queries = self.q_tokens.expand(pieces.shape[0], -1, -1)
        return self.audio_proj(self.qformer(queries, pieces)).flatten(0, 1)
