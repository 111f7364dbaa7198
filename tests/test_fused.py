"""The short steps of a decoder layer against the stock modules, whose place they take."""

from __future__ import annotations

import copy
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

from omnimem_train.memory import LayerMemory
from omnimem_train.models import fused
from omnimem_train.models.attention import _eager
from omnimem_train.models.interface import Tap, TokenBlock
from omnimem_train.models.loading import load_model
from omnimem_train.models.lora import LoraSettings, add_lora, disable_adapter, lora_parameters

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype).requires_grad_()


def gradients(out: Tensor, *inputs: Tensor) -> list[Tensor]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
    return list(torch.autograd.grad(out, inputs, weight))


@needs_triton
@pytest.mark.parametrize("n", [1, 5, 700])
def test_swiglu(n: int) -> None:
    from omnimem_train.kernels.layer import swiglu

    gate, up = draw(1, n, 6, seed=1), draw(1, n, 6, seed=2)
    found, wanted = swiglu(gate, up), silu(gate) * up
    torch.testing.assert_close(found, wanted)
    for mine, other in zip(gradients(found, gate, up), gradients(wanted, gate, up), strict=True):
        torch.testing.assert_close(mine, other)
    extreme = torch.tensor([-200.0, 200.0, 0.0], device=DEVICE)
    torch.testing.assert_close(swiglu(extreme, extreme), silu(extreme) * extreme)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The formula of stock layers."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


@needs_triton
@pytest.mark.parametrize("heads", [1, 2, 7])
@pytest.mark.parametrize("layout", ["heads first", "tokens first", "odd"])
def test_rotate(heads: int, layout: str) -> None:
    from omnimem_train.kernels.layer import rotate

    if layout == "heads first":
        x = draw(2, heads, 5, 16)
    elif layout == "tokens first":
        x = draw(2, 5, heads, 16).transpose(1, 2)
    else:
        x = draw(2, heads, 16, 5).transpose(2, 3)
    angle = draw(2, 5, 8, seed=3).detach().repeat(1, 1, 2)
    found, wanted = rotate(x, angle.cos(), angle.sin()), turned(x, angle.cos(), angle.sin())
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gradients(found, x), gradients(wanted, x))


@needs_triton
@pytest.mark.parametrize("heads", [1, 3])
def test_merge(heads: int) -> None:
    """Sums far apart: one of the two outputs alone counts."""
    from omnimem_train.kernels.layer import merge

    a, b = draw(2, 5, heads, 16, seed=1).transpose(1, 2), draw(2, heads, 5, 16, seed=2)
    a_sum, b_sum = (50 * draw(2, heads, 5, 1, seed=s) for s in (3, 4))
    out, total = merge(a.detach(), a_sum.detach(), b.detach(), b_sum.detach())
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(total, torch.logaddexp(a_sum, b_sum).detach())
    wanted = a * (a_sum - total).exp() + b * (b_sum - total).exp()
    torch.testing.assert_close(out, wanted.detach(), rtol=1e-4, atol=1e-4)


