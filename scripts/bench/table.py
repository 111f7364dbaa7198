"""The README's table of speed and memory, from results.json: table.py [--write README.md]"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OPEN, CLOSE = "<!-- scripts/bench/table.py: -->\n", "<!-- end -->\n"
ROWS = {
    "prefill.perturbation.graphs": "streaming prefill with scoring (`perturbation`)",
    "share.perturbation.graphs": "of it scoring and selection",
    "prefill.sliding_window.graphs": "streaming prefill without scoring",
    "agreement.64_probes.graphs": "tokens kept with its 64 probes and with all queries, in a model of random weights",
    "prefill.observed_attention.graphs": "streaming prefill with attention of all queries (`observed_attention`)",
    "share.observed_attention.graphs": "of it scoring and selection",
    "prefill.omnimem.graphs": "streaming prefill with the paper's selector (`omnimem`): all queries, and layer inputs",
    "share.omnimem.graphs": "of it scoring and selection",
    "ask.first_token.graphs": "`ask`: first token after a question",
    "lora.all_by_layer.graphs": "LoRA step, gradient through all chunks, `granularity=layer`, `offload=host`",
    "lora.all_by_layer.peak.graphs": "its GPU memory",
    "lora.all_by_layer.pinned.graphs": "host memory it pins",
    "lora.full_context": "LoRA step, full context, each layer recomputed",
    "lora.full_context.peak": "its GPU memory",
    "gain.lora.all_by_layer.graphs": "the streaming step against it",
    "gain.lora.all_by_layer.peak.graphs": "its memory against it",
    "lora.all.graphs": "LoRA step, gradient through all chunks, `granularity=chunk`, all on the GPU",
    "lora.all.peak.graphs": "its GPU memory",
    "utilisation.lora.all.graphs": "its utilisation",
    "gain.lora.all.graphs": "it against full context",
    "gain.lora.all.peak.graphs": "its memory against full context",
    "lora.all.peak": "its GPU memory launch by launch, `sdpa`",
    "lora.last_8_by_layer.graphs": "LoRA step, gradient through the last 8 chunks, `granularity=layer`",
    "lora.last_8_by_layer.peak.graphs": "its GPU memory",
    "step.as_recipe.graphs": "a step as the 7B recipe has it: budgets drawn anew, compact positions, last 16 chunks",
    "step.as_recipe": "the same launch by launch",
    "lora.short.graphs": "LoRA step through all chunks, `granularity=chunk`, `offload=host`",
    "lora.1m.graphs": "the same on 1,048,576 tokens",
    "lora.1m.per_token.graphs": "its time a token against that",
    "lora.1m.peak.graphs": "its GPU memory",
    "lora.1m.growth.graphs": "that against the shorter stream",
    "lora.1m.host.graphs": "its host memory",
    "lora.all_nf4": "LoRA step, gradient through all chunks, decoder in 4 bits",
    "lora.all_nf4.device": "all that its process takes of the GPU, capped at 24 GiB",
    "lora.all_nf4_whole": "the same with towers, optimizer and `gradient.offload=host`",
    "lora.all_nf4_whole.device": "all that its process takes of the GPU",
    "two_gpus.gain.ddp": "two GPUs against one, DDP",
    "two_gpus.gain.zero2": "two GPUs against one, DeepSpeed ZeRO-2",
    "two_gpus.gain.fsdp2": "two GPUs against one, `train.sharding=fsdp`",
    "two_gpus.gain.zero3": "two GPUs against one, DeepSpeed ZeRO-3",
    "data.wait.ahead_cold": "20-minute clip from its file: share of a step spent waiting for data",
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
            lines.append(f"| {what} | {row['value']:.4g} {row['unit']}{spread(row)} | {goal(row)} |")
    about = json.loads(made_on.pop())
    told = ", ".join(f"{k} {about[k]}" for k in ("torch", "cuda", "triton", "transformers", "peft", "python"))
    return "\n".join(lines) + f"\n\n{about['device']}; {told}.\n"


def spread(row: dict[str, Any]) -> str:
    """Smallest and largest of several timings."""
    low, high = row["spread"] or (row["value"], row["value"])
    return f" [{low:.4g}, {high:.4g}]" if low != high else ""


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
