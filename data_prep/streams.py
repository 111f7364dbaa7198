"""Clips of the world as encoded streams, many at a time and without files: what pre-training and the study run on.

All clips of a world have the same layout, so the order and the positions of their tokens are computed once and the
towers run on the windows of all clips together. The numbers are those of the model's own encoder side
(`omnimem_train.models.encoding.OmniEncoder`) on the same arrays, with the running log-mel floor; a test compares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from data_prep.arrays import render_frames, render_sound
from data_prep.world import ClipSpec
from omnimem_train.memory.state import TEXT
from omnimem_train.models.encoding import MEL_BLOCK, OmniEncoder
from omnimem_train.models.interface import MediaInfo, RenderedTurn, TokenBlock
from omnimem_train.models.layout import Layout, Waiting
from omnimem_train.models.preprocess import SILENCE, MelStream, Settings, patchify, scale_log_mel
from omnimem_train.models.qwen2_5_omni import Qwen2_5OmniStreaming
from omnimem_train.step import EncodedStream, Moment, Question

BLOCK_S = 2  # the audio tower attends inside blocks of 2 s; clips and crops are multiples of it


@dataclass(frozen=True)
class MediaLayout:
    """Where the media tokens of a clip stand; one for all clips of a length.

    Attributes:
        order: (T,) int64, for each token in stream order its number among [all pictures' tokens, all sound tokens].
        positions: (T, 3) int64. modality: (T,) int8. time_s: (T,) float32.
        next_position: of the closing marks.
    """

    order: Tensor
    positions: Tensor
    modality: Tensor
    time_s: Tensor
    next_position: int


@dataclass(frozen=True)
class PackedTurn:
    """One turn of each of B streams, right-padded.

    Attributes:
        ids: (B, n) int64.
        read: (m, 2) int64 (stream, place in `ids`) whose next token is supervised. targets: (m,) int64 that token.
        name: what the turn is for ("answer", "narration", ...).
    """

    ids: Tensor
    read: Tensor
    targets: Tensor
    name: str = "answer"


def pack(turns: Sequence[RenderedTurn | None], name: str = "answer") -> PackedTurn:
    """Turns side by side; None for a stream that has none (its row is padding and nothing of it is read)."""
    longest = max(len(t.ids) for t in turns if t is not None)
    ids = torch.zeros(len(turns), longest, dtype=torch.int64)
    read, targets = [], []
    for number, turn in enumerate(turns):
        if turn is None:
            continue
        ids[number, : len(turn.ids)] = turn.ids
        places = (turn.labels[1:] != -100).nonzero()[:, 0]
        read.append(torch.stack([torch.full_like(places, number), places], dim=-1))
        targets.append(turn.labels[places + 1])
    return PackedTurn(ids, torch.cat(read), torch.cat(targets), name)


@dataclass(frozen=True)
class Joined:
    """Streams and their turns as one sequence.

    Attributes:
        embeds: (B, n, E). positions: (1, n, 3), the same for all.
        lengths: of the stream, then of each turn; they sum to n.
        read: (m, 2) int64 (stream, row) whose next token is supervised. targets: (m,) int64.
        sizes: targets of each turn.
    """

    embeds: Tensor
    positions: Tensor
    lengths: list[int]
    read: Tensor
    targets: Tensor
    sizes: list[int]


class WorldStreams:
    """Makes encoded streams of clips of a world.

    Args:
        model: whose towers, tokenizer and layout.
        size: pixels of a side of the clips' square picture.
        fps: frames a second that are looked at; two make a temporal patch.
        picture, sound: what of the clips is perceived.
        embed: (n,) ids to (n, E); the model's own, which gives no gradient, unless pre-training passes its own.
    """

    def __init__(
        self,
        model: Qwen2_5OmniStreaming,
        size: int,
        fps: int = 2,
        *,
        picture: bool = True,
        sound: bool = True,
        embed: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model, self.fps, self.picture, self.sound = model, fps, picture, sound
        self.settings: Settings = model.video_settings()
        self.side = size // self.settings.factor
        self.embed = embed or model.embed
        self.info = MediaInfo(Path("made-up"), 0.0, picture, sound, size, size, float(fps), self.settings.sampling_rate)
        encoder = model.open(self.info, float(fps))
        assert isinstance(encoder, OmniEncoder)
        self._opening = _Text(torch.tensor(encoder.opening_ids, device=model.device), encoder.start().positions[0])
        self._closing = torch.tensor(encoder.closing_ids, dtype=torch.int64)
        self._start = encoder.layout.start
        self.layout = lru_cache(maxsize=None)(self._layout)

    def tokens(self, seconds: float) -> int:
        """Media tokens of a clip of so many seconds."""
        return len(self.layout(seconds).order)

    @property
    def opening_tokens(self) -> int:
        """Text tokens before the media."""
        return len(self._opening.ids)

    def stream_tokens(self, seconds: float) -> int:
        """Tokens of a stream: opening text and media."""
        return self.opening_tokens + self.tokens(seconds)

    @torch.no_grad()
    def encode(self, specs: Sequence[ClipSpec], at_once: int = 32) -> Tensor:
        """(B, T, E) media tokens of clips of one length, in stream order."""
        parts = [self._encode(specs[i : i + at_once]) for i in range(0, len(specs), at_once)]
        return torch.cat(parts)

    def towers(self, specs: Sequence[ClipSpec]) -> tuple[Tensor, Tensor]:
        """Outputs of the vision tower (B, tokens, E), patch by patch, and of the audio tower (B, tokens, E)."""
        model, batch = self.model, len(specs)
        visual = audio = torch.zeros(batch, 0, model.hidden_size, dtype=model.dtype, device=model.device)
        if self.picture:
            frames = render_frames(specs, self.fps, model.device).flatten(0, 1).permute(0, 3, 1, 2)
            patches, grid = patchify(frames, self.settings)
            visual = model.encode_pictures(patches, grid).view(batch, -1, model.hidden_size)
        if self.sound:
            log_mel = self._log_mel(render_sound(specs, model.device))
            audio = model.encode_sound(log_mel.transpose(0, 1).flatten(1)).view(batch, -1, model.hidden_size)
        return visual, audio

    def crop(self, media: Tensor, start_s: float, seconds: float) -> Tensor:
        """(B, T', E): the tokens from `start_s` on; both are multiples of 2 s."""
        if start_s % BLOCK_S or seconds % BLOCK_S:
            raise ValueError(f"a crop of {seconds:g} s at {start_s:g} s does not keep to blocks of {BLOCK_S} s")
        first, count = self.tokens(start_s) if start_s else 0, self.tokens(seconds)
        return media[:, first : first + count]

    def stream(self, media: Tensor, seconds: float, turns: Sequence[PackedTurn]) -> EncodedStream:
        """Media tokens (B, T, E) of clips of so many seconds, and turns asked at their end."""
        batch, layout, device = media.shape[0], self.layout(seconds), media.device
        opening = self._opening.to_batch(batch, self.embed)
        block = TokenBlock(
            media,
            layout.positions.to(device).expand(batch, -1, 3),
            layout.modality.to(device).expand(batch, -1),
            layout.time_s.to(device).expand(batch, -1),
        )
        questions = [self._question(turn, layout, batch) for turn in turns]
        blocks = [opening, block] if block.n else [opening]
        return EncodedStream(blocks, [Moment(len(blocks), None, questions)])

    def joined(self, media: Tensor, seconds: float, turns: Sequence[PackedTurn]) -> Joined:
        """Opening, media and turns one after the other, for one pass under a mask; as `stream` in fewer launches."""
        batch, device, n = media.shape[0], media.device, len(self._closing)
        marks = self._closing.expand(batch, n)
        ids = torch.cat([part for turn in turns for part in (marks, turn.ids)], dim=1)
        layout, shared = self.layout(seconds), int(n > 0)
        places = [torch.cat([torch.zeros(n, dtype=torch.int64), torch.arange(t.ids.shape[1]) + shared]) for t in turns]
        text = (torch.cat(places) + layout.next_position)[:, None].expand(-1, 3)
        positions = torch.cat([self._opening.positions.cpu(), layout.positions, text])[None].to(device)
        opening = self.embed(self._opening.ids).expand(batch, -1, -1)
        embeds = torch.cat([opening, media, self.embed(ids.to(device))], dim=1)
        lengths = [opening.shape[1] + media.shape[1], *(n + t.ids.shape[1] for t in turns)]
        starts = accumulate(lengths)
        read = torch.cat([t.read + torch.tensor([0, start + n]) for t, start in zip(turns, starts, strict=False)])
        targets = torch.cat([turn.targets for turn in turns])
        return Joined(embeds, positions, lengths, read.to(device), targets.to(device), [len(t.targets) for t in turns])

    # inside ----------------------------------------------------------------------------------------------------------

    def _encode(self, specs: Sequence[ClipSpec]) -> Tensor:
        order = self.layout(specs[0].settings.seconds).order.to(self.model.device)
        return torch.cat(self.towers(specs), dim=1)[:, order].to(self.model.dtype)

    def _log_mel(self, samples: Tensor) -> Tensor:
        """(B, samples) to (B, mels, frames), as `MelStream` and the encoder's running floor have it."""
        s, stream = self.settings, MelStream(self.settings)
        half = s.n_fft // 2
        padded = torch.cat([samples[:, 1 : half + 1].flip(1), pad(samples, (0, half))], dim=1)
        window = stream.window.to(samples.device)
        spectrum = torch.stft(padded, s.n_fft, s.hop, window=window, center=False, return_complex=True)
        frames = samples.shape[1] // s.hop
        power = stream.filters.to(samples.device) @ spectrum[..., :frames].abs().square()
        blocks = power.clamp(min=SILENCE).log10().unflatten(2, (-1, MEL_BLOCK))  # (B, mels, blocks, 200)
        peak = blocks.amax(dim=(1, 3), keepdim=True).cummax(dim=2).values
        return scale_log_mel(blocks, peak).flatten(2)

    def _layout(self, seconds: float) -> MediaLayout:
        """By the model's own layout, on numbers in place of embeddings."""
        pairing = self.settings.pairing
        patches = round(seconds * self.fps / pairing) if self.picture else 0
        n_visual, n_audio = patches * self.side**2, round(seconds * 25) if self.sound else 0
        waiting = Waiting.none(1, torch.float64, torch.device("cpu"))
        both = self.picture and self.sound
        layout = Layout(self._start, pairing / self.fps, self.picture, self.sound, both, waiting)
        number = torch.arange(n_visual + n_audio, dtype=torch.float64)[:, None]
        if n_visual:
            layout = layout.add_pictures(number[:n_visual], patches, self.side, self.side)
        if n_audio:
            layout = layout.add_sound(number[n_visual:])
        layout, out = layout.ended().take()
        return MediaLayout(out.embeds[:, 0].long(), out.positions, out.modality, out.time_s, layout.next_position)

    def _question(self, turn: PackedTurn, layout: MediaLayout, batch: int) -> Question:
        device = self.model.device
        n = len(self._closing)
        ids = torch.cat([self._closing.expand(batch, n), turn.ids], dim=1).to(device)
        shared = int(n > 0)  # the marks share one position
        at = torch.cat([torch.zeros(n, dtype=torch.int64), torch.arange(turn.ids.shape[1]) + shared])
        positions = (at + layout.next_position).to(device)
        text = _Text(ids, positions[:, None].expand(-1, 3))
        read = (turn.read + torch.tensor([0, n])).to(device)
        end_s = float(layout.time_s[-1]) if len(layout.time_s) else 0.0
        return Question(text.to_batch(batch, self.embed, end_s), read, turn.targets.to(device))


@dataclass(frozen=True)
class _Text:
    """Text ids (n,) or (B, n) with positions (n, 3)."""

    ids: Tensor
    positions: Tensor

    def to_batch(self, batch: int, embed: Callable[[Tensor], Tensor], time_s: float = 0.0) -> TokenBlock:
        ids = self.ids.expand(batch, -1)
        embeds = embed(ids.flatten()).view(*ids.shape, -1)
        return TokenBlock(
            embeds,
            self.positions.expand(batch, -1, 3),
            torch.full(ids.shape, TEXT, dtype=torch.int8, device=ids.device),
            torch.full(ids.shape, time_s, dtype=torch.float32, device=ids.device),
        )
