"""What a computation depends on besides its inputs, so that it can be repeated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

T = TypeVar("T")


@dataclass(frozen=True)
class Surroundings:
    """Random state and autocast, as they were at one moment."""

    device: str
    cpu: Tensor
    devices: list[int]
    states: list[Tensor]
    autocast: dict[str, Any]

    @classmethod
    def here(cls, like: Tensor) -> Surroundings:
        """As they are now, on the device of `like`."""
        kind = like.device.type
        autocast = {"enabled": torch.is_autocast_enabled(kind), "dtype": torch.get_autocast_dtype(kind)}
        return cls(kind, torch.get_rng_state(), *get_device_states(like), autocast)

    def again(self, run: Callable[[], T]) -> T:
        """`run()` in them, with gradient."""
        kind = "cuda" if self.device == "cpu" else self.device  # fork_rng wants an accelerator's name
        with torch.random.fork_rng(self.devices, device_type=kind), torch.enable_grad():
            torch.set_rng_state(self.cpu)
            if self.devices:
                set_device_states(self.devices, self.states, device_type=self.device)
            with torch.autocast(self.device, **self.autocast):
                return run()


def dropouts(module: nn.Module) -> tuple[tuple[float, bool], ...]:
    """The share and the mode of every dropout inside a module, in order."""
    return tuple((m.p, m.training) for m in module.modules() if isinstance(m, nn.Dropout))
