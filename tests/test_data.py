"""Manifests, benchmark files, order, and clips decoded ahead."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import soundfile
from clips import frame_numbers, numbered_frames, tone, write_media

from omnimem_train.benchmarks import PROMPTS, load_choices
from omnimem_train.clip_order import epoch_order, epoch_repeats
from omnimem_train.data import (
    BrokenMedia,
    DataConfig,
    Sample,
    SkippedMedia,
    StreamDataset,
    StreamLoader,
)
from omnimem_train.errors import UserError
from omnimem_train.manifest import load_manifest
from omnimem_train.media import MediaError
from omnimem_train.models.interface import Turn

TALK = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "That."}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, n in (("a", 16), ("b", 8), ("c", 12)):
        write_media(folder / f"{name}.mp4", numbered_frames(n), 4, tone(n / 4))
    soundfile.write(folder / "a.wav", tone(4), 16000)
    (folder / "bad.mp4").write_text("no film")
    return folder


def manifest(folder: Path, entries: list[Any], name: str = "train.json") -> Path:
    path = folder / name
    lines = name.endswith(".jsonl")
    path.write_text("\n".join(map(json.dumps, entries)) if lines else json.dumps(entries))
    return path


def problems(folder: Path, entries: list[Any]) -> str:
    with pytest.raises(UserError) as caught:
        load_manifest(manifest(folder, entries))
    return str(caught.value)


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_llava_style(folder: Path, name: str) -> None:
    two = [*TALK, {"from": "human", "value": "And then?"}, {"from": "gpt", "value": "Nothing."}]
    entries = [
        {"id": "x", "video": "a.mp4", "conversations": TALK, "data_source": "academic"},
        {"id": 7, "video": "b.mp4", "use_audio": False, "conversations": two},
        {
            "video": "a.mp4",
            "audio": "a.wav",
            "conversations": [{"from": "human", "value": "Watch: <image>\nWhat?"}, TALK[1]],
        },
        {
            "id": "s",
            "video": None,
            "use_audio": None,
            "audio": "a.wav",
            "conversations": [{"from": "human", "value": "What is heard?\n<audio>"}, TALK[1]],
        },
    ]
    x, seven, both, sound = load_manifest(manifest(folder, entries, name))
    assert x == Sample("x", folder / "a.mp4", None, True, (Turn("What?", "That."),), "", {"data_source": "academic"})
    assert seven.id == "7"
    assert not seven.use_audio
    assert seven.turns == (Turn("And then?", "Nothing.", None, (("What?", "That."),)),)
    assert (both.prefix, both.turns[0].question, both.audio) == ("Watch:", "What?", folder / "a.wav")
    assert (sound.media, sound.path, sound.turns[0].question) == (None, folder / "a.wav", "What is heard?")


def test_turns_share_a_clip(folder: Path) -> None:
    turns = [
        {"question": "q1", "answer": "a1", "time_s": 2},
        {"question": "q2", "answer": "a2", "time_s": None, "kind": "colour", "earlier": [["q0", "a0"]]},
    ]
    (sample,) = load_manifest(manifest(folder, [{"id": "x", "video": "a.mp4", "turns": turns, "conversations": TALK}]))
    assert sample.turns == (Turn("What?", "That."), Turn("q1", "a1", 2.0), Turn("q2", "a2", None, (("q0", "a0"),)))


def test_media_root(folder: Path, tmp_path: Path) -> None:
    path = manifest(tmp_path, [{"video": "a.mp4", "conversations": TALK}])
    assert load_manifest(path, folder)[0].media == folder / "a.mp4"
    with pytest.raises(UserError, match="there is no file"):
        load_manifest(path)


def test_parquet_and_saved_datasets(folder: Path, tmp_path: Path) -> None:
    import datasets

    entries = [
        {"id": "x", "video": "a.mp4", "conversations": TALK, "turns": None},
        {
            "id": "y",
            "video": "b.mp4",
            "conversations": None,
            "turns": [{"question": "q", "answer": "a", "time_s": 1.0}],
        },
    ]
    table = datasets.Dataset.from_list(entries)
    table.to_parquet(str(tmp_path / "train.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    by_json = load_manifest(manifest(folder, entries))
    for path in (tmp_path / "train.parquet", tmp_path / "saved"):
        assert load_manifest(path, folder) == by_json
    assert load_manifest(tmp_path, folder) == by_json  # a folder with Parquet files
    (tmp_path / "bad.parquet").write_text("no table")
    with pytest.raises(UserError, match="cannot be read"):
        load_manifest(tmp_path / "bad.parquet")


BAD_ENTRIES = [
    ({"id": "a", "video": "missing.mp4", "conversations": TALK}, "there is no file"),
    ({"id": "a", "conversations": TALK}, "neither video nor audio"),
    ({"id": "a", "image": "x.png", "conversations": TALK}, "image"),
    ({"id": "a", "video": ["a.mp4"], "conversations": TALK}, "video is ['a.mp4']"),
    ({"id": "a", "video": "a.mp4"}, "neither conversations nor turns"),
    ({"id": "a", "video": "a.mp4", "use_audio": "yes", "conversations": TALK}, "use_audio is 'yes'"),
    (
        {"id": "a", "audio": "a.wav", "use_audio": False, "turns": [{"question": "q", "answer": "a"}]},
        "use_audio is false",
    ),
    ({"id": "a", "video": "a.mp4", "conversations": []}, "0 messages"),
    ({"id": "a", "video": "a.mp4", "conversations": TALK[:1]}, "1 messages"),
    ({"id": "a", "video": "a.mp4", "conversations": TALK[::-1]}, "gpt speaks where human should"),
    (
        {"id": "a", "video": "a.mp4", "conversations": [TALK[0], {"from": "robot", "value": "x"}]},
        "unknown role 'robot'",
    ),
    ({"id": "a", "video": "a.mp4", "conversations": [TALK[0], {"from": "gpt"}]}, "lacks from or value"),
    (
        {"id": "a", "video": "a.mp4", "conversations": [TALK[0], {"from": "gpt", "value": " "}]},
        "message 2: value is empty",
    ),
    ({"id": "a", "audio": "a.wav", "conversations": TALK}, "mark without a video"),
    ({"id": "a", "video": "a.mp4", "conversations": [{"from": "human", "value": "Hi"}, TALK[1]]}, "no media mark"),
    ({"id": "a", "video": "a.mp4", "conversations": [{"from": "human", "value": "<video>"}, TALK[1]]}, "nothing else"),
    (
        {"id": "a", "video": "a.mp4", "conversations": [{"from": "human", "value": "<video><video> x"}, TALK[1]]},
        "twice",
    ),
    ({"id": "a", "video": "a.mp4", "conversations": TALK * 2}, "mark after the first message"),
    ({"id": "a", "video": "a.mp4", "turns": []}, "turns is []"),
    ({"id": "a", "video": "a.mp4", "turns": [{"question": "q"}]}, "turn 1: answer is missing"),
    ({"id": "a", "video": "a.mp4", "turns": [{"question": "q", "answer": 5}]}, "answer is 5"),
    ({"id": "a", "video": "a.mp4", "turns": [{"question": "q", "answer": "a", "times": 3}]}, "did you mean 'time_s'"),
    ({"id": "a", "video": "a.mp4", "turns": [{"question": "q", "answer": "a", "time_s": -1}]}, "time_s is -1"),
    ({"id": "a", "video": "a.mp4", "turns": [{"question": "q", "answer": "a", "time_s": "end"}]}, "time_s is 'end'"),
    (
        {"id": "a", "video": "a.mp4", "duration_s": 4, "turns": [{"question": "q", "answer": "a", "time_s": 5}]},
        "length is 4",
    ),
    ({"id": "a", "video": "a.mp4", "turns": [{"question": "<video> q", "answer": "a"}]}, "mark in a turn"),
    ({"id": "a", "video": "a.mp4", "turns": [{"question": "q", "answer": "a", "earlier": ["x"]}]}, "earlier is"),
    ("a.mp4", "is a str"),
]


@pytest.mark.parametrize(("entry", "word"), BAD_ENTRIES, ids=[word for _, word in BAD_ENTRIES])
def test_each_problem_is_named_with_its_place(folder: Path, entry: Any, word: str) -> None:
    text = problems(folder, [{"id": "good", "video": "b.mp4", "conversations": TALK}, entry])
    assert "1 problem\n" in text
    assert "entry 2" in text
    assert word in text
    assert ";" in text  # a remedy follows


def test_all_problems_are_reported_at_once(folder: Path) -> None:
    entries = [{"id": "same", "video": f"missing{i}.mp4", "conversations": TALK} for i in range(15)]
    text = problems(folder, entries)
    assert "29 problems" in text  # 15 missing files, 14 repeated ids
    assert "and 9 more" in text
    assert "entry 2: id 'same' was used by entry 1" in text


def test_broken_manifest_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text('{"video": "a.mp4"\n\n{"video": 3}\nnull\n')
    with pytest.raises(UserError, match=r"(?s)2 problems.*line 1: no valid JSON.*line 4: None is a NoneType"):
        load_manifest(tmp_path / "lines.jsonl")
    for name, text, word in (
        ("a.json", "{", "no valid JSON"),
        ("a.json", "{}", "holds a dict"),
        ("a.json", "[]", "holds no entries"),
        ("a.jsonl", "", "holds no entries"),
        ("a.txt", "[]", "unknown kind"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=word):
            load_manifest(tmp_path / name)
    for missing in ("no.json", "no.parquet", "no_folder"):
        with pytest.raises(UserError, match="no such file"):
            load_manifest(tmp_path / missing)


# ---------------------------------------------------------------------------------------------------- benchmarks


def test_choices_of_our_own(folder: Path) -> None:
    item = {
        "video": "a.mp4",
        "question": "Which?",
        "options": ["A. x", "B. y"],
        "answer": "(b)",
        "time_s": 3,
        "level": 2,
    }
    path = manifest(folder, [item, {**item, "id": "n", "audio": "a.wav", "use_audio": False}], "choices.jsonl")
    first, second = load_choices(path)
    assert (first.id, first.options, first.answer, first.time_s) == ("line 1", ("x", "y"), "B", 3)
    assert first.prompt == "Which?\nA. x\nB. y\nAnswer with the letter of the right option."
    assert first.meta == {"level": 2, "cluster": "a.mp4"}
    assert (second.audio, second.use_audio) == (folder / "a.wav", False)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    for name in ("data/yt1.mp4", "yt2.mkv", "videos/yt3.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_videomme_long(videos: Path) -> None:
    row = {"video_id": "601", "duration": "long", "domain": "Knowledge", "sub_category": "Humanity", "videoID": "yt1",
           "question_id": "601-1", "task_type": "Counting", "question": "How many?", "answer": "C",
           "options": ["A. One.", "B. Two.", "C. Three.", "D. Four."]}  # fmt: skip
    rows = [
        row,
        {**row, "question_id": "001-1", "duration": "short"},
        {**row, "question_id": "601-2", "videoID": "yt2"},
    ]
    items = load_choices(manifest(videos, rows, "videomme.json"), form="videomme")
    assert [i.id for i in items] == ["601-1", "601-2"]
    assert [i.media for i in items] == [videos / "data/yt1.mp4", videos / "yt2.mkv"]
    assert items[0].options == ("One.", "Two.", "Three.", "Four.")
    assert items[0].meta["cluster"] == "yt1"
    assert items[0].prompt == (
        "Select the best answer to the following multiple-choice question based on the video. Respond with only the "
        "letter (A, B, C, or D) of the correct option.\n"
        "How many?\nA. One.\nB. Two.\nC. Three.\nD. Four.\nThe best answer is:"
    )
    with pytest.raises(UserError, match="no question of the kind wanted"):
        load_choices(manifest(videos, [rows[1]], "videomme.json"), form="videomme")


def test_lvbench(videos: Path) -> None:
    text = "What year is it?\n(A) 1636\n(B) 1366\n(C) 1363\n(D) 1633"
    qa = [{"uid": "181", "question": text, "answer": "D", "question_type": ["key information retrieval"],
           "time_reference": "00:15-00:19"}]  # fmt: skip
    line = {"key": "yt3", "type": "documentary", "video_info": {"duration_minutes": 60}, "qa": qa}
    (item,) = load_choices(manifest(videos, [line], "meta.jsonl"), form="lvbench")
    assert (item.id, item.media, item.question, item.answer) == (
        "181",
        videos / "videos/yt3.mp4",
        "What year is it?",
        "D",
    )
    assert item.options == ("1636", "1366", "1363", "1633")
    assert item.prompt == text + "\nAnswer the question with the option letter"
    assert item.meta["time_reference"] == "00:15-00:19"
    assert item.meta["category"] == "key information retrieval"


@pytest.mark.parametrize("options", [["cat", "dog"], ["A. cat", "B. dog"], ["A) cat", "(B) dog"]])
def test_lvomnibench(videos: Path, options: list[str]) -> None:
    row = {"video_id": "yt3", "question": "Who barks?", "options": options, "correct_option": "B",
           "question_type": "Perception", "audio_type": "sound", "difficulty": "Low"}  # fmt: skip
    first, second = load_choices(manifest(videos, [row, row], "data.json"), form="lvomnibench")
    assert first.id != second.id
    assert first.prompt.startswith("Question: Who barks?\nOptions:\nA. cat\nB. dog\n\nSelect the best answer")
    assert first.meta["difficulty"] == "Low"


def test_benchmark_problems_are_collected(videos: Path) -> None:
    good = {"video_id": "yt1", "question": "q", "options": ["x", "y"], "correct_option": "A"}
    bad = [
        {**good, "video_id": "gone"},
        {**good, "correct_option": "C"},
        {**good, "correct_option": None},
        {**good, "options": ["x"]},
        {**good, "options": ["x", "x"]},
        {**good, "question": ""},
    ]
    path = manifest(videos, [good, *bad], "data.json")
    with pytest.raises(UserError) as caught:
        load_choices(path, form="lvomnibench")
    text = str(caught.value)
    for word in ("no video 'gone'", "answer 'C' for 2", "correct_option is missing", "options are ['x']", "must differ",
                 "question is ''"):  # fmt: skip
        assert word in text
    assert all(f"entry {n}" in text for n in range(2, 8))
    kept = load_choices(manifest(videos, [good, bad[0]], "data.json"), form="lvomnibench", require_media=False)
    assert [i.media.name for i in kept] == ["yt1.mp4", "gone.mp4"]  # not left out of the denominator
    with pytest.raises(UserError, match="did you mean 'lvbench'"):
        load_choices(path, form="lvbensh")
    assert set(PROMPTS) == {"manifest", "videomme", "lvbench", "lvomnibench"}


# --------------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize(("n", "world"), [(10, 1), (10, 2), (10, 3), (10, 4), (2, 5), (1, 8)])
def test_ranks_share_an_epoch(n: int, world: int) -> None:
    orders = [epoch_order(n, 3, 5, world, rank) for rank in range(world)]
    assert len({len(o) for o in orders}) == 1
    seen = Counter(itertools.chain(*orders))
    assert set(seen) == set(range(n))  # nothing is dropped
    assert sum(seen.values()) - n == epoch_repeats(n, world)
    assert n < world or max(seen.values()) <= 2


def test_order_depends_on_seed_and_epoch_alone() -> None:
    assert epoch_order(50, 1, 2) == epoch_order(50, 1, 2)
    assert len({tuple(epoch_order(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert sorted(epoch_order(50, 1, 2)) == list(range(50))


# -------------------------------------------------------------------------------------------------------- loading


def samples_of(folder: Path, names: str = "abc") -> list[Sample]:
    return [Sample(n, folder / f"{n}.mp4", None, True, (Turn("q", "a"),)) for n in names]


def loader_of(
    folder: Path, names: str = "abc", *, seed: int = 0, world: int = 1, rank: int = 0, **config
) -> StreamLoader:
    dataset = StreamDataset(samples_of(folder, names), DataConfig(**config), window_s=1.0)
    return StreamLoader(dataset, seed, world, rank)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_clips_come_in_order_and_whole(folder: Path, workers: int) -> None:
    loader = loader_of(folder, workers=workers, prefetch_windows=2)
    found = []
    for clip in loader.clips(stop=7):  # more than two epochs
        frames = [k for window in clip for k in frame_numbers(window.frames)]
        assert frames == list(range(0, {"a": 16, "b": 8, "c": 12}[clip.sample.id], 2))
        assert clip.info.has_audio
        found.append(clip.sample.id)
    expected = [samples_of(folder)[i].id for epoch in range(3) for i in epoch_order(3, 0, epoch)]
    assert found == expected[:7]
    assert loader.position == 7
    assert loader.waited_s > 0


def test_going_on_from_a_position_opens_nothing_before_it(folder: Path) -> None:
    all_ids = [clip.sample.id for clip in loader_of(folder).clips(stop=8)]
    loader = loader_of(folder)
    assert [clip.sample.id for clip in loader.clips(start=5, stop=8)] == all_ids[5:]
    assert loader.position == 8
    ranks = [[c.sample.id for c in loader_of(folder, world=2, rank=r).clips(stop=2)] for r in (0, 1)]
    assert set(ranks[0] + ranks[1]) == set("abc")


def test_decoding_runs_ahead_within_bounds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a slow consumer nothing is waited for after the start, and no more than the bounds allow is open or held."""
    opened = []
    original = StreamDataset.open
    monkeypatch.setattr(StreamDataset, "open", lambda self, s: opened.append(s.id) or original(self, s))
    dataset = StreamDataset(samples_of(folder, "aaaaa"), DataConfig(workers=2, prefetch_windows=2), window_s=0.25)
    loader = StreamLoader(dataset)
    clips = loader.clips()
    clip = next(clips)
    next(iter(clip))
    time.sleep(0.6)
    assert len(opened) == 2  # the current clip and the next one
    assert clip._queue.qsize() == 3  # of 16 windows: info and two windows fit
    waits = []
    for n_opened in (3, 4, 5):
        before = loader.waited_s
        assert next(clips).info.has_video
        waits.append(loader.waited_s - before)
        time.sleep(0.3)
        assert len(opened) == n_opened
    clips.close()
    assert decoding_ends()
    assert min(waits) < 0.05  # they were there already; a busy machine may be late once


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_stops_the_run_by_default(folder: Path, workers: int) -> None:
    loader = loader_of(folder, ("bad",), workers=workers)
    for clip in loader.clips(stop=1):
        for _ in range(2):  # asking again says the same
            with pytest.raises(MediaError, match=r"bad.mp4: cannot be decoded(?s:.*)max_broken=1") as caught:
                list(clip)
    assert not isinstance(caught.value, SkippedMedia)


