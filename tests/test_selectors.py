"""The contract that every registered selector keeps, in all its variants."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from candidates import candidates, stream_of
from torch import Tensor

from omnimem_train.errors import UserError
from omnimem_train.memory import (
    TEXT,
    Candidates,
    EvidenceSelector,
    Probes,
    Scored,
    ScoringSelector,
    Selector,
    choose,
    make_allocation,
    make_selector,
    register,
    selector_table,
    selectors,
)
from omnimem_train.memory.numeric import best
from omnimem_train.memory.omnimem import RELEASED

NAMES = {
    "full",
    "random",
    "uniform",
    "sliding_window",
    "knorm",
    "key_difference",
    "snapkv",
    "observed_attention",
    "tova",
    "critical_kv",
    "infinipot_v",
    "omnimem",
    "perturbation",
    "expected_attention",
    "lagkv",
}

# Every selector with its defaults, and every part it can take.
VARIANTS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in selectors()]
for _name, _cls in selectors().items():
    if issubclass(_cls, ScoringSelector):
        VARIANTS.append((_name, {"redundancy": "none" if _name == "perturbation" else "later_key"}))
    if issubclass(_cls, EvidenceSelector):
        VARIANTS.append((_name, {"history": "average", "redundancy": "later_key"}))
VARIANTS += [
    ("snapkv", {"window_size": 4, "kernel_size": 3}),
    ("critical_kv", {"window_size": 4, "first_stage_ratio": 0.3}),
    ("sliding_window", {"n_sink": 0}),
    ("lagkv", {"n_sink": 2, "lag_size": 5}),
    ("lagkv", {"n_sink": 2, "lag_size": 5, "cross_scoring": True}),
    ("expected_attention", {"use_covariance": False, "use_vnorm": False, "n_future_positions": 3}),
    ("expected_attention", {"n_sink": 1000}),
    ("infinipot_v", {"adaptive_pooling": False, "tar_ratio": 1.0}),
    ("infinipot_v", {"tar_ratio": 0.0}),
    ("infinipot_v", {"grid": "moving"}),
    ("omnimem", RELEASED),
    ("omnimem", RELEASED | {"formula": "sum", "lam": 4.0}),
    ("omnimem", {"lam": 0.0}),
    ("omnimem", {"features": "keys"}),
    ("omnimem", {"features": "values", "importance": "exact_mean"}),
    ("perturbation", {"group_norm": "sum", "n_probes": 5}),
    ("perturbation", {"approximate": True, "n_probes": 0}),
]


def label(value: Any) -> str:
    return ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


every_variant = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=label)
shared = make_allocation("shared")


def check(c: Candidates, selector: Selector, budget: int) -> Tensor:
    """`choose`, and all that its result has to be."""
    rows, scored = choose(c, selector, shared, budget)
    b, g, s = c.shape
    n_media = s - c.n_text
    kept = n_media if selector.keeps_all else min(budget, n_media)
    assert rows.shape == (b, g, c.n_text + kept)
    assert rows.dtype == torch.int64
    assert (rows.diff(dim=-1) > 0).all(), "ascending and unique"
    assert (rows >= 0).all()
    assert (rows < s).all()
    assert ((c.tokens.modality == TEXT).sum(-1) == (c.tokens.modality.gather(-1, rows) == TEXT).sum(-1)).all()
    if scored is not None:
        for part in (scored.score, scored.importance, scored.redundancy):
            assert part is None or (part.shape == (b, g, s) and not part.isnan().any())
        assert scored.importance is None or (scored.importance >= 0).all()
        assert scored.score.dtype == (torch.float64 if c.tokens.keys.dtype == torch.float64 else torch.float32)
    if selector.shared_heads:
        assert (rows == rows[:, :1]).all()
    return rows


def test_the_promised_selectors_are_there() -> None:
    assert set(selectors()) >= NAMES
    for row in selector_table():
        assert row.name
        assert row.source
        assert row.cost
        assert make_selector(row.name, **row.options) == make_selector(row.name)


@every_variant
@pytest.mark.parametrize("mix", ["both", "visual", "audio", "text"])
@pytest.mark.parametrize(("batch", "kv_heads", "group"), [(1, 1, 1), (2, 2, 3)])
def test_exact_counts(name: str, options: dict[str, Any], mix: str, batch: int, kv_heads: int, group: int) -> None:
    selector = make_selector(name, **options)
    c = candidates(selector, mix=mix, batch=batch, kv_heads=kv_heads, group=group)
    n_media = c.n - c.n_text
    for budget in sorted({1, 2, n_media // 2, n_media - 1, n_media, n_media + 5}):
        if budget >= 1:
            check(c, selector, budget)


@every_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("duplicates", [False, True], ids=["distinct", "duplicates"])
def test_precisions_and_duplicates(name: str, options: dict[str, Any], dtype: torch.dtype, duplicates: bool) -> None:
    selector = make_selector(name, **options)
    check(candidates(selector, dtype=dtype, duplicates=duplicates), selector, 7)


@every_variant
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e15], ids=["zero", "tiny", "huge"])
def test_extreme_keys_and_values(name: str, options: dict[str, Any], scale: float) -> None:
    """Zero vectors, squares below what float32 holds, and squares near its other end."""
    selector = make_selector(name, **options)
    c = candidates(selector)
    tokens = dataclasses.replace(c.tokens, values=c.tokens.values * scale, keys=c.tokens.keys * min(scale, 1))
    check(dataclasses.replace(c, tokens=tokens), selector, 7)


@every_variant
@pytest.mark.parametrize(("n_old", "n_chunk"), [(0, 0), (0, 1), (0, 20), (30, 1), (30, 0)])
def test_short_and_first_chunks(name: str, options: dict[str, Any], n_old: int, n_chunk: int) -> None:
    """A stream's first token, first chunk, a chunk of one token, and the empty chunk that fills up a rank's rounds."""
    selector = make_selector(name, **options)
    c = candidates(selector, n_old=n_old, n_forgotten=0, n_chunk=n_chunk)
    for budget in (1, 5):
        check(c, selector, budget)


@every_variant
def test_repeats_itself_and_keeps_no_state(name: str, options: dict[str, Any]) -> None:
    selector = make_selector(name, **options)
    c, other = candidates(selector), candidates(selector, seed=1)
    before = [None if t is None else t.clone() for t in c.tokens.tensors()]
    first = check(c, selector, 6)
    check(other, selector, 6)
    assert torch.equal(check(c, selector, 6), first)
    assert torch.equal(check(c, make_selector(name, **options), 6), first)
    for old, new in zip(before, c.tokens.tensors(), strict=True):
        assert old is None or (new is not None and torch.equal(old, new)), "a selector wrote into its input"
    with pytest.raises(dataclasses.FrozenInstanceError):
        selector.anything = 1  # type: ignore[attr-defined]


@every_variant
def test_a_stream_does_not_depend_on_its_batch(name: str, options: dict[str, Any]) -> None:
    selector = make_selector(name, **options)
    c = candidates(selector, dtype=torch.float64)
    together = check(c, selector, 6)
    for b in range(2):
        assert torch.equal(check(stream_of(c, b), selector, 6)[0], together[b])


@every_variant
def test_autocast_around_the_forward_changes_nothing(name: str, options: dict[str, Any]) -> None:
    selector = make_selector(name, **options)
    c = candidates(selector)
    wanted, scored = choose(c, selector, shared, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, again = choose(c, selector, shared, 6)
    assert torch.equal(found, wanted)
    if scored is not None and again is not None:
        assert torch.equal(scored.score, again.score)


@pytest.mark.parametrize("name", list(selectors()))
def test_no_gradient_history(name: str) -> None:
    selector = make_selector(name)
    c = candidates(selector)
    tokens = dataclasses.replace(c.tokens, keys=c.tokens.keys.requires_grad_(), values=c.tokens.values.requires_grad_())
    _, scored = choose(dataclasses.replace(c, tokens=tokens), selector, shared, 6)
    assert scored is None or not scored.score.requires_grad


def test_missing_inputs_are_named() -> None:
    for name, given in (("perturbation", "output_weight"), ("critical_kv", "output_weight"), ("omnimem", "hidden")):
        selector = make_selector(name)
        assert given in selector.needs
        c = candidates(selector)
        c = dataclasses.replace(c, output_weight=None, tokens=dataclasses.replace(c.tokens, hidden=None))
        with pytest.raises(ValueError, match=given):
            choose(c, selector, shared, 3)
    selector = make_selector("expected_attention")
    with pytest.raises(ValueError, match="rotary"):
        choose(dataclasses.replace(candidates(selector), rotary=None), selector, shared, 3)
    assert make_selector("omnimem", features="keys").needs == frozenset()


def test_text_is_counted_or_told() -> None:
    c = candidates()
    assert (
        dataclasses.replace(c, known_text=c.n_text).n_text == c.n_text == int((c.tokens.modality[0, 0] == TEXT).sum())
    )
    uneven = c.tokens.modality.clone()
    uneven[1] = TEXT
    with pytest.raises(ValueError, match="text tokens; run them apart"):
        _ = dataclasses.replace(c, tokens=dataclasses.replace(c.tokens, modality=uneven)).n_text


def test_layer_inputs_need_shared_heads() -> None:
    @dataclasses.dataclass(frozen=True)
    class Wrong(Selector):
        name = "wrong"

        @property
        def needs(self) -> frozenset[str]:
            return frozenset({"hidden"})

        def score(self, c: Candidates, keep: int) -> Scored:
            return Scored(c.tokens.evidence)

    with pytest.raises(ValueError, match="same tokens in all heads"):
        choose(candidates(), Wrong(), shared, 3)


def test_two_selectors_cannot_share_a_name() -> None:
    with pytest.raises(ValueError, match="two selectors are called 'knorm'"):

        @register
        @dataclasses.dataclass(frozen=True)
        class Other(Selector):
            name = "knorm"

            def score(self, c: Candidates, keep: int) -> Scored:
                return Scored(c.tokens.evidence)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("snapvk", {}, "unknown selector 'snapvk'; did you mean 'snapkv'?"),
        (5, {}, "unknown selector 5"),
        ("snapkv", {"window": 3}, "selector 'snapkv' has no option 'window'; did you mean 'window_size'?"),
        ("snapkv", {"window_size": 3.0}, "option window_size=3.0 of selector 'snapkv' is not of type int"),
        ("snapkv", {"window_size": True}, "is not of type int"),
        ("snapkv", {"window_size": 0}, "option window_size=0 is out of range"),
        ("snapkv", {"kernel_size": 4}, "option kernel_size=4 is even"),
        ("snapkv", {"redundancy": "later"}, "option redundancy='later' is unknown; did you mean 'later_key'?"),
        ("snapkv", {"history": "old"}, "option history='old' is unknown"),
        ("critical_kv", {"first_stage_ratio": 1.5}, "give between 0 and 1"),
        ("critical_kv", {"epsilon": -1.0}, "give 0 or more"),
        ("critical_kv", {"epsilon": math.nan}, "out of range"),
        ("sliding_window", {"n_sink": -1}, "out of range"),
        ("lagkv", {"lag_size": 0}, "out of range"),
        ("expected_attention", {"n_future_positions": 0}, "out of range"),
        ("omnimem", {"lam": "0.02"}, "is not of type float"),
        ("omnimem", {"formula": "prod"}, "did you mean 'product'?"),
        ("omnimem", {"neighbours": "all"}, "choose one of: modality, sequence"),
        ("infinipot_v", {"adaptive_pooling": 1}, "is not of type bool"),
        ("infinipot_v", {"grid": "x"}, "choose one of: fixed, moving"),
        ("perturbation", {"group_norm": "max"}, "choose one of: mean, sum"),
        ("perturbation", {"n_probes": -1}, "out of range"),
    ],
    ids=str,
)
def test_wrong_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        make_selector(name, **options)
    assert message in str(error.value)


def test_whole_numbers_serve_as_floats() -> None:
    assert make_selector("omnimem", lam=1).options()["lam"] == 1.0
    assert isinstance(make_selector("omnimem", lam=1).options()["lam"], float)


# Parts ----------------------------------------------------------------------------------------------------------------


def test_probes() -> None:
    assert Probes("none").rows(5).tolist() == []
    assert Probes("all").rows(3).tolist() == [0, 1, 2]
    assert Probes("last", 2).rows(5).tolist() == [3, 4]
    assert Probes("last", 9).rows(2).tolist() == [0, 1]
    for n in range(1, 40):
        for count in range(1, 45):
            rows = Probes("spread", count).rows(n)
            assert len(rows) == min(n, count)
            assert rows[-1] == n - 1
            assert (rows.diff() > 0).all()
            assert rows.diff().numel() == 0 or rows.diff().max() - rows.diff().min() <= 1
    with pytest.raises(ValueError, match="unknown kind"):
        Probes("some", 3).rows(5)


def test_best_prefers_members_and_later_tokens() -> None:
    score = torch.tensor([1.0, float("-inf"), 5.0, 1.0, float("inf")])
    members = torch.tensor([True, True, False, True, False])
    for count, kept in ((0, []), (1, [3]), (2, [0, 3]), (3, [0, 1, 3])):
        assert best(score, members, torch.tensor(count)).nonzero().flatten().tolist() == kept


def test_attention_is_causal_and_complete_in_any_block() -> None:
    c = candidates(dtype=torch.float64)
    whole = torch.cat([a for a, _ in c.attention_blocks()], dim=3)
    pieces = torch.cat([a for a, _ in c.attention_blocks(block=5)], dim=3)
    torch.testing.assert_close(whole, pieces)
    torch.testing.assert_close(whole.sum(-1), torch.ones_like(whole[..., 0]))
    for p, row in enumerate(c.query_rows.tolist()):
        assert (whole[:, :, :, p, row + 1 :] == 0).all()
        for h in range(c.group):
            logits = (
                torch.einsum("bd,bsd->bs", c.queries[:, c.group + h, p], c.tokens.keys[:, 1, : row + 1]) * c.scaling
            )
            torch.testing.assert_close(whole[:, 1, h, p, : row + 1], logits.softmax(-1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_variant
def test_a_gpu_scores_as_the_cpu_does(name: str, options: dict[str, Any]) -> None:
    """Half-precision inputs go through other kernels there; sums are float32 all the same."""
    selector = make_selector(name, **options)
    for dtype in (torch.bfloat16, torch.float32):
        c = candidates(selector, dtype=dtype)
        moved = dataclasses.replace(
            c,
            tokens=c.tokens.to("cuda"),
            queries=c.queries.cuda(),
            query_rows=c.query_rows.cuda(),
            output_weight=None if c.output_weight is None else c.output_weight.cuda(),
        )
        check(moved, selector, 6)
        on_cpu, on_gpu = selector.score(c, 6), selector.score(moved, 6)
        for here, there in zip((on_cpu.score, on_cpu.importance), (on_gpu.score, on_gpu.importance), strict=True):
            if here is not None and there is not None:
                torch.testing.assert_close(there.cpu(), here, rtol=2e-4, atol=2e-5)
