"""The memory settings of the study: rules, their options, their forms, budgets.

A *rule* is a selector. In its *original* form it works as published; the *augmented* forms add what this package lets
every scoring rule have: a split of the budget over picture and sound, the redundancy factor (1 - rho), or both. Tuning
on validation clips first chooses a rule's options among the (up to four) of `OPTIONS`, in its original form, then the
share of sound of each form that splits. Chosen is what is best on average over `TUNED_AT`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omnimem_train.memory.spec import MemorySpec

BUDGETS = (615, 295, 148, 74, 49)  # 25, 12, 6, 3 and 2 % of the 2,460 media tokens of a minute
TUNED_AT = (148, 49)
CHUNK = 256
SHARES = (0.3, 0.5, 0.7)  # of sound, tried for every form that splits
FULL = MemorySpec(selector="full", budget=None, chunk_tokens=CHUNK)

Options = dict[str, Any]
# What is tried of each rule; an empty set is its default.
OPTIONS: dict[str, tuple[Options, ...]] = {
    "perturbation": ({}, {"n_probes": 0}, {"group_norm": "sum"}, {"history": "average"}),
    "omnimem": ({}, {"lam": 0.2}, {"lam": 1.0}, {"features": "keys"}),
    "snapkv": ({}, {"history": "average"}, {"window_size": 8}, {"history": "average", "window_size": 8}),
    "observed_attention": ({}, {"history": "average"}),
    "critical_kv": ({}, {"history": "average"}, {"window_size": 8}, {"history": "average", "window_size": 8}),
    "infinipot_v": ({}, {"tar_ratio": 0.25}, {"tar_ratio": 0.75}, {"query_ratio": 0.5}),
    "key_difference": ({},),
    "expected_attention": ({}, {"use_covariance": False}, {"use_vnorm": False}, {"n_future_positions": 64}),
    "tova": ({}, {"history": "average"}),
    "lagkv": ({}, {"lag_size": 32}, {"lag_size": 8}, {"lag_size": 8, "cross_scoring": True}),
    "knorm": ({},),
    "sliding_window": ({},),
    "uniform": ({},),
    "random": ({},),
}
OURS = ("perturbation", "omnimem")
LEARNED = "learned"  # `omnimem` with a learned importance: for models that were fine-tuned with one
AUGMENTED = (
    "snapkv", "observed_attention", "critical_kv", "infinipot_v", "key_difference", "expected_attention",
    "tova", "lagkv",
)  # fmt: skip
SPLIT_ONLY = ("random", "uniform")  # take no redundancy factor


@dataclass(frozen=True)
class Form:
    """One form of a rule.

    Attributes:
        rule: name of the selector.
        options: of the selector, the redundancy factor aside.
        rho: with the redundancy factor.
        allocation: None for one shared budget; a share of sound; or the name of an allocation.
    """

    rule: str
    options: tuple[tuple[str, Any], ...] = ()
    rho: bool = False
    allocation: float | str | None = None

    @property
    def kind(self) -> str:
        """Name of the form: what is tuned as one."""
        parts = [self.rule, *["rho"] * self.rho]
        if self.allocation is not None:
            parts.append("split" if isinstance(self.allocation, float) else self.allocation)
        return " + ".join(parts)

    @property
    def family(self) -> str:
        """As the results page sorts methods."""
        if self.rule in (*OURS, LEARNED):
            return "omnimem"
        return "augmented" if self.rho or self.allocation is not None else "rival"

    @property
    def tuned(self) -> dict[str, Any]:
        """What tuning chose."""
        return dict(self.options) | ({} if self.allocation is None else {"allocation": self.allocation})

    def spec(self, budget: int, chunk: int = CHUNK) -> MemorySpec:
        """The memory setting at a budget."""
        options = dict(self.options)
        if self.rule == "perturbation" or self.rho:  # the one rule that has the factor unless it is switched off
            options["redundancy"] = "later_key" if self.rho else "none"
        extra: dict[str, Any] = {}
        if isinstance(self.allocation, float):
            extra = {"allocation": "split", "allocation_options": {"audio": self.allocation}}
        elif self.allocation is not None:
            extra = {"allocation": self.allocation}
        rule = self.rule
        if rule == LEARNED:
            rule, options = "omnimem", options | {"importance": "learned"}
        return MemorySpec(selector=rule, selector_options=options, budget=budget, chunk_tokens=chunk, **extra)

    @classmethod
    def read(cls, kind: str, tuned: Mapping[str, Any]) -> Form:
        """The form of a setting in a results folder: its method and what was tuned."""
        rule, *parts = kind.split(" + ")
        options = tuple(sorted((k, v) for k, v in tuned.items() if k != "allocation"))
        return cls(rule, options, "rho" in parts, tuned.get("allocation"))

    def described(self, budget: int, media_tokens: int, chunk: int = CHUNK) -> dict[str, Any]:
        """A setting as the results folder describes it."""
        return {
            "method": self.kind,
            "family": self.family,
            "budget": budget,
            "share": budget / media_tokens,
            "tuned": self.tuned,
            "memory": self.spec(budget, chunk).to_dict(),
        }


def original_forms(rule: str) -> list[Form]:
    """The forms among which a rule's options are chosen."""
    return [Form(rule, tuple(sorted(options.items()))) for options in OPTIONS[rule]]


def other_forms(chosen: Form) -> list[Form]:
    """The forms of a rule, given its options: splits at every share, the redundancy factor, both; ours also with
    allocations that measure the share."""
    rule, options = chosen.rule, chosen.options
    if rule not in (*OURS, *AUGMENTED, *SPLIT_ONLY):
        return []
    rhos = (False,) if rule in SPLIT_ONLY else (False, True)
    forms = [Form(rule, options, rho, share) for rho in rhos for share in (None, *SHARES)]
    if rule in OURS:
        forms += [Form(rule, options, rho, name) for rho in rhos for name in ("avba", "mass")]
    return [form for form in forms if form != chosen]


def learned(best: Form, lam: float = 0.3, rho: bool = False, audio: float | None = None) -> Form:
    """The form with a learned importance that fine-tuning has in the loop: the split of the best training-free form."""
    share = best.allocation if isinstance(best.allocation, float) else 0.5
    return Form(LEARNED, (("lam", lam),), rho, share if audio is None else audio)


def choose(scores: Mapping[Form, float]) -> dict[str, Form]:
    """Of the forms of each kind, the best; the first of equals."""
    best: dict[str, Form] = {}
    for form, score in scores.items():
        if form.kind not in best or score > scores[best[form.kind]]:
            best[form.kind] = form
    return best


def best_of(scores: Mapping[Form, float], *families: str) -> Form:
    """The best form of some families."""
    return max((f for f in scores if f.family in families), key=lambda f: scores[f])


FULL_DESCRIBED = {
    "method": "full cache",
    "family": "reference",
    "budget": "full",
    "share": 1.0,
    "tuned": {},
    "memory": FULL.to_dict(),
}
