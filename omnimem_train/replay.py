"""Encoder sides that write what they give into a cache, or give what a cache holds.

What is stored of a clip are the tokens of its media and, for each time at which it is asked something, what waits then
and where text goes. Questions are no part of it: they are rendered and embedded anew each time.

The key of a clip is a digest of everything that its tokens follow from: the bytes of its files (not their names or
dates, so a clip that was moved is found, and one that was replaced is not), the tracks used, the text before it, the
times of its questions, and the settings: all weights outside the decoder layers, the model's configuration and
preprocessing, encoder options, frame rate, reader, length, windows encoded at once, and the versions and the device
that computed it, since rounding differs between them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omnimem_train import __version__
from omnimem_train.checksums import bit_sum
from omnimem_train.data import DataConfig
from omnimem_train.encoder_cache import Damaged, EncoderCache, Entry, EntryWriter, block_of, tensors_of
from omnimem_train.manifest import Sample
from omnimem_train.models.interface import MediaEncoder, MediaInfo, MediaWindow, StreamingModel, TokenBlock

FORMAT = 1  # raise it when the tokens that encoders give change in any other way
Open = Callable[[], MediaEncoder]


class CacheLookup:
    """Finds and names the cached clips of a run.

    Args:
        cache: where they are.
        model: before its weights are sharded, so that all of them are seen.
        config: how clips are read.
        options: of the model's encoder side.
    """

    def __init__(self, cache: EncoderCache, model: StreamingModel, config: DataConfig, options: dict[str, Any]) -> None:
        self.cache, self._config = cache, config
        self.settings = {
            "format": FORMAT,
            "model": encoder_fingerprint(model),
            "options": options,
            "fps": config.fps,
            "reader": config.reader,
            "max_duration_s": config.max_duration_s,
            "windows": [model.window_s(config.fps), model.sampling_rate, config.encode_windows],
            "computed_by": computed_by(model, config.reader),
        }
        self._digests: dict[Path, tuple[tuple[int, ...], str]] = {}
        self._lock = threading.Lock()

    def __call__(self, sample: Sample) -> Entry | None:
        """The entry of a clip, if there is one."""
        key = self.key(sample)
        return None if key is None else self.cache.find(key)

    def key(self, sample: Sample) -> str | None:
        """Name of a clip's entry: 32 hex digits. None if a file cannot be read: the reader will say why."""
        hear = self._config.use_audio and sample.use_audio
        try:
            picture = self._digest(sample.media)
            sound = self._digest(sample.audio) if hear and sample.audio else hear
        except OSError:
            return None
        clip = {
            "picture": picture,
            "sound": sound,
            "prefix": sample.prefix,
            "times": sorted({turn.time_s for turn in sample.turns if turn.time_s is not None}),
            "end": any(turn.time_s is None for turn in sample.turns),
        }
        text = json.dumps({"settings": self.settings, "clip": clip}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _digest(self, path: Path | None) -> str | None:
        """Of a file's bytes; read once for as long as its size and dates stay."""
        if path is None:
            return None
        about = path.stat()
        state = (about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino)
        with self._lock:
            known = self._digests.get(path)
        if known is None or known[0] != state:
            with path.open("rb") as file:
                known = state, hashlib.file_digest(file, "sha256").hexdigest()
            with self._lock:
                self._digests[path] = known
        return known[1]


def encoder_fingerprint(model: StreamingModel) -> str:
    """32 hex digits of whatever in a model decides how media becomes tokens: every bit of every weight outside the
    decoder layers, configuration, preprocessing, and how the tokenizer reads a time stamp."""
    prefix, digest = model.language_prefix(), hashlib.sha256()
    for name, weight in sorted(model.module.state_dict().items()):
        if not name.startswith((prefix, model.HEAD)):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)} {bit_sum(weight)}\n".encode())
    about = {"encoding": model.encoding_settings(), "stamp": model.tokenizer("<0123456789.5 seconds>")["input_ids"]}
    digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:32]


def computed_by(model: StreamingModel, reader: str) -> dict[str, str]:
    """The versions and the device that rounding depends on."""
    names = ("torch", "transformers", "numpy", {"decord": "decord", "pyav": "av"}.get(reader, reader), "soundfile")
    found = {"omnimem-train": __version__}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    cuda = model.device.type == "cuda"
    return found | {"device": torch.cuda.get_device_name(model.device) if cuda else model.device.type}


