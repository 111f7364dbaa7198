"""The recall study: turns and letters, methods and their tuning, one measurement from end to end, fine-tuning input."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_prep.questions import QuestionMaker
from data_prep.streams import WorldStreams
from data_prep.world import WorldSettings, make_clip
from omnimem_train import choosing
from omnimem_train.memory.selector import choose as select
from omnimem_train.memory.spec import MemorySpec
from omnimem_train.models.loading import load_model
from omnimem_train.models.qwen2_5_omni import Qwen2_5OmniStreaming
from omnimem_train.step import answer_logits
from omnimem_train.streaming import Stream
from scripts.recall.asking import Asker, clip_set
from scripts.recall.finetune import ARMS, MINUTE, WorldSource, WorldTurns, configure
from scripts.recall.inside import final_state
from scripts.recall.jobs import Answers, Context, SetSpec, Tune, merge
from scripts.recall.load import load
from scripts.recall.methods import BUDGETS, CHUNK, OPTIONS, Form, best_of, choose, learned, original_forms, other_forms
from scripts.recall.phases import Chosen, sets, study_jobs
from scripts.recall.pretrain import LEVELS, new_model, one_pass, save_model
from scripts.recall.pretrain import main as pretrain
from scripts.recall.probes import compared
from scripts.recall.towers import align, label_tensors, tower_outputs, words_of
from scripts.recall.turns import FORMS, TRACKED, Batch, TurnBatches, choices, rendered

WORLD = WorldSettings(seconds=12.0)


@pytest.fixture(scope="module")
def model() -> Qwen2_5OmniStreaming:
    return new_model(0, torch.device("cpu"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, model: Qwen2_5OmniStreaming) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_model(model, folder)
    return folder


@pytest.mark.parametrize("form", ["lvomnibench", "direct"])
def test_choices_are_read_where_options_differ(model: Qwen2_5OmniStreaming, form: str) -> None:
    maker = QuestionMaker(0, 2)
    asked = [maker.ask(make_clip(WorldSettings(), 0, "test", i), 9) for i in range(3)]
    kinds = set()
    for slot, choice in enumerate(choices(model, asked, form)):
        there = [(i, q[slot]) for i, q in enumerate(asked) if slot < len(q)]
        assert choice.turn.read[:, 0].tolist() == [i for i, _ in there]
        for (stream, q), row, read in zip(there, choice.candidates.tolist(), choice.turn.read.tolist(), strict=True):
            assert len(set(row)) == 4
            right = row["ABCD".index(q.answer)]  # the right option's token is what comes next, the others are not
            assert int(choice.turn.ids[stream, read[1] + 1]) == right
            words = [model.tokenizer.decode([token]).strip() for token in row]
            texts = q.options if form == "direct" else "ABCD"
            assert all(word in text.split() for word, text in zip(words, texts, strict=True))
            kinds.add(q.kind)
    assert len(kinds) == 6


def test_every_form_of_a_question_holds_its_answer(model: Qwen2_5OmniStreaming) -> None:
    q = QuestionMaker(0, 0).ask(make_clip(WORLD, 0, "train", 0))[0]
    right = q.options["ABCD".index(q.answer)]
    said = {
        form: model.tokenizer.decode([i for i in rendered(model, q, form).labels.tolist() if i != -100])
        for form in FORMS
    }
    end = "<|im_end|>"
    letter = q.answer + end
    assert said == {"manifest": letter, "lvomnibench": letter, "lookup": letter, "direct": right + end,
                    "reason": f"{right}\n{letter}"}  # fmt: skip


def test_batches_say_which_target_is_the_letter(model: Qwen2_5OmniStreaming) -> None:
    import multiprocessing

    specs = [make_clip(WorldSettings(), 0, "train", i) for i in range(4)]
    level = multiprocessing.Value("i", 1)
    stream = iter(TurnBatches(model, specs, [(6, 3, 4), (12, 3, 6)], level))
    for _ in range(4):
        batch = Batch.unpack(next(stream))
        assert batch.turns[-1].name == "narration"
        assert all(start % 6 == 0 and start + batch.seconds <= 60 for start in batch.starts)
        for slot, place, tells in batch.letters.tolist():
            if TRACKED[tells] != "direct":
                assert model.tokenizer.decode([int(batch.turns[slot].targets[place])]) in "ABCD"


def test_one_pass_equals_the_stream_loop() -> None:
    """On the trained model, whose attention is sharp, in float32: turns see the stream and nothing of each other."""
    trained = load_model(Path(__file__).parents[1] / "checkpoints" / "tiny-omni", dtype="float32", device="cpu")
    assert isinstance(trained, Qwen2_5OmniStreaming)
    specs = [make_clip(WORLD, 0, "train", i) for i in range(2)]
    streams, maker = WorldStreams(trained, 112), QuestionMaker(0, 0)
    asked = choices(trained, [maker.ask(s, 3) for s in specs], "manifest")
    turns, media = [choice.turn for choice in asked], streams.encode(specs)
    with torch.no_grad():
        found, _ = one_pass(trained, streams.joined(media, 12.0, turns))
        stream = Stream(trained, MemorySpec(selector="full", budget=None))
        wanted = torch.cat(answer_logits(stream, streams.stream(media, 12.0, turns))[0])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


def test_every_rule_is_tuned_with_at_most_four_options_and_equal_forms() -> None:
    for rule, options in OPTIONS.items():
        assert 1 <= len(options) <= 4
        for form in original_forms(rule):
            spec = form.spec(49)
            assert spec.allocation == "shared"
            assert spec.selector_options.get("redundancy", "none") == "none"
    mine = {f.kind.replace("perturbation", "x") for f in other_forms(Form("perturbation"))}
    theirs = {f.kind.replace("critical_kv", "x") for f in other_forms(Form("critical_kv"))}
    assert theirs == {"x + rho", "x + split", "x + rho + split"}
    assert theirs < mine
    assert Form("critical_kv", rho=True).family == "augmented" and Form("perturbation", rho=True).family == "omnimem"


def test_tuning_takes_the_best_of_each_kind() -> None:
    scores = {Form("snapkv"): 0.5, Form("snapkv", (("window_size", 16),)): 0.6, Form("critical_kv", rho=True): 0.9,
              Form("omnimem"): 0.4, Form("perturbation", rho=True, allocation=0.3): 0.7,
              Form("perturbation", rho=True, allocation=0.5): 0.7}  # fmt: skip
    best = choose(scores)
    assert best["snapkv"].options == (("window_size", 16),)
    assert best["perturbation + rho + split"].allocation == 0.3
    assert best_of(scores, "rival").rule == "snapkv"
    assert best_of(scores, "augmented").rule == "critical_kv"


def test_all_jobs_of_the_study_have_names_of_their_own() -> None:
    form = Form("perturbation", rho=True, allocation=0.5)
    tuned = Form("critical_kv", (("window_size", 8),))
    forms = {f.kind: f for f in (form, tuned, Form("snapkv"), Form("sliding_window"))}
    strong = (Form("snapkv"), Form("snapkv", rho=True))
    chosen = Chosen(forms, form, Form("snapkv"), Form("snapkv", rho=True), form, strong)
    jobs = study_jobs(2, chosen, 3)
    tunes = {job.arm: job for job in jobs if isinstance(job, Tune)}
    assert tunes["critical_kv_lora"].loop == tuned
    assert tunes["critical_kv_lora"].read == (form, tuned)
    assert tunes["window_lora"].loop.rule == "sliding_window" and tunes["window_lora"].read == (form,)
    assert tunes["budget_lora_plain"].loop == tunes["fixed_lora"].loop == form
    assert tunes["budget_lora"].read == (tunes["budget_lora"].loop,) == (learned(form),)
    assert learned(form).spec(49).selector_options["importance"] == "learned"
    assert len({repr(job) for job in jobs}) == len(jobs)
    answers = [job for job in jobs if isinstance(job, Answers)]
    places = {(job.study, job.model, job.part) for job in answers}
    assert len(places) == len(answers)
    assert {job.clip_set for job in answers} <= set(sets())


def test_a_measurement_from_end_to_end(tmp_path: Path, base: Path) -> None:
    """Two parts of one file: measured, merged, and read as the page reads them."""
    context = Context(tmp_path, tmp_path / "results", {0: base}, {"test": SetSpec("test", 2, 4, WORLD)}, "me", "cpu")
    forms = [Form("perturbation", rho=True), Form("snapkv", allocation=0.5)]
    scores = [
        Answers("main", 0, "test", ((form, 24),), full=i == 0, part=i).run(context) for i, form in enumerate(forms)
    ]
    assert merge(context.work, context.results) == 1
    data = load(context.results)
    found = {c.method: c for c in data.conditions("main")}
    assert set(found) == {"full cache", "perturbation + rho", "snapkv + split"}
    for form, score in zip(forms, scores, strict=True):
        assert found[form.kind].right.mean() == pytest.approx(score[form, 24])
    assert found["snapkv + split"].text_tokens == pytest.approx(
        data.study("main")[0].full_tokens - WorldStreams(context.model(0), 112).tokens(12), abs=1e-6
    )


def test_probes_agree_with_all_queries(model: Qwen2_5OmniStreaming) -> None:
    """All of a chunk's 256 queries keep what all keep, a few of them less."""
    streams = WorldStreams(model, WORLD.size)
    asker = Asker(streams, clip_set(streams, [make_clip(WORLD, 0, "test", 0)], 0))
    spec = MemorySpec("perturbation", {"n_probes": 0}, budget=60, chunk_tokens=CHUNK)
    with compared((2, 256), {"redundancy": "later_key"}) as found:
        final_state(asker, spec, asker.clips.media)
    assert choosing.choose is select
    few, whole = (torch.cat(shares) for shares in found.values())
    assert len(few) == len(whole) > 0 and bool((whole == 1).all())
    assert 0.3 < float(few.mean()) < 1.0


