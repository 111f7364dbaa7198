"""The README's table of speed and memory, from results.json: table.py [--write README.md]"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OPEN, CLOSE = "<!-- scripts/bench/table.py: -->\n", "<!-- end -->\n"
ROWS = {
    "prefill.perturbation": "streaming prefill with scoring (`perturbation`)",
    "share.perturbation": "of it scoring and selection",
    "prefill.sliding_window": "streaming prefill without scoring",
    "prefill.sliding_window.split": "the same, `model.attention=split`",
    "ask.first_token": "`ask`: first token after a question",
    "lora.all": "LoRA step, gradient through all chunks",
    "lora.all.peak": "its peak of GPU memory",
    "lora.last_8": "LoRA step, gradient through the last 8 chunks",
    "lora.last_8.peak": "its peak of GPU memory",
    "lora.all_nf4": "LoRA step, gradient through all chunks, decoder in 4 bits",
    "lora.all_nf4.peak": "its peak of GPU memory",
    "lora.all_nf4.device": "all that its process takes of the GPU, capped at 24 GiB",
    "lora.all_nf4_whole": "the same with what waits for the backward pass on the host",
    "lora.all_nf4_whole.device": "all of the GPU that it takes, with the towers and AdamW",
    "utilisation.lora.all": "utilisation of the step through all chunks",
}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: what was measured of `ROWS`, with goals, whether they are met, and the machine.

    Raises:
        ValueError: rows of several machines or versions.
    """
    found = {r["name"]: r for r in results if r["name"] in ROWS and r["value"] is not None}
    made_on = {json.dumps(r["versions"], sort_keys=True) for r in found.values()}
    if len({json.loads(v)["device"] for v in made_on}) != 1:
        raise ValueError(f"results of {len(made_on)} machines cannot stand in one table")
    lines = ["| what | measured | goal |", "|---|---|---|"]
    for name, what in ROWS.items():
        if name in found:
            row = found[name]
            lines.append(f"| {what} | {row['value']:.3g} {row['unit']}{spread(row)} | {goal(row)} |")
    about = json.loads(made_on.pop())
    told = ", ".join(f"{k} {about[k]}" for k in ("torch", "cuda", "triton", "transformers", "peft", "python"))
    return "\n".join(lines) + f"\n\n{about['device']}; {told}.\n"


def spread(row: dict[str, Any]) -> str:
    """Smallest and largest of several timings."""
    low, high = row["spread"] or (row["value"], row["value"])
    return f" [{low:.3g}, {high:.3g}]" if low != high else ""


def goal(row: dict[str, Any]) -> str:
    """What was aimed at, and whether it is reached."""
    if row["goal"] is None:
        return ""
    met = row["value"] <= row["goal"] if row["better"] == "lower" else row["value"] >= row["goal"]
    return f"{row['goal']:g} {row['unit']}: {'met' if met else '**missed**'}"


def written(text: str, made: str) -> str:
    """`text` with the table between its two marks."""
    start, end = text.index(OPEN) + len(OPEN), text.index(CLOSE)
    return text[:start] + "\n" + made + "\n" + text[end:]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", type=Path, help="file to put it into, between the two marks")
    given = parser.parse_args()
    made = table(json.loads((HERE / "results.json").read_text()))
    if given.write:
        given.write.write_text(written(given.write.read_text(), made))
    else:
        print(made)
