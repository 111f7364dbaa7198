"""Every recipe loads against the configuration it is for, and its header says how it is run and with what."""

from __future__ import annotations

import json
import re
import shlex
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from omnimem_train.benchmarks import READERS
from omnimem_train.calibration import CalibrationConfig
from omnimem_train.cli import parser
from omnimem_train.config import load_config
from omnimem_train.engines import check_deepspeed
from omnimem_train.evaluation import EvalConfig
from omnimem_train.models.encoding import OmniEncoder
from omnimem_train.models.salmonn.encoder import SalmonnEncoder
from omnimem_train.run_config import RunConfig, TrainConfig

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = sorted((ROOT / "recipes" / "launch").iterdir())
RECIPES = sorted(p for p in (ROOT / "recipes").rglob("*") if p.suffix in (".yaml", ".yml") and p not in LAUNCH)
COMMANDS = {"train": RunConfig, "eval": EvalConfig, "calibrate": CalibrationConfig}


def header(path: Path) -> str:
    """The comment a recipe begins with, without its marks."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].removeprefix(" "))
    return "\n".join(lines)


def commands(path: Path) -> list[list[str]]:
    """Arguments of the `omnimem` commands of a header: indented, perhaps over two lines."""
    joined = header(path).replace("\\\n", " ")
    found = re.findall(r"^  (?:.*-m omnimem_train|omnimem) (.*)$", joined, re.MULTILINE)
    return [shlex.split(line) for line in found]


def own(path: Path) -> list[str]:
    """The command that names the recipe itself."""
    name = str(path.relative_to(ROOT))
    (found,) = [c for c in commands(path) if name in c]
    return found


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "recipes"))


def test_there_are_recipes_of_every_kind() -> None:
    kinds = [own(path)[0] for path in RECIPES]
    assert len(RECIPES) >= 10
    assert set(kinds) == set(COMMANDS)


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_it_loads(path: Path) -> None:
    config: Any = load_config(COMMANDS[own(path)[0]], path)
    if isinstance(config, RunConfig):
        config.memory.at(config.budgets.smallest)
        assert config.train.warmup_steps < config.train.steps
    if isinstance(config, EvalConfig):
        assert config.data.form in READERS
    encoder = SalmonnEncoder if "salmonn" in config.model.path.lower() else OmniEncoder
    assert config.encoder.keys() <= signature(encoder).parameters.keys()


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_its_header(path: Path) -> None:
    text = header(path)
    for part in ("Needs: ", "Run so far: "):
        assert text.count(f"\n{part}") == 1, f"{path} does not say {part!r}"
    for command in commands(path):
        arguments = parser().parse_args(command)
        if recipe := getattr(arguments, "recipe", None):  # the overrides exist
            overrides = [o for o in arguments.overrides if not o.startswith("memory.layer_table=")]
            load_config(COMMANDS[command[0]], ROOT / recipe, overrides)
    for mentioned in re.findall(r"\b(?:recipes|scripts|data_prep|tests)/[\w./-]*\w", text):
        assert (ROOT / mentioned).exists(), f"{path} names {mentioned}"


def test_the_paper_s_settings() -> None:
    """What the recipes say they take from the paper."""
    for size, layers in (("3b", 36), ("7b", 28)):
        c = load_config(RunConfig, ROOT / "recipes" / f"video_salmonn2_plus_{size}.yaml")
        assert (c.lora.r, c.lora.alpha, c.lora.targets) == (128, 256, ("q_proj", "k_proj", "v_proj"))
        assert (c.data.fps, c.encoder["max_pixels"], c.train.lr) == (1, 176400, 2e-5)
        assert (c.memory.selector, c.memory.budget, c.memory.chunk_tokens) == ("omnimem", 8192, 16384)
        assert (c.memory.allocation, c.memory.allocation_options) == ("avba", {"prior": 5.0})
        assert (c.gradient.kind, c.gradient.layer) == ("stop_layer", layers // 2)
        assert c.train.warmup_steps == 0.03 * c.train.steps
    calibration = load_config(CalibrationConfig, ROOT / "recipes" / "calibrate_video_salmonn2_plus_7b.yaml")
    assert calibration.memory == c.memory
    assert (calibration.encoder, calibration.data.fps, calibration.temperature) == (c.encoder, c.data.fps, 0.2)


def test_there_are_launch_files_for_every_size() -> None:
    sizes = {p.name: launch_config(p) for p in LAUNCH if p.suffix == ".yaml"}
    found = {name: (c.num_machines, c.num_processes) for name, c in sizes.items()}
    assert found == {
        "one_gpu.yaml": (1, 1),
        "ddp_2gpu.yaml": (1, 2),
        "ddp_8gpu.yaml": (1, 8),
        "ddp_2x8gpu.yaml": (2, 16),
    }
    assert {p.name for p in LAUNCH} - found.keys() == {"zero2.json", "zero3.json"}
    for name, c in sizes.items():
        assert c.distributed_type == ("NO" if name == "one_gpu.yaml" else "MULTI_GPU")
        assert c.mixed_precision == "no"


def launch_config(path: Path) -> Any:
    """A configuration of `accelerate launch`, as it reads it; it refuses keys that it does not know."""
    return load_config_from_file(str(path))


@pytest.mark.parametrize("path", LAUNCH, ids=name_of)
def test_the_head_of_a_launch_file(path: Path) -> None:
    """It says the command, what it needs, and what was never run."""
    about = json.loads(path.read_text())["about"] if path.suffix == ".json" else header(path).splitlines()
    text = "\n".join(about)
    for part in ("Needs: ", "Run so far: "):
        assert text.count(f"\n{part}") == 1, f"{path} does not say {part!r}"
    assert f"recipes/launch/{path.name}" in text
    for mentioned in re.findall(r"\b(?:recipes|scripts)/[\w./-]*\w", text):
        assert (ROOT / mentioned).exists(), f"{path} names {mentioned}"
    (command, *_) = re.findall(r"-m(?:odule)? omnimem_train (.*)$", text.replace("\\\n", " "), re.MULTILINE)
    arguments = parser().parse_args(shlex.split(command.replace("RECIPE", "recipes/quickstart.yaml")))
    load_config(RunConfig, ROOT / arguments.recipe, arguments.overrides)


@pytest.mark.parametrize(("name", "stage"), [("zero2.json", 2), ("zero3.json", 3)])
def test_deepspeed_configurations(name: str, stage: int) -> None:
    settings = json.loads((ROOT / "recipes" / "launch" / name).read_text())
    check_deepspeed(settings, TrainConfig())
    assert settings["zero_optimization"]["stage"] == stage
    assert settings["zero_allow_untested_optimizer"] is True  # the optimizer is torch's own, nothing is compiled
