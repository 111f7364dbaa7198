"""What users get wrong: every mistake ends with a message and exit code 2, never with a traceback or a wrong result."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import omni_clips
import pytest
import soundfile
import torch
from clips import numbered_frames, tone, write_media
from safetensors import safe_open
from safetensors.torch import save_file

from data_prep.world import WorldSettings
from omnimem_train.cli import main
from omnimem_train.data import BrokenMedia, DataConfig
from omnimem_train.errors import UserError
from omnimem_train.evaluation import EvalConfig, EvalData
from omnimem_train.export import adapter_memory
from omnimem_train.losses import LossConfig
from omnimem_train.manifest import load_manifest
from omnimem_train.media import MediaError, read_windows
from omnimem_train.memory import VISUAL, MemorySpec
from omnimem_train.models.checks import paired_window_s
from omnimem_train.models.interface import MediaInfo, MediaWindow, StreamingModel, TokenBlock, Turn
from omnimem_train.models.loading import ModelConfig, load_model, pick_device
from omnimem_train.models.lora import load_adapter
from omnimem_train.models.salmonn.tiny import make_tiny_salmonn
from omnimem_train.run_config import TrainConfig
from omnimem_train.session import StreamSession

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


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 s of picture and sound."""
    return write_media(tmp_path_factory.mktemp("v") / "a.mp4", numbered_frames(16), 4, tone(4.0))


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


def test_sound_that_has_ended_holds_no_picture_back(model: StreamingModel) -> None:
    clip = omni_clips.Clip(8.0, 2.0)
    assert clip.samples is not None
    clip.samples = clip.samples[:8000]
    windows = list(clip.windows(2.0))
    encoder = model.open(INFO, 2.0)
    early = TokenBlock.cat([encoder.start(), *filter(None, map(encoder.push, windows[:-1]))])
    whole = streamed(model, windows)
    assert int((early.modality == VISUAL).sum()) >= int((whole.modality == VISUAL).sum()) // 2


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


REFUSED = {23.976: 24, 24000 / 1001: 24, 29.97: 30, 59.94: 60, 1.001: 1, 0.7123: 0.7, 0.5501: 0.6, 2.857: 3}


def hint(fps: float) -> float:
    """The rate that the refusal of another offers."""
    with pytest.raises(UserError) as error:
        paired_window_s(fps)
    return float(error.value.remedy.rsplit(maxsplit=1)[1])


@pytest.mark.parametrize(("fps", "offered"), REFUSED.items())
def test_the_rate_offered_instead_is_near(fps: float, offered: float) -> None:
    assert hint(fps) == offered
    assert paired_window_s(offered) > 0


def test_the_rate_offered_instead_works(model: StreamingModel) -> None:
    for fps in map(hint, (29.97, 0.7123)):
        seconds = 2 * model.window_s(fps)
        tokens, _ = omni_clips.run(model, omni_clips.Clip(seconds, fps, size=(28, 28)))
        assert float(tokens.time_s.max()) > seconds - 2 / fps - 1e-3


def test_every_rate_works_or_one_near_it_is_offered() -> None:
    refused = 0
    for fps in [k / 10_000 for k in range(10, 60_000, 7)] + [k / 1000 for k in range(6_000, 240_000, 97)]:
        try:
            paired_window_s(fps)
        except UserError:
            refused += 1
            assert abs(hint(fps) / fps - 1) <= 0.1 and paired_window_s(hint(fps)) > 0, fps
    assert refused > 1000


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


# Settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(lr=math.inf), "train.lr"),
        (lambda: TrainConfig(warmup_steps=-1), "train.warmup_steps"),
        (lambda: TrainConfig(beta1=2.0), "train.beta1"),
        (lambda: TrainConfig(seed=-1), "train.seed"),
        (lambda: TrainConfig(seed=10**30), "train.seed"),
        (lambda: DataConfig(time_limit_s=math.inf), "data.time_limit_s"),
        (lambda: LossConfig(distill=math.inf), "loss.distill"),
        (lambda: EvalData(fps=0), "data.fps"),
        (lambda: EvalData(reader="vlc"), "data.reader"),
        (lambda: EvalData(time_limit_s=-1), "data.time_limit_s"),
        (lambda: EvalData(limit=-1), "data.limit"),
        (lambda: EvalConfig(max_new_tokens=0), "max_new_tokens"),
        (lambda: EvalConfig(selectors=({"selector": "uniform", "budget": 3},)), "sets a budget"),
        (
            lambda: EvalConfig(
                selectors=({"name": "a", "selector": "snapkv"}, {"name": "a", "selector": "uniform"}), budgets=(16,)
            ),
            "two selectors are called 'a'",
        ),
        (lambda: MemorySpec(budget="9" * 400 + "GiB"), "beyond any memory"),
        (lambda: MemorySpec(selector_options={5: 1}), "not a set of options"),
        (lambda: WorldSettings(seconds=math.inf), "seconds"),
        (lambda: WorldSettings(distractors_per_s=1e6), "distractors_per_s"),
        (lambda: ModelConfig(dtype=torch.float32), "model.dtype"),  # type: ignore[arg-type]
        (lambda: pick_device("meta"), "device 'meta'"),
    ],
)
def test_values_out_of_range(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def entry(path: Path, **changes: Any) -> dict[str, Any]:
    return {"id": "1", "video": str(path), "turns": [{"question": "q", "answer": "a", "time_s": None}]} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"turns": [{"question": "q", "answer": "a", "time_s": math.inf}]}, "time_s is inf"),
        ({"turns": [{"question": "q", "answer": "a", "time_s": 10**400}]}, "time_s is 1000"),
        ({"duration_s": "5"}, "duration_s is '5'"),
        ({"duration_s": [1]}, "duration_s is"),
        ({"video": "a" * 5000}, "there is no file"),
    ],
    ids=["infinite time", "huge time", "text for a length", "list for a length", "endless name"],
)
def test_entries_of_a_training_manifest(video: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "m.json").write_text(json.dumps([entry(video, **changes)]))
    with pytest.raises(UserError, match=message):
        load_manifest(tmp_path / "m.json")


