"""Qwen2.5-Omni behind the interface, against the stock classes of the installed transformers."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from omni_clips import Clip, run
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AttentionInterface,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from omnimem_train.errors import UserError
from omnimem_train.memory.state import LayerMemory
from omnimem_train.models import attention
from omnimem_train.models.interface import Tap
from omnimem_train.models.loading import ModelConfig, load_model
from omnimem_train.models.qwen2_5_omni import Qwen2_5OmniStreaming
from omnimem_train.models.tiny import SPECIAL, make_tiny


@pytest.fixture(scope="module")
def stock(nano_folder: Path) -> Any:
    return Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(nano_folder, attn_implementation="eager").eval()


def some_tokens(n: int, batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids (batch, n) and rising 3-axis positions (batch, n, 3)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 490, (batch, n), generator=generator)
    return ids, torch.randint(0, 4, (batch, n, 3), generator=generator).cumsum(1)


def layers(model: Any, hidden: Tensor, positions: Tensor, cuts: list[int], mask: Tensor | None = None) -> Tensor:
    """Logits of a sequence run layer by layer in pieces that end at `cuts`; each piece remembers all before it."""
    bounds = [0, *cuts, hidden.shape[1]]
    for layer in range(model.n_layers):
        memory, outs = None, []
        for a, b in pairwise(bounds):
            tap = Tap(memory, mask)
            piece = slice(a, b)
            outs.append(model.run_layer(layer, hidden[:, piece], model.rope(positions[:, piece]), tap, {}))
            flat = torch.zeros(hidden.shape[0], b - a)
            new = LayerMemory.from_chunk(
                tap.keys, tap.values, positions[:, piece], flat.to(torch.int8), flat, flat.long()
            )
            memory = new if memory is None else memory.append(new)
        hidden = torch.cat(outs, 1)
    return model.logits(hidden)


# The tiny model ------------------------------------------------------------------------------------------------------


def test_tiny_model_is_reproducible_and_sharp(tmp_path: Path, nano_session: Any) -> None:
    for name in "ab":
        make_tiny(tmp_path / name, seed=3, size="nano")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in "ab"]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert 2.5e5 < sum(p.numel() for p in nano_session.module.parameters()) < 4e5
    ids, positions = some_tokens(64)
    tap = Tap()
    nano_session.run_layer(0, nano_session.embed(ids), nano_session.rope(positions), tap, {})
    keys = tap.keys.repeat_interleave(2, 1)
    weight = (tap.queries[:, :, -1:] @ keys.mT * nano_session.head_dim**-0.5).softmax(-1)
    entropy = -(weight * weight.log()).sum(-1).mean()
    assert entropy < 0.8 * math.log(64)


def test_tokenizer_of_the_tiny_model(nano_session: Any) -> None:
    tokenizer = nano_session.tokenizer
    for token in SPECIAL:
        assert len(tokenizer(token)["input_ids"]) == 1
    for text in ("What colour is the square?", "naïve 日本 \n tab\t", "(A) 12.5 s"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("What colour is the square?")["input_ids"]) < 12


def test_unknown_size(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        make_tiny(tmp_path, size="tinny")


# Attention -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("n", "n_memory", "masked"), [(7, 0, False), (7, 5, False), (1, 5, False), (7, 5, True), (7, 0, True)]
)
def test_kernels_agree_with_the_formula(n: int, n_memory: int, masked: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 4, n, 8, dtype=dtype)
    key, value = torch.randn(2, 2, 2, n_memory + n, 8, dtype=dtype)
    mask = (torch.rand(n, n) < 0.5) | torch.eye(n, dtype=torch.bool) if masked else None
    memory = None
    if n_memory:
        flat = torch.zeros(2, n_memory)
        past = (key[:, :, :n_memory], value[:, :, :n_memory])
        memory = LayerMemory.from_chunk(*past, torch.zeros(2, n_memory, 3), flat.to(torch.int8), flat, flat.long())
    new = (key[:, :, n_memory:], value[:, :, n_memory:])
    visible = torch.ones(n, n_memory + n, dtype=torch.bool)
    visible[:, n_memory:] = torch.ones(n, n).tril().bool() if mask is None else mask
    for kernel in attention.KERNELS:
        tap = Tap(memory, mask)
        out, weights = attention.attend(torch.nn.Identity(), query, *new, None, 0.3, tap=tap, kernel=kernel)
        assert weights is None
        assert out.is_contiguous()
        assert tap.queries is query
        assert (tap.keys, tap.values) == new
        for h in range(4):
            logits = (query[:, h] @ key[:, h // 2].mT * 0.3).masked_fill(~visible, -math.inf)
            torch.testing.assert_close(out[:, :, h], logits.softmax(-1) @ value[:, h // 2], rtol=1e-4, atol=1e-5)


def test_gradients_of_split_attention_are_those_of_the_formula() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 4, 7, 8), *torch.randn(2, 2, 2, 5, 8), *torch.randn(2, 2, 2, 7, 8)]
    query, old_key, old_value, key, value = (x.double().requires_grad_() for x in inputs)
    flat = torch.zeros(2, 5)
    memory = LayerMemory.from_chunk(old_key, old_value, torch.zeros(2, 5, 3), flat.to(torch.int8), flat, flat.long())

    def gradients(kernel: str) -> tuple[Tensor, ...]:
        out, _ = attention.attend(torch.nn.Identity(), query, key, value, tap=Tap(memory), kernel=kernel)
        weight = torch.arange(out.numel()).view(out.shape).remainder(7.0)
        return torch.autograd.grad((out * weight).sum(), [query, old_key, old_value, key, value])

    for mine, other in zip(gradients("split"), gradients("eager"), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-10)


def test_gradient_reaches_remembered_keys_and_values() -> None:
    key, value = torch.randn(2, 1, 2, 5, 8, requires_grad=True).unbind()
    flat = torch.zeros(1, 5)
    memory = LayerMemory.from_chunk(key, value, torch.zeros(1, 5, 3), flat.to(torch.int8), flat, flat.long())
    query, new = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    out, _ = attention.attend(torch.nn.Identity(), query, new, new, tap=Tap(memory))
    grads = torch.autograd.grad(out.square().sum(), [key, value])
    assert all(float(g.abs().min()) > 0 for g in grads)


def test_masks_and_dropout_are_refused() -> None:
    x = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="takes no dense mask"):
        attention.attend(torch.nn.Identity(), x, x, x, torch.zeros(3, 3))
    with pytest.raises(ValueError, match="no dropout"):
        attention.attend(torch.nn.Identity(), x, x, x, dropout=0.1)


@pytest.mark.parametrize("kernel", attention.KERNELS)
def test_layer_by_layer_equals_the_stock_forward(nano: Any, stock: Any, kernel: str) -> None:
    nano.attention = kernel
    ids, positions = some_tokens(40, batch=2)
    with torch.no_grad():
        expected = stock(input_ids=ids, position_ids=positions.permute(2, 0, 1)).logits
        assert float(expected.std()) > 0.3
        for cuts in ([], [1], [39], [7, 8, 30]):
            found = layers(nano, nano.embed(ids), positions, cuts)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_mask_separates_what_shares_a_memory(nano_session: Any) -> None:
    """Two questions after one memory, side by side, read as each alone."""
    ids, positions = some_tokens(22)
    hidden = nano_session.embed(ids)
    mask = torch.block_diag(torch.ones(5, 5), torch.ones(7, 7)).tril().bool()
    with torch.no_grad():
        for start, end in ((10, 15), (15, 22)):
            alone = [torch.cat([x[:, :10], x[:, start:end]], 1) for x in (hidden, positions)]
            expected = layers(nano_session, alone[0], alone[1], [10])[:, 10:]
            both = _question_pair(nano_session, hidden, positions, mask)
            torch.testing.assert_close(both[:, start - 10 : end - 10], expected, rtol=0, atol=1e-4)


def _question_pair(model: Any, hidden: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    past, new = hidden[:, :10], hidden[:, 10:]
    for layer in range(model.n_layers):
        tap = Tap()
        flat = torch.zeros(1, 10)
        past = model.run_layer(layer, past, model.rope(positions[:, :10]), tap, {})
        memory = LayerMemory.from_chunk(tap.keys, tap.values, positions[:, :10], flat.to(torch.int8), flat, flat.long())
        new = model.run_layer(layer, new, model.rope(positions[:, 10:]), Tap(memory, mask), {})
    return model.logits(new)


def test_no_dense_mask_is_ever_built(nano: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by transformers on the streaming path, nor on the path of a stock forward of the same module."""
    seen: list[Any] = []

    def spy(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(mask)
        return attention.attend(module, query, key, value, mask, *args, **kwargs)

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a mask was built")

    ids, positions = some_tokens(12)
    expected = nano.module(input_ids=ids, position_ids=positions.permute(2, 0, 1)).logits
    AttentionInterface.register(attention.NAME, spy)
    try:
        for name in ("sdpa_mask", "eager_mask"):
            monkeypatch.setattr(transformers.masking_utils, name, forbidden)
        found = nano.module(input_ids=ids, position_ids=positions.permute(2, 0, 1)).logits
        modeling = transformers.models.qwen2_5_omni.modeling_qwen2_5_omni
        monkeypatch.setattr(modeling, "create_causal_mask", forbidden)
        layers(nano, nano.embed(ids), positions, [5])
    finally:
        AttentionInterface.register(attention.NAME, attention.attend)
    torch.testing.assert_close(found, expected)
    assert len(seen) == 3 * nano.n_layers
    assert all(mask is None for mask in seen)


def test_stock_generation_with_our_attention(nano_session: Any, stock: Any) -> None:
    """A dynamic cache has more keys than queries: the new queries are its last."""
    ids, _ = some_tokens(9)
    arguments = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids), "eos_token_id": -1}
    assert torch.equal(
        nano_session.module.generate(input_ids=ids, **arguments), stock.generate(input_ids=ids, **arguments)
    )


