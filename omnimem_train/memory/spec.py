"""`MemorySpec`: everything that decides what a stream remembers, as a small JSON file that travels with an adapter."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from omnimem_train.errors import UserError, nearest
from omnimem_train.memory.allocation import make_allocation
from omnimem_train.memory.options import values
from omnimem_train.memory.selector import Allocation, Selector, make_selector
from omnimem_train.memory.tables import load_layer_table

FORMAT = 1
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def parse_bytes(text: str) -> int:
    """`"512MiB"` -> 536870912. Units: B, KB, MB, GB (powers of 1000), KiB, MiB, GiB (powers of 1024)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?i?B)\s*", text)
    if match is None or match[2] not in UNITS:
        raise UserError(
            f"memory budget {text!r} is neither a number of tokens nor a size",
            remedy=f'write e.g. 6144 or "512MiB"; units: {", ".join(UNITS)}',
        )
    size = float(match[1]) * UNITS[match[2]]
    if size >= 2**63:
        raise UserError(f"memory budget {text[:20]!r} is beyond any memory", remedy='write e.g. "512MiB"')
    return int(size)


@dataclass(frozen=True)
class LayerBudget:
    """Media tokens one kv head of a layer keeps: `total`, split by modality when `audio` and `visual` are given."""

    total: int
    audio: int | None = None
    visual: int | None = None


