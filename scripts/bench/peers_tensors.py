"""What the two sides of `peers.sh` share: the tensors they choose from, and what they hand back. All of it goes through
files, because the sides run in environments of their own; so this module needs torch and safetensors alone.

Letters of shapes: S candidates, E hidden size, H query heads, G kv heads, D channels of a head, K kept.
"""

from __future__ import annotations

import json
import statistics
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from measure import Clock
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """Sizes of what is chosen from.

    Attributes:
        candidates, chunk, budget: of a layer; the last `chunk` candidates are new, `budget` of them all stay.
        exact_layers: the first so many layers are chosen from in float32 too, to compare the kept sets.
    """

    layers: int = 28
    hidden: int = 3584
    heads: int = 28
    kv_heads: int = 4
    head_dim: int = 128
    candidates: int = 8192
    chunk: int = 2048
    budget: int = 6144
    rope_theta: float = 1e6
    exact_layers: int = 4

    @property
    def ratio(self) -> float:
        """Share of the candidates that goes."""
        return 1 - self.budget / self.candidates


SIZES = {
    "qwen2.5-omni-7b": Sizes(),
    "tiny": Sizes(3, 64, 4, 2, 16, candidates=512, chunk=128, budget=384, exact_layers=3),
}


def frequencies(sizes: Sizes, device: torch.device) -> Tensor:
    """(D/2,) float32: angle of each pair of channels per unit of position."""
    steps = torch.arange(0, sizes.head_dim, 2, device=device, dtype=torch.float32) / sizes.head_dim
    return 1 / sizes.rope_theta**steps


def rotated(x: Tensor, sizes: Sizes) -> Tensor:
    """(1, heads, S, D) turned to positions 0 to S - 1, in the precision of `x` as the stock model does it."""
    positions = torch.arange(x.shape[2], device=x.device, dtype=torch.float32)
    angle = torch.cat(2 * [positions[:, None] * frequencies(sizes, x.device)], dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * angle.cos().to(x.dtype) + torch.cat([-second, first], dim=-1) * angle.sin().to(x.dtype)


@dataclass(frozen=True)
class Layer:
    """One attention layer: what goes into it, what it has cached, and the weights that rules read.

    Attributes:
        hidden: (1, S, E). keys, values: (1, G, S, D), keys rotated.
        q_weight: (H * D, E), q_bias: (H * D,), o_weight: (E, H * D).
    """

    hidden: Tensor
    keys: Tensor
    values: Tensor
    q_weight: Tensor
    q_bias: Tensor
    o_weight: Tensor

    def unrotated_queries(self, sizes: Sizes) -> Tensor:
        """(1, H, S, D)."""
        flat = torch.nn.functional.linear(self.hidden, self.q_weight, self.q_bias)
        return flat.unflatten(-1, (sizes.heads, sizes.head_dim)).transpose(1, 2)

    def queries(self, sizes: Sizes) -> Tensor:
        """(1, H, S, D) rotated."""
        return rotated(self.unrotated_queries(sizes), sizes)

    def to(self, device: torch.device, dtype: torch.dtype) -> Layer:
        """The same there."""
        return Layer(**{name: x.to(device, dtype) for name, x in vars(self).items()})


def make_layer(sizes: Sizes, number: int, device: torch.device, dtype: torch.dtype) -> Layer:
    """Random input through random projections, those of queries and keys sharper so that attention is not uniform."""
    draw = torch.Generator(device).manual_seed(number)

    def random(*dims: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*dims, generator=draw, device=device)).to(dtype)

    def heads(flat: Tensor) -> Tensor:
        return flat.unflatten(-1, (sizes.kv_heads, sizes.head_dim)).transpose(1, 2).contiguous()

    e, width, key_width = sizes.hidden, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    hidden = random(1, sizes.candidates, e)
    k_weight, v_weight = random(key_width, e, scale=1.5 / e**0.5), random(key_width, e, scale=1 / e**0.5)
    keys = rotated(heads(hidden @ k_weight.T + random(key_width, scale=0.5)), sizes)
    q_weight, q_bias = random(width, e, scale=1.5 / e**0.5), random(width, scale=0.5)
    return Layer(hidden, keys, heads(hidden @ v_weight.T), q_weight, q_bias, random(e, width, scale=1 / width**0.5))


# Files ---------------------------------------------------------------------------------------------------------------


def write_layers(folder: Path, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
    """`sizes.json`, and a file of tensors for each layer."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(sizes.layers):
        layer = make_layer(sizes, number, device, dtype)
        save_file({name: x.cpu() for name, x in vars(layer).items()}, folder / f"layer_{number:02d}.safetensors")
    (folder / "sizes.json").write_text(json.dumps(asdict(sizes)))


def read_sizes(folder: Path) -> Sizes:
    """The sizes of a folder of layers."""
    return Sizes(**json.loads((folder / "sizes.json").read_text()))


def read_layer(folder: Path, number: int, device: torch.device) -> Layer:
    """A layer on a device."""
    return Layer(**load_file(folder / f"layer_{number:02d}.safetensors", device=str(device)))


@dataclass
class Side:
    """What one side hands back.

    Attributes:
        about: versions and the like.
        rules: of each rule `options`, and lists of milliseconds for all layers; or `error` in words.
        kept: (layers, G, K) int32 rows of a rule, and those of float32 under RULE.float32 (first layers only).
    """

    about: dict[str, str]
    rules: dict[str, dict[str, Any]] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)

    def write(self, folder: Path, name: str) -> None:
        """As NAME.json and NAME.safetensors."""
        save_file(
            {k: x.to("cpu", torch.int32).contiguous() for k, x in self.kept.items()}, folder / f"{name}.safetensors"
        )
        (folder / f"{name}.json").write_text(json.dumps({"about": self.about, "rules": self.rules}))

    @classmethod
    def read(cls, folder: Path, name: str) -> Side:
        """Raises FileNotFoundError where a side did not get that far."""
        found = json.loads((folder / f"{name}.json").read_text())
        return cls(found["about"], found["rules"], load_file(folder / f"{name}.safetensors"))

    def attempt(self, rule: str, run: Callable[[], dict[str, Any]]) -> None:
        """What `run` finds about a rule; if it fails, that, and the rest go on."""
        try:
            self.rules[rule] = run()
        except Exception as error:  # told in the table
            traceback.print_exc()
            self.rules[rule] = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        print(rule, self.shown(rule), flush=True)

    def shown(self, rule: str) -> str:
        """A line for whoever watches."""
        found = self.rules[rule]
        return found.get("error") or f"{statistics.median(found['ms']):.3f} ms"


# Timing --------------------------------------------------------------------------------------------------------------


def timed(clock: Clock, steps: list[Callable[[], Tensor]], reps: int) -> tuple[list[float], Tensor]:
    """Milliseconds that all steps take one after the other, without waiting in between, `reps` times after a warm-up;
    and what they give, stacked. A step is the choice in one layer, so each step finds inputs that the last did not
    leave in a cache of the GPU."""
    kept = torch.stack([step()[0] for step in steps])

    def run() -> None:
        for step in steps:
            step()

    return [1e3 * clock.once(run) for _ in range(reps)], kept
