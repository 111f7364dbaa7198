"""Low-rank adapters (LoRA, arXiv 2106.09685) on the language model alone. The only importer of peft.

Adapters go to modules named in full by an anchored regular expression. Name suffixes alone, as in much public code,
would also hit the audio tower, whose attention has projections of the same names.
"""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from omnimem_train.errors import UserError, nearest
from omnimem_train.models.fused import fuse_adapters
from omnimem_train.models.interface import StreamingModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WRAPPED = "base_model.model."  # what peft puts in front of names
NAME = "default"
_HALF = re.compile(r"^(?P<module>.+)\.lora_(?P<half>[AB])(?:\.default)?\.weight$")
# The decoder layers under the names of all supported transformers versions, in a thinker or inside the full Omni model.
_LAYERS = re.compile(r"^(?:base_model\.model\.)?(?:thinker\.)?model\.(?:language_model\.)?layers\.(?=\d+\.)")
_UNSUPPORTED = ("use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform", "modules_to_save", "lora_bias")


@dataclass(frozen=True)
class LoraSettings:
    """An adapter.

    Attributes:
        r: rank; at most the smaller side of every target.
        alpha: the update is alpha / r * B @ A.
        dropout: on the adapter's input, while training.
        targets: names of the linear maps in every decoder layer that get one: q_proj, k_proj, v_proj, o_proj of the
            attention, gate_proj, up_proj, down_proj of the MLP.
    """

    r: int = 64
    alpha: float = 128.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")

    def __post_init__(self) -> None:
        if self.r < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise UserError(
                f"LoRA with r={self.r}, alpha={self.alpha}, dropout={self.dropout}",
                remedy="give r >= 1, alpha > 0 and 0 <= dropout < 1",
            )
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise UserError(f"LoRA targets {self.targets}", remedy="name at least one, each once")


def add_lora(model: StreamingModel, settings: LoraSettings) -> list[str]:
    """Put a new adapter on `model` and make it the only thing that is trained. Its output is zero until trained.

    The adapter is float32 whatever the model is, its products are in the model's precision. A model holds one adapter:
    `model.adapter`.

    Returns:
        Names of the modules that got one: every target in every layer, none outside the language model.

    Raises:
        UserError: the model has an adapter already, a target that its layers do not have, or one smaller than the rank.
    """
    if model.adapter is not None:
        raise UserError("the model already has an adapter", remedy="load the model anew, or go on with that one")
    modules = matched(model, settings.targets)
    check_rank(model, modules, settings.r)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=target_pattern(model, settings.targets),
        base_model_name_or_path=str(model.module.config.name_or_path) or None,  # type: ignore[union-attr]
    )
    with warnings.catch_warnings():  # peft asks transformers in a way that newer versions call deprecated
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        model.adapter = get_peft_model(model.module, config, autocast_adapter_dtype=True)
    found = sorted({name for name, _ in _halves(model)})
    assert found == sorted(modules), f"peft adapted {len(found)} modules, {len(modules)} were meant"
    for _, parameter in lora_parameters(model):
        parameter.data = parameter.data.float()
    fuse_adapters(model.module)
    model.module.train(model.module.training)  # new modules come in training mode, with dropout
    return modules


def check_rank(model: StreamingModel, modules: Iterable[str], r: int) -> None:
    """Raises UserError if one of the `modules` that get an adapter has a side below the rank `r`."""
    sides: dict[str, Any] = {name: model.module.get_submodule(name) for name in modules}
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in sides.items()}
    name, shape = min(shapes.items(), key=lambda item: min(item[1]))
    if r > min(shape):
        raise UserError(
            f"LoRA rank r={r} is above {min(shape)}, the smaller side of {name} ({shape[0]} x {shape[1]})",
            cause="an update of that matrix has no higher rank; the adapter would be larger than the matrix itself",
            remedy=f"set lora.r to {min(shape)} or less, or leave {name.rsplit('.', 1)[1]} out of lora.targets",
        )


def target_pattern(model: StreamingModel, targets: tuple[str, ...]) -> str:
    """Regular expression for `targets` in the decoder layers; it must match a whole name. It also fits the names the
    same layers have in other transformers versions and inside the full Omni model."""
    layers = re.escape(model.language_prefix()).replace(r"language_model\.", r"(?:language_model\.)?")
    if "language_model" not in layers:
        layers = layers.replace(r"model\.", r"model\.(?:language_model\.)?", 1)
    return rf"(?:thinker\.)?{layers}\d+\.\w+\.(?:{'|'.join(map(re.escape, targets))})"


