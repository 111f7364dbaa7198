"""Which memory budget and which chunk length a training step uses.

A budget drawn anew for each step makes one adapter serve many budgets. Activation Beacon (arXiv 2401.03462) draws a
random compression ratio; a log-uniform number of tokens is this package's own design: halving the budget matters about
as much at 8,192 tokens as at 512, so every octave gets the same share of the steps.

Draws are a pure function of (seed, step): all ranks draw the same, and resuming needs no state but the settings.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from omnimem_train.errors import UserError, nearest

KINDS = ("log_uniform", "uniform", "list", "fixed")
FULL = "full"


@dataclass(frozen=True)
class BudgetSampling:
    """How budgets and chunk lengths are drawn.

    Attributes:
        kind: "log_uniform" or "uniform" between `low` and `high`, "list" (one of `choices`, equally likely), or "fixed"
            (the only entry of `choices`).
        low, high: smallest and largest budget in media tokens per kv head and layer, both included.
        choices: budgets in tokens, for "list" and "fixed".
        full_share: share of the steps that run without compression, whatever the kind.
        chunk_jitter: the chunk length is drawn uniformly between (1 - chunk_jitter) and (1 + chunk_jitter) times
            `memory.chunk_tokens`, so that the model does not learn where chunks end.
        seed: of the draws.

    Raises:
        UserError: a value out of range; all of them in one message.
    """

    kind: str = "log_uniform"
    low: int = 512
    high: int = 8192
    choices: tuple[int, ...] = ()
    full_share: float = 0.1
    chunk_jitter: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", tuple(self.choices))
        faults = []
        if self.kind not in KINDS:
            faults.append(f"kind {self.kind!r} is not one of {', '.join(KINDS)}{nearest(self.kind, KINDS)}")
        elif self.kind == "list" and not self.choices:
            faults.append("kind 'list' needs choices, e.g. choices=[64, 128]")
        elif self.kind == "fixed" and len(self.choices) != 1:
            faults.append(f"kind 'fixed' needs exactly one entry in choices, got {list(self.choices)}")
        elif self.kind in ("log_uniform", "uniform") and self.choices:
            faults.append(f"kind {self.kind!r} draws between low and high and makes no use of choices; set choices=[]")
        if not 1 <= self.low <= self.high:
            faults.append(f"low={self.low} and high={self.high} must hold 1 <= low <= high")
        if any(budget < 1 for budget in self.choices):
            faults.append(f"choices={list(self.choices)} must be 1 token or more")
        if not 0 <= self.full_share <= 1:
            faults.append(f"full_share={self.full_share} is a share of the steps, between 0 and 1")
        if not 0 <= self.chunk_jitter <= 0.9:
            faults.append(f"chunk_jitter={self.chunk_jitter} must lie between 0 and 0.9")
        if faults:
            raise UserError("budgets: " + "; ".join(faults))

    @property
    def smallest(self) -> int | None:
        """The smallest budget that may be drawn; None when every step runs without compression."""
        if self.full_share >= 1:
            return None
        return min(self.choices) if self.choices else self.low

    def edges(self, n: int) -> list[int]:
        """First budget of each of at most `n` bands, equally likely by design, and one past the last budget."""
        stop = self.high + 1
        if self.kind == "uniform":
            inner = [self.low + round((stop - self.low) * i / n) for i in range(n)]
        else:
            inner = [round(self.low * (stop / self.low) ** (i / n)) for i in range(n)]
        return sorted({*inner, stop})

    def bands(self, n: int = 3) -> list[str]:
        """Names of the bands that a log sorts steps into, e.g. `["512-1289", ..., "full"]`; for lists, each choice."""
        if self.kind in ("list", "fixed"):
            names = [str(budget) for budget in sorted(set(self.choices))]
        else:
            edges = self.edges(n)
            names = [_name(a, b - 1) for a, b in pairwise(edges)]
        return names + [FULL] * (self.full_share > 0)

    def band_of(self, budget: int | None, n: int = 3) -> str:
        """The band a drawn budget falls in; "full" for None."""
        if budget is None:
            return FULL
        if self.kind in ("list", "fixed"):
            return str(budget)
        edges = self.edges(n)
        first = max(a for a in edges[:-1] if a <= max(budget, edges[0]))
        return _name(first, edges[edges.index(first) + 1] - 1)

    def fingerprint(self) -> str:
        """16 hex digits that change with any setting."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Draw:
    """What one step uses.

    Attributes:
        budget: media tokens per kv head and layer, or None for a step without compression.
        chunk_tokens: tokens of a chunk.
    """

    budget: int | None
    chunk_tokens: int


class BudgetSampler:
    """Draws for each step.

    Args:
        config: how.
        chunk_tokens: the chunk length that the jitter is about.
    """

    def __init__(self, config: BudgetSampling, chunk_tokens: int) -> None:
        assert chunk_tokens >= 1
        self.config = config
        self.chunk_tokens = chunk_tokens

    def draw(self, step: int) -> Draw:
        """The draw of optimizer step `step`; depends on the settings and `step` alone."""
        budget = (
            None if self._random(step, "full") < self.config.full_share else self._budget(self._random(step, "budget"))
        )
        factor = 1 + self.config.chunk_jitter * (2 * self._random(step, "chunk") - 1)
        return Draw(budget, max(1, round(self.chunk_tokens * factor)))

    def _budget(self, u: float) -> int:
        """The quantile `u` in [0, 1) of the distribution of budgets."""
        c = self.config
        if c.choices:
            return c.choices[int(u * len(c.choices))]
        if c.kind == "uniform":
            return c.low + int(u * (c.high + 1 - c.low))
        # P(b) = log((b + 1) / b) / log((high + 1) / low): log-uniform over [low, high + 1), rounded down
        return min(c.high, int(c.low * math.exp(u * math.log((c.high + 1) / c.low))))

    def _random(self, step: int, what: str) -> float:
        """Uniform in [0, 1), from a hash: the same on every machine and with every version of every library."""
        digest = hashlib.sha256(f"{self.config.seed}/{step}/{what}".encode()).digest()
        return (int.from_bytes(digest[:8], "big") >> 11) / 2**53

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps to prove that a resumed run draws the same."""
        settings = asdict(self.config) | {"choices": list(self.config.choices)}
        return {"fingerprint": self.config.fingerprint(), "settings": settings, "chunk_tokens": self.chunk_tokens}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that `state` was saved under the same settings.

        Raises:
            UserError: it was not; lists what differs.
        """
        own = self.state_dict()
        old, new = ({**s["settings"], "chunk_tokens": s["chunk_tokens"]} for s in (state, own))
        changed = [
            f"{key}: {old.get(key)!r} then, {new.get(key)!r} now"
            for key in {**old, **new}
            if old.get(key) != new.get(key)
        ]
        if changed or state["fingerprint"] != own["fingerprint"]:
            raise UserError(
                f"the checkpoint was made with other budgets ({'; '.join(changed) or 'the fingerprints differ'})",
                cause="the resumed run would draw other budgets than the run it continues",
                remedy="resume with the settings of the checkpoint, or start a new run",
            )


def _name(first: int, last: int) -> str:
    return f"{first}-{last}" if last > first else str(first)
