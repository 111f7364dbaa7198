"""Files to windows: both readers, all kinds of files, and decoding processes that hang or die."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
import weakref
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from clips import RATE, frame_numbers, numbered_frames, tone, write_media

from omnimem_train import media, media_decode
from omnimem_train.errors import UserError
from omnimem_train.media import MediaError, probe, read_audio_blocks, read_windows
from omnimem_train.media_worker import OpenFile
from omnimem_train.models.interface import MediaWindow
from omnimem_train.resampling import Resampler

READERS = ("decord", "pyav")


def whole(windows: list[MediaWindow]) -> tuple[np.ndarray | None, np.ndarray | None]:
    """All frames and all samples of a file."""
    frames = None if windows[0].frames is None else np.concatenate([w.frames for w in windows])
    samples = None if windows[0].samples is None else np.concatenate([w.samples for w in windows])
    return frames, samples


def read(path: Path, reader: str = "pyav", fps: float = 2.0, window_s: float = 2.0, **options) -> list[MediaWindow]:
    with read_windows(path, reader=reader, fps=fps, window_s=window_s, **options) as opened:
        return list(opened)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    """4 s of numbered frames at 4 a second, with a tone."""
    return write_media(folder / "plain.mp4", numbered_frames(16), 4, tone(4))


@pytest.mark.parametrize("reader", READERS)
def test_windows_hold_the_frames_and_samples_of_their_time(plain: Path, reader: str) -> None:
    with read_windows(plain, fps=2, window_s=1.5, reader=reader) as opened:
        info, windows = opened.info, list(opened)
    assert (info.has_video, info.has_audio, info.width, info.height) == (True, True, 64, 48)
    assert (info.video_fps, info.sampling_rate) == (4.0, RATE)
    assert info.duration_s == pytest.approx(4.0)
    assert [(w.start_s, w.end_s, w.last) for w in windows] == [(0, 1.5, False), (1.5, 3, False), (3, 4.5, True)]
    assert [frame_numbers(w.frames) for w in windows] == [[0, 2, 4], [6, 8, 10], [12, 14]]
    assert [len(w.samples) for w in windows] == [24000, 24000, 16000]
    assert windows[0].frames.dtype == np.uint8
    assert windows[0].samples.dtype == np.float32
    assert (
        np.abs(whole(windows)[1] - tone(4)).mean() < 0.01
    )  # the AAC codec, and no shift: the tone has 36 samples a period


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (4, range(16)),
        (8, [k // 2 for k in range(32)]),
        (1, [0, 4, 8, 12]),
        (3, [0, 1, 3, 4, 5, 7, 8, 9, 11, 12, 13, 15]),
    ],
)
def test_frame_k_is_the_nearest_source_frame(plain: Path, reader: str, fps: float, expected: list[int]) -> None:
    """At 8 a second every other time lies halfway between two source frames: the earlier one counts."""
    assert frame_numbers(whole(read(plain, reader, fps))[0]) == list(expected)


@pytest.mark.parametrize("reader", READERS)
def test_b_frames_and_ntsc_rate(folder: Path, reader: str) -> None:
    path = write_media(folder / "ntsc.mp4", numbered_frames(25), 30000 / 1001, stream_options={"bf": "3", "g": "12"})
    frames, _ = whole(read(path, reader, fps=10))
    assert frame_numbers(frames) == [0, 3, 6, 9, 12, 15, 18, 21, 24]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("open_gop.mp4", "libx264", {"bf": "3", "g": "6", "x264-params": "open-gop=1:scenecut=0"}),
        ("open_gop.mkv", "libx264", {"bf": "3", "g": "6", "x264-params": "open-gop=1:scenecut=0"}),
        ("hevc.mp4", "libx265", {"x265-params": "keyint=6:bframes=3:log-level=none"}),
        ("vp9.webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "g": "6"}),
        ("unstamped.avi", "mpeg4", {"bf": "2", "g": "6", "qmin": "1", "qmax": "1"}),
        ("program.mpg", "mpeg2video", {"bf": "2", "g": "6", "qmin": "1", "qmax": "2"}),
    ],
)
def test_frames_are_right_whatever_refers_to_what(
    folder: Path, reader: str, name: str, codec: str, options: dict[str, str]
) -> None:
    """Sparse reading of files in which decord's seeking and skipping give wrong frames."""
    path = write_media(folder / name, numbered_frames(25, 64, 96), 25, codec=codec, stream_options=options)
    assert frame_numbers(whole(read(path, reader, fps=25 / 3))[0]) == list(range(0, 25, 3))
    assert frame_numbers(whole(read(path, reader, fps=25))[0]) == list(range(25))
    assert frame_numbers(whole(read(path, reader, fps=5, start_s=0.4))[0]) == [10, 15, 20]


