"""Memories for the backward pass: older ones come back from newer ones, bit for bit, and gradients stay as they are."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from toy import ToyModel, toy_question, toy_stream

from omnimem_train.gradient import Gradient
from omnimem_train.memory.spec import MemorySpec
from omnimem_train.memory.state import LayerMemory
from omnimem_train.models.interface import TokenBlock
from omnimem_train.snapshots import Snapshot, Undo, others
from omnimem_train.streaming import Stream, StreamState

BUDGETED = MemorySpec(selector="perturbation", budget=9, chunk_tokens=7)


def test_others() -> None:
    rows = torch.tensor([[[0, 3, 4], [1, 2, 5]]])
    assert others(rows, 6).tolist() == [[[1, 2, 5], [0, 3, 4]]]
    assert others(rows, 6).dtype == torch.int64
    assert others(torch.arange(4)[None, None], 4).shape == (1, 1, 0)


def states(stream: Stream, media: TokenBlock) -> list[StreamState]:
    """After each chunk."""
    found, size = [stream.start(media.embeds.shape[0])], stream.spec.chunk_tokens
    for start in range(0, media.n, size):
        found.append(stream.flush(stream.feed(found[-1], media[start : start + size])))
    return found


def same(found: tuple[LayerMemory, ...], wanted: tuple[LayerMemory, ...]) -> bool:
    return all(
        torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values) for a, b in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("budget", [1, 9, 20, 1000, (4, [1, 9], 12)])
@pytest.mark.parametrize("batch", [1, 2])
def test_older_memories_come_back(budget: int | tuple[int, list[int], int], batch: int) -> None:
    spec = BUDGETED.replace(layer_table=budget) if isinstance(budget, tuple) else BUDGETED.replace(budget=budget)
    media = TokenBlock.stack([toy_stream(45, seed=s) for s in range(batch)])
    found = states(Stream(ToyModel(), spec, Gradient("all"), media.n), media)
    pasts = [(s.past, s.layers) for s in found[1:]]
    held = [past is not None and past._held is not None for past, _ in pasts]
    assert held == [False] * (len(pasts) - 1) + [True], "only the newest is held in full"
    for past, layers in reversed(pasts):
        assert past is not None
        back = past.restore()
        assert same(back, layers)
        assert all(m.keys.requires_grad and m.keys.is_leaf and m.values.requires_grad for m in back)


def test_order_does_not_matter() -> None:
    media = toy_stream(45)
    found = states(Stream(ToyModel(), BUDGETED, Gradient("all"), media.n), media)
    for i in (2, 5, 4, 1, 3, 5, 2):
        past = found[i].past
        assert past is not None and same(past.restore(), found[i].layers)


def test_what_moves_or_is_read_by_selectors_is_held_in_full() -> None:
    media = toy_stream(45)
    for spec in (BUDGETED.replace(positions="compact"), BUDGETED.replace(selector="omnimem")):
        found = states(Stream(ToyModel(), spec, Gradient("all"), media.n), media)
        assert all(s.past is not None and s.past._held is not None for s in found[1:])


def test_an_unlimited_memory_is_followed_back_with_compact_positions_too() -> None:
    """Nothing leaves it, so nothing moves: each snapshot is the start of the next."""
    media, spec = toy_stream(45), BUDGETED.replace(positions="compact", budget=None)
    found = states(Stream(ToyModel(), spec, Gradient("all"), media.n), media)
    assert all(s.past is not None and s.past._held is None for s in found[1:-1])
    for s in reversed(found[1:]):
        assert s.past is not None and same(s.past.restore(), s.layers)
    plain = grads_with_questions(Gradient("all", checkpointing=False), spec)
    for a, b in zip(grads_with_questions(Gradient("all"), spec), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_chunks_without_gradient_leave_nothing() -> None:
    media = toy_stream(45)
    found = states(Stream(ToyModel(), BUDGETED, Gradient("last", chunks=2), media.n), media)
    assert [s.past is not None for s in found] == [False] * 6 + [True] * 2
    plain = states(Stream(ToyModel(), BUDGETED, Gradient("all", checkpointing=False), media.n), media)
    assert all(s.past is None for s in plain)


def grads_with_questions(gradient: Gradient, spec: MemorySpec = BUDGETED) -> list[Tensor]:
    """Gradients of weights and embeddings for questions asked in the middle of a stream, on branches of it, and at its
    end."""
    model, media = ToyModel(), toy_stream(45)
    media.embeds.requires_grad_()
    stream = Stream(model, spec, gradient, media.n)
    state, losses, start = stream.start(), [], 0
    for end in (16, 21, 31, 45):  # in the middle of a chunk, between two, in the middle
        state = stream.feed(state, media[start:end])
        if end == media.n:
            state = stream.flush(state)
        hidden = stream.ask(stream.caught_up(state), [toy_question(4, 60, seed=q) for q in range(2)])
        losses.append(model.logits(hidden).log_softmax(-1)[..., 3].sum())
        start = end
    del state, hidden
    gc.collect()
    torch.stack(losses).sum().backward()
    assert media.embeds.grad is not None
    return [p.grad for p in model.module.parameters() if p.grad is not None] + [media.embeds.grad]


@pytest.mark.parametrize("positions", ["absolute", "compact"])
@pytest.mark.parametrize(
    "gradient", [Gradient("all"), Gradient("last", chunks=3), Gradient("stop_layer", layer=1)], ids=lambda g: g.kind
)
@pytest.mark.parametrize("granularity", ["chunk", "layer"])
def test_gradients_of_questions_at_all_times(granularity: str, gradient: Gradient, positions: str) -> None:
    spec = BUDGETED.replace(positions=positions)
    found = grads_with_questions(replace(gradient, granularity=granularity), spec)
    plain = grads_with_questions(replace(gradient, checkpointing=False), spec)
    assert len(found) == len(plain)
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_gradients_are_bit_equal_to_those_from_full_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    found = grads_with_questions(Gradient("all"))
    monkeypatch.setattr(Stream, "_can_undo", lambda self, layers: False)
    full = grads_with_questions(Gradient("all"))
    assert all(torch.equal(a, b) for a, b in zip(found, full, strict=True))


def test_undo_holds_what_left_the_memory() -> None:
    """Bytes: the dropped keys and values, and two bytes a row."""
    memory = ToyModel()
    media = toy_stream(45)
    found = states(Stream(memory, BUDGETED, Gradient("all"), media.n), media)
    past = found[3].past
    assert isinstance(past, Snapshot)
    assert past._next is not None
    (undo, *_), (kept, *_) = past._next.undo, past._next.rows
    assert isinstance(undo, Undo) and undo.keys is not None and undo.gone is not None and kept is not None
    assert undo.keys.shape == (1, 2, 7, 8) and undo.gone.shape == (1, 2, 7) and kept.shape == (1, 2, 11)
    assert undo.gone.dtype == kept.dtype == torch.int16


def test_rows_of_a_memory_have_gradients() -> None:
    """Put in place; finite differences, first and second order."""
    rows = torch.tensor([[[0, 2], [1, 3]]])
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)

    def kept(x: Tensor) -> Tensor:
        return LayerMemory.bare(x, x * 2).gather(rows).keys ** 2

    assert torch.autograd.gradcheck(kept, (x,)) and torch.autograd.gradgradcheck(kept, (x,))


@pytest.mark.parametrize("graphs", [False, True])
def test_nothing_else_holds_older_memories(graphs: bool) -> None:
    """What a chunk leaves for its second pass must not hold the memory it began with."""
    model, media = ToyModel(), toy_stream(120)
    model.graphs = graphs
    stream = Stream(model, BUDGETED, Gradient("all"), media.n)
    state, seen = stream.start(), list[weakref.ref[LayerMemory]]()
    for start in range(0, media.n, BUDGETED.chunk_tokens):
        state = stream.flush(stream.feed(state, media[start : start + BUDGETED.chunk_tokens]))
        seen += [weakref.ref(memory) for memory in state.layers]
    gc.collect()
    alive = {id(memory()) for memory in seen} - {id(None)}
    assert alive == {id(memory) for memory in state.layers}
