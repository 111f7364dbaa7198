"""The training step on a real (nano) model: questions placed in a stream, shared passes, gradients, distillation."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import omni_clips
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from omnimem_train.errors import UserError
from omnimem_train.gradient import Gradient
from omnimem_train.losses import LossConfig, answer_loss, distillation_loss, supervised
from omnimem_train.memory.spec import MemorySpec
from omnimem_train.models.interface import StreamingModel, Turn
from omnimem_train.models.lora import LoraSettings, add_lora, disable_adapter, lora_parameters
from omnimem_train.step import EncodedStream, StepResult, StreamingStep, TimedTurn, encode_stream
from omnimem_train.streaming import Stream

SPEC = MemorySpec(budget=24, chunk_tokens=40)
TURNS = [
    Turn("What colour?", "red"),
    Turn("Which sound?", "a beep", 2.0),
    Turn("How many?", "three", 4.0),
    Turn("Where?", "left"),
]


def encoded(model: StreamingModel, turns: list[Turn], seconds: float = 6.0) -> EncodedStream:
    clip = omni_clips.Clip(seconds, 2.0)
    timed = [TimedTurn(model.render(turn), turn.time_s) for turn in turns]
    return encode_stream(model.open(clip.info, 2.0), clip.windows(2.0), timed, model.device)


def with_adapter(model: StreamingModel, scale: float = 0.1) -> StreamingModel:
    add_lora(model, LoraSettings(r=4, alpha=8))
    generator = torch.Generator().manual_seed(0)
    for _, p in lora_parameters(model):
        p.data.copy_(scale * torch.randn(p.shape, generator=generator))
    return model


def step(model: StreamingModel, stream: EncodedStream, spec: MemorySpec = SPEC, **loss: Any) -> StepResult:
    def off() -> Any:
        return disable_adapter(model)

    return StreamingStep(model, LossConfig(**loss), off)(stream, spec, Gradient("all"))


def gradients(model: StreamingModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in lora_parameters(model) if p.grad is not None}


def test_turns_are_placed_where_they_are_asked(nano_session: StreamingModel) -> None:
    stream = encoded(nano_session, TURNS)
    assert [len(m.questions) for m in stream.moments] == [1, 1, 2]
    assert stream.moments[-1].after == len(stream.blocks)
    assert stream.moments[-1].waiting is None
    decoded = [nano_session.tokenizer.decode(q.targets) for q in stream.questions]
    assert decoded == ["a beep<|im_end|>", "three<|im_end|>", "red<|im_end|>", "left<|im_end|>"]
    for m in stream.moments:
        seen = sum(b.n for b in stream.blocks[: m.after]) + (m.waiting.n if m.waiting else 0)
        assert all(int(q.block.positions[0, 0, 0]) > 0 for q in m.questions)
        assert seen > 0
    with pytest.raises(UserError, match="asked at 9 s, the stream ends at 6 s"):
        encoded(nano_session, [Turn("Late?", "yes", 9.0)])


def test_a_turn_sees_media_up_to_its_time(nano_session: StreamingModel) -> None:
    """The last media token before a turn is from before its time; nothing that had been seen is missing."""
    stream = encoded(nano_session, [Turn("Now?", "yes", 4.0), Turn("A moment before?", "yes", 3.9)])
    early, now = stream.moments
    for moment, end_s in ((early, 2.0), (now, 4.0)):
        blocks = stream.blocks[: moment.after] + ([moment.waiting] if moment.waiting else [])
        times = torch.cat([b.time_s[0] for b in blocks])
        media = torch.cat([b.modality[0] for b in blocks]) != 0
        assert times[media].max() < end_s
        assert int(media.sum()) == round(end_s * (25 + media_per_s(stream)))


def media_per_s(stream: EncodedStream) -> float:
    modality = torch.cat([b.modality[0] for b in stream.blocks])
    return float((modality == 1).sum()) / 6.0


def test_loss_is_that_of_a_plain_forward(nano_session: StreamingModel) -> None:
    """Unlimited memory, one question: the loss of next-token prediction over the whole sequence, by the stock class."""
    stream = encoded(nano_session, TURNS[:1])
    result = step(nano_session, stream, MemorySpec(selector="full", budget=None, chunk_tokens=50))
    blocks = [*stream.blocks, stream.questions[0].block]
    embeds = torch.cat([b.embeds for b in blocks], 1)
    positions = torch.cat([b.positions for b in blocks], 1).permute(2, 0, 1)
    with torch.no_grad():
        logits = nano_session.module(inputs_embeds=embeds, position_ids=positions).logits[0]
    rows = stream.questions[0].read[:, 1] + sum(b.n for b in stream.blocks)
    expected = torch.nn.functional.cross_entropy(logits[rows], stream.questions[0].targets, reduction="sum")
    assert float(result.loss) == pytest.approx(float(expected), abs=1e-3)
    assert result.targets == len(stream.questions[0].targets)


def test_questions_that_share_a_pass_equal_passes_of_their_own(nano: StreamingModel) -> None:
    model = with_adapter(nano)
    together = step(model, encoded(model, TURNS))
    grads = gradients(model, together.loss)
    alone: dict[str, torch.Tensor] = {}
    total = 0.0
    for turn in TURNS:
        result = step(model, encoded(model, [turn]))
        total += float(result.loss.detach())
        for name, g in gradients(model, result.loss).items():
            alone[name] = alone.get(name, torch.zeros_like(g)) + g
    assert float(together.loss.detach()) == pytest.approx(total, abs=1e-4)
    scale = max(float(g.abs().max()) for g in alone.values())
    for name in alone:
        torch.testing.assert_close(grads[name] / scale, alone[name] / scale, rtol=0, atol=1e-6)


def test_eight_questions_cost_little_more_than_one(nano: StreamingModel) -> None:
    """Floating-point operations of forward and backward on a minute of stream."""
    model = with_adapter(nano)
    costs = []
    for n in (1, 8):
        stream = encoded(model, [Turn(f"Number {i}?", "yes") for i in range(n)], seconds=60.0)
        with FlopCounterMode(display=False) as counter:
            step(model, stream).loss.backward()
        costs.append(counter.get_total_flops())
    assert 1 < costs[1] / costs[0] < 1.15


def test_lora_of_the_first_chunk_gets_gradient(nano: StreamingModel) -> None:
    """With gradient cut before the last chunk the adapter's gradient differs: earlier chunks do contribute."""
    model = with_adapter(nano)
    stream = encoded(model, TURNS[:1])
    everything = gradients(model, step(model, stream).loss)
    last = StreamingStep(model, LossConfig())(stream, SPEC, Gradient("last", chunks=1))
    cut = gradients(model, last.loss)
    name = next(n for n in everything if "k_proj.lora_B" in n)
    assert float((everything[name] - cut[name]).abs().max()) > 1e-4 * float(everything[name].abs().max())


