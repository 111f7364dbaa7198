"""Trains `checkpoints/tiny-omni` from scratch on the recall world, with full cache, on one GPU:

    python -m scripts.recall.pretrain OUT --minutes 9 --seed 0

Stage 1 teaches the towers to name what their tokens show (scripts/recall/towers.py). Stage 2 encodes a pool of clips
once and teaches the decoder to answer and to narrate crops of it, in a curriculum of lengths: the next one begins when
every kind of question has 85 % of its letters right, or when its share of the time is over. Each crop and its
questions go through the layers once, under one mask: questions see the crop and nothing of each other.

OUT holds model/ (bfloat16, loads with the stock class), log.jsonl, state.pt. A call that finds state.pt goes on from
there; --start MODEL begins stage 2 from that checkpoint's weights.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, rms_norm
from torch.utils.data import DataLoader
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from data_prep.questions import KINDS
from data_prep.streams import Joined, WorldStreams
from data_prep.world import ClipSpec, WorldSettings, make_clip
from omnimem_train.memory.spec import MemorySpec
from omnimem_train.models.interface import StreamingModel, Tap
from omnimem_train.models.loading import load_model
from omnimem_train.models.preprocess import read_settings
from omnimem_train.models.qwen2_5_omni import Qwen2_5OmniStreaming
from omnimem_train.models.tiny import SIZES, fill, preprocessor_config, thinker_config, tiny_tokenizer, write_thinker
from omnimem_train.rng import versions
from scripts.recall.asking import Asker, by_kind, clip_set
from scripts.recall.optimise import MasterWeights, lr_at
from scripts.recall.towers import align, train_towers
from scripts.recall.turns import TRACKED, VOCABULARY, Batch, TurnBatches, count_ids, words

LEVELS = ((12, 40, 10), (24, 32, 14), (60, 16, 24))  # seconds of a crop, crops in a batch, questions of each
SHARES = (0.45, 0.7)  # of stage 2's time by which level 1, 2 begins at the latest
READY = 0.85
COUNTED_AT = 4  # before this layer an event's token says the how-manieth of its kind it is; the later ones read that
SPEC = MemorySpec(selector="full", budget=None, chunk_tokens=10**6)
Log = Callable[[dict[str, Any]], None]


def worlds() -> list[WorldSettings]:
    """The worlds of the pool: distractors, copies and shares of sound vary, so that none is new to the model later."""
    return [
        WorldSettings(loudness=loudness, copies=copies, sound_share=share)
        for loudness in (1.0, 0.5, 2.0)
        for copies, share in ((0.5, 0.5), (1.5, 0.5), (0.5, 0.3), (0.0, 0.7))
    ]


def pool_specs(n: int, seed: int, group: int = 32) -> list[ClipSpec]:
    """`n` training clips of 60 s; every other group of `group` clips is of the default world, the others of all."""
    settings = worlds()
    jobs = []
    for first in range(0, n, group):
        number = first // group
        world = settings[0] if number % 2 else settings[(number // 2) % len(settings)]
        jobs += [(world, seed, "train", i) for i in range(first, min(n, first + group))]
    with multiprocessing.get_context("fork").Pool(min(16, os.cpu_count() or 1)) as workers:
        return workers.starmap(make_clip, jobs, chunksize=64)


def new_model(seed: int, device: torch.device) -> Qwen2_5OmniStreaming:
    """A random thinker of the size of `checkpoints/tiny-omni`, in bfloat16."""
    size, tokenizer = SIZES["recall"], tiny_tokenizer(words(), VOCABULARY)
    module = Qwen2_5OmniThinkerForConditionalGeneration(thinker_config(size, tokenizer))
    fill(module, seed)
    module.to(device, torch.bfloat16).eval().requires_grad_(False)
    scratch = Path(os.environ.get("TMPDIR", "/tmp")) / f"tiny-omni-{os.getpid()}"
    scratch.mkdir(exist_ok=True)
    (scratch / "preprocessor_config.json").write_text(json.dumps(preprocessor_config(size.max_pixels)))
    model = Qwen2_5OmniStreaming(module, tokenizer, read_settings(str(scratch)))
    start_decoder(model, seed)
    return model


@torch.no_grad()
def start_decoder(model: Qwen2_5OmniStreaming, seed: int) -> None:
    """Weights of the decoder as it begins: small, as is customary; words large, and the same with and without a space
    in front; and in each layer one kv head whose queries equal its keys, so that tokens look for their like."""
    draw = torch.Generator().manual_seed(seed)
    for name, p in [*model.parts.text.named_parameters(), ("lm_head", cast(Any, model.module).lm_head.weight)]:
        if p.ndim == 1:
            p.fill_(float("norm" in name))
            continue
        size = 0.5 if "embed_tokens" in name else 0.02
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            size *= (2 * model.n_layers) ** -0.5
        p.copy_(size * torch.randn(p.shape, generator=draw))
    table = cast(Any, model.parts.text).embed_tokens.weight
    for word in words().split():
        with_space, alone = (model.tokenizer(w, add_special_tokens=False)["input_ids"] for w in (f" {word}", word))
        if len(with_space) == len(alone) == 1:
            table[alone[0]] = table[with_space[0]]
    width, group = model.head_dim, model.heads // model.kv_heads
    for layer in cast(Any, model.parts.text).layers:
        like = torch.randn(width, model.hidden_size, generator=draw) * model.hidden_size**-0.5
        layer.self_attn.k_proj.weight[:width] = like
        layer.self_attn.q_proj.weight[: group * width] = like.repeat(group, 1)


def one_pass(model: StreamingModel, joined: Joined) -> tuple[Tensor, Tensor]:
    """Streams and turns in one pass: turns see the stream and not each other. As `answer_logits` with an unlimited
    memory.

    Returns:
        (m, vocabulary) logits of the supervised tokens, and (B, n, E) the hidden states before layer `COUNTED_AT`.
    """
    owner = torch.arange(len(joined.lengths)).repeat_interleave(torch.tensor(joined.lengths)).to(model.device)
    mask = ((owner[:, None] == owner) | (owner == 0)).tril()
    hidden, rope = joined.embeds, model.rope(joined.positions)
    middle = hidden
    for layer in range(model.n_layers):
        middle = hidden if layer == COUNTED_AT else middle
        hidden = model.run_layer(layer, hidden, rope, Tap(mask=mask), {})
    return model.logits(hidden[joined.read[:, 0], joined.read[:, 1]]), middle


def fuse_norms(module: nn.Module) -> None:
    """Let the decoder's RMS norms run as one kernel each while it is trained; same formula, in place."""
    for part in module.modules():
        if type(part).__name__.endswith("RMSNorm"):
            norm: Any = part
            norm.forward = partial(_rms_norm, norm)


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    return rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


