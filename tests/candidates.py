"""Random candidates for tests of the memory module: a memory that has lost tokens, followed by a chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from omnimem_train.memory import AUDIO, TEXT, VISUAL, Candidates, LayerMemory, Probes, Rotary, Selector

# A moment of a stream: (modality, row, column) of its tokens.
MOMENTS = {
    "both": [(TEXT, 0, 0), *((VISUAL, r, k) for r in range(2) for k in range(3)), (AUDIO, 0, 0), (AUDIO, 0, 0)],
    "visual": [(TEXT, 0, 0), *((VISUAL, r, k) for r in range(3) for k in range(3))],
    "audio": [(AUDIO, 0, 0), (AUDIO, 0, 0), (AUDIO, 0, 0)],
    "text": [(TEXT, 0, 0)],
}


def layout(mix: str, n: int) -> tuple[Tensor, Tensor]:
    """Modality (n,) and positions (n, 3) of a stream of moments."""
    moment = MOMENTS[mix]
    tokens = [(*moment[i % len(moment)], i // len(moment)) for i in range(n)]
    modality = torch.tensor([t[0] for t in tokens], dtype=torch.int8)
    flat = modality != VISUAL
    time = torch.tensor([t[3] for t in tokens])
    row, column = (torch.where(flat, time, torch.tensor([t[i] for t in tokens])) for i in (1, 2))
    return modality, torch.stack([time, row, column], dim=-1)


def candidates(
    selector: Selector | None = None,
    *,
    probes: Probes | None = None,
    mix: str = "both",
    batch: int = 2,
    kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 8,
    width: int = 12,
    n_old: int = 27,
    n_forgotten: int = 9,
    n_chunk: int = 18,
    dtype: torch.dtype = torch.float32,
    duplicates: bool = False,
    seed: int = 0,
) -> Candidates:
    """`n_old` stream tokens of which every head has lost `n_forgotten` media tokens of its own choice (the same in all
    heads for a selector that says so), then a chunk of `n_chunk`.

    With `duplicates`, all tokens of a modality have equal keys, values and layer inputs.
    """
    draw = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    n, heads = n_old + n_chunk, kv_heads * group
    modality, positions = layout(mix, n)
    keys, values = random(batch, kv_heads, n, head_dim), random(batch, kv_heads, n, head_dim)
    hidden = random(batch, n, width)
    if duplicates:
        first = torch.tensor([int((modality == m).nonzero()[0]) for m in modality])
        keys, values, hidden = keys[:, :, first], values[:, :, first], hidden[:, first]
    row = torch.arange(n).expand(batch, n)
    stream = LayerMemory.from_chunk(
        keys,
        values,
        positions.expand(batch, n, 3),
        modality.expand(batch, n),
        row.float(),
        row,
        hidden=hidden if selector is None or selector.shared_heads else None,
    )
    stream = stream.with_evidence(torch.rand(batch, 1, n, generator=draw).expand(batch, kv_heads, n))
    lost = torch.rand(batch, kv_heads, n, generator=draw)
    if selector is None or selector.shared_heads:
        lost = lost[:, :1].expand(batch, kv_heads, n)
    lost = lost.masked_fill((modality == TEXT) | (row[0] >= n_old), -1)
    n_forgotten = min(n_forgotten, int((modality[:n_old] != TEXT).sum()))
    kept = lost.argsort(dim=-1, descending=True)[..., n_forgotten:].sort(dim=-1).values
    n_memory = n_old - n_forgotten
    tokens = stream.gather(kept)
    age = torch.arange(tokens.n_tokens) < n_memory
    tokens = tokens.with_evidence(tokens.evidence * age)
    probes = probes or (selector.probes() if selector else Probes("all"))
    asked = probes.rows(n_chunk)
    queries = 2 * random(batch, heads, n_chunk, head_dim)
    return Candidates(
        tokens,
        n_memory,
        queries[:, :, asked],
        asked + n_memory,
        scaling=head_dim**-0.5,
        output_weight=random(width, heads * head_dim),
        layer=1,
        n_layers=4,
        seed=seed,
        rotary=Rotary(
            0.3 ** torch.arange(head_dim // 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0])[: head_dim // 2]
        ),
    )


def stream_of(c: Candidates, b: int) -> Candidates:
    """Stream `b` of a batch by itself."""
    tokens = LayerMemory.from_tensors(None if t is None else t[b : b + 1] for t in c.tokens.tensors())
    return Candidates(
        tokens,
        c.n_memory,
        c.queries[b : b + 1],
        c.query_rows,
        c.scaling,
        c.output_weight,
        c.layer,
        c.n_layers,
        c.seed,
        c.rotary,
    )
