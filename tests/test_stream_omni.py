"""The stream loop on a real (tiny) Qwen2.5-Omni thinker against the stock Hugging Face class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from omnimem_train.errors import UserError
from omnimem_train.memory.spec import MemorySpec
from omnimem_train.memory.state import TEXT
from omnimem_train.models.interface import MediaInfo, MediaWindow, StreamingModel, TokenBlock, Turn
from omnimem_train.session import StreamSession
from omnimem_train.streaming import Stream, encode

KINDS = {"text": (False, False), "video": (True, False), "audio": (False, True), "interleaved": (True, True)}
FULL = MemorySpec(selector="full", budget=None)
SECONDS = 5.3


def media_info(kind: str, seconds: float = SECONDS) -> MediaInfo:
    video, audio = KINDS[kind]
    return MediaInfo(Path("made-up.mp4"), seconds, video, audio, 80, 64, 4.0, 16000)


def media_windows(kind: str, seconds: float = SECONDS, fps: float = 2.0, seed: int = 0) -> list[MediaWindow]:
    """Noise as frames and sound, in windows of 2 s."""
    video, audio = KINDS[kind]
    if kind == "text":
        return []
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (int(seconds * fps), 64, 80, 3), dtype=np.uint8)
    samples = (rng.standard_normal(int(seconds * 16000)) * 0.1).astype(np.float32)
    n, windows = int(np.ceil(seconds / 2)), []
    for i in range(n):
        windows.append(
            MediaWindow(
                2.0 * i,
                2.0 * i + 2.0,
                frames[int(2 * fps * i) : int(2 * fps * (i + 1))] if video else None,
                samples[32000 * i : 32000 * (i + 1)] if audio else None,
                i == n - 1,
            )
        )
    return windows


def whole(model: StreamingModel, kind: str) -> tuple[TokenBlock, Tensor]:
    """The whole stream with a question as one block, and the question's ids."""
    encoder = model.open(media_info(kind), 2.0)
    blocks = list(encode(encoder, media_windows(kind)))
    ids = model.render(Turn("What is the colour of the square?")).ids
    return TokenBlock.cat([*blocks, encoder.text(ids)]), ids


@pytest.fixture(scope="module")
def stock(nano_folder: Path) -> Any:
    return Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        nano_folder, attn_implementation="eager", dtype=torch.float32
    ).eval()


def stream_state(model: StreamingModel, kind: str, spec: MemorySpec) -> Any:
    encoder, stream = model.open(media_info(kind), 2.0), Stream(model, spec)
    state = stream.start()
    for block in encode(encoder, media_windows(kind)):
        state = stream.feed(state, block)
    return stream, encoder, state


@pytest.mark.parametrize(("kind", "chunk"), [("text", 1), *((k, c) for k in KINDS for c in (13, 64, 1000))])
def test_unlimited_memory_equals_one_forward(nano_session: StreamingModel, stock: Any, kind: str, chunk: int) -> None:
    block, ids = whole(nano_session, kind)
    with torch.no_grad():
        expected = stock(
            inputs_embeds=block.embeds,
            position_ids=block.positions.permute(2, 0, 1),
            attention_mask=torch.ones(1, block.n, dtype=torch.int64),
        ).logits[0, -len(ids) :]
    stream, encoder, state = stream_state(nano_session, kind, FULL.replace(chunk_tokens=chunk))
    hidden = stream.ask(state, [encoder.text(ids)])[0, -len(ids) :]
    torch.testing.assert_close(nano_session.logits(hidden), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_equal_stock(nano_session: StreamingModel, stock: Any, kind: str) -> None:
    block, ids = whole(nano_session, kind)
    embeds, positions = block.embeds, block.positions
    expected: list[int] = []
    for _ in range(8):  # without a cache: nothing that could hide a mistake
        with torch.no_grad():
            mask = torch.ones(1, embeds.shape[1], dtype=torch.int64)
            logits = stock(inputs_embeds=embeds, position_ids=positions.permute(2, 0, 1), attention_mask=mask).logits
        token = int(logits[0, -1].argmax())
        if token in nano_session.eos_ids:
            break
        expected.append(token)
        embeds = torch.cat([embeds, stock.get_input_embeddings()(torch.tensor([[token]]))], 1)
        positions = torch.cat([positions, positions[:, -1:].amax(-1, keepdim=True).expand(1, 1, 3) + 1], 1)
    stream, encoder, state = stream_state(nano_session, kind, FULL.replace(chunk_tokens=37))
    assert stream.generate(stream.caught_up(state), encoder, ids, 8) == expected
    assert expected, "the tiny model says nothing; this test would compare nothing"


def test_memory_never_exceeds_the_budget(nano_session: StreamingModel) -> None:
    spec = MemorySpec(budget=24, chunk_tokens=40)
    encoder, stream = nano_session.open(media_info("interleaved"), 2.0), Stream(nano_session, spec)
    state = stream.start()
    for block in encode(encoder, media_windows("interleaved")):
        for i in range(block.n):
            state = stream.feed(state, block[i : i + 1])
            if state.n_chunks:
                assert max(int((m.modality != TEXT).sum(-1).amax()) for m in state.layers) <= 24
    assert state.n_chunks > 3


def test_a_question_in_the_middle_sees_only_what_came_before(nano_session: StreamingModel) -> None:
    """Two streams that differ only later give the same answer at 2 s, and it is that of a stream that ends there."""
    ids = nano_session.render(Turn("What is the colour of the square?")).ids
    answers = []
    for seed, n_windows in ((0, 3), (1, 3), (0, 1)):
        windows = media_windows("interleaved", 6.0, seed=0)[:1] + media_windows("interleaved", 6.0, seed=seed)[1:]
        encoder, stream = (
            nano_session.open(media_info("interleaved", 6.0), 2.0, mel_floor=0.5),
            Stream(nano_session, FULL),
        )
        state = stream.feed(stream.start(), encoder.start())
        for i, window in enumerate(windows[:n_windows]):
            if (block := encoder.push(window)) is not None:
                state = stream.feed(state, block)
            if i == 0:
                hidden = stream.ask(stream.caught_up(state, encoder.waiting()), [encoder.text(ids)])
                answers.append(nano_session.logits(hidden[0, -1]))
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=0)
    torch.testing.assert_close(answers[0], answers[2], rtol=0, atol=1e-6)


