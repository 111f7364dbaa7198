"""`omnimem_train.memory` runs where only torch is installed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MEMORY = ROOT / "omnimem_train" / "memory"

SCRIPT = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(name + " is blocked in this test")

sys.meta_path.insert(0, Refuse())
for name in list(sys.modules):
    assert name.split(".")[0] not in {blocked}, name

import torch
from omnimem_train.memory import *

n, spec = 12, MemorySpec(budget=4, allocation="split")
row = torch.arange(n)[None]
tokens = LayerMemory.from_chunk(
    torch.randn(1, 2, n, 4), torch.randn(1, 2, n, 4), row[..., None].expand(1, n, 3),
    (1 + row % 2).to(torch.int8), row.float(), row, hidden=torch.randn(1, n, 6),
)
for name in selectors():
    selector = make_selector(name)
    probes = selector.probes().rows(n)
    c = Candidates(tokens, 0, torch.randn(1, 4, len(probes), 4), probes, 0.5, torch.randn(6, 16),
                   rotary=Rotary(torch.ones(2), torch.tensor([0, 1])))
    rows, _ = choose(c, selector, spec.make_allocation(), spec.budget)
    assert tokens.gather(rows).n_tokens == (n if name == "full" else 4), name
for name in sys.modules:
    part = name.split(".")
    assert part[0] != "omnimem_train" or part[1:2] in ([], ["memory"], ["errors"]), name
print("chose with", len(selectors()), "selectors")
"""

BLOCKED = {
    "transformers",
    "peft",
    "numpy",
    "accelerate",
    "datasets",
    "safetensors",
    "yaml",
    "decord",
    "soundfile",
    "av",
}


def test_runs_with_torch_alone() -> None:
    script = SCRIPT.replace("{blocked}", repr(BLOCKED))
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "chose with" in done.stdout


def test_the_block_blocks() -> None:
    """The test above would notice an import."""
    script = SCRIPT.replace("{blocked}", repr(BLOCKED)).replace("import torch\n", "import torch\nimport safetensors\n")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "safetensors is blocked in this test" in done.stderr


@pytest.mark.parametrize("path", sorted(MEMORY.glob("*.py")), ids=lambda p: p.name)
def test_imports_are_torch_errors_and_the_standard_library(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [node.module or ""]
        for name in names:
            top = name.split(".")[0]
            ours = name == "omnimem_train.errors" or name.startswith("omnimem_train.memory")
            assert ours or top == "torch" or top in sys.stdlib_module_names, f"{path.name} imports {name}"
