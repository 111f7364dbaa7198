"""One training step on a stream, or on streams of equal layout side by side: compress, ask, sum the losses.

All chunks run inside one `forward` of one module, so DDP and ZeRO see a single call however many there are. The
encoders are frozen and run before it (`encode_stream`), where no gradient and no engine is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate, zip_longest

import torch
from torch import Tensor, nn

from omnimem_train.errors import UserError
from omnimem_train.gradient import Gradient
from omnimem_train.losses import LossConfig, answer_loss, distillation_loss, supervised
from omnimem_train.memory.spec import MemorySpec
from omnimem_train.memory.state import MODALITIES
from omnimem_train.models.interface import MediaEncoder, MediaWindow, RenderedTurn, StreamingModel, TokenBlock
from omnimem_train.offload import host_memory
from omnimem_train.retention import Attended, Watch
from omnimem_train.streaming import Stream, StreamState

TEACHER_CHUNK = 2048  # at least so many tokens at a time: where nothing is dropped, longer chunks give the same sooner


@dataclass(frozen=True)
class TimedTurn:
    """A rendered turn and the second of the stream it is asked at (None: its end)."""

    rendered: RenderedTurn
    time_s: float | None = None


@dataclass(frozen=True)
class Question:
    """A turn as tokens; with several streams, one turn of each, padded at their ends to one length.

    Attributes:
        block: (B, n) closing marks and the turn.
        read: (m, 2) int64 (stream, row of `block`) of the places whose next token is supervised.
        targets: (m,) int64 those next tokens.
    """

    block: TokenBlock
    read: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Moment:
    """Questions asked at one time: after the first `after` blocks and what the encoder held back then (`waiting`)."""

    after: int
    waiting: TokenBlock | None
    questions: list[Question]


@dataclass(frozen=True)
class EncodedStream:
    """A stream as embeddings, and the moments at which it is asked something, in order."""

    blocks: list[TokenBlock]
    moments: list[Moment]

    @property
    def n_streams(self) -> int:
        """Streams side by side, B."""
        return self.blocks[0].embeds.shape[0]

    @property
    def n_tokens(self) -> int:
        """Tokens of each stream itself, questions not counted."""
        return sum(block.n for block in self.blocks)

    @property
    def questions(self) -> list[Question]:
        """All questions, in the order of the moments."""
        return [q for moment in self.moments for q in moment.questions]

    @staticmethod
    def stack(streams: Sequence[EncodedStream]) -> EncodedStream:
        """Streams side by side, each with its own questions.

        Raises:
            ValueError: they differ in layout (blocks, modalities, moments).
        """
        first = streams[0]
        if any(layout_of(s) != layout_of(first) for s in streams[1:]):
            raise ValueError("streams of one batch must have equal blocks, modalities and moments")
        blocks = [TokenBlock.stack(list(same)) for same in zip(*(s.blocks for s in streams), strict=True)]
        moments = []
        for same in zip(*(s.moments for s in streams), strict=True):
            waiting = [m.waiting for m in same if m.waiting is not None]
            questions = zip_longest(*(m.questions for m in same))
            moments.append(
                Moment(
                    same[0].after,
                    TokenBlock.stack(waiting) if waiting else None,
                    [_side_by_side(row, [m.questions[0].block for m in same]) for row in questions],
                )
            )
        return EncodedStream(blocks, moments)


def layout_of(stream: EncodedStream) -> tuple[object, ...]:
    """What streams must share to run side by side: tokens and modalities of their blocks, and when they are asked."""
    moments = tuple((m.after, None if m.waiting is None else m.waiting.n) for m in stream.moments)
    return (*(tuple(block.modality[0].tolist()) for block in stream.blocks), moments)


def _side_by_side(questions: Sequence[Question | None], fill: Sequence[TokenBlock]) -> Question:
    """A question of each stream as one. Where a stream has none left, its block of `fill` stands there, unread."""
    blocks = [f if q is None else q.block for q, f in zip(questions, fill, strict=True)]
    longest = max(block.n for block in blocks)
    read, targets = [], []
    for number, q in enumerate(questions):
        if q is not None:
            read.append(q.read + torch.tensor([number, 0], device=q.read.device))
            targets.append(q.targets)
    return Question(TokenBlock.stack([_padded(b, longest) for b in blocks]), torch.cat(read), torch.cat(targets))


def _padded(block: TokenBlock, n: int) -> TokenBlock:
    """`block` with its last token repeated up to `n` tokens. Nothing before the padding sees it."""
    return block if block.n == n else TokenBlock.cat([block] + [block[-1:]] * (n - block.n))


@dataclass
class StepResult:
    """What one stream, or streams side by side, gave.

    Attributes:
        loss: scalar with gradient, summed over supervised tokens and weighted as the config says.
        answer_loss, distill_loss: the unweighted sums, detached.
        retention_loss: the unweighted mean over all choices, detached; None if nothing was chosen or it is not trained.
        targets: supervised tokens.
        stream_tokens: tokens streamed, of all streams.
        chunks: chunks run.
        kept: "text", "visual", "audio" -> tokens a stream keeps to the end, mean over layers and heads (a tensor).
        seen: the same modalities -> tokens of a stream.
    """

    loss: Tensor
    answer_loss: Tensor
    distill_loss: Tensor
    retention_loss: Tensor | None
    targets: int
    stream_tokens: int
    chunks: int
    kept: dict[str, Tensor] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)


@torch.no_grad()
def encode_stream(
    encoder: MediaEncoder,
    windows: Iterable[MediaWindow],
    turns: list[TimedTurn],
    device: torch.device,
    offload: str = "none",
) -> EncodedStream:
    """Encode a whole stream and place its turns.

    A turn at time t is put after the last window that ends at or before t, so it sees only what came before.
    The frames and samples pass through window by window; the embeddings stay (7 KB a token of the 7B model in bf16), on
    the device or with `offload` "host" in host memory.

    Raises:
        UserError: a turn later than the stream's end; too little host memory.
    """
    host = host_memory(device) if offload == "host" else None
    slabs = None if host is None else host.new_slabs()

    def held(block: TokenBlock) -> TokenBlock:
        return block if host is None or slabs is None else host.store(block, slabs)

    blocks, moments = [held(encoder.start())], list[Moment]()
    timed = sorted((t for t in turns if t.time_s is not None), key=_time)
    end_s = 0.0
    for window in windows:
        due = [turn for turn in timed if _time(turn) < window.end_s - 1e-6]
        timed = timed[len(due) :]
        if due:
            moments.append(_moment(encoder, due, len(blocks), device))
        if (block := encoder.push(window)) is not None and block.n:
            blocks.append(held(block))
        end_s = window.end_s
    if timed and _time(timed[-1]) > end_s + 1e-6:
        raise UserError(
            f"a turn is asked at {_time(timed[-1]):g} s, the stream ends at {end_s:g} s", remedy="correct its time_s"
        )
    if (block := encoder.finish()) is not None and block.n:
        blocks.append(held(block))
    if at_end := timed + [turn for turn in turns if turn.time_s is None]:
        moments.append(_moment(encoder, at_end, len(blocks), device))
    if host is not None:
        host.synchronise()
    return EncodedStream(blocks, moments)


def _time(turn: TimedTurn) -> float:
    return float("inf") if turn.time_s is None else turn.time_s


def _moment(encoder: MediaEncoder, turns: list[TimedTurn], after: int, device: torch.device) -> Moment:
    questions = []
    for turn in turns:
        ids, labels = turn.rendered.ids.to(device), turn.rendered.labels.to(device)
        block, read = encoder.text(ids), supervised(labels)
        # closing marks come before the ids and are never supervised
        rows = read + block.n - ids.shape[0]
        questions.append(Question(block, torch.stack([torch.zeros_like(rows), rows], dim=-1), labels[read + 1]))
    return Moment(after, encoder.waiting(), questions)


def answer_logits(
    stream: Stream, encoded: EncodedStream, watch: Watch | None = None
) -> tuple[list[Tensor], StreamState]:
    """Stream `encoded` (one stream or several side by side) and answer its questions.

    Questions of one moment share one pass over the memory. `watch` notes what they look at.

    Returns:
        for each question (m, vocabulary) logits of its supervised tokens; and the state at the stream's end, flushed.
    """
    state, logits, n_fed = stream.start(encoded.n_streams), list[Tensor](), 0
    for moment in encoded.moments:
        state = stream.feed_all(state, encoded.blocks[n_fed : moment.after])
        n_fed = moment.after
        if n_fed == len(encoded.blocks):
            state = stream.flush(state)
        if watch is not None:
            watch.known = state.n_run + (0 if state.pending is None else state.pending.n)
        logits += _ask(stream, stream.caught_up(state, moment.waiting), moment.questions, watch)
    return logits, stream.flush(stream.feed_all(state, encoded.blocks[n_fed:]))


def _ask(stream: Stream, state: StreamState, questions: list[Question], watch: Watch | None = None) -> list[Tensor]:
    noted = None if watch is None else (watch, torch.cat([_told(q) for q in questions], dim=1))
    hidden = stream.ask(state, [q.block for q in questions], noted)
    starts = accumulate((q.block.n for q in questions), initial=0)
    places = [(q.read[:, 0], q.read[:, 1] + start) for q, start in zip(questions, starts, strict=False)]
    streams, rows = (torch.cat(part) for part in zip(*places, strict=True))
    return list(stream.model.logits(hidden[streams, rows]).split([len(q.read) for q in questions]))


def _told(question: Question) -> Tensor:
    """(B, n) bool: the tokens of a question up to the last that is read; the rest is padding."""
    last = torch.full((question.block.embeds.shape[0],), -1, device=question.read.device)
    last = last.scatter_reduce(0, question.read[:, 0], question.read[:, 1], "amax")
    return torch.arange(question.block.n, device=last.device) <= last[:, None]


class StreamingStep(nn.Module):
    """The module a trainer wraps. Its parameters are the weights that are trained, and no others: what is frozen is no
    business of an engine, which would broadcast, convert or shard it.

    Args:
        model: what is trained; which of its weights are is decided before this.
        loss: what is minimised.
        adapters_off: context in which the model runs without its adapters (the teacher of a distillation).
    """

    def __init__(
        self,
        model: StreamingModel,
        loss: LossConfig,
        adapters_off: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        super().__init__()
        self.model, self.loss, self.adapters_off = model, loss, adapters_off
        self.trained = nn.ParameterList([p for p in model.module.parameters() if p.requires_grad])

    def forward(self, encoded: EncodedStream, spec: MemorySpec, gradient: Gradient) -> StepResult:
        """Loss of a stream, or of streams side by side, under one memory spec."""
        teacher, attended = self._teacher(encoded, spec)
        stream = Stream(self.model, spec, gradient, encoded.n_tokens, attended)
        logits, state = answer_logits(stream, encoded)
        answer = torch.stack([answer_loss(x, q.targets) for x, q in zip(logits, encoded.questions, strict=True)]).sum()
        total, distill, retention = self.loss.answer * answer, torch.zeros_like(answer), None
        n_targets = sum(len(q.targets) for q in encoded.questions)
        if self.loss.distill > 0:
            pairs = zip(logits, teacher, strict=True)
            distill = torch.stack([distillation_loss(x, t, self.loss.temperature) for x, t in pairs]).sum()
            total = total + self.loss.distill * distill
        if state.retention is not None:
            retention = state.retention[0] / state.retention[1]
            total = total + self.loss.retention * n_targets * retention
        elif (head := self.model.importance_head) is not None and head.requires_grad:
            total = total + 0 * head.sum()  # every step gives every trained weight a gradient, as DDP asks for
        return StepResult(
            loss=total,
            answer_loss=answer.detach(),
            distill_loss=distill.detach(),
            retention_loss=None if retention is None else retention.detach(),
            targets=n_targets,
            stream_tokens=encoded.n_tokens * encoded.n_streams,
            chunks=state.n_chunks,
            kept=kept_by_modality(state),
            seen=seen_by_modality(encoded.blocks),
        )

    def _teacher(self, encoded: EncodedStream, spec: MemorySpec) -> tuple[list[Tensor], Attended | None]:
        """What the same model without adapters and with an unlimited memory answers, and what its questions look at;
        nothing of what no loss needs."""
        retains = self.loss.retention > 0 and not spec.unlimited
        if self.loss.distill == 0 and not retains:
            return [], None
        watch = Watch(encoded.n_tokens, self.model.n_layers) if retains else None
        with torch.no_grad(), self.adapters_off():
            longer = max(spec.chunk_tokens, TEACHER_CHUNK)
            full = Stream(self.model, spec.replace(selector="full", selector_options={}, chunk_tokens=longer))
            logits, _ = answer_logits(full, encoded, watch)
        return logits, None if watch is None else watch.attended()


def kept_by_modality(state: StreamState) -> dict[str, Tensor]:
    """Tokens kept, by modality: mean over layers, streams and kv heads."""
    counts = {}
    for name, code in MODALITIES.items():
        per_layer = [(m.modality == code).sum(-1).float().mean() for m in state.layers]
        counts[name] = torch.stack(per_layer).mean()
    return counts


def seen_by_modality(blocks: list[TokenBlock]) -> dict[str, int]:
    """Tokens of the stream, by modality (first stream of the batch)."""
    modality = torch.cat([block.modality[0] for block in blocks]).cpu()
    return {name: int((modality == code).sum()) for name, code in MODALITIES.items()}
