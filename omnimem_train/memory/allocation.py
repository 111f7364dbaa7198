"""How a layer's media budget is split over picture and sound, independent of the selector.

An allocation never looks at a model. All but `Fixed` spend the whole budget: what one modality cannot use goes to the
other, and `floor` keeps either from vanishing. Shape legend: see `omnimem_train.memory.state`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from omnimem_train.memory.options import build, within
from omnimem_train.memory.redundancy import above_zero, neighbour_cosine
from omnimem_train.memory.selector import Allocation, Candidates, Scored
from omnimem_train.memory.state import AUDIO, VISUAL

Counts = list[tuple[tuple[int, ...], Tensor]]


def available(c: Candidates) -> tuple[Tensor, Tensor]:
    """(B, G) int64 numbers of visual and of audio candidates."""
    return (c.tokens.modality == VISUAL).sum(-1), (c.tokens.modality == AUDIO).sum(-1)


def floor_tokens(floor: float, budget: int) -> int:
    """Tokens a modality is sure of: `floor` of the budget, at least 1, at most half; 0 with a floor of 0."""
    return min(max(1, math.floor(floor * budget)), budget // 2) if floor > 0 else 0


def split(c: Candidates, audio_share: Tensor, budget: int, floor: float) -> Counts:
    """Counts for a share of audio, (B, 1) or (1, 1) float64 in [0, 1], with floor and hand-over of what is unused."""
    n_visual, n_audio = available(c)
    low = floor_tokens(floor, budget)
    wanted = (audio_share * budget).round().long().clamp(low, budget - low)
    audio = torch.minimum(wanted, n_audio)
    visual = torch.minimum(budget - audio, n_visual)
    return [((VISUAL,), visual), ((AUDIO,), budget - visual)]


def used(c: Candidates, scored: Scored) -> Tensor:
    """(B, G, S), non-negative for media: the importance, or for a rule without one its scores above the lowest."""
    mass = scored.score if scored.importance is None else scored.importance
    return above_zero(mass, c.is_text)


def repeated(c: Candidates, scored: Scored) -> Tensor:
    """(B, G, S) redundancy: the selector's, or the mean cosine of a key with its neighbours of the same modality."""
    if scored.redundancy is not None:
        return scored.redundancy
    return neighbour_cosine(c.tokens.keys, c.tokens.modality)