def test_a_clip_that_was_left_behind_says_so(folder: Path) -> None:
    """The queue is shorter than the clip, so not all of it can have been decoded before."""
    first, _ = itertools.islice(loader_of(folder, "aa", prefetch_windows=1).clips(), 2)
    with pytest.raises(RuntimeError, match="was closed"):
        list(first)


def test_broken_files_within_the_limit_are_counted_listed_and_never_replaced(folder: Path, tmp_path: Path) -> None:
    (folder / "bad2.mp4").write_text("no film either")
    dataset = StreamDataset(samples_of(folder, ("a", "bad", "b", "bad2")), DataConfig(max_broken=2), 1.0)
    listing = tmp_path / "run" / "broken.jsonl"
    loader = StreamLoader(dataset, broken=BrokenMedia(2, listing))
    seen, skipped = [], []
    for clip in loader.clips(stop=8):  # two epochs: each file counts once
        try:
            list(clip)
            seen.append(clip.sample.id)
        except SkippedMedia as error:
            skipped.append((clip.sample.id, error.cause))
    assert Counter(seen) == {"a": 2, "b": 2}
    assert Counter(name for name, _ in skipped) == {"bad": 2, "bad2": 2}
    assert all("2 allowed" in cause for _, cause in skipped)
    assert len(loader.broken) == 2
    lines = [json.loads(line) for line in listing.read_text().splitlines()]
    assert sorted(line["id"] for line in lines) == ["bad", "bad2"]
    assert all(line["cause"] for line in lines)
    again = BrokenMedia(2, listing)  # a resumed run knows them
    assert len(again) == 2
    (folder / "bad3.mp4").write_text("the third")
    third = StreamLoader(StreamDataset(samples_of(folder, ("bad3",)), DataConfig(), 1.0), broken=again)
    clips = third.clips()
    with pytest.raises(MediaError, match="broken file 3, 2 allowed"):
        list(next(clips))