def test_padding_and_static_caches_are_refused(nano_session: Any) -> None:
    ids, _ = some_tokens(6, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with pytest.raises(UserError, match="padded input"):
        nano_session.module(input_ids=ids, attention_mask=mask)
    with pytest.raises(UserError, match="static cache"):
        attention.no_mask(q_length=3, kv_length=10, q_offset=2)


def test_gradient_checkpointing_of_transformers_is_refused(nano: Any) -> None:
    nano.module.train()
    nano.module.gradient_checkpointing_enable()
    ids, positions = some_tokens(4)
    with pytest.raises(UserError, match="gradient checkpointing"):
        layers(nano, nano.embed(ids), positions, [])
    nano.module.gradient_checkpointing_disable()
    layers(nano, nano.embed(ids), positions, [])


def test_rotary_turns_keys_as_the_model_does(nano_session: Any) -> None:
    ids, positions = some_tokens(10)
    by = torch.tensor([7, 2, 5])
    taps = [Tap(), Tap()]
    for tap, p in zip(taps, (positions, positions + by), strict=True):
        nano_session.run_layer(0, nano_session.embed(ids), nano_session.rope(p), tap, {})
    turned = nano_session.rotary().turn(taps[0].keys, by.expand(1, 1, 10, 3))
    torch.testing.assert_close(turned, taps[1].keys, rtol=0, atol=1e-5)


# Loading -------------------------------------------------------------------------------------------------------------


def test_full_omni_checkpoint_gives_the_same_thinker(nano_folder: Path, nano_session: Any, tmp_path: Path) -> None:
    """The published layout: `thinker.` in front of the thinker's names, other parts beside it."""
    config = json.loads((nano_folder / "config.json").read_text())
    full = {"model_type": "qwen2_5_omni", "thinker_config": config, "talker_config": {}, "enable_audio_output": True}
    for file in nano_folder.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(full))
    weights = {f"thinker.{k}": x for k, x in load_file(nano_folder / "model.safetensors").items()}
    weights |= {"talker.model.norm.weight": torch.ones(8), "token2wav.code2wav_dit_model.x": torch.ones(3)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model: Any = load_model(tmp_path, device="cpu")
    for (name, a), (_, b) in zip(model.module.named_parameters(), nano_session.module.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not any("talker" in name for name, _ in model.module.named_parameters())
    assert type(model) is type(nano_session)


def test_rotary_is_made_once_and_anew_for_other_frequencies(nano_folder: Path) -> None:
    model = load_model(nano_folder)
    assert isinstance(model, Qwen2_5OmniStreaming)
    before, inner = model.rotary(), model.parts.text.rotary_emb
    assert model.rotary() is before
    inner.inv_freq = 2 * inner.inv_freq  # as moving a model, or scaled rotary embeddings, replace it
    torch.testing.assert_close(model.rotary().inverse_frequencies, 2 * before.inverse_frequencies)


def test_dtype_and_kernel_options(nano_folder: Path) -> None:
    model: Any = load_model(nano_folder, dtype="bfloat16", device="cpu", attention="eager")
    assert (model.dtype, model.attention, model.device.type) == (torch.bfloat16, "eager", "cpu")
    block, _ = run(model, Clip(2.0, 2.0))
    assert block.embeds.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in model.module.parameters())
    assert not model.module.training


def test_bad_checkpoints_are_refused(nano_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def copy(name: str, without: str = "", **config: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in nano_folder.iterdir():
            if file.name != without:
                (folder / file.name).write_bytes(file.read_bytes())
        if config:
            content = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(content | config))
        return folder

    def message(path: Any, **options: Any) -> str:
        with pytest.raises(UserError) as error:
            load_model(path, device="cpu", **options)
        return str(error.value)

    assert "there is no model folder" in message(tmp_path / "absent")
    assert "there is no model folder" in message(nano_folder / "config.json")
    assert "has no config.json" in message(copy("a", without="config.json"))
    assert "no weights" in message(copy("b", without="model.safetensors"))
    assert "preprocessor_config.json" in message(copy("c", without="preprocessor_config.json"))
    assert "type 'llama'" in message(copy("d", model_type="llama"))
    assert "did you mean 'qwen2_5_omni'" in message(copy("e", model_type="qwen2_5_omn"))
    (copy("f") / "config.json").write_text("{")
    assert "cannot read" in message(tmp_path / "f")
    weights = load_file(copy("g") / "model.safetensors")
    removed = next(k for k in weights if k.endswith("layers.1.mlp.up_proj.weight"))
    del weights[removed]
    save_file(weights, tmp_path / "g" / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 of the thinker's weights" in message(tmp_path / "g")
    text = json.loads((nano_folder / "config.json").read_text())["text_config"]
    sliding = text | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0, "layer_types": None}
    assert "sliding window" in message(copy("h", text_config=sliding))
    assert "positions a second" in message(copy("i", position_id_per_seconds=40))


def test_bad_model_options_are_refused(nano_folder: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'bfloat16'"):
        ModelConfig("x", dtype="bfloat")
    with pytest.raises(UserError, match="did you mean 'sdpa'"):
        ModelConfig("x", attention="spda")
    with pytest.raises(UserError, match="cannot use the device"):
        load_model(nano_folder, device="warp:3")
