"""The head that a learned importance is read with, beside the adapter: one more parameter of the model, (L, 2, E).

`omnimem_train.retention` trains it, `omnimem_train.memory.learned` reads with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from omnimem_train.errors import UserError
from omnimem_train.models.interface import StreamingModel
from omnimem_train.models.lora import lora_parameters

FILE = "importance.safetensors"


def add_importance_head(model: StreamingModel) -> nn.Parameter:
    """Give `model` a head of zeros, float32, trainable: all tokens are equally important. One it has is kept."""
    head = model.importance_head
    if head is None:
        shape = (model.n_layers, 2, model.hidden_size)
        head = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=model.device))
        model.module.register_parameter(model.HEAD, head)
    head.requires_grad_(True)
    return head


def trained_parameters(model: StreamingModel) -> Iterator[tuple[str, nn.Parameter]]:
    """What training changes, under its names in `model.module`: the adapter, and the head if there is one."""
    yield from lora_parameters(model)
    if (head := model.importance_head) is not None:
        yield model.HEAD, head


def save_importance_head(model: StreamingModel, folder: Path) -> None:
    """Write the head beside an adapter, if the model has one; remove one that lies there if it has none."""
    if (head := model.importance_head) is None:
        (folder / FILE).unlink(missing_ok=True)
    else:
        save_file({model.HEAD: head.detach().cpu().contiguous()}, str(folder / FILE), metadata={"format": "pt"})


def load_importance_head(model: StreamingModel, folder: str | Path) -> None:
    """Put the head that lies in an adapter's folder on `model`, frozen; nothing if there is none.

    Raises:
        UserError: unreadable, or of another model.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return
    try:
        tensors = load_file(str(path))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot read {path}", cause=str(error), remedy="export the adapter again") from error
    held, head = tensors.get(model.HEAD), add_importance_head(model)
    if held is None or held.shape != head.shape or not bool(torch.isfinite(held).all()):
        raise UserError(
            f"{path} does not fit the model: {'no such tensor' if held is None else list(held.shape)}, "
            f"it needs {list(head.shape)}, all finite",
            remedy="use the base model it was trained on",
        )
    with torch.no_grad():
        head.copy_(held)
    head.requires_grad_(False)
