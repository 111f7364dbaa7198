"""The stream loop on a float64 toy decoder: equalities that hold to rounding, and gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import ToyModel, toy_question, toy_stream

from omnimem_train import choosing
from omnimem_train.choosing import Chooser
from omnimem_train.errors import UserError
from omnimem_train.gradient import Gradient
from omnimem_train.memory.selector import Candidates, choose
from omnimem_train.memory.spec import MemorySpec
from omnimem_train.memory.state import TEXT, VISUAL
from omnimem_train.models.interface import TokenBlock
from omnimem_train.streaming import Stream, StreamState

UNLIMITED = MemorySpec(selector="full", budget=None, chunk_tokens=7)
BUDGETED = MemorySpec(selector="perturbation", budget=9, chunk_tokens=7)


def one_pass(model: ToyModel, block: TokenBlock) -> Tensor:
    """Hidden states of a plain causal pass over everything."""
    return Stream(model, UNLIMITED.replace(chunk_tokens=block.n + 1)).ask(
        Stream(model, UNLIMITED).start(block.embeds.shape[0]), [block]
    )


def pieces(block: TokenBlock, sizes: list[int]) -> list[TokenBlock]:
    parts, start = [], 0
    for size in sizes:
        parts.append(block[start : start + size])
        start += size
    return [*parts, block[start:]]


@pytest.mark.parametrize("chunk", [1, 2, 5, 16, 33, 100])
@pytest.mark.parametrize("positions", ["absolute", "compact"])
def test_unlimited_memory_equals_one_pass(chunk: int, positions: str) -> None:
    model, media, question = ToyModel(), toy_stream(33), toy_question(6, 40)
    expected = one_pass(model, TokenBlock.cat([media, question]))[:, -6:]
    stream = Stream(model, UNLIMITED.replace(chunk_tokens=chunk, positions=positions))
    state = stream.feed_all(stream.start(), pieces(media, [3, 10, 1]))
    torch.testing.assert_close(stream.ask(state, [question]), expected, rtol=0, atol=1e-10)


def test_a_budget_that_never_binds_equals_one_pass() -> None:
    model, media, question = ToyModel(), toy_stream(33), toy_question(6, 40)
    expected = one_pass(model, TokenBlock.cat([media, question]))[:, -6:]
    stream = Stream(model, BUDGETED.replace(budget=31))
    state = stream.feed(stream.start(), media)
    torch.testing.assert_close(stream.ask(state, [question]), expected, rtol=0, atol=1e-10)


def states_between_chunks(stream: Stream, media: TokenBlock) -> list[StreamState]:
    state, states = stream.start(media.embeds.shape[0]), []
    for i in range(media.n):
        before = state.n_chunks
        state = stream.feed(state, media[i : i + 1])
        if state.n_chunks > before:
            states.append(state)
    return [*states, stream.flush(state)]


@pytest.mark.parametrize("budget", [1, 4, 9, 20])
def test_memory_between_chunks_is_exactly_the_budget(budget: int) -> None:
    media = toy_stream(60)
    for state in states_between_chunks(Stream(ToyModel(), BUDGETED.replace(budget=budget)), media):
        for memory in state.layers:
            media_seen = state.n_run - 2
            assert int((memory.modality != TEXT).sum(-1).unique()) == min(budget, media_seen)
            assert int((memory.modality == TEXT).sum(-1).unique()) == min(2, state.n_run)


def test_text_counts_when_the_spec_says_so() -> None:
    spec = BUDGETED.replace(count_text=True, budget=9)
    for state in states_between_chunks(Stream(ToyModel(), spec), toy_stream(60)):
        assert all(m.n_tokens <= 9 for m in state.layers)
    stream = Stream(ToyModel(), spec.replace(budget=2))
    with pytest.raises(UserError, match="below the 2 text tokens"):
        stream.feed(stream.start(), toy_stream(60))


def test_text_is_bounded() -> None:
    stream = Stream(ToyModel(), BUDGETED.replace(max_text_tokens=1))
    with pytest.raises(UserError, match="2 text tokens are pinned"):
        stream.feed(stream.start(), toy_stream(60))


def test_layers_may_have_different_budgets() -> None:
    spec = BUDGETED.replace(layer_table=(5, [2, 6], 11))
    states = states_between_chunks(Stream(ToyModel(), spec), toy_stream(60))
    assert [m.n_tokens - 2 for m in states[-1].layers] == [5, 8, 11]
    assert int((states[-1].layers[1].modality == 2).sum(-1).unique()) == 2


def test_tokens_stay_in_stream_order_and_carry_their_place() -> None:
    media = toy_stream(60)
    for state in states_between_chunks(Stream(ToyModel(), BUDGETED), media):
        for memory in state.layers:
            assert (memory.index.diff(dim=-1) > 0).all()
            index = memory.index[0]
            assert torch.equal(memory.modality[0], media.modality[0][index])
            assert torch.equal(memory.positions[0], media.positions[0][index])
            torch.testing.assert_close(memory.time_s[0], media.time_s[0][index])


def test_asking_leaves_the_state_as_it_was() -> None:
    stream = Stream(ToyModel(), BUDGETED)
    state = stream.feed(stream.start(), toy_stream(40))
    assert state.pending is not None
    before = [t.clone() for m in state.layers for t in m.tensors() if t is not None]
    first = stream.ask(state, [toy_question(5, 50)])
    stream.ask(state, [toy_question(8, 50, seed=1)])
    torch.testing.assert_close(stream.ask(state, [toy_question(5, 50)]), first, rtol=0, atol=0)
    after = [t for m in state.layers for t in m.tensors() if t is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert state.pending.n == 40 % 7


def test_streams_of_a_batch_equal_streams_alone() -> None:
    model, question = ToyModel(), toy_question(4, 50)
    media = [toy_stream(40, seed=s) for s in (1, 2, 3)]
    stream = Stream(model, BUDGETED)
    together = stream.feed(stream.start(3), TokenBlock.stack(media))
    answers = stream.ask(together, [TokenBlock.stack([question] * 3)])
    for i, m in enumerate(media):
        alone = stream.ask(stream.feed(stream.start(), m), [question])
        torch.testing.assert_close(answers[i : i + 1], alone, rtol=0, atol=1e-10)


# Gradients ---------------------------------------------------------------------------------------------------------


def loss_and_grads(
    model: ToyModel, spec: MemorySpec, gradient: Gradient, *, n: int = 33, questions: int = 1
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss of some questions after a stream, gradients of all weights and of the stream's embeddings."""
    model.module.zero_grad()
    media = toy_stream(n)
    media.embeds.requires_grad_()
    stream = Stream(model, spec, gradient, media.n)
    state = stream.flush(stream.feed(stream.start(), media))
    hidden = stream.ask(state, [toy_question(5, 50, seed=q) for q in range(questions)])
    loss = model.logits(hidden).log_softmax(-1)[..., 3].sum()
    loss.backward()
    grads = {k: p.grad.clone() for k, p in model.module.named_parameters() if p.grad is not None}
    assert media.embeds.grad is not None
    return loss.detach(), grads, media.embeds.grad.clone()


