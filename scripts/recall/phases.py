"""What the study measures: its clip sets, and its jobs in the order of their importance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.world import WorldSettings
from omnimem_train.errors import UserError
from omnimem_train.memory.spec import MemorySpec
from scripts.recall.finetune import ABLATED, ARMS, MAIN_ARMS, MINUTE, Scale
from scripts.recall.inside import Pictures, Precision
from scripts.recall.jobs import Answers, SetSpec, Tune
from scripts.recall.load import load
from scripts.recall.methods import (
    BUDGETS,
    FULL,
    TUNED_AT,
    Form,
    best_of,
    choose,
    learned,
)
from scripts.recall.modality import Modalities

WORLDS = tuple(
    (loudness, copies, share) for share in (0.3, 0.5, 0.7) for copies in (0.0, 0.5, 1.5) for loudness in (0.0, 1.0, 2.0)
)
LONG_S, SHORT_S = 240, 24


def sets(scale: float = 1.0) -> dict[str, SetSpec]:
    """All clip sets; `scale` shrinks them for a trial."""

    def n(count: int) -> int:
        return max(4, round(count * scale))

    found = {
        "val": SetSpec("val", n(100), 12),
        "test": SetSpec("test", n(216), 24),
        "pool": SetSpec("train", n(1024), 0, seed=1000),
        "short_pool": SetSpec("train", n(160), 0, WorldSettings(seconds=float(SHORT_S)), seed=1000),
        "short": SetSpec("test", n(80), 16, WorldSettings(seconds=float(SHORT_S)), seed=3),
        "long": SetSpec("test", n(32), 24, WorldSettings(seconds=float(LONG_S)), seed=1),
    }
    for loudness, copies, share in WORLDS:
        world = WorldSettings(loudness=loudness, copies=copies, sound_share=share)
        found[world_name(loudness, copies, share)] = SetSpec("test", n(48), 24, world, seed=2)
    return found


def world_name(loudness: float, copies: float, share: float) -> str:
    """Name of a world's clip set."""
    return f"sweep-l{loudness:g}-c{copies:g}-s{share:g}"


def at(forms: Iterable[Form], budgets: Sequence[int]) -> tuple[tuple[Form, int], ...]:
    """Every form at every budget."""
    return tuple((form, budget) for form in forms for budget in budgets)


def tuning_jobs(bases: int, forms: Sequence[Form], first_part: int) -> list[Any]:
    """One job a base and form."""
    return [
        Answers("tuning", base, "val", at([form], TUNED_AT), part=first_part + i)
        for i, form in enumerate(forms)
        for base in range(bases)
    ]


def mean_scores(found: Iterable[dict[Any, float]]) -> dict[Form, float]:
    """Mean accuracy of each form over budgets and bases."""
    sums: dict[Form, list[float]] = {}
    for scores in found:
        for (form, _), score in scores.items():
            sums.setdefault(form, []).append(score)
    return {form: sum(s) / len(s) for form, s in sums.items()}


@dataclass(frozen=True)
class Chosen:
    """What tuning chose.

    Attributes:
        forms: the best of each kind. best: of our family; rival: of the rivals as published; augmented: of the rest.
        perturbation: the best form of that rule.
        strong: the three best of each of both kinds of rivals.
    """

    forms: dict[str, Form]
    best: Form
    rival: Form
    augmented: Form
    perturbation: Form
    strong: tuple[Form, ...] = ()

    def tune(self, base: int, arm: str, seed: int, scale: Scale = MINUTE) -> Tune:
        """The job of a fine-tuning arm. All are read with our best training-free method, but those with a learned
        importance with that; and one with CriticalKV in the loop also with CriticalKV."""
        rival = ARMS[arm].rival
        own = learned(self.best) if ARMS[arm].learned else self.best
        loop = own if rival is None else self.forms[rival]
        read = (own, loop) if rival == "critical_kv" else (own,)
        return Tune(base, arm, seed, loop, read, scale)

    @classmethod
    def of(cls, scores: dict[Form, float]) -> Chosen:
        """From the mean accuracy of every form on validation clips."""
        every = best_of(scores, "omnimem"), best_of(scores, "rival"), best_of(scores, "augmented")
        exact = {form: score for form, score in scores.items() if form.rule == "perturbation"}
        forms = choose(scores)
        ranked = sorted(forms.values(), key=lambda form: -scores[form])
        strong = [f for family in ("rival", "augmented") for f in [r for r in ranked if r.family == family][:3]]
        return cls(forms, *every, best_of(exact, "omnimem"), tuple(strong))

    @classmethod
    def from_results(cls, folder: Path) -> Chosen:
        """From the tuning that a results folder holds.

        Raises:
            UserError: it holds none.
        """
        tried = load(folder).conditions("tuning")
        if not tried:
            raise UserError(f"{folder} holds no tuning", remedy="run the study on a GPU first")
        return cls.of(mean_scores([{(Form.read(c.method, c.tuned), c.budget): float(c.right.mean())} for c in tried]))


