"""Conversion of sampling rates for streams, in numpy alone."""

from __future__ import annotations

import math

import numpy as np


class Resampler:
    """Converts blocks of mono samples from one rate (Hz) to another, whatever the blocks' lengths.

    Windowed sinc: Kaiser with beta 8, 24 zero crossings a side, cutoff at 95 % of the lower Nyquist rate. Output
    sample n lies at n / target seconds: nothing is delayed. Zeros surround the input. Equal rates pass through.
    """

    def __init__(self, source: int, target: int) -> None:
        common = math.gcd(source, target)
        self._up, self._down = target // common, source // common
        scale = 0.95 * min(1.0, target / source)
        self._half = math.ceil(24 / scale)
        taps = np.arange(-self._half, self._half + 1)
        phases = np.arange(self._up)[:, None] / self._up
        at = taps[None] - phases
        window = np.i0(8 * np.sqrt(np.clip(1 - (at / (self._half + 1)) ** 2, 0, 1))) / np.i0(8)
        table = np.sinc(at * scale) * window
        self._table = (table / table.sum(1, keepdims=True)).astype(np.float32)
        self._kept = np.zeros(self._half, np.float32)  # input from position self._first on
        self._first, self._out, self._seen = -self._half, 0, 0

    def push(self, block: np.ndarray) -> np.ndarray:
        """The output samples whose whole neighbourhood is known with (m,) more input samples."""
        self._seen += len(block)
        if self._up == self._down:
            return block
        self._kept = np.concatenate([self._kept, block])
        return self._emit((self._first + len(self._kept) - self._half) * self._up)

    def finish(self) -> np.ndarray:
        """The remaining output samples; zeros follow the input."""
        if self._up == self._down:
            return np.empty(0, np.float32)
        self._kept = np.concatenate([self._kept, np.zeros(self._half + 1, np.float32)])
        return self._emit(self._seen * self._up)

    def _emit(self, stop: int) -> np.ndarray:
        """Output samples n with n * down < stop (in input samples times `up`)."""
        n = np.arange(self._out, max(self._out, -(-stop // self._down)))
        if not len(n):
            return np.empty(0, np.float32)
        middle, phase = np.divmod(n * self._down, self._up)
        windows = np.lib.stride_tricks.sliding_window_view(self._kept, 2 * self._half + 1)
        out = np.einsum("nt,nt->n", windows[middle - self._half - self._first], self._table[phase])
        self._out = int(n[-1]) + 1
        drop = max(0, self._out * self._down // self._up - self._half - self._first)
        self._kept, self._first = self._kept[drop:], self._first + drop
        return out.astype(np.float32)
