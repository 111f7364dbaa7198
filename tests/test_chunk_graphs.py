"""Recorded chunks give what chunks run launch by launch give, and are used where they may be."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import ToyModel, toy_question, toy_stream

from omnimem_train import chunk_graphs
from omnimem_train.beside import Beside
from omnimem_train.captured import Captured, Recordings, Shared, copy_all
from omnimem_train.chunk_graphs import ChunkGraphs
from omnimem_train.gradient import Gradient
from omnimem_train.memory.spec import MemorySpec
from omnimem_train.memory.state import TEXT
from omnimem_train.models.interface import TokenBlock
from omnimem_train.snapshots import FirstPass
from omnimem_train.streaming import Stream, StreamState

SPEC = MemorySpec(selector="perturbation", budget=9, chunk_tokens=7)
ALL = Gradient("all")


def tensors(state: StreamState) -> list[Tensor]:
    return [t for memory in state.layers for t in memory.tensors() if t is not None]


def loss_of(model: ToyModel, media: TokenBlock, gradient: Gradient, spec: MemorySpec) -> tuple[Tensor, StreamState]:
    stream = Stream(model, spec, gradient, media.n)
    state = stream.start()
    early = stream.feed(state, media[:40])
    state = stream.flush(stream.feed(early, media[40:]))
    asked = [stream.ask(s, [toy_question(4, 60 + i, seed=i)]) for i, s in enumerate((early, state))]
    return torch.stack([model.logits(h).log_softmax(-1)[..., 3].sum() for h in asked]).sum(), state


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes every use of a recording."""
    used: list[str] = []
    call = Captured.__call__

    def noted(self: Captured, inputs: list[Tensor | None]) -> list[Tensor | None]:
        used.append("second" if "back" in self._function.__qualname__ else "first")
        return call(self, inputs)

    monkeypatch.setattr(Captured, "__call__", noted)
    return used


