"""The last attempt at the goal of fine-tuning: the rule of choice, the verdict, what the page says of it."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_results_page import CONTROLS, FULL, OURS, Folder, first, setting, tune

from omnimem_train.errors import UserError
from scripts.recall.attempt import SMALLEST, Attempt, lacking, pack_up, run_attempt
from scripts.recall.finetune import COMBINATIONS, EQUAL, MINUTE, arm_of, configure, controls_of, equal_name
from scripts.recall.jobs import Answers, Context, Tune, merge
from scripts.recall.load import Run, load
from scripts.recall.methods import BUDGETS, CHUNK, Form
from scripts.recall.results_attempt import choose_combination
from scripts.recall.results_goals import MET, MISSED, UNMEASURED
from scripts.recall.study import numbered

TRAINING = {"steps": 200, "lr": 1e-3, "answer": 1.0, "distill": 0.5, "retention": 1.0, "learned": True,
            "budgets": [24, 96], "full_share": 0.3}  # fmt: skip
BEST = Form("omnimem", (), True, 0.5)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "results")


def measured(
    folder: Folder, study: str, arm: str, value: float, full: float, seed: int | None = 0, base: int = 0
) -> None:
    """A model of base 0 unless said, `value` per cent right at both budgets."""
    settings = {f"own@{b}": (setting(*OURS, b), first(value)) for b in (40, 20)}
    clip_set = "val" if study == "combination" else "test"
    about: dict[str, Any] = {"arm": arm, "seed": seed, "clip_set": clip_set, "base": base}
    about |= {} if arm == "base" else {"training": TRAINING}
    folder.run(study, f"base{base}-{arm}-s{seed}", {"full": (FULL, first(full))} | settings, **about)


def attempt(
    folder: Folder, tried: Mapping[str, tuple[float, float]], tested: Mapping[str, tuple[float, float]]
) -> None:
    """Accuracy and full-cache accuracy by arm; the study that missed the goal beside them."""
    tune(folder, {"base": 50, "budget_lora": 62} | CONTROLS)
    measured(folder, "combination", "base", 50, 96, None)
    for arm, (value, full) in tried.items():
        measured(folder, "combination", arm, value, full)
    for arm, (value, full) in tested.items():
        for seed in range(3):
            measured(folder, "attempt", arm, value, full, seed)


@pytest.mark.parametrize(
    ("tried", "chosen", "kept"),
    [
        ({"a": (70, 96), "b": (75, 95), "c": (72, 96)}, "c", True),  # b loses a point of its full cache
        ({"a": (70, 95), "b": (75, 94)}, "b", False),
        ({"a": (70, 100)}, "a", True),
    ],
)
def test_choice_keeps_the_full_cache_if_any_does(
    folder: Folder, tried: Mapping[str, tuple[float, float]], chosen: str, kept: bool
) -> None:
    attempt(folder, tried, {})
    choice = choose_combination(load(folder.path))
    assert choice is not None
    assert (choice.arm, choice.kept) == (chosen, kept)
    assert ("none kept its full-cache accuracy" in choice.told()) == (not kept)


def test_half_a_point_of_the_full_cache_may_go(folder: Folder) -> None:
    """2 of 400 questions are half a point, 3 are more."""
    measured(folder, "combination", "base", 50, 96, None)
    for arm, lost in (("two", 2), ("three", 3)):
        right = first(96)
        right[:lost] = False
        folder.run("combination", arm, {"full": (FULL, right), "x": (setting(*OURS, 20), first(70))},
                   arm=arm, seed=0, clip_set="val", training=TRAINING)  # fmt: skip
    choice = choose_combination(load(folder.path))
    assert choice is not None and {t.arm: t.kept for t in choice.tried} == {"two": True, "three": False}


@pytest.mark.parametrize(
    ("ours", "fixed", "status"),
    [
        ((70, 96), (60, 90), MET),
        ((70, 96), (69, 90), MISSED),  # one point
        ((70, 95), (60, 90), MISSED),  # one point less with the full cache
        ((66, 96), (60, 90), MISSED),  # fixed_lora of the study, with 66 over its seeds, counts too
    ],
)
def test_verdict_of_the_attempt(
    folder: Folder, ours: tuple[float, float], fixed: tuple[float, float], status: str
) -> None:
    attempt(folder, {"a": (70, 96), "b": (60, 96)}, {"a": ours, "fixed_74_x2_lr10": fixed})
    page = folder.page()
    assert page.last is not None and page.last.closest is not None
    assert page.last.status == status
    assert page.last.bases == [0] and len(page.last.runs) == 3
    assert page.second.status == MISSED
    line = next(part for part in folder.text().split("\n") if part.startswith("**Goal 2"))
    words = "MISSED; MET BY A LATER ATTEMPT ON 1 BASE MODEL OF 2" if status == MET else "MISSED"
    assert line.startswith(f"**Goal 2, fine-tuning: {words}.**")
    assert "(3 seeds on base 0)" in line and line.endswith(f"{status} there.")
    assert line.split("Last attempt: ")[1].startswith("`a`, best of 2 combinations on validation clips (70.0 %")
    closest = max({"fixed_74_x2_lr10": fixed[0], "fixed_lora": 66.0}.items(), key=lambda item: item[1])
    assert page.last.closest.other.startswith(f"`{closest[0]}`")
    assert page.last.closest.found.value == pytest.approx((ours[0] - closest[1]) / 100)


@pytest.mark.parametrize(("other", "status"), [(72, MET), (62, MISSED)])
def test_two_bases_decide_together_and_are_told_apart(folder: Folder, other: float, status: str) -> None:
    """A second base that the study did not have stands beside its own controls and its own untouched model."""
    attempt(folder, {"a": (70, 96)}, {"a": (75, 96), "fixed_74_x2_lr10": (72, 90)})
    measured(folder, "attempt", "base", 50, 96, None, 2)
    for arm, value, full in (("a", other, 96), ("fixed_74_x2_lr10", 65, 90)):
        for seed in range(3):
            measured(folder, "attempt", arm, value, full, seed, 2)
    page = folder.page()
    assert page.last is not None and page.last.bases == [0, 2] and page.last.status == status
    line = next(part for part in folder.text().split("\n") if part.startswith("**Goal 2"))
    assert line.startswith(f"**Goal 2, fine-tuning: {status.upper()}.** Asked")
    assert "(3 seeds on base 0 and 3 seeds on base 2)" in line
    alone = {base: 100 * row.found.value for base, row in page.last.each}
    if status == MET:
        assert line.index("Last attempt: ") < line.index("The study before it (missed) found: ")
        assert page.last.closest is not None and page.last.closest.other.startswith("`fixed_74_x2_lr10`")
        assert alone == {0: pytest.approx(3), 2: pytest.approx(7)}
        assert "base 0 alone +3.0 points" in line and "base 2 alone +7.0 points" in line
    else:
        assert "The study before it" not in line


def test_a_control_that_was_not_measured_is_named(folder: Folder) -> None:
    """All controls of the chosen combination but one: met, and open."""
    names = controls_of("c18_lam1_distill1_full_share_05")
    tested = {name: (60.0, 90.0) for name in names if name != "fixed_49_x2_lr5"}
    attempt(
        folder, {"c18_lam1_distill1_full_share_05": (70, 96)}, {"c18_lam1_distill1_full_share_05": (70, 96), **tested}
    )
    for base, arms in ((2, ("c18_lam1_distill1_full_share_05", *tested)),):
        measured(folder, "attempt", "base", 50, 96, None, base)
        for arm in arms:
            for seed in range(3):
                measured(folder, "attempt", arm, *(tested.get(arm, (70, 96))), seed, base)
    last = folder.page().last
    assert last is not None and last.status == MET and last.lacking == ("fixed_49_x2_lr5",)
    line = next(part for part in folder.text().split("\n") if part.startswith("**Goal 2"))
    assert line.startswith("**Goal 2, fine-tuning: MET AGAINST THE CONTROLS MEASURED, 1 IS OPEN.**")
    assert "not measured: `fixed_49_x2_lr5`" in line


def test_the_section_shows_all_that_was_tried(folder: Folder) -> None:
    attempt(folder, {"a": (70, 96), "b": (60, 96)}, {"a": (70, 96), "fixed_74_x2_lr10": (60, 90)})
    text = folder.text()
    loss = "1 answer + 0.5 distil + 1 retention"
    assert f"| **a** | 200 | 0.001 | {loss} | 24 to 96 | 30 % | `perturbation` | 70.0 | 96.0 (+0.0) | yes |" in text
    assert "the untouched base, read with its best training-free method: 50.0 %" in text
    assert "| fixed_74_x2_lr10 | `perturbation` | base 0: 60.0, 60.0, 60.0 |" in text
    assert "| combination | 3 |" in text and "| attempt | 6 |" in text


def test_without_its_test_or_controls_the_attempt_is_not_measured(folder: Folder) -> None:
    attempt(folder, {"a": (70, 96)}, {"a": (70, 96)})
    page = folder.page()
    assert page.last is not None and page.last.status == UNMEASURED
    assert "not measured beside controls of equal steps" in folder.text()


def test_without_an_attempt_nothing_is_said_of_one(folder: Folder) -> None:
    tune(folder, {"base": 50, "budget_lora": 62} | CONTROLS)
    assert folder.page().last is None
    text = folder.text()
    assert "ttempt" not in text and "| combination |" not in text


# The study's side -----------------------------------------------------------------------------------------------------


def test_controls_take_as_many_steps_at_the_same_rate() -> None:
    for name, arm in COMBINATIONS.items():
        own = configure(name, Path("base"), Path("out"), BEST, MINUTE, 1)
        assert own.train.steps == 100 * arm.times and own.budgets.kind == "log_uniform"
        assert arm.drawn == (own.budgets.low, own.budgets.high, own.budgets.full_share)
        assert (own.loss.retention > 0) == arm.learned
        for control in EQUAL:
            other = configure(equal_name(control, arm.times, arm.lr), Path("base"), Path("out"), BEST, MINUTE, 1)
            assert other.train == own.train and other.lora == own.lora
            assert other.loss.distill == 0
            smallest = {"fixed_74": BUDGETS[-2], "fixed_49": BUDGETS[-1], "full": None}[control]
            assert other.budgets.smallest == smallest


def test_jobs_of_the_attempt() -> None:
    own = Attempt(BEST)
    tried, tested = own.tried(), own.tested("c01_center", trained=True)
    again = own.tested("c01_center", trained=False)
    assert all(isinstance(job, Tune) for job in again) and {(j.arm, j.seed) for j in again} == {
        (j.arm, j.seed) for j in tested
    }
    assert {job.clip_set for job in tried if isinstance(job, Answers)} == {"val"}
    assert {job.scale.clip_set for job in tried if isinstance(job, Tune)} == {"val"}
    assert {job.arm for job in tried if isinstance(job, Tune)} == set(COMBINATIONS)
    runs = {(job.arm, job.seed) for job in tested}
    assert len(runs) == len(tested) == 3 * 6
    assert {job.scale.clip_set for job in tested if isinstance(job, Tune)} == {"test"}
    assert not {job.arm for job in tested} & (set(COMBINATIONS) - {"c01_center"})
    assert own.form("c13_audio03").allocation == 0.3 and own.form("c10_rho").rho
    assert own.form("c11_without_learned") == own.form("fixed_49_x2_lr10") == BEST
    assert arm_of("c01_center").told(MINUTE)["steps"] == 200


def test_a_second_base_is_tested_and_not_tried_on() -> None:
    own = Attempt(BEST, bases=(2,))
    tested = own.tested("c01_center", trained=False)
    assert own.tried() == [] and {job.base for job in tested} == {2}
    assert isinstance(tested[0], Answers) and tested[0].full and tested[0].model == "base2"
    assert len(tested) == 1 + 3 * 6
    both = Attempt(BEST, bases=(0, 2)).tested("c01_center", trained=True)
    assert len(both) == 1 + 2 * 3 * 6 and [type(job) for job in both if job.seed == 0][:2] == [Answers, Tune]


def read_with(own: Attempt, run: Run) -> tuple[Any, ...]:
    """The conditions of a run, read with the memories that the attempt reads this arm with."""
    forms = own.best if run.arm == "base" else own.form(run.arm)
    return tuple(
        replace(c, memory=forms.spec(budget, CHUNK).to_dict())
        for c, budget in zip(run.conditions, (None, *SMALLEST), strict=False)
        if budget is not None
    )


def test_answers_that_are_there_are_not_given_again(folder: Folder) -> None:
    own = Attempt(BEST)
    measured(folder, "combination", "base", 50, 96, None)
    for arm, training in (("c01_center", arm_of("c01_center").told(MINUTE)), ("c05_low", TRAINING)):
        read = {f"x@{b}": (setting(*OURS, b), first(70)) for b in (40, 20)}
        folder.run("combination", arm, {"full": (FULL, first(96))} | read,
                   arm=arm, seed=0, clip_set="val", training=training)  # fmt: skip
    data = load(folder.path)
    data = replace(data, runs=tuple(replace(r, weights="w", conditions=read_with(own, r)) for r in data.runs))
    left = {job.arm for job in lacking(own.tried(), data, {0: "w"})}
    assert left == set(COMBINATIONS) - {"c01_center"}  # that of c05_low was trained in another way
    assert len(lacking(own.tried(), data, {0: "other"})) == len(own.tried()), "answers of another model"
    other = Attempt(
        Form("snapkv")
    )  # reads the untouched base, and c11, in another way; a learned importance is the same
    assert {job.arm for job in lacking(other.tried(), data, {0: "w"})} == left | {"base"}


@pytest.mark.parametrize(
    ("given", "found"), [(["a", "b"], {0: "a", 1: "b"}), (["2=x/y"], {2: "x/y"}), (["a", "2=b"], {0: "a", 2: "b"})]
)
def test_base_models_have_numbers(given: list[str], found: dict[int, str]) -> None:
    assert numbered(given) == {number: Path(path) for number, path in found.items()}


def test_two_base_models_of_one_number_are_refused() -> None:
    with pytest.raises(UserError, match="two base models"):
        numbered(["a", "0=b"])


class Runs:
    """Stands in for the study's queue: leaves what the jobs would leave, except that of the arms in `broken`."""

    def __init__(self, folder: Folder, broken: str = "") -> None:
        self.folder, self.broken, self.until = folder, broken, float("inf")
        self.failed: list[str] = []
        self.calls: list[list[Any]] = []
        self.closed = False
        self.kept: Any = None

    def run(self, jobs: list[Any]) -> None:
        self.calls.append(jobs)
        for job in jobs:
            if job.arm == self.broken:
                self.failed.append(job.arm)
            else:
                value = 80 if job.arm in ("c05_low", self.broken) else 50
                measured(self.folder, job.study, job.arm, value, 96, job.seed)
                self.kept()

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("broken", ["", "c02_without_distill"])
def test_an_attempt_chooses_then_tests_and_packs_what_is_new(
    folder: Folder, tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(folder, {"base": 50, "budget_lora": 62} | CONTROLS)
    before = {path.name: path.read_bytes() for path in (folder.path / "answers").iterdir()}
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    context = Context(tmp_path / "work", folder.path, {0: tmp_path}, {}, "me", "cpu")
    (context.work / "adapters" / "base0-c05_low-s0").mkdir(parents=True)
    (context.work / "adapters" / "base0-c05_low-s0" / "weights").write_text("w")
    (context.work / "adapters" / "base0-c01_center-s0").mkdir()
    runs, packed = Runs(folder, broken), list[Path]()
    monkeypatch.setattr(
        "scripts.recall.attempt.pack_up", lambda context, path: (packed.append(path), pack_up(context, path))
    )
    failed = run_attempt(context, runs, Attempt(BEST), tmp_path / "new.tar.gz")
    assert failed == [broken] * bool(broken)
    assert runs.closed and len(packed) > len(COMBINATIONS)  # each job that is done is safe at once
    tested = runs.calls[-1]
    assert [(job.arm, job.seed) for job in tested[:3]] == [("c05_low", seed) for seed in range(3)]
    assert len(runs.calls) == (3 if broken else 2)  # what failed is tried a second time
    after = {path.name: path.read_bytes() for path in (folder.path / "answers").iterdir()}
    assert {name: after[name] for name in before} == before
    with tarfile.open(tmp_path / "new.tar.gz") as tar:
        names = set(tar.getnames())
    new = {f"results/answers/{name}" for name in after if name not in before}
    assert {name for name in names if name.startswith("results/")} == new
    assert {name for name in names if name.startswith("work/adapters")} == {
        "work/adapters/base0-c05_low-s0",
        "work/adapters/base0-c05_low-s0/weights",
    }
    pack_up(context, tmp_path / "again.tar.gz")
    assert json.loads((folder.path / "answers" / "attempt__base0-c05_low-s1.json").read_text())["seed"] == 1


def test_answers_to_other_questions_are_not_merged(folder: Folder, tmp_path: Path) -> None:
    parts = tmp_path / "work" / "parts"
    parts.mkdir(parents=True)
    there = folder.path / "questions" / "val.csv.gz"
    (parts / "val.csv.gz").write_bytes(there.read_bytes())
    assert merge(tmp_path / "work", folder.path) == 0
    (parts / "val.csv.gz").write_bytes((folder.path / "questions" / "test.csv.gz").read_bytes())
    with pytest.raises(UserError, match="other questions"):
        merge(tmp_path / "work", folder.path)