class Decoder:
    """Stage 2: the decoder under training.

    Args:
        model: its towers are done.
        streams: made with the trainable embedding of `model`.
        media: (N, T, E) the pool, encoded.
        batches: endless.
        level: of the curriculum, shared with the makers of batches.
    """

    def __init__(
        self,
        model: Qwen2_5OmniStreaming,
        streams: WorldStreams,
        media: Tensor,
        batches: Any,
        level: Any,
        peak_lr: float,
    ) -> None:
        self.model, self.streams, self.media, self.batches, self.level = model, streams, media, batches, level
        self.peak_lr = peak_lr
        for part in (model.parts.text, model.module.lm_head):
            part.requires_grad_(True)  # type: ignore[union-attr]
        self.weights = MasterWeights(model.module)
        fuse_norms(model.parts.text)
        self.times = torch.tensor(count_ids(model), device=model.device)
        self.step, self.used_s = 0, 0.0
        self.right = torch.zeros(len(TRACKED), device=model.device)  # running share of right letters at this level
        self.seen = torch.zeros(len(TRACKED), device=model.device)

    def train(self, seconds: float, log: Log, save: Callable[[Decoder], None], max_steps: int = 10**9) -> None:
        """Go on until `seconds` of training are used."""
        begun, before, saved = time.perf_counter(), self.used_s, time.perf_counter()
        for packed in self.batches:
            batch = Batch.unpack(packed)
            self.used_s = before + time.perf_counter() - begun
            if self.used_s >= seconds or self.step >= max_steps:
                break
            row = self._one(batch, self.used_s / seconds)
            self.step += 1
            if self.step % 100 == 0:
                log(self._log_row(row))
                self._next_level(self.used_s / seconds)
            if time.perf_counter() - saved > 120:
                save(self)
                saved = time.perf_counter()

    def _one(self, batch: Batch, done: float) -> dict[str, Tensor]:
        media = torch.cat(
            [
                self.streams.crop(self.media[c : c + 1], start, batch.seconds)
                for c, start in zip(batch.clips.tolist(), batch.starts, strict=True)
            ]
        )
        joined = self.streams.joined(media, batch.seconds, batch.turns)
        logits, middle = one_pass(self.model, joined)
        each = cross_entropy(logits.float(), joined.targets, reduction="none")
        *_, facts, story = joined.sizes
        parts = each.split([len(each) - facts - story, facts, story])
        answers, listed, told = (part.mean() for part in parts)
        counted = self._counting_loss(batch, middle)
        (answers + listed + told + 0.5 * counted).backward()
        norm = self.weights.step(lr_at(self.peak_lr, self.step, done))
        if batch.seconds == LEVELS[self.level.value][0]:
            self._note(batch, joined, logits)
        row = {"answers": answers, "facts": listed, "narration": told, "counting": counted, "grad_norm": norm}
        return {name: x.detach() for name, x in row.items()}

    def _counting_loss(self, batch: Batch, middle: Tensor) -> Tensor:
        """Cross-entropy of "once", "twice", ... read off the tokens of events, of those that are the first to the
        fourth of their shape or pattern. Without it a small model does not learn to count in minutes."""
        order = self.streams.layout(batch.seconds).order
        media = middle[:, self.streams.opening_tokens :][:, : len(order)]
        number = batch.occurrences[:, order].long().to(middle.device)
        known = (number > 0) & (number <= len(self.times))
        logits = self.model.logits(media[known])[:, self.times]
        return cross_entropy(logits.float(), number[known] - 1)

    @torch.no_grad()
    def _note(self, batch: Batch, joined: Joined, logits: Tensor) -> None:
        starts = torch.tensor([0, *joined.sizes]).cumsum(0)
        places = (starts[batch.letters[:, 0]] + batch.letters[:, 1]).to(self.right.device)
        kinds = batch.letters[:, 2].to(self.right.device)
        hit = (logits[places].argmax(-1) == joined.targets[places]).float()
        self.right.mul_(0.98).index_add_(0, kinds, hit)
        self.seen.mul_(0.98).index_add_(0, kinds, torch.ones_like(hit))

    def _shares(self) -> dict[str, float]:
        return dict(zip(TRACKED, (self.right / self.seen.clamp(min=1)).tolist(), strict=True))

    def _log_row(self, row: dict[str, Tensor]) -> dict[str, Any]:
        about = {"stage": "decoder", "step": self.step, "seconds": self.used_s, "level_s": LEVELS[self.level.value][0]}
        return about | {k: float(v) for k, v in row.items()} | {f"right/{k}": v for k, v in self._shares().items()}

    def _next_level(self, done: float) -> None:
        level = self.level.value
        if level + 1 == len(LEVELS):
            return
        asked = self.seen > 20  # a crop of two slots has nothing to ask about order
        asked[len(KINDS) :] = False
        known = bool(asked.any()) and bool((self.right / self.seen.clamp(min=1))[asked].amin() >= READY)
        if known or done >= SHARES[level]:
            self.level.value = level + 1
            self.right.zero_()
            self.seen.zero_()

    def state_dict(self) -> dict[str, Any]:
        """What a later call goes on from."""
        return {"step": self.step, "used_s": self.used_s, "level": self.level.value} | self.weights.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.step, self.used_s, self.level.value = state["step"], state["used_s"], state["level"]
        self.weights.load_state_dict(state)


