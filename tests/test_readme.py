"""The README's worked example runs, and its commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import omni_clips
import pytest

from omnimem_train.cli import parser
from omnimem_train.memory import TEXT, selector
from omnimem_train.models.interface import StreamingModel
from omnimem_train.streaming import Stream, encode

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_worked_example_selects(nano_session: StreamingModel) -> None:
    (example,) = [block for block in blocks("python") if "@register" in block]
    names: dict[str, Any] = {"__name__": "readme"}
    before = dict(selector._SELECTORS)
    try:
        exec(compile(example, "README.md", "exec", dont_inherit=True), names)
        assert "loud_values" in selector.selectors()
        clip = omni_clips.Clip(6.0, 2.0)
        stream = Stream(nano_session, names["spec"].replace(chunk_tokens=40))
        state = stream.flush(
            stream.feed_all(stream.start(), encode(nano_session.open(clip.info, 2.0), clip.windows(2.0)))
        )
        for memory in state.layers:
            assert int((memory.modality != TEXT).sum(-1).unique()) == 64
    finally:
        selector._SELECTORS.clear()
        selector._SELECTORS.update(before)


def test_the_commands_parse() -> None:
    commands = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    ours = [
        re.sub(r"^.*-m omnimem_train", "omnimem", c) for c in commands if re.match(r"omnimem|.*-m omnimem_train", c)
    ]
    assert len(ours) > 5
    for command in ours:
        parser().parse_args(shlex.split(command)[1:])


def test_named_files_exist() -> None:
    for path in set(re.findall(r"(?:recipes|scripts|tests)/[\w./]+\.\w+", README)):
        assert (ROOT / path).is_file(), f"README names {path}"


@pytest.mark.parametrize("name", ["state", "selector", "omnimem", "perturbation", "spec", "positions"])
def test_the_tree_names_what_is_there(name: str) -> None:
    assert f"{name}.py" in README
    assert (ROOT / "omnimem_train" / "memory" / f"{name}.py").is_file()