def matched(model: StreamingModel, targets: tuple[str, ...]) -> list[str]:
    """Names of the linear maps that `targets` stand for.

    Raises:
        UserError: a target that not every layer has exactly once.
    """
    pattern = re.compile(target_pattern(model, targets))
    linear = [name for name, module in model.module.named_modules() if _is_linear(module)]
    found = [name for name in linear if pattern.fullmatch(name)]
    assert all(name.startswith(model.language_prefix()) for name in found)
    for target in targets:
        count = sum(name.endswith(f".{target}") for name in found)
        if count != model.n_layers:
            known = sorted({n.rsplit(".", 1)[1] for n in linear if n.startswith(model.language_prefix())})
            raise UserError(
                f"LoRA target {target!r} is in {count} of {model.n_layers} decoder layers{nearest(target, known)}",
                remedy=f"choose from: {', '.join(known)}",
            )
    return found


def lora_parameters(model: StreamingModel) -> Iterator[tuple[str, nn.Parameter]]:
    """The adapter's parameters, under their names in `model.module`."""
    for name, parameter in model.module.named_parameters():
        if _HALF.match(name):
            yield name, parameter


def settings_of(model: StreamingModel) -> LoraSettings:
    """The settings of the adapter that is on `model`, wherever it came from."""
    assert model.adapter is not None
    held = model.adapter.peft_config[NAME]
    targets = tuple(sorted({name.rsplit(".", 1)[1] for name, _ in _halves(model)}))
    return LoraSettings(held.r, held.lora_alpha, held.lora_dropout, targets)


@contextmanager
def disable_adapter(model: StreamingModel) -> Iterator[None]:
    """Inside, the model runs as if it had no adapter. What is trainable afterwards is what was before."""
    if model.adapter is None:
        yield
        return
    trainable = [(p, p.requires_grad) for _, p in lora_parameters(model)]
    try:
        with model.adapter.disable_adapter():
            yield
    finally:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)


# Files ---------------------------------------------------------------------------------------------------------------


def save_adapter(
    model: StreamingModel, folder: str | Path, *, state: Mapping[str, Tensor] | None = None, layout: str | None = None
) -> dict[str, int]:
    """Write the adapter in peft's format, read it back and check it.

    A plain `PeftModel.from_pretrained(module, folder)` loads it on the class of `model.module`, in the transformers
    version it was written with; `load_adapter` loads it under any supported version, in any layout.

    Args:
        folder: made if need be; adapter_config.json and adapter_model.safetensors are replaced.
        state: names in `model.module` -> tensors, for sharded training where parameters do not hold their values;
            None to take them from the model.
        layout: one of `model.adapter_layouts`, the first of them without it.

    Returns:
        See `check_adapter`.

    Raises:
        UserError: the model has no adapter, or no such layout.
    """
    if model.adapter is None:
        raise UserError("the model has no adapter to save", remedy="train or load one first")
    layout = check_layout(model, layout)
    with tempfile.TemporaryDirectory() as plain:
        _write(model, Path(plain), state)
        model.convert_adapter(Path(plain), Path(folder), layout)
    return check_adapter(model, folder)


def check_layout(model: StreamingModel | type[StreamingModel], layout: str | None) -> str:
    """`layout`, or the model's own.

    Raises:
        UserError: the model has no such layout.
    """
    known = model.adapter_layouts
    if layout is not None and layout not in known:
        raise UserError(
            f"unknown adapter layout {layout!r}{nearest(layout, known)}",
            remedy=f"for this model choose one of: {', '.join(known)}",
        )
    return layout or known[0]


