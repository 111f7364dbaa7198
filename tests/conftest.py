"""What several test files share: small models, made once a session."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from omnimem_train.models.interface import StreamingModel

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(scope="session")
def nano_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2.5-Omni thinker of 0.3 million parameters, as a checkpoint folder. Do not write into it."""
    from omnimem_train.models.tiny import make_tiny

    return make_tiny(tmp_path_factory.mktemp("nano"), size="nano")


@pytest.fixture(scope="session")
def nano_session(nano_folder: Path) -> StreamingModel:
    """The nano model, float32 on the CPU, shared by all tests: leave it as it is."""
    from omnimem_train.models.loading import load_model

    return load_model(nano_folder, device="cpu")


@pytest.fixture(scope="session", params=["qwen2_5_vl", "qwen3_vl"])
def salmonn_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random video-SALMONN 2+ of 0.4 million parameters on each backbone, in the published layout. Do not write into
    it."""
    from omnimem_train.models.salmonn.tiny import make_tiny_salmonn

    return make_tiny_salmonn(tmp_path_factory.mktemp(request.param), backbone=request.param)


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five clips of 6 s with picture, sound and questions: train.json and test_choices.jsonl."""
    out, root = tmp_path_factory.mktemp("rendered"), Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "data_prep.render", str(out), "--clips", "5", "--test", "1", "--val", "0"]
    command += ["--seconds", "6", "--seed", "5"]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    return out


@pytest.fixture
def nano(nano_folder: Path) -> StreamingModel:
    """A nano model of the test's own, to be changed at will."""
    from omnimem_train.models.loading import load_model

    return load_model(nano_folder, device="cpu")
