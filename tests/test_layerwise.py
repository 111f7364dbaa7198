"""Second passes layer by layer, on a real decoder: the same gradients, without the product nobody reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from omnimem_train.errors import UserError
from omnimem_train.gradient import Gradient
from omnimem_train.memory.spec import MemorySpec
from omnimem_train.models.interface import StreamingModel, TokenBlock
from omnimem_train.models.loading import load_model
from omnimem_train.models.lora import LoraSettings, add_lora, disable_adapter
from omnimem_train.models.unread import without_result
from omnimem_train.streaming import Stream

CHUNK = 16
ATTENTION, EVERYTHING = ("q_proj", "k_proj", "v_proj", "o_proj"), ("q_proj", "v_proj", "gate_proj", "down_proj")
SPEC = MemorySpec("perturbation", budget=24, chunk_tokens=CHUNK)


def adapted(folder: Path, targets: tuple[str, ...], dropout: float = 0.0, dtype: str = "float32") -> StreamingModel:
    model = load_model(folder, device="cpu", dtype=dtype)
    add_lora(model, LoraSettings(r=4, alpha=8, dropout=dropout, targets=targets))
    model.module.train()
    draw = torch.Generator().manual_seed(1)
    for p in model.module.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1, generator=draw)
    return model


def noise(model: StreamingModel, n: int) -> TokenBlock:
    at, draw = torch.arange(n), torch.Generator().manual_seed(0)
    embeds = torch.randn(1, n, model.hidden_size, generator=draw).to(model.dtype)
    return TokenBlock(embeds, at[None, :, None].expand(1, n, 3), (1 + at % 2).to(torch.int8)[None], at[None].float())


def gradients(model: StreamingModel, gradient: Gradient, spec: MemorySpec = SPEC) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of a stream of five chunks and a half, with other numbers drawn before the backward pass."""
    model.module.zero_grad()
    n = 5 * CHUNK + 7
    media = noise(model, n)
    torch.manual_seed(3)
    stream = Stream(model, spec, gradient, n)
    state = stream.flush(stream.feed(stream.start(), media))
    loss = model.logits(stream.ask(state, [media[:5]])).float().log_softmax(-1)[..., 3].sum()
    torch.manual_seed(4)
    loss.backward()
    return loss.detach(), [p.grad for p in model.module.parameters() if p.grad is not None]