def study_jobs(bases: int, chosen: Chosen, seeds: int) -> list[Any]:
    """Everything after tuning, most important first."""
    jobs: list[Any] = []
    tunes = [chosen.tune(b, arm, s) for s in range(seeds) for b in range(bases) for arm in MAIN_ARMS]
    mains: list[Any] = []
    for base in range(bases):
        mains.append(Answers("main", base, "test", full=True))
        for part, form in enumerate(chosen.forms.values(), 1):
            mains.append(Answers("main", base, "test", at([form], BUDGETS), part=part))
    jobs += interleave(tunes, mains)
    jobs += [Pictures(0, (chosen.best, chosen.rival, Form("sliding_window")), BUDGETS[2])]
    jobs += ablations(bases, chosen.perturbation)
    compared = at((chosen.best, *chosen.strong), TUNED_AT)
    jobs += [Answers("sweep", 0, world_name(*w), compared, True, model_name=world_name(*w)) for w in WORLDS]
    jobs += [Modalities(base, "test") for base in range(bases)]
    jobs += [long_job(base, chosen.best) for base in range(bases)]
    jobs += [Precision(base, at([chosen.best, chosen.rival], TUNED_AT)) for base in range(bases)]
    jobs += [chosen.tune(0, arm, 0) for arm in ABLATED]
    return jobs


def interleave(slow: Sequence[Any], fast: Sequence[Any]) -> list[Any]:
    """`slow` jobs spread evenly among the `fast` ones, beginning with a slow one."""
    rows = [(i / max(1, len(slow)), 0, job) for i, job in enumerate(slow)]
    rows += [(i / max(1, len(fast)), 1, job) for i, job in enumerate(fast)]
    return [job for _, _, job in sorted(rows, key=lambda r: r[:2])]


def ablations(bases: int, best: Form) -> list[Any]:
    """Variants of the best form of perturbation, and of the paper's rule, each a method of its own name."""
    base = best.spec(TUNED_AT[0])

    def variant(**changes: Any) -> MemorySpec:
        options = base.selector_options | changes.pop("options", {})
        return base.replace(selector_options=options, **changes)

    shared = {"allocation": "shared", "allocation_options": {}}
    variants = {
        best.kind: base,
        "one shared budget": variant(**shared),
        "a shared budget with a floor of 0.25": variant(allocation="shared", allocation_options={"floor": 0.25}),
        "split 0.3": variant(allocation="split", allocation_options={"audio": 0.3}),
        "split 0.5": variant(allocation="split", allocation_options={"audio": 0.5}),
        "split 0.7": variant(allocation="split", allocation_options={"audio": 0.7}),
        "avba": variant(allocation="avba", allocation_options={}),
        "avba with prior 1": variant(allocation="avba", allocation_options={"prior": 1.0}),
        "mass": variant(allocation="mass", allocation_options={}),
        "without rho": variant(options={"redundancy": "none"}),
        "with rho": variant(options={"redundancy": "later_key"}),
        "approximate perturbation": variant(options={"approximate": True}),
        "norm of the group's sum": variant(options={"group_norm": "sum"}),
        "fresh importance": variant(options={"history": "fresh"}),
        "average with the past": variant(options={"history": "average"}),
        **{f"{p or 'all'} probes": variant(options={"n_probes": p}) for p in (16, 32, 128, 0)},
        "similarity only": base.replace(selector="omnimem", selector_options={"lam": 0.0}),
        "the paper's rule, keys": base.replace(selector="omnimem", selector_options={"features": "keys"}),
        "late layers get twice as much": variant(layer_table=(99, 99, 99, 197, 197, 197)),
        "early layers get twice as much": variant(layer_table=(197, 197, 197, 99, 99, 99)),
        "compact positions": variant(positions="compact"),
        "chunks of 128": variant(chunk_tokens=128),
        "chunks of 512": variant(chunk_tokens=512),
    }
    variants = {name: spec for name, spec in variants.items() if spec != base or spec is base}  # what it is already
    jobs = []
    for b in range(bases):
        for part, (name, spec) in enumerate(variants.items()):
            specs = tuple((f"{name}@{budget}", spec.at(budget), name) for budget in TUNED_AT)
            jobs.append(Answers("ablation", b, "test", part=part, specs=specs))
    return jobs


def long_job(base: int, best: Form) -> Answers:
    """Absolute against compact positions on clips four times longer than any in training."""
    specs = [("full", FULL, "full cache")]
    for budget in (4 * TUNED_AT[0], 4 * TUNED_AT[1], TUNED_AT[0]):
        for positions in ("absolute", "compact"):
            spec = best.spec(budget).replace(positions=positions)
            specs.append((f"{positions}@{budget}", spec, f"{best.kind}, {positions}"))
    return Answers("long", base, "long", specs=tuple(specs))