def save_model(model: Qwen2_5OmniStreaming, folder: Path) -> None:
    """Write the thinker in the ordinary layout."""
    write_thinker(folder, model.module, model.tokenizer, SIZES["recall"].max_pixels)


def logger(path: Path) -> Log:
    """Prints a row and appends it to `path`."""

    def log(row: dict[str, Any]) -> None:
        line = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
        print(line, flush=True)
        with path.open("a") as file:
            file.write(line + "\n")

    return log


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    a = arguments().parse_args(argv)
    begun = time.perf_counter()
    device = torch.device(a.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    a.out.mkdir(parents=True, exist_ok=True)
    log = logger(a.out / "log.jsonl")
    log({"stage": "start", **{k: str(v) for k, v in vars(a).items()}, "versions": versions()})
    state_path = a.out / "state.pt"
    held = a.out / "model" if state_path.exists() else a.start
    if held is not None:
        loaded = load_model(str(held), dtype="bfloat16", device=str(device))
        assert isinstance(loaded, Qwen2_5OmniStreaming)
        model = loaded
    else:
        model = new_model(a.seed, device)
    specs = pool_specs(a.clips, a.seed)
    table = model.parts.text.embed_tokens
    streams = WorldStreams(model, specs[0].settings.size, embed=table)  # type: ignore[arg-type]
    if held is None:
        if a.towers is None:
            n = a.tower_batch
            train_towers(streams, lambda step: group(specs, step, n), a.towers_s, log, max_steps=a.max_steps)
        else:
            other = load_model(str(a.towers), dtype="bfloat16", device=str(device))
            for own, theirs in ((model.parts.visual, other.parts.visual), (model.parts.audio, other.parts.audio)):
                own.load_state_dict(theirs.state_dict())
        fit = [specs[i : i + 16] for i in range(0, min(len(specs), 320), 16)]
        log({"stage": "aligned"} | {f"explained/{k}": v for k, v in align(streams, fit).items()})
    media = torch.cat([streams.encode(specs[i : i + 32]) for i in range(0, len(specs), 32)])
    log({"stage": "pool", "clips": len(specs), "tokens": media.shape[1], "seconds": time.perf_counter() - begun})

    level = multiprocessing.Value("i", a.level)
    state = torch.load(state_path, map_location=device) if state_path.exists() else None
    data = TurnBatches(model, specs, LEVELS, level, seed=a.seed, start=state["step"] if state else 0)
    batches = DataLoader(data, batch_size=None, num_workers=a.workers, prefetch_factor=4 if a.workers else None)
    decoder = Decoder(model, streams, media, batches, level, a.lr)
    total_s = a.minutes * 60 - (a.towers_s if held is None and a.towers is None else 0)
    if state:
        decoder.load_state_dict(state)
        total_s = state["total_s"]

    def save(d: Decoder) -> None:
        save_model(model, a.out / "model")
        torch.save(d.state_dict() | {"total_s": total_s}, aside := state_path.with_suffix(".part"))
        aside.rename(state_path)

    decoder.train(total_s, log, save, a.max_steps)
    save(decoder)
    log({"stage": "trained", "step": decoder.step, "seconds": time.perf_counter() - begun})
    del decoder, media
    unseen = [make_clip(WorldSettings(), a.seed, "val", i) for i in range(a.val)]
    asker = Asker(WorldStreams(model, specs[0].settings.size), clip_set(streams, unseen, 24))
    log({"stage": "val", "clips": a.val} | by_kind(asker, asker.answers(SPEC)))


def group(specs: Sequence[ClipSpec], step: int, n: int) -> Sequence[ClipSpec]:
    """`n` clips of one world, other ones at each step; groups of the pool are of 32 clips."""
    first = (step * n) % (len(specs) // 32 * 32 or len(specs))
    return specs[first : first + n]


def arguments() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(prog="scripts.recall.pretrain", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the run")
    parser.add_argument("--minutes", type=float, default=9.0, help="of training, both stages")
    parser.add_argument("--towers-s", type=float, default=60.0, help="seconds of it for the towers")
    parser.add_argument("--clips", type=int, default=6016, help="clips of 60 s in the pool, a multiple of 32")
    parser.add_argument("--tower-batch", type=int, default=8, help="clips in a batch of stage 1; divides 32")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--val", type=int, default=192, help="unseen clips to measure on at the end")
    parser.add_argument("--workers", type=int, default=7)
    parser.add_argument("--max-steps", type=int, default=10**9, help="of each stage, for a trial")
    parser.add_argument("--towers", type=Path, help="checkpoint whose towers (as stage 1 left them) are taken over")
    parser.add_argument("--start", type=Path, help="checkpoint whose weights stage 2 begins with")
    parser.add_argument("--level", type=int, default=0, help="of the curriculum at the beginning")
    parser.add_argument("--device", help="cuda or cpu; cuda if there is one")
    return parser


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