def _write(model: StreamingModel, folder: Path, state: Mapping[str, Tensor] | None) -> None:
    """The adapter as peft writes it."""
    tensors = {}
    for name, parameter in lora_parameters(model):
        value = parameter if state is None else state[name]
        tensors[WRAPPED + name.replace(f".{NAME}.", ".")] = value.detach().cpu().contiguous().clone()
    save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})
    config = model.adapter.peft_config[NAME].to_dict()
    config |= {"inference_mode": True, "peft_type": "LORA"}
    text = json.dumps({k: _plain(v) for k, v in sorted(config.items())}, indent=2)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def check_adapter(model: StreamingModel, folder: str | Path) -> dict[str, int]:
    """Read an adapter folder back and hold it against the model it is for.

    Returns:
        "modules": how many have an adapter; "trained": in how many of them B is not zero; "parameters": numbers in all.

    Raises:
        UserError: unreadable, modules missing or too many, shapes that do not fit, or numbers that are not finite.
    """
    config, tensors = _read(Path(folder))
    halves = _by_module(model, tensors, Path(folder))
    targets = tuple(sorted({name.rsplit(".", 1)[1] for name, _ in halves}))
    wanted = matched(model, targets)
    missing = [name for name in wanted if not {(name, "A"), (name, "B")} <= halves.keys()]
    extra = [name for name, _ in halves if name not in set(wanted)]
    if missing or extra:
        raise UserError(
            f"the adapter {folder} does not fit the model: {len(missing)} modules lack one (first "
            f"{(missing or ['none'])[0]}), {len(extra)} are not in the model (first {(extra or ['none'])[0]})",
            remedy=f"use the base model it was trained on ({config.get('base_model_name_or_path')})",
        )
    modules = dict(model.module.named_modules())
    for (name, half), tensor in halves.items():
        linear: Any = modules[name]
        shape = (config["r"], linear.in_features) if half == "A" else (linear.out_features, config["r"])
        if tuple(tensor.shape) != shape or not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"{name}, lora_{half} in {folder}: {tuple(tensor.shape)}, the model needs {shape}, all finite",
                remedy=f"use the base model it was trained on ({config.get('base_model_name_or_path')})",
            )
    return {
        "modules": len(wanted),
        "trained": sum(bool(x.any()) for (_, half), x in halves.items() if half == "B"),
        "parameters": sum(x.numel() for x in halves.values()),
    }


def load_adapter(model: StreamingModel, folder: str | Path, *, trainable: bool = False) -> dict[str, int]:
    """Put the adapter in `folder` on `model`, or into the adapter of the same shape it has.

    Names of any supported transformers version are understood, with or without the full Omni model's prefix.

    Returns:
        See `check_adapter`.

    Raises:
        UserError: no adapter there, a kind of LoRA that is not supported, or one that does not fit the model.
    """
    config, tensors = _read(Path(folder))
    report = check_adapter(model, folder)
    halves = _by_module(model, tensors, Path(folder))
    targets = tuple(sorted({name.rsplit(".", 1)[1] for name, _ in halves}))
    if model.adapter is None:
        # stored dropout and scale are taken as they are; rslora divides by the root of r
        scale = config["lora_alpha"] * (config["r"] ** 0.5 if config.get("use_rslora") else 1.0)
        add_lora(model, LoraSettings(config["r"], scale, config.get("lora_dropout", 0.0), targets))
    own = _halves(model)
    if own.keys() != halves.keys() or any(own[key].shape != tensor.shape for key, tensor in halves.items()):
        raise UserError(
            f"the adapter {folder} differs in shape from the one the model has", remedy="load the model anew"
        )
    with torch.no_grad():
        for key, tensor in halves.items():
            own[key].copy_(tensor)
            own[key].requires_grad_(trainable)
    return report


def _halves(model: StreamingModel) -> dict[tuple[str, str], nn.Parameter]:
    """(module, "A" or "B") -> parameter of the model's adapter."""
    found = {}
    for name, parameter in lora_parameters(model):
        match = _HALF.match(name)
        assert match is not None
        found[match["module"], match["half"]] = parameter
    return found


def _by_module(model: StreamingModel, tensors: Mapping[str, Tensor], folder: Path) -> dict[tuple[str, str], Tensor]:
    """(module in this model, "A" or "B") -> tensor of an adapter file."""
    found = {}
    for key, tensor in tensors.items():
        name, count = _LAYERS.subn(model.language_prefix(), key)
        match = _HALF.match(name)
        if count == 0 or match is None:
            raise UserError(
                f"{folder / WEIGHTS} holds {key}, which is no LoRA weight of a decoder layer",
                remedy="use an adapter that was trained on the language model alone",
            )
        found[match["module"], match["half"]] = tensor
    return found


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(str(folder / WEIGHTS))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"cannot read an adapter in {folder}",
            cause=str(error),
            remedy=f"give a folder with {CONFIG} and {WEIGHTS}",
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG} holds no JSON object", remedy="fetch or export the adapter again")
    odd = [name for name in _UNSUPPORTED if config.get(name)]
    if config.get("peft_type") != "LORA" or odd or config.get("bias", "none") != "none":
        raise UserError(
            f"{folder}: an adapter of type {config.get('peft_type')}, bias {config.get('bias')!r}, {', '.join(odd)}",
            cause="only plain LoRA is supported",
        )
    return config, tensors


def _is_linear(module: nn.Module) -> bool:
    """A linear map, plain or with an adapter around it."""
    return isinstance(module, nn.Linear) or hasattr(module, "base_layer")


def _plain(value: Any) -> Any:
    """A value of peft's configuration as JSON."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return value.value if hasattr(value, "value") else value