@pytest.mark.parametrize("selector", ["perturbation", "omnimem", "sliding_window", "snapkv", "observed_attention"])
@pytest.mark.parametrize("positions", ["absolute", "compact"])
def test_prefill(selector: str, positions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, media, found = replace(SPEC, selector=selector, positions=positions), toy_stream(120), []
    used = counted(monkeypatch)
    for graphs in (False, True):
        model = ToyModel()
        model.graphs = graphs
        stream = Stream(model, spec)
        found.append(stream.flush(stream.feed(stream.start(), media)))
    assert used.count("first") >= 8, "chunks were not recorded"
    for plain, recorded in zip(*(tensors(s) for s in found), strict=True):
        assert torch.equal(plain, recorded)


def test_text_that_comes_late_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk with a text token among its candidates has the shapes of one without, and keeps one token more."""
    used, media, found = counted(monkeypatch), toy_stream(120), []
    modality = media.modality.clone()
    modality[:, [75, 97]] = TEXT
    media = replace(media, modality=modality)
    for graphs in (False, True):
        model = ToyModel()
        model.graphs = graphs
        stream = Stream(model, SPEC)
        found.append(stream.flush(stream.feed(stream.start(), media)))
    assert used.count("first") > 2
    assert found[1].layers[0].n_tokens == SPEC.budget + 4
    for plain, recorded in zip(*(tensors(s) for s in found), strict=True):
        assert torch.equal(plain, recorded)


@pytest.mark.parametrize("gradient", [ALL, Gradient("last", chunks=6), Gradient("stop_layer", layer=1)], ids=str)
@pytest.mark.parametrize("positions", ["absolute", "compact"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("granularity", ["chunk", "layer"])
def test_step(
    granularity: str, gradient: Gradient, positions: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps, with other weights in the second: recordings read weights where they are. Both passes of a chunk, and
    a run without recordings, drop the same numbers. (Not recorded: dropout where second passes go layer by layer.)"""
    used, found = counted(monkeypatch), []
    for graphs in (False, True):
        gradient = replace(gradient, granularity=granularity if graphs else "chunk")
        model, losses = ToyModel(), []
        model.graphs = graphs
        for layer in model.module.layers:
            layer.mlp.append(nn.Dropout(dropout))
        weights = list(model.module.parameters())
        torch.manual_seed(0)
        for seed in (0, 1):
            loss, _ = loss_of(model, toy_stream(120, seed=seed), gradient, replace(SPEC, positions=positions))
            loss.backward()
            losses.append(loss.detach())
            with torch.no_grad():
                for p in weights:
                    if p.grad is not None:
                        p -= 0.01 * p.grad
        found.append([*losses, *[p.detach() for p in weights], *[p.grad for p in weights if p.grad is not None]])
    if dropout and granularity == "layer":
        assert "second" not in used
    else:
        assert used.count("first") > 12
        assert used.count("second") >= (7 if gradient.kind == "last" else 20)  # of 12, of 34
    for plain, recorded in zip(*found, strict=True):
        torch.testing.assert_close(recorded, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("granularity", ["chunk", "layer"])
def test_recordings_hold_on_to_no_chunk(granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, used = [], counted(monkeypatch)
    begin = FirstPass.__init__

    def noted(self: FirstPass, *a: Any, **k: Any) -> None:
        begin(self, *a, **k)
        made.append(weakref.ref(self))

    monkeypatch.setattr(FirstPass, "__init__", noted)
    model = ToyModel()
    model.graphs = True
    loss_of(model, toy_stream(120), Gradient("all", granularity=granularity), SPEC)[0].backward()
    gc.collect()
    assert "second" in used and made and not any(ref() for ref in made)


def test_states_stay_as_they_are() -> None:
    """A state of earlier is not overwritten by later chunks."""
    model, media = ToyModel(), toy_stream(150)
    model.graphs = True
    stream = Stream(model, SPEC)
    state = stream.feed(stream.start(), media[:70])
    before = [t.clone() for t in tensors(state)]
    later = stream.feed(state, media[70:])
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(state), strict=True))
    again = stream.feed(state, media[70:])
    assert all(torch.equal(a, b) for a, b in zip(tensors(later), tensors(again), strict=True))


@pytest.mark.parametrize("selector", ["random", "infinipot_v", "critical_kv"])
def test_left_alone(selector: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules that draw, wait for the host or read the output projection are run as usual."""
    used = counted(monkeypatch)
    model = ToyModel()
    model.graphs = True
    loss_of(model, toy_stream(120), ALL, replace(SPEC, selector=selector))
    assert "first" not in used


def test_failure_is_said_and_run_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    model = ToyModel()
    plain, _ = loss_of(model, toy_stream(120), ALL, SPEC)
    monkeypatch.setattr("omnimem_train.captured.Captured.__init__", broken)
    model.graphs = True
    with pytest.warns(UserWarning, match="not permitted") as noted:
        found, _ = loss_of(model, toy_stream(120), ALL, SPEC)
    assert torch.equal(found, plain)
    assert len([w for w in noted if "launch by launch" in str(w.message)]) == 1


def double(inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else 2 * x for x in inputs]


def test_recordings_are_few_and_rest_before_they_go() -> None:
    held, x = Recordings(most=1, seen_first=1, rest=3), [torch.ones(2), None]
    assert held.get("a", double, x) is None  # met once
    a = held.get("a", double, x)
    assert a is not None
    assert held.get("b", double, x) is None
    assert held.get("b", double, x) is None, "a has not rested"
    assert held.get("a", double, x) is a
    for _ in range(3):
        assert held.get("c", double, x) is None
    assert held.get("c", double, x) is not None, "a has rested"
    result = a([torch.full((2,), 3.0), None])
    assert torch.equal(result[0], torch.full((2,), 6.0))  # type: ignore[arg-type]
    assert result[1] is None


def test_more_in_turn_than_are_held_stop_being_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that push each other out would be recorded for ever and never replayed."""
    made, begin = list[int](), Captured.__init__
    monkeypatch.setattr(Captured, "__init__", lambda self, *a: (made.append(1), begin(self, *a))[1])
    held = Recordings(most=2, rest=4)
    for _ in range(200):
        for key in range(8):
            held.get(key, double, [torch.ones(1)])
    assert len(made) < 20
    made.clear()
    useful = Recordings(most=1, rest=4)
    for budget in range(20):  # a new budget in every step, of use as long as the step lasts
        for _ in range(30):
            useful.get(budget, double, [torch.ones(1)])
    assert len(made) == 20


def test_recordings_share_their_places() -> None:
    """A recording takes nothing more than a larger one before it; results outlive the next call."""
    shared = Shared()
    small, large = [torch.ones(2), None, torch.ones(3, dtype=torch.int64)], [torch.ones(100), torch.ones(0)]
    a, b = Captured(double, large, shared), Captured(double, small, shared)
    assert shared.inputs.n_bytes == 400 + 8  # the largest takes the largest slot
    found = a([torch.full((100,), 2.0), torch.ones(0)])
    assert b([torch.full((2,), 3.0), None, torch.arange(3)])[2].tolist() == [0, 2, 4]  # type: ignore[union-attr]
    assert torch.equal(found[0], torch.full((100,), 4.0)) and found[1].shape == (0,)  # type: ignore[union-attr, arg-type]


def test_copies_of_many_kinds() -> None:
    sources = [torch.arange(3), torch.rand(2, 2), torch.ones(1, dtype=torch.bool), torch.rand(4)]
    targets = [torch.zeros_like(s) for s in sources]
    copy_all(targets, sources)
    assert all(torch.equal(a, b) for a, b in zip(targets, sources, strict=True))


def test_recordings_go_with_the_model() -> None:
    model = ToyModel()
    model.graphs = True
    Stream(model, SPEC).feed(Stream(model, SPEC).start(), toy_stream(7))
    stream = Stream(model, SPEC)
    stream.flush(stream.feed(stream.start(), toy_stream(120)))
    assert chunk_graphs.recordings_of(model)[0]._held
    gone = weakref.ref(model)
    del model, stream
    gc.collect()
    assert gone() is None


def test_streams_keep_their_own_matrices() -> None:
    """What a recording was made with is not what another stream, on other weights, is given."""
    model, media = ToyModel(), toy_stream(120)
    model.graphs = True
    for _ in range(2):
        stream = Stream(model, SPEC)
        stream.flush(stream.feed(stream.start(), media))
    before = [stream.chooser.gram(i).clone() for i in range(model.n_layers)]
    with torch.no_grad():
        for layer in model.module.layers:
            layer.o.weight.mul_(2)
    other, plain = Stream(model, SPEC), ToyModel()
    plain.module.load_state_dict(model.module.state_dict())
    found = other.flush(other.feed(other.start(), media))
    reference = Stream(plain, SPEC)
    wanted = reference.flush(reference.feed(reference.start(), media))
    assert all(torch.equal(a, b) for a, b in zip(tensors(found), tensors(wanted), strict=True))
    assert all(torch.equal(stream.chooser.gram(i), before[i]) for i in range(model.n_layers))


def test_another_manner_is_noticed() -> None:
    """Dropout and autocast are no inputs of a recording, so they are part of its key."""
    model = ToyModel()
    model.module.layers[0].mlp.append(nn.Dropout(0.1))
    dropout, settings = model.module.layers[0].mlp[-1], set()
    for change in (lambda: None, lambda: setattr(dropout, "p", 0.5), dropout.eval, model.module.eval):
        change()
        settings.add(ChunkGraphs(Stream(model, SPEC).passes)._setting)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        settings.add(ChunkGraphs(Stream(model, SPEC).passes)._setting)
    assert len(settings) == 5


def test_one_failure_ends_recording_in_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ToyModel()
    model.graphs = True
    loss_of(model, toy_stream(120), ALL, SPEC)[0].backward()
    first, second = chunk_graphs.recordings_of(model)
    assert first._held and second._held
    monkeypatch.setattr(Captured, "__init__", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="division by zero"):
        loss_of(model, toy_stream(120), ALL, replace(SPEC, budget=8))[0].backward()
    assert not first._held and not second._held


def test_moved_weights_are_noticed() -> None:
    model = ToyModel()
    before = chunk_graphs._standing(model)
    assert chunk_graphs._standing(model) == before
    weight = model.module.layers[0].q.weight
    weight.data = weight.data.clone()
    assert chunk_graphs._standing(model) != before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("attention", "positions", "dropout", "granularity"),
    [("sdpa", "absolute", 0.0, "chunk"), ("split", "absolute", 0.0, "chunk"), ("sdpa", "compact", 0.0, "chunk"),
     ("split", "absolute", 0.2, "chunk"), ("split", "compact", 0.2, "chunk"), ("split", "absolute", 0.0, "layer"),
     ("sdpa", "compact", 0.0, "layer"), ("split", "absolute", 0.2, "layer")],
)  # fmt: skip
@pytest.mark.parametrize("offload", ["none", "host"])
def test_on_a_gpu(
    nano_folder: Path, attention: str, positions: str, dropout: float, granularity: str, offload: str
) -> None:
    """Recorded launches of a stock decoder: same memories, losses and gradients, over steps with other weights."""
    from omnimem_train.models.loading import load_model
    from omnimem_train.models.lora import LoraSettings, add_lora, lora_parameters

    found = []
    for graphs in (False, True):
        gradient = Gradient("all", granularity=granularity, offload=offload) if graphs else ALL
        torch.manual_seed(0)
        model = load_model(nano_folder, dtype="bfloat16", device="cuda", attention=attention, graphs=graphs)
        add_lora(model, LoraSettings(r=4, dropout=dropout))
        model.module.train()
        weights = [p for _, p in lora_parameters(model)]
        for p in weights:
            torch.nn.init.normal_(p, std=0.05)
        optimizer, kept = torch.optim.SGD(weights, lr=0.1), []
        for seed in (0, 1):
            generator = torch.Generator().manual_seed(seed)
            media = toy_stream(640, dtype=torch.bfloat16)
            embeds = torch.randn(1, 640, model.hidden_size, generator=generator)
            media = TokenBlock(*[x.cuda() for x in (embeds.bfloat16(), media.positions, media.modality, media.time_s)])
            stream = Stream(model, MemorySpec(budget=64, chunk_tokens=32, positions=positions), gradient, media.n)
            state = stream.flush(stream.feed(stream.start(), media))
            hidden = stream.ask(state, [media[:5]])
            loss = model.logits(hidden).float().log_softmax(-1)[..., 3].mean()
            loss.backward()
            kept += [loss.detach(), *tensors(state), *[p.grad.clone() for p in weights if p.grad is not None]]
            optimizer.step()
            optimizer.zero_grad()
        found.append(kept)
        if graphs and not (dropout and granularity == "layer"):
            assert all(r._held and not r.shared.failed for r in chunk_graphs.recordings_of(model))
    for plain, recorded in zip(*found, strict=True):
        torch.testing.assert_close(recorded, plain, rtol=0.02, atol=1e-3)


class Told:
    """Stands in for a stream; all of them write what they are told into one list."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.recorded = name, log, 0

    def wait_stream(self, other: Told) -> None:
        self.log.append(f"{self.name} waits for all of {other.name}")

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        self.recorded += 1
        self.log.append(f"{self.name} has {self.recorded}")
        return f"{self.name} {self.recorded}"


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> tuple[Told, Told, list[str]]:
    """The current stream, a second one, and what they are told."""
    log: list[str] = []
    main, side = Told("main", log), Told("side", log)
    current = [main]

    @contextmanager
    def within(stream: Told) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", within)
    return main, side, log


def test_work_beside_is_in_order_and_holds_what_it_reads(streams: tuple[Told, Told, list[str]]) -> None:
    _, side, log = streams
    read = [torch.ones(3) * i for i in range(4)]
    refs = [weakref.ref(x) for x in read]

    def add(x: Tensor) -> Tensor:
        log.append(f"{torch.cuda.current_stream().name} adds")  # type: ignore[attr-defined]
        return x + 1

    with Beside(side, behind=2) as beside:  # type: ignore[arg-type]
        found = [beside.do(partial(add, read.pop(0))) for _ in range(4)]
        gc.collect()
        assert [ref() is None for ref in refs] == [True, True, False, False]
    gc.collect()
    assert not any(ref() for ref in refs)
    assert [float(x[0]) for x in found] == [1, 2, 3, 4]
    piece = ["side waits for all of main", "side adds"]
    assert log == [
        *piece, "side has 1", *piece, "side has 2", *piece, "side has 3", "main waits for side 1",
        *piece, "side has 4", "main waits for side 2", "main waits for all of side",
    ]  # fmt: skip


def test_branches_are_joined_after_an_error(streams: tuple[Told, Told, list[str]]) -> None:
    """A recording could not end otherwise; where none began there is nothing to join."""
    _, side, log = streams

    def fail(begun: bool) -> None:
        with Beside(side) as beside:  # type: ignore[arg-type]
            if begun:
                beside.do(lambda: 1)
            raise ZeroDivisionError

    for begun in (False, True):
        log.clear()
        with pytest.raises(ZeroDivisionError):
            fail(begun)
        assert log[-1:] == (["main waits for all of side"] if begun else [])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("selector", ["perturbation", "observed_attention", "omnimem"])
def test_a_branch_that_lags_changes_nothing(selector: str, nano_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer chooses is late by milliseconds; whatever it reads is still there, and nobody reads it too early."""
    from omnimem_train.models.loading import load_model

    do, found, lags = Beside.do, [], []

    def late(self: Beside, work: Any) -> Any:
        def slowly() -> Any:
            torch.cuda._sleep(10**7)
            lags.append(1)
            return work()

        return do(self, slowly)

    monkeypatch.setattr(Beside, "do", late)
    for branch in (True, False):
        if not branch:
            monkeypatch.setattr(Shared, "beside", None)
        model = load_model(nano_folder, dtype="bfloat16", device="cuda", attention="split", graphs=True)
        media = toy_stream(640, dtype=torch.bfloat16)
        embeds = torch.randn(1, 640, model.hidden_size, generator=torch.Generator().manual_seed(0))
        media = TokenBlock(*[x.cuda() for x in (embeds.bfloat16(), media.positions, media.modality, media.time_s)])
        stream = Stream(model, MemorySpec(selector, budget=64, chunk_tokens=32))
        found.append(tensors(stream.flush(stream.feed(stream.start(), media))))
    assert lags
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
