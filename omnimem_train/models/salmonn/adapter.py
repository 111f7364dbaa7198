"""Adapters in the published layout: read, merged, and converted to and from ours. Plain tensors; peft is not needed
here.

A published adapter is what peft writes (`adapter_config.json`, `adapter_model.safetensors`), with module names of the
old key layout, LoRA on the language model's `q_proj`, `k_proj`, `v_proj`, and some modules stored whole (vision
merger, Q-Former,
`audio_proj`). The audio encoder has projections of the same names without adapters: the public script hides its
layers while it wraps the model. Here names are matched in full, so nothing needs hiding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from omnimem_train.errors import UserError
from omnimem_train.models.salmonn.files import listed, our_key, published_key

PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_HALF = re.compile(r"^(?P<module>.+)\.lora_(?P<half>[AB])\.weight$")
LANGUAGE_TARGETS = r"(?:.*\.)?language_model\.layers\.\d+\.self_attn\.(?:{names})"
"""Regular expression for the language model's projections alone; `names` is e.g. "q_proj|k_proj|v_proj"."""
KEPT = (
    "base_model_name_or_path",
    "bias",
    "inference_mode",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "r",
    "task_type",
    "use_rslora",
)
"""Options that an exported adapter states. Newer peft writes many more, at which the one of the public code (0.15)
stops."""
UNSUPPORTED = ("use_dora", "fan_in_fan_out", "alpha_pattern", "rank_pattern", "layers_to_transform", "lora_bias")


@dataclass(frozen=True)
class Adapter:
    """An adapter under our module names.

    Attributes:
        config: `adapter_config.json` as it was.
        lora: module -> (A (rank, in), B (out, rank)).
        whole: parameter or buffer -> its new value.
        scale: what B @ A is multiplied with.
    """

    config: dict[str, Any]
    lora: dict[str, tuple[Tensor, Tensor]]
    whole: dict[str, Tensor]
    scale: float


def read_adapter(folder: str | Path) -> Adapter:
    """An adapter folder, in the published layout or ours.

    Raises:
        UserError: a file is missing; not LoRA, or a variant of it that is not supported; half an adapter.
    """
    config, state = _read(Path(folder))
    _check_plain(config, folder)
    halves: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = our_key(key.removeprefix(PREFIX))
        if match := _HALF.match(name):
            halves.setdefault(match["module"], {})[match["half"]] = tensor
        else:
            whole[name] = tensor
    torn = sorted(name for name, pair in halves.items() if set(pair) != {"A", "B"})
    if torn:
        raise UserError(f"{folder}: A or B is missing of {listed(torn)}", "the file is incomplete", "copy it again")
    rank = int(config["r"])
    scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    return Adapter(config, {name: (pair["A"], pair["B"]) for name, pair in halves.items()}, whole, scale)


@torch.no_grad()
def merge_adapter(model: nn.Module, folder: str | Path) -> None:
    """Adds an adapter to the weights of `model`: W + scale * B @ A, in float32; modules stored whole are replaced.

    Raises:
        UserError: it does not fit the model; nothing is changed then.
    """
    adapter = read_adapter(folder)
    state = model.state_dict()
    _check_fit(adapter, state, folder)
    for name, (a, b) in adapter.lora.items():
        weight = state[f"{name}.weight"]
        update = adapter.scale * (b.to(weight.device).float() @ a.to(weight.device).float())
        weight.copy_(weight.float() + update)
    for name, value in adapter.whole.items():
        state[name].copy_(value)


def export_adapter(source: str | Path, target: str | Path, backbone: str) -> None:
    """Our adapter folder, as peft wrote it -> one that the public code loads: old key names, targets by name.

    Args:
        source: the folder peft wrote for a `VideoSalmonn2ForConditionalGeneration`.
        target: where to; made if need be.
        backbone: of the configuration.

    Raises:
        UserError: as `read_adapter`.
    """
    config, state = _read(Path(source))
    _check_plain(config, source)
    modules = sorted({m["module"].rsplit(".", 1)[-1] for key in state if (m := _HALF.match(key))})
    saved = [published_key(m, backbone) for m in config.get("modules_to_save") or []]
    named = {PREFIX + published_key(our_key(k.removeprefix(PREFIX)), backbone): v for k, v in state.items()}
    kept = {k: v for k, v in config.items() if k in KEPT}
    _write(Path(target), {**kept, "target_modules": modules, "modules_to_save": saved or None}, named)


def import_adapter(source: str | Path, target: str | Path) -> None:
    """A published adapter folder -> one that peft loads onto a `VideoSalmonn2ForConditionalGeneration` (to go on
    training).

    Targets become a regular expression for the language model alone, so that the audio encoder's projections stay as
    they are. `audio.q_tokens` is listed as a module in published adapters, but is a bare parameter that is not
    stored: it is left out.
    """
    config, state = _read(Path(source))
    named = {PREFIX + our_key(k.removeprefix(PREFIX)): v for k, v in state.items()}
    targets = config["target_modules"]
    if not isinstance(targets, str):
        targets = LANGUAGE_TARGETS.format(names="|".join(sorted(targets)))
    saved = [our_key(f"{m}.").removesuffix(".") for m in config.get("modules_to_save") or []]
    stored = [m for m in saved if any(k.startswith(f"{PREFIX}{m}.") for k in named)]
    _write(Path(target), {**config, "target_modules": targets, "modules_to_save": stored or None}, named)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no {name}", "an adapter folder holds two files", "give the adapter's folder")
    return json.loads((folder / CONFIG).read_text(encoding="utf-8")), load_file(folder / WEIGHTS)


def _check_plain(config: Mapping[str, Any], folder: str | Path) -> None:
    odd = [name for name in UNSUPPORTED if config.get(name)]
    if config.get("peft_type") != "LORA" or odd:
        raise UserError(
            f"{folder}: peft type {config.get('peft_type')} with {', '.join(odd) or 'no options'}",
            "only plain LoRA is known here",
            "merge it with peft",
        )


def _write(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_fit(adapter: Adapter, state: Mapping[str, Tensor], folder: str | Path) -> None:
    wrong = []
    for name, (a, b) in adapter.lora.items():
        ours = state.get(f"{name}.weight")
        if ours is None or (b.shape[0], a.shape[1]) != tuple(ours.shape) or a.shape[0] != b.shape[1]:
            wrong.append(_clash(name, (b.shape[0], a.shape[1]), ours))
    for name, value in adapter.whole.items():
        ours = state.get(name)
        if ours is None or ours.shape != value.shape:
            wrong.append(_clash(name, tuple(value.shape), ours))
    # The adapter is of a smaller model if layers of ours are left without one.
    kinds = {re.sub(r"\.\d+\.", ".N.", name) for name in adapter.lora}
    wrong += [
        f"{name}: not in the adapter"
        for name in (k.removesuffix(".weight") for k in state if k.endswith(".weight"))
        if re.sub(r"\.\d+\.", ".N.", name) in kinds and name not in adapter.lora
    ]
    if wrong:
        raise UserError(
            f"{folder}: the adapter does not fit the model; {listed(wrong)}",
            "it was trained on a model of another size",
            f"load the model it was trained on ({adapter.config.get('base_model_name_or_path')})",
        )


def _clash(name: str, theirs: tuple[int, ...], ours: Tensor | None) -> str:
    return f"{name}: {tuple(theirs)} in the adapter, {'absent' if ours is None else tuple(ours.shape)} here"
