"""Clips of the world as encoded streams: equal to the model's own encoder on the same arrays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_prep.arrays import render_frames, render_sound
from data_prep.questions import QuestionMaker
from data_prep.streams import WorldStreams, pack
from data_prep.world import ClipSpec, WorldSettings, crop, make_clip
from omnimem_train.models.interface import MediaInfo, MediaWindow, Turn
from omnimem_train.models.qwen2_5_omni import Qwen2_5OmniStreaming
from omnimem_train.step import EncodedStream, TimedTurn, encode_stream

SETTINGS = WorldSettings(seconds=12.0, size=56, grid=2)


@pytest.fixture(scope="module")
def specs() -> list[ClipSpec]:
    return [make_clip(SETTINGS, 0, "train", i) for i in range(2)]


def by_the_encoder(
    model: Qwen2_5OmniStreaming, spec: ClipSpec, turns: list[Turn], picture: bool = True, sound: bool = True
) -> EncodedStream:
    """Through windows of 2 s, as a file would be read."""
    seconds = spec.settings.seconds
    frames, samples = render_frames([spec], 2)[0].numpy(), render_sound([spec])[0].numpy()
    info = MediaInfo(Path("made-up"), seconds, picture, sound, 56, 56, 2.0, 16000)
    windows = [
        MediaWindow(
            t,
            t + 2.0,
            frames[round(2 * t) : round(2 * t) + 4] if picture else None,
            samples[round(16000 * t) : round(16000 * (t + 2))] if sound else None,
            t + 2 >= seconds,
        )
        for t in (2.0 * k for k in range(round(seconds / 2)))
    ]
    return encode_stream(model.open(info, 2.0), windows, [TimedTurn(model.render(t)) for t in turns], model.device)


@pytest.mark.parametrize(("picture", "sound"), [(True, True), (True, False), (False, True)])
def test_equal_to_the_encoder(
    nano_session: Qwen2_5OmniStreaming, specs: list[ClipSpec], picture: bool, sound: bool
) -> None:
    model = nano_session
    streams = WorldStreams(model, 56, picture=picture, sound=sound)
    turns = [
        [Turn("Who?", "me"), Turn("What colour was it?", "red")],
        [Turn("Which one was it?", "a"), Turn("No?", "b")],
    ]
    packed = [pack([model.render(t) for t in row]) for row in zip(*turns, strict=True)]
    found = streams.stream(streams.encode(specs), 12.0, packed)
    alone = [by_the_encoder(model, spec, t, picture, sound) for spec, t in zip(specs, turns, strict=True)]
    wanted = EncodedStream.stack(alone)
    for name in ("embeds", "positions", "modality", "time_s"):
        a, b = (torch.cat([getattr(x, name) for x in s.blocks], 1) for s in (found, wanted))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    for q, w in zip(found.questions, wanted.questions, strict=True):
        assert torch.equal(q.read, w.read)
        assert torch.equal(q.targets, w.targets)
        for stream, row in q.read.tolist():  # padding may differ; what is read, and all before it, may not
            assert torch.equal(q.block.positions[stream, : row + 1], w.block.positions[stream, : row + 1])
            assert torch.equal(q.block.embeds[stream, : row + 1], w.block.embeds[stream, : row + 1])


def test_a_crop_is_the_clip_that_was_cut_out(nano_session: Qwen2_5OmniStreaming, specs: list[ClipSpec]) -> None:
    """Same tokens as encoding the cut-out events, but for the log-mel floor and noise, which are the whole clip's."""
    streams = WorldStreams(nano_session, 56, sound=False)
    media = streams.crop(streams.encode(specs), 6.0, 6.0)
    assert media.shape[1] == streams.tokens(6.0)
    assert torch.equal(media, streams.encode(specs)[:, streams.tokens(6.0) :])
    assert crop(specs[0], 6.0, 12.0).settings.seconds == 6.0
    with pytest.raises(ValueError, match="blocks of 2 s"):
        streams.crop(media, 3.0, 2.0)


def test_all_questions_of_a_clip_can_be_packed(nano_session: Qwen2_5OmniStreaming, specs: list[ClipSpec]) -> None:
    asked = QuestionMaker(0, 0).ask(specs[0])
    turns = [nano_session.render(Turn(q.text, q.answer)) for q in asked]
    packed = pack([*turns[:2], None])
    assert packed.ids.shape[0] == 3
    assert set(packed.read[:, 0].tolist()) == {0, 1}
    spoken = nano_session.tokenizer.decode(packed.targets.tolist())
    assert spoken == "".join(f"{q.answer}<|im_end|>" for q in asked[:2])
