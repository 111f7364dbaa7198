"""Architecture rules as tests: who may import whom, what is imported at all, and how large a file may be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "omnimem_train"

# Left never imports right; names on one line may not import each other.
LAYERS = [
    ["errors"],
    ["memory"],
    ["kernels"],
    ["models"],
    ["recipe", "records", "resampling", "rng", "runlock", "stats", "markup", "beside", "checksums", "clip_order"],
    ["captured", "footprint", "gradient", "surroundings"],
    ["media_decode"],
    ["media_sound"],
    ["media_worker"],
    ["offload"],
    ["media", "benchmarks", "losses", "retention", "choosing", "budget_sampling", "snapshots", "encoder_cache"],
    ["recompute", "chunk"],
    ["layerwise"],
    ["chunk_graphs"],
    ["manifest"],
    ["broken_media"],
    ["data"],
    ["clip_lengths", "replay"],
    ["streaming", "scoring_costs"],
    ["step", "session", "evaluate", "run_ahead"],
    ["source", "config", "run_config", "costs", "gpus"],
    ["operations"],
    ["plan"],
    ["plan_advice"],
    ["plan_report"],
    ["checkpoint", "runlog", "sharding"],
    ["engines"],
    ["trainer"],
    ["export", "evaluation", "charts"],
    ["report_eval"],
    ["report", "calibration"],
    ["cli"],
]
RANK = {name: i for i, names in enumerate(LAYERS) for name in names}
# Third-party packages that only these modules may import (top-level names; transformers is for models alone).
OWNERS = {
    "peft": {"models.lora"},
    "accelerate": {"engines", "trainer", "cli", "evaluation"},
    "deepspeed": {"sharding"},
    "bitsandbytes": {"models.quantised"},
    "decord": {"media_decode", "media_sound"},
    "av": {"media_decode", "media_sound"},
    "tensorboard": {"runlog"},
    "triton": {f"kernels{part}" for part in ("", ".attention", ".change", ".keep", ".layer", ".redundancy")},
}


def modules() -> list[tuple[str, Path]]:
    return [
        (".".join(p.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"), p)
        for p in sorted(PACKAGE.rglob("*.py"))
    ]


def imports(path: Path, *, types: bool = True) -> set[str]:
    """Dotted names imported anywhere in a file, inside functions too; with `types`, also for annotations alone."""
    found = set()
    tree = ast.parse(path.read_text())
    if not types:
        tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def own(names: set[str]) -> set[str]:
    """First part below the package of every import from it."""
    return {n.split(".")[1] for n in names if n.startswith("omnimem_train.") and n.split(".")[1] in RANK}


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda x: x if isinstance(x, str) else "")
def test_left_never_imports_right(name: str, path: Path) -> None:
    part = name.split(".")[0]
    if name in ("__init__", "__main__", ""):
        return
    assert part in RANK, f"{name} has no place in the layers; give it one"
    for other in own(imports(path)) - {part}:
        assert RANK[other] < RANK[part], f"{name} imports {other}, which is not to its left"


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda x: x if isinstance(x, str) else "")
def test_third_party_packages_have_owners(name: str, path: Path) -> None:
    tops = {n.split(".")[0] for n in imports(path)}
    for package, owners in OWNERS.items():
        if package in tops:
            assert name in owners, f"{name} imports {package}, only {sorted(owners)} may"
    if name.split(".")[0] not in ("models",):
        assert "transformers" not in tops, f"{name} imports transformers, only models may"


def test_streaming_knows_no_model() -> None:
    """The stream loop, the step, sessions and evaluation import the interface alone."""
    for name in ("streaming", "step", "session", "evaluate"):
        used = {n for n in imports(PACKAGE / f"{name}.py") if n.startswith("omnimem_train.models.")}
        assert all(n.startswith("omnimem_train.models.interface.") for n in used), f"{name} imports {used}"


def test_no_import_cycles_inside_a_layer() -> None:
    """Modules of one folder (memory, models) do not import each other in a circle."""
    graph = {}
    known = {name for name, _ in modules()}
    for name, path in modules():
        targets = set()
        for n in imports(path, types=False):
            dotted = n.removeprefix("omnimem_train.")
            for candidate in (dotted, dotted.rpartition(".")[0]):
                if n.startswith("omnimem_train") and candidate in known and candidate != name:
                    targets.add(candidate)
                    break
        graph[name] = targets
    done: set[str] = set()

    def visit(node: str, path: tuple[str, ...]) -> None:
        assert node not in path, f"import cycle: {' -> '.join((*path, node))}"
        if node not in done:
            for target in graph[node]:
                visit(target, (*path, node))
            done.add(node)

    for node in graph:
        visit(node, ())


def test_files_stay_short() -> None:
    long = {
        str(p.relative_to(ROOT)): n
        for p in [*PACKAGE.rglob("*.py"), *(ROOT / "data_prep").rglob("*.py")]
        if (n := len(p.read_text().splitlines())) > 400
    }
    assert not long, f"files over 400 lines: {long}"


def test_the_walk_sees_the_package() -> None:
    assert len(modules()) > 20
    assert "memory" in own(imports(PACKAGE / "streaming.py"))
