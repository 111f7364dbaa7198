"""A chunk that is run twice: one node of the graph, the same gradients, the same random numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import ToyModel, toy_question, toy_stream

from omnimem_train.gradient import Gradient
from omnimem_train.memory.spec import MemorySpec
from omnimem_train.models.interface import Tap, TokenBlock
from omnimem_train.streaming import Stream, StreamState

SPEC = MemorySpec(selector="perturbation", budget=9, chunk_tokens=7)


class Noisy(ToyModel):
    """With dropout after each layer, and extras added to the output of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.module.add_module("dropout", torch.nn.Dropout(0.3))

    def run_layer(self, layer: int, hidden: Tensor, rope: Any, tap: Tap, extras: Mapping[str, Tensor]) -> Tensor:
        out = super().run_layer(layer, hidden, rope, tap, extras)
        if layer == 0 and "seen" in extras:
            out = out + extras["seen"]
        return self.module.dropout(out)  # type: ignore[operator, no-any-return]


def loss_of(
    model: ToyModel, media: TokenBlock, gradient: Gradient, spec: MemorySpec = SPEC
) -> tuple[Tensor, StreamState]:
    stream = Stream(model, spec, gradient, media.n)
    state = stream.flush(stream.feed(stream.start(), media))
    question = toy_question(4, 60, dtype=model.dtype)
    if media.extras:
        question = replace(question, extras={"seen": torch.zeros_like(question.embeds)})
    hidden = stream.ask(state, [question])
    return model.logits(hidden).float().log_softmax(-1)[..., 3].sum(), state


def weights_of(model: ToyModel) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("selector", ["perturbation", "random", "omnimem"])
@pytest.mark.parametrize("granularity", ["chunk", "layer"])
@pytest.mark.parametrize("gradient", [Gradient("all"), Gradient("last", chunks=2)], ids=lambda g: g.kind)
def test_dropout_and_extras(selector: str, gradient: Gradient, granularity: str) -> None:
    """As without a second pass: what is dropped there is what was dropped in the first."""
    found = []
    for checkpointing in (True, False):
        model, media = Noisy(), toy_stream(45)
        seen = torch.randn(media.embeds.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        media = replace(media, extras={"seen": seen.requires_grad_()})
        media.embeds.requires_grad_()
        torch.manual_seed(3)
        given = replace(gradient, checkpointing=checkpointing, granularity=granularity if checkpointing else "chunk")
        loss, _ = loss_of(model, media, given, SPEC.replace(selector=selector))
        torch.manual_seed(4)  # the random state of the backward pass is its own
        loss.backward()
        after = torch.rand(1)
        torch.manual_seed(4)
        assert torch.equal(after, torch.rand(1)), "and is left as it was"
        assert media.embeds.grad is not None and seen.grad is not None
        found.append(weights_of(model) | {"embeds": media.embeds.grad, "seen": seen.grad, "loss": loss.detach()})
    assert found[0].keys() == found[1].keys()
    for name, wanted in found[1].items():
        torch.testing.assert_close(found[0][name], wanted, rtol=1e-9, atol=1e-12, msg=name)


def test_autocast_of_the_first_pass_holds_for_the_second() -> None:
    """The two differ a fifth of what they would without it."""
    found, window = [], SPEC.replace(selector="sliding_window")
    for checkpointing in (True, False):
        model, media = ToyModel(dtype=torch.float32), toy_stream(45, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = loss_of(model, media, Gradient("all", checkpointing=checkpointing), window)
        loss.backward()
        found.append(weights_of(model))
    for name, wanted in found[1].items():
        assert (found[0][name] - wanted).norm() < 0.006 * wanted.norm(), name


@pytest.mark.parametrize("gradient", [Gradient("all"), Gradient("last", chunks=3)], ids=lambda g: g.kind)
def test_a_weight_is_done_once_a_step(gradient: Gradient) -> None:
    """However many chunks and questions read it: what reduces gradients across processes counts on it."""
    model, media, done = ToyModel(), toy_stream(45), Counter[str]()
    model.module.embed.requires_grad_(False)
    for name, p in model.module.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda _, name=name: done.update([name]))
    loss_of(model, media, gradient)[0].backward()
    assert done == dict.fromkeys((name for name, p in model.module.named_parameters() if p.requires_grad), 1)


def test_frozen_weights_get_nothing() -> None:
    model, media = ToyModel(), toy_stream(45)
    for name, p in model.module.named_parameters():
        p.requires_grad_(".q." in name)
    loss_of(model, media, Gradient("all"))[0].backward()
    assert set(weights_of(model)) == {f"layers.{i}.q.{part}" for i in range(3) for part in ("weight", "bias")}


def nodes(end: Tensor) -> Counter[str]:
    """Names of the nodes of a graph."""
    found, todo, seen = Counter[str](), [end.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found[type(node).__name__] += 1
        todo += [before for before, _ in node.next_functions]
    return found


def test_a_chunk_is_one_node() -> None:
    _, state = loss_of(ToyModel(), toy_stream(45), Gradient("all"))
    found = nodes(state.layers[-1].keys)
    assert found.pop("AccumulateGrad") > 0
    assert found == {"_TwiceBackward": 7}


def test_memory_above_the_stop_layer_has_no_gradient() -> None:
    model, media = ToyModel(), toy_stream(45)
    stream = Stream(model, SPEC, Gradient("stop_layer", layer=1), media.n)
    state = stream.feed(stream.start(), media)
    assert [m.keys.requires_grad for m in state.layers] == [True, False, False]


def test_the_graph_can_be_gone_through_once() -> None:
    loss, _ = loss_of(ToyModel(), toy_stream(45), Gradient("all"))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()