# Sessions ------------------------------------------------------------------------------------------------------------

SPEC = MemorySpec(budget=40, chunk_tokens=32)


def fed(model: StreamingModel, windows: list[MediaWindow], spec: MemorySpec = SPEC) -> StreamSession:
    session = StreamSession(model, spec, media_info("interleaved"), 2.0)
    for window in windows:
        session.feed(window)
    return session


def test_asking_a_session_changes_nothing(nano_session: StreamingModel) -> None:
    windows = media_windows("interleaved")
    session, silent = fed(nano_session, windows[:2]), fed(nano_session, windows[:2])
    first = session.ask("What?", 6)
    assert session.ask("What?", 6) == first
    session.feed(windows[2])
    silent.feed(windows[2])
    for a, b in zip(session.state.layers, silent.state.layers, strict=True):
        assert torch.equal(a.keys, b.keys)


def test_a_saved_session_goes_on_as_if_never_stopped(nano_session: StreamingModel, tmp_path: Path) -> None:
    windows = media_windows("interleaved")
    session = fed(nano_session, windows[:2])
    session.save(tmp_path / "s.safetensors")
    loaded = StreamSession.load(tmp_path / "s.safetensors", nano_session, SPEC)
    assert loaded.watched_s == session.watched_s
    for s in (session, loaded):
        s.feed(windows[2])
    for a, b in zip(session.state.layers, loaded.state.layers, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True) if x is not None)
    assert session.ask("What?", 6) == loaded.ask("What?", 6)


def test_a_session_of_another_spec_or_model_is_refused(
    nano_session: StreamingModel, nano: StreamingModel, tmp_path: Path
) -> None:
    path = tmp_path / "s.safetensors"
    fed(nano_session, media_windows("interleaved")[:1]).save(path)
    with pytest.raises(UserError, match="was written with memory spec"):
        StreamSession.load(path, nano_session, SPEC.replace(budget=41))
    with torch.no_grad():
        next(p for n, p in nano.module.named_parameters() if "v_proj.weight" in n and nano.language_prefix() in n).add_(
            1
        )
    with pytest.raises(UserError, match="was written with model"):
        StreamSession.load(path, nano)
    with pytest.raises(UserError, match="cannot read the session"):
        StreamSession.load(tmp_path / "absent", nano_session)
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(UserError, match="cannot read the session"):
        StreamSession.load(tmp_path / "junk", nano_session)


def test_windows_must_follow_each_other(nano_session: StreamingModel) -> None:
    windows = media_windows("interleaved")
    with pytest.raises(UserError, match=r"starts at 2 s, the stream stands at 0 s"):
        fed(nano_session, windows[1:])


def test_a_question_now_sees_what_the_encoder_holds_back(nano_session: StreamingModel) -> None:
    """Asking after two windows equals asking a stream that ended there."""
    ids = nano_session.render(Turn("What is the colour of the square?")).ids
    answers = []
    for ends in (False, True):
        encoder, stream = nano_session.open(media_info("interleaved"), 2.0), Stream(nano_session, FULL)
        state = stream.feed(stream.start(), encoder.start())
        for window in media_windows("interleaved")[:2]:
            if (block := encoder.push(window)) is not None:
                state = stream.feed(state, block)
        waiting = encoder.finish() if ends else encoder.waiting()
        assert waiting is not None and waiting.n > 0
        state = stream.feed(state, waiting) if ends else stream.caught_up(state, waiting)
        assert state.n_run + (state.pending.n if state.pending else 0) > 100
        answers.append(nano_session.logits(stream.ask(state, [encoder.text(ids)])[0, -1]))
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=1e-5)


def test_an_answer_ends_at_the_end_token(nano: StreamingModel) -> None:
    ids = nano.render(Turn("What?")).ids
    stream, encoder, state = stream_state(nano, "text", FULL)
    answer = stream.generate(stream.caught_up(state), encoder, ids, 6)
    assert len(answer) > 1
    second = next(i for i, token in enumerate(answer) if token != answer[0])
    nano.eos_ids = (answer[second],)
    assert stream.generate(stream.caught_up(state), encoder, ids, 6) == answer[:second]
