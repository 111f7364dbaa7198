"""Streams side by side: the same numbers as one at a time. And attention inside segments, as the towers call it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_step import SPEC, TURNS, encoded, gradients, step, with_adapter

from omnimem_train.memory.spec import MemorySpec
from omnimem_train.models.interface import StreamingModel, TokenBlock, Turn
from omnimem_train.models.segments import attend_segments
from omnimem_train.step import EncodedStream, answer_logits
from omnimem_train.streaming import Stream

OTHER = [Turn("What was heard first, after all?", "a low hum"), Turn("Which?", "no", 2.0), Turn("Who?", "me", 4.0)]


def two_streams(model: StreamingModel) -> list[EncodedStream]:
    """Equal layout, other pictures and sound, other questions: one more in the first, longer ones in the second."""
    first, second = encoded(model, TURNS), encoded(model, OTHER)
    generator = torch.Generator().manual_seed(1)

    def changed(block: TokenBlock) -> TokenBlock:
        return replace(block, embeds=block.embeds + torch.randn(block.embeds.shape, generator=generator))

    return [first, replace(second, blocks=[changed(block) for block in second.blocks])]


@pytest.mark.parametrize("selector", ["perturbation", "omnimem", "critical_kv"])
def test_streams_side_by_side_equal_streams_alone(nano: StreamingModel, selector: str) -> None:
    model = with_adapter(nano)
    streams = two_streams(model)
    spec = MemorySpec(selector=selector, budget=24, chunk_tokens=40)
    alone = [step(model, s, spec) for s in streams]
    parts = [gradients(model, result.loss) for result in alone]
    together = step(model, EncodedStream.stack(streams), spec)
    whole = gradients(model, together.loss)
    torch.testing.assert_close(together.loss, alone[0].loss + alone[1].loss, rtol=1e-4, atol=1e-4)
    assert together.targets == sum(result.targets for result in alone)
    assert together.stream_tokens == sum(result.stream_tokens for result in alone)
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, parts[0][name] + parts[1][name], rtol=2e-3, atol=2e-4)


def test_answers_come_in_the_order_of_questions_and_streams(nano: StreamingModel) -> None:
    streams = two_streams(nano)
    logits, _ = answer_logits(Stream(nano, SPEC), EncodedStream.stack(streams))
    apart = [answer_logits(Stream(nano, SPEC), s)[0] for s in streams]
    assert [len(x) for x in apart] == [4, 3]
    for i, found in enumerate(logits):
        wanted = torch.cat([x[i] for x in apart if i < len(x)])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_streams_of_other_layouts_are_refused(nano: StreamingModel) -> None:
    with pytest.raises(ValueError, match="equal blocks, modalities and moments"):
        EncodedStream.stack([encoded(nano, TURNS), encoded(nano, TURNS, seconds=8.0)])
    with pytest.raises(ValueError, match="equal blocks, modalities and moments"):
        EncodedStream.stack([encoded(nano, TURNS), encoded(nano, TURNS[:1])])


@pytest.mark.parametrize("sizes", [(5, 5, 5), (5, 3, 4), (7,)])
def test_attention_inside_segments(sizes: tuple[int, ...]) -> None:
    """Equal and unequal segments, against the formula; nothing is seen across a border."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, sum(sizes), 8, generator=generator) for _ in range(3))
    borders = torch.tensor([0, *sizes]).cumsum(0)
    found, _ = attend_segments(torch.nn.Module(), q, k, v, scaling=0.3, cu_seq_lens_q=borders, max_length_q=max(sizes))
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    weights = (0.3 * q @ k.mT).masked_fill(owner[:, None] != owner, -torch.inf).softmax(-1)
    torch.testing.assert_close(found, (weights @ v).transpose(1, 2))
    with pytest.raises(ValueError, match="takes no mask"):
        attend_segments(torch.nn.Module(), q, k, v, weights, cu_seq_lens_q=borders, max_length_q=max(sizes))
