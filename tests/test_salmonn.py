"""video-SALMONN 2+ without recorded numbers: files, errors, samples the public code fails on, batches, windows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from salmonn_golden import ByteTokenizer, largest
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from omnimem_train.errors import UserError
from omnimem_train.models.salmonn import (
    Clip,
    Sampling,
    VideoSalmonn2Config,
    VideoSalmonn2ForConditionalGeneration,
    VideoSalmonn2Model,
    VideoSalmonn2Processor,
    adapter,
    export_adapter,
    files,
    import_adapter,
    media,
    merge_adapter,
)
from omnimem_train.models.salmonn.layout import audio_groups
from omnimem_train.models.salmonn.positions import Marks, VideoGrid, positions, ticks

BACKBONES = ("qwen2_5_vl", "qwen3_vl")
SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|video_pad|>",
    "<|audio_pad|>",
    "<|endoftext|>",
)
IDS = {name: 256 + i for i, name in enumerate(SPECIAL)}
ROLES = {"system": 263, "user": 264, "assistant": 265}
MARKS = Marks(IDS["<|video_pad|>"], IDS["<|audio_pad|>"], IDS["<|vision_start|>"], IDS["<|vision_end|>"])
TOKENIZER = ByteTokenizer({"special_ids": IDS, "role_ids_right_after_im_start": ROLES})


def tiny_config(backbone: str, **changed: Any) -> VideoSalmonn2Config:
    old = backbone == "qwen2_5_vl"
    text: dict[str, Any] = {
        "vocab_size": 272,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e3, "mrope_section": [4, 2, 2]},
        "bos_token_id": None,
        "eos_token_id": IDS["<|im_end|>"],
    } | ({} if old else {"head_dim": 16})
    vision: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 24,
        "out_hidden_size": 32,
    }
    vision |= (
        {"fullatt_block_indexes": [1]} if old else {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    )
    audio = {
        "d_model": 16,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "encoder_layers": 1,
        "num_mel_bins": 128,
        "qformer_config": {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "intermediate_size": 24,
        },
    }
    return VideoSalmonn2Config(
        backbone=backbone,
        text_config=text,
        vision_config=vision,
        audio_config=audio,
        video_token_id=MARKS.video,
        audio_token_id=MARKS.audio,
        vision_start_token_id=MARKS.start,
        vision_end_token_id=MARKS.end,
        **changed,
    )


def tiny_model(backbone: str, **changed: Any) -> VideoSalmonn2ForConditionalGeneration:
    torch.manual_seed(0)
    model = VideoSalmonn2ForConditionalGeneration(tiny_config(backbone, **changed)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(std=p[0].numel() ** -0.5)
    return model


@pytest.fixture(scope="session", params=BACKBONES)
def model(request: pytest.FixtureRequest) -> VideoSalmonn2ForConditionalGeneration:
    """Shared by all tests: leave it as it is."""
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def old_model() -> VideoSalmonn2ForConditionalGeneration:
    return tiny_model("qwen2_5_vl")


@pytest.fixture(scope="session")
def folder(old_model: VideoSalmonn2ForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published folder. Do not write into it."""
    path = tmp_path_factory.mktemp("salmonn")
    old_model.save_pretrained(path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def clip(frames: int, seed: int, sound_s: float | None = None) -> Clip:
    rng = np.random.default_rng(seed)
    pictures = torch.from_numpy(rng.integers(0, 256, (frames, 3, 64, 90), dtype=np.uint8))
    samples = None if sound_s is None else rng.standard_normal(int(16000 * sound_s)).astype(np.float32) / 10
    return Clip.taken(pictures, np.arange(frames), frames, 1.0, samples)


def sample(model: Any, text: str, *clips: Clip, sounds: tuple[np.ndarray, ...] = (), reply: str = "") -> dict[str, Any]:
    process = VideoSalmonn2Processor(TOKENIZER, model.config, Sampling(1.0, 1, 8, 6000, 784))
    messages = [{"role": "user", "content": text}] + ([{"role": "assistant", "content": reply}] if reply else [])
    made = process(messages, clips, sounds)
    return {k: v for k, v in made.items() if k != "audio_lengths" and (k != "labels" or reply)}


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Tensor:
    return model(**inputs, **kwargs).logits


# --- files


@pytest.mark.parametrize("published", [True, False])
def test_saved_folder_loads_to_the_same_model(model: Any, published: bool, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, published=published)
    again = VideoSalmonn2ForConditionalGeneration.from_pretrained(tmp_path)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    for name in ("backbone", "position_scheme", "audio_token_id", "video_token_id"):
        assert getattr(again.config, name) == getattr(model.config, name)


def test_auto_classes_know_the_model_type(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, published=False)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), VideoSalmonn2Config)
    assert isinstance(AutoModel.from_pretrained(tmp_path), VideoSalmonn2Model)
    assert isinstance(AutoModelForImageTextToText.from_pretrained(tmp_path), VideoSalmonn2ForConditionalGeneration)


