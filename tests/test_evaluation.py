"""Evaluation: on a scripted model whose answers are known, and as users run it on real clips."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import omni_clips
import pytest
import torch

from omnimem_train.config import load_config
from omnimem_train.errors import UserError
from omnimem_train.evaluate import ChoiceQuestion, Clip, Evaluator, ItemResult, Setting, collect, extract_letter, run
from omnimem_train.evaluation import EvalConfig, clips_of, evaluate, summarise, table
from omnimem_train.memory.spec import MemorySpec
from omnimem_train.models.interface import MediaEncoder, MediaWindow, StreamingModel, Turn
from omnimem_train.models.lora import LoraSettings, add_lora, disable_adapter, lora_parameters
from omnimem_train.runlock import NAME
from omnimem_train.streaming import Stream, encode

ROOT = Path(__file__).resolve().parents[1]
SPEC = MemorySpec(budget=16, chunk_tokens=32)
SETTINGS = [
    Setting("small", SPEC),
    Setting("snapkv", SPEC.replace(selector="snapkv")),
    Setting("full", SPEC.replace(selector="full", budget=None)),
]


def made_up_clip(model: StreamingModel) -> tuple[MediaEncoder, list[MediaWindow]]:
    """Six seconds of noise in three windows."""
    clip = omni_clips.Clip(6.0, 2.0)
    return model.open(clip.info, 2.0), list(clip.windows(2.0))


def question(name: str, answer: str = "A", time_s: float | None = None) -> ChoiceQuestion:
    text = f"{name}: which?\nA. one\nB. two\nC. three\nD. four\nAnswer with the letter."
    return ChoiceQuestion(name, text, 4, answer, time_s, {"category": "made up"})


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", None),
        ("B.", "B"),
        ("(C) because", "C"),
        (" D) it is", "D"),
        ("The answer is B.", "B"),
        ("Answer: C", "C"),
        ("The best option is (A)", "A"),
        ("I would say C, the dog.", "C"),
        ("A dog runs", None),
        ("A or B", None),
        ("**B**", "B"),
        ("B: two", "B"),
        ("E", None),
        ("", None),
        ("I don't know", None),
        ("Dogs Are Big", None),
    ],
)
def test_extraction_of_letters(text: str, letter: str | None) -> None:
    assert extract_letter(text, 4) == letter


def test_letters_equal_a_stream_of_their_own(nano_session: StreamingModel) -> None:
    """Many settings and questions in one pass give what each gives alone."""
    questions = (question("a"), question("b", "B", 2.0), question("c", "C", 4.0), question("d", "D"))
    results = Evaluator(nano_session, SETTINGS).clip(Clip("c", questions, lambda: made_up_clip(nano_session)))
    assert len(results) == 12
    by = {(r.question, r.setting): r for r in results}
    tokens = [nano_session.tokenizer.encode(letter)[0] for letter in "ABCD"]
    for setting in SETTINGS:
        for q in questions:
            encoder, windows = made_up_clip(nano_session)
            kept = [w for w in windows if q.time_s is None or w.end_s <= q.time_s]
            stream, state = Stream(nano_session, setting.spec), None
            state = stream.start()
            if q.time_s is None:
                state = stream.feed_all(state, encode(encoder, kept))
            else:
                state = stream.feed(state, encoder.start())
                state = stream.feed_all(state, [b for w in kept if (b := encoder.push(w)) is not None])
            ids = nano_session.render(Turn(q.prompt)).ids
            hidden = stream.ask(stream.caught_up(state, encoder.waiting()), [encoder.text(ids)])
            expected = nano_session.logits(hidden[0, -1]).log_softmax(-1)[tokens]
            held = by[q.id, setting.name]
            torch.testing.assert_close(torch.tensor(list(held.scores.values())), expected, rtol=0, atol=1e-4)
            assert held.predicted == "ABCD"[int(expected.argmax())]


def test_options_are_compared_by_the_likelihood_of_their_words(nano_session: StreamingModel) -> None:
    """The sums of log-probabilities that a pass over stream, question and option by itself gives."""
    options = ("one", "a green box", "no")
    asked = [ChoiceQuestion(n, "unused", 3, "B", stem=f"{n}: which?", options=options) for n in ("a", "b")]
    results = Evaluator(nano_session, SETTINGS[2:], method="options").clip(
        Clip("c", tuple(asked), lambda: made_up_clip(nano_session))
    )
    encoder, windows = made_up_clip(nano_session)
    stream = Stream(nano_session, SETTINGS[2].spec)
    state = stream.flush(stream.feed_all(stream.start(), encode(encoder, windows)))
    for result in results:
        scores = list(result.scores.values())
        for option, score in zip(options, scores, strict=True):
            turn = nano_session.render(Turn(f"{result.question}: which? Answer in a few words.", option))
            n = len(nano_session.tokenizer(option)["input_ids"])
            hidden = stream.ask(state, [encoder.text(turn.ids)])[0, -len(turn.ids) :]
            places = (turn.labels != -100).nonzero()[:n, 0] - 1  # the mark after the answer is left out
            logits = nano_session.logits(hidden[places]).log_softmax(-1)
            expected = logits.gather(1, turn.ids[places + 1, None]).sum()
            assert score == pytest.approx(float(expected), abs=1e-3)
        assert result.predicted == "ABC"[scores.index(max(scores))]


def test_generation_reads_the_letter_from_text(nano_session: StreamingModel, monkeypatch: pytest.MonkeyPatch) -> None:
    says = {"a": "B. two", "b": "no idea"}
    ids = {name: nano_session.render(Turn(question(name).prompt)).ids.tolist() for name in says}

    def generate(self: Any, state: Any, encoder: Any, asked: torch.Tensor, max_new_tokens: int) -> list[int]:
        name = next(n for n, i in ids.items() if i == asked.tolist())
        return nano_session.tokenizer.encode(says[name])

    monkeypatch.setattr(Stream, "generate", generate)
    evaluator = Evaluator(nano_session, SETTINGS[:1], method="generate")
    clip = Clip("c", (question("a", "B"), question("b", "A")), lambda: made_up_clip(nano_session))
    a, b = evaluator.clip(clip)
    assert (a.predicted, a.correct, a.text) == ("B", True, "B. two")
    assert (b.predicted, b.correct, b.text) == (None, False, "no idea")


def test_the_adapter_is_on_only_where_it_should_be(nano: StreamingModel) -> None:
    add_lora(nano, LoraSettings(r=4))
    for _, p in lora_parameters(nano):
        p.data.normal_()
    settings = [Setting("with", SPEC, adapter=True), Setting("without", SPEC)]
    evaluator = Evaluator(nano, settings, adapters_off=lambda: disable_adapter(nano))
    scores = {r.setting: r.scores for r in evaluator.clip(Clip("c", (question("a"),), lambda: made_up_clip(nano)))}
    with disable_adapter(nano):
        base = Evaluator(nano, [Setting("base", SPEC)]).clip(Clip("c", (question("a"),), lambda: made_up_clip(nano)))
    assert scores["without"] == base[0].scores
    assert scores["with"] != base[0].scores


def broken(model: StreamingModel, after: int) -> Any:
    def opened() -> tuple[Any, Iterable[Any]]:
        encoder, windows = made_up_clip(model)

        def some() -> Iterable[Any]:
            for i, window in enumerate(windows):
                if i == after:
                    raise UserError("clip.mp4: cannot be decoded")
                yield window

        return encoder, some()

    return opened


def test_failed_items_count_as_wrong_and_are_listed(nano_session: StreamingModel) -> None:
    questions = (question("early", "A", 2.0), question("late"))
    results = Evaluator(nano_session, SETTINGS).clip(Clip("c", questions, broken(nano_session, after=2)))
    early = [r for r in results if r.question == "early"]
    late = [r for r in results if r.question == "late"]
    assert all(r.predicted is not None and not r.error for r in early), "what was answered before the break counts"
    assert [(r.predicted, r.correct, r.error) for r in late] == [(None, False, "clip.mp4: cannot be decoded")] * 3
    summary = summarise(results, SETTINGS)
    assert [row["coverage"] for row in summary["rows"]] == [0.5] * 3
    assert summary["failed"] == [{"clip": "c", "question": "late", "why": "clip.mp4: cannot be decoded"}]


def test_a_budget_below_the_text_fails_its_setting_alone(nano_session: StreamingModel) -> None:
    settings = [*SETTINGS, Setting("tight", SPEC.replace(count_text=True, budget=5))]
    clip = Clip("c", (question("a"),), lambda: made_up_clip(nano_session))
    errors = {r.setting: r.error for r in Evaluator(nano_session, settings).clip(clip)}
    assert "text tokens it has to hold" in errors.pop("tight")
    assert not any(errors.values())


def test_a_stopped_run_goes_on(nano_session: StreamingModel, tmp_path: Path) -> None:
    opened: list[str] = []

    def clip(name: str) -> Clip:
        def open_it() -> Any:
            opened.append(name)
            return made_up_clip(nano_session)

        return Clip(name, (question(f"{name}-1"), question(f"{name}-2")), open_it)

    clips = [clip(c) for c in "pqrs"]
    evaluator = Evaluator(nano_session, SETTINGS)
    run(evaluator, clips[:2], tmp_path)
    path = tmp_path / "results-rank0.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])  # killed while writing the last line
    opened.clear()
    for rank in range(2):  # and going on with two processes
        run(evaluator, clips, tmp_path, rank=rank, world=2)
    assert opened == ["r", "q", "s"]
    results = collect(tmp_path)
    assert len(results) == len({(r.question, r.key) for r in results}) == 4 * 2 * 3
    assert all(not r.error for r in results)


def test_a_line_that_is_no_result_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "results-rank0.jsonl").write_text('{"clip": "c"}\n{}\n')
    with pytest.raises(UserError, match="line 1 of"):
        collect(tmp_path)


def result(item: int, setting: Setting, predicted: str | None) -> ItemResult:
    return ItemResult(f"clip{item // 2}", str(item), setting.name, setting.key(), "A", predicted)


def test_summary_and_table() -> None:
    base, adapter = Setting("s@8", SPEC), Setting("s@8+adapter", SPEC, adapter=True)
    results = [result(i, base, "A" if i < 4 else "B") for i in range(8)]
    results += [result(i, adapter, "A" if i < 7 else None) for i in range(8)]
    summary = summarise(results, [base, adapter])
    plain, tuned = summary["rows"]
    assert (plain["accuracy"], plain["n"], plain["clips"], plain["coverage"]) == (0.5, 8, 4, 1.0)
    assert (tuned["accuracy"], tuned["coverage"]) == (0.875, 0.875)
    assert (tuned["difference"]["gained"], tuned["difference"]["lost"]) == (3, 0)
    assert tuned["difference"]["p"] == pytest.approx(0.25)  # two-sided binomial, 3 of 3
    assert tuned["difference"]["low"] < 0.375 < tuned["difference"]["high"]
    rows = table(summary).splitlines()
    assert rows[-1].endswith("pinned text (prompt, marks) comes on top and is not counted.")
    assert len(rows) == 5
    assert "50.0 [" in rows[2]
    assert "87.5 [" in rows[2]
    assert "88 %" in rows[2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["selectors=[snapkb]"], "did you mean 'snapkv'"),
        (["budgets=[0]"], "memory budget 0"),
        (["selectors=[{name: x}]"], "neither a name nor a mapping"),
        (["selectors=[snapkv, snapkv]", "budgets=[8]"], ""),
        (["with_base=false"], "there is no adapter"),
        (["budgets=[]"], "nothing to evaluate"),
        (["selectors=[{selector: knorm, bugdet: 3}]"], "bugdet"),
        (["selectors=[{selector: knorm, base: snapkv}]"], "no mapping of memory fields"),
        (["selectors=[{selector: knorm, base: {budget: 3}}]"], "sets a budget"),
        (["selectors=[{selector: knorm, base: {selektor: snapkv}}]"], "selektor"),
    ],
)
def test_settings_of_a_recipe(overrides: list[str], message: str) -> None:
    if message:
        with pytest.raises(UserError, match=message):
            load_config(EvalConfig, None, overrides)
    else:
        assert len(load_config(EvalConfig, None, overrides).settings()) == 1


def test_the_base_can_have_fields_of_its_own(tmp_path: Path) -> None:
    """A row compares what each chooses with; the full cache stays one setting."""
    entry = "{name: mine, selector: omnimem, selector_options: {importance: learned}, base: {selector_options: {}}}"
    overrides = [f"selectors=[{entry}]", "budgets=[8, full]", f"model.adapter={tmp_path}"]
    settings = load_config(EvalConfig, None, overrides).settings()
    told = {s.name: s.spec.selector_options for s in settings}
    assert told == {"mine@8": {}, "full": {}, "mine@8+adapter": {"importance": "learned"}, "full+adapter": {}}
    results = [
        ItemResult(f"c{i}", f"q{i}", s.name, s.key(), "A", "A" if s.adapter or i % 2 else "B")
        for s in settings
        for i in range(20)
    ]
    rows = {row["name"]: row for row in summarise(results, settings)["rows"]}
    assert rows["mine@8+adapter"]["difference"]["value"] == pytest.approx(0.5)
    assert "difference" not in rows["mine@8"]


@pytest.mark.slow
def test_on_real_clips_in_two_processes(nano_folder: Path, tmp_path: Path) -> None:
    """As a user runs it; a missing file counts as wrong; a second call measures nothing again."""
    world = tmp_path / "world"
    command = [sys.executable, "-m", "data_prep.render", str(world), "--clips", "5", "--test", "3", "--seconds", "6"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    items = [json.loads(line) for line in (world / "test_choices.jsonl").read_text().splitlines()]
    gone = items[0]["video"]
    (world / gone).unlink()
    arguments = [
        "eval", "/dev/null", f"model.path={nano_folder}", "model.device=cpu",
        f"data.items={world / 'test_choices.jsonl'}",
        "data.require_media=false", "selectors=[perturbation, uniform]", "budgets=[8, full]", "memory.chunk_tokens=64",
        f"output={tmp_path / 'eval'}",
    ]  # fmt: skip
    recipe = tmp_path / "eval.yaml"
    recipe.write_text("{}\n")
    arguments[1] = str(recipe)
    quiet = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launcher += ["-m", "omnimem_train"]
    done = subprocess.run([*launcher, *arguments], cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    lost = sum(item["video"] == gone for item in items)
    assert {row["name"] for row in summary["rows"]} == {"perturbation@8", "uniform@8", "full"}
    for row in summary["rows"]:
        assert row["n"] == len(items)
        assert row["coverage"] == pytest.approx(1 - lost / len(items))
    assert len(summary["failed"]) == lost
    assert f"{lost} questions failed and count as wrong" in done.stdout
    before = {p: p.read_bytes() for p in (tmp_path / "eval").glob("results-*")}
    assert sorted(p.name for p in before) == ["results-rank0.jsonl", "results-rank1.jsonl"]
    assert all(before.values()), "a process measured nothing"
    again = subprocess.run(
        [sys.executable, "-m", "omnimem_train", *arguments], cwd=ROOT, env=quiet, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr[-3000:]
    assert {p: p.read_bytes() for p in before} == before
    other = subprocess.run(
        [sys.executable, "-m", "omnimem_train", *arguments, "data.fps=1"],
        cwd=ROOT, env=quiet, capture_output=True, text=True,
    )  # fmt: skip
    assert other.returncode == 2
    assert "holds results of another evaluation" in other.stderr
    assert "'fps': 2.0" in other.stderr


def test_clips_group_their_questions(nano_session: StreamingModel, tmp_path: Path) -> None:
    lines = [
        {"video": "a.mp4", "question": "q", "options": ["x", "y"], "answer": "A"},
        {"video": "b.mp4", "question": "q", "options": ["x", "y"], "answer": "B"},
        {"video": "a.mp4", "question": "r", "options": ["x", "y"], "answer": "B"},
    ]
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    config = load_config(EvalConfig, None, [f"data.items={path}", "data.require_media=false"])
    from omnimem_train.benchmarks import load_choices

    clips = clips_of(load_choices(path, require_media=False), nano_session, config)
    assert [len(c.questions) for c in clips] == [2, 1]
    summary = evaluate(
        load_config(EvalConfig, None, [f"data.items={path}", "data.require_media=false", f"output={tmp_path / 'out'}"]),
        nano_session,
        Evaluator(nano_session, config.settings()),
    )
    assert summary["rows"][0]["coverage"] == 0


def test_two_evaluations_do_not_share_a_folder(nano_session: StreamingModel, tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text('{"video": "a.mp4", "question": "q", "options": ["x", "y"], "answer": "A"}')
    options = [f"data.items={tmp_path / 'items.jsonl'}", "data.require_media=false", f"output={tmp_path / 'out'}"]
    config = load_config(EvalConfig, None, options)
    evaluator = Evaluator(nano_session, config.settings())

    def meddle(clips: list[Clip]) -> Iterable[Clip]:
        """A second evaluation, started while the first is at its clips."""
        with pytest.raises(UserError, match=rf"{config.output} is in use by another run, process {os.getpid()} on"):
            evaluate(config, nano_session, evaluator)
        return clips

    evaluate(config, nano_session, evaluator, progress=meddle)
    assert len((config.output / "results-rank0.jsonl").read_text().splitlines()) == 1
    evaluate(config, nano_session, evaluator)
    assert not (config.output / NAME).exists()