class RecordingEncoder(MediaEncoder):
    """An encoder side whose tokens also go into a cache entry.

    Args:
        inner: what encodes.
        open_again: an encoder opened as `inner` was.
        writer: takes the entry.
    """

    def __init__(self, inner: MediaEncoder, open_again: Open, writer: EntryWriter) -> None:
        self._inner, self._open, self._writer = inner, open_again, writer
        self._windows: list[list[Any]] = []
        self._moments: dict[str, Tensor] = {}
        self._last = 0

    def start(self) -> TokenBlock:
        return self._inner.start()

    def push(self, window: MediaWindow) -> TokenBlock | None:
        block = self._inner.push(window)
        self._windows.append([window.start_s, window.end_s, window.last, self._keep(block)])
        return block

    def finish(self) -> TokenBlock | None:
        block = self._inner.finish()
        self._last = self._keep(block)
        self._windows.append([0.0, 0.0, True, self._last])
        return block

    def waiting(self) -> TokenBlock | None:
        """As usual; what is known at this moment is noted. (`text` without `waiting` would not be replayed.)"""
        block = self._inner.waiting()
        ended = self._open()
        ended.restore(self._inner.snapshot())
        ended.finish()
        name = f"{len(self._windows)}."
        self._moments |= {f"{name}state.{k}": x for k, x in ended.snapshot().items()}
        if block is not None:
            self._moments |= tensors_of(block, f"{name}waiting.")
        return block

    def text(self, ids: Tensor, *, closing: bool = True) -> TokenBlock:
        return self._inner.text(ids, closing=closing)

    def snapshot(self) -> dict[str, Tensor]:
        return self._inner.snapshot()

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        raise NotImplementedError("a recording begins at the beginning")

    def publish(self, info: MediaInfo) -> None:
        """The stream is whole: store it."""
        about = {"info": asdict(info) | {"path": ""}, "windows": self._windows}
        self._writer.publish(about, self._moments)

    def _keep(self, block: TokenBlock | None) -> int:
        if block is None or not block.n:
            return 0
        self._writer.add(block)
        return block.n


class ReplayedEncoder(MediaEncoder):
    """An encoder side that gives what an entry holds; only text is embedded.

    Args:
        entry: of the clip.
        model: for its device.
        open_again: an encoder opened as the recorded one was.

    Raises:
        Damaged: the entry cannot be used. (All methods may raise it.)
    """

    def __init__(self, entry: Entry, model: StreamingModel, open_again: Open) -> None:
        self._open, self._begun = open_again, open_again()
        self._blocks, self._stored = entry.blocks(model.device), entry.moments(model.device)
        self._windows = entry.about["windows"]
        self._pushed = 0
        self._ended: tuple[int, MediaEncoder] | None = None

    def windows(self) -> Iterator[MediaWindow]:
        """The recorded windows, without frames and samples."""
        for start_s, end_s, last, _ in self._windows[:-1]:
            yield MediaWindow(start_s, end_s, None, None, last)

    def start(self) -> TokenBlock:
        return self._begun.start()

    def push(self, window: MediaWindow) -> TokenBlock | None:
        size = self._windows[self._pushed][3]
        self._pushed += 1
        if not size:
            return None
        block = next(self._blocks, None)
        if block is None or block.n != size:
            raise Damaged("its blocks do not fit its windows")
        return block

    def finish(self) -> TokenBlock | None:
        return self.push(MediaWindow(0.0, 0.0, None, None, True))

    def waiting(self) -> TokenBlock | None:
        prefix = f"{self._pushed}.waiting."
        return block_of(self._stored, prefix) if f"{prefix}embeds" in self._stored else None

    def text(self, ids: Tensor, *, closing: bool = True) -> TokenBlock:
        """As the recorded encoder would have given it: from its state after `finish`, which waits for nothing."""
        if self._ended is None or self._ended[0] != self._pushed:
            prefix = f"{self._pushed}.state."
            state = {k.removeprefix(prefix): x for k, x in self._stored.items() if k.startswith(prefix)}
            if not state:
                raise Damaged(f"nothing is known about a question after {self._pushed} windows")
            encoder = self._open()
            encoder.restore(state)
            self._ended = self._pushed, encoder
        return self._ended[1].text(ids, closing=closing)

    def snapshot(self) -> dict[str, Tensor]:
        raise NotImplementedError("a replayed stream cannot be continued")

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        raise NotImplementedError("a replayed stream cannot be continued")


def info_of(entry: Entry, path: Path) -> MediaInfo:
    """What was known of the file at `path` when the entry was made."""
    return MediaInfo(**(entry.about["info"] | {"path": path}))


def grouped(windows: Iterator[MediaWindow], times: Sequence[float], n: int) -> Iterator[MediaWindow]:
    """Up to `n` windows joined to one, but none over a time at which something is asked.

    Encoders take any multiple of a model's window and give the same tokens, up to rounding: a tower called less often
    on more has less to launch.
    """
    held: list[MediaWindow] = []
    for window in windows:
        asked = bool(held) and any(held[-1].end_s - 1e-6 <= t < window.end_s - 1e-6 for t in times)
        if held and (asked or len(held) == n):
            yield joined(held)
            held = []
        held.append(window)
    if held:
        yield joined(held)


def joined(windows: list[MediaWindow]) -> MediaWindow:
    """Windows that follow each other, as one."""
    if len(windows) == 1:
        return windows[0]
    frames, samples = ([x for w in windows if (x := getattr(w, name)) is not None] for name in ("frames", "samples"))
    return MediaWindow(
        windows[0].start_s,
        windows[-1].end_s,
        np.concatenate(frames) if frames else None,
        np.concatenate(samples) if samples else None,
        windows[-1].last,
        windows[0].shrunk,
    )
