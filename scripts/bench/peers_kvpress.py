"""kvpress's side of `peers.sh`: peers_kvpress.py FOLDER --device cuda --reps 10

Runs where kvpress and the transformers it asks for can be imported; nothing of this package is. Each press gets what
its hook would get after a prefill: a stock Qwen2 attention module, its input, and the keys and values it has cached.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import inspect
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from measure import Clock, versions
from peers_tensors import Layer, Side, Sizes, read_layer, read_sizes, timed
from torch import Tensor, nn


def stand_in_for_datasets() -> None:
    """kvpress imports `datasets` to download calibration texts, which nothing here does. Where it is absent, a module
    whose one function says so."""

    def load_dataset(*names: object, **options: object) -> NoReturn:
        raise RuntimeError("the package datasets is not installed")

    module = types.ModuleType("datasets")
    vars(module)["load_dataset"] = load_dataset
    sys.modules["datasets"] = module


try:
    import datasets  # noqa: F401
except ImportError:
    stand_in_for_datasets()

import kvpress  # noqa: E402
from kvpress.utils import compute_n_kept  # noqa: E402
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config  # noqa: E402
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2RotaryEmbedding  # noqa: E402

PRESSES: dict[str, Callable[[float], Any]] = {
    "snapkv": lambda ratio: kvpress.SnapKVPress(ratio),
    "critical_kv": lambda ratio: kvpress.CriticalKVPress(kvpress.SnapKVPress(ratio)),
    "key_difference": lambda ratio: kvpress.KeyDiffPress(ratio),
    "expected_attention": lambda ratio: kvpress.ExpectedAttentionPress(ratio),
    "lagkv": lambda ratio: kvpress.LagKVPress(ratio),
}
ASKS_QUERIES = ("snapkv", "critical_kv", "expected_attention")


class GivenQueries(nn.Module):
    """Stands for a q_proj: the queries of the last inputs, computed before. (1, n, E) -> (1, n, H * D)."""

    def __init__(self, queries: Tensor) -> None:
        super().__init__()
        self.queries = queries

    def forward(self, hidden: Tensor) -> Tensor:
        """No arithmetic."""
        return self.queries[:, -hidden.shape[1] :]


def attention(layer: Layer, sizes: Sizes, number: int) -> Qwen2Attention:
    """The stock module with the weights of a layer (those of keys and values, which no press reads, are not there)."""
    config = Qwen2Config(
        hidden_size=sizes.hidden,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        num_hidden_layers=sizes.layers,
        head_dim=sizes.head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
    )
    with torch.device("meta"):
        module = Qwen2Attention(config, number)
    for linear, weight in ((module.q_proj, layer.q_weight), (module.o_proj, layer.o_weight)):
        linear.weight = nn.Parameter(weight, requires_grad=False)
    module.q_proj.bias = nn.Parameter(layer.q_bias, requires_grad=False)
    with torch.device(layer.hidden.device):
        module.rotary_emb = Qwen2RotaryEmbedding(config)
    return module.eval()


def steps(press: Any, layers: list[Layer], sizes: Sizes, given: bool = False) -> list[Callable[[], Tensor]]:
    """For each layer, the choice as `ScorerPress.compress` makes it, less the copying: (1, G, K) rows, best first.

    Args:
        given: queries are at hand instead of projected from the input.
    """
    keep = compute_n_kept(sizes.candidates, press.compression_ratio)

    def step(module: Qwen2Attention, layer: Layer, kwargs: dict[str, Any]) -> Tensor:
        score = press.score(module, layer.hidden, layer.keys, layer.values, None, kwargs)
        return score.topk(keep, dim=-1).indices

    made = []
    for number, layer in enumerate(layers):
        module = attention(layer, sizes, number)
        place = torch.arange(sizes.candidates, device=layer.hidden.device)[None]
        kwargs = {"position_embeddings": module.rotary_emb(layer.hidden, place)}
        if given:
            module.q_proj = GivenQueries(layer.unrotated_queries(sizes).transpose(1, 2).flatten(2))
        made.append(partial(step, module, layer, kwargs))
    return made


def options(press: Any) -> dict[str, Any]:
    """Options of a press and of the press inside it, less the ratio."""
    inner = options(press.press) if hasattr(press, "press") else {}
    names = set(inspect.signature(type(press).__init__).parameters) - {"self", "press", "compression_ratio"}
    return inner | {name: getattr(press, name) for name in sorted(names)}


@torch.no_grad()
def measured(side: Side, name: str, layers: list[Layer], sizes: Sizes, clock: Clock, reps: int) -> dict[str, Any]:
    """Times and kept sets of a press."""
    press = PRESSES[name](sizes.ratio)
    found: dict[str, Any] = {"options": options(press)}
    found["ms"], side.kept[name] = timed(clock, steps(press, layers, sizes), reps)
    if name in ASKS_QUERIES:
        found["given_ms"], _ = timed(clock, steps(press, layers, sizes, given=True), reps)
    clock.clean()
    exact = [layer.to(clock.device, torch.float32) for layer in layers[: sizes.exact_layers]]
    side.kept[f"{name}.float32"] = torch.stack([step()[0] for step in steps(press, exact, sizes)])
    clock.clean()
    return found


def main() -> None:
    """Run all presses."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--reps", type=int, default=10)
    given = parser.parse_args()
    device, sizes = torch.device(given.device), read_sizes(given.folder)
    layers = [read_layer(given.folder, i, device) for i in range(sizes.layers)]
    side = Side(versions(device) | {"kvpress": importlib.metadata.version("kvpress")})
    for name in PRESSES:
        side.attempt(name, partial(measured, side, name, layers, sizes, Clock(device), given.reps))
    side.write(given.folder, "kvpress")


if __name__ == "__main__":
    main()