def sums_of(query: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """(B, H, n): the logarithm of each query's sum of exponentials, by the formula."""
    n, keys = query.shape[2], torch.cat([old, new], 2).repeat_interleave(query.shape[1] // new.shape[1], 1)
    logits = query.double() @ keys.double().transpose(2, 3) * query.shape[3] ** -0.5
    hidden = torch.ones(n, keys.shape[2], dtype=torch.bool, device=keys.device).triu(old.shape[2] + 1)
    return logits.masked_fill(hidden, float("-inf")).logsumexp(-1).detach()


@pytest.mark.parametrize("group", [1, 3])
def test_split_attention_hands_its_sums_on(group: int) -> None:
    from omnimem_train.models.split import attend_split

    query = draw(2, 2 * group, 9, 16).cpu()
    old = [draw(2, 2, 5, 16, seed=s).cpu() for s in (1, 2)]
    new = [draw(2, 2, 9, 16, seed=s).cpu() for s in (3, 4)]
    out, sums = attend_split(query, (old[0], old[1]), (new[0], new[1]), 0.25)
    assert out.requires_grad and not sums.requires_grad
    torch.testing.assert_close(sums.double(), sums_of(query, old[0], new[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_probes", [0, 3])
def test_choices_are_given_the_sums(n_probes: int, nano_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all queries, where all are probes, and wherever attention goes in two parts: after every memory."""
    from omnimem_train.choosing import Chooser
    from omnimem_train.memory import Candidates, MemorySpec
    from omnimem_train.models.loading import load_model
    from omnimem_train.streaming import Stream

    seen: list[Candidates] = []
    made = Chooser._candidates
    monkeypatch.setattr(Chooser, "_candidates", lambda *a: seen.append(made(*a)) or seen[-1])
    model = load_model(nano_folder, device="cpu", attention="split")
    stream = Stream(model, MemorySpec("perturbation", {"n_probes": n_probes}, budget=20, chunk_tokens=16))
    embeds, at = draw(1, 64, model.hidden_size).detach().cpu(), torch.arange(64)
    block = TokenBlock(embeds, at[None, :, None].expand(1, 64, 3), (1 + at % 2).to(torch.int8)[None], at[None].float())
    with torch.no_grad():
        stream.feed(stream.start(), block)
    known = [c for c in seen if c.log_sums is not None]
    # chunks with a memory; the last layer attends to nothing
    assert len(known) == (0 if n_probes else 3 * (model.n_layers - 1))
    for c in known:
        logits = c.queries @ c.tokens.keys.repeat_interleave(c.group, 1).transpose(2, 3) * c.scaling
        hidden = torch.arange(c.n) > c.query_rows[:, None]
        torch.testing.assert_close(c.log_sums, logits.masked_fill(hidden, float("-inf")).logsumexp(-1))


@needs_cuda
@pytest.mark.gpu
def test_split_attention_on_a_gpu() -> None:
    """cuDNN on either part, against the formula in float64: outputs and gradients."""
    from omnimem_train.models.split import attend_split, takes

    query = draw(1, 14, 512, 128, dtype=torch.bfloat16)
    old = [draw(1, 2, 1000, 128, seed=s, dtype=torch.bfloat16) for s in (1, 2)]
    new = [draw(1, 2, 512, 128, seed=s, dtype=torch.bfloat16) for s in (3, 4)]
    if not takes(query, 1000):
        pytest.skip("cuDNN's kernels are for newer GPUs")
    out, sums = attend_split(query, (old[0], old[1]), (new[0], new[1]), 128**-0.5)
    torch.testing.assert_close(sums.double(), sums_of(query, old[0], new[0]), rtol=1e-2, atol=1e-2)
    inputs = [query, *old, *new]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    key, value = torch.cat([exact[1], exact[3]], 2), torch.cat([exact[2], exact[4]], 2)
    wanted = _eager(exact[0], key, value, None, 128**-0.5)
    found, expected = [out, *gradients(out, *inputs)], [wanted, *gradients(wanted, *exact)]
    for mine, other in zip(found, expected, strict=True):
        assert (mine - other).norm() < 0.01 * other.norm()


def test_rms_norm(nano: Any) -> None:
    stock = nano.module.get_submodule(nano.language_prefix() + "0.input_layernorm")
    x = draw(2, 5, stock.weight.shape[0]).cpu()
    found, wanted = rms_norm(x, stock.weight.shape, stock.weight, stock.variance_epsilon), stock(x)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gradients(found, x), gradients(wanted, x))


def run(model: Any, hidden: Tensor) -> list[Tensor]:
    """Output of a layer after a memory, what it hands to the tap, and gradients of input, memory and adapter."""
    memory = LayerMemory.empty(1, model.kv_heads, model.head_dim, dtype=model.dtype, device=model.device)
    keys, values = (draw(1, model.kv_heads, 3, model.head_dim, seed=s, dtype=model.dtype) for s in (4, 5))
    zeros = torch.zeros(1, model.kv_heads, 3, device=model.device)
    memory = LayerMemory(keys, values, zeros[..., None].expand(1, -1, -1, 3).long(), *[zeros] * 4)
    positions = torch.arange(hidden.shape[1], device=model.device)[None, :, None].expand(1, -1, 3) + 7
    tap = Tap(memory)
    out = model.run_layer(0, hidden, model.rope(positions), tap, {})
    assert tap.queries is not None and tap.keys is not None and tap.values is not None
    found = [out, tap.queries, tap.keys, tap.values]
    weights = [p for n, p in lora_parameters(model) if ".layers.0." in n]
    return found + gradients(out, hidden, keys, values, *weights)


def with_adapter(model: Any) -> Any:
    add_lora(model, LoraSettings(r=4, alpha=8.0))
    for i, (_, parameter) in enumerate(lora_parameters(model)):
        parameter.data.copy_(0.2 * draw(*parameter.shape, seed=i).detach())
    return model


def stock_again(model: Any) -> None:
    """Take the short steps off."""
    for module in model.module.modules():
        module.__dict__.pop("forward", None)


@needs_triton
def test_a_layer_is_the_stock_layer(nano_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, where both are exact; the kernels by Triton's interpreter if there is no GPU."""
    model = with_adapter(load_model(str(nano_folder), dtype="float32", device=DEVICE))
    monkeypatch.setattr(fused, "usable", lambda hidden: True)
    monkeypatch.setattr(fused, "HALF", (torch.float32,))
    hidden = draw(1, 5, model.hidden_size, seed=6)
    found = run(model, hidden)
    stock_again(model)
    for mine, other in zip(found, run(model, hidden), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_as_close_as_the_stock_layer(nano_folder: Path, dtype: str) -> None:
    """To the same layer in float64: the error is not more than a little above that of the stock modules."""
    model = with_adapter(load_model(str(nano_folder), dtype=dtype, device=DEVICE))
    hidden = draw(1, 40, model.hidden_size, seed=6, dtype=model.dtype)
    found = run(model, hidden)
    stock_again(model)
    stock = run(model, hidden)
    model.module.double()
    exact = run(model, hidden.detach().double().requires_grad_())
    for mine, other, wanted in zip(found, stock, exact, strict=True):
        assert mine.dtype == other.dtype
        scale = wanted.norm()
        assert (mine - wanted).norm() < 1.5 * (other - wanted).norm() + 2e-3 * scale


def test_adapters_that_do_more_run_as_peft_runs_them(nano_folder: Path) -> None:
    model = with_adapter(load_model(str(nano_folder), dtype="bfloat16", device=DEVICE))
    projection = model.module.get_submodule(model.language_prefix() + "0.self_attn.q_proj")
    x = draw(1, 5, model.hidden_size, dtype=model.dtype)
    short = projection(x)
    assert fused.at_work(projection, "default")
    with disable_adapter(model):
        assert not fused.at_work(projection, "default")
        assert torch.equal(projection(x), projection.base_layer(x))
    assert torch.equal(projection(x), short)
    projection.merge()
    assert not fused.at_work(projection, "default")
    torch.testing.assert_close(projection(x), short, rtol=0.05, atol=0.05)
    projection.unmerge()


def test_dropout_is_on_in_training_alone(nano_folder: Path) -> None:
    model = load_model(str(nano_folder), dtype="bfloat16", device=DEVICE)
    add_lora(model, LoraSettings(r=4, dropout=0.5))
    projection = model.module.get_submodule(model.language_prefix() + "0.self_attn.q_proj")
    nn.init.normal_(projection.lora_B["default"].weight)
    x = draw(1, 5, model.hidden_size, dtype=model.dtype)
    assert torch.equal(projection(x), projection(x))
    projection.train()
    assert not torch.equal(projection(x), projection(x))


def test_copies_are_their_own(nano: Any) -> None:
    """A copied model does not run modules of the one it was copied from."""
    other = copy.deepcopy(nano.module)
    name = nano.language_prefix() + "0.mlp"
    mine, copied = nano.module.get_submodule(name), other.get_submodule(name)
    assert copied.forward.args[0] is copied and mine.forward.args[0] is mine
    with torch.no_grad():
        copied.down_proj.weight.zero_()
        x = draw(1, 2, nano.hidden_size).cpu()
        assert copied(x).abs().max() == 0 < mine(x).abs().max()
