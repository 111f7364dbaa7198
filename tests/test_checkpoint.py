"""Checkpoints: bit-exact resume, crashes at any moment, damage, several processes, changed settings."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from omnimem_train import checkpoint
from omnimem_train.checkpoint import (
    check_same_run,
    checkpoints,
    find_checkpoint,
    load_checkpoint,
    read_meta,
    save_checkpoint,
)
from omnimem_train.errors import UserError
from omnimem_train.rng import rng_state, set_rng_state, versions


def save(root: Path, step: int, **changes: Any) -> Path:
    arguments: dict[str, Any] = {
        "tensors": {"adapter": {"a": torch.full((2, 3), float(step)), "b": torch.arange(4, dtype=torch.bfloat16)}},
        "objects": {"optimizer": {"state": {0: {"step": torch.tensor(step)}}, "lr": [1e-4]}},
        "rank_objects": {"rng": rng_state()},
        "meta": {
            "config": {"train": {"steps": 100, "lr": 1e-4}, "sizes": (1, 2)},
            "position": {"epoch": 1, "index": 7},
        },
    }
    return save_checkpoint(root, step, **(arguments | changes))


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


# What is saved --------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    path = save(tmp_path / "run", 120)
    assert names(path) == ["adapter.safetensors", "meta.json", "optimizer.pt", "rank-00000.pt"]
    assert names(tmp_path / "run") == ["step-00000120"]
    found = load_checkpoint(path)
    assert (found.step, found.path) == (120, path)
    assert found.meta["position"] == {"epoch": 1, "index": 7}
    assert torch.equal(found.tensors["adapter"]["a"], torch.full((2, 3), 120.0))
    assert found.tensors["adapter"]["b"].dtype == torch.bfloat16
    assert found.objects["optimizer"]["state"][0]["step"] == 120
    assert torch.equal(found.rank_objects["rng"]["torch"], torch.get_rng_state())


def test_tensors_of_any_layout_are_saved(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.arange(6.0).view(2, 3).t())
    path = save(tmp_path, 1, tensors={"adapter": {"w": weight, "slice": torch.arange(10.0)[2:5]}})
    found = load_checkpoint(path).tensors["adapter"]
    assert torch.equal(found["w"], weight)
    assert torch.equal(found["slice"], torch.tensor([2.0, 3.0, 4.0]))


@pytest.mark.parametrize(
    ("changes", "error", "where"),
    [
        ({"objects": {"optimizer": {"a": [1, np.float64(2)]}}}, TypeError, r"optimizer\['a'\]\[1\] is a numpy.float64"),
        ({"objects": {"scheduler": {"f": print}}}, TypeError, r"scheduler\['f'\] is a builtins"),
        ({"rank_objects": {"rng": {1, 2}}}, TypeError, "rng is a builtins.set"),
        ({"objects": {"o": {(Path("x"), 1): 2}}}, TypeError, "a key of o"),
        ({"meta": {"x": torch.ones(1)}}, TypeError, "not JSON serializable"),
        ({"meta": {"x": float("nan")}}, ValueError, "not JSON compliant"),
    ],
)
def test_what_could_not_be_read_back_is_refused_before_writing(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], where: str
) -> None:
    with pytest.raises(error, match=where):
        save(tmp_path, 1, **changes)
    assert names(tmp_path) == []


def test_real_optimizers_and_schedulers_can_be_saved(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW([{"params": [model.weight], "lr": 1e-3}, {"params": [model.bias]}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda s: 1 / (s + 1), lambda s: 1.0])
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    scheduler.step()
    path = save(tmp_path, 1, objects={"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()})
    found = load_checkpoint(path).objects
    assert torch.equal(found["optimizer"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    assert found["scheduler"]["last_epoch"] == 1


# Exact resume ---------------------------------------------------------------------------------------------------------


class Toy:
    """A training run that uses every generator."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 10)

    def step(self) -> float:
        x = torch.tensor(np.random.randn(5, 4), dtype=torch.float32) * random.gauss(1, 0.1)
        loss = self.model(x).square().mean() + torch.randn(()) * 1e-3
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        return float(loss.detach())

    def save(self, root: Path, step: int) -> Path:
        objects = {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}
        return save(root, step, tensors={"adapter": self.model.state_dict()}, objects=objects)

    def load(self, path: Path) -> None:
        found = load_checkpoint(path)
        self.model.load_state_dict(found.tensors["adapter"])
        self.optimizer.load_state_dict(found.objects["optimizer"])
        self.scheduler.load_state_dict(found.objects["scheduler"])
        set_rng_state(found.rank_objects["rng"])