def test_decord_refuses_transport_streams(folder: Path) -> None:
    """It would lose frames up to the second key frame, and say nothing."""
    path = write_media(folder / "stream.ts", numbered_frames(25), 25, tone(1), stream_options={"bf": "2", "g": "6"})
    with pytest.raises(MediaError, match="pyav reader reads them"):
        read(path, "decord")
    assert frame_numbers(whole(read(path, "pyav", fps=5))[0]) == [0, 5, 10, 15, 20]


def test_decord_hands_out_no_copies(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same file, had it not been refused: its reader is told to fail instead of filling up with copies."""
    path = write_media(folder / "copies.ts", numbered_frames(25), 25, stream_options={"bf": "2", "g": "6"})
    monkeypatch.setattr(media_decode, "_is_transport_stream", lambda path: False)
    picture = media_decode.DecordPicture(path, 25, 0)
    with pytest.raises(Exception, match="duplicate frames"):
        picture.take(25)


def cases(folder: Path) -> dict[str, Path]:
    """Ordinary files of many kinds; both readers must agree about each."""
    frames, stereo = numbered_frames(16), np.stack([tone(4, 44100), 0 * tone(4, 44100)])
    times = [0, 0.1, 0.2, 0.9, 1.0, 1.1, 1.9, 2, 2.1, 2.2, 2.3, 2.4, 3, 3.1, 3.2, 3.9]
    files = {
        "b_frames": {"frames": frames, "samples": tone(4), "stream_options": {"bf": "2", "g": "7"}},
        "no_sound": {"frames": frames},
        "stereo_44k": {"frames": frames, "samples": stereo, "rate": 44100},
        "mono_48k": {"frames": frames, "samples": tone(4, 48000), "rate": 48000},
        "mono_8k": {"frames": frames, "samples": tone(4, 8000), "rate": 8000},
        "late_sound": {"frames": frames, "samples": tone(4), "sound_start_s": 0.5},
        "short_sound": {"frames": frames, "samples": tone(1.3)},
        "long_sound": {"frames": frames[:6], "samples": tone(4)},
        "variable_rate": {"frames": frames, "samples": tone(4), "frame_times": times},
        "odd_size": {"frames": numbered_frames(8, 47, 63), "samples": tone(2)},
        "one_frame": {"frames": frames[:1]},
        "third_of_a_second": {"frames": frames[:9], "fps": 30, "samples": tone(0.3)},
    }
    made = {name: write_media(folder / f"{name}.mp4", **file) for name, file in files.items()}
    made["matroska"] = write_media(folder / "matroska.mkv", frames, 4, tone(4), sound_start_s=0.25)
    made["sound_only"] = write_media(folder / "sound_only.m4a", samples=tone(3))
    return made


@pytest.fixture(scope="module")
def files(folder: Path) -> dict[str, Path]:
    return cases(folder)


EXPECTED = {  # frames and samples (window by window, 2 s, 2 frames a second)
    "b_frames": [(4, 32000), (4, 32000)],
    "no_sound": [(4, None), (4, None)],
    "stereo_44k": [(4, 32000), (4, 32000)],
    "mono_48k": [(4, 32000), (4, 32000)],
    "mono_8k": [(4, 32000), (4, 32000)],
    "late_sound": [(4, 32000), (4, 32000), (0, 8512)],  # whole AAC blocks: 512 samples of padding
    "short_sound": [(4, 21504), (4, 0)],
    "long_sound": [(3, 32000), (0, 32000), (0, 512)],
    "variable_rate": [(4, 32000), (4, 32000), (1, 512)],
    "odd_size": [(4, 32000)],
    "one_frame": [(1, None)],
    "third_of_a_second": [(1, 4800)],
    "matroska": [(4, 32000), (4, 32000), (0, 4512)],
    "sound_only": [(None, 32000), (None, 16128)],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_both_readers_agree(files: dict[str, Path], name: str) -> None:
    path = files[name]
    decord, pyav = read(path, "decord"), read(path, "pyav")
    for windows in (decord, pyav):
        found = [(w.frames is not None and len(w.frames), w.samples is not None and len(w.samples)) for w in windows]
        expected = [(n is not None and n, m is not None and m) for n, m in EXPECTED[name]]
        assert [n for n, _ in found] == [n for n, _ in expected]
        # decord's resampler loses up to 2 ms at the end
        assert all(abs(m - want) <= 33 for (_, m), (_, want) in zip(found, expected, strict=True)), found
        assert [w.last for w in windows] == [False] * (len(windows) - 1) + [True]
    (frames_d, samples_d), (frames_p, samples_p) = whole(decord), whole(pyav)
    if frames_d is not None:
        assert frames_d.shape == frames_p.shape
        assert frame_numbers(frames_d) == frame_numbers(frames_p)
        assert np.abs(frames_d.astype(int) - frames_p).mean() < 2
    if samples_d is not None:
        n = min(len(samples_d), len(samples_p))
        assert np.abs(samples_d[:n] - samples_p[:n]).mean() < 0.02
    info_d, info_p = probe(path, "decord"), probe(path, "pyav")
    assert (info_d.has_video, info_d.has_audio, info_d.width, info_d.height, info_d.sampling_rate) == (
        info_p.has_video, info_p.has_audio, info_p.width, info_p.height, info_p.sampling_rate
    )  # fmt: skip
    assert info_d.duration_s == pytest.approx(info_p.duration_s, abs=0.15)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["stereo_44k", "mono_48k", "mono_8k"])
def test_sound_is_resampled_without_delay_and_mixed_as_ffmpeg_does(
    files: dict[str, Path], reader: str, name: str
) -> None:
    _, samples = whole(read(files[name], reader))
    truth = tone(4) * (0.5**0.5 if name == "stereo_44k" else 1.0)  # one of two channels is silent
    n = min(len(samples), len(truth)) - 400
    assert np.abs(samples[400:n] - truth[400:n]).mean() < 0.02  # half a period off (18 samples) would be 0.3


@pytest.mark.parametrize("reader", READERS)
def test_late_sound_is_preceded_by_silence(files: dict[str, Path], reader: str) -> None:
    _, samples = whole(read(files["late_sound"], reader))
    onset = int(np.flatnonzero(np.abs(samples) > 0.05)[0])
    assert abs(onset - 0.5 * RATE) < 100


@pytest.mark.parametrize("reader", READERS)
def test_variable_rate_shows_what_was_on_screen(files: dict[str, Path], reader: str) -> None:
    """Source frames stand at 0, .1, .2, .9, ...; at a mean rate of 4.5 a frame may come 0.11 s early."""
    frames, _ = whole(read(files["variable_rate"], reader))
    assert frame_numbers(frames) == [1, 2, 5, 5, 8, 11, 13, 14, 15]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("angle", [90, 180, 270])
def test_rotated_pictures_are_turned_upright(folder: Path, reader: str, angle: int) -> None:
    upright = numbered_frames(4)  # bright corner at the top left
    path = folder / f"turned{angle}.mp4"
    write_media(path, np.rot90(upright, angle // 90, axes=(1, 2)), 4)
    rotate_mp4(path, angle)
    frames, _ = whole(read(path, reader))
    assert frames.shape[1:3] == (48, 64)
    assert np.abs(frames.astype(int) - upright[[0, 2]]).mean() < 6


def rotate_mp4(path: Path, angle: int) -> None:
    """Ask players to turn the picture clockwise by `angle`: the matrix in the track header."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[angle]
    one = 1 << 16
    data[at : at + 36] = struct.pack(">9i", cos * one, sin * one, 0, -sin * one, cos * one, 0, 0, 0, 1 << 30)
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("reader", READERS)
def test_start_and_maximum(plain: Path, reader: str) -> None:
    full_frames, full_samples = whole(read(plain, reader))
    windows = read(plain, reader, window_s=1.0, start_s=1.0, max_s=1.5)
    assert [(w.start_s, w.end_s, w.last) for w in windows] == [(1.0, 2.0, False), (2.0, 2.5, True)]
    frames, samples = whole(windows)
    assert (frames == full_frames[2:5]).all()
    assert (samples == full_samples[16000:40000]).all()
    (beyond,) = read(plain, reader, start_s=9.0)
    assert (len(beyond.frames), len(beyond.samples), beyond.last) == (0, 0, True)


@pytest.mark.parametrize(("name", "rate"), [("a.wav", 48000), ("a.flac", 44100), ("a.wav", 16000)])
def test_sound_from_a_file_of_its_own(folder: Path, files: dict[str, Path], name: str, rate: int) -> None:
    """soundfile, block by block; the sound of the video is replaced, and goes on after the picture."""
    path = folder / name
    soundfile.write(path, np.stack([tone(5, rate), tone(5, rate)], 1), rate)
    windows = read(files["b_frames"], audio_path=path)
    assert [(len(w.frames), len(w.samples)) for w in windows] == [(4, 32000), (4, 32000), (0, 16000)]
    assert np.abs(whole(windows)[1] - tone(5) * 2**0.5).mean() < 2e-3
    alone = read(path)
    assert alone[0].frames is None
    assert (whole(alone)[1] == whole(windows)[1]).all()


def test_tracks_can_be_left_out(plain: Path) -> None:
    assert all(w.samples is None for w in read(plain, sound=False))
    assert all(w.frames is None for w in read(plain, picture=False))


@pytest.mark.parametrize("reader", READERS)
def test_audio_blocks(plain: Path, files: dict[str, Path], reader: str) -> None:
    blocks = list(read_audio_blocks(plain, block_s=1.5, reader=reader))
    assert [len(b) for b in blocks][:2] == [24000, 24000]
    assert (np.concatenate(blocks)[:64000] == whole(read(plain, reader))[1]).all()
    assert list(read_audio_blocks(files["no_sound"], reader=reader)) == []


def bad_files(folder: Path, plain: Path) -> dict[str, tuple[Path, str]]:
    """Files that cannot be read, and a word of the cause."""
    (folder / "text.mp4").write_text("this is no film")
    (folder / "empty.mp4").touch()
    (folder / "cut.mp4").write_bytes(plain.read_bytes()[:8000])
    fast = write_media(folder / "fast.mp4", numbered_frames(16), 4, tone(4), options={"movflags": "faststart"})
    (folder / "cut_behind_its_header.mp4").write_bytes(fast.read_bytes()[: len(fast.read_bytes()) // 2])
    (folder / "text.wav").write_text("this is no sound")
    return {
        "missing": (folder / "missing.mp4", "no such file"),
        "folder": (folder, "folder"),
        "empty": (folder / "empty.mp4", "empty"),
        "text": (folder / "text.mp4", "nvalid data"),
        "cut": (folder / "cut.mp4", "bytes are missing"),
        "cut_behind_its_header": (folder / "cut_behind_its_header.mp4", "bytes are missing"),
        "text_wav": (folder / "text.wav", "recogni"),
    }


@pytest.mark.parametrize("reader", READERS)
def test_bad_files_give_value_cause_and_remedy(folder: Path, plain: Path, reader: str) -> None:
    for name, (path, cause) in bad_files(folder, plain).items():
        with pytest.raises(MediaError) as caught:
            read(path, reader)
        error = caught.value
        assert isinstance(error, UserError)
        assert str(path) in error.what, name
        assert cause in error.cause, (name, error.cause)
        assert error.cause, name
        assert error.remedy, name
        assert error.path == path
        assert len(read(plain, reader)) == 2  # the next file is read all the same
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.what, copy.cause, copy.remedy, copy.path) == (error.what, error.cause, error.remedy, error.path)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("track", ["frames", "samples"])
def test_single_tracks_cut_behind_their_header(folder: Path, reader: str, track: str) -> None:
    """Inside a packet, and between two: then the decoder meets no error, only an early end."""
    content = {"frames": numbered_frames(25, 96, 96), "samples": tone(6)}[track]
    path = write_media(folder / f"{track}_cut.mp4", options={"movflags": "faststart"}, **{track: content})
    with av.open(str(path)) as file:
        starts = [p.pos for p in file.demux() if p.size]
    data = path.read_bytes()
    for end in (starts[len(starts) * 2 // 3] + 5, starts[len(starts) * 2 // 3]):
        path.write_bytes(data[:end])
        with pytest.raises(MediaError, match="bytes are missing"):
            read(path, reader)


@pytest.mark.parametrize(
    ("last", "complete"),
    [
        (struct.pack(">I4sQ", 1, b"mdat", 116) + bytes(100), True),
        (struct.pack(">I4sQ", 1, b"mdat", 117) + bytes(100), False),
        (struct.pack(">I4s", 0, b"mdat") + bytes(100), True),  # to the end of the file
        (struct.pack(">I4s", 900, b"junk") + bytes(100), True),  # no box a decoder needs
        (struct.pack(">I4s", 900, b"moov") + bytes(100), False),
    ],
)
def test_completeness_of_boxes(tmp_path: Path, last: bytes, complete: bool) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(struct.pack(">I4s4sI", 16, b"ftyp", b"isom", 0) + last)
    if complete:
        media_decode.check_complete(path)
    else:
        with pytest.raises(media_decode.Unreadable, match="bytes are missing"):
            media_decode.check_complete(path)


def test_a_picture_that_stops_early_is_an_error_with_pyav(folder: Path) -> None:
    """Cut between two packets, in a container without boxes: only the header's length tells."""
    path = write_media(folder / "cut.avi", numbered_frames(25, 96, 96), 4, codec="mpeg4")
    with av.open(str(path)) as file:
        starts = [p.pos for p in file.demux() if p.size]
    path.write_bytes(path.read_bytes()[: starts[12]])
    with pytest.raises(MediaError, match=r"the picture stops after 3\.00 s of"):
        read(path, "pyav")


@pytest.mark.parametrize("reader", READERS)
def test_damaged_sound_is_no_early_end(folder: Path, reader: str) -> None:
    """decord by itself hands out the sound before the damage, as if that were all."""
    path = write_media(folder / f"damaged_{reader}.m4a", samples=tone(6))
    with av.open(str(path)) as file:
        packet = [(p.pos, p.size) for p in file.demux() if p.size][50]
    data = bytearray(path.read_bytes())
    data[packet[0] : sum(packet)] = b"\xff" * packet[1]
    path.write_bytes(bytes(data))
    with pytest.raises(MediaError):
        read(path, reader)


def test_damage_that_ffmpeg_conceals_is_an_error_with_pyav(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (12, 96, 96, 3), np.uint8)
    path = write_media(folder / "concealed.mp4", noise, 4, stream_options={"g": "6", "bf": "0"})
    with av.open(str(path)) as file:
        packet = [(p.pos, p.size) for p in file.demux(video=0) if p.size][8]
    data = bytearray(path.read_bytes())
    for at in range(packet[0] + packet[1] // 2, sum(packet), 3):
        data[at] ^= 0x55
    path.write_bytes(bytes(data))
    with pytest.raises(MediaError, match="frame 8 of the picture is damaged"):
        read(path, "pyav")


def test_a_file_that_changes_is_read_anew(folder: Path) -> None:
    """decord's last sound track is kept for the next read of the same file, not of the same name."""
    path = write_media(folder / "changes.m4a", samples=tone(2))
    before = whole(read(path, "decord"))[1]
    write_media(path, samples=tone(2, hz=300))
    assert np.abs(whole(read(path, "decord"))[1] - before).mean() > 0.1


@pytest.mark.parametrize("reader", READERS)
def test_damage_in_the_middle_is_no_silent_copy(folder: Path, reader: str) -> None:
    """decord by itself hands out copies of neighbouring frames for those it cannot decode."""
    noise = np.random.default_rng(0).integers(0, 255, (24, 96, 96, 3), np.uint8)
    path = write_media(folder / f"damaged_{reader}.mp4", noise, 4)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 30000] = bytes(30000)
    path.write_bytes(bytes(data))
    with pytest.raises(MediaError):
        read(path, reader)


def test_hanging_decoder_is_killed_and_replaced(plain: Path) -> None:
    opened = read_windows(plain, fps=2, window_s=1, time_limit_s=0.5)
    first = next(opened)
    worker = opened._worker
    os.kill(worker._process.pid, signal.SIGSTOP)  # answers no more, as a hanging decoder does not
    begun = time.monotonic()
    with pytest.raises(MediaError, match=r"0\.5 s"):
        next(opened)
    assert time.monotonic() - begun < 5
    assert worker._process.returncode == -signal.SIGKILL
    assert list(opened) == []
    assert (read(plain, "decord", window_s=1)[0].frames == first.frames).all()


def test_dead_decoder_is_an_error_and_replaced(plain: Path) -> None:
    opened = read_windows(plain, fps=2, window_s=1)
    os.kill(opened._worker._process.pid, signal.SIGKILL)
    with pytest.raises(MediaError, match="died"):
        next(opened)
    assert len(read(plain)) == 2


def test_one_process_serves_many_files_and_open_readers_have_their_own(plain: Path, files: dict[str, Path]) -> None:
    media.close_workers()
    for path in (plain, files["no_sound"], plain):
        read(path)
    assert len(media._idle) == 1
    one, two = (read_windows(path, fps=2, window_s=1, reader="pyav") for path in (plain, files["long_sound"]))
    pairs = list(zip(one, two, strict=False))
    assert (pairs[1][0].samples == read(plain, window_s=1.0)[1].samples).all()
    list(two)
    assert len(media._idle) == 2


def test_a_reader_left_half_read_ends_its_process(plain: Path) -> None:
    opened = read_windows(plain, fps=2, window_s=1)
    next(opened)
    process = opened._worker._process
    del opened
    gc.collect()
    assert process.returncode is not None


def test_the_decoding_process_ends_with_its_parent(plain: Path) -> None:
    code = (
        "import sys; from omnimem_train.media import *; "
        "r = read_windows(sys.argv[1], fps=2, window_s=1); print(r._worker._process.pid, flush=True); "
        "import os; os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(plain)], capture_output=True, text=True)
    pid = int(done.stdout)
    for _ in range(50):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]:
            return
        time.sleep(0.1)
    raise AssertionError("the decoding process outlived its parent")


def test_the_decoding_process_ends_with_its_parent_even_while_its_input_is_open() -> None:
    """As when a decoder hangs and does not look at its input."""
    code = (
        "import subprocess, sys, time; "
        "p = subprocess.Popen([sys.executable, '-m', 'omnimem_train.media_worker'], stdout=subprocess.DEVNULL); "
        "print(p.pid, flush=True); time.sleep(1.5); import os; os._exit(0)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    pid = int(parent.stdout.readline())
    assert parent.wait() == 0
    for _ in range(50):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]:
            break
        time.sleep(0.1)
    else:
        os.kill(pid, signal.SIGKILL)
        raise AssertionError("the decoding process outlived its parent")
    parent.stdin.close()
    parent.stdout.close()


def test_the_decoding_process_starts_without_torch() -> None:
    code = "import sys, omnimem_train.media_worker; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


class Lengths(torch.utils.data.Dataset):
    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return sum(len(w.frames) for w in read(self.path, READERS[index % 2]))


def test_inside_data_loader_workers(plain: Path) -> None:
    """Daemonic processes; an idle decoding process of the parent must not be shared with them."""
    read(plain)
    loader = torch.utils.data.DataLoader(Lengths(plain), batch_size=None, num_workers=2)
    assert list(loader) == [8, 8, 8, 8]
    assert len(read(plain)) == 2


def test_memory_does_not_grow_with_length(folder: Path) -> None:
    """pyav, a picture of 60 MB decoded: the decoding process holds only windows of it."""
    path = write_media(folder / "long.mp4", np.repeat(numbered_frames(20, 240, 320), 13, 0), 4, tone(65))
    with read_windows(path, fps=4, window_s=2, reader="pyav") as opened:
        next(opened)
        status = Path(f"/proc/{opened._worker._process.pid}/status")
        peaks = [peak_mb(status)]
        peaks += [peak_mb(status) for window in opened if not window.last]
    assert peaks[-1] - peaks[0] < 15


def peak_mb(status: Path) -> float:
    return next(int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


@pytest.mark.parametrize(("source", "target"), [(48000, 16000), (44100, 16000), (8000, 16000), (16000, 16000)])
def test_resampler(source: int, target: int) -> None:
    """The same output for any division into blocks, the right length, and a tone stays that tone."""
    signal_in, truth = tone(1, source), tone(1, target)
    whole_at_once = Resampler(source, target)
    out = np.concatenate([whole_at_once.push(signal_in), whole_at_once.finish()])
    in_blocks, rng, parts, at = Resampler(source, target), np.random.default_rng(0), [], 0
    while at < len(signal_in):
        n = int(rng.integers(1, 700))
        parts.append(in_blocks.push(signal_in[at : at + n]))
        at += n
    out_blocks = np.concatenate([*parts, in_blocks.finish()])
    assert len(out) == len(out_blocks) == len(truth)
    assert np.abs(out - out_blocks).max() < 1e-6
    assert np.abs(out - truth)[200:-200].max() < 1e-3


def test_resampler_removes_what_the_target_cannot_hold() -> None:
    high = np.sin(2 * np.pi * 11000 * np.arange(48000) / 48000).astype(np.float32)
    resampler = Resampler(48000, 16000)
    out = np.concatenate([resampler.push(high), resampler.finish()])
    assert np.abs(out[200:-200]).max() < 1e-3


@pytest.mark.parametrize(
    ("options", "word"),
    [({"reader": "decor"}, "did you mean 'decord'"), ({"fps": 0}, "fps 0"), ({"window_s": -1}, "window_s -1")],
)
def test_impossible_values(plain: Path, options: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        read(plain, **options)


def test_a_reader_that_is_not_installed(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install av"):
        read(plain, "pyav")


def test_a_file_left_half_read_is_let_go_of_at_once(tmp_path: Path) -> None:
    """decord decodes on in the background for as long as its reader lives, into memory."""
    path = write_media(tmp_path / "a.mp4", numbered_frames(24), 4, tone(6))
    request = {
        "path": str(path),
        "reader": "decord",
        "fps": 2.0,
        "window_s": 1.0,
        "sampling_rate": RATE,
        "start_s": 0.0,
    }
    file = OpenFile(request | {"max_s": None, "audio_path": None, "picture": True, "sound": True})
    file.next()
    picture = weakref.ref(file._picture)
    gc.disable()
    try:
        file.close()
        assert picture() is None
    finally:
        gc.enable()
