"""The results page: numbers by hand, verdicts both ways, what is left out."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omnimem_train.stats import Outcome, compare, holm
from scripts.recall import tables, tables_studies
from scripts.recall.load import load
from scripts.recall.results import prepare, write
from scripts.recall.results_goals import MET, MISSED, UNMEASURED, not_reached
from scripts.recall.results_scores import pooled

N, CLIPS = 400, 100
CYCLE = ("colour", "pitch", "together", "order")
SHARES = {100: 0.1, 40: 0.04, 20: 0.02}  # 1,000 media tokens
FULL = {"method": "full", "family": "reference", "budget": "full", "share": 1.0}


def first(per_cent: float) -> np.ndarray:
    """Right for that many of every 100 questions: larger shares contain smaller ones."""
    return np.arange(N) % 100 < per_cent


def setting(method: str, family: str, budget: int, **memory: Any) -> dict[str, Any]:
    """A setting as the experiments write it."""
    return {"method": method, "family": family, "budget": budget, "share": SHARES[budget], "memory": memory}


class Folder:
    """Writes the format of the experiments."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for name in ("questions", "answers"):
            (path / name).mkdir(parents=True)
        self.keys: dict[str, np.ndarray] = {}
        for clip_set in ("test", "val"):
            self.questions(clip_set)

    def questions(self, name: str, kinds: Sequence[str] = CYCLE, n: int = N) -> None:
        self.keys[name] = np.arange(n) * 7 % 4
        rows = [[f"{name}-{i}", f"c{i // 4}", kinds[i % 4], "ABCD"[k], i % 2] for i, k in enumerate(self.keys[name])]
        with gzip.open(self.path / "questions" / f"{name}.csv.gz", "wt", newline="") as file:
            csv.writer(file).writerows([["id", "clip", "kind", "answer", "held_out"], *rows])

    def run(self, study: str, model: str, settings: Mapping[str, tuple[Mapping[str, Any], np.ndarray]], **about: Any):
        """`settings`: description and which questions are right, by name."""
        whole = {"study": study, "model": model, "base": 0, "arm": "base", "seed": None, "clip_set": "test"}
        whole |= {"full_tokens": 1030, "machine": "a machine", "versions": {"torch": "2"}, "command": "run it"} | about
        key = self.keys[whole["clip_set"]]
        arrays = {n: np.where(right, key, (key + 1) % 4).astype(np.int8) for n, (_, right) in settings.items()}
        stem = self.path / "answers" / f"{study}__{model}"
        stem.with_suffix(".json").write_text(json.dumps(whole | {"settings": {n: s for n, (s, _) in settings.items()}}))
        np.savez(stem.with_suffix(".npz"), **arrays)

    def methods(self, study: str, values: Mapping[tuple[str, str], Mapping[int, float]], **about: Any) -> None:
        """A run from per cents by (method, family) and budget, with the full cache at 96 %."""
        settings = {f"{m}@{b}": (setting(m, f, b), first(v)) for (m, f), own in values.items() for b, v in own.items()}
        self.run(study, about.pop("model", "base0"), {"full": (FULL, first(96))} | settings, **about)

    def page(self) -> tables.Page:
        return prepare(load(self.path))

    def text(self) -> str:
        write(self.path, self.path / "RESULTS.md")
        return (self.path / "RESULTS.md").read_text()


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "results")


OURS, RIVAL, BOTH = ("perturbation", "omnimem"), ("snapkv", "rival"), ("snapkv+split", "augmented")


# Numbers --------------------------------------------------------------------------------------------------------------


def test_means_are_taken_by_question_then_clustered_by_clip(folder: Folder) -> None:
    folder.methods("main", {OURS: {40: 80, 20: 60}, RIVAL: {40: 70, 20: 40}, BOTH: {40: 72, 20: 44}})
    page = folder.page()
    own, other = (page.main.group(m, [40, 20]) for m in ("perturbation", "snapkv"))
    pool = pooled(tuple(own))
    assert [o.correct for o in pool[:100]] == [1.0] * 60 + [0.5] * 20 + [0.0] * 20
    assert page.scores.accuracy(own).value == pytest.approx(0.70)
    found = page.scores.compare(other, own)
    assert found.value == pytest.approx(0.15)  # (10 + 20) / 2 points
    half = [Outcome(o.item, o.clip, o.share - b.share) for o, b in zip(pool, pooled(tuple(other)), strict=True)]
    assert found.value == pytest.approx(np.mean([o.correct for o in half]))
    assert found.low < 0.15 < found.high
    single = compare(pooled(tuple(page.main.cells["snapkv"][20])), pooled(tuple(page.main.cells["perturbation"][20])))
    assert (single.value, single.gained, single.lost) == (pytest.approx(0.2), 80, 0)