@pytest.mark.parametrize("gradient", [Gradient("all"), Gradient("last", chunks=2), Gradient("stop_layer", layer=1)])
@pytest.mark.parametrize("positions", ["absolute", "compact"])
@pytest.mark.parametrize("targets", [ATTENTION, EVERYTHING], ids=["attention", "everything"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradients_are_those_by_chunk(
    dropout: float, targets: tuple[str, ...], positions: str, gradient: Gradient, nano_folder: Path
) -> None:
    from dataclasses import replace

    model, spec = adapted(nano_folder, targets, dropout), SPEC.replace(positions=positions)
    loss, wanted = gradients(model, gradient, spec)
    mine, found = gradients(model, replace(gradient, granularity="layer"), spec)
    assert torch.equal(mine, loss)
    assert len(found) == len(wanted) > 10
    assert sum(float(g.abs().sum()) > 0 for g in wanted) > 4
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * float(b.abs().max()) + 1e-9)


def test_in_bfloat16_too(nano_folder: Path) -> None:
    model = adapted(nano_folder, ATTENTION, dtype="bfloat16")
    (loss, wanted), (mine, found) = (gradients(model, Gradient("all", granularity=g)) for g in ("chunk", "layer"))
    assert torch.equal(mine, loss)
    for a, b in zip(found, wanted, strict=True):
        assert float((a - b).norm()) < 0.02 * float(b.norm())


def test_recorded_adapters_are_rounded_once(nano_folder: Path) -> None:
    """To the numbers that each product rounds them to; anew for each stream; apart from a model without adapters."""
    found = []
    for graphs, granularity in ((False, "chunk"), (True, "chunk"), (True, "layer")):
        model, kept = adapted(nano_folder, ATTENTION, dtype="bfloat16"), list[Tensor]()
        model.graphs = graphs
        for _ in range(3):
            loss, grads = gradients(model, Gradient("all", granularity=granularity))
            kept += [loss, *(g.clone() for g in grads)]
            with torch.no_grad(), disable_adapter(model):
                stream = Stream(model, SPEC)
                stream.feed(stream.start(), noise(model, 5 * CHUNK))
            with torch.no_grad():
                for p in model.module.parameters():
                    if p.grad is not None:
                        p -= 0.05 * p.grad / p.grad.norm()
        assert all(g.dtype == torch.float32 for g in kept[1:] if g.ndim > 1)
        found.append(kept)
    plain, recorded, by_layer = found
    assert float(plain[0]) != float(plain[len(plain) // 3])
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))
    for a, b in zip(by_layer, plain, strict=True):
        assert float((a - b).norm()) <= 0.03 * float(b.norm())


def test_adapters_that_change_in_the_middle_of_a_stream(nano_folder: Path) -> None:
    found = []
    for graphs in (False, True):
        model = adapted(nano_folder, ATTENTION, dtype="bfloat16")
        model.graphs = graphs
        media, stream = noise(model, 10 * CHUNK), Stream(model, SPEC)
        state = stream.feed(stream.start(), media[: 7 * CHUNK])
        with torch.no_grad():
            for p in model.module.parameters():
                if p.requires_grad:
                    p *= 3
        found.append(stream.feed(state, media[7 * CHUNK :]))
    for plain, recorded in zip(*(s.layers for s in found), strict=True):
        assert torch.equal(plain.keys, recorded.keys)


def test_the_last_product_is_made_once(nano_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first pass alone; the others twice, and those of a trained map as well."""
    made: dict[str, int] = {}
    forward = nn.Linear.forward

    def counted(self: nn.Linear, x: Tensor) -> Tensor:
        made[names.get(id(self), "")] = made.get(names.get(id(self), ""), 0) + 1
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    for targets, times in ((ATTENTION, 1), (EVERYTHING, 2)):
        model = adapted(nano_folder, targets)
        names = {id(m): n.split(".")[-1] for n, m in model.language_modules() if ".mlp." in n}
        names |= {id(m.base_layer): n.split(".")[-1] for n, m in model.language_modules() if hasattr(m, "base_layer")}
        made.clear()
        gradients(model, Gradient("all", granularity="layer"))
        chunks, asked, layers = 6, 2, model.n_layers - 1  # the last layer's MLP is not run on a chunk
        assert made["up_proj"] == 2 * chunks * layers + asked * model.n_layers
        assert made["down_proj"] == times * chunks * layers + asked * model.n_layers


def test_activations_of_one_layer_at_a_time(nano_folder: Path) -> None:
    """Bytes alive at once that autograd keeps in second passes."""
    model, spec = adapted(nano_folder, ATTENTION), SPEC.replace(chunk_tokens=64, budget=24)
    alive, peak = 0, 0

    class Held:
        def __init__(self, x: Tensor) -> None:
            nonlocal alive, peak
            self.x, self.n = x, x.nbytes
            alive += self.n
            peak = max(peak, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= self.n

    most = []
    for granularity in ("chunk", "layer"):
        alive, peak = 0, 0
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.x):
            gradients(model, Gradient("all", granularity=granularity), spec)
        most.append(peak)
    assert most[1] < 0.7 * most[0]  # of three layers, the last of which makes keys and values alone


def test_a_map_without_result() -> None:
    linear, x = nn.Linear(3, 5).requires_grad_(False), torch.randn(2, 4, 3, requires_grad=True)
    weight = torch.randn(2, 4, 5)
    with without_result(linear):
        out = linear(x)
        assert out.shape == (2, 4, 5) and type(out.grad_fn).__name__ == "_NoResultBackward"
        (found,) = torch.autograd.grad((out * weight).sum(), x)
    assert torch.equal(linear(x), nn.functional.linear(x, linear.weight, linear.bias))
    (wanted,) = torch.autograd.grad((linear(x) * weight).sum(), x)
    torch.testing.assert_close(found, wanted)
    linear.weight.requires_grad_()
    with without_result(linear):
        torch.testing.assert_close(linear(x), nn.functional.linear(x, linear.weight, linear.bias))  # is trained


def test_a_packed_map_with_an_adapter_runs_as_usual() -> None:
    """peft hands the weight of its base through, packed or not."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(3, 5).requires_grad_(False)
            self.base_layer.weight.quant_state = object()  # type: ignore[assignment]

        @property
        def weight(self) -> Tensor:
            return self.base_layer.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x)

    part = Adapted()
    with without_result(part):
        assert "forward" not in vars(part)
    with without_result(part.base_layer):
        assert "forward" in vars(part.base_layer)
    assert "forward" not in vars(part.base_layer)


def test_a_granularity_that_is_none() -> None:
    with pytest.raises(UserError, match="granularity"):
        Gradient("all", granularity="block")
