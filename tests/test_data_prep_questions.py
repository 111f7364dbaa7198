"""Questions of the recall world: right, known in time, and nothing to guess from without watching and listening."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest

from data_prep.questions import KINDS, QUARTERS, TIMES, Question, QuestionMaker, narration
from data_prep.world import HELD_OUT, SPLITS, ClipSpec, Sight, WorldSettings, crop, make_clip

LENGTHS = (30.0, 60.0, 300.0)


def asked(split: str, clips: int, seconds: float = 60.0, n: int | None = None) -> list[tuple[ClipSpec, Question]]:
    """Questions of many clips of a split, in order."""
    settings, maker = WorldSettings(seconds=seconds), QuestionMaker(0, SPLITS.index(split))
    specs = [make_clip(settings, 0, split, i) for i in range(clips)]
    return [(spec, question) for spec in specs for question in maker.ask(spec, n)]


def right(question: Question) -> str:
    return question.options["ABCD".index(question.answer)]


def answer_from_log(spec: ClipSpec, question: Question) -> str:
    """The right option, worked out from the events without the question maker."""
    word = question.text.rstrip("?").split()
    times = defaultdict(list)
    for e in (*spec.sights, *spec.sounds):
        times[e.shape if isinstance(e, Sight) else e.pattern].append(e)
    if question.kind in ("colour", "pitch"):
        (answer,) = {getattr(e, question.kind) for e in times[word[-1]]}
        return answer
    if question.kind == "order":
        return min(question.options, key=lambda name: times[name][0].start_s)
    name = word[-3 if question.kind == "together" else -2]
    if question.kind == "count":
        return TIMES[len(times[name]) - 1]
    (event,) = times[name]
    if question.kind == "when":
        return QUARTERS[int(4 * (event.start_s + event.end_s) / 2 / spec.settings.seconds)]
    others = spec.sights if word[1] == "shape" else spec.sounds
    (found,) = [e for e in others if e.start_s < event.end_s and e.end_s > event.start_s]
    return found.shape if isinstance(found, Sight) else found.pattern


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_right_and_known_in_time(split: str) -> None:
    kinds = Counter[str]()
    for spec, q in asked(split, 60):
        assert len(set(q.options)) == 4
        assert right(q) == answer_from_log(spec, q), (q, spec)
        assert 0 < q.known_s <= 60
        if q.kind not in ("count", "when"):  # what is shown until then is enough
            until = 3 * (1 + int((q.known_s - 0.1) / 3))
            start = crop(spec, 0, max(until, 6))
            assert right(q) == answer_from_log(start, q)
        kinds[q.kind] += 1
    assert set(kinds) == set(KINDS)
    assert min(kinds.values()) > 100


@pytest.mark.parametrize("n", [None, 6])
@pytest.mark.parametrize("seconds", LENGTHS)
def test_answers_are_balanced_over_letters_and_texts(seconds: float, n: int | None) -> None:
    letters, texts, kinds = Counter[tuple[str, str]](), Counter[str](), Counter[str]()
    for _, q in asked("val", 100, seconds, n):
        kinds[q.kind] += 1
        letters[q.kind, q.answer] += 1
        texts[right(q)] += 1
    assert all(abs(n - kinds[kind] / 4) <= 1 for (kind, _), n in letters.items())
    for kind, options in (("count", TIMES), ("when", QUARTERS)):
        assert kinds[kind] > 80
        assert all(abs(texts[text] - kinds[kind] / 4) <= 4 for text in options)


def test_a_random_selection_goes_round_the_kinds() -> None:
    settings, maker = WorldSettings(), QuestionMaker(0, 0)
    for index in range(30):
        spec = make_clip(settings, 0, "train", index)
        for n in (0, 1, 7, 12):
            questions = maker.ask(spec, n)
            assert len(questions) == len({q.text + str(q.options) for q in questions}) == n
            kinds = Counter(q.kind for q in questions)
            assert n < 6 or max(kinds.values()) <= 4
    short = make_clip(WorldSettings(seconds=4.0), 0, "train", 0)
    assert 0 < len(maker.ask(short, 100)) < 10


def features(q: Question, option: int) -> Iterator[tuple[str, ...]]:
    """What a guesser can know of an option from the question's text and options alone."""
    text = q.options[option]
    yield (q.kind, "letter", "ABCD"[option])
    yield (q.kind, "option", text)
    yield (q.text, "option", text)
    yield (q.kind, "place among options", str(sorted(q.options).index(text)))
    for other in q.options:
        yield (q.text, "option beside", text, other)


def guesser_accuracy(learn: Iterable[Question], test: Iterable[Question]) -> dict[str, float]:
    """Accuracy by kind of the best of the simple guessers: each takes, of the four options, the one that was most often
    right when it was offered, by one kind of feature, with what it learned from other questions."""
    offered: dict[tuple[str, ...], list[int]] = defaultdict(lambda: [0, 0])
    for q in learn:
        for i in range(4):
            for feature in features(q, i):
                offered[feature][0] += 1
                offered[feature][1] += "ABCD"[i] == q.answer
    hits, total, rng = Counter[tuple[str, int]](), Counter[str](), random.Random(0)
    for q in test:
        total[q.kind] += 1
        for number, rows in enumerate(zip(*(features(q, i) for i in range(4)), strict=True)):
            scores = [(offered[f][1] + 2.5) / (offered[f][0] + 10) + 1e-6 * rng.random() for f in rows]
            hits[q.kind, number] += "ABCD"[scores.index(max(scores))] == q.answer
    return {kind: max(hits[kind, number] for number in range(8)) / n for kind, n in total.items()}