def test_table_shows_values_and_differences(folder: Folder) -> None:
    folder.methods("main", {OURS: {40: 80, 20: 60}, RIVAL: {40: 70, 20: 40}, BOTH: {40: 72, 20: 44}})
    text = folder.text()
    row = next(line for line in text.splitlines() if line.startswith("| `snapkv` | rival |  |"))
    assert row.split(" | ")[3].startswith("70.0 [")
    assert row.split(" | ")[4].startswith("40.0 [")
    assert "| 40 (4 %) | 20 (2 %) |" in text
    assert "**+20.0 [" in text
    assert "Text (about 30 tokens) is pinned on top of the budget." in text  # 1030 - 40 / 0.04


@pytest.mark.parametrize(
    ("counted", "words"),
    [([True], "inside the budget."), ([False, True], "inside the budget in some"), ([None], "on top of the budget.")],
)
def test_text_inside_or_on_top_is_said(folder: Folder, counted: list[bool | None], words: str) -> None:
    settings = {}
    for i, value in enumerate(counted):
        memory = {} if value is None else {"count_text": value}
        settings[str(i)] = setting(f"m{i}", "rival", 40, **memory), first(50)
    folder.run("main", "base0", settings)
    assert words in tables.text_note(load(folder.path).conditions("main"))


def test_two_bases_are_averaged_and_partial_methods_named(folder: Folder) -> None:
    values = {OURS: {40: 80}, RIVAL: {40: 70}, BOTH: {40: 70}}
    folder.methods("main", values)
    folder.methods("main", values | {OURS: {40: 60}, ("extra", "rival"): {40: 90}}, base=1, model="base1")
    page = folder.page()
    assert page.scores.accuracy(page.main.cells["perturbation"][40]).value == pytest.approx(0.7)
    assert "extra" not in page.main.cells
    assert "settings that a base model lacks: 1, e.g. extra at 40" in page.first.lacking


# Goal 1 ---------------------------------------------------------------------------------------------------------------


def test_only_budgets_below_full_accuracy_count(folder: Folder) -> None:
    """At budget 100 ours has 94 %, whose interval reaches the 96 % of the full cache."""
    folder.methods("main", {OURS: {100: 94, 40: 80}, RIVAL: {100: 80, 40: 70}, BOTH: {100: 80, 40: 72}})
    page = folder.page()
    assert not_reached(page.scores, page.main, "perturbation", "snapkv") == [40]
    assert page.first.rows[0].budgets == (40,)
    assert page.first.rows[0].found.value == pytest.approx(0.10)


@pytest.mark.parametrize(
    ("ours", "rival", "augmented", "status"),
    [
        (80, 70, 64, MET),
        (80, 79, 70, MISSED),  # one point over the original rival
        (80, 70, 80, MISSED),  # nothing over the augmented one
        (80, 70, 84, MISSED),
        (96, 96, 96, UNMEASURED),  # the full cache is reached
    ],
)
def test_verdict_of_goal_1(folder: Folder, ours: int, rival: int, augmented: int, status: str) -> None:
    folder.methods("main", {OURS: {40: ours}, RIVAL: {40: rival}, BOTH: {40: augmented}})
    page = folder.page()
    assert page.first.status == status
    assert f"**Goal 1, training-free: {page.first.words.upper()}.**" in folder.text()
    assert (page.first.words == "met on what is measured so far") == (status == MET)  # 400 questions are not 5,000


def test_a_small_but_certain_gain_meets_only_the_augmented_part(folder: Folder) -> None:
    """Seven questions of 400 gained, each in a clip of its own, none lost: above 0, below 2 points."""
    few = first(70)
    few[[72, 76, 80, 84, 88, 92, 96]] = True
    right = {OURS: few, RIVAL: first(70), BOTH: first(60)}
    settings = {m: (setting(m, family, 40), r) for (m, family), r in right.items()}
    folder.run("main", "base0", {"full": (FULL, first(96))} | settings)
    page = folder.page()
    row = next(r for r in page.first.rows if r.other == "snapkv")
    assert row.above and row.found.value == pytest.approx(7 / 400)
    assert page.first.status == MISSED


def test_method_is_chosen_on_validation_and_the_best_rival_of_the_test_must_be_beaten_too(folder: Folder) -> None:
    other, second = ("omnimem", "omnimem"), ("critical_kv", "rival")
    folder.methods(
        "main", {OURS: {40: 80}, other: {40: 90}, RIVAL: {40: 70}, second: {40: 79}, BOTH: {40: 60}}
    )  # on the test, omnimem is best
    values = {OURS: {40: 80}, other: {40: 50}, RIVAL: {40: 75}, second: {40: 50}, BOTH: {40: 60}}
    folder.methods("tuning", values, clip_set="val")
    page = folder.page()
    assert (page.first.chosen, page.first.how) == ("perturbation", "validation")
    assert page.first.opponents == ("snapkv", "critical_kv", "snapkv+split")
    assert page.first.status == MISSED  # 1 point over critical_kv
    assert {row.ours for row in page.first.rows} == {"perturbation"}


