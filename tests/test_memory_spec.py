"""`MemorySpec`: there and back through JSON, fingerprints, budgets, and what a wrong value is told."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from omnimem_train.config import load_config
from omnimem_train.errors import UserError
from omnimem_train.memory import LayerBudget, MemorySpec, make_allocation, make_selector, parse_bytes

FULL = MemorySpec(
    selector="snapkv",
    selector_options={"window_size": 8, "redundancy": "later_key"},
    budget="3MiB",
    chunk_tokens=512,
    allocation="split",
    allocation_options={"audio": 0.4},
    layer_table=(512, [128, 384]),
    positions="compact",
    max_gap=3,
    count_text=True,
    max_text_tokens=100,
    seed=7,
)


@pytest.mark.parametrize("spec", [MemorySpec(), FULL, MemorySpec(budget=None), MemorySpec(selector="full")], ids=str)
def test_there_and_back(spec: MemorySpec, tmp_path: Path) -> None:
    assert MemorySpec.from_dict(spec.to_dict()) == spec
    assert MemorySpec.from_dict(json.loads(json.dumps(spec.to_dict()))).fingerprint() == spec.fingerprint()
    spec.save(tmp_path / "memory.json", model="tiny")
    for place in (tmp_path, tmp_path / "memory.json"):
        again = MemorySpec.load(place)
        assert again.fingerprint() == spec.fingerprint()
        assert again.make_selector() == spec.make_selector()
        assert again.make_allocation() == spec.make_allocation()
    assert json.loads((tmp_path / "memory.json").read_text())["about"] == {"model": "tiny"}


CHANGES: dict[str, Any] = {
    "selector": "critical_kv",
    "selector_options": {"window_size": 9, "redundancy": "later_key"},
    "budget": 6144,
    "chunk_tokens": 513,
    "allocation": "avba",
    "allocation_options": {"audio": 0.5},
    "layer_table": (512, 512),
    "positions": "absolute",
    "max_gap": 2,
    "count_text": False,
    "max_text_tokens": 101,
    "seed": 8,
}


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(MemorySpec)])
def test_fingerprint_changes_with_any_field(name: str) -> None:
    changes = {name: CHANGES[name]}
    if name == "allocation":
        changes["allocation_options"] = {}
    assert FULL.replace(**changes).fingerprint() != FULL.fingerprint()


def test_fingerprint_ignores_how_it_is_written() -> None:
    plain = MemorySpec()
    spelled = MemorySpec(
        selector_options=plain.make_selector().options(), allocation_options={"floor": 0}, layer_table=[]
    )
    assert spelled.fingerprint() == plain.fingerprint()
    assert len(plain.fingerprint()) == 16
    int(plain.fingerprint(), 16)


def test_fingerprint_is_stable_over_versions() -> None:
    """If this fails, adapters trained before can no longer be loaded: raise FORMAT, or keep the default."""
    assert MemorySpec().fingerprint() == "11d748336395f656"


# Budgets --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1B", 1),
        ("2KB", 2000),
        ("2KiB", 2048),
        ("1.5MB", 1_500_000),
        (" 512 MiB ", 2**29),
        ("1GB", 10**9),
        ("1GiB", 2**30),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "12", "MiB", "-3MB", "3 TB", "3mib", "1iB", "3MBs"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(UserError, match="neither a number of tokens nor a size"):
        MemorySpec(budget=text)


def test_layer_budgets() -> None:
    assert MemorySpec(budget=100).layer_budgets(2, 4, 8, 2) == [LayerBudget(100)] * 2
    assert MemorySpec(budget=None).layer_budgets(2, 4, 8, 2) == [None, None]
    assert MemorySpec(selector="full", budget=5).layer_budgets(2, 4, 8, 2) == [None, None]
    table = MemorySpec(budget=None, layer_table=[7, [2, 3]])
    assert not table.unlimited
    assert table.layer_budgets(2, 4, 8, 2) == [LayerBudget(7), LayerBudget(5, audio=2, visual=3)]


@pytest.mark.parametrize("extra", [0, 1, 255])
def test_budget_in_bytes_is_what_keys_and_values_take(extra: int) -> None:
    per_token = 2 * 4 * 2 * 8 * 2  # layers, kv heads, key and value, width, bytes
    spec = MemorySpec(budget=f"{10 * per_token + extra}B")
    assert spec.layer_budgets(2, 4, 8, 2) == [LayerBudget(10)] * 2
    with pytest.raises(UserError, match=f"below one token a layer(.|\n)*at least {per_token}B"):
        MemorySpec(budget=f"{per_token - 1}B").layer_budgets(2, 4, 8, 2)


def test_text_beside_the_budget_or_inside() -> None:
    outside, inside = MemorySpec(max_text_tokens=50), MemorySpec(count_text=True)
    assert outside.media_budget(LayerBudget(40), 50) == LayerBudget(40)
    assert inside.media_budget(LayerBudget(40), 10) == LayerBudget(30)
    assert inside.media_budget(LayerBudget(40, 8, 32), 10) == LayerBudget(30, 6, 24)
    with pytest.raises(UserError, match="51 text tokens are pinned in memory, the limit is 50"):
        outside.media_budget(LayerBudget(40), 51)
    with pytest.raises(UserError, match="a budget of 40 tokens is below the 40 text tokens it has to hold"):
        inside.media_budget(LayerBudget(40), 40)


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"selector": "perturbatoin"}, "unknown selector 'perturbatoin'; did you mean 'perturbation'?"),
        ({"selector_options": {"n_probe": 3}}, "has no option 'n_probe'; did you mean 'n_probes'?"),
        ({"selector_options": {"n_probes": -3}}, "option n_probes=-3 is out of range"),
        ({"selector_options": ["n_probes"]}, "selector_options=['n_probes'] is not a set of options"),
        ({"allocation": "shard"}, "unknown allocation 'shard'; did you mean 'shared'?"),
        ({"allocation": "fixed"}, "allocation 'fixed' needs the option 'audio'"),
        ({"allocation": "split", "allocation_options": {"audio": 2.0}}, "option audio=2.0 is out of range"),
        ({"budget": 0}, "memory budget 0 is not a whole number of tokens, 1 or more"),
        ({"budget": -1}, "memory budget -1 is not"),
        ({"budget": 10.5}, "memory budget 10.5 is not"),
        ({"budget": True}, "memory budget True is not"),
        ({"budget": [1]}, "memory budget [1] is not"),
        ({"budget": "6144"}, "memory budget '6144' is neither a number of tokens nor a size"),
        ({"chunk_tokens": 0}, "memory chunk_tokens=0 must be a whole number, 1 or more"),
        ({"chunk_tokens": True}, "memory chunk_tokens=True must be a whole number"),
        ({"max_gap": 0}, "memory max_gap=0 must be a whole number, 1 or more"),
        ({"max_text_tokens": -1}, "memory max_text_tokens=-1 must be a whole number, 0 or more"),
        ({"seed": 1.5}, "memory seed=1.5 must be a whole number"),
        ({"count_text": 1}, "memory count_text=1 must be true or false"),
        ({"positions": "relative"}, "unknown positions 'relative'"),
        ({"positions": 3}, "unknown positions 3"),
        ({"layer_table": 5}, "layer_table=5 is not a list"),
        ({"layer_table": "512"}, "cannot read the layer table '512'"),
        ({"layer_table": ["512"]}, "entry '512' of the layer table is neither"),
        ({"layer_table": [[1, 2, 3]]}, "entry [1, 2, 3] of the layer table is neither"),
        ({"layer_table": [[0, 0]]}, "entry [0, 0] of the layer table is neither"),
        ({"layer_table": [-5]}, "entry -5 of the layer table is neither"),
        ({"layer_table": [1.5]}, "entry 1.5 of the layer table is neither"),
        ({"layer_table": [True]}, "entry True of the layer table is neither"),
        ({"selectr": "full"}, "unknown key 'selectr' in a memory spec; did you mean 'selector'?"),
    ],
    ids=str,
)
def test_wrong_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        MemorySpec.from_dict(values)
    assert message in str(error.value)


def test_table_of_another_model() -> None:
    with pytest.raises(UserError, match="has 2 entries, the model has 3 layers"):
        MemorySpec(layer_table=[5, 5]).layer_budgets(3, 1, 1, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the memory spec"),
        ("{", "cannot read the memory spec"),
        ("[]", "is not a memory spec of format 1"),
        ('{"format": 1}', "is not a memory spec of format 1"),
        ('{"format": 99, "memory": {}}', "is not a memory spec of format 1"),
        ('{"format": 1, "memory": {"budget": 9}}', "does not match its fingerprint None"),
        ('{"format": 1, "memory": {"bodget": 9}}', "unknown key 'bodget'"),
    ],
)
def test_wrong_files(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "memory.json").write_text(content)
    with pytest.raises(UserError, match=message):
        MemorySpec.load(tmp_path)


def test_an_edited_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    MemorySpec(budget=100).save(path)
    path.write_text(path.read_text().replace('"budget": 100', '"budget": 200'))
    with pytest.raises(UserError, match="does not match its fingerprint"):
        MemorySpec.load(path)


def test_specs_build_what_they_name() -> None:
    assert FULL.make_selector() == make_selector("snapkv", window_size=8, redundancy="later_key")
    assert FULL.make_allocation() == make_allocation("split", audio=0.4)


def test_tables_from_files(tmp_path: Path) -> None:
    plain, several, calibrated = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "c.json"
    plain.write_text("[7, [2, 3]]")
    several.write_text('{"mixed": [[4, 5], 6], "even": [8, 8]}')
    calibrated.write_text('{"format": 1, "layer_table": [1, 9], "layers": [{}, {}]}')
    assert MemorySpec(layer_table=str(plain)).layer_table == (7, (2, 3))
    assert MemorySpec.from_dict({"layer_table": f"{several}#mixed"}).layer_table == ((4, 5), 6)
    spec = load_config(MemorySpec, None, [f"layer_table={calibrated}"])
    assert spec.layer_table == (1, 9)
    assert spec.fingerprint() == MemorySpec(layer_table=[1, 9]).fingerprint()  # a spec holds numbers, not a path
    for source, message in (
        (tmp_path / "none.json", "cannot read the layer table"),
        (several, "which of its tables"),
        (f"{several}#mixd", "none of them 'mixd'; did you mean 'mixed'"),
        (f"{plain}#mixed", "one layer table, without names"),
    ):
        with pytest.raises(UserError, match=message):
            MemorySpec(layer_table=str(source))
    for content in ("[]", "5", '"x"'):
        plain.write_text(content)
        with pytest.raises(UserError, match="is not a layer table"):
            MemorySpec(layer_table=str(plain))
    plain.write_text('[5, "x"]')
    with pytest.raises(UserError, match="entry 'x' of the layer table"):
        MemorySpec(layer_table=str(plain))


def test_a_table_is_scaled_to_a_mean() -> None:
    spec = MemorySpec(budget=None, layer_table=[10, [10, 30], [0, 70]])
    assert spec.mean_tokens == 40
    assert spec.at(80, chunk_tokens=5).layer_table == (20, [20, 60], [1, 140])
    assert spec.at(80).mean_tokens == 80
    assert spec.at(None).mean_tokens is None
    assert MemorySpec(budget="1MiB").at("2MiB").mean_tokens == "2MiB"
    with pytest.raises(UserError, match="cannot be scaled to the size '1MiB'"):
        spec.at("1MiB")
