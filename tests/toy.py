"""A decoder of a few thousand weights in plain torch behind the streaming interface, for tests that need float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from omnimem_train.memory.positions import Rotary
from omnimem_train.memory.state import AUDIO, TEXT, VISUAL
from omnimem_train.models.interface import (
    MediaEncoder,
    MediaInfo,
    RenderedTurn,
    StreamingModel,
    Tap,
    TokenBlock,
    Turn,
)


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.q = nn.Linear(width, heads * head_dim)
        self.k = nn.Linear(width, kv_heads * head_dim)
        self.v = nn.Linear(width, kv_heads * head_dim)
        self.o = nn.Linear(heads * head_dim, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.shape = heads, kv_heads, head_dim

    def forward(self, x: Tensor, rotary: Rotary, positions: Tensor, tap: Tap) -> Tensor:
        heads, kv_heads, d = self.shape
        b, n, _ = x.shape
        h = self.norm1(x)
        q, k, v = (
            f(h).view(b, n, count, d).transpose(1, 2)
            for f, count in ((self.q, heads), (self.k, kv_heads), (self.v, kv_heads))
        )
        by = positions[:, None].expand(-1, heads, -1, -1)
        q, k = rotary.turn(q, by), rotary.turn(k, by[:, :kv_heads])
        tap.queries, tap.keys, tap.values = q, k, v
        m = 0
        if tap.memory is not None:
            m = tap.memory.n_tokens
            k, v = torch.cat([tap.memory.keys, k], 2), torch.cat([tap.memory.values, v], 2)
        mask = torch.ones(n, n, dtype=torch.bool).tril() if tap.mask is None else tap.mask
        mask = torch.cat([torch.ones(n, m, dtype=torch.bool), mask], 1)
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        logits = (q @ k.transpose(-1, -2)) * d**-0.5
        out = logits.masked_fill(~mask, float("-inf")).softmax(-1) @ v
        x = x + self.o(out.transpose(1, 2).reshape(b, n, -1))
        return x + self.mlp(self.norm2(x))


class ToyModel(StreamingModel):
    """Three layers, width 16, 4 query and 2 kv heads of 8, float64 unless said."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64, n_layers: int = 3, vocab: int = 20) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.n_layers, self.heads, self.kv_heads, self.head_dim, self.hidden_size = n_layers, 4, 2, 8, 16
            self.module = nn.Module()
            self.module.layers = nn.ModuleList(Layer(16, 4, 2, 8) for _ in range(n_layers))
            self.module.embed = nn.Embedding(vocab, 16)
            self.module.head = nn.Linear(16, vocab, bias=False)
            for p in self.module.parameters():
                if p.ndim > 1:
                    nn.init.normal_(p, std=1.6 * p.shape[-1] ** -0.5)
        self.module.to(dtype)
        self.sampling_rate, self.eos_ids, self.tokenizer = 16000, (0,), None
        self._dtype = dtype
        frequencies = torch.tensor([1.0, 0.3, 0.1, 0.03], dtype=torch.float64)
        self._rotary = Rotary(frequencies, torch.tensor([0, 0, 1, 2]))

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def rotary(self) -> Rotary:
        return self._rotary

    def rope(self, positions: Tensor) -> Any:
        return positions, positions

    def run_layer(self, layer: int, hidden: Tensor, rope: Any, tap: Tap, extras: Mapping[str, Tensor]) -> Tensor:
        return self.module.layers[layer](hidden, self._rotary, rope[0], tap)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.module.head(hidden)

    def output_weight(self, layer: int) -> Tensor:
        return self.module.layers[layer].o.weight.detach()

    def open(self, info: MediaInfo, fps: float, **options: Any) -> MediaEncoder:
        raise ValueError("the toy model has no encoder")

    def window_s(self, fps: float) -> float:
        return 2.0

    def render(self, turn: Turn) -> RenderedTurn:
        raise ValueError("the toy model has no tokenizer")

    def tokens_per_s(self, info: MediaInfo, fps: float) -> dict[str, float]:
        return {"visual": 4.0, "audio": 2.0}

    def language_prefix(self) -> str:
        return "layers."


def toy_stream(n: int, batch: int = 1, seed: int = 0, dtype: torch.dtype = torch.float64) -> TokenBlock:
    """A stream of two text tokens, then seconds of 4 visual (2 x 2) and 2 audio tokens, cut after `n` tokens."""
    g = torch.Generator().manual_seed(seed)
    rows = [(TEXT, (i, i, i), 0.0) for i in range(2)]
    second = 0
    while len(rows) < n:
        t = 2 + 2 * second
        rows += [(VISUAL, (t, 2 + y, 2 + x), float(second)) for y in range(2) for x in range(2)]
        rows += [(AUDIO, (t + i,) * 3, second + i / 2) for i in range(2)]
        second += 1
    rows = rows[:n]
    return TokenBlock(
        embeds=torch.randn(batch, n, 16, generator=g, dtype=torch.float64).to(dtype),
        positions=torch.tensor([p for _, p, _ in rows]).expand(batch, n, 3),
        modality=torch.tensor([m for m, _, _ in rows], dtype=torch.int8).expand(batch, n),
        time_s=torch.tensor([s for _, _, s in rows]).expand(batch, n),
    )


def toy_question(n: int, start: int, seed: int = 0, batch: int = 1, dtype: torch.dtype = torch.float64) -> TokenBlock:
    """`n` text tokens whose positions count up from `start`."""
    g = torch.Generator().manual_seed(1000 + seed)
    positions = torch.arange(start, start + n)
    return TokenBlock(
        embeds=torch.randn(batch, n, 16, generator=g, dtype=torch.float64).to(dtype),
        positions=positions[None, :, None].expand(batch, n, 3),
        modality=torch.full((batch, n), TEXT, dtype=torch.int8),
        time_s=torch.zeros(batch, n),
    )