def complexity(mass: Tensor, redundancy: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy of `mass` over `members`, times (1 - mean redundancy), in nats; and log of the number of members.

    All (B, G, S); returns two (B, G). Without mass, or with one member, the complexity is 0.
    """
    mass = mass.masked_fill(~members, 0).double()
    p = mass / mass.sum(-1, keepdim=True).clamp(min=1e-30)
    n = members.sum(-1)
    mean = redundancy.masked_fill(~members, 0).double().sum(-1) / n.clamp(min=1)
    return torch.special.entr(p).sum(-1) * (1 - mean).clamp(min=0), n.clamp(min=1).double().log()


@dataclass(frozen=True)
class Shared:
    """One budget for both: the best tokens win, whatever they are.

    Options:
        floor: share of the budget that each modality is sure of.
    """

    spends_all: ClassVar[bool] = True

    floor: float = 0.0

    def __post_init__(self) -> None:
        within("floor", self.floor, 0, 0.5)

    def counts(self, c: Candidates, scored: Scored, budget: int) -> Counts:
        """The floors, then the rest for both."""
        if self.floor == 0:
            return [((VISUAL, AUDIO), torch.full(c.shape[:2], budget, device=c.tokens.keys.device))]
        sure = [n.clamp(max=floor_tokens(self.floor, budget)) for n in available(c)]
        return [((VISUAL,), sure[0]), ((AUDIO,), sure[1]), ((VISUAL, AUDIO), budget - sure[0] - sure[1])]


@dataclass(frozen=True)
class Split:
    """A fixed share of sound; the rest is picture.

    Options:
        audio: share of the budget that goes to sound.
        floor: share of the budget that each modality is sure of (at least one token, unless 0).
    """

    spends_all: ClassVar[bool] = True

    audio: float = 0.25
    floor: float = 0.02

    def __post_init__(self) -> None:
        within("audio", self.audio, 0, 1)
        within("floor", self.floor, 0, 0.5)

    def counts(self, c: Candidates, scored: Scored, budget: int) -> Counts:
        """The same shares for all streams."""
        share = torch.full((1, 1), self.audio, dtype=torch.float64, device=c.tokens.keys.device)
        return split(c, share, budget, self.floor)


@dataclass(frozen=True)
class Avba:
    """Audio-visual budget allocation of the paper (arXiv 2606.07577).

    C_m = entropy(p) (1 - mean s) / log n_m for each modality m, with p its importance normalised and s its redundancy;
    the share of picture is C_v r / (C_v r + C_a). Complexities are averaged over kv heads, so all of them split alike.
    A selector without importance is read through its scores (`used`), one without redundancy through neighbouring keys
    (`repeated`). If both complexities are 0, the shares are those of the candidates.

    Options:
        prior: r, visual : audio. It does not transfer between models: 5 is the paper's, for about 43 visual tokens to
            one of sound; Qwen2.5-Omni has about 4.5 to one at the same pixels.
        floor: share of the budget that each modality is sure of (at least one token, unless 0).
    """

    spends_all: ClassVar[bool] = True

    prior: float = 5.0
    floor: float = 0.02

    def __post_init__(self) -> None:
        within("prior", self.prior, 0)
        within("floor", self.floor, 0, 0.5)

    def counts(self, c: Candidates, scored: Scored, budget: int) -> Counts:
        """Shares from the complexities."""
        return split(c, self.audio_share(c, scored), budget, self.floor)

    def audio_share(self, c: Candidates, scored: Scored) -> Tensor:
        """(B, 1) float64, the share of sound before floor and hand-over."""
        mass, redundancy = used(c, scored), repeated(c, scored)
        found = []
        for kind in (VISUAL, AUDIO):
            measured, log_n = complexity(mass, redundancy, c.tokens.modality == kind)
            found.append((measured / log_n.clamp(min=math.log(2))).mean(dim=1, keepdim=True))
        return _share(c, found[0] * self.prior, found[1])


@dataclass(frozen=True)
class Mass:
    """Shares as large as the sums of what the selector measured: importance x (1 - redundancy), averaged over kv heads.

    With `perturbation` that is the mass of perturbation. A selector without importance is read through its scores.

    Options:
        floor: share of the budget that each modality is sure of (at least one token, unless 0).
    """

    spends_all: ClassVar[bool] = True

    floor: float = 0.02

    def __post_init__(self) -> None:
        within("floor", self.floor, 0, 0.5)

    def counts(self, c: Candidates, scored: Scored, budget: int) -> Counts:
        """Shares from the sums."""
        mass = used(c, scored).double()
        if scored.redundancy is not None and scored.importance is not None:
            mass = mass * (1 - scored.redundancy).clamp(min=0)
        sums = [
            mass.masked_fill(c.tokens.modality != kind, 0).sum(-1).mean(1, keepdim=True) for kind in (VISUAL, AUDIO)
        ]
        return split(c, _share(c, sums[0], sums[1]), budget, self.floor)


def _share(c: Candidates, visual: Tensor, audio: Tensor) -> Tensor:
    """(B, 1) share of audio; where both are 0, that of the candidates."""
    n_visual, n_audio = (n.double().mean(dim=1, keepdim=True) for n in available(c))
    nothing = (visual + audio) <= 0
    visual, audio = torch.where(nothing, n_visual, visual), torch.where(nothing, n_audio, audio)
    return audio / (visual + audio).clamp(min=1e-300)


@dataclass(frozen=True)
class Fixed:
    """Numbers of tokens for each modality, as in a per-layer table of the released OmniMem code.

    A modality that has fewer leaves the rest unused: the tables are read as min(n, B) per modality, so results equal
    the released code's. Streams of one batch must then hold equal numbers of each. The budget given to `choose` is
    ignored.

    Options:
        audio, visual: tokens.
    """

    spends_all: ClassVar[bool] = False

    audio: int
    visual: int

    def __post_init__(self) -> None:
        within("audio", self.audio, 0)
        within("visual", self.visual, 0)

    def counts(self, c: Candidates, scored: Scored, budget: int) -> Counts:
        """min(n, B) of each."""
        n_visual, n_audio = available(c)
        return [((VISUAL,), n_visual.clamp(max=self.visual)), ((AUDIO,), n_audio.clamp(max=self.audio))]


_ALLOCATIONS: dict[str, type[Allocation]] = {
    "shared": Shared,
    "split": Split,
    "avba": Avba,
    "mass": Mass,
    "fixed": Fixed,
}


def allocations() -> dict[str, type[Allocation]]:
    """All allocations by name."""
    return dict(_ALLOCATIONS)


def make_allocation(name: str, **options: Any) -> Allocation:
    """The allocation `name` with `options`.

    Raises:
        UserError: unknown name, unknown option, or a value an option cannot take.
    """
    return build("allocation", _ALLOCATIONS, name, options)


def layer_complexity(c: Candidates, scored: Scored) -> float:
    """C_l of the paper: entropy of a layer's importance over all media x (1 - mean redundancy), averaged over streams
    and kv heads. Measure it on a small calibration set; see `layer_table`."""
    return float(complexity(used(c, scored), repeated(c, scored), ~c.is_text)[0].mean())


def layer_table(complexities: Sequence[float], total: int, temperature: float = 0.2) -> list[int]:
    """Budgets of all layers, in proportion to softmax(C_l / temperature) (the paper's AVBA across layers, T = 0.2).

    Args:
        complexities: C_l of each layer.
        total: tokens of all layers together, at least one a layer.

    Returns:
        One number a layer, each at least 1, that sum to `total`.

    Raises:
        UserError: fewer tokens than layers.
    """
    within("total", total, len(complexities))
    spare = total - len(complexities)
    shares = torch.tensor(complexities, dtype=torch.float64).div(temperature).softmax(0) * spare
    table = shares.floor().long()
    left = spare - int(table.sum())
    table[(shares - table).argsort(descending=True, stable=True)[:left]] += 1
    return (table + 1).tolist()