def test_resumed_run_is_bit_equal(tmp_path: Path) -> None:
    straight = Toy()
    losses = [straight.step() for _ in range(8)]
    first = Toy()
    assert [first.step() for _ in range(5)] == losses[:5]
    path = first.save(tmp_path, 5)
    np.random.randn(3)  # anything may happen before the resume
    second = Toy()
    second.load(path)
    assert [second.step() for _ in range(3)] == losses[5:]
    for a, b in zip(straight.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_half_used_gaussian_pair_is_restored() -> None:
    np.random.seed(1)
    random.seed(1)
    np.random.randn(), random.gauss(0, 1)  # both generators make two and keep one
    state = rng_state()
    expected = (np.random.randn(), random.gauss(0, 1), float(torch.rand(())))
    np.random.seed(5)
    random.seed(5)
    torch.manual_seed(5)
    set_rng_state(state)
    assert (np.random.randn(), random.gauss(0, 1), float(torch.rand(()))) == expected


def test_random_state_of_another_kind_of_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("written for a machine without a GPU")
    state = rng_state() | {"cuda": torch.zeros(16, dtype=torch.uint8)}
    with pytest.raises(UserError, match="written with a GPU, this machine has none"):
        set_rng_state(state)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="written without a GPU, this machine has one"):
        set_rng_state(state | {"cuda": None})


# Finding, keeping, crashing -------------------------------------------------------------------------------------------


def test_keep_leaves_the_newest(tmp_path: Path) -> None:
    for step in (5, 90, 100, 1000):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000100", "step-00001000"]
    save(tmp_path, 2000, keep=1)
    assert names(tmp_path) == ["step-00002000"]
    save(tmp_path, 99_999_999, keep=0)
    save(tmp_path, 100_000_000, keep=0)  # by name it would come before the others
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00002000", "step-99999999", "step-100000000"]


def test_find_takes_a_checkpoint_or_a_folder_of_them(tmp_path: Path) -> None:
    first, second = save(tmp_path, 9), save(tmp_path, 10)
    assert find_checkpoint(tmp_path) == second
    assert find_checkpoint(first) == first
    (tmp_path / "step-00000011").mkdir()  # no meta.json: not a checkpoint
    assert find_checkpoint(tmp_path) == second
    with pytest.raises(UserError, match=r"no complete checkpoint at .*step-00000011\n  cause:  it has no meta.json"):
        find_checkpoint(tmp_path / "step-00000011")
    with pytest.raises(UserError, match="no complete checkpoint"):
        find_checkpoint(tmp_path / "nowhere")
    assert checkpoints(tmp_path / "nowhere") == []


def in_child(function: Callable[[], None]) -> int | None:
    """Exit code of `function` in a process of its own."""
    child = multiprocessing.get_context("fork").Process(target=function)
    child.start()
    child.join(60)
    return child.exitcode


@pytest.mark.parametrize("moment", ["_write", "_object_bytes", "_measure", "_checksum", "_flush_folder", "_prune"])
def test_killed_while_saving(tmp_path: Path, moment: str) -> None:
    """SIGKILL at each stage: the latest complete checkpoint loads, and the next save cleans up."""
    save(tmp_path, 1)

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def saves_and_dies() -> None:
        setattr(checkpoint, moment, die)
        save(tmp_path, 2, keep=1)

    assert in_child(saves_and_dies) == -signal.SIGKILL
    latest = find_checkpoint(tmp_path)
    renamed = moment == "_prune"
    assert latest.name == ("step-00000002" if renamed else "step-00000001")
    assert load_checkpoint(latest).step == (2 if renamed else 1)
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["step-00000003"]


def test_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(UserError, match=r"(?s)cannot write the checkpoint .*step-00000002.*No space left"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000001"]
    assert load_checkpoint(find_checkpoint(tmp_path)).step == 1


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 4)
    save(tmp_path, 4, meta={"note": "second"})
    assert names(tmp_path) == ["step-00000004"]
    assert load_checkpoint(find_checkpoint(tmp_path)).meta == {"note": "second"}