def test_use_audio_and_maximum_duration(folder: Path) -> None:
    clips = loader_of(folder, "a", use_audio=False, max_duration_s=2.5).clips()
    windows = list(clip := next(clips))
    assert not clip.info.has_audio
    assert all(w.samples is None for w in windows)
    assert [len(w.frames) for w in windows] == [2, 2, 1]
    dataset = StreamDataset([Sample("s", None, folder / "a.wav", True, (Turn("q", "a"),))], DataConfig(), 1.0)
    with dataset.open(dataset[0]) as reader:
        assert [len(w.samples) for w in reader] == [16000] * 4
    silent = StreamDataset(dataset.samples, DataConfig(use_audio=False), 1.0)
    with pytest.raises(MediaError, match="nothing to perceive"):
        silent.open(silent[0])


def test_a_turn_behind_the_end_is_an_error(folder: Path) -> None:
    sample = Sample("b", folder / "b.mp4", None, True, (Turn("q", "a", 2.0), Turn("q", "a", 9.0)))
    dataset = StreamDataset([sample], DataConfig(), 1.0)
    with pytest.raises(MediaError, match=r"asked at 9 s(?s:.*)only 2 s"):
        dataset.open(sample)


def test_leaving_early_stops_decoding(folder: Path) -> None:
    for clip in loader_of(folder, workers=3).clips():
        next(iter(clip))
        break
    assert decoding_ends()


def decoding_ends() -> bool:
    """Whether all decoding threads end within some seconds."""
    deadline = time.monotonic() + 5
    while any(t.name.startswith("decode") for t in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(t.name.startswith("decode") for t in threading.enumerate())


@pytest.mark.parametrize(
    ("values", "word"),
    [({"reader": "opencv"}, "decord, pyav"), ({"fps": 0.0}, "data.fps=0.0"), ({"workers": -1}, "data.workers=-1"),
     ({"max_broken": -1}, "max_broken"), ({"max_duration_s": 0.0}, "max_duration_s")],
)  # fmt: skip
def test_impossible_configuration(values: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        DataConfig(**values)


def test_no_samples() -> None:
    with pytest.raises(UserError, match="no samples"):
        StreamDataset([], DataConfig(), 1.0)
