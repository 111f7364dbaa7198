"""The shared inference module: what a stream remembers and how it is chosen. Training, evaluation and your own
inference code use the same one. It imports torch and the standard library, nothing else.

    spec = MemorySpec(selector="perturbation", budget=6144)
    rows, scored = choose(candidates, spec.make_selector(), spec.make_allocation(), budget=6144)
    memory = candidates.tokens.gather(rows)
"""

from omnimem_train.memory import attention_rules, baselines, infinipot, omnimem, perturbation
from omnimem_train.memory.allocation import Fixed, allocations, layer_complexity, layer_table, make_allocation
from omnimem_train.memory.positions import Rotary, compact, end
from omnimem_train.memory.redundancy import EvidenceSelector, ScoringSelector
from omnimem_train.memory.selector import (
    Allocation,
    Candidates,
    Probes,
    Scored,
    Selector,
    SelectorRow,
    choose,
    describe,
    make_selector,
    register,
    selector_table,
    selectors,
)
from omnimem_train.memory.spec import LayerBudget, MemorySpec, parse_bytes
from omnimem_train.memory.state import AUDIO, MODALITIES, TEXT, VISUAL, LayerMemory
from omnimem_train.memory.tables import load_layer_table

__all__ = [
    "AUDIO",
    "MODALITIES",
    "TEXT",
    "VISUAL",
    "Allocation",
    "Candidates",
    "EvidenceSelector",
    "Fixed",
    "LayerBudget",
    "LayerMemory",
    "MemorySpec",
    "Probes",
    "Rotary",
    "Scored",
    "ScoringSelector",
    "Selector",
    "SelectorRow",
    "allocations",
    "attention_rules",
    "baselines",
    "choose",
    "compact",
    "describe",
    "end",
    "infinipot",
    "layer_complexity",
    "layer_table",
    "load_layer_table",
    "make_allocation",
    "make_selector",
    "omnimem",
    "parse_bytes",
    "perturbation",
    "register",
    "selector_table",
    "selectors",
]
