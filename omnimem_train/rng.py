"""Random number generators, saved and restored for exact resume; versions of what decides a run's numbers."""

from __future__ import annotations

import importlib.metadata
import platform
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from omnimem_train.errors import UserError


def rng_state() -> dict[str, Any]:
    """State of the generators of Python, NumPy and torch (CPU, and the current CUDA device): plain values, tensors."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    key_tensor = torch.from_numpy(np.asarray(keys).astype(np.int64))  # torch reads no NumPy arrays without running code
    return {
        "python": random.getstate(),
        "numpy": (str(name), key_tensor, int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Inverse of `rng_state`.

    Raises:
        UserError: saved with a GPU and none is here, or the other way round.
    """
    if (state["cuda"] is not None) != torch.cuda.is_available():
        there, here = ("with", "none") if state["cuda"] is not None else ("without", "one")
        raise UserError(
            f"the checkpoint was written {there} a GPU, this machine has {here}",
            cause="random numbers, and so the run, would differ",
            remedy="resume on the same kind of machine, or start a new run from the exported adapter",
        )
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def versions() -> dict[str, str]:
    """Versions of what decides the numbers of a run."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in ("omnimem-train", "torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