def test_choice_on_the_test_is_said_and_corrected_over_all_pairs(folder: Folder) -> None:
    folder.methods("main", {OURS: {40: 80}, ("omnimem", "omnimem"): {40: 74}, RIVAL: {40: 70}, BOTH: {40: 72}})
    page = folder.page()
    assert (page.first.chosen, page.first.how, len(page.first.rows)) == ("perturbation", "test", 4)
    raw = {f"{r.ours} {r.other}": r.found.p_clustered for r in page.first.rows}
    assert {f"{r.ours} {r.other}": r.p for r in page.first.rows} == holm(raw)
    assert "chosen on the test clips; p is over all pairs" in folder.text()


def test_words_need_interval_and_adjusted_p() -> None:
    low, high = ([Outcome(str(i), str(i), i < right) for i in range(100)] for right in (50, 100))
    settled, back, same = compare(low, high), compare(high, low), compare(low, low)
    assert [tables.decided(c, 0.05) for c in (settled, back, same)] == ["better", "worse", "open"]
    assert [tables.decided(c, 0.06) for c in (settled, back, same)] == ["open"] * 3


def test_options_that_the_test_used_count_on_validation(folder: Folder) -> None:
    """Another option that is better on validation does not speak for the one in use."""
    folder.methods("main", {OURS: {40: 80}, ("omnimem", "omnimem"): {40: 80}, RIVAL: {40: 60}, BOTH: {40: 60}})
    tried = {"a": (setting("perturbation", "omnimem", 40) | {"tuned": {"n": 2}}, first(95)),
             "b": (setting("perturbation", "omnimem", 40), first(50)),
             "c": (setting("omnimem", "omnimem", 40), first(60))}  # fmt: skip
    folder.run("tuning", "base0", tried, clip_set="val")
    page = folder.page()
    assert (page.first.chosen, page.first.how) == ("omnimem", "validation")
    assert "between 1 and 2 sets of options" in tables_studies.tuning_section(page)


# Kinds that are left out ----------------------------------------------------------------------------------------------


def test_a_kind_at_chance_is_left_out_and_named(folder: Folder) -> None:
    folder.questions("test", ("colour", "pitch", "together", "when"))
    answers = {"full": 100, "perturbation": 80, "snapkv": 60, "snapkv+split": 60}
    kind = np.arange(N) % 4 == 3
    right = {m: np.where(kind, np.arange(N) % 16 == 3, first(v)) for m, v in answers.items()}  # a quarter of "when"
    families = {"perturbation": "omnimem", "snapkv": "rival", "snapkv+split": "augmented"}
    settings = {m: (setting(m, f, 40), right[m]) for m, f in families.items()}
    folder.run("main", "base0", {"full": (FULL, right["full"])} | settings)
    page = folder.page()
    assert list(page.excluded) == ["when"]
    assert page.scores.accuracy(page.main.cells["snapkv"][40]).value == pytest.approx(0.6)
    assert page.scores.accuracy(page.main.cells["snapkv"][40], every=True).value == pytest.approx(0.75 * 0.6 + 0.0625)
    text = folder.text()
    assert (
        "**Left out of the headline**, because the model does not answer it with its full cache: when (25.0 [" in text
    )
    assert "; all 51.2" in text
    assert page.first.rows[0].found.n == 300


@pytest.mark.parametrize(
    ("full", "kinds", "excluded"),
    [
        (28, CYCLE, CYCLE),  # the interval contains 25 %
        (34, ("count",) * 4, ("count",)),  # it does not, but 34 is below 35
        (36, ("count",) * 4, ()),
        (20, ("count",) * 4, ("count",)),  # worse than chance
    ],
)
def test_rule_of_exclusion(folder: Folder, full: int, kinds: Sequence[str], excluded: Sequence[str]) -> None:
    folder.questions("test", kinds)
    folder.run("main", "base0", {"full": (FULL, np.arange(N) * 37 % 100 < full)})
    page = folder.page()
    assert tuple(page.excluded) == excluded
    if excluded:
        assert page.first.status == page.second.status == UNMEASURED
        assert "no kind of question is answered above chance" in folder.text()


def test_an_interval_that_contains_chance_excludes_even_above_35(folder: Folder) -> None:
    folder.questions("test", ("count",) * 4, n=40)
    folder.run("main", "base0", {"full": (FULL, np.arange(40) * 7 % 40 < 15)})
    found = folder.page()
    assert found.excluded.keys() == {"count"}
    assert found.excluded["count"].startswith("37.5 [")


