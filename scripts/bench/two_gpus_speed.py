"""Tokens a second of LoRA steps on streams of equal length, with one engine.

    LAUNCHER scripts/bench/two_gpus_speed.py --out FILE [--deepspeed FILE] [--sharding fsdp]

The model is made on each GPU, random and of a real shape; engine, sharding and step are those of `omnimem train`.
Rank 0 writes what it measured as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import with_tokens
from shape import SHAPES, end_of, make_model, stream_block, text_block

from omnimem_train.engines import make_accelerator, prepare, shard
from omnimem_train.gradient import Gradient
from omnimem_train.losses import LossConfig
from omnimem_train.memory import MemorySpec
from omnimem_train.models.interface import StreamingModel
from omnimem_train.models.lora import LoraSettings, add_lora, disable_adapter
from omnimem_train.run_config import TrainConfig
from omnimem_train.step import EncodedStream, Moment, Question, StreamingStep


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", default="qwen2.5-omni-7b", choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=65536, help="of each stream")
    parser.add_argument("--steps", type=int, default=2, help="timed steps")
    parser.add_argument("--deepspeed", type=Path, default=None)
    parser.add_argument("--sharding", default="none")
    parser.add_argument("--budget-s", type=float, default=40.0, help="seconds after which no further step is begun")
    return parser.parse_args()


def encoded(model: StreamingModel, shape: Any, tokens: int, seed: int) -> EncodedStream:
    """A stream, and one question whose last 8 tokens are learned."""
    block = stream_block(shape, model, tokens, seed)
    rows = torch.arange(15, 23, device=model.device)
    read = torch.stack([torch.zeros_like(rows), rows], dim=-1)
    question = Question(text_block(model, 24, end_of(block)), read, torch.arange(8, device=model.device))
    return EncodedStream([block], [Moment(1, None, [question])])


def main() -> None:
    """Warm up on a short stream, then time whole steps; every rank counts its own stream."""
    args = arguments()
    t = TrainConfig(deepspeed=args.deepspeed, sharding=args.sharding)
    accelerator = make_accelerator(t)
    device, cuda = accelerator.device, accelerator.device.type == "cuda"
    shape = with_tokens(SHAPES[args.shape], args.tokens)
    model = make_model(shape, device, torch.bfloat16 if cuda else torch.float32)
    add_lora(model, LoraSettings(r=shape.rank, alpha=2 * shape.rank))
    model.module.train()
    weights = [p for p in model.module.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.AdamW(weights, 1e-5)
    step: Any = StreamingStep(model, LossConfig(), partial(disable_adapter, model))
    step, optimizer = prepare(accelerator, step, optimizer, shard(accelerator, model, t), weights)
    spec = MemorySpec("perturbation", budget=shape.budget, chunk_tokens=shape.chunk)

    def run(stream: EncodedStream) -> None:
        with accelerator.accumulate(step):
            accelerator.backward(step(stream, spec, Gradient("all")).loss)
            accelerator.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        accelerator.wait_for_everyone()
        return time.perf_counter()

    seed = 1 + accelerator.process_index
    run(encoded(model, shape, min(shape.tokens, shape.budget + 2 * shape.chunk), seed))
    stream = encoded(model, shape, shape.tokens, seed)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds: list[float] = []
    began = time.perf_counter()
    for _ in range(args.steps):
        # one rank decides for all whether there is time
        late = torch.tensor(float(bool(seconds) and time.perf_counter() - began > args.budget_s), device=device)
        if bool(accelerator.reduce(late, "sum")):
            break
        start = now()
        run(stream)
        seconds.append(now() - start)
    if accelerator.is_main_process:
        tokens = stream.n_tokens * accelerator.num_processes
        rates = sorted(tokens / s for s in seconds)
        found = {
            "tokens_per_s": rates[len(rates) // 2],
            "spread": [rates[0], rates[-1]],
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
            "processes": accelerator.num_processes,
            "steps": len(seconds),
            "tokens": stream.n_tokens,
        }
        args.out.write_text(json.dumps(found))
        print(found, flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
