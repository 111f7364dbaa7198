"""Media that cannot be decoded: counted against a declared limit and listed, never replaced."""

from __future__ import annotations

import json
from pathlib import Path

from omnimem_train.errors import UserError
from omnimem_train.manifest import Sample
from omnimem_train.media import MediaError


class SkippedMedia(MediaError):
    """A broken file within the declared limit: skip this clip and go on."""


class BrokenMedia:
    """Counts broken files against a limit and lists them in a file, one JSON object a line.

    A file that is met again in a later epoch, or after resuming with the same list, counts once.

    Args:
        limit: `DataConfig.max_broken`.
        listing: where to list them; None for no list. With several ranks, one each.
    """

    def __init__(self, limit: int, listing: Path | None = None) -> None:
        self._limit, self._listing = limit, listing
        self._ids: set[str] = set()
        if listing is not None and listing.exists():
            try:
                self._ids = {json.loads(line)["id"] for line in listing.read_text().splitlines()}
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{listing} is damaged", repr(error), "delete it: broken files are then counted anew"
                ) from error

    def __len__(self) -> int:
        return len(self._ids)

    def note(self, sample: Sample, error: MediaError) -> MediaError:
        """The error to raise for a broken clip: SkippedMedia within the limit, beyond it a MediaError that ends all."""
        if sample.id not in self._ids:
            self._ids.add(sample.id)
            if self._listing is not None:
                path = str(error.path or sample.path)
                line = {"id": sample.id, "path": path, "what": error.what, "cause": error.cause}
                self._listing.parent.mkdir(parents=True, exist_ok=True)
                with self._listing.open("a") as out:
                    out.write(json.dumps(line) + "\n")
        count = f"broken file {len(self._ids)}, {self._limit} allowed"
        if len(self._ids) <= self._limit:
            return SkippedMedia(error.what, f"{error.cause} ({count})", error.remedy, error.path)
        remedy = f"{error.remedy}; or allow some broken files: data.max_broken={len(self._ids)}"
        return MediaError(error.what, f"{error.cause} ({count})", remedy, error.path)