@pytest.mark.parametrize("learn", ["train", "test"])
@pytest.mark.parametrize("seconds", LENGTHS[:2])
def test_a_guesser_of_questions_stays_at_chance(learn: str, seconds: float) -> None:
    """Learned on training questions, or even on test questions: questions alone do not tell the answers. (The best of
    eight guessers, for six kinds: hence four standard deviations, of a thousand clips.)"""
    questions = [q for _, q in asked("test", 1000, seconds)]
    others = [q for _, q in asked("train", 500, seconds)] if learn == "train" else questions[: len(questions) // 2]
    judged = questions[len(questions) // 2 :]
    n = Counter(q.kind for q in judged)
    for kind, accuracy in guesser_accuracy(others, judged).items():
        assert accuracy < 0.25 + 4 * (0.25 * 0.75 / n[kind]) ** 0.5, (kind, accuracy, n[kind])


@pytest.mark.parametrize("seconds", LENGTHS)
def test_together_needs_both_modalities(seconds: float) -> None:
    """Options occur in the clip; which of them occurs most or least, longest or first says nothing about the answer."""
    hits, n = Counter[str](), 0
    for spec, q in asked("val", 300, seconds):
        if q.kind != "together":
            continue
        events = [[e for e in (*spec.sights, *spec.sounds) if o in (getattr(e, "shape", ""), getattr(e, "pattern", ""))]
                  for o in q.options]  # fmt: skip
        assert all(events)
        n += 1
        for name, key in (
            ("count", [len(e) for e in events]),
            ("length", [sum(x.end_s - x.start_s for x in e) for e in events]),
            ("first", [e[0].start_s for e in events]),
            ("faint", [sum(x.faint for x in e) for e in events]),
        ):
            for way in (max, min):
                best = [i for i in range(4) if key[i] == way(key)]
                hits[name + way.__name__] += ("ABCD".index(q.answer) in best) / len(best)
    assert n > 300
    for name, hit in hits.items():
        assert abs(hit / n - 0.25) < 3.5 * (0.25 * 0.75 / n) ** 0.5 + 0.01, (name, hit / n)


def test_count_and_when_say_nothing_about_the_other_modality() -> None:
    """A model that hears alone cannot count shapes: how many sounds there are is the same whatever the answer."""
    by_answer = defaultdict(list)
    for spec, q in asked("val", 300):
        if q.kind == "count" and q.text.endswith("seen?"):
            by_answer[right(q)].append(len({e.pattern for e in spec.sounds}))
    means = [sum(v) / len(v) for v in by_answer.values()]
    assert len(means) == 4
    assert max(means) - min(means) < 0.6


@pytest.mark.parametrize("kind", ["colour", "pitch"])
def test_held_out_answers_are_offered_fairly(kind: str) -> None:
    """In test always offered and right in a quarter of the questions; elsewhere never offered."""
    for split, rate in (("train", 0.0), ("val", 0.0), ("test", 1.0)):
        questions = [q for _, q in asked(split, 100) if q.kind == kind]
        held_out = [HELD_OUT[q.text.rstrip("?").split()[-1]] for q in questions]
        assert all((h in q.options) == rate for h, q in zip(held_out, questions, strict=True))
        assert [right(q) == h for h, q in zip(held_out, questions, strict=True)] == [q.held_out for q in questions]
        assert sum(q.held_out for q in questions) == pytest.approx(rate * len(questions) / 4, abs=3)


def test_held_out_marks_the_things_of_a_question() -> None:
    questions = asked("test", 100)
    share = {kind: [q.held_out for _, q in questions if q.kind == kind] for kind in KINDS}
    for kind, expected in (("together", 0.75), ("order", 0.5), ("count", 0.5), ("when", 0.5)):
        assert sum(share[kind]) / len(share[kind]) == pytest.approx(expected, abs=0.1)
    assert not any(q.held_out for _, q in asked("val", 30))


def test_narration_names_every_event_in_order() -> None:
    spec = make_clip(WorldSettings(), 0, "train", 0)
    parts = narration(spec).split("; ")
    assert len(parts) == len({e.slot for e in (*spec.sights, *spec.sounds)})
    said = [words for part in parts for words in part.split(" and ")]
    events = sorted((*spec.sights, *spec.sounds), key=lambda e: (e.slot, not isinstance(e, Sight)))
    assert said == [f"{e.colour} {e.shape}" if isinstance(e, Sight) else f"{e.pitch} {e.pattern}" for e in events]


def test_a_world_of_one_modality_asks_about_that_alone() -> None:
    for share, absent in ((0.0, {"pitch", "together"}), (1.0, {"colour", "together"})):
        spec = make_clip(replace(WorldSettings(), sound_share=share), 0, "train", 0)
        assert {q.kind for q in QuestionMaker(0, 0).ask(spec)} == set(KINDS) - absent
