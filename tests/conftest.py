"""What several test files share: small models, made once a session."""

from __future__ import annotations

import os
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


@pytest.fixture
def nano(nano_folder: Path) -> StreamingModel:
    """A nano model of the test's own, to be changed at will."""
    from omnimem_train.models.loading import load_model

    return load_model(nano_folder, device="cpu")
