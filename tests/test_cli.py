"""The command line: what it prints, what it answers, how it fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from clips import numbered_frames, tone, write_media

from omnimem_train import __version__
from omnimem_train.cli import main
from omnimem_train.media import read_windows
from omnimem_train.memory import MemorySpec, selectors
from omnimem_train.models.loading import load_model
from omnimem_train.session import StreamSession

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_media(tmp_path_factory.mktemp("v") / "a clip.mp4", numbered_frames(20), 4, tone(5.0))


def test_version_names_the_main_dependencies() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "omnimem_train", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert lines["omnimem-train"] == __version__
    assert {"python", "torch", "transformers", "peft", "accelerate", "decord"} <= lines.keys()


def test_selectors_are_listed_with_source_and_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selectors"]) == 0
    listed = capsys.readouterr().out
    for name, cls in selectors().items():
        assert f"{name}\n    source:  {cls.source}\n    cost:    {cls.cost}" in listed


def test_ask_answers_as_a_session_does(video: Path, nano_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", str(nano_folder), "--budget", "32", "--selector", "snapkv", "--chunk-tokens", "48"]
    assert main(["ask", str(video), "What is it?", *options, "--max-new-tokens", "6", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    model = load_model(nano_folder, device="cpu")
    with read_windows(video, fps=2.0, window_s=2.0) as windows:
        session = StreamSession(model, MemorySpec(selector="snapkv", budget=32, chunk_tokens=48), windows.info, 2.0)
        for window in windows:
            session.feed(window)
    answer = session.ask("What is it?", 6)
    assert captured.out == answer + "\n"
    assert f"kept a layer: {min(session.kept_tokens())} to {max(session.kept_tokens())}" in captured.err


def test_ask_can_be_continued(
    video: Path, nano_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "session.safetensors"
    common = ["--model", str(nano_folder), "--budget", "full", "--max-new-tokens", "5", "--device", "cpu"]
    assert main(["ask", str(video), "What?", *common, "--save", str(saved)]) == 0
    first = capsys.readouterr().out.strip()
    assert StreamSession.load(saved, load_model(nano_folder, device="cpu")).ask("What?", 5) == first


def test_sound_alone_can_be_asked(tmp_path: Path, nano_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import soundfile

    soundfile.write(tmp_path / "a.wav", tone(3.0), 16000)
    assert main(["ask", str(tmp_path / "a.wav"), "What?", "--model", str(nano_folder), "--max-new-tokens", "2"]) == 0
    assert "watched" in capsys.readouterr().err


def test_a_video_without_sound_can_be_asked(tmp_path: Path, nano_folder: Path) -> None:
    silent = write_media(tmp_path / "silent.mp4", np.asarray(numbered_frames(12)), 4)
    assert main(["ask", str(silent), "What?", "--model", str(nano_folder), "--max-new-tokens", "2"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "nowhere.mp4", "What?", "--model", "MODEL"], "nowhere.mp4"),
        (["ask", "VIDEO", "What?", "--model", "/nowhere"], "there is no model folder"),
        (["ask", "VIDEO", "What?", "--model", "MODEL", "--selector", "snapkb"], "did you mean 'snapkv'"),
        (["ask", "VIDEO", "What?", "--model", "MODEL", "--budget", "0"], "memory budget 0"),
        (
            ["ask", "VIDEO", "What?", "--model", "MODEL", "--budget", "12parsecs"],
            "neither a number of tokens nor a size",
        ),
        (["ask", "VIDEO", "What?", "--model", "MODEL", "--budget", "1B"], "below one token a layer"),
        (["ask", "VIDEO", "What?", "--model", "MODEL", "--reader", "vlc"], "vlc"),
        (["ask", "VIDEO", "What?", "--model", "MODEL", "--adapter", "/nowhere"], "/nowhere"),
        (["ask", "VIDEO", "<|im_end|>", "--model", "MODEL"], "control token"),
        (["train", "nowhere.yaml"], "nowhere.yaml"),
        (["eval", "nowhere.yaml"], "nowhere.yaml"),
        (["export", "nowhere", "out"], "nowhere"),
        (["report", "--out", "r.html"], "nothing to report"),
        (["tiny", "OUT", "--size", "huge"], "unknown size"),
    ],
)
def test_errors_have_a_message_and_code_2(
    arguments: list[str],
    message: str,
    video: Path,
    nano_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stand_ins = {"VIDEO": str(video), "MODEL": str(nano_folder), "OUT": str(tmp_path / "out")}
    assert main([stand_ins.get(a, a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1]
    assert "error: " in captured.err
    assert message in captured.err