def test_published_folder_has_the_old_layout(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("qwen2_5_vl", ["video_SALMONN2_plus"])
    assert config["hidden_size"] == 32
    assert config["rope_scaling"]["mrope_section"] == [4, 2, 2]
    heads = {k.split(".")[0] for k in load_file(folder / "model.safetensors")}
    assert heads == {"model", "visual", "audio", "lm_head"}


def test_key_names_convert_both_ways(model: Any) -> None:
    keys = list(model.state_dict())
    published = [files.published_key(k, model.config.backbone) for k in keys]
    assert len(set(published)) == len(keys)
    assert [files.our_key(k) for k in published] == keys


def test_tied_output_matrix_is_not_stored(tmp_path: Path) -> None:
    model = tiny_model("qwen2_5_vl", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = VideoSalmonn2ForConditionalGeneration.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.language_model.embed_tokens.weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_bfloat16_keeps_integer_buffers(folder: Path) -> None:
    model = VideoSalmonn2ForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    buffer = model.model.audio.qformer.bert.embeddings.position_ids
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(buffer, torch.arange(512)[None])
    assert logits(model, sample(model, "<video>?", clip(2, 0, 1.0))).isfinite().all()


def edit_config(folder: Path, change: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_weights(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


def load(folder: Path) -> Any:
    return VideoSalmonn2ForConditionalGeneration.from_pretrained(folder)


def test_stock_folder_is_refused(copy: Path) -> None:
    edit_config(copy, lambda c: c.pop("audio_config"))
    with pytest.raises(UserError, match="no audio_config"):
        load(copy)


def test_other_model_type_is_refused(copy: Path) -> None:
    edit_config(copy, lambda c: c.update(model_type="llama"))
    with pytest.raises(UserError, match="'llama'"):
        load(copy)


@pytest.mark.parametrize("name", ["out_hidden_size", "encoder_width"])
def test_qformer_that_does_not_fit_its_neighbours_is_refused(copy: Path, name: str) -> None:
    edit_config(copy, lambda c: c["audio_config"]["qformer_config"].update({name: 40}))
    with pytest.raises(UserError, match=f"{name} is 40"):
        load(copy)


def test_qformer_of_another_size_than_its_weights_is_refused(copy: Path) -> None:
    edit_config(copy, lambda c: c["audio_config"]["qformer_config"].update(intermediate_size=28))
    with pytest.raises(UserError, match=r"2 of another size|3 of another size") as error:
        load(copy)
    assert "intermediate_query.dense.weight: (24, 16) in the file, (28, 16) here" in str(error.value)


def test_missing_and_surplus_keys_are_listed(copy: Path) -> None:
    def change(state: dict[str, Tensor]) -> None:
        state["audio.q_extra"] = state.pop("audio.q_tokens")
        del state["model.layers.1.self_attn.k_proj.bias"]

    edit_weights(copy, change)
    with pytest.raises(UserError) as error:
        load(copy)
    for text in ("2 missing", "audio.q_tokens", "layers.1.self_attn.k_proj.bias", "1 surplus", "audio.q_extra"):
        assert text in str(error.value)


def test_missing_output_matrix_is_an_error_unless_it_is_tied(copy: Path) -> None:
    edit_weights(copy, lambda state: state.pop("lm_head.weight"))
    with pytest.raises(UserError, match=r"1 missing: lm_head\.weight"):
        load(copy)


def test_unknown_scheme_and_backbone_are_refused(model: Any) -> None:
    with pytest.raises(UserError, match="position scheme 'stock'"):
        tiny_config(model.config.backbone, position_scheme="stock")
    with pytest.raises(UserError, match="position scheme 'stock'"):
        model.get_rope_index(torch.zeros(1, 3, dtype=torch.int64), position_scheme="stock")
    with pytest.raises(UserError, match="backbone 'llama'"):
        VideoSalmonn2Config(backbone="llama")


# --- samples


def test_sample_without_media_works(model: Any) -> None:
    inputs = sample(model, "Hello.", reply="Hi.")
    out = model(**inputs)
    assert torch.equal(model.get_rope_index(inputs["input_ids"])[0][0, 0], torch.arange(inputs["input_ids"].shape[1]))
    assert out.loss.isfinite()
    assert (inputs["labels"] != -100).sum() == len("Hi.") + 2


def test_loss_is_the_mean_over_the_reply(model: Any) -> None:
    inputs = sample(model, "<video>?", clip(4, 1, 2.0), reply="Beep.")
    out = model(**inputs)
    labels = inputs["labels"][0]
    at = (labels != -100).nonzero().flatten()
    expected = torch.nn.functional.cross_entropy(out.logits[0, at - 1], labels[at])
    assert largest(out.loss, expected) < 1e-5


@pytest.mark.parametrize("scheme", [None, "generation"])
def test_two_videos_with_sounds_and_a_sound(model: Any, scheme: str | None) -> None:
    if scheme and model.config.backbone != "qwen2_5_vl":
        pytest.skip("one scheme only")
    first, second = clip(4, 1, 3.0), clip(5, 2)
    sound = np.zeros(16000 * 31, dtype=np.float32)
    inputs = sample(model, "<video> then <video> and <audio>.", first, second, sounds=(sound,))
    assert inputs["video_grid_thw"][:, 0].tolist() == [2, 3]
    assert inputs["audio_feature"].shape[0] == 3
    assert (inputs["input_ids"] == MARKS.audio).sum() == 180
    made = logits(model, inputs, position_scheme=scheme)
    assert made.isfinite().all()
    # The second picture changes what comes after it and nothing before.
    other = sample(model, "<video> then <video> and <audio>.", first, clip(5, 3), sounds=(sound,))
    change = (made - logits(model, other, position_scheme=scheme)).abs().amax(-1)[0]
    begin = (inputs["input_ids"][0] == MARKS.start).nonzero().flatten()
    where = begin[1] if model.config.backbone == "qwen2_5_vl" else begin[2]
    assert change[: where + 1].max() < 1e-5
    assert change[where + 1 :].max() > 1e-3


def test_sound_shorter_than_the_picture() -> None:
    groups = audio_groups(60, 80, 0.5)
    assert groups == [1] * 60 + [0] * 20
    grid = VideoGrid(80, 1, 1, 0.5)
    ids = [MARKS.start]
    for share in groups:
        ids += [MARKS.video] + [MARKS.audio] * share
    index, _ = positions(torch.tensor([[*ids, MARKS.end, 7]]), [grid], MARKS, "training")
    # Pictures keep their own ticks after the sound has ended, and text goes on after the last of them.
    assert index[0, 0, -5:].tolist() == [78, 79, 80, 81, 82]


def test_ticks_are_float32() -> None:
    assert ticks(384, 0.21).tolist() != [int(2 * (k * 0.21)) for k in range(384)]


def test_text_between_two_blocks_follows_the_largest_index() -> None:
    tall = VideoGrid(1, 9, 1, 1.0)
    block = [MARKS.start, *[MARKS.video] * 9, MARKS.audio, MARKS.end]
    index, delta = positions(torch.tensor([[*block, 5, *block, 6]]), [tall, tall], MARKS, "training")
    time = index[0, 0].tolist()
    assert time[11:13] == [10, 11]
    assert time[-2:] == [14, 15]
    assert delta.item() == int(index.max()) + 1 - index.shape[-1]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_mel_and_pixels_only_of_what_is_there(backbone: str) -> None:
    config = tiny_config(backbone)
    process = VideoSalmonn2Processor(TOKENIZER, config)
    made = process([{"role": "user", "content": "<audio>?"}], audios=[np.zeros(10, dtype=np.float32)])
    assert set(made) == {"input_ids", "attention_mask", "labels", "audio_feature", "audio_lengths"}
    assert made["audio_lengths"].tolist() == [60]


def test_marks_without_media_and_media_without_marks_are_refused(model: Any) -> None:
    for text, clips, sounds in (
        ("<video>", (), ()),
        ("<audio>", (), ()),
        ("nothing", (clip(2, 0),), ()),
        ("nothing", (), (np.zeros(9, dtype=np.float32),)),
    ):
        with pytest.raises(UserError, match="mark"):
            sample(model, text, *clips, sounds=sounds)


def test_marks_in_a_reply_are_text(model: Any) -> None:
    inputs = sample(model, "Which tag?", reply="<video>")
    assert "pixel_values_videos" not in inputs
    assert (inputs["labels"] != -100).sum() == len("<video>") + 2


def test_tokenizer_that_does_not_know_a_mark_is_refused(old_model: Any) -> None:
    lacking = ByteTokenizer(
        {"special_ids": {**IDS, "<|audio_pad|>": 270}, "role_ids_right_after_im_start": ROLES}
    )  # fmt: skip
    process = VideoSalmonn2Processor(lacking, old_model.config)
    with pytest.raises(UserError, match="0 tokens with id 261"):
        process([{"role": "user", "content": "<audio>"}], audios=[np.zeros(9, dtype=np.float32)])


def test_media_that_do_not_fit_the_ids_are_refused(model: Any) -> None:
    inputs = sample(model, "<video>?", clip(4, 1, 3.0))
    with pytest.raises(UserError, match="audio tokens in the ids"):
        model(**inputs | {"audio_feature": inputs["audio_feature"].repeat(2, 1, 1)})
    grid = inputs["video_grid_thw"] + torch.tensor([[1, 0, 0]])
    with pytest.raises(UserError, match="video tokens for a video of 3 pairs"):
        model(**inputs | {"video_grid_thw": grid})
    with pytest.raises(UserError, match="video tokens for a video of 2 pairs"):
        model.get_rope_index(inputs["input_ids"], inputs["video_grid_thw"] + torch.tensor([[0, 2, 0]]))
    with pytest.raises(UserError, match="without a video"):
        model.get_rope_index(inputs["input_ids"])
    with pytest.raises(UserError, match="more videos than blocks"):
        model.get_rope_index(inputs["input_ids"], inputs["video_grid_thw"].repeat(2, 1))
    with pytest.raises(UserError, match="1 values of seconds"):
        model.get_rope_index(inputs["input_ids"], inputs["video_grid_thw"].repeat(2, 1), [1.0])


def test_frames_too_long_and_thin_are_refused(old_model: Any) -> None:
    process = VideoSalmonn2Processor(TOKENIZER, old_model.config)
    with pytest.raises(UserError, match="9x2000"):
        process.pictures(torch.zeros(2, 3, 2000, 9, dtype=torch.uint8))


def test_clip_without_times_is_refused_where_they_are_written() -> None:
    process = VideoSalmonn2Processor(TOKENIZER, tiny_config("qwen3_vl"))
    with pytest.raises(UserError, match="0 times"):
        process([{"role": "user", "content": "<video>"}], [Clip(clip(2, 0).frames)])


# --- one pass, several passes


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_single_samples(model: Any, side: str) -> None:
    singles = [sample(model, "<video> what?", clip(4, 1, 3.0)), sample(model, "<video>?", clip(3, 2))]
    n = max(s["input_ids"].shape[1] for s in singles)

    def pad(x: Tensor) -> Tensor:
        by = n - x.shape[1]
        return torch.nn.functional.pad(x, (by, 0) if side == "left" else (0, by))

    names = ("pixel_values_videos", "video_grid_thw", "audio_feature")
    batch = {k: torch.cat([s[k] for s in singles if k in s]) for k in names}
    batch["second_per_grid_ts"] = [s["second_per_grid_ts"][0] for s in singles]
    batch |= {k: torch.cat([pad(s[k]) for s in singles]) for k in ("input_ids", "attention_mask")}
    made = logits(model, batch)
    for row, single in enumerate(singles):
        real = batch["attention_mask"][row].bool()
        assert largest(made[row, real], logits(model, single)[0]) < 1e-4
    tokens = (
        model.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0)[:, n:] if side == "left" else None
    )
    for row, single in enumerate(singles if tokens is not None else []):
        alone = model.generate(**single, max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert torch.equal(alone[0, single["input_ids"].shape[1] :], tokens[row])


def test_decoding_with_cache_equals_one_pass(model: Any) -> None:
    inputs = sample(model, "<video>?", clip(4, 1, 3.0))
    made = model.generate(
        **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True,
        pad_token_id=0,
    )  # fmt: skip
    whole = inputs | {"input_ids": made.sequences, "attention_mask": torch.ones_like(made.sequences)}
    assert largest(torch.stack(made.logits, 1), logits(model, whole)[:, -5:-1]) < 1e-4


def test_several_sequences_from_a_prompt_with_media_are_refused(model: Any) -> None:
    with pytest.raises(UserError, match="2 beams"):
        model.generate(**sample(model, "<video>?", clip(2, 1)), num_beams=2, max_new_tokens=2)


def test_encoding_pair_by_pair_and_window_by_window_is_exact(model: Any) -> None:
    inputs = sample(model, "<video>?", clip(6, 1, 65.0))
    grid, pixels, mel = inputs["video_grid_thw"], inputs["pixel_values_videos"], inputs["audio_feature"]
    with torch.no_grad():
        whole = model.model.encode_video(pixels, grid)
        one = grid.clone()
        one[:, 0] = 1
        parts = [model.model.encode_video(p, one) for p in pixels.chunk(int(grid[0, 0]))]
        assert largest(torch.cat([p.rows for p in parts]), whole.rows) < 1e-5
        for at, rows in enumerate(whole.deepstack):
            assert largest(torch.cat([p.deepstack[at] for p in parts]), rows) < 1e-5
        sounds = [model.model.encode_audio(w[None]) for w in mel]
        assert largest(torch.cat(sounds), model.model.encode_audio(mel)) < 1e-5


def test_log_mel_of_a_window_does_not_depend_on_the_others(old_model: Any) -> None:
    process = VideoSalmonn2Processor(TOKENIZER, old_model.config)
    loud = clip(2, 1, 40.0).samples
    assert loud is not None
    quiet = np.concatenate([loud[: 30 * 16000] / 1000, loud[30 * 16000 :]])
    assert largest(process.log_mel(loud)[1], process.log_mel(quiet)[1]) == 0


def test_gradients_reach_decoder_and_audio(model: Any) -> None:
    inputs = sample(model, "<video>?", clip(2, 1, 3.0), reply="Yes.")
    model.zero_grad()
    model(**inputs).loss.backward()
    language, audio = model.model.language_model, model.model.audio
    assert language.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0
    assert audio.q_tokens.grad.abs().max() > 0
    assert model.model.visual.blocks[0].attn.qkv.weight.grad.abs().max() > 0
    model.zero_grad()


# --- frames


def test_short_clips_are_shown_larger_and_within_the_limits() -> None:
    sampling = Sampling()
    rules = VideoSalmonn2Processor(TOKENIZER, tiny_config("qwen2_5_vl")).rules
    assert media.pixel_budget(768, sampling) == 61250
    assert media.pixel_budget(100, sampling) == pytest.approx(446880)
    height, width = media.resized(1080, 1920, 768, sampling, rules)
    assert height * width <= 61250
    assert (height % 28, width % 28) == (0, 0)


def test_pixel_limits_of_a_whole_clip_count_whole_pairs() -> None:
    rules = VideoSalmonn2Processor(TOKENIZER, tiny_config("qwen3_vl")).rules
    sampling = Sampling(1.0, 1, 8, 64 * 64, 784)
    # Seven frames count as eight when tested against the limit of seven.
    assert [media.resized(72, 64, n, sampling, rules) for n in (6, 7)] == [(64, 64), (64, 32)]


def test_sound_without_samples_is_a_window_of_silence() -> None:
    assert [len(w) for w in media.windows(np.zeros(0, dtype=np.float32))] == [16000]


def test_patches_are_in_merge_order() -> None:
    rules = VideoSalmonn2Processor(TOKENIZER, tiny_config("qwen2_5_vl")).rules
    frames = torch.zeros(1, 3, 56, 56, dtype=torch.uint8)
    frames[0, 1, 14:28, 28:42] = 255  # patch row 1, column 2: third patch of the second block
    rows, grid = media.patches(frames, rules)
    assert grid == (1, 4, 4)
    lit = (rows.view(16, 3, 2, 14, 14)[:, 1] > 1).flatten(1).all(1)
    assert lit.nonzero().flatten().tolist() == [4 + 2]


# --- adapters


@pytest.fixture(scope="session")
def lora(old_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter in the published layout. Do not write into it."""
    path = tmp_path_factory.mktemp("lora")
    torch.manual_seed(1)
    state = {}
    for key, value in old_model.state_dict().items():
        name = adapter.PREFIX + files.published_key(key, "qwen2_5_vl").removesuffix(".weight")
        if key.startswith("model.language_model.layers") and name.endswith(("q_proj", "v_proj")):
            state[f"{name}.lora_A.weight"] = torch.randn(2, value.shape[1])
            state[f"{name}.lora_B.weight"] = torch.randn(value.shape[0], 2)
        if key.startswith("model.audio.audio_proj"):
            state[adapter.PREFIX + files.published_key(key, "qwen2_5_vl")] = torch.randn_like(value)
    save_file(state, path / adapter.WEIGHTS)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 6,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
        "modules_to_save": ["audio.q_tokens", "audio.audio_proj"],
        "base_model_name_or_path": "some/model",
    }
    (path / adapter.CONFIG).write_text(json.dumps(config))
    return path


def test_merged_adapter_equals_peft_and_survives_both_conversions(
    old_model: Any, folder: Path, lora: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    merged = load(folder).eval()
    merge_adapter(merged, lora)
    inputs = sample(merged, "<video>?", clip(4, 1, 3.0))
    want = logits(merged, inputs)
    assert largest(want, logits(old_model, inputs)) > 0.1
    import_adapter(lora, tmp_path / "ours")
    wrapped = PeftModel.from_pretrained(load(folder), tmp_path / "ours").eval()
    assert not [n for n, _ in wrapped.named_parameters() if "lora" in n and "language_model" not in n]
    assert largest(logits(wrapped, inputs), want) < 1e-4
    wrapped.save_pretrained(tmp_path / "saved")
    export_adapter(tmp_path / "saved", tmp_path / "back", "qwen2_5_vl")
    before, after = (load_file(p / adapter.WEIGHTS) for p in (lora, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    config = json.loads((tmp_path / "back" / adapter.CONFIG).read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["modules_to_save"] == ["audio.audio_proj"]
    assert (config["r"], config["lora_alpha"]) == (2, 6)


def test_adapter_of_another_size_is_refused_and_changes_nothing(lora: Path) -> None:
    text = tiny_config("qwen2_5_vl").text_config.to_dict()
    for change in ({"num_hidden_layers": 4}, {"num_hidden_layers": 2}, {"num_key_value_heads": 2}):
        config = tiny_config("qwen2_5_vl")
        config.text_config = AutoConfig.for_model(**{**text, **change, "layer_types": None})
        model = VideoSalmonn2ForConditionalGeneration(config)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(UserError, match="does not fit the model"):
            merge_adapter(model, lora)
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_incomplete_adapters_are_refused(old_model: Any, lora: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no {adapter.CONFIG}"):
        merge_adapter(old_model, tmp_path)
    torn = Path(shutil.copytree(lora, tmp_path / "torn"))
    state = load_file(torn / adapter.WEIGHTS)
    state.pop(next(k for k in state if "lora_A" in k))
    save_file(state, torn / adapter.WEIGHTS)
    with pytest.raises(UserError, match="A or B is missing"):
        merge_adapter(old_model, torn)
    config = json.loads((torn / adapter.CONFIG).read_text())
    (torn / adapter.CONFIG).write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(UserError, match="use_dora"):
        merge_adapter(old_model, torn)
