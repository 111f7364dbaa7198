"""The loss that teaches a learned importance: what it is taught, who learns, and how the head travels."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import omni_clips
import pytest
import torch
from safetensors.torch import load_file
from test_calibration import stream_of
from torch import Tensor
from toy import ToyModel, toy_question, toy_stream

from omnimem_train.budget_sampling import BudgetSampling
from omnimem_train.data import DataConfig
from omnimem_train.errors import UserError
from omnimem_train.export import adapter_memory, export_adapter
from omnimem_train.gradient import Gradient
from omnimem_train.losses import LossConfig
from omnimem_train.memory import MemorySpec
from omnimem_train.memory.learned import WIDTH
from omnimem_train.memory.state import AUDIO, TEXT, VISUAL, LayerMemory
from omnimem_train.models.importance import FILE, add_importance_head, load_importance_head, save_importance_head
from omnimem_train.models.interface import StreamingModel
from omnimem_train.models.loading import ModelConfig, load_model
from omnimem_train.models.lora import LoraSettings, add_lora
from omnimem_train.retention import Attended, Watch, retention_loss
from omnimem_train.run_config import RunConfig, TrainConfig
from omnimem_train.runlog import read_metrics
from omnimem_train.session import model_fingerprint
from omnimem_train.step import EncodedStream, Moment, Question, StreamingStep
from omnimem_train.streaming import Stream
from omnimem_train.trainer import train

LEARNED = MemorySpec("omnimem", {"importance": "learned", "lam": 0.3}, budget=10, chunk_tokens=8)
FULL = MemorySpec("full", budget=None, chunk_tokens=8)


def question(n: int, read: list[int], at: int = 40) -> Question:
    """A question of one stream whose rows `read` are supervised."""
    rows = torch.tensor(read)
    return Question(toy_question(n, at), torch.stack([torch.zeros_like(rows), rows], -1), torch.zeros_like(rows))


def attention_by_hand(model: ToyModel, question: Question, counts: int) -> list[Tensor]:
    """(1, T) for each layer: a stock pass over stream and question, and the attention of its first `counts` tokens."""
    state = Stream(model, FULL).flush(Stream(model, FULL).feed(Stream(model, FULL).start(), toy_stream(33)))
    seen: list[Tensor] = []
    original = model.run_layer

    def spy(layer: int, hidden: Tensor, rope: object, tap: object, extras: object) -> Tensor:
        out = original(layer, hidden, rope, tap, extras)
        b, heads, n, d = tap.queries.shape
        keys = torch.cat([tap.memory.keys, tap.keys], 2)
        keys = keys.repeat_interleave(heads // keys.shape[1], 1)
        logits = tap.queries @ keys.mT * d**-0.5
        logits = logits.masked_fill(~torch.ones(n, 33 + n, dtype=torch.bool).tril(33), float("-inf"))
        most = logits.softmax(-1)[:, :, :counts, :33].amax(2)
        seen.append(most.view(b, tap.keys.shape[1], -1, 33).amax(2).mean(1))
        return out

    model.run_layer = spy  # type: ignore[method-assign]
    Stream(model, FULL).ask(state, [question.block])
    model.run_layer = original  # type: ignore[method-assign]
    return seen


def watched(model: ToyModel, questions: list[Question]) -> list[Tensor]:
    from omnimem_train.step import answer_logits

    watch = Watch(33, model.n_layers)
    with torch.no_grad():
        answer_logits(Stream(model, FULL), EncodedStream([toy_stream(33)], [Moment(1, None, questions)]), watch)
    return list(watch.attended().layers)


def test_what_questions_look_at() -> None:
    """The most attention any of their tokens pays; tokens after the last that is read are padding."""
    model = ToyModel()
    one, other = question(5, [1, 2]), question(4, [3])
    by_hand = [attention_by_hand(model, q, n) for q, n in ((one, 3), (other, 4))]
    for got, first, second in zip(watched(model, [one, other]), *by_hand, strict=True):
        torch.testing.assert_close(got, first.maximum(second).float(), rtol=1e-5, atol=1e-7)
    for got, first in zip(watched(model, [one]), by_hand[0], strict=True):
        torch.testing.assert_close(got, first.float(), rtol=1e-5, atol=1e-7)


def test_the_loss_is_a_cross_entropy_for_each_modality() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 6, 4)
    modality = torch.tensor([[TEXT, VISUAL, VISUAL, AUDIO, AUDIO, AUDIO]] * 2, dtype=torch.int8)
    index = torch.arange(6).expand(2, 6)
    tokens = LayerMemory.from_chunk(
        torch.zeros(2, 1, 6, 4), torch.zeros(2, 1, 6, 4), torch.zeros(2, 6, 3).long(), modality, index.float(), index,
        hidden.requires_grad_(),
    )  # fmt: skip
    head = torch.randn(2, 4, requires_grad=True)
    attended = torch.rand(2, 6)
    attended[1, 1:3] = 0  # nothing of the second stream's picture is looked at
    loss = retention_loss(tokens, head, attended)
    unit = WIDTH / 4 * hidden.detach() / hidden.detach().square().mean(-1, keepdim=True).sqrt()
    parts = []
    for stream, rows, which in ((0, [1, 2], 0), (0, [3, 4, 5], 1), (1, [3, 4, 5], 1)):
        target = attended[stream, rows] / attended[stream, rows].sum()
        parts.append(-(target * (unit[stream, rows] @ head[which]).log_softmax(-1)).sum())
    assert float(loss.detach()) == pytest.approx(float(torch.stack(parts).mean()), rel=1e-4)
    loss.backward()
    assert head.grad is not None and float(head.grad.abs().sum()) > 0
    assert hidden.grad is None


def head_gradient(checkpointing: bool, granularity: str = "chunk") -> tuple[Tensor, Tensor]:
    model = ToyModel()
    head = add_importance_head(model)
    with torch.no_grad():
        head.normal_(generator=torch.Generator().manual_seed(0))
    encoded = EncodedStream([toy_stream(33)], [Moment(1, None, [question(5, [1, 2])])])
    step = StreamingStep(model, LossConfig(retention=1.0))
    result = step(encoded, LEARNED, Gradient("all", checkpointing=checkpointing, granularity=granularity))
    result.loss.backward()
    assert result.retention_loss is not None and head.grad is not None
    return result.loss.detach(), head.grad


@pytest.mark.parametrize("granularity", ["chunk", "layer"])
def test_recomputation_gives_the_head_the_same_gradient(granularity: str) -> None:
    for a, b in zip(head_gradient(True, granularity), head_gradient(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert float(head_gradient(True)[1].abs().sum()) > 0


@pytest.mark.parametrize("granularity", ["chunk", "layer"])
@pytest.mark.parametrize(("layer", "table"), [(0, None), (1, None), (1, (50, 10, 10)), (2, (10, 50, 10))])
def test_losses_of_layers_without_gradient(layer: int, table: tuple[int, ...] | None, granularity: str) -> None:
    """Below the stop layer there may be no choice, and so no loss, while there is one above."""
    found = []
    for gradient in (Gradient("all", checkpointing=False), Gradient("all", granularity=granularity)):
        model = ToyModel()
        head = add_importance_head(model)
        with torch.no_grad():
            head.normal_(generator=torch.Generator().manual_seed(0))
        spec = LEARNED if table is None else LEARNED.replace(layer_table=table)
        encoded = EncodedStream([toy_stream(33)], [Moment(1, None, [question(5, [1, 2])])])
        step = StreamingStep(model, LossConfig(retention=1.0))
        result = step(encoded, spec, replace(gradient, kind="stop_layer", layer=layer))
        result.loss.backward()
        found.append([result.loss.detach(), *(p.grad for p in model.module.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 10
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_step_without_a_choice_gives_the_head_a_gradient_of_zero() -> None:
    model = ToyModel()
    head = add_importance_head(model)
    encoded = EncodedStream([toy_stream(33)], [Moment(1, None, [question(5, [1, 2])])])
    result = StreamingStep(model, LossConfig(retention=1.0))(encoded, LEARNED.replace(budget=None), Gradient("all"))
    result.loss.backward()
    assert result.retention_loss is None
    assert head.grad is not None and not head.grad.any()


def test_the_head_learns_and_then_keeps_what_is_asked_for() -> None:
    """On streams whose questions look at what the model makes them look at, the share kept of it rises."""
    model = ToyModel()
    head = add_importance_head(model)
    encoded = EncodedStream([toy_stream(33)], [Moment(1, None, [question(5, [1, 2, 3])])])
    wanted = watched(model, encoded.questions)[1]
    optimizer = torch.optim.Adam([head], 0.002)

    def kept_share() -> float:
        stream = Stream(model, LEARNED.replace(selector_options={"importance": "learned", "lam": 5.0}))
        index = stream.flush(stream.feed(stream.start(), toy_stream(33))).layers[1].index[0, 0]
        return float(wanted[0, index].sum() / wanted.sum())

    before, losses = kept_share(), []
    for _ in range(60):
        result = StreamingStep(model, LossConfig(retention=1.0))(encoded, LEARNED, Gradient("all"))
        losses.append(float(result.retention_loss))
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.01
    assert kept_share() > before


def test_a_memory_that_needs_a_head_says_so() -> None:
    with pytest.raises(UserError, match="no head to read it with"):
        Stream(ToyModel(), LEARNED)
    model = ToyModel()
    add_importance_head(model)
    Stream(model, LEARNED)
    Stream(ToyModel(), LEARNED.replace(budget=None))


def test_a_head_of_zeros_is_redundancy_alone(nano: StreamingModel) -> None:
    clip = omni_clips.Clip(8.0, 2.0)
    spec = MemorySpec("omnimem", {"importance": "learned"}, budget=24, chunk_tokens=32)
    add_importance_head(nano)
    want = stream_of(nano, clip, spec.replace(selector_options={"lam": 0.0}))
    got = stream_of(nano, clip, spec)
    for a, b in zip(want.layers, got.layers, strict=True):
        assert torch.equal(a.index, b.index)


def test_a_head_travels_with_its_adapter(nano: StreamingModel, nano_folder: Path, tmp_path: Path) -> None:
    add_lora(nano, LoraSettings(r=4, alpha=8.0))
    before = model_fingerprint(nano)
    head = add_importance_head(nano)
    torch.nn.init.normal_(head)
    assert model_fingerprint(nano) != before
    assert model_fingerprint(nano, adapters=False) == model_fingerprint(load_model(nano_folder, device="cpu"), False)
    save_importance_head(nano, tmp_path)
    other = load_model(nano_folder, device="cpu")
    load_importance_head(other, tmp_path)
    assert other.importance_head is not None and torch.equal(other.importance_head, head)
    assert not other.importance_head.requires_grad
    (tmp_path / FILE).write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot read"):
        load_importance_head(other, tmp_path)
    save_importance_head(load_model(nano_folder, device="cpu"), tmp_path)
    assert not (tmp_path / FILE).exists()


def test_a_head_of_another_model_is_refused(nano: StreamingModel, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({nano.HEAD: torch.zeros(1, 2, 3)}, str(tmp_path / FILE))
    with pytest.raises(UserError, match="does not fit the model"):
        load_importance_head(nano, tmp_path)


@pytest.mark.slow
def test_a_run_trains_resumes_and_exports_a_head(nano_folder: Path, tmp_path: Path) -> None:
    """Through the trainer: what is resumed equals what ran through; what is exported chooses as in training."""
    subprocess.run(
        [sys.executable, "-m", "data_prep.render", str(tmp_path / "world"), "--clips", "4", "--seconds", "6"],
        cwd=Path(__file__).parents[1], check=True, capture_output=True,
    )  # fmt: skip

    def config(output: str, **settings: Any) -> RunConfig:
        return RunConfig(
            model=ModelConfig(str(nano_folder), device="cpu"),
            lora=LoraSettings(r=4, alpha=8.0),
            data=DataConfig(manifest=tmp_path / "world" / "train.json", fps=2, workers=0),
            memory=LEARNED.replace(budget=16, chunk_tokens=32),
            budgets=BudgetSampling("log_uniform", 8, 32, full_share=0.5),
            loss=LossConfig(retention=1.0),
            train=TrainConfig(tmp_path / output, steps=4, lr=3e-3, log_every=1, save_every=2, **settings),
        )

    train(config("whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "step-00000004")
    train(config("half", resume="auto"))
    whole, half = (
        load_file(tmp_path / run / "checkpoints/step-00000004/adapter.safetensors") for run in ("whole", "half")
    )
    assert whole[StreamingModel.HEAD].any()
    assert all(torch.equal(whole[name], half[name]) for name in whole)
    rows = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert all((row["retention_loss"] > 0) == (row["budget"] > 0) for row in rows)

    out = tmp_path / "adapter"
    export_adapter(tmp_path / "whole", out)
    tuned = load_model(nano_folder, device="cpu", adapter=out)
    assert tuned.importance_head is not None and torch.equal(tuned.importance_head, whole[StreamingModel.HEAD])
    assert adapter_memory(out, tuned) == config("whole").memory
    assert "learned too" in (out / "README.md").read_text()
    clip = omni_clips.Clip(8.0, 2.0)
    assert stream_of(tuned, clip, adapter_memory(out)).layers[0].n_tokens < 60
    (out / FILE).unlink()
    with pytest.raises(UserError, match="or it is absent"):
        adapter_memory(out)


def test_a_loss_that_teaches_what_nobody_reads_is_refused(nano_folder: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "train.json"
    (tmp_path / "no.mp4").touch()
    manifest.write_text('[{"video": "no.mp4", "turns": [{"question": "?", "answer": "!"}]}]')
    config = RunConfig(
        model=ModelConfig(str(nano_folder), device="cpu"),
        data=DataConfig(manifest=manifest),
        loss=LossConfig(retention=1.0),
        lora=LoraSettings(r=4, alpha=8.0),
        train=TrainConfig(tmp_path / "run"),
    )
    with pytest.raises(UserError, match=r"trains an importance that memory\.selector does not read"):
        train(config)


def test_each_layer_chooses_by_its_own_head() -> None:
    def kept(head_of: int | None) -> list[list[int]]:
        model = ToyModel()
        head = add_importance_head(model)
        if head_of is not None:
            torch.nn.init.normal_(head[head_of].data, generator=torch.Generator().manual_seed(1))
        stream = Stream(model, LEARNED.replace(selector_options={"importance": "learned", "lam": 5.0}))
        layers = stream.flush(stream.feed(stream.start(), toy_stream(17))).layers
        return [m.index[0, 0].tolist() for m in layers]

    plain = kept(None)
    for layer in range(3):
        assert kept(layer)[layer] != plain[layer]
        assert kept(layer)[:layer] == plain[:layer]


def test_what_an_encoder_held_back_is_not_noted() -> None:
    tokens = torch.arange(6)
    memory = LayerMemory.from_chunk(
        torch.randn(1, 1, 6, 4), torch.zeros(1, 1, 6, 4), torch.zeros(1, 6, 3).long(), tokens[None].to(torch.int8),
        tokens[None].float(), tokens[None],
    )  # fmt: skip
    watch = Watch(6, 1)
    watch.known = 4
    keys = torch.cat([memory.keys, torch.randn(1, 1, 2, 4)], 2)
    watch.add(0, torch.randn(1, 2, 2, 4), keys, memory, torch.ones(1, 2, dtype=torch.bool), None)
    (found,) = watch.attended().layers
    assert (found[0, :4] > 0).all() and not found[0, 4:].any()


def test_the_loss_is_a_mean_over_choices_that_counts_for_every_answer_token() -> None:
    model = ToyModel()
    head = add_importance_head(model)
    torch.nn.init.normal_(head.data, generator=torch.Generator().manual_seed(0))
    encoded = EncodedStream([toy_stream(33)], [Moment(1, None, [question(5, [1, 2])])])
    result = StreamingStep(model, LossConfig(retention=3.0))(encoded, LEARNED, Gradient("all"))
    assert result.retention_loss is not None
    added = float((result.loss - result.answer_loss).detach())
    assert added == pytest.approx(3 * 2 * float(result.retention_loss))
    attended = Attended(watched(model, encoded.questions))
    stream = Stream(model, LEARNED, Gradient("all", checkpointing=False), 33, attended)
    states = [stream.start()]
    for start in (0, 8, 16, 24, 32):
        states.append(stream.flush(stream.feed(states[-1], toy_stream(33)[start : start + 8])))
    counts = [0 if s.retention is None else s.retention[1] for s in states]
    assert counts == sorted(counts) and counts[-1] > counts[-2] > 3
    total, n = states[-1].retention or (torch.zeros(()), 0)
    assert float(total / n) == pytest.approx(float(result.retention_loss), rel=1e-6)
