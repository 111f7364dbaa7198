"""Selection beside kvpress: what goes through files comes back, sets and options are compared, what fails is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "scripts" / "bench"

if TYPE_CHECKING:
    from types import ModuleType


@pytest.fixture(scope="module")
def peers() -> Iterator[Any]:
    """The scripts import each other as scripts do."""
    names, before = ("peers", "peers_ours", "peers_tensors", "measure"), list(sys.path)
    hidden: dict[str, ModuleType] = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path[:0] = [str(BENCH), str(ROOT)]
    try:
        import peers

        yield peers
    finally:
        sys.path[:] = before
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)


@pytest.fixture(scope="module")
def tensors(peers: Any) -> Any:
    return sys.modules["peers_tensors"]


def test_layers_come_back_from_files_as_they_were(tensors: Any, tmp_path: Path) -> None:
    sizes, cpu = tensors.SIZES["tiny"], torch.device("cpu")
    tensors.write_layers(tmp_path, sizes, cpu, torch.bfloat16)
    assert tensors.read_sizes(tmp_path) == sizes
    layers = [tensors.read_layer(tmp_path, i, cpu) for i in range(sizes.layers)]
    assert len(list(tmp_path.glob("layer_*.safetensors"))) == sizes.layers == len(layers)
    for i, layer in enumerate(layers):
        made = tensors.make_layer(sizes, i, cpu, torch.bfloat16)
        assert all(torch.equal(x, vars(made)[name]) for name, x in vars(layer).items())
        assert layer.keys.shape == (1, sizes.kv_heads, sizes.candidates, sizes.head_dim)
        assert layer.keys.dtype == torch.bfloat16
    assert not torch.equal(layers[0].keys, layers[1].keys)


def test_queries_are_rotated_as_the_stock_model_rotates(tensors: Any) -> None:
    from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding, apply_rotary_pos_emb

    sizes = tensors.SIZES["tiny"]
    layer = tensors.make_layer(sizes, 0, torch.device("cpu"), torch.bfloat16)
    rope = {"rope_type": "default", "rope_theta": sizes.rope_theta}
    config = Qwen2Config(hidden_size=sizes.hidden, num_attention_heads=sizes.heads, rope_parameters=rope)
    cos, sin = Qwen2RotaryEmbedding(config)(layer.hidden, torch.arange(sizes.candidates)[None])
    plain = layer.unrotated_queries(sizes)
    assert torch.equal(layer.queries(sizes), apply_rotary_pos_emb(plain, plain, cos, sin)[0])


def test_a_side_comes_back_from_files(tensors: Any, tmp_path: Path) -> None:
    side = tensors.Side({"device": "one"})
    side.attempt("good", lambda: {"ms": [1.0, 3.0, 2.0], "options": {"window_size": 64}})
    side.attempt("bad", lambda: {"ms": [1 / 0]})
    side.kept["good"] = torch.arange(6).view(1, 2, 3)
    side.write(tmp_path, "ours")
    found = tensors.Side.read(tmp_path, "ours")
    assert (found.about, found.rules) == (side.about, side.rules)
    assert found.rules["bad"] == {"error": "ZeroDivisionError: division by zero"}
    assert torch.equal(found.kept["good"].long(), side.kept["good"])


def test_every_case_of_ours_chooses_its_budget(peers: Any, tensors: Any) -> None:
    """Through `choose`; a rule of the whole sequence sees every query, the others those of the chunk."""
    ours, sizes = sys.modules["peers_ours"], tensors.SIZES["tiny"]
    layers = [tensors.make_layer(sizes, i, torch.device("cpu"), torch.float32) for i in range(2)]
    for name, case in ours.CASES.items():
        kept = [step() for step in ours.steps(case, layers, sizes)]
        assert all(rows.shape == (1, sizes.kv_heads, sizes.budget) for rows in kept), name
        assert name == "sliding_window" or not torch.equal(*kept)
        asked = ours.candidates(case, case.make(), layers[0], sizes, 0)
        first = 0 if case.whole else sizes.candidates - sizes.chunk
        assert asked.n_memory == first and (asked.query_rows >= first).all()
        assert torch.equal(asked.queries, layers[0].queries(sizes)[:, :, asked.query_rows])


def test_shares_of_kept_sets(peers: Any) -> None:
    one = torch.tensor([[[0, 1, 2, 3], [4, 5, 6, 7]]])
    assert peers.shared(one, one.flip(-1)) == [100, 100]
    assert peers.shared(one, torch.tensor([[[3, 9, 1, 8], [0, 1, 2, 3]]])) == [50, 0]
    with pytest.raises(ValueError, match="shapes"):
        peers.shared(one, one[..., :3])


def test_options_have_to_be_the_same(peers: Any) -> None:
    """Ours may have more, theirs may not."""
    assert peers.different_options({"a": 1, "b": 2}, {"a": 1}) == []
    assert peers.different_options({"a": 1}, {"a": 1, "b": None}) == ["b=None there, None here"]


def two_sides(tensors: Any) -> tuple[Any, Any]:
    """Sides that agree on snapkv by three quarters, differ in an option of lagkv, and failed at key_difference."""
    rows = torch.arange(4).view(1, 1, 4)
    kept = {f"{rule}{end}": rows for rule in ("snapkv", "lagkv") for end in ("", ".float32")}
    ours = tensors.Side({"device": "card", "kernels": "keep", "torch": "2"}, kept=dict(kept))
    theirs = tensors.Side({"device": "card", "kvpress": "0.5.5", "torch": "2"}, kept=kept | {"snapkv": rows + 1})
    for side, factor in ((ours, 1.0), (theirs, 2.0)):
        times = [factor * x for x in (1.0, 4.0, 2.0)]
        side.rules["snapkv"] = {"ms": times, "options": {"window_size": 64}}
        side.rules["lagkv"] = {"ms": times, "options": {"lag_size": 128 * factor}}
    ours.rules["lagkv"]["options"]["redundancy"] = "none"
    theirs.rules["snapkv"]["given_ms"] = [0.5]
    theirs.rules["key_difference"] = {"error": "RuntimeError: no"}
    return ours, theirs


def test_rows_and_table(peers: Any, tensors: Any, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    old = sys.modules["measure"].Results(path, {"device": "old"})
    old.add("prefill", 1.0, "s")
    old.add("peers.tova.ours", 1.0, "ms")
    failed = peers.collect(path, *two_sides(tensors))
    rows = {row["name"]: row for row in json.loads(path.read_text())}
    assert "prefill" in rows and "peers.tova.ours" not in rows
    assert rows["peers.snapkv.ours"]["value"] == 2.0 and rows["peers.snapkv.ours"]["spread"] == [1.0, 4.0]
    assert rows["peers.snapkv.ours"]["note"] == "kernels: keep"
    assert rows["peers.snapkv.kvpress"]["value"] == 4.0
    assert rows["peers.snapkv.kvpress"]["versions"]["kvpress"] == "0.5.5"
    assert rows["peers.snapkv.shared"]["value"] == rows["peers.snapkv.rounded.kvpress"]["value"] == 75
    assert rows["peers.snapkv.shared_float32"]["value"] == rows["peers.snapkv.rounded.ours"]["value"] == 100
    assert rows["peers.lagkv.shared"]["value"] is None
    assert "lag_size=256.0 there, 128.0 here" in rows["peers.lagkv.shared"]["note"]
    assert rows["peers.key_difference.kvpress"]["note"] == "RuntimeError: no"
    assert {told.split(":")[0] for told in failed} == {
        "peers.lagkv.shared",
        "peers.key_difference.kvpress",
        "peers.key_difference.kvpress_given",
        "peers.key_difference.shared",
    }
    made = peers.table(list(rows.values()), {"snapkv": [30.06, 38.71]}).splitlines()
    assert made[2] == (
        "| `snapkv` | 2.00 [1.00, 4.00] | 4.00 [2.00, 8.00] | 0.50 [0.50, 0.50] | 75.0 | 100.0 | 100.0 / 75.0 "
        "| 30.1 | 38.7 |"
    )
    assert next(line for line in made if "lagkv" in line).split(" | ")[4] == "failed"
    assert {line.count("|") for line in made} == {made[0].count("|")}


def test_quality_is_that_of_the_results_page(peers: Any) -> None:
    """Every rule that the study had is found; a rule's accuracy grows with its budget."""
    worth, cases = peers.quality(), sys.modules["peers_ours"].CASES
    assert {case.study for case in cases.values()} - {""} <= set(worth)
    assert all(25 < low < high < 85 for low, high in worth.values())
    readme = (ROOT / "README.md").read_text()
    row = next(line for line in readme.splitlines() if line.startswith("| best original rival (key difference)"))
    shown = [cell.strip() for cell in row.split("|")]
    assert [f"{x:.1f}" for x in worth["key_difference"]] == [shown[6], shown[4]]


@pytest.mark.slow
def test_without_kvpress_the_rest_is_measured_and_it_is_said(tmp_path: Path) -> None:
    command = ["bash", str(BENCH / "peers.sh"), "--tiny", "--device", "cpu", "--reps", "1", "--out", str(tmp_path)]
    nothing = tmp_path / "site"
    nothing.mkdir()
    env = os.environ | {"PYTHON": sys.executable, "PEERS_SITE": str(nothing), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 1
    assert "kvpress did not run: ModuleNotFoundError: No module named 'kvpress'" in done.stdout
    assert "before 5.3" in done.stdout
    names = [row["name"] for row in json.loads((tmp_path / "results.json").read_text())]
    assert "peers.perturbation.ours" in names and not [name for name in names if name.endswith(".kvpress")]
    assert done.stdout.strip().splitlines()[-1].startswith("| `perturbation.no_rho` |")