def test_json_nested_without_end(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(UserError, match="no valid JSON"):
        load_manifest(tmp_path / "m.json")


def test_a_control_token_in_any_sample_stops_training_before_it_begins(
    video: Path, nano_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = entry(video, id="second", turns=[{"question": "q", "answer": "<|im_start|>"}])
    (tmp_path / "m.json").write_text(json.dumps([entry(video), bad]))
    assert main(["train", str(recipe(tmp_path, nano_folder, f"data: {{manifest: {tmp_path / 'm.json'}}}"))]) == 2
    assert "sample 'second': the text '<|im_start|>' holds the control token" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def recipe(folder: Path, model: Path, *lines: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text("\n".join([f"model: {{path: {model}, device: cpu}}", *lines]))
    with path.open("a") as file:
        if not any(line.startswith("data: {items") for line in lines):
            file.write(f"\nlora: {{r: 4}}\ntrain: {{output: {folder / 'out'}, steps: 1}}\n")
    return path


# Evaluation ----------------------------------------------------------------------------------------------------------


def question(video: Path, **changes: Any) -> dict[str, Any]:
    return {"id": "1", "video": str(video), "question": "q", "options": ["a", "b"], "answer": "A"} | changes


def evaluation(folder: Path, model: Path, rows: list[dict[str, Any]], *overrides: str) -> int:
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = recipe(folder, model, f"data: {{items: {folder / 'items.jsonl'}}}", "selectors: [uniform]", "budgets: [16]")
    return main(["eval", str(path), f"output={folder / 'eval'}", *overrides])


@pytest.mark.parametrize(
    ("changes", "override", "message"),
    [
        ({}, "encoder.foo=1", "unknown encoder option 'foo'"),
        ({}, "encoder.system=5", "5 is not text"),
        ({}, "data.fps=29.97", "frames to hold at once"),
        ({}, "memory.count_text=true", "below the"),
        ({}, "memory.max_text_tokens=1", "the limit is 1"),
        ({"question": "<|im_end|>"}, "max_new_tokens=3", "question '1': the text"),
        ({"time_s": math.nan}, "max_new_tokens=3", "time_s is nan"),
        ({"options": [None, "b"]}, "max_new_tokens=3", "every option must be a text"),
        ({"options": [["a"], ["b"]]}, "max_new_tokens=3", "every option must be a text"),
    ],
)
def test_an_evaluation_in_which_every_answer_would_fail_does_not_begin(
    video: Path,
    nano_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    override: str,
    message: str,
) -> None:
    assert evaluation(tmp_path, nano_folder, [question(video, **changes)], override) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "eval").exists()


def test_a_question_after_the_end_of_its_clip_fails(
    video: Path, nano_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [question(video), question(video, id="late", time_s=1000)]
    assert evaluation(tmp_path, nano_folder, rows) == 0
    assert "late: asked at 1000 s, the clip ends at" in capsys.readouterr().out
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    assert [f["question"] for f in summary["failed"]] == ["late"]


def test_damaged_files_of_an_evaluation(
    video: Path, nano_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluation(tmp_path, nano_folder, [question(video)]) == 0
    folder = tmp_path / "eval"
    for name, content in (
        ("identity.json", b"x"),
        ("identity.json", b"[1]"),
        ("results-rank0.jsonl", b"\xff\xfe\0\n\n"),
    ):
        held = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        assert evaluation(tmp_path, nano_folder, [question(video)]) == 2, (name, content)
        (folder / name).write_bytes(held)
    for content in (b"x", b"[]", b"{}", b'{"rows": 5, "failed": []}', b'{"rows": [{}], "failed": []}'):
        (folder / "summary.json").write_bytes(content)
        assert main(["report", "--eval", str(folder), "--out", str(tmp_path / "r.html")]) == 2, content
    assert "Traceback" not in capsys.readouterr().err


# Sessions, adapters, checkpoints -------------------------------------------------------------------------------------


@pytest.fixture
def session(video: Path, nano_session: StreamingModel) -> StreamSession:
    with read_windows(video, fps=2.0, window_s=2.0) as windows:
        session = StreamSession(nano_session, MemorySpec(budget=32, chunk_tokens=64), windows.info)
        for window in windows:
            session.feed(window)
    return session


@pytest.mark.parametrize(("asked", "tokens"), [("", 5), (" \n", 5), (None, 5), ("q", 0), ("q", -5), ("q", "5")])
def test_questions_that_ask_nothing(session: StreamSession, asked: Any, tokens: Any) -> None:
    with pytest.raises(UserError):
        session.ask(asked, tokens)


def test_sessions_that_cannot_be_written(session: StreamSession, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere" / "s"):
        with pytest.raises(UserError, match="cannot write the session"):
            session.save(path)


def test_a_rate_is_a_number(nano_session: StreamingModel) -> None:
    with pytest.raises(UserError, match="fps is '2'"):
        StreamSession(nano_session, MemorySpec(), INFO, "2")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        lambda w: replace(w, frames=None),
        lambda w: replace(w, frames=w.frames[..., 0]),
        lambda w: replace(w, frames=w.frames.astype(np.float32)),
        lambda w: replace(w, frames=np.concatenate([w.frames] * 2)),
        lambda w: replace(w, samples=None),
        lambda w: replace(w, samples=np.stack([w.samples] * 2)),
        lambda w: replace(w, samples=(w.samples * 32767).astype(np.int16)),
        lambda w: replace(w, samples=w.samples * np.nan),
        lambda w: replace(w, samples=np.concatenate([w.samples] * 2)),
    ],
    ids=["no frames", "grey", "float", "twice the frames", "no sound", "stereo", "int16", "nan", "twice the sound"],
)
def test_windows_that_are_none(nano_session: StreamingModel, change: Callable[[MediaWindow], MediaWindow]) -> None:
    session = StreamSession(nano_session, MemorySpec(), INFO, 2.0)
    first, second, *_ = omni_clips.Clip(8.0, 2.0).windows(2.0)
    session.feed(first)
    with pytest.raises(UserError, match="cannot be taken in"):
        session.feed(change(second))


@pytest.mark.parametrize(
    "lost",
    ["offset", "layer.0.keys", "layer.1.", "encoder.", "pending.embeds", "about.fps", "about.spec", "about.info"],
)
def test_sessions_with_a_part_missing(
    session: StreamSession, nano_session: StreamingModel, tmp_path: Path, lost: str
) -> None:
    session.save(tmp_path / "s")
    with safe_open(str(tmp_path / "s"), "pt") as file:
        about = json.loads(file.metadata()["omnimem_session"])
        tensors = {k: file.get_tensor(k) for k in file.keys() if not k.startswith(lost)}  # noqa: SIM118
    about.pop(lost.removeprefix("about."), None)
    save_file(tensors, str(tmp_path / "s"), metadata={"omnimem_session": json.dumps(about)})
    with pytest.raises(UserError, match="is damaged"):
        StreamSession.load(tmp_path / "s", nano_session)


def test_checkpoints_that_are_damaged(nano_folder: Path, tmp_path: Path) -> None:
    weights = (nano_folder / "model.safetensors").read_bytes()
    for name, content in (
        ("model.safetensors", weights[:-100]),
        ("model.safetensors", b"x"),
        ("tokenizer.json", b"x"),
        ("config.json", b'{"model_type": ["x"]}'),
    ):
        shutil.copytree(nano_folder, tmp_path / "model", dirs_exist_ok=True)
        (tmp_path / "model" / name).write_bytes(content)
        with pytest.raises(UserError):
            load_model(tmp_path / "model", device="cpu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("left", [[], ["vocab.json"], ["merges.txt"]], ids=str)
def test_a_checkpoint_without_a_vocabulary(nano_folder: Path, tmp_path: Path, kind: str, left: list[str]) -> None:
    folder = tmp_path / "model"
    if kind == "omni":
        shutil.copytree(nano_folder, folder)
    else:
        make_tiny_salmonn(folder, backbone=kind)
    split_tokenizer(folder)
    for name in {"vocab.json", "merges.txt"} - set(left):
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json, nor vocab.json with merges.txt"):
        load_model(folder, device="cpu")


def test_a_vocabulary_in_two_files_is_one(nano_folder: Path, nano_session: StreamingModel, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(nano_folder, folder)
    split_tokenizer(folder)
    text = "what is the dog doing?<|im_end|>"
    assert load_model(folder, device="cpu").tokenizer.encode(text) == nano_session.tokenizer.encode(text)


def split_tokenizer(folder: Path) -> None:
    """The vocabulary as vocab.json and merges.txt in place of tokenizer.json."""
    content = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(content["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in content["merges"]))
    (folder / "tokenizer.json").unlink()


def test_a_list_of_broken_files_that_is_damaged(tmp_path: Path) -> None:
    for content in ("x\n", "5\n", "{}\n"):
        (tmp_path / "broken").write_text(content)
        with pytest.raises(UserError, match="is damaged"):
            BrokenMedia(1, tmp_path / "broken")


@pytest.mark.parametrize("workers", [0, 1])
def test_training_on_broken_files_alone_ends(
    nano_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "m.json").write_text(json.dumps([entry(tmp_path / "text.mp4")]))
    data = f"data: {{manifest: {tmp_path / 'm.json'}, max_broken: 5, workers: {workers}}}"
    assert main(["train", str(recipe(tmp_path, nano_folder, data))]) == 2
    assert "all 1 clips are broken" in capsys.readouterr().err


def test_an_adapter_without_facts_or_settings(tmp_path: Path, nano_session: StreamingModel) -> None:
    MemorySpec().save(tmp_path / "memory.json")
    content = json.loads((tmp_path / "memory.json").read_text())
    for about in (None, []):
        (tmp_path / "memory.json").write_text(json.dumps(content | {"about": about}))
        with pytest.raises(UserError, match="belongs to another"):
            adapter_memory(tmp_path)
    save_file({"a": torch.zeros(1)}, str(tmp_path / "adapter_model.safetensors"))
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match="holds no JSON object"):
        load_adapter(nano_session, tmp_path)


# Commands ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["tiny", "FILE"],
        ["tiny", "FILE/x"],
        ["tiny", "NEW", "--size", "nano", "--seed", "-1"],
        ["train", "TRAIN", "train.output=FILE"],
        ["train", "TRAIN", "train.output=FILE/x"],
        ["ask", "VIDEO", "", "--model", "MODEL"],
        ["ask", "VIDEO", "q", "--model", "MODEL", "--max-new-tokens", "0"],
        ["ask", "VIDEO", "q", "--model", "MODEL", "--save", "NEW/x"],
        ["ask", "VIDEO", "q", "--model", "MODEL", "--fps", "0"],
        ["ask", "VIDEO", "q", "--model", "MODEL", "--encoder", "max_pixels=abc"],
    ],
    ids=lambda a: " ".join(a),
)
def test_commands_end_with_a_message_and_2(
    video: Path, nano_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "m.json").write_text(json.dumps([entry(video)]))
    train = recipe(tmp_path, nano_folder, f"data: {{manifest: {tmp_path / 'm.json'}, workers: 0}}")
    names = {"VIDEO": video, "MODEL": nano_folder, "FILE": tmp_path / "file", "NEW": tmp_path / "new", "TRAIN": train}
    for name, path in names.items():
        arguments = [a.replace(name, str(path)) for a in arguments]
    assert main(arguments) == 2
    assert "error: " in capsys.readouterr().err


def test_an_interrupt_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("omnimem_train.cli._selectors", interrupted)
    assert main(["selectors"]) == 130
    assert capsys.readouterr().err.startswith("interrupted")