def test_batches_to_fine_tune_on_depend_on_their_number_alone(model: Qwen2_5OmniStreaming) -> None:
    specs = [make_clip(WORLD, 1, "train", i) for i in range(4)]
    media = WorldStreams(model, 112).encode(specs)
    turns = WorldTurns(model, specs, seed=3, size=2, asks=3, narrate=True)
    clips, packed = pickle.loads(turns[5])
    assert len(set(clips.tolist())) == 2
    assert packed[-1].name == "narration"
    for number, same in ((5, True), (6, False)):
        other, other_packed = pickle.loads(turns[number])
        equal = torch.equal(clips, other) and torch.equal(packed[0].ids, other_packed[0].ids)
        assert equal == same

    def source() -> WorldSource:
        return WorldSource(model, specs, media, seed=3, size=2, asks=3, workers=0)

    whole = source().streams(0)
    third = [next(whole) for _ in range(3)][2]
    late = source()
    again = next(late.streams(2))
    assert late.position == 3
    assert torch.equal(third.blocks[1].embeds, again.blocks[1].embeds)
    assert [q.targets.tolist() for q in third.questions] == [q.targets.tolist() for q in again.questions]


def test_arms_differ_in_the_loop_alone(base: Path) -> None:
    best = Form("perturbation", rho=True, allocation=0.5)
    runs = {arm: configure(arm, base, Path("out"), best, MINUTE, 1) for arm in ARMS}
    same = {json.dumps([str(r.train), str(r.lora), str(r.model)]) for r in runs.values()}
    assert len(same) == 1
    assert runs["full_lora"].budgets.smallest is None
    assert runs["fixed_lora"].budgets.choices == (BUDGETS[-2],)
    assert {arm for arm, a in ARMS.items() if a.rival} == {"critical_kv_lora", "window_lora"}
    assert runs["budget_lora"].memory == best.spec(BUDGETS[-2])
    assert {arm for arm, run in runs.items() if run.loss.retention} == {arm for arm, a in ARMS.items() if a.learned}
    assert replace(runs["budget_lora"].budgets, seed=0) == replace(runs["critical_kv_lora"].budgets, seed=0)
    assert LEVELS[-1][0] == 60


