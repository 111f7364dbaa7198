"""A frozen decoder in 4 bits: NF4 with scales that are quantised themselves (QLoRA, arXiv 2305.14314).

The only importer of bitsandbytes. Only the matrices of the decoder's layers are packed: towers, embeddings, norms,
biases and the output matrix stay as they are. Weights are packed one by one on their way to the device, which never
holds the model unpacked. A packed module remembers what fingerprints read of the weight it was made from, so an adapter
that was trained on a 4-bit base knows the checkpoint as its base, in whichever form that is loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from omnimem_train.errors import UserError
from omnimem_train.models.interface import StreamingModel, weight_sample

KINDS = ("none", "nf4")
BLOCK, NESTED_BLOCK = 64, 256  # weights that share a scale, and scales that share one of theirs; bitsandbytes' own
BYTES_A_WEIGHT = 0.5 + 1 / BLOCK + 4 / (BLOCK * NESTED_BLOCK)
"""4 bits, a scale of 8 bits for each block, a float32 for each block of scales."""
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)


def check_available() -> None:
    """Raises UserError unless bitsandbytes can be imported."""
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # a build for other libraries fails with OSError, RuntimeError, ...
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            "model.quantization=nf4 needs the package bitsandbytes",
            cause=first_line,
            remedy="pip install 'omnimem-train[nf4]', or set model.quantization=none",
        ) from error


def quantise(model: StreamingModel, device: torch.device) -> None:
    """Pack the decoder of `model`, which may be anywhere, and bring all of it to `device`.

    Raises:
        UserError: no bitsandbytes, a precision that it does not unpack to, or it cannot pack on `device`.
    """
    check_available()
    if model.dtype not in PRECISIONS:
        raise UserError(
            f"model.quantization=nf4 with numbers in {str(model.dtype).removeprefix('torch.')}",
            cause="weights are unpacked to float32, bfloat16 or float16",
            remedy="set model.dtype=bfloat16",
        )
    layers = model.module.get_submodule(model.language_prefix().removesuffix("."))
    try:
        pack_linears(layers, device)
    except RuntimeError as error:
        raise UserError(
            f"the decoder cannot be packed into 4 bits on {device}",
            cause=(str(error).strip().splitlines() or [type(error).__name__])[0],
            remedy="python -m bitsandbytes says what it finds on this machine; model.quantization=none does without",
        ) from error
    model.module.to(device)
    mark(model)


def mark(model: StreamingModel) -> None:
    """Note on a model that its decoder is packed, for this package and for peft, which asks the module."""
    model.quantization = "nf4"
    model.module.is_loaded_in_4bit = True  # type: ignore[assignment]


def pack_linears(part: nn.Module, device: torch.device) -> None:
    """Replace every linear map inside `part` by a frozen 4-bit one of the same name, on `device`."""
    for parent in list(part.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, _packed(child, device))


def _packed(linear: nn.Linear, device: torch.device) -> nn.Module:
    """`linear` in 4 bits; its products are in the precision of its weight."""
    import bitsandbytes as bnb

    weight = linear.weight.detach()
    with torch.device("meta"):  # its own weight is replaced at once
        made = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=weight.dtype, quant_type="nf4"
        )
    made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=made).to(device)
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.detach().to(device), requires_grad=False)
    # On some CPUs it would reorder the packed weight in place when it is first read, and not unpack it right after.
    made.support_avx512bf16_for_cpu = False
    made.before_packing = tuple(weight.shape), weight_sample(weight)
    return made.train(linear.training)


def is_packed(linear: nn.Module) -> bool:
    """Whether a linear map is in 4 bits."""
    return getattr(linear.weight, "quant_state", None) is not None


def unpacked(linear: nn.Module) -> Tensor:
    """(out, in) weight of a linear map, plain or in 4 bits, detached."""
    weight: Any = linear.weight
    if not is_packed(linear):
        return weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.detach(), weight.quant_state)
