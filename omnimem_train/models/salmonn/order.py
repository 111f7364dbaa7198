"""Order and positions of a stream's media tokens, computed as frame pairs and half seconds of sound come in.

The rules are those that `layout` and `positions` have for a whole clip. Pairs come in groups: of one (Qwen2.5-VL
backbone, all in one bracket), or of those that share a timestamp and a bracket of their own (Qwen3-VL backbone).
Before the first pair k of a group stands all sound up to tick(k); what sound is left follows the last pair.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from omnimem_train.models.salmonn.positions import TICKS_PER_S


@dataclass(frozen=True)
class Rules:
    """What is fixed for a stream.

    Attributes:
        scheme: position scheme.
        has_video, has_audio: which tracks there are.
        seconds_per_pair: of frames.
        total_pairs: of the whole stream, as announced; only scheme `generation` reads it.
        group: pairs of a group.
    """

    scheme: str
    has_video: bool
    has_audio: bool
    seconds_per_pair: float = 1.0
    total_pairs: int = 0
    group: int = 1

    def tick(self, pair: int) -> int:
        """At which a pair begins; float32 is part of the rule (see `positions.ticks`)."""
        return int(np.float32(pair) * np.float32(self.seconds_per_pair) * np.float32(TICKS_PER_S))


@dataclass(frozen=True)
class Order:
    """Where a stream stands. A value: what lets tokens leave returns a new one.

    Attributes:
        rules: what is fixed.
        base: position after the newest text, from which pictures (and, but for timestamps, sounds) count.
        free: the next free position for text.
        pairs, sounds: that have left.
        rows, columns: tokens of a pair; 0 before the first.
        video_ended, audio_ended: no more will come.
    """

    rules: Rules
    base: int = 0
    free: int = 0
    pairs: int = 0
    sounds: int = 0
    rows: int = 0
    columns: int = 0
    video_ended: bool = False
    audio_ended: bool = False

    def next(self, pairs_there: int, sounds_there: int) -> tuple[str, int]:
        """What leaves next of what has been encoded: ("pair", 1), ("audio", how many), or ("", 0) for waiting."""
        sounds_left = sounds_there - self.sounds
        if self.rules.has_audio and self.rules.has_video and self.pairs and self.pairs % self.rules.group == 0:
            missing = self.rules.tick(self.pairs) - self.sounds
            if missing > 0 and sounds_left:
                return "audio", min(missing, sounds_left)
            if missing > 0 and not self.audio_ended:
                return "", 0
        if self.pairs < pairs_there:
            return "pair", 1
        if sounds_left and (self.video_ended or not self.rules.has_video):
            return "audio", sounds_left
        return "", 0

    def text(self, n: int) -> tuple[Order, Tensor]:
        """Text of n tokens leaves: (n, 3) running positions."""
        return replace(self, base=self.free + n, free=self.free + n), _running(self.free, n)

    def pair(self) -> tuple[Order, Tensor]:
        """A pair leaves: (rows * columns, 3) positions."""
        n = self.rows * self.columns
        after = replace(self, pairs=self.pairs + 1)
        if self.rules.scheme == "generation":
            return after._freed(), self._in_grid_order(n)
        at = torch.arange(n)
        in_group = self.pairs % self.rules.group
        time = in_group if self.rules.scheme == "timestamps" else self.rules.tick(self.pairs)
        index = self.base + torch.stack([torch.full_like(at, time), at // self.columns, at % self.columns], 1)
        return after._freed(), index

    def audio(self, n: int) -> tuple[Order, Tensor]:
        """n sounds leave: (n, 3) positions."""
        after = replace(self, sounds=self.sounds + n)
        if self.rules.scheme == "timestamps":
            return replace(after, free=self.free + n), _running(self.free, n)
        if self.rules.scheme == "generation":
            return after._freed(), self._in_grid_order(n)
        clock = torch.arange(self.sounds, self.sounds + n)
        zero = torch.zeros_like(clock)
        axes = [clock, zero, clock] if self.rules.has_video else [clock, clock, zero]
        return after._freed(), self.base + torch.stack(axes, 1)

    def _freed(self) -> Order:
        """`free` after media: behind the largest index, or in scheme `training`, with sound, the largest time."""
        r, sides = self.rules, max(self.rows, self.columns)
        if r.scheme == "timestamps":
            top = max((self.pairs - 1) % r.group + 1, sides)
        elif r.scheme == "generation":
            drawn = self._in_grid_order(1, last=True)
            begun = -(-min(self._left, self._total) // max(1, self.rows * self.columns))
            top = max(int(drawn.max()) - self.base + 1, 2 * (begun - 1) + 1, sides if begun else 0)
        else:
            time = max(r.tick(self.pairs - 1) + 1 if self.pairs else 0, self.sounds)
            top = time if self.sounds else max(time, sides)
        return replace(self, free=self.base + top)

    @property
    def _left(self) -> int:
        return self.pairs * self.rows * self.columns + self.sounds

    @property
    def _total(self) -> int:
        return self.rules.total_pairs * self.rows * self.columns

    def _in_grid_order(self, n: int, *, last: bool = False) -> Tensor:
        """(n, 3) of scheme `generation`: the grid's indices in order, whatever the tokens are, then running ones."""
        begin = self._left - n if last else self._left
        at, per, columns = torch.arange(begin, begin + n), max(1, self.rows * self.columns), max(1, self.columns)
        grid = torch.stack([2 * (at // per), at % per // columns, at % columns], 1)
        top = max(2 * self.rules.total_pairs - 1, self.rows, self.columns) if self._total else 0
        running = (at - self._total + top)[:, None].expand(n, 3)
        return self.base + torch.where((at < self._total)[:, None], grid, running)

    def snapshot(self) -> Tensor:
        """The numbers, int64."""
        return torch.tensor([int(getattr(self, f.name)) for f in fields(self) if f.name != "rules"])

    def restored(self, snapshot: Tensor) -> Order:
        """From `snapshot`, with these rules."""
        base, free, pairs, sounds, rows, columns, video, audio = snapshot.tolist()
        return Order(self.rules, base, free, pairs, sounds, rows, columns, bool(video), bool(audio))


def _running(begin: int, n: int) -> Tensor:
    return torch.arange(begin, begin + n)[:, None].expand(n, 3)