@dataclass(frozen=True)
class MemorySpec:
    """How a stream is compressed.

    Attributes:
        selector: name of a selector (`omnimem selectors` lists them).
        selector_options: its options.
        budget: what a kv head of a layer keeps between chunks: a number of tokens, a size for the whole memory
            (keys and values of all layers, pinned text on top) such as "512MiB", or None for no limit.
        chunk_tokens: tokens run through the language model before the memory is compressed again. During a chunk its
            tokens come on top of the budget.
        allocation: how a layer's budget is split over modalities.
        allocation_options: its options.
        layer_table: one entry a layer, a number of tokens or [audio, visual]; replaces `budget` (published OmniMem
            tables have this form). Empty: every layer gets `budget`. May be given as the path of a table file (see
            `omnimem_train.memory.tables`); the spec then holds its entries.
        positions: "absolute" keeps each key at its position in the stream; "compact" closes the gaps that eviction
            leaves and moves kept keys there (see `omnimem_train.memory.positions`).
        max_gap: with compact positions, the largest temporal step left between two kept tokens.
        count_text: whether pinned text (prompt, marks) counts against the budget. By default it does not, as in the
            released OmniMem code.
        max_text_tokens: pinned text is never evicted; more than this is an error, so memory stays bounded.
        seed: for selectors that draw at random.
    """

    selector: str = "perturbation"
    selector_options: dict[str, Any] = field(default_factory=dict)
    budget: int | str | None = 6144
    chunk_tokens: int = 2048
    allocation: str = "shared"
    allocation_options: dict[str, Any] = field(default_factory=dict)
    layer_table: tuple[Any, ...] | str = ()
    positions: str = "absolute"
    max_gap: int = 1
    count_text: bool = False
    max_text_tokens: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.layer_table, str | Path):
            object.__setattr__(self, "layer_table", load_layer_table(self.layer_table))
        if not isinstance(self.layer_table, list | tuple):
            raise UserError(
                f"memory layer_table={self.layer_table!r} is not a list",
                remedy="give one entry a layer, e.g. [512, 512], or the path of a table file",
            )
        for name in ("selector_options", "allocation_options"):
            options = getattr(self, name)
            if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
                raise UserError(f"memory {name}={getattr(self, name)!r} is not a set of options")
        object.__setattr__(self, "layer_table", tuple(self.layer_table))
        self.make_selector()
        self.make_allocation()
        if isinstance(self.budget, str):
            parse_bytes(self.budget)
        elif self.budget is not None and not _is_whole(self.budget, 1):
            raise UserError(
                f"memory budget {self.budget!r} is not a whole number of tokens, 1 or more",
                remedy='give e.g. 6144, a size such as "512MiB", or null for no limit',
            )
        for name, low in (("chunk_tokens", 1), ("max_gap", 1), ("max_text_tokens", 0), ("seed", 0)):
            value = getattr(self, name)
            if not _is_whole(value, low):
                raise UserError(f"memory {name}={value!r} must be a whole number, {low} or more")
        if not isinstance(self.count_text, bool):
            raise UserError(f"memory count_text={self.count_text!r} must be true or false")
        if self.positions not in ("absolute", "compact"):
            raise UserError(
                f"unknown positions {self.positions!r}{nearest(str(self.positions), ['absolute', 'compact'])}",
                remedy="choose 'absolute' or 'compact'",
            )
        for entry in self.layer_table:
            _table_entry(entry)

    def make_selector(self) -> Selector:
        """The selector this spec names."""
        return make_selector(self.selector, **self.selector_options)

    def make_allocation(self) -> Allocation:
        """The allocation this spec names."""
        return make_allocation(self.allocation, **self.allocation_options)

    def replace(self, **changes: Any) -> MemorySpec:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def at(self, budget: int | str | None, chunk_tokens: int | None = None) -> MemorySpec:
        """This spec with another budget: `budget` tokens a layer, None for no limit, and, if given, another chunk.

        A layer table keeps its shape and is scaled so that its mean is `budget` (every entry at least 1 token).

        Raises:
            UserError: a size in bytes for a spec with a layer table.
        """
        chunk = self.chunk_tokens if chunk_tokens is None else chunk_tokens
        if budget is None:
            return self.replace(budget=None, layer_table=(), chunk_tokens=chunk)
        if not self.layer_table:
            return self.replace(budget=budget, chunk_tokens=chunk)
        if isinstance(budget, str):
            raise UserError(
                f"a layer table cannot be scaled to the size {budget!r}",
                cause="tables are scaled to a mean number of tokens a layer",
                remedy="give that number, or leave out memory.layer_table",
            )
        entries = [_table_entry(entry) for entry in self.layer_table]
        factor = budget * len(entries) / sum(e.total for e in entries)

        def scaled(n: int) -> int:
            return max(1, round(n * factor))

        table = [
            scaled(e.total) if e.audio is None or e.visual is None else [scaled(e.audio), scaled(e.visual)]
            for e in entries
        ]
        return self.replace(budget=budget, layer_table=tuple(table), chunk_tokens=chunk)

    @property
    def mean_tokens(self) -> int | str | None:
        """Tokens a layer as a label: the mean of the layer table, rounded, else `budget`; None when unlimited."""
        if self.unlimited or not self.layer_table:
            return None if self.unlimited else self.budget
        return round(sum(_table_entry(entry).total for entry in self.layer_table) / len(self.layer_table))

    @property
    def unlimited(self) -> bool:
        """True when nothing is ever dropped."""
        return self.selector == "full" or (self.budget is None and not self.layer_table)

    def layer_budgets(self, n_layers: int, kv_heads: int, head_dim: int, itemsize: int) -> list[LayerBudget | None]:
        """The budget of every layer in tokens; None where there is no limit.

        Args:
            n_layers, kv_heads, head_dim: shape of the model's cache.
            itemsize: bytes of one number of it.

        Raises:
            UserError: the layer table has another length, or a byte budget is below one token a layer.
        """
        if self.unlimited:
            return [None] * n_layers
        if self.layer_table:
            if len(self.layer_table) != n_layers:
                raise UserError(
                    f"the layer table has {len(self.layer_table)} entries, the model has {n_layers} layers",
                    remedy="use the table measured for this model",
                )
            return [_table_entry(entry) for entry in self.layer_table]
        if isinstance(self.budget, str):
            size = parse_bytes(self.budget)
            per_token = n_layers * kv_heads * 2 * head_dim * itemsize
            if size < per_token:
                raise UserError(
                    f"memory budget {self.budget} is below one token a layer",
                    cause=f"a token takes {per_token} bytes: {n_layers} layers x {kv_heads} kv heads x 2 x {head_dim}",
                    remedy=f"give at least {per_token}B",
                )
            return [LayerBudget(size // per_token)] * n_layers
        assert self.budget is not None
        return [LayerBudget(int(self.budget))] * n_layers

    def media_budget(self, budget: LayerBudget, n_text: int) -> LayerBudget:
        """What is left for picture and sound beside `n_text` pinned text tokens.

        Raises:
            UserError: text alone exceeds its limit or, where it counts, the budget.
        """
        if n_text > self.max_text_tokens:
            raise UserError(
                f"{n_text} text tokens are pinned in memory, the limit is {self.max_text_tokens}",
                cause="text in the stream (prompt, marks, time stamps) is never evicted",
                remedy="shorten the prompt, use fewer time stamps, or raise memory.max_text_tokens",
            )
        if not self.count_text:
            return budget
        if budget.total <= n_text:
            raise UserError(
                f"a budget of {budget.total} tokens is below the {n_text} text tokens it has to hold",
                cause="memory.count_text is on and text is never evicted",
                remedy=f"give a budget above {n_text}, or set memory.count_text=false",
            )
        left = budget.total - n_text
        if budget.audio is None or budget.visual is None:
            return LayerBudget(left)
        audio = budget.audio * left // budget.total
        return LayerBudget(left, audio, left - audio)

    # JSON ------------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return asdict(self) | {"layer_table": [list(e) if isinstance(e, tuple) else e for e in self.layer_table]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MemorySpec:
        """Inverse of `to_dict`; missing fields take their defaults.

        Raises:
            UserError: an unknown key.
        """
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise UserError(
                    f"unknown key {key!r} in a memory spec{nearest(key, known)}", remedy=f"known: {', '.join(known)}"
                )
        return cls(**values)

    def fingerprint(self) -> str:
        """16 hex digits that change with any field; defaults of selector and allocation count as if written out."""
        written_out = {
            "format": FORMAT,
            "selector_options": values(self.make_selector()),
            "allocation_options": values(self.make_allocation()),
        }
        text = json.dumps(self.to_dict() | written_out, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def save(self, path: str | Path, **extra: Any) -> None:
        """Write `memory.json`: format, fingerprint, the fields, and `extra` under "about"."""
        content = {"format": FORMAT, "fingerprint": self.fingerprint(), "memory": self.to_dict(), "about": extra}
        Path(path).write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> MemorySpec:
        """Read `memory.json` (or the folder that holds it).

        Raises:
            UserError: no such file, not this format, or the content does not match its fingerprint.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "memory.json"
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the memory spec {path}", cause=str(error)) from error
        if (
            not isinstance(content, dict)
            or content.get("format") != FORMAT
            or not isinstance(content.get("memory"), dict)
        ):
            raise UserError(
                f"{path} is not a memory spec of format {FORMAT}", remedy="export the adapter again with this version"
            )
        spec = cls.from_dict(content["memory"])
        if content.get("fingerprint") != spec.fingerprint():
            raise UserError(
                f"{path} does not match its fingerprint {content.get('fingerprint')!r} (now {spec.fingerprint()!r})",
                cause="the file was edited by hand, or written by a version with other defaults",
                remedy="export again, or write a new spec with MemorySpec.save",
            )
        return spec


def _is_whole(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _table_entry(entry: Any) -> LayerBudget:
    """An entry of a layer table: a number of tokens or [audio, visual]."""
    numbers = list(entry) if isinstance(entry, list | tuple) else [entry]
    if len(numbers) not in (1, 2) or not all(_is_whole(n, 0) for n in numbers) or sum(numbers) < 1:
        raise UserError(
            f"entry {entry!r} of the layer table is neither a number of tokens nor [audio, visual]",
            remedy="write e.g. 512 or [128, 384]",
        )
    if len(numbers) == 1:
        return LayerBudget(numbers[0])
    return LayerBudget(sum(numbers), audio=numbers[0], visual=numbers[1])
