"""The order in which sharded weights are gathered, and that a layer runs and is differentiated with whole weights."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from omnimem_train import sharding
from omnimem_train.engines import check_deepspeed, check_saved
from omnimem_train.errors import UserError
from omnimem_train.gradient import Gradient
from omnimem_train.losses import LossConfig
from omnimem_train.memory.spec import MemorySpec
from omnimem_train.models.importance import add_importance_head, trained_parameters
from omnimem_train.models.interface import StreamingModel
from omnimem_train.models.loading import load_model
from omnimem_train.models.lora import LoraSettings, add_lora, disable_adapter
from omnimem_train.run_config import TrainConfig
from omnimem_train.sharding import Rota, Shard, Shelf, frozen
from omnimem_train.step import StreamingStep
from scripts.bench.unequal import UnequalSource


class Group:
    """Stands in for a process group: `size` threads that exchange one number at a time."""

    def __init__(self, size: int) -> None:
        self.barrier, self.lock, self.told = threading.Barrier(size, timeout=20), threading.Lock(), list[int]()

    def largest(self, told: Tensor) -> None:
        with self.lock:
            self.told.append(int(told))
        self.barrier.wait()
        told.fill_(max(self.told))
        if self.barrier.wait() == 0:
            self.told.clear()
        self.barrier.wait()


@pytest.fixture(autouse=True)
def threads_instead_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding.dist, "all_reduce", lambda told, op, group: group.largest(told))


class Noted(Shard):
    """Notes in `events` what is asked of it, and that it makes sense."""

    def __init__(self, layer: int, events: list[tuple[str, int]]) -> None:
        self.layer, self.events, self.whole, self.begun = layer, events, False, False

    def start(self) -> None:
        assert not self.whole and not self.begun
        self.begun = True
        self.events.append(("collective", self.layer))

    def gather(self) -> None:
        assert not self.whole
        if not self.begun:
            self.start()
        self.whole, self.begun = True, False

    def release(self) -> None:
        assert self.whole
        self.whole = False


class Stepper(nn.Module):
    """Runs `passes` upwards when called, and in `backward` those of `back`: the layers each differentiates."""

    def __init__(self, rota: Rota, layers: int, passes: int, back: list[list[int]]) -> None:
        super().__init__()
        self.rota, self.layers, self.passes, self.back = rota, layers, passes, back

    def forward(self) -> None:
        for _ in range(self.passes):
            for layer in range(self.layers):
                self.rota.before(layer)
                assert self.rota.shards[layer].whole  # type: ignore[attr-defined]

    def backward(self) -> None:
        for layers in self.back:
            for layer in range(self.layers):
                self.rota.before(layer)
            for layer in sorted(layers, reverse=True):
                self.rota.before_backward(layer)
                assert self.rota.shards[layer].whole  # type: ignore[attr-defined]


def member(group: Group, layers: int, passes: int, back: list[list[int]]) -> tuple[Stepper, nn.Parameter, list[Any]]:
    events = list[tuple[str, int]]()
    rota = Rota([Noted(i, events) for i in range(layers)], group, torch.device("cpu"))  # type: ignore[arg-type]
    step, weight = Stepper(rota, layers, passes, back), nn.Parameter(torch.ones(1))
    rota.attach(step, [weight])
    return step, weight, events


@pytest.mark.parametrize("seed", range(6))
def test_unequal_members_gather_the_same(seed: int) -> None:
    """Whatever each runs, the collectives of a step are the same, and nobody waits for ever."""
    draw, n_layers, size = random.Random(seed), 1 + seed % 4, 2 + seed % 2
    group = Group(size)
    members, ends = [], list[int]()
    for _ in range(size):
        back = [draw.sample(range(n_layers), draw.randint(0, n_layers)) for _ in range(draw.randint(1, 5))]
        members.append(member(group, n_layers, draw.randint(1, 6), back))

    def run(step: Stepper, weight: nn.Parameter) -> None:
        for _ in range(2):
            step()
            step.backward()
            (2 * weight).sum().backward()  # its hook ends the phase
        ends.append(1)

    threads = [threading.Thread(target=run, args=m[:2], daemon=True) for m in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(ends) == size, "somebody waits for ever, or failed"
    assert all(events == members[0][2] for _, _, events in members)
    assert len(members[0][2]) >= n_layers
    assert not any(shard.whole for step, _, _ in members for shard in step.rota.shards)  # type: ignore[attr-defined]
    empty = [step.rota.read() for step, _, _ in members]
    assert len({total for _, total in empty}) == 1
    assert min(share for share, _ in empty) < 1


def test_alone_the_order_is_up_then_up_and_down() -> None:
    step, weight, events = member(Group(1), 3, 2, [[2], [0, 1, 2]])
    step()
    assert [layer for _, layer in events] == [0, 1, 2, 0, 1, 2]
    step.backward()
    weight.sum().backward()
    # layer 2 at the turn and layer 0 from one pass to the next are whole already
    assert [layer for _, layer in events[6:]] == [0, 1, 2, 1, 0, 1, 2, 1, 0]
    assert step.rota.read() == (0, 4)


def test_outside_of_a_step_nothing_is_gathered() -> None:
    step, _, _ = member(Group(1), 3, 1, [])
    with pytest.raises(RuntimeError, match="outside of a training step"):
        step.rota.before(0)
    step()
    with pytest.raises(RuntimeError, match="before the backward pass of the one before"):
        step()
    step, _, _ = member(Group(1), 3, 1, [])
    with pytest.raises(RuntimeError, match="outside of the backward pass"):
        step.rota.before_backward(0)


# A real model ---------------------------------------------------------------------------------------------------------


class Poisoned(Shard):
    """The weights of a layer are NaN unless they are gathered."""

    def __init__(self, layer: nn.Module) -> None:
        self.weights = [weight for _, _, weight in frozen(layer)]
        self.values = [weight.detach().clone() for weight in self.weights]
        self.release()

    def start(self) -> None:
        """Nothing to do."""

    def gather(self) -> None:
        for weight, value in zip(self.weights, self.values, strict=True):
            weight.data.copy_(value)

    def release(self) -> None:
        for weight in self.weights:
            weight.data.fill_(float("nan"))


LEARNED = {"selector": "omnimem", "selector_options": {"importance": "learned", "lam": 0.3}}
WAYS: dict[str, tuple[dict[str, Any], LossConfig, Gradient]] = {
    "all": ({}, LossConfig(), Gradient("all")),
    "last": ({}, LossConfig(), Gradient("last", chunks=2)),
    "stop_layer": ({}, LossConfig(), Gradient("stop_layer", layer=1)),
    "stop_at_2": ({}, LossConfig(), Gradient("stop_layer", layer=2)),
    "stop_at_once": ({}, LossConfig(), Gradient("stop_layer", layer=0)),
    "by_layer": ({}, LossConfig(), Gradient("all", granularity="layer")),
    "by_layer_stop": ({}, LossConfig(), Gradient("stop_layer", layer=2, granularity="layer")),
    "by_layer_last": ({}, LossConfig(), Gradient("last", chunks=2, granularity="layer")),
    "distill": ({}, LossConfig(distill=0.5), Gradient("all")),
    "omnimem": ({"selector": "omnimem", "allocation": "avba"}, LossConfig(), Gradient("all")),
    "full": ({"budget": None}, LossConfig(), Gradient("all")),
    "retention": (LEARNED, LossConfig(retention=1.0), Gradient("last", chunks=2)),
}


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("way", WAYS)
def test_layers_run_with_whole_weights(way: str, number: int, nano_folder: Path) -> None:
    """Sample 0 is short, with sound, asked in its middle; 1 is long, without sound."""
    memory, loss, gradient = WAYS[way]
    spec = MemorySpec(**({"selector": "perturbation", "budget": 24, "chunk_tokens": 48} | memory))
    found = []
    for poison in (False, True):
        torch.manual_seed(0)
        model = load_model(nano_folder, device="cpu")
        add_lora(model, LoraSettings(r=4))
        if loss.retention:
            add_importance_head(model)
        stir(model)
        encoded = UnequalSource(model, 12.0).sample(number)
        step = StreamingStep(model, loss, partial(disable_adapter, model))
        weights = [p for p in model.module.parameters() if p.requires_grad]
        if poison:
            layers = model.module.get_submodule(model.language_prefix().rstrip("."))
            rota = Rota([Poisoned(x) for x in layers.children()], Group(1), model.device)  # type: ignore[arg-type]
            rota.attach(step, weights)
            model.gathering = rota
        result = step(encoded, spec, gradient)
        result.loss.backward()
        found.append([result.loss.detach(), *(w.grad for w in weights if w.grad is not None)])
    plain, sharded = found
    assert len(plain) == len(sharded) > 1
    for a, b in zip(plain, sharded, strict=True):
        assert torch.equal(a, b)
    share, passes = rota.read()
    assert share == 0
    assert passes > 2


@torch.no_grad()
def stir(model: StreamingModel) -> None:
    """An adapter whose output is not zero."""
    for _, weight in trained_parameters(model):
        weight += 0.05 * torch.randn_like(weight)


def test_a_shelf_keeps_the_layer_whole(nano: StreamingModel) -> None:
    add_lora(nano, LoraSettings(r=4))
    layer = next(nano.module.get_submodule(nano.language_prefix().rstrip(".")).children())
    before = {name: weight for name, weight in layer.named_parameters() if not weight.requires_grad}
    shelf = Shelf(layer)
    assert {id(w) for w in shelf.weights()} == {id(w) for w in before.values()}
    new = [nn.Parameter(w + 1, requires_grad=False) for w in shelf.weights()]
    shelf.put_back(new)
    for name, weight in layer.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(weight, before[name] + 1)


# Files and settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x.pop("q.lora_B.default.weight"), "q.lora_B.default.weight is absent"),
        (lambda x: x.update({"q.lora_A.default.weight": torch.empty(0)}), r"has shape \[0\] instead of \[2, 3\]"),
        (lambda x: x.update({"k.lora_A.default.weight": torch.ones(1)}), "no weight of this run"),
        (lambda x: x["q.lora_B.default.weight"].add_(1), "differs from the weight in the run"),
    ],
)
def test_an_incomplete_adapter_is_not_called_saved(
    spoil: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path
) -> None:
    live = {"q.lora_A.default.weight": torch.ones(2, 3), "q.lora_B.default.weight": torch.zeros(3, 2)}
    shapes = {name: tuple(x.shape) for name, x in live.items()}
    path = tmp_path / "adapter.safetensors"
    save_file(live, path)
    check_saved(path, live, shapes)
    saved = {name: x.clone() for name, x in live.items()}
    spoil(saved)
    save_file(saved, path)
    with pytest.raises(UserError, match=message):
        check_saved(path, live, shapes)
    live["q.lora_A.default.weight"].zero_()
    save_file(live, path)
    with pytest.raises(UserError, match="is all zero"):
        check_saved(path, live, shapes)


def test_what_deepspeed_would_not_do_is_refused() -> None:
    check_deepspeed({"zero_optimization": {"stage": 3}}, TrainConfig())
    check_deepspeed({"zero_optimization": {"stage": 2}}, TrainConfig(sharding="fsdp"))
    with pytest.raises(UserError, match="both shard"):
        check_deepspeed({"zero_optimization": {"stage": 3}}, TrainConfig(sharding="fsdp"))
    with pytest.raises(UserError, match="offload_param"):
        check_deepspeed({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, TrainConfig())
    with pytest.raises(UserError, match="did you mean 'fsdp'"):
        TrainConfig(sharding="fdsp")