def test_bars_of_the_models_own_recall(folder: Folder) -> None:
    folder.methods("main", {OURS: {40: 80}})
    text = folder.text()
    assert "recall with its full cache, missed:** colour (asked: 97 %) 96.0 % on base 0 (" in text
    assert "recall with its full cache, reached:** together (asked: 85 %) 96.0 % on base 0 (" in text


# Goal 2 ---------------------------------------------------------------------------------------------------------------


def tune(folder: Folder, arms: Mapping[str, float], full: float = 96, seeds: int = 3) -> None:
    """Fine-tuned models of two bases: per cent right at both budgets by arm; seeds differ by 2 points."""
    for base in (0, 1):
        for arm, value in arms.items():
            for seed in [None] if arm == "base" else range(seeds):
                own = {OURS: dict.fromkeys((100, 40, 20), value + 2 * (seed or 0))}
                folder.methods("finetune", own, base=base, arm=arm, seed=seed, model=f"{base}-{arm}-{seed}")
                if arm == "budget_lora":
                    path = folder.path / "answers" / f"finetune__{base}-{arm}-{seed}.npz"
                    key = folder.keys["test"]
                    with np.load(path) as file:
                        arrays = dict(file)
                    arrays["full"] = np.where(first(full), key, (key + 1) % 4).astype(np.int8)
                    np.savez(path, **arrays)


CONTROLS = {"full_lora": 50, "critical_kv_lora": 60, "window_lora": 55, "fixed_lora": 64}


@pytest.mark.parametrize(
    ("ours", "full", "base", "status"),
    [
        (70, 96, 50, MET),
        (65, 96, 50, MISSED),  # one point over fixed_lora
        (70, 95, 50, MISSED),  # one point less with the full cache
        (70, 100, 50, MET),
        (70, 96, 72, MISSED),  # training did harm: the untouched base is a control too
    ],
)
def test_verdict_of_goal_2(folder: Folder, ours: int, full: int, base: int, status: str) -> None:
    tune(folder, {"base": base, "budget_lora": ours} | CONTROLS, full)
    verdict = folder.page().second
    assert verdict.status == status, verdict.reasons
    assert verdict.lacking == ("400 questions of 5,000",)
    best = "base" if base > 64 else "fixed_lora"
    assert verdict.opponents == (f"`{best}` read with `perturbation`",)


def test_seeds_are_paired_and_pooled(folder: Folder) -> None:
    tune(folder, {"base": 50, "budget_lora": 70} | CONTROLS)
    page = folder.page()
    row = next(r for r in page.second.rows if "fixed_lora" in r.other)
    assert (row.budgets, row.found.n) == ((20, 40), N)
    assert row.found.value == pytest.approx(0.06)
    assert next(r for r in page.second.rows if "`base`" in r.other).found.value == pytest.approx(0.22)  # 72 - 50
    section = tables_studies.tuned_section(page)
    assert "| budget_lora | `perturbation` | 0 | 70.0, 72.0, 74.0 | 72.0 [" in section
    assert "sd 2.0, range 4.0" in section
    assert {r.other: r.p for r in page.second.rows} == holm({r.other: r.found.p_clustered for r in page.second.rows})


def test_missing_seeds_and_controls_are_named(folder: Folder) -> None:
    tune(folder, {"base": 50, "budget_lora": 70, "full_lora": 50}, seeds=2)
    verdict = folder.page().second
    assert verdict.words == "met on what is measured so far"
    assert "no control critical_kv_lora, window_lora, fixed_lora" in verdict.lacking
    assert "3 seeds on 2 base models of budget_lora, full_lora (there are 2 on base 0, 2 on base 1)" in verdict.lacking


def test_without_controls_goal_2_is_not_measured(folder: Folder) -> None:
    tune(folder, {"base": 50, "budget_lora": 70})
    assert folder.page().second.status == UNMEASURED


def test_windows_that_fill_a_budget_are_named(folder: Folder) -> None:
    """A rule that always keeps its newest 64 tokens has nothing left to choose with at 40 of them."""
    budgets = sorted(SHARES)[:2]
    memory = {"selector": "snapkv", "selector_options": {"window_size": budgets[0]}}
    settings = {f"snapkv@{b}": (setting("snapkv", "rival", b, **memory), first(50)) for b in budgets}
    folder.run("main", "base0", {"full": (FULL, first(96))} | settings)
    told = next(line for line in folder.text().split("\n") if line.startswith("**Unfair to rivals:**"))
    assert f"`snapkv` spends 100 % of {budgets[0]}" in told
    assert (f"of {budgets[1]}" in told) == (budgets[0] / budgets[1] >= 0.5)
