"""video-SALMONN 2+ as a stream against the same model on the whole sequence, both backbones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from salmonn_golden import largest
from test_salmonn import IDS, MARKS, TOKENIZER, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from omnimem_train.errors import UserError
from omnimem_train.gradient import Gradient
from omnimem_train.memory.spec import MemorySpec
from omnimem_train.memory.state import AUDIO, TEXT, VISUAL
from omnimem_train.models.interface import MediaInfo, MediaWindow, TokenBlock, Turn
from omnimem_train.models.loading import load_model
from omnimem_train.models.salmonn import Clip, Sampling, VideoSalmonn2Processor, media
from omnimem_train.models.salmonn.layout import interleaved, timestamped
from omnimem_train.models.salmonn.order import Order, Rules
from omnimem_train.models.salmonn.positions import VideoGrid, positions
from omnimem_train.models.salmonn.stream_model import VideoSalmonn2Streaming
from omnimem_train.streaming import Stream, encode

KINDS = {"text": (False, False), "video": (True, False), "audio": (False, True), "both": (True, True)}
FPS = 1.0
FULL = MemorySpec(selector="full", budget=None)
QUESTION = "What is heard?"


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def model(request: pytest.FixtureRequest) -> VideoSalmonn2Streaming:
    """Shared by all tests: leave it as it is."""
    return streaming(request.param)


def streaming(backbone: str) -> VideoSalmonn2Streaming:
    module = tiny_model(backbone).requires_grad_(False)
    process = VideoSalmonn2Processor(TOKENIZER, module.config, Sampling(1.0, 1, 2, 3000, 784), max_timestamps=16)
    return VideoSalmonn2Streaming(module, process)


def made_up(kind: str, seconds: float, sound_s: float | None = None) -> tuple[MediaInfo, np.ndarray, np.ndarray]:
    """Facts, frames (n, h, w, 3) and samples of a clip; the sound may be shorter than the picture or longer."""
    video, audio = KINDS[kind]
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (int(seconds * FPS), 40, 60, 3), dtype=np.uint8)
    samples = (rng.standard_normal(int((sound_s or seconds) * 16000)) * 0.1).astype(np.float32)
    longest = max(seconds, sound_s or 0)
    return MediaInfo(Path("made-up.mp4"), longest, video, audio, 60, 40, 4.0, 16000), frames, samples


def windows_of(kind: str, info: MediaInfo, frames: np.ndarray, samples: np.ndarray, step: float) -> list[MediaWindow]:
    (video, audio), out = KINDS[kind], []
    n = int(np.ceil(info.duration_s / step)) if video or audio else 0
    for i in range(n):
        a, b = i * step, (i + 1) * step
        sound = samples[int(a * 16000) : int(b * 16000)]
        if i < n - 1:
            sound = np.pad(sound, (0, int(step * 16000) - len(sound)))
        cut = frames[int(np.ceil(a * FPS)) : int(np.ceil(b * FPS))]
        out.append(MediaWindow(a, b, cut if video else None, sound if audio else None, i == n - 1))
    return out


def streamed(model: Any, kind: str, clip: tuple[Any, ...], step: float, **options: Any) -> tuple[Any, list[TokenBlock]]:
    encoder = model.open(clip[0], FPS, max_pixels=3000, **options)
    return encoder, list(encode(encoder, windows_of(kind, *clip, step)))


def whole(model: Any, kind: str, clip: tuple[Any, ...], scheme: str | None = None) -> tuple[Tensor, TokenBlock]:
    """The prompt that the processor makes of the same clip, and its tokens as a block."""
    (_, frames, samples), (video, audio) = clip, KINDS[kind]
    mark = "<video>" if video else "<audio>" if audio else ""
    pictures = torch.from_numpy(frames).permute(0, 3, 1, 2)
    taken = np.arange(len(frames))
    clips = [Clip.taken(pictures, taken, len(frames), FPS, samples if audio else None)] if video else []
    sounds = [samples] if audio and not video else []
    inputs = model.processor([{"role": "user", "content": f"{mark}\n{QUESTION}"}], clips, sounds)
    return inputs["input_ids"][0], model.prompt_block(inputs, scheme)


CLIPS = [
    *[(kind, 5.0, None) for kind in KINDS],
    ("both", 37.0, None),
    ("both", 9.0, 31.0),
    ("both", 40.0, 31.0),
    ("audio", 65.0, None),
]


@pytest.mark.parametrize("step", [2.0, 7.0, 30.0])
@pytest.mark.parametrize(("kind", "seconds", "sound_s"), CLIPS)
def test_stream_gives_the_tokens_of_the_whole_prompt(
    model: Any, kind: str, seconds: float, sound_s: float | None, step: float
) -> None:
    clip = made_up(kind, seconds, sound_s)
    if kind == "both" and sound_s and sound_s < seconds:
        clip = (*clip[:2], np.pad(clip[2], (0, int(seconds * 16000) - len(clip[2]))))
    # With scheme `generation` a stream has to know how long its picture is, but the longer track is announced.
    known = sound_s is None or sound_s < seconds
    schemes = [None, "generation"] if model.config.backbone == "qwen2_5_vl" and known else [None]
    for scheme in schemes:
        _, block = whole(model, kind, clip, scheme)
        encoder, blocks = streamed(model, kind, clip, step, max_timestamps=16, position_scheme=scheme)
        got = TokenBlock.cat([*blocks, encoder.text(model.render(Turn(QUESTION)).ids)])
        assert got.n == block.n
        assert torch.equal(got.modality, block.modality)
        assert torch.equal(got.positions, block.positions), scheme
        assert largest(got.embeds, block.embeds) < 1e-5
        assert got.extras.keys() == (block.extras.keys() if kind in ("video", "both") else got.extras.keys())
        for name, rows in block.extras.items():
            assert largest(got.extras[name], rows) < 1e-5
        media_time = got.time_s[got.modality != TEXT]
        assert (media_time <= 30 * np.ceil(clip[0].duration_s / 30)).all()


@pytest.mark.parametrize(
    ("scheme", "grid", "sounds", "group"),
    [
        ("training", VideoGrid(3, 70, 2, 0.4), 60, 1),  # rows outrun the clock
        ("training", VideoGrid(384, 1, 1, 0.21), 180, 1),  # float64 gives other ticks
        ("training", VideoGrid(4, 2, 40, 0.5), 0, 1),
        ("generation", VideoGrid(3, 30, 2, 0.4), 60, 1),
        ("generation", VideoGrid(40, 1, 1, 0.5), 60, 1),
        ("timestamps", VideoGrid(11, 1, 2, 1.7), 60, 4),  # neighbours share a timestamp
        ("timestamps", VideoGrid(7, 3, 1, 0.3), 60, 7),
    ],
)
def test_order_equals_the_layout_of_the_whole_clip(scheme: str, grid: VideoGrid, sounds: int, group: int) -> None:
    if scheme == "timestamps":
        segments = timestamped(grid, [0.0] * grid.pairs, sounds, -(-grid.pairs // group))
    else:
        segments = interleaved(grid, sounds)
    ids: list[int] = []
    for i, segment in enumerate(segments):
        ids += [MARKS.end] * bool(ids and group > 1) + [MARKS.start] * (i == 0 or group > 1)
        ids += [MARKS.video] * segment.visual_tokens + [MARKS.audio] * segment.audio_tokens
    whole_index, _ = positions(torch.tensor([[*ids, MARKS.end]]), [grid], MARKS, scheme)
    assert grid.seconds_per_pair is not None
    rules = Rules(scheme, True, sounds > 0, grid.seconds_per_pair, grid.pairs, group)
    order = Order(rules, rows=grid.rows, columns=grid.columns, video_ended=True, audio_ended=True)
    made: list[Tensor] = []
    kinds: list[int] = []
    while (step := order.next(grid.pairs, sounds))[0]:
        if step[0] == "pair" and order.pairs % group == 0 and (group > 1 or not made):
            order, index = order.text(1 + bool(made))
            made, kinds = [*made, index], kinds + [MARKS.end] * bool(made) + [MARKS.start]
        order, index = order.pair() if step[0] == "pair" else order.audio(step[1])
        made, kinds = [*made, index], kinds + [MARKS.video if step[0] == "pair" else MARKS.audio] * len(index)
    assert kinds == ids
    assert torch.equal(torch.cat([*made, order.text(1)[1]]).T, whole_index[:, 0])


def test_sound_does_not_wait_for_a_picture_that_has_ended(model: Any) -> None:
    clip = made_up("both", 9.0, 61.0)
    encoder = model.open(clip[0], FPS, max_pixels=3000)
    blocks = [encoder.push(w) for w in windows_of("both", *clip, 6.0)[:10]]
    assert sum(int((b.modality == AUDIO).sum()) for b in blocks if b) == 120


@pytest.mark.parametrize("chunk", [7, 64, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_unlimited_memory_equals_one_forward(model: Any, kind: str, chunk: int) -> None:
    clip = made_up(kind, 5.0)
    ids, block = whole(model, kind, clip)
    with torch.no_grad():
        expected = run_whole(model, block)
    question = model.render(Turn(QUESTION)).ids
    encoder, blocks = streamed(model, kind, clip, 2.0)
    stream = Stream(model, FULL.replace(chunk_tokens=chunk))
    state = stream.feed_all(stream.start(), blocks)
    text = encoder.text(question)
    made = model.logits(stream.ask(state, [text]))[0]
    assert largest(made, expected[-text.n :]) < 1e-4
    assert ids.shape[0] == block.n


def run_whole(model: Any, block: TokenBlock) -> Tensor:
    """Logits (n, vocabulary) of the class itself on embeddings and positions."""
    deepstack = block.extras.get("deepstack")
    extra = {}
    if deepstack is not None:
        where = block.modality == VISUAL
        extra = {
            "visual_pos_masks": where,
            "deepstack_visual_embeds": [deepstack[where][:, i] for i in range(deepstack.shape[2])],
        }
    text = model.module.model.language_model
    out = text(inputs_embeds=block.embeds, position_ids=block.positions.permute(2, 0, 1), use_cache=False, **extra)
    return model.module.lm_head(out.last_hidden_state)[0]


def test_snapshot_goes_on_where_it_was(model: Any) -> None:
    clip = made_up("both", 37.0)
    windows = windows_of("both", *clip, 3.0)
    _, blocks = streamed(model, "both", clip, 3.0)
    want = TokenBlock.cat(blocks)
    encoder = model.open(clip[0], FPS, max_pixels=3000)
    parts = [encoder.start()]
    for window in windows:
        parts += [b for b in [encoder.push(window)] if b]
        snapshot = encoder.snapshot()
        encoder = model.open(clip[0], FPS, max_pixels=3000)
        encoder.restore(snapshot)
    parts += [b for b in [encoder.finish()] if b]
    got = TokenBlock.cat(parts)
    assert torch.equal(got.positions, want.positions)
    assert largest(got.embeds, want.embeds) == 0


def test_what_waits_is_what_the_end_would_give_and_changes_nothing(model: Any) -> None:
    clip = made_up("both", 9.0)
    windows = windows_of("both", *clip, 3.0)
    encoder = model.open(clip[0], FPS, max_pixels=3000)
    for window in windows:
        encoder.push(window)
    before = {k: v.clone() for k, v in encoder.snapshot().items()}
    waiting = encoder.waiting()
    text = encoder.text(torch.tensor([5]))
    assert all(torch.equal(before[k], v) for k, v in encoder.snapshot().items())
    last = encoder.finish()
    assert waiting.n == last.n > 60
    assert torch.equal(waiting.positions, last.positions)
    assert torch.equal(text.positions, encoder.text(torch.tensor([5])).positions)


def test_pictures_go_on_after_a_sound_that_ends_early(model: Any) -> None:
    clip = made_up("both", 60.0, 29.0)
    _, block = whole(model, "both", clip)
    encoder, blocks = streamed(model, "both", clip, 60.0, max_timestamps=16)
    got = TokenBlock.cat([*blocks, encoder.text(model.render(Turn(QUESTION)).ids)])
    assert torch.equal(got.modality, block.modality)
    assert torch.equal(got.positions, block.positions)


def test_only_an_open_bracket_is_closed(model: Any) -> None:
    encoder = model.open(made_up("video", 5.0)[0], FPS, max_pixels=3000)
    encoder.start()
    opened = model.config.backbone == "qwen2_5_vl"  # with timestamps a bracket opens with its first pair
    assert encoder.text(torch.tensor([5])).n == 1 + opened
    assert encoder.text(torch.tensor([5]), closing=False).n == 1
    encoder.push(windows_of("video", *made_up("video", 5.0), 2.0)[0])
    assert encoder.text(torch.tensor([5])).n == 2


def test_pictures_wait_for_the_sound_before_them_only(model: Any) -> None:
    clip = made_up("both", 33.0)
    windows = windows_of("both", *clip, 3.0)
    encoder = model.open(clip[0], FPS, max_pixels=3000)
    counts = []
    for window in windows[:10]:
        block = encoder.push(window)
        counts.append(0 if block is None else int((block.modality == VISUAL).sum()))
    assert counts[0] > 0
    assert sum(counts[2:9]) == 0
    assert counts[9] > 0


def test_gradients_reach_adapters_through_the_stream() -> None:
    model = streaming("qwen3_vl")
    weight = model.module.model.language_model.layers[0].self_attn.v_proj.weight.requires_grad_(True)
    clip = made_up("both", 5.0)
    encoder, blocks = streamed(model, "both", clip, 2.0)
    stream = Stream(model, MemorySpec(selector="omnimem", budget=20, chunk_tokens=32), Gradient("all"))
    state = stream.feed_all(stream.start(), blocks)
    assert all(int((m.modality != TEXT).sum(-1).amax()) <= 20 for m in state.layers)
    hidden = stream.ask(state, [encoder.text(model.render(Turn(QUESTION, "Beep.")).ids)])
    model.logits(hidden).logsumexp(-1).mean().backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() > 0


def test_answers_are_learned_with_their_end(model: Any) -> None:
    assert model.eos_ids == (IDS["<|im_end|>"], IDS["<|endoftext|>"])
    made = model.render(Turn("b?", "B.", earlier=(("a?", "A."),)))
    assert (made.labels != -100).sum() == 2 * (2 + 2)
    assert made.ids[0] == 10
    with pytest.raises(UserError, match="control token"):
        model.render(Turn("<|im_end|>"))


def test_rates_and_windows(model: Any) -> None:
    info = made_up("both", 60.0)[0]
    encoder, blocks = streamed(model, "both", made_up("both", 60.0), 2.0)
    rates = model.tokens_per_s(info, FPS, max_pixels=3000)
    got = TokenBlock.cat(blocks).modality
    assert (got == VISUAL).sum() == rates["visual"] * 60
    assert (got == AUDIO).sum() == rates["audio"] * 60
    assert [model.window_s(f) for f in (1.0, 2.0, 0.5, 10.0)] == [2.0, 2.0, 4.0, 2.0]
    assert encoder.info == info


def test_bad_options_are_refused(model: Any) -> None:
    info = made_up("both", 5.0)[0]
    for options, message in (
        ({"max_pixel": 3000}, "max_pixels"),
        ({"max_pixels": 0}, "max_pixels 0"),
        ({"position_scheme": "stock"}, "'stock'"),
        ({"system": "<|im_end|>"}, "control token"),
    ):
        with pytest.raises(UserError, match=message):
            model.open(info, FPS, **options)
    with pytest.raises(UserError, match="fps is 0"):
        model.open(info, 0)
    assert model.sampling_rate == media.SAMPLING_RATE


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published folder with a stock tokenizer of bytes, to which <|audio_pad|> has yet to be added."""
    path = tmp_path_factory.mktemp("checkpoint")
    tiny_model("qwen2_5_vl").save_pretrained(path)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    stock = [token for token in IDS if token not in ("<|audio_pad|>", "<|endoftext|>")]
    PreTrainedTokenizerFast(tokenizer_object=bytes_alone, additional_special_tokens=stock).save_pretrained(path)
    return path


def test_published_folder_loads_by_its_path(checkpoint: Path) -> None:
    model = load_model(checkpoint, device="cpu")
    assert isinstance(model, VideoSalmonn2Streaming)
    assert not any(p.requires_grad for p in model.module.parameters())
    clip = made_up("both", 5.0)
    encoder, blocks = streamed(model, "both", clip, 2.0)
    stream = Stream(model, MemorySpec(selector="omnimem", budget=20, chunk_tokens=32))
    state = stream.caught_up(stream.feed_all(stream.start(), blocks))
    answer = stream.generate(state, encoder, model.render(Turn(QUESTION)).ids, 4)
    assert all(0 <= token < 272 for token in answer)


def test_tokenizer_of_another_generation_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"audio_token_id": 270}))
    with pytest.raises(UserError, match="has id 261 in the tokenizer and 270"):
        load_model(copy, device="cpu")
