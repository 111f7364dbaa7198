"""An adapter that others can use: PEFT files, `memory.json`, a model card, read back and checked."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from omnimem_train.checkpoint import check_base, find_checkpoint, load_checkpoint, read_meta
from omnimem_train.errors import UserError
from omnimem_train.memory.spec import MemorySpec
from omnimem_train.models.importance import FILE as HEAD_WEIGHTS
from omnimem_train.models.importance import add_importance_head, save_importance_head, trained_parameters
from omnimem_train.models.interface import StreamingModel
from omnimem_train.models.loading import load_model, model_class
from omnimem_train.models.lora import WEIGHTS, LoraSettings, add_lora, check_layout, save_adapter
from omnimem_train.session import model_fingerprint


def export_adapter(
    checkpoint: Path, out: Path, *, model_path: str | None = None, layout: str | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Write the adapter of a training checkpoint.

    One that was trained on a 4-bit base is held against the base as it is stored, and loads on either; `memory.json`
    and the model card say how it was held.

    Args:
        checkpoint: a checkpoint, or a run's folder for its newest one.
        out: folder to write into: adapter_config.json, adapter_model.safetensors, memory.json, README.md, and with a
            learned importance importance.safetensors.
        model_path: the base model, if it is elsewhere than in training.
        layout: how modules are named, one of the model's `adapter_layouts`; by default as plain peft names them for the
            class of the installed transformers. Qwen2.5-Omni: "thinker", or "omni" for the full Omni model.
            video-SALMONN 2+: "peft", or "salmonn" for the public code.

    Returns:
        What the check found ("modules", "trained", "parameters"), and "step".

    Raises:
        UserError: no checkpoint, another base model than in training, or an adapter that was never trained.
    """
    folder = find_checkpoint(checkpoint / "checkpoints" if (checkpoint / "checkpoints").is_dir() else checkpoint)
    content = read_meta(folder)
    meta = content["meta"]
    # the adapter as it was trained: one that training started from keeps its own rank and scale
    settings = meta["config"] | {"lora": meta["lora"]}
    path = model_path or settings["model"]["path"]
    layout = check_layout(model_class(path), layout)
    model = load_model(path, dtype=settings["model"]["dtype"], device=device)
    base = model_fingerprint(model, adapters=False)
    check_base(folder, path, base)
    add_lora(model, LoraSettings(**(settings["lora"] | {"targets": tuple(settings["lora"]["targets"])})))
    held = load_checkpoint(folder, world_size=content["world_size"])
    with torch.no_grad():
        if model.HEAD in held.tensors["adapter"]:
            add_importance_head(model)
        for name, parameter in trained_parameters(model):
            trained = held.tensors["adapter"].get(name)
            if trained is None or trained.shape != parameter.shape:
                raise UserError(
                    f"the adapter in {folder} does not fit the model {path}",
                    cause=f"{name} is {'absent' if trained is None else list(trained.shape)} there, "
                    f"{list(parameter.shape)} here",
                    remedy="name the base model it was trained on: --model",
                )
            parameter.copy_(trained)
    report: dict[str, Any] = save_adapter(model, out, layout=layout)
    save_importance_head(model, out)
    if report["trained"] == 0:
        raise UserError(
            f"the adapter in {folder} changes nothing", cause="all its B matrices are zero: not trained yet"
        )
    spec = MemorySpec.from_dict(settings["memory"])
    about = {
        "base_model": path,
        "model_class": type(model.module).__name__,
        "base_quantization": settings["model"].get("quantization", "none"),
        "base_fingerprint": base,
        "adapter_sha256": sha256(out / WEIGHTS),
        "importance_sha256": sha256(out / HEAD_WEIGHTS) if (out / HEAD_WEIGHTS).is_file() else None,
        "trained_budgets": settings["budgets"],
        "steps": content["step"],
        "versions": meta["versions"],
    }
    spec.save(out / "memory.json", **about)
    (out / "README.md").write_text(model_card(spec, about, settings, report))
    fresh = load_model(path, dtype=settings["model"]["dtype"], device=device, adapter=out)
    adapter_memory(out, fresh)
    return report | {"step": content["step"]}


def adapter_memory(folder: Path, base: StreamingModel | None = None) -> MemorySpec:
    """The memory spec an adapter was trained with.

    Args:
        base: the model (its adapter does not matter), to hold it against the one the adapter was trained on; None for
            no such check.

    Raises:
        UserError: no spec, or one of another adapter, or an adapter of another base model.
    """
    spec = MemorySpec.load(folder)
    about = json.loads((folder / "memory.json").read_text()).get("about")
    weights, head = folder / WEIGHTS, folder / HEAD_WEIGHTS
    if isinstance(about, dict) and about.get("importance_sha256") != (sha256(head) if head.is_file() else None):
        raise UserError(
            f"{folder}: memory.json belongs to another {HEAD_WEIGHTS}, or it is absent",
            cause="the two were written together; one of them was replaced",
            remedy="export the adapter again",
        )
    if not isinstance(about, dict) or not weights.is_file() or about.get("adapter_sha256") != sha256(weights):
        raise UserError(
            f"{folder}: memory.json belongs to another {WEIGHTS}",
            cause="the two were written together; one of them was replaced",
            remedy="export the adapter again",
        )
    if base is not None and about.get("base_fingerprint") != model_fingerprint(base, adapters=False):
        raise UserError(
            f"the adapter {folder} was trained on another base model ({about.get('base_model')})",
            cause=f"fingerprint {about.get('base_fingerprint')}, here {model_fingerprint(base, adapters=False)}",
            remedy="load the base model it was trained on, in the same dtype",
        )
    return spec


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_card(spec: MemorySpec, about: dict[str, Any], settings: dict[str, Any], report: dict[str, Any]) -> str:
    """README.md of an adapter, in the form the Hugging Face hub reads."""
    lora, budgets = settings["lora"], settings["budgets"]
    drawn = (
        f"drawn from {budgets['choices']}" if budgets["choices"]
        else f"{budgets['kind'].replace('_', '-')} between {budgets['low']} and {budgets['high']}"
    )  # fmt: skip
    head = (
        f"\nThe importance it chooses by is learned too (`{HEAD_WEIGHTS}`); without that file the memory cannot be "
        "rebuilt.\n"
        if about["importance_sha256"] else ""
    )  # fmt: skip
    if about["base_quantization"] != "none":
        head += (
            f"\nThe base was held in 4 bits ({about['base_quantization'].upper()}) during training. The adapter loads "
            "on the unquantised base too, whose numbers differ a little.\n"
        )
    return f"""---
base_model: {about["base_model"]}
library_name: peft
tags: [omnimem-train, streaming, kv-cache]
---

# Budget-aware adapter for `{about["base_model"]}`

LoRA (r = {lora["r"]}, alpha = {lora["alpha"]:g}, on {", ".join(lora["targets"])}; {report["modules"]} modules,
{report["parameters"]:,} weights), trained for {about["steps"]} steps with the memory compressed in the forward pass:
selector `{spec.selector}`, {drawn} tokens a layer, {100 * budgets["full_share"]:.0f} % of the steps uncompressed,
chunks of {spec.chunk_tokens} tokens, {spec.positions} positions.
{head}
`memory.json` (fingerprint `{spec.fingerprint()}`) rebuilds that memory:

```
omnimem ask VIDEO "question" --model {about["base_model"]} --adapter THIS_FOLDER
```

In the default layout the adapter alone loads with `PeftModel.from_pretrained` on `{about["model_class"]}`. Trained with
{", ".join(f"{k} {v}" for k, v in about["versions"].items() if v not in ("not installed", "None"))}.
"""