def test_aligned_towers_say_what_they_show_in_words(model: Qwen2_5OmniStreaming) -> None:
    """An event's token points to its own words more than to others; the rest of the output stays in it."""
    streams = WorldStreams(model, 112)
    specs = [make_clip(WORLD, 0, "train", i) for i in range(8)]
    before = tower_outputs(streams, specs)["audio"].float()
    explained = align(streams, [specs[:4], specs[4:]])
    assert all(0.2 < share <= 1 for share in explained.values())
    after, labels = tower_outputs(streams, specs), label_tensors(specs, model.device)
    for kind in ("visual", "audio"):
        words = [model.tokenizer(f" {name}")["input_ids"][0] for name in words_of(kind)[0]]
        event = labels[kind][:, 0] > 0
        scores = after[kind][event].float() @ model.embed(torch.tensor(words)).float().T
        own = scores.gather(1, labels[kind][event][:, :1] - 1)
        assert float((own >= scores.mean(1, keepdim=True)).float().mean()) > 0.9
    kept = torch.nn.functional.cosine_similarity(before, after["audio"].float(), dim=-1)
    assert float(kept.mean()) > 0.3


@pytest.mark.slow
def test_pre_training_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls of one step each: the second starts from the first one's weights, step and time, with new batches."""
    small = tuple((seconds, 1, 2) for seconds, _, _ in LEVELS)  # bfloat16 is slow on many CPUs
    monkeypatch.setattr("scripts.recall.pretrain.LEVELS", small)
    common = ["--clips", "2", "--workers", "0", "--device", "cpu", "--val", "1", "--tower-batch", "1", "--seed", "0"]
    pretrain([str(tmp_path), "--minutes", "9", "--towers-s", "1", "--max-steps", "1", *common])
    first = torch.load(tmp_path / "state.pt")
    pretrain([str(tmp_path), "--minutes", "9", "--towers-s", "1", "--max-steps", "2", *common])
    second = torch.load(tmp_path / "state.pt")
    assert (first["step"], second["step"]) == (1, 2)
    assert second["used_s"] > first["used_s"] and second["total_s"] == first["total_s"] == 9 * 60 - 1
    assert any(not torch.equal(a, b) for a, b in zip(first["master"], second["master"], strict=True))
    stages = [json.loads(line)["stage"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert stages.count("aligned") == 1 and stages.count("val") == 2
