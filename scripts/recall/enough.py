"""Ends without error if the last validation in a log has all of the named kinds at a share or above:

python -m scripts.recall.enough LOG 0.85 colour pitch
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(log: str, least: str, *kinds: str) -> int:
    """0 if it has, 1 if not."""
    rows = [json.loads(line) for line in Path(log).read_text().splitlines()]
    last = next(row for row in reversed(rows) if row["stage"] == "val")
    return int(any(last[kind] < float(least) for kind in kinds))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