def test_checkpoints_of_a_run_given_up_are_set_aside_not_taken_for_the_latest(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        save(tmp_path, step, keep=0)
    save(tmp_path, 150, keep=2)  # after resuming from 100
    assert names(tmp_path) == ["step-00000100", "step-00000150", "step-00000200.abandoned", "step-00000300.abandoned"]
    assert find_checkpoint(tmp_path).name == "step-00000150"
    assert load_checkpoint(tmp_path / "step-00000200.abandoned").step == 200
    save(tmp_path, 200)
    save(tmp_path, 160)
    assert "step-00000200.abandoned-2" in names(tmp_path)


# Damage ---------------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.pt", "rank-00000.pt", "meta.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_damage_is_found_named_and_an_older_checkpoint_offered(tmp_path: Path, name: str, harm: str) -> None:
    older, path = save(tmp_path, 1), save(tmp_path, 2)
    if harm == "flip":
        flip(path / name)
    elif harm == "cut":
        (path / name).write_bytes((path / name).read_bytes()[:-1] if name != "meta.json" else b'{"format": 1')
    else:
        (path / name).unlink()
    with pytest.raises(UserError) as excinfo:
        load_checkpoint(path)
    assert name in excinfo.value.what
    if harm == "cut" and name != "meta.json":
        size = (path / name).stat().st_size
        assert f"{name} has {size:,} bytes instead of {size + 1:,}" in excinfo.value.what
    assert str(path) in excinfo.value.what
    assert excinfo.value.remedy.endswith(str(older))
    assert load_checkpoint(older).step == 1


def test_all_damaged_files_are_named_and_nothing_older_is_said(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    flip(path / "adapter.safetensors")
    (path / "optimizer.pt").unlink()
    with pytest.raises(
        UserError, match=r"(?s)adapter\.safetensors has changed.*optimizer\.pt is missing.*there is none"
    ):
        load_checkpoint(path)


def test_every_changed_value_of_meta_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    content = json.loads((path / "meta.json").read_text())
    content["meta"]["position"]["index"] += 1
    (path / "meta.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"meta\.json does not match its checksum"):
        load_checkpoint(path)


class Intruder:
    """Runs code when it is unpickled."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> Any:
        return Path.touch, (self.touched,)


def test_reading_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file made elsewhere with matching checksums."""
    monkeypatch.setattr(checkpoint, "_check_plain", lambda *_: None)
    path = save(tmp_path / "run", 1, objects={"optimizer": Intruder(tmp_path / "touched")})
    with pytest.raises(pickle.UnpicklingError):
        load_checkpoint(path)
    assert not (tmp_path / "touched").exists()


def test_another_format_is_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    path = save(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(UserError, match="has format 99, this version reads format 1"):
        read_meta(path)


# Several processes ----------------------------------------------------------------------------------------------------


def in_ranks(world_size: int, function: Callable[[int, Callable[[], None]], None]) -> None:
    """Run `function(rank, barrier)` in processes."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(world_size)
    wait: Callable[[], None] = lambda: (barrier.wait(30), None)[1]  # noqa: E731
    children = [context.Process(target=function, args=(rank, wait)) for rank in range(world_size)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * world_size


def test_three_processes_save_and_load_their_own(tmp_path: Path) -> None:
    def write(rank: int, folder: Path) -> None:
        (folder / "engine").mkdir(exist_ok=True)
        (folder / "engine" / f"shard-{rank}").write_text(str(rank))

    def body(rank: int, barrier: Callable[[], None]) -> None:
        for step in (1, 2, 3):
            save(
                tmp_path,
                step,
                keep=2,
                rank=rank,
                world_size=3,
                rank_objects={"mine": rank * 10 + step},
                barrier=barrier,
                write=lambda folder: write(rank, folder),
            )
            found = load_checkpoint(find_checkpoint(tmp_path), rank=rank, world_size=3)
            assert found.rank_objects == {"mine": rank * 10 + step}
            assert (found.path / "engine" / f"shard-{rank}").read_text() == str(rank)
            barrier()

    in_ranks(3, body)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    path = find_checkpoint(tmp_path)
    assert set(read_meta(path)["files"]) == {
        "adapter.safetensors",
        "optimizer.pt",
        *(f"rank-0000{r}.pt" for r in range(3)),
        *(f"engine/shard-{r}" for r in range(3)),
    }
    flip(path / "engine" / "shard-1")
    with pytest.raises(UserError, match="engine/shard-1"):
        load_checkpoint(path, rank=0, world_size=3)
    flip(path / "rank-00002.pt")
    assert load_checkpoint(path, rank=1, world_size=3).step == 3
    with pytest.raises(UserError, match=r"rank-00002\.pt"):
        load_checkpoint(path, rank=2, world_size=3)


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    with pytest.raises(UserError, match="written by 1 processes, this run has 2"):
        load_checkpoint(path, world_size=2)


def test_ranks_that_share_no_file_system_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not see the files of ranks \[1\]"):
        save(tmp_path, 1, world_size=2)
    assert names(tmp_path) == []


def test_rank_0_renames_only_after_all_have_written(tmp_path: Path) -> None:
    """A slow rank: the checkpoint appears when its file is there, not before."""
    barrier = threading.Barrier(2)
    slow_may_write = threading.Event()
    path = tmp_path / "step-00000001"

    def slow(folder: Path) -> None:
        slow_may_write.wait(30)
        (folder / "slow").write_text("x")

    def run(rank: int) -> None:
        save(
            tmp_path,
            1,
            rank=rank,
            world_size=2,
            rank_objects={},
            barrier=lambda: (barrier.wait(30), None)[1],
            write=slow if rank == 1 else None,
        )

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    threads[0].join(0.3)
    assert not path.exists()
    slow_may_write.set()
    for thread in threads:
        thread.join(30)
    assert "slow" in read_meta(path)["files"]


# Settings -------------------------------------------------------------------------------------------------------------


def test_changed_settings_are_listed_unless_they_may_change(tmp_path: Path) -> None:
    path = save(tmp_path, 1, meta={"config": {"train": {"steps": 1, "lr": 0.1}, "log": {"every": 5}}, "spec": "ab"})
    same = {"config": {"train": {"steps": 1, "lr": 0.1}, "log": {"every": 5}}, "spec": "ab"}
    assert check_same_run(path, same) == []
    other = {"config": {"train": {"steps": 2, "lr": 0.2}, "log": {"every": 6, "new": [1]}}, "spec": "cd"}
    with pytest.raises(UserError) as excinfo:
        check_same_run(path, other, ["config.train.steps", "config.log.*"])
    assert excinfo.value.what.splitlines()[1:] == [
        "    config.train.lr: 0.1 in the checkpoint, 0.2 now",
        "    spec: 'ab' in the checkpoint, 'cd' now",
    ]
    assert check_same_run(path, other, ["config.*", "spec"]) == [
        "config.log.every: 5 in the checkpoint, 6 now",
        "config.log.new: '(absent)' in the checkpoint, [1] now",
        "config.train.lr: 0.1 in the checkpoint, 0.2 now",
        "config.train.steps: 1 in the checkpoint, 2 now",
        "spec: 'ab' in the checkpoint, 'cd' now",
    ]
    with pytest.raises(UserError, match=r"config\.log\.every: 5 in the checkpoint, '\(absent\)' now"):
        check_same_run(path, {"config": {"train": {"steps": 1, "lr": 0.1}}})


def test_tuples_compare_equal_to_what_json_made_of_them(tmp_path: Path) -> None:
    path = save(tmp_path, 1, meta={"config": {"sizes": (1, (2, 3))}})
    assert check_same_run(path, {"config": {"sizes": (1, (2, 3))}}) == []


def test_versions_name_the_main_dependencies() -> None:
    found = versions()
    assert found["torch"] == torch.__version__
    assert {"python", "transformers", "peft", "accelerate"} <= set(found)


def test_a_copied_checkpoint_loads(tmp_path: Path) -> None:
    path = save(tmp_path / "a", 3)
    shutil.copytree(path, tmp_path / "elsewhere")
    assert load_checkpoint(find_checkpoint(tmp_path / "elsewhere")).step == 3


def test_saved_tensors_are_not_aliased(tmp_path: Path) -> None:
    weight: Tensor = torch.zeros(3)
    path = save(tmp_path, 1, tensors={"adapter": {"w": weight}})
    weight += 1
    assert torch.equal(load_checkpoint(path).tensors["adapter"]["w"], torch.zeros(3))