def test_gradient_through_memory_is_that_of_one_pass(nano: StreamingModel) -> None:
    """With nothing dropped, chunks change no gradient: keys and values of earlier chunks carry all of theirs."""
    model = with_adapter(nano)
    stream = encoded(model, TURNS[:1])
    full = MemorySpec(selector="full", budget=None, chunk_tokens=40)
    chunked = gradients(model, step(model, stream, full).loss)
    whole = gradients(model, step(model, stream, full.replace(chunk_tokens=10**6)).loss)
    for name, gradient in whole.items():
        torch.testing.assert_close(chunked[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) + 1e-7)


def test_distillation(nano: StreamingModel) -> None:
    model = with_adapter(nano, scale=0.0)
    stream, full = encoded(model, TURNS), MemorySpec(selector="full", budget=None, chunk_tokens=40)
    assert float(step(model, stream, full, distill=1.0).distill_loss) == pytest.approx(0, abs=1e-6)
    compressed = step(model, stream, SPEC, distill=1.0)
    assert float(compressed.distill_loss) > 1e-4
    assert float(compressed.loss.detach()) == pytest.approx(
        float(compressed.answer_loss + compressed.distill_loss), rel=1e-6
    )
    for _, p in lora_parameters(model):
        p.data.normal_(std=0.2)
    assert float(step(model, stream, full, distill=1.0).distill_loss) > 1e-4  # the teacher is without the adapter
    alone = step(model, stream, SPEC, answer=0.0, distill=2.0)
    assert float(alone.loss.detach()) == pytest.approx(2 * float(alone.distill_loss), rel=1e-6)
    assert gradients(model, alone.loss)


def test_kept_and_seen_are_counted(nano_session: StreamingModel) -> None:
    stream = encoded(nano_session, TURNS[:1])
    result = step(nano_session, stream)
    assert result.stream_tokens == stream.n_tokens == sum(result.seen.values())
    assert result.seen["audio"] == 150
    assert float(result.kept["visual"] + result.kept["audio"]) == pytest.approx(24)
    assert float(result.kept["text"]) == result.seen["text"]
    assert result.chunks == -(-stream.n_tokens // 40)


def test_losses_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    expected = torch.log1p(torch.exp(torch.tensor(-2.0))) + torch.log1p(torch.exp(torch.tensor(1.0)))
    assert float(answer_loss(logits, torch.tensor([0, 0]))) == pytest.approx(float(expected))
    p = torch.softmax(torch.tensor([1.0, 0.0]), 0)
    kl = float((p * (p.log() - torch.log(torch.tensor([0.5, 0.5])))).sum())
    found = distillation_loss(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]), temperature=2.0)
    assert float(found) == pytest.approx(4 * kl)
    assert supervised(torch.tensor([-100, -100, 5, 6, -100])).tolist() == [1, 2]
    for bad in ({"answer": 0.0}, {"distill": -1.0}, {"temperature": 0.0}):
        with pytest.raises(UserError):
            LossConfig(**bad)


def test_bfloat16_keeps_the_same_tokens_mostly(nano_folder: Any) -> None:
    """The stream runs in bf16; the adapter stays float32 and gets gradients."""
    from omnimem_train.models.loading import load_model

    model = with_adapter(load_model(nano_folder, dtype="bfloat16", device="cpu"))
    result = step(model, encoded(model, TURNS))
    grads = gradients(model, result.loss)
    assert grads
    assert all(g.dtype == torch.float32 and bool(torch.isfinite(g).all()) for g in grads.values())
    kept = []
    for dtype in ("float32", "bfloat16"):
        m = load_model(nano_folder, dtype=dtype, device="cpu")
        with nullcontext():
            stream = Stream(m, SPEC)
            state = stream.flush(stream.feed_all(stream.start(), encoded(m, []).blocks))
        kept.append([set(layer.index[0, 0].tolist()) for layer in state.layers])
    shared = [len(a & b) / len(a) for a, b in zip(*kept, strict=True)]
    assert sum(shared) / len(shared) > 0.8


def test_supervised_rows_come_right_before_their_tokens(nano_session: StreamingModel) -> None:
    """The token after a supervised row is the target, closing marks in front or not."""
    for question in encoded(nano_session, TURNS).questions:
        table = nano_session.module.get_input_embeddings().weight
        assert torch.equal(question.block.embeds[0, question.read[:, 1] + 1], table[question.targets])
