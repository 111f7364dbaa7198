"""What users get wrong: every mistake ends with a message and exit code 2, never with a traceback or a wrong result."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import omni_clips
import pytest
import soundfile
import torch
from clips import numbered_frames, tone, write_media

from omnimem_train.cli import main
from omnimem_train.errors import UserError
from omnimem_train.media import MediaError, read_windows
from omnimem_train.models.interface import MediaInfo, MediaWindow, StreamingModel, TokenBlock, Turn, paired_window_s
from omnimem_train.models.loading import load_model
from omnimem_train.models.salmonn.tiny import make_tiny_salmonn

KINDS = ("omni", "qwen2_5_vl", "qwen3_vl")
INFO = MediaInfo(Path("made-up"), 8.0, has_video=True, has_audio=True, width=64, height=48)


@pytest.fixture(scope="module", params=KINDS)
def model(
    request: pytest.FixtureRequest, nano_session: StreamingModel, tmp_path_factory: pytest.TempPathFactory
) -> StreamingModel:
    """A small model of each kind."""
    if request.param == "omni":
        return nano_session
    folder = make_tiny_salmonn(tmp_path_factory.mktemp(request.param), backbone=request.param)
    return load_model(folder, device="cpu")


# Files ---------------------------------------------------------------------------------------------------------------


def streamed(model: StreamingModel, windows: list[MediaWindow]) -> TokenBlock:
    """All media tokens of a stream."""
    encoder = model.open(INFO, 2.0)
    blocks = [encoder.start(), *(encoder.push(window) for window in windows), encoder.finish()]
    return TokenBlock.cat([block for block in blocks if block is not None])


@pytest.mark.parametrize("sound_s", [0.0, 0.5, 2.0, 4.3])
def test_sound_may_end_before_the_picture(model: StreamingModel, sound_s: float) -> None:
    clip = omni_clips.Clip(8.0, 2.0)
    assert clip.samples is not None
    clip.samples = clip.samples[: round(sound_s * omni_clips.RATE)]
    (whole,) = clip.windows(8.0)
    pieces = streamed(model, list(clip.windows(2.0)))
    expected = streamed(model, [whole])
    assert torch.equal(pieces.positions, expected.positions)
    assert torch.equal(pieces.modality, expected.modality)
    torch.testing.assert_close(pieces.time_s, expected.time_s)


@pytest.mark.parametrize("reader", ["decord", "pyav"])
def test_a_file_whose_sound_ends_early_can_be_asked(
    nano_folder: Path, tmp_path: Path, reader: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_media(tmp_path / "a.mp4", numbered_frames(20), 4, tone(0.5))
    options = ["--model", str(nano_folder), "--device", "cpu", "--max-new-tokens", "2", "--reader", reader]
    assert main(["ask", str(path), "What?", *options]) == 0
    assert "watched" in capsys.readouterr().err


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_sound_that_is_no_sound_is_refused(tmp_path: Path, value: float) -> None:
    samples = tone(3.0)
    samples[40000] = value
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    with read_windows(tmp_path / "a.wav", fps=2.0, window_s=2.0) as windows:
        next(windows)
        with pytest.raises(MediaError, match="sound from 2 s on is damaged"):
            next(windows)


def test_a_file_of_no_samples_is_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(0, np.float32), 16000)
    with read_windows(tmp_path / "a.wav", fps=2.0, window_s=2.0) as windows, pytest.raises(MediaError, match="no samp"):
        next(windows)


def test_sound_in_a_file_of_its_own_must_be_there(tmp_path: Path) -> None:
    silent = write_media(tmp_path / "a.mp4", numbered_frames(8), 4)
    with pytest.raises(MediaError, match="there is no sound in"):
        read_windows(silent, fps=2.0, window_s=2.0, audio_path=silent)


def test_narrow_pictures_are_right_or_refused(tmp_path: Path) -> None:
    path = write_media(tmp_path / "a.mp4", numbered_frames(4, 200, 16), 2)
    with pytest.raises(MediaError, match="16 pixels wide; the pyav reader can"):
        read_windows(path, fps=2.0, window_s=2.0)
    with read_windows(path, fps=2.0, window_s=2.0, reader="pyav") as windows:
        assert next(windows).frames.shape == (4, 200, 16, 3)


# Values --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fps", [0, -1, math.nan, math.inf, -math.inf, 1e-9, 1e9, 29.97, 23.976])
def test_rates_that_cannot_be_cut_into_windows(fps: float) -> None:
    with pytest.raises(UserError, match="fps is"):
        paired_window_s(fps)


def test_rates_are_limited_by_what_a_window_holds() -> None:
    assert [paired_window_s(fps) for fps in (0.3, 240, 7.5)] == [20, 2, 4]


@pytest.mark.parametrize(
    "options",
    [
        {"max_pixels": "abc"},
        {"max_pixels": math.nan},
        {"max_pixels": math.inf},
        {"max_pixels": 1e3},
        {"max_pixels": True},
        {"max_pixels": 0},
        {"min_pixels": "abc"},
        {"min_pixels": 10**9},
        {"system": None},
        {"system": 5},
        {"system": [1]},
        {"prefix": 5},
        {"prefix": "<|im_end|>"},
    ],
    ids=str,
)
def test_options_of_the_encoder(model: StreamingModel, options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        model.open(INFO, 2.0, **options)


@pytest.mark.parametrize("floor", ["loud", math.nan, None, [1]])
def test_a_mel_floor_is_a_number(nano_session: StreamingModel, floor: Any) -> None:
    with pytest.raises(UserError, match="mel_floor"):
        nano_session.open(INFO, 2.0, mel_floor=floor)


@pytest.mark.parametrize("question", ["\ud800", "what <|im_end|> ?", 5, None])
def test_questions_are_text(model: StreamingModel, question: Any) -> None:
    with pytest.raises(UserError, match="text"):
        model.render(Turn(question))
