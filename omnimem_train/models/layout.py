"""Order and positions of Qwen2.5-Omni's media tokens, computed as a stream comes in.

The stock model computes both for a whole clip (`get_rope_index`, and the processor's placeholder rule). Sound has 25
temporal positions a second, one per token; the tokens of temporal patch k stand at floor(25 k s), s seconds being the
length of a patch. With picture and sound, tokens come in blocks of 2 s (50 positions): the pictures of a block, then
its sound.

One stock rule shows only when a patch is longer than a block (fewer than 1 frame a second): a token moves at most one
block on from the token before it, so the first tokens of a late patch are spread over the blocks that were skipped. It
is kept, for equality.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from omnimem_train.memory.state import AUDIO, VISUAL

POSITIONS_PER_S = 25
BLOCK_POSITIONS = 50
NEVER = 2**62
_NUMBERS = ("start", "patches", "audio_tokens", "block", "newest", "has_video", "has_audio")


@dataclass(frozen=True)
class Waiting:
    """Media tokens in stream order, on their way out. All but `embeds` stay on the CPU.

    Attributes:
        embeds: (n, E), on the model's device.
        positions: (n, 3) int64.
        modality: (n,) int8.
        time_s: (n,) float32.
        key: (n,) int64, 2 * block + (0 for pictures, 1 for sound): the order they leave in.
    """

    embeds: Tensor
    positions: Tensor
    modality: Tensor
    time_s: Tensor
    key: Tensor

    @classmethod
    def none(cls, width: int, dtype: torch.dtype, device: torch.device) -> Waiting:
        """No tokens, of model width `width`."""
        empty = torch.zeros(0, dtype=torch.int64)
        embeds = torch.zeros(0, width, dtype=dtype, device=device)
        return cls(embeds, empty.view(0, 3), empty.to(torch.int8), empty.float(), empty)

    def __len__(self) -> int:
        return self.key.shape[0]

    def __getitem__(self, rows: Tensor) -> Waiting:
        return Waiting(*(x[rows] for x in self.tensors().values()))

    def tensors(self) -> dict[str, Tensor]:
        """The fields by name."""
        return {
            "embeds": self.embeds,
            "positions": self.positions,
            "modality": self.modality,
            "time_s": self.time_s,
            "key": self.key,
        }

    def join(self, other: Waiting) -> Waiting:
        """These and `other`, sorted into the order they leave in."""
        pairs = zip(self.tensors().values(), other.tensors().values(), strict=True)
        both = Waiting(*(torch.cat(pair) for pair in pairs))
        return both[both.key.argsort(stable=True)]


@dataclass(frozen=True)
class Layout:
    """Where a stream stands. A value: adding tokens returns a new one.

    Attributes:
        start: position of the first media token.
        patch_s: seconds of a temporal patch.
        has_video, has_audio: which kinds are still to come; a kind that has ended never holds the other one back.
        interleaved: both kinds are in the stream, so tokens go in blocks.
        patches, audio_tokens: taken in so far.
        block: of the newest picture token.
        newest: largest position of the stock segment that left last (-1 before any).
        time_s: of the newest token that left.
        waiting: tokens that cannot leave yet.
    """

    start: int
    patch_s: float
    has_video: bool
    has_audio: bool
    interleaved: bool
    waiting: Waiting
    patches: int = 0
    audio_tokens: int = 0
    block: int = 0
    newest: int = -1
    time_s: float = 0.0

    def add_pictures(self, embeds: Tensor, patches: int, rows: int, columns: int) -> Layout:
        """Take in `patches` temporal patches of rows x columns tokens; `embeds` (patches * rows * columns, E)."""
        number = torch.arange(self.patches, self.patches + patches)
        offsets = self._offset(number)
        per_patch = rows * columns
        time = offsets.repeat_interleave(per_patch)
        row = torch.arange(rows).repeat_interleave(columns).repeat(patches)
        column = torch.arange(columns).repeat(rows * patches)
        blocks, last = self._blocks(offsets, per_patch)
        new = self._waiting(
            embeds,
            torch.stack([time, row, column], dim=-1) + self.start,
            VISUAL,
            (number * self.patch_s).repeat_interleave(per_patch),
            2 * blocks,
        )
        return replace(self, waiting=self.waiting.join(new), patches=self.patches + patches, block=last)

    def add_sound(self, embeds: Tensor) -> Layout:
        """Take in sound tokens; `embeds` (n, E)."""
        number = torch.arange(self.audio_tokens, self.audio_tokens + embeds.shape[0])
        blocks = number // BLOCK_POSITIONS if self.interleaved else torch.zeros_like(number)
        new = self._waiting(
            embeds,
            (number + self.start)[:, None].expand(-1, 3),
            AUDIO,
            number / POSITIONS_PER_S,
            2 * blocks + 1,
        )
        return replace(self, waiting=self.waiting.join(new), audio_tokens=self.audio_tokens + embeds.shape[0])

    def take(self) -> tuple[Layout, Waiting]:
        """The tokens whose turn has come: nothing that is still to arrive belongs before them."""
        next_sound = 2 * (self.audio_tokens // BLOCK_POSITIONS) + 1 if self.has_audio else NEVER
        next_picture = NEVER
        if self.has_video:
            block = int(self._offset(torch.tensor([self.patches]))[0]) // BLOCK_POSITIONS
            next_picture = 2 * max(self.block, min(block, self.block + 1))
        if not self.interleaved:
            next_sound = next_picture = NEVER
        # a key equal to the next one of its own kind may leave; of the other kind's it cannot be equal
        ready = self.waiting.key <= min(next_sound, next_picture)
        left, out = self.waiting[~ready], self.waiting[ready]
        if len(out) == 0:
            return self, out
        # Of a segment that leaves in parts the last part has the largest position: time rises, patches come whole.
        newest = int(out.positions[out.key == out.key[-1]].max())
        return replace(self, waiting=left, newest=newest, time_s=float(out.time_s[-1])), out

    def ended(self, *, video: bool = True, audio: bool = True) -> Layout:
        """No more pictures, no more sound, or neither will come."""
        return replace(self, has_video=self.has_video and not video, has_audio=self.has_audio and not audio)

    @property
    def next_position(self) -> int:
        """Position after the media that left: one more than the largest of the last stock segment, on any axis."""
        return self.start if self.newest < 0 else self.newest + 1

    def snapshot(self) -> dict[str, Tensor]:
        """What `restored` needs, as tensors."""
        numbers = torch.tensor([int(getattr(self, name)) for name in _NUMBERS])
        waiting = {f"waiting.{name}": x for name, x in self.waiting.tensors().items()}
        return {"numbers": numbers, "time_s": torch.tensor(self.time_s, dtype=torch.float64)} | waiting

    def restored(self, snapshot: Mapping[str, Tensor]) -> Layout:
        """This layout at the point of `snapshot`."""
        values = dict(zip(_NUMBERS, snapshot["numbers"].tolist(), strict=True))
        values |= {name: bool(values[name]) for name in ("has_video", "has_audio")}
        tensors = {name: snapshot[f"waiting.{name}"].cpu() for name in self.waiting.tensors()}
        waiting = Waiting(**tensors | {"embeds": tensors["embeds"].to(self.waiting.embeds)})
        return replace(self, waiting=waiting, time_s=float(snapshot["time_s"]), **values)

    def _offset(self, number: Tensor) -> Tensor:
        """Temporal offset of patches, with the stock model's float32 product and truncation."""
        return (number * torch.tensor(self.patch_s, dtype=torch.float32) * POSITIONS_PER_S).long()

    def _blocks(self, offsets: Tensor, per_patch: int) -> tuple[Tensor, int]:
        """Block of each token of patches at `offsets`, and the last one's; see the module's docstring."""
        if not self.interleaved:
            return torch.zeros(len(offsets) * per_patch, dtype=torch.int64), 0
        blocks, last = [torch.zeros(0, dtype=torch.int64)], self.block
        for aim in (offsets // BLOCK_POSITIONS).tolist():
            blocks.append((last + torch.arange(1, per_patch + 1)).clamp(max=max(aim, last)))
            last = int(blocks[-1][-1])
        return torch.cat(blocks), last

    def _waiting(self, embeds: Tensor, positions: Tensor, modality: int, time_s: Tensor, key: Tensor) -> Waiting:
        kind = torch.full((len(key),), modality, dtype=torch.int8)
        return Waiting(embeds.to(self.waiting.embeds), positions, kind, time_s.float(), key)
