"""How long clips are, without decoding them: from the manifest, from a list made before, or from the files' headers."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from omnimem_train.data import DataConfig, Sample
from omnimem_train.media import MediaError, read_windows


def clip_lengths(samples: Sequence[Sample], config: DataConfig, listing: Path) -> list[float]:
    """Seconds that are watched of each sample.

    `duration_s` of the manifest holds. The other files are opened by the run's reader, the picture alone where there
    is one: decord indexes the packets of a video and decodes one frame of it (but all of a sound that has no picture),
    pyav reads the header. What is found is written to `listing` and read from there the next time, for as long as a
    file's size and date stay. A file that cannot be opened counts as 0 s; training meets it in its turn.

    Args:
        listing: JSON file; a damaged one is made again.
    """
    known = _read(listing)
    prints = {sample.path: _print(sample.path) for sample in samples if "duration_s" not in sample.extra}
    wanted = [p for p, now in prints.items() if known.get(str(p), ["", 0.0])[0] != now]
    with ThreadPoolExecutor(max(1, config.workers)) as pool:
        pictured = {sample.path: sample.media is not None for sample in samples}
        seconds = pool.map(lambda path: _probe(path, config, pictured[path]), wanted)
        found: dict[str, list[str | float]] = {str(p): [prints[p], s] for p, s in zip(wanted, seconds, strict=True)}
    if found:
        _write(listing, known | found)
    known |= found
    whole = [float(s.extra["duration_s"]) if "duration_s" in s.extra else float(known[str(s.path)][1]) for s in samples]
    return [min(seconds, config.max_duration_s or seconds) for seconds in whole]


def _probe(path: Path, config: DataConfig, picture: bool) -> float:
    options = {"reader": config.reader, "time_limit_s": config.time_limit_s}
    try:
        with read_windows(path, fps=1.0, window_s=1.0, picture=picture, sound=not picture, **options) as opened:  # type: ignore[arg-type]
            return opened.info.duration_s
    except MediaError as error:
        print(f"length unknown: {error}", flush=True)
        return 0.0


def _print(path: Path) -> str:
    try:
        about = path.stat()
        return f"{about.st_size} {about.st_mtime_ns}"
    except OSError:
        return "unreadable"


def _read(listing: Path) -> dict[str, list[str | float]]:
    try:
        content = json.loads(listing.read_text())
        return {str(path): [str(text), float(seconds)] for path, (text, seconds) in content.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        print(f"{listing} is damaged ({error}); lengths are probed again", flush=True)
        return {}


def _write(listing: Path, content: dict[str, list[str | float]]) -> None:
    listing.parent.mkdir(parents=True, exist_ok=True)
    aside = listing.with_suffix(".tmp")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(aside, listing)