GRADIENTS = [Gradient("all"), Gradient("last", chunks=2), Gradient("stop_layer", layer=1)]


@pytest.mark.parametrize("positions", ["absolute", "compact"])
@pytest.mark.parametrize("gradient", GRADIENTS, ids=lambda g: g.kind)
@pytest.mark.parametrize("granularity", ["chunk", "layer"])
def test_checkpointed_gradients_equal_plain_ones(granularity: str, gradient: Gradient, positions: str) -> None:
    from dataclasses import replace

    model, spec = ToyModel(), BUDGETED.replace(positions=positions)
    loss, grads, media = loss_and_grads(model, spec, replace(gradient, granularity=granularity))
    plain_loss, plain, plain_media = loss_and_grads(model, spec, replace(gradient, checkpointing=False))
    torch.testing.assert_close(loss, plain_loss, rtol=0, atol=1e-12)
    assert grads.keys() == plain.keys()
    for name in plain:
        torch.testing.assert_close(grads[name], plain[name], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(media, plain_media, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("given", ["at once", "one by one", "in crumbs", "as an iterator"])
def test_text_is_counted_wherever_it_comes(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text in the middle of a stream is pinned; of blocks that are all there it is counted at once, and the device is
    not asked again."""
    asked: list[int] = []
    monkeypatch.setattr("omnimem_train.streaming.count_text", lambda m: asked.append(1) or int((m == TEXT).sum()))
    media = toy_stream(61)
    modality = media.modality.clone()
    modality[:, [11, 12, 29, 60]] = TEXT
    media = replace(media, modality=modality)
    size = 3 if given == "in crumbs" else 9
    stream, blocks = Stream(ToyModel(), BUDGETED), [media[i : i + size] for i in range(0, 61, size)]
    state = stream.start()
    if given in ("one by one", "in crumbs"):
        for block in blocks:
            state = stream.feed(state, block)
    else:
        state = stream.feed_all(state, blocks if given == "at once" else iter(blocks))
    state = stream.flush(state)
    n_text = int((modality == TEXT).sum())
    assert state.n_text == n_text
    assert all(int((m.modality[0, 0] == TEXT).sum()) == n_text for m in state.layers)
    assert [m.n_tokens for m in state.layers] == [BUDGETED.budget + n_text] * 3
    assert len(asked) == {"at once": 0, "one by one": 0, "in crumbs": 9, "as an iterator": 9}[given]


def test_text_of_a_state_that_was_not_counted() -> None:
    """A stream that drops nothing counts no text; one that goes on from its state does."""
    media = toy_stream(61)
    free = Stream(ToyModel(), BUDGETED.replace(budget=None))
    state = free.feed(free.start(), media[:30])
    assert state.n_text is None
    stream = Stream(ToyModel(), BUDGETED)
    stream.start()
    state = stream.flush(stream.feed(state, media[30:]))
    assert state.n_text == int((media.modality == TEXT).sum()) > 0
    assert {m.n_tokens for m in state.layers} == {BUDGETED.budget + state.n_text}


def test_recomputation_reuses_the_first_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    choose = Chooser.choose
    monkeypatch.setattr(Chooser, "choose", lambda self, *a: calls.append(1) or choose(self, *a))
    loss_and_grads(ToyModel(), BUDGETED, Gradient("all"), n=35)
    assert len(calls) == 3 * 5  # layers x chunks, once each


def test_gradients_equal_finite_differences() -> None:
    """Through compression, for weights used in every chunk; the selection does not move under a small enough step."""
    model, eps = ToyModel(), 1e-6
    _, grads, _ = loss_and_grads(model, BUDGETED, Gradient("all"))
    for name in ("layers.0.k.weight", "layers.1.v.weight", "layers.2.q.weight", "layers.0.mlp.0.weight"):
        weight = model.module.get_parameter(name)
        for at in ((0, 0), (5, 11)):
            with torch.no_grad():
                weight[at] += eps
            up = loss_and_grads(model, BUDGETED, Gradient("all"))[0]
            with torch.no_grad():
                weight[at] -= 2 * eps
            down = loss_and_grads(model, BUDGETED, Gradient("all"))[0]
            with torch.no_grad():
                weight[at] += eps
            assert float((up - down) / (2 * eps)) == pytest.approx(float(grads[name][at]), rel=1e-5, abs=1e-7)


def test_the_first_chunk_gets_gradient_through_what_was_kept() -> None:
    _, _, media = loss_and_grads(ToyModel(), BUDGETED, Gradient("all"))
    assert media[0, :7].abs().sum() > 1e-6


def test_gradient_stops_before_the_last_chunks() -> None:
    _, _, media = loss_and_grads(ToyModel(), BUDGETED, Gradient("last", chunks=2))  # 33 = 4 x 7 + 5
    assert media[0, :21].abs().sum() == 0
    assert media[0, 21:].abs().sum() > 1e-6


def test_stop_layer_cuts_intermediate_chunks_only() -> None:
    model = ToyModel()
    _, _, media = loss_and_grads(model, BUDGETED, Gradient("stop_layer", layer=0), n=33)
    assert media[0, :28].abs().sum() == 0  # intermediate chunks give none at all
    assert media[0, 28:].abs().sum() > 1e-6
    _, below, media = loss_and_grads(model, BUDGETED, Gradient("stop_layer", layer=1), n=33)
    assert media[0, :28].abs().sum() > 1e-6
    _, everything, _ = loss_and_grads(model, BUDGETED, Gradient("all"), n=33)
    top = "layers.2.v.weight"
    assert not torch.allclose(below[top], everything[top])


def test_training_path_equals_inference_path() -> None:
    model, media, question = ToyModel(), toy_stream(33), toy_question(5, 50)
    answers = []
    for gradient in (Gradient("none"), *GRADIENTS):
        stream = Stream(model, BUDGETED, gradient, media.n)
        answers.append(stream.ask(stream.feed(stream.start(), media), [question]).detach())
    assert all(torch.equal(answers[0], a) for a in answers[1:])


def test_questions_together_equal_questions_alone() -> None:
    """Values and gradients: eight questions that share one streamed memory against eight passes."""
    model = ToyModel()
    loss, grads, media = loss_and_grads(model, BUDGETED, Gradient("all"), questions=8)
    total, sums, media_sum = 0.0, {}, torch.zeros_like(media)
    for q in range(8):
        model.module.zero_grad()
        block = toy_stream(33)
        block.embeds.requires_grad_()
        stream = Stream(model, BUDGETED, Gradient("all"), 33)
        hidden = stream.ask(stream.flush(stream.feed(stream.start(), block)), [toy_question(5, 50, seed=q)])
        one = model.logits(hidden).log_softmax(-1)[..., 3].sum()
        one.backward()
        total += float(one.detach())
        media_sum += block.embeds.grad
        for name, p in model.module.named_parameters():
            if p.grad is not None:
                sums[name] = sums.get(name, 0) + p.grad
    assert float(loss) == pytest.approx(total, abs=1e-9)
    torch.testing.assert_close(media, media_sum, rtol=0, atol=1e-6)
    for name in grads:
        torch.testing.assert_close(grads[name], sums[name], rtol=0, atol=1e-6)


def test_compact_positions_stay_close_together() -> None:
    """Absolute positions of a long stream grow without end; compact ones stay near the budget, and the kept keys are
    what the layer would have computed there."""
    spec = BUDGETED.replace(positions="compact")
    model, media = ToyModel(), toy_stream(300)
    stream = Stream(model, spec)
    state = stream.flush(stream.feed(stream.start(), media))
    assert int(media.positions[..., 0].max()) > 90
    for memory in state.layers:
        assert int(memory.positions[..., 0].max()) < 9 + 2 + 7
        assert (memory.positions[..., 0] >= 0).all()
    assert int(state.horizon) < 9 + 2 + 7
    # the first layer's keys do not depend on what was remembered, so they can be recomputed from the embeddings
    memory, layer = state.layers[0], model.module.layers[0]
    plain = layer.k(layer.norm1(media.embeds)).view(1, 300, 2, 8).transpose(1, 2)
    expected = plain.gather(2, memory.index[..., None].expand(-1, -1, -1, 8))
    torch.testing.assert_close(memory.keys, model.rotary().turn(expected, memory.positions), rtol=0, atol=1e-5)


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="stop layer 3"):
        Stream(ToyModel(), BUDGETED, Gradient("stop_layer", layer=3), 10)
    with pytest.raises(UserError, match="4 entries, the model has 3 layers"):
        Stream(ToyModel(), BUDGETED.replace(layer_table=(1, 2, 3, 4)))
    with pytest.raises(UserError, match="unknown gradient kind"):
        Gradient("some")


# What a selector is told ----------------------------------------------------------------------------------------------


def views(monkeypatch: pytest.MonkeyPatch, spec: MemorySpec) -> list[tuple[Candidates, Tensor]]:
    """Every view a selector got while a stream of 33 tokens ran, with the rows that were chosen."""
    seen = []

    def spy(c: Candidates, *rest: Any) -> Any:
        rows, scored = choose(c, *rest)
        seen.append((c, rows))
        return rows, scored

    monkeypatch.setattr(choosing, "choose", spy)
    stream = Stream(ToyModel(), spec)
    stream.flush(stream.feed(stream.start(), toy_stream(33)))
    return seen


@pytest.mark.parametrize(
    ("selector", "options"),
    [("perturbation", {}), ("perturbation", {"n_probes": 3}), ("omnimem", {}), ("snapkv", {"window_size": 4})],
)
def test_what_a_selector_sees_is_what_the_layer_computed(
    monkeypatch: pytest.MonkeyPatch, selector: str, options: dict[str, int]
) -> None:
    """Its attention, times the values, through its output matrix, is the attention output of the layer."""
    outputs: list[Tensor] = []
    forward = torch.nn.Linear.forward

    def record(self: torch.nn.Linear, x: Tensor) -> Tensor:
        out = forward(self, x)
        if self.bias is None and self.in_features == 32:  # the output projection of a toy layer
            outputs.append(out)
        return out

    monkeypatch.setattr(torch.nn.Linear, "forward", record)
    spec = BUDGETED.replace(selector=selector, selector_options=options)
    count = len(views(monkeypatch, spec))
    assert count == len(outputs) == 3 * 5
    outputs.clear()
    for (c, _), out in zip(views(monkeypatch, spec), outputs, strict=True):
        weight = ToyModel().output_weight(c.layer)
        if c.output_weight is not None:
            assert torch.equal(c.output_weight, weight)
        attention = torch.cat([p for p, _ in c.attention_blocks()], -2)  # (B, G, H/G, P, S)
        heads = attention @ c.tokens.values[:, :, None]
        b, g, group, p, d = heads.shape
        mixed = heads.permute(0, 3, 1, 2, 4).reshape(b, p, g * group * d) @ weight.T
        rows = c.query_rows - c.n_memory
        assert (rows >= 0).all() and len(rows) <= min(options.values(), default=c.n)
        torch.testing.assert_close(mixed, out[:, rows], rtol=0, atol=1e-10)


def test_random_choices_differ_by_chunk_and_layer_and_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = BUDGETED.replace(selector="random", chunk_tokens=11)
    seeds = [c.seed for c, _ in views(monkeypatch, spec)]
    assert len(set(seeds)) == len(seeds) == 9
    assert [c.seed for c, _ in views(monkeypatch, spec)] == seeds
    assert not set(seeds) & {c.seed for c, _ in views(monkeypatch, spec.replace(seed=1))}


def test_evidence_is_stored_with_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for c, _ in views(monkeypatch, BUDGETED.replace(selector="omnimem", selector_options={"history": "average"})):
        assert (c.tokens.evidence[:, :, : c.n_memory] > 0).all()
        assert (c.tokens.evidence[:, :, c.n_memory :] == 0).all()


def test_a_chunk_is_run_as_soon_as_it_is_full() -> None:
    stream = Stream(ToyModel(), BUDGETED)
    state = stream.feed(stream.start(), toy_stream(14))
    assert (state.n_chunks, state.n_run, state.pending) == (2, 14, None)


def test_a_compact_stream_goes_on_right_after_what_was_kept() -> None:
    media = toy_stream(60)
    stream = Stream(ToyModel(), BUDGETED.replace(positions="compact"))
    for state in states_between_chunks(stream, media):
        end = max(int(m.positions[..., 0].max()) for m in state.layers) + 1
        if state.n_run > 11:  # something has been dropped by now
            newest = int(media.positions[0, : state.n_run, 0].max())
            assert newest + 1 + int(state.offset) == end == int(state.horizon) + 1
        for m in state.layers:
            same = (m.positions == m.positions[..., :1]).all(-1)
            assert same[m.modality != VISUAL].all(), "text and sound move on all three axes together"
            old = media.positions[0][m.index[0]]
            picture = m.modality[0] == VISUAL
            assert torch.equal(m.positions[0][picture][:, 1:], old[picture][:, 1:]), "rows and columns stay"


def test_what_nobody_reads_is_not_computed(nano: Any) -> None:
    """The MLP of the last layer runs for questions alone."""
    calls = list[int]()
    for layer in (nano.n_layers - 2, nano.n_layers - 1):
        block = nano.module.get_submodule(f"{nano.language_prefix()}{layer}")
        block.mlp.register_forward_hook(lambda *_, layer=layer: calls.append(layer))
    media = toy_stream(60, dtype=torch.float32)
    media = replace(media, embeds=torch.randn(1, 60, nano.hidden_size))
    stream = Stream(nano, MemorySpec(budget=16, chunk_tokens=20))
    state = stream.flush(stream.feed(stream.start(), media))
    assert calls == [nano.n_layers - 2] * 3
    stream.ask(state, [media[:4]])
    assert calls[-1] == nano.n_layers - 1
