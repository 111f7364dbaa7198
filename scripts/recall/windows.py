"""SnapKV and CriticalKV with a window of 8 newest tokens, with the redundancy factor, at the budgets of tuning:

    python -m scripts.recall.windows WORK      # about 10 minutes on two CPU cores

The study's first run offered them no window that leaves room to choose at its two smallest budgets.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from scripts.recall.jobs import Answers, Context, merge
from scripts.recall.methods import TUNED_AT, Form
from scripts.recall.study import Queue, at, check_work, sets

OPTIONS = (("history", "average"), ("window_size", 8))
RULES = ("critical_kv", "snapkv")


def jobs() -> list[Answers]:
    """One a rule; its settings are named after the window."""
    found = []
    for part, rule in enumerate(RULES):
        form = Form(rule, OPTIONS, rho=True)
        name = f"{form.kind}, window 8"
        specs = tuple((f"{name}@{b}", form.spec(b), name) for _, b in at([form], TUNED_AT))
        options = {"specs": specs, "family": form.family, "part": part, "model_name": "base0-windows"}
        found.append(Answers("ablation", 0, "test", dtype="float32", **options))  # type: ignore[arg-type]
    return found


def main(work: Path, base: Path, results: Path) -> list[str]:
    """Measure and merge; what failed."""
    context = Context(work, results, [base], sets(), "python -m scripts.recall.windows WORK", "cpu")
    check_work(context)
    queue = Queue(context, len(RULES), float("inf"))
    try:
        queue.run(jobs())
    finally:
        queue.close()
    merge(work, results)
    return queue.failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--base", type=Path, default=Path("checkpoints/tiny-omni"))
    parser.add_argument("--results", type=Path, default=Path("scripts/recall/results"))
    given = parser.parse_args()
    if failed := main(given.work, given.base, given.results):
        raise SystemExit(f"failed: {failed}")
