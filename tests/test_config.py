"""The loader: types, merging, and what an error says."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from omnimem_train.config import flatten, load_config, save_resolved, to_plain, to_yaml
from omnimem_train.errors import UserError


@dataclass(frozen=True)
class Memory:
    selector: str = "perturbation"
    selector_options: dict[str, Any] = field(default_factory=lambda: {"probes": 64})
    budget: int | str | None = 6144
    chunk_tokens: int = 2048
    layer_table: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.budget, int) and self.budget < 1:
            raise UserError(f"memory budget {self.budget} is below 1 token", "nothing fits", "give at least 1")
        if self.selector_options.get("probes", 1) < 0:
            raise UserError("negative probes")


@dataclass
class Source:
    manifest: Path
    weight: float = 1.0


@dataclass(frozen=True)
class Data:
    sources: tuple[Source, ...] = ()
    size: tuple[int, int] = (224, 224)
    cache: Path | None = None
    modality: Literal["av", "video", "audio"] = "av"
    shares: dict[str, float] = field(default_factory=dict)


@dataclass
class Train:
    lr: float = 1e-4
    steps: int = 100
    resume: bool = False
    name: str = "run"
    warmup: float | int = 0
    level: Literal[0, 1] = 0
    derived: int = field(init=False, default=7)


@dataclass
class Eval:
    manifest: Path
    every: int = 50


@dataclass
class Run:
    memory: Memory = field(default_factory=lambda: Memory(budget=512))
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    eval: Eval | None = None


@dataclass
class SharedDefault:
    memory: Memory = Memory(selector_options={"probes": 8})  # one instance for all, on purpose


@dataclass
class Strict:
    model: str
    eval: Eval


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def errors(excinfo: pytest.ExceptionInfo[UserError]) -> list[str]:
    """The numbered lines of a configuration error, without their numbers."""
    head, *lines = excinfo.value.what.splitlines()
    assert head.startswith(f"{len(lines)} error{'s' * (len(lines) > 1)} in the configuration")
    return [line.split(". ", 1)[1] for line in lines]


def fails(overrides: list[str], path: Path | None = None, cls: type = Run) -> list[str]:
    with pytest.raises(UserError) as excinfo:
        load_config(cls, path, overrides)
    return errors(excinfo)


# What is read ---------------------------------------------------------------------------------------------------------


def test_defaults_without_recipe() -> None:
    assert load_config(Run) == Run()


def test_recipe_then_overrides(tmp_path: Path) -> None:
    recipe = write(tmp_path, "r.yaml", "memory:\n  budget: 64\n  chunk_tokens: 32\ntrain: {lr: 2e-5, resume: true}\n")
    config = load_config(Run, recipe, ["memory.budget=128", "train.lr=1e-4", "data.size=[32, 48]", "memory.budget=256"])
    assert config.memory == Memory(budget=256, chunk_tokens=32)
    assert config.train == Train(lr=1e-4, resume=True)
    assert config.data.size == (32, 48)


def test_a_section_keeps_the_defaults_of_the_field_it_is_for() -> None:
    assert load_config(Run, None, ["memory.chunk_tokens=8"]).memory == Memory(budget=512, chunk_tokens=8)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.lr=1e-4", 1e-4),
        ("train.lr='1e-4'", 1e-4),
        ("train.lr=1E5", 1e5),
        ("train.lr=3", 3.0),
        ("train.lr=.5", 0.5),
        ("train.lr=.inf", float("inf")),
        ("train.steps=1_000", 1000),
        ("train.steps=-3", -3),
        ("train.steps=0x10", 16),
        ("train.resume=true", True),
        ("train.name=no", "no"),
        ("train.name=2026-11-23", "2026-11-23"),
        ("train.name=1:30", "1:30"),
        ("train.name=010", "010"),
        ("train.name='7'", "7"),
        ("train.name=a=b", "a=b"),
        ("train.warmup=1", 1),
        ("train.warmup=0.03", 0.03),
        ("memory.budget=512MiB", "512MiB"),
        ("memory.budget=null", None),
        ("memory.budget=", None),
        ("memory.budget=77", 77),
        ("memory.layer_table=[[1, 2], 3]", ([1, 2], 3)),
        ("data.cache=a/b", Path("a/b")),
        ("data.modality=audio", "audio"),
        ("data.shares={a: 1, b: 0.5}", {"a": 1.0, "b": 0.5}),
        ("data.shares.a=2", {"a": 2.0}),
    ],
)
def test_values(override: str, expected: Any) -> None:
    value: Any = load_config(Run, None, [override])
    for key in override.split("=")[0].split(".")[:2]:
        value = getattr(value, key)
    assert value == expected
    assert type(value) is type(expected)
    if isinstance(expected, dict):
        assert [type(v) for v in value.values()] == [type(v) for v in expected.values()]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=ten", "train.steps must be a whole number, got 'ten', which is text"),
        ("train.steps=1.5", "train.steps must be a whole number, got 1.5, which is a number"),
        ("train.steps=true", "train.steps must be a whole number, got True, which is true or false"),
        ("train.steps=null", "train.steps must be a whole number, got nothing (null)"),
        ("train.resume=1", "train.resume must be true or false, got 1, which is a whole number"),
        ("train.resume=yes", "train.resume must be true or false, got 'yes', which is text"),
        ("train.lr=fast", "train.lr must be a number, got 'fast', which is text"),
        ("train.lr=.nan", "train.lr must be a number, got nan, which is a number"),
        ("train.lr=false", "train.lr must be a number, got False, which is true or false"),
        ("train.name=7", "train.name must be text, got 7, which is a whole number; quote it to make it text"),
        ("memory.budget=1.5", "memory.budget must be a whole number or text or null, got 1.5, which is a number"),
        ("memory.selector_options=3", "memory.selector_options must be a mapping, got 3, which is a whole number"),
        ("memory=3", "memory must be a mapping, got 3, which is a whole number"),
        ("memory=null", "memory must be a mapping, got nothing (null)"),
        ("data.size=[1, 2, 3]", "data.size must have 2 entries, got 3"),
        ("data.size=[1, a]", "data.size.1 must be a whole number, got 'a', which is text"),
        ("data.size=5", "data.size must be a list, got 5, which is a whole number"),
        ("train.level=true", "train.level must be one of 0, 1, got True, which is true or false"),
        ("train.derived=8", "unknown key train.derived"),
        ("data.modality=vido", "data.modality must be one of 'av', 'video', 'audio', got 'vido'"),
        ("data.shares={a: b}", "data.shares.a must be a number, got 'b'"),
        ("data.shares={1: 2}", "data.shares.1 must be text, got 1"),
        ("train.steps.x=1", "train.steps has no keys of its own"),
        ("train.name=[", "the value is not valid YAML (line 1"),
        ("train.name=*x", "aliases (*name) are not supported"),
        ("train.name={a: 1, a: 2}", "duplicate key a"),
        ("train.steps", "is not of the form section.key=value"),
        ("=3", "is not of the form section.key=value"),
        ("train..lr=3", "is not of the form section.key=value"),
    ],
)
def test_wrong_values_say_where_and_why(override: str, message: str) -> None:
    first = fails([override])[0]
    assert first.startswith(f"override {override!r}:")
    assert message in first


def test_free_form_mapping_is_replaced_whole_but_an_override_sets_one_key(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "memory: {selector_options: {probes: 8, mean: true}}")
    child = write(tmp_path, "child.yaml", "base: base.yaml\nmemory: {selector_options: {window: 3}}")
    assert load_config(Run, child).memory.selector_options == {"window": 3}
    set_one = load_config(Run, child, ["memory.selector_options.window=5", "memory.selector_options.a.b=1e-3"])
    assert set_one.memory.selector_options == {"window": 5, "a": {"b": 1e-3}}
    assert load_config(Run, None, ["memory.selector_options.window=5"]).memory.selector_options == {
        "probes": 64,
        "window": 5,
    }
    assert load_config(Run, child, ["memory.selector_options={}"]).memory.selector_options == {}
    assert Run().memory.selector_options == {"probes": 64}


def test_an_override_does_not_write_into_a_shared_default() -> None:
    changed = load_config(SharedDefault, None, ["memory.selector_options.window=5"])
    assert changed.memory.selector_options == {"probes": 8, "window": 5}
    assert SharedDefault().memory.selector_options == {"probes": 8}


def test_optional_section() -> None:
    assert load_config(Run, None, ["eval.manifest=m.jsonl"]).eval == Eval(Path("m.jsonl"))
    assert load_config(Run, None, ["eval={manifest: m.jsonl, every: 3}", "eval.every=4"]).eval == Eval(
        Path("m.jsonl"), 4
    )
    assert load_config(Run, None, ["eval.manifest=m.jsonl", "eval=null"]).eval is None
    assert load_config(Run, None, ["eval=null", "eval.manifest=b"]).eval == Eval(Path("b"))
    assert fails(["eval.every=3"]) == ["override 'eval.every=3': eval.manifest is missing"]
    assert fails(["eval={eval: 1}"])[1] == "override 'eval={eval: 1}': eval.manifest is missing"


def test_required_values() -> None:
    assert fails([], cls=Strict) == ["model is missing", "eval.manifest is missing"]
    config = load_config(Strict, None, ["model=a", "eval.manifest=b"])
    assert config == Strict("a", Eval(Path("b")))


def test_list_of_dataclasses(tmp_path: Path) -> None:
    recipe = write(
        tmp_path, "r.yaml", "data:\n  sources:\n    - manifest: a.jsonl\n    - {manifest: b.jsonl, weight: 2}\n"
    )
    assert load_config(Run, recipe).data.sources == (Source(Path("a.jsonl")), Source(Path("b.jsonl"), 2.0))
    bad = write(
        tmp_path,
        "bad.yaml",
        "data:\n  sources:\n    - manifset: a.jsonl\n    - weight: 2\n      manifest: 3\n      weihgt: 2\n",
    )
    assert fails([], bad) == [
        f"{bad}:3: unknown key data.sources.0.manifset; did you mean 'manifest'?",
        f"{bad}:3: data.sources.0.manifest is missing",
        f"{bad}:6: unknown key data.sources.1.weihgt; did you mean 'weight'?",
        f"{bad}:5: data.sources.1.manifest must be a path, got 3, which is a whole number",
    ]
    # an override takes the place of the recipe's list, and of the lines that errors in it name
    override = "data.sources=[{manifest: 3},\n{manifset: a}]"
    assert fails([override], recipe) == [
        f"override {override!r}: data.sources.0.manifest must be a path, got 3, which is a whole number",
        f"override {override!r}: unknown key data.sources.1.manifset; did you mean 'manifest'?",
        f"override {override!r}: data.sources.1.manifest is missing",
    ]


# Bases ----------------------------------------------------------------------------------------------------------------


def test_base_is_relative_and_chained(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, "root.yaml", "train: {lr: 1, steps: 1, name: root}")
    write(tmp_path, "mid.yaml", "base: root.yaml\ntrain: {lr: 2, steps: 2}")
    leaf = write(tmp_path / "sub", "leaf.yaml", "base: ../mid.yaml\ntrain: {lr: 3}")
    assert load_config(Run, leaf).train == Train(lr=3.0, steps=2, name="root")


def test_base_cycle_missing_base_and_bad_base(tmp_path: Path) -> None:
    a = write(tmp_path, "a.yaml", "base: b.yaml")
    write(tmp_path, "b.yaml", "base: ./a.yaml")
    with pytest.raises(UserError, match="name each other as base"):
        load_config(Run, a)
    own = write(tmp_path, "own.yaml", "base: own.yaml")
    with pytest.raises(UserError, match="name each other as base"):
        load_config(Run, own)
    lost = write(tmp_path, "lost.yaml", "base: nowhere.yaml")
    with pytest.raises(UserError, match=r"cannot read the recipe .*nowhere\.yaml; .*lost\.yaml names it as its base"):
        load_config(Run, lost)
    two = write(tmp_path, "two.yaml", "train: {}\nbase: [a.yaml, b.yaml]")
    with pytest.raises(UserError, match=r"two\.yaml:2: base must be the path of one recipe"):
        load_config(Run, two)


def test_an_error_in_the_base_names_the_base(tmp_path: Path) -> None:
    base = write(tmp_path, "base.yaml", "\n\ntrain:\n  lr: fast\n")
    child = write(tmp_path, "child.yaml", "base: base.yaml\ntrain:\n  steps: 3\n")
    assert fails([], child) == [f"{base}:4: train.lr must be a number, got 'fast', which is text"]
    assert load_config(Run, child, ["train.lr=1"]).train.lr == 1.0


# Errors ---------------------------------------------------------------------------------------------------------------


def test_all_errors_at_once_with_file_line_and_override(tmp_path: Path) -> None:
    recipe = write(
        tmp_path,
        "r.yaml",
        "memroy:\n  budget: 5\nmemory:\n  budgte: 3\n  budget: 0\ntrain:\n  lr: fast\n  lr: 3\ndata: {cache: 4}\n",
    )
    assert sorted(fails(["train.stepz=5", "budget=3", "train.resume=maybe"], recipe)) == sorted(
        [
            f"{recipe}:8: duplicate key train.lr, first in line 7",
            f"{recipe}:1: unknown key memroy; did you mean 'memory'?",
            f"{recipe}:4: unknown key memory.budgte; did you mean 'budget'?",
            "override 'train.stepz=5': unknown key train.stepz; did you mean 'steps'?",
            "override 'budget=3': unknown key budget; did you mean 'memory.budget'?",
            f"{recipe}:5: memory budget 0 is below 1 token; nothing fits; give at least 1",
            f"{recipe}:7: train.lr must be a number, got 'fast', which is text",
            "override 'train.resume=maybe': train.resume must be true or false, got 'maybe', which is text",
            f"{recipe}:9: data.cache must be a path or null, got 4, which is a whole number",
        ]
    )


def test_unknown_key_without_a_near_one_lists_the_known() -> None:
    assert fails(["train.zzz=5"]) == [
        "override 'train.zzz=5': unknown key train.zzz; known: " + ", ".join(f.name for f in fields(Train) if f.init)
    ]


def test_range_error_of_an_override_names_the_override(tmp_path: Path) -> None:
    recipe = write(tmp_path, "r.yaml", "memory:\n  budget: 5\n  chunk_tokens: 3\n")
    assert fails(["memory.budget=-1"], recipe)[0].startswith("override 'memory.budget=-1': memory budget -1")
    # the text names no field: the section as a whole is at fault
    assert fails(["memory.selector_options.probes=-1"], recipe)[0].startswith(f"{recipe}:1: negative probes")


def test_free_form_value_that_the_component_cannot_use() -> None:
    (line,) = fails(["memory.selector_options.probes=many"])
    assert "memory cannot be used: '<' not supported" in line


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the recipe .*none\.yaml"):
        load_config(Run, tmp_path / "none.yaml")
    broken = write(tmp_path, "broken.yaml", "train:\n  lr: [1, 2\n")
    with pytest.raises(UserError, match=r"(?s)is not valid YAML.*line 3"):
        load_config(Run, broken)
    with pytest.raises(UserError, match="is not valid YAML"):
        load_config(Run, write(tmp_path, "tag.yaml", "train: {lr: !!bool x}"))
    with pytest.raises(UserError, match="must hold lines"):
        load_config(Run, write(tmp_path, "list.yaml", "- 1\n- 2\n"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot read the recipe"):
        load_config(Run, tmp_path / "binary.yaml")
    assert load_config(Run, write(tmp_path, "empty.yaml", "# nothing\n")) == Run()


# Round trip -----------------------------------------------------------------------------------------------------------


def test_to_yaml_round_trips(tmp_path: Path) -> None:
    config = Run(
        memory=Memory(
            budget="512MiB", selector_options={"a": 1e-5, "b": [1, 2], "c": {}, "d": None}, layer_table=(1, 2)
        ),
        data=Data(sources=(Source(Path("a"), 0.5),), cache=Path("x: y"), shares={"no": 1.0}),
        train=Train(lr=1e-7, name="1e-4", resume=True, warmup=float("inf")),
    )
    for name in ("no", "010", "2026-11-23", "", "null", "true", " a ", "a: b", "*x", "ü\n", "1_0", "0x1F", "{"):
        config.train = replace(config.train, name=name)
        save_resolved(config, tmp_path / "run" / "resolved.yaml")
        loaded = load_config(Run, tmp_path / "run" / "resolved.yaml")
        assert loaded == config
        assert to_yaml(loaded) == to_yaml(config)


def test_resolved_file_holds_every_setting_and_repeats_the_recipe(tmp_path: Path) -> None:
    config = load_config(Run, None, ["memory.budget=3"])
    save_resolved(config, tmp_path / "r.yaml")
    text = (tmp_path / "r.yaml").read_text()
    for name in flatten(to_plain(config)):
        assert f"{name.split('.')[1] if '.' in name else name}:" in text
    assert "  size: [224, 224]\n" in text


def test_the_same_list_twice_is_written_twice(tmp_path: Path) -> None:
    shared = [1, 2]
    config = Run(memory=Memory(selector_options={"a": shared, "b": shared}))
    save_resolved(config, tmp_path / "r.yaml")
    assert load_config(Run, tmp_path / "r.yaml") == config


def test_memory_spec_is_a_section(tmp_path: Path) -> None:
    from omnimem_train.memory.spec import MemorySpec

    table = write(tmp_path, "m.yaml", "layer_table: [[128, 384], 512]\nselector_options: {}\nbudget: 512MiB\n")
    spec = load_config(MemorySpec, table, ["chunk_tokens=64"])
    assert (spec.layer_table, spec.budget, spec.chunk_tokens) == (([128, 384], 512), "512MiB", 64)
    save_resolved(spec, tmp_path / "saved.yaml")
    assert load_config(MemorySpec, tmp_path / "saved.yaml").fingerprint() == spec.fingerprint()
    lines = fails(["budget=0", "chunk_tokens=5"], cls=MemorySpec)
    assert lines[0].startswith("override 'budget=0': memory budget 0 ")


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}
