"""A stock decoder layer with fewer passes over memory: same modules, same numbers up to rounding.

A stock layer in half precision spends a third of its time on small steps: norms that convert and convert back, a
rotation in seven passes, adapters whose products run in float32 on copies of their input. `fuse` gives the modules of a
layer another `forward` each. The modules, their names, hooks and weights stay, and a module goes back to its stock
`forward` for whatever the short one does not cover (other precisions or devices, a cache of transformers, several
adapters at once), so plain torch remains the reference.

Shape legend: see `omnimem_train.memory.state`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm

from omnimem_train import kernels
from omnimem_train.models.attention import attend

HALF = (torch.float16, torch.bfloat16)
SILU = ("SiLU", "SiLUActivation")


def fuse(layer: nn.Module) -> None:
    """Give the norms, the MLP and the attention of a stock decoder layer their short `forward`."""
    for module in list(layer.modules()):
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            _shorten(module, norm)
        elif {"gate_proj", "up_proj", "down_proj", "act_fn"} <= _parts(module):
            _shorten(module, mlp)
        elif {"q_proj", "k_proj", "v_proj", "o_proj"} <= _parts(module):
            _shorten(module, attention)


def fuse_adapters(module: nn.Module) -> None:
    """Give all LoRA layers of peft in a model their short `forward`."""
    for layer in module.modules():
        if hasattr(layer, "lora_A") and hasattr(layer, "base_layer"):
            _shorten(layer, adapted)


def _parts(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _shorten(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Set `forward(module, stock, ...)` as the module's own, once."""
    if not isinstance(module.forward, partial):
        module.forward = partial(forward, module, module.forward)


def norm(module: Any, stock: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """RMS norm in one kernel, float32 inside, rounded once at its end."""
    if not (hidden.is_cuda and hidden.dtype in HALF and module.weight.dtype == hidden.dtype):
        return stock(hidden)
    return rms_norm(hidden, module.weight.shape, module.weight, module.variance_epsilon)


def mlp(module: Any, stock: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """down(silu(gate) * up), of which gate and up are all that is kept for the backward pass."""
    if not (usable(hidden) and type(module.act_fn).__name__ in SILU):
        return stock(hidden)
    from omnimem_train.kernels.layer import swiglu

    return module.down_proj(swiglu(module.gate_proj(hidden), module.up_proj(hidden)))


def usable(hidden: Tensor) -> bool:
    """Whether the kernels of a layer apply to `hidden`."""
    return hidden.is_cuda and hidden.dtype == torch.bfloat16 and kernels.reason_not_to() is None


def attention(module: Any, stock: Callable[..., Any], hidden_states: Tensor, **given: Any) -> Any:
    """Attention of a stream's layer: projections, rotation in one kernel, this package's attention call."""
    cos, sin = given["position_embeddings"]
    if given.get("tap") is None or cos.ndim != 3 or not usable(hidden_states):
        return stock(hidden_states=hidden_states, **given)
    from omnimem_train.kernels.layer import rotate

    heads = (*hidden_states.shape[:-1], -1, module.head_dim)
    query, key = module.q_proj(hidden_states).view(heads), module.k_proj(hidden_states).view(heads)
    if hasattr(module, "q_norm"):
        query, key = module.q_norm(query), module.k_norm(key)
    value = module.v_proj(hidden_states).view(heads).transpose(1, 2)
    query, key = rotate(query.transpose(1, 2), cos, sin), rotate(key.transpose(1, 2), cos, sin)
    out, weights = attend(
        module, query, key, value, scaling=module.scaling, tap=given["tap"], kernel=given.get("kernel", "sdpa")
    )
    return module.o_proj(out.flatten(2)), weights


def adapted(module: Any, stock: Callable[..., Tensor], x: Tensor, *rest: Any, **options: Any) -> Tensor:
    """A linear map with one LoRA adapter, its products in the precision of `x`. The adapter itself stays float32: it
    is rounded for the product alone, and its gradient is added up in float32."""
    names = [name for name in module.active_adapters if name in module.lora_A]
    if x.dtype not in HALF or rest or options or len(names) != 1 or not at_work(module, names[0]):
        return stock(x, *rest, **options)
    (name,) = names
    base = module.base_layer(x)
    low = linear(module.lora_dropout[name](x), module.lora_A[name].weight.to(x.dtype))
    up = module.lora_B[name].weight.to(x.dtype)
    # a product in 4 bits is a view made inside a function of its own, which must not be written to
    add = torch.Tensor.addmm_ if type(module.base_layer) is nn.Linear else torch.addmm
    out = add(base.flatten(0, -2), low.flatten(0, -2), up.t(), alpha=module.scaling[name])
    return out.view(base.shape)


def rounded_weights(module: nn.Module, dtype: torch.dtype) -> list[nn.Parameter]:
    """Adapter weights of a model in `dtype` that `adapted` rounds to it for each product."""
    found = []
    for layer in module.modules():
        if hasattr(layer, "lora_A") and hasattr(layer, "base_layer") and dtype in HALF:
            names = [name for name in layer.active_adapters if name in layer.lora_A]  # type: ignore[union-attr, operator]
            if len(names) == 1 and at_work(layer, names[0]):
                pair = (layer.lora_A[names[0]].weight, layer.lora_B[names[0]].weight)  # type: ignore[index, union-attr]
                found += [w for w in pair if w.dtype != dtype]
    return found


def at_work(module: Any, name: str) -> bool:
    """Whether an adapter is B A x and nothing else, and switched on."""
    if module.disable_adapters or module.merged or name in getattr(module, "lora_variant", {}):
        return False
    return module.lora_A[name].bias is None and module.lora_B[name].bias is None
