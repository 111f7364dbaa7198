"""The kernels give what plain torch gives: in Triton's interpreter here, on the device itself with `-m gpu`."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from typing import Any

import pytest
import torch
from candidates import candidates
from torch import Tensor

from omnimem_train.memory import AUDIO, TEXT, VISUAL, Candidates, Probes, choose, fast, make_allocation, make_selector
from omnimem_train.memory.perturbation import Change, own_gram
from omnimem_train.memory.redundancy import later_key, neighbour_cosine, previous_of_kind

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: the kernels have neither interpreter nor compiler", allow_module_level=True)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

from omnimem_train import kernels
from omnimem_train.kernels import attention, change, keep, redundancy

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off")),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]
on_each_device = pytest.mark.parametrize("device", DEVICES)


def view(device: str, *, sharp: float = 1.0, dtype: torch.dtype | None = None, **options: Any) -> Candidates:
    """Candidates with heads of 64; in bfloat16 on a GPU. The interpreter cannot multiply matrices of that."""
    dtype = torch.bfloat16 if device == "cuda" else dtype or torch.float16
    given = {"head_dim": 64, "width": 96, "dtype": dtype, "probes": Probes("spread", 5)} | options
    c = candidates(**given)
    return dataclasses.replace(
        c,
        tokens=c.tokens.to(device),
        queries=(sharp * c.queries).to(device),
        query_rows=c.query_rows.to(device),
        output_weight=None if c.output_weight is None else c.output_weight.to(device),
        rotary=None,
    )


def exact(c: Candidates, dtype: torch.dtype = torch.float64) -> Candidates:
    """The same numbers in `dtype` on the CPU."""
    tokens = dataclasses.replace(c.tokens.to("cpu"), hidden=None)
    tokens = dataclasses.replace(tokens, keys=tokens.keys.to(dtype), values=tokens.values.to(dtype))
    assert c.output_weight is not None
    return dataclasses.replace(
        c,
        tokens=tokens,
        queries=c.queries.cpu().to(dtype),
        query_rows=c.query_rows.cpu(),
        output_weight=c.output_weight.cpu().to(dtype),
    )


def gram_of(c: Candidates) -> Tensor:
    assert c.output_weight is not None
    return own_gram(c.output_weight, c.tokens.keys.shape[1], c.queries.shape[1])


SHAPES = [
    {},
    {"batch": 1, "kv_heads": 1, "group": 1, "n_old": 0, "n_forgotten": 0, "n_chunk": 1, "probes": Probes("all")},
    {"batch": 1, "kv_heads": 2, "group": 3, "head_dim": 128, "probes": Probes("all")},
    {"batch": 1, "group": 7, "n_old": 230, "n_forgotten": 20, "n_chunk": 130, "probes": Probes("spread", 65)},
    {
        "batch": 1,
        "group": 1,
        "kv_heads": 1,
        "n_old": 400,
        "n_chunk": 150,
        "n_forgotten": 1,
        "probes": Probes("last", 3),
    },
]


@on_each_device
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("sharp", "dtype"), [(0.05, torch.float16), (1.0, torch.float16), (1.0, torch.float32), (8.0, torch.float32)]
)
def test_change(device: str, shape: dict[str, Any], sharp: float, dtype: torch.dtype) -> None:
    """Spread attention, and attention of which one candidate gets nearly all."""
    c = view(device, sharp=sharp, dtype=dtype, **shape)
    found = change.change(c, gram_of(c))
    assert found is not None
    wanted = make_selector("perturbation", redundancy="none").score(exact(c), 3).score
    scale = wanted.amax(-1, keepdim=True)
    rtol, atol = (1e-2, 1e-3) if c.tokens.keys.dtype.itemsize == 2 else (1e-3, 1e-5)
    torch.testing.assert_close(found.cpu().double() / scale, wanted / scale, rtol=rtol, atol=atol)


@on_each_device
def test_change_of_a_token_that_gets_all_attention(device: str) -> None:
    """1 - A is 0 there: the number comes from the others alone, or from a zero output if there are none."""
    c = view(device, sharp=3000.0, dtype=torch.float32)
    found = change.change(c, gram_of(c))
    assert found is not None
    assert found.isfinite().all()
    wanted = make_selector("perturbation", redundancy="none").score(exact(c, torch.float32), 3).score
    reached = wanted > 0.1 * wanted.amax(-1, keepdim=True)
    torch.testing.assert_close(found.cpu()[reached], wanted[reached], rtol=2e-2, atol=0)


@on_each_device
def test_change_takes_what_it_can(device: str) -> None:
    c = view(device)
    for other in (
        dataclasses.replace(c, queries=c.queries.double()),
        view(device, head_dim=32),
        view(device, probes=Probes("none")),
    ):
        assert change.change(other, gram_of(other)) is None


@on_each_device
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_sum(device: str, shape: dict[str, Any]) -> None:
    c = view(device, **shape)
    found = attention.attention_sum(c)
    assert found is not None
    wanted = torch.cat([a for a, _ in exact(c).attention_blocks()], dim=3).sum(dim=3)
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-4, atol=1e-5)
    known = dataclasses.replace(c, log_sums=log_sums(exact(c)).float().to(device))
    found = attention.attention_sum(known)
    assert found is not None
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-4, atol=1e-5)
    half = torch.arange(0, c.query_rows.shape[0], 2, device=device)
    found = attention.attention_sum(known.asked_by(half))
    assert found is not None
    fewer = torch.cat([a for a, _ in exact(c).asked_by(half.cpu()).attention_blocks()], dim=3).sum(dim=3)
    torch.testing.assert_close(found.cpu().double(), fewer, rtol=1e-4, atol=1e-5)
    found = attention.attention_sum(known)
    assert found is not None and known.log_sums is not None
    halves = attention.attention_sum(dataclasses.replace(known, log_sums=known.log_sums + math.log(2)))
    assert halves is not None
    torch.testing.assert_close(halves, found / 2)


@on_each_device
@pytest.mark.parametrize("n_old", [0, 200, 400])
def test_attention_sum_of_many_queries(device: str, n_old: int) -> None:
    """Tiles of candidates that some tiles of queries see in part, some wholly, and the first ones not at all."""
    options = {"batch": 1, "kv_heads": 1, "group": 1, "n_old": n_old, "n_forgotten": 0, "n_chunk": 700}
    c = view(device, probes=Probes("all"), **options)
    found = attention.attention_sum(c)
    assert found is not None
    wanted = torch.cat([a for a, _ in exact(c).attention_blocks()], dim=3).sum(dim=3)
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-4, atol=1e-5)


def log_sums(c: Candidates) -> Tensor:
    """(B, H, P) by the formula."""
    keys = c.tokens.keys.repeat_interleave(c.group, 1)
    logits = (c.queries @ keys.transpose(2, 3)) * c.scaling
    return logits.masked_fill(torch.arange(c.n) > c.query_rows[:, None], float("-inf")).logsumexp(-1)


@on_each_device
@pytest.mark.parametrize("mix", ["both", "visual", "text"])
@pytest.mark.parametrize("n_chunk", [1, 40, 300])
@pytest.mark.parametrize("duplicates", [False, True])
def test_later_key(device: str, mix: str, n_chunk: int, duplicates: bool) -> None:
    c = view(device, mix=mix, n_chunk=n_chunk, duplicates=duplicates)
    found = redundancy.later_key(c.tokens.keys, c.tokens.modality)
    assert found is not None
    wanted = later_key(exact(c).tokens.keys, c.tokens.modality.cpu())
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=0, atol=1e-5)
    assert redundancy.later_key(c.tokens.keys.double(), c.tokens.modality) is None


@on_each_device
@pytest.mark.parametrize("mix", ["both", "audio"])
@pytest.mark.parametrize("width", [64, 100])
def test_neighbours(device: str, mix: str, width: int) -> None:
    """Rows with an earlier one of their modality and the first ones without, of widths that are no power of two."""
    c = view(device, mix=mix, width=width)
    x = torch.randn(*c.shape, width, generator=torch.Generator().manual_seed(1)).to(device, c.tokens.keys.dtype)
    earlier = previous_of_kind(c.tokens.modality)
    found = redundancy.earlier_cosine(x, earlier)
    assert found is not None and bool((found[earlier < 0] == 0).all())
    wanted = neighbour_cosine(x.cpu().double(), c.tokens.modality.cpu())
    with fast.references():  # what was provided before is back afterwards
        fast.provide("earlier_cosine", redundancy.earlier_cosine)
        found = neighbour_cosine(x, c.tokens.modality)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=0, atol=1e-5)
    assert redundancy.earlier_cosine(x.double(), earlier) is None


def test_later_key_in_many_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """More columns than one program walks, more tokens than are put in their places at a time."""
    monkeypatch.setattr(redundancy, "SPAN", redundancy.LATER["BR"])
    monkeypatch.setattr(redundancy, "AT_ONCE", 128)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    c = view(device, batch=1, kv_heads=1, group=1, n_old=1500, n_chunk=700, n_forgotten=50)
    found = redundancy.later_key(c.tokens.keys, c.tokens.modality)
    assert found is not None
    torch.testing.assert_close(found.cpu(), later_key(c.tokens.keys.cpu(), c.tokens.modality.cpu()), rtol=0, atol=1e-5)


def plain(c: Candidates, score: Tensor, allocation: Any, budget: int) -> Tensor:
    """Rows by `choose` in plain torch for given scores."""

    @dataclasses.dataclass(frozen=True)
    class Given(type(make_selector("knorm"))):  # type: ignore[misc]
        def measure(self, c: Candidates, keep: int) -> Any:
            from omnimem_train.memory import Scored

            return Scored(score)

    return choose(c, Given(), allocation, budget)[0]


@on_each_device
@pytest.mark.parametrize("allocation", ["shared", "split", "floor"])
@pytest.mark.parametrize("kind", ["plain", "ties", "negative", "infinite", "zeros"])
def test_keep(device: str, allocation: str, kind: str) -> None:
    c = view(device, batch=2, kv_heads=3, n_old=300, n_chunk=100, n_forgotten=77)
    score = torch.randn(c.shape, generator=torch.Generator().manual_seed(3)).to(device)
    if kind == "ties":
        score = score.mul(2).round()
    elif kind == "negative":
        score = -score.abs() * 1e30
    elif kind == "infinite":
        score = torch.where(score > 0.5, float("inf"), torch.where(score < 0, float("-inf"), score))
    elif kind == "zeros":
        score = torch.where(score > 0, 0.0, -0.0)
    chosen = make_allocation("shared", floor=0.2) if allocation == "floor" else make_allocation(allocation)
    for budget in (1, 2, 150, c.n - c.n_text - 1):
        wanted = plain(c, score, chosen, budget)
        seen: list[tuple[Any, ...]] = []
        fast.provide("keep", lambda *given, seen=seen: seen.append(given))  # type: ignore[misc]
        try:
            plain(c, score, chosen, budget)
        finally:
            fast.provide("keep", None)
        ((scores, modality, groups, n),) = seen
        found = keep.keep(scores, modality, groups, n)
        assert found is not None
        assert torch.equal(found, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["perturbation", "observed_attention"])
def test_the_same_tokens_are_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through `choose`, as a stream does, with the kernels and without: a near-tie may fall the other way."""
    monkeypatch.delenv(kernels.ENVIRONMENT, raising=False)
    kernels.install.cache_clear()
    kernels.reason_not_to.cache_clear()
    assert kernels.install()
    selector = make_selector(name, redundancy="later_key")
    c = view("cuda", n_old=900, n_forgotten=100, n_chunk=300, head_dim=128, probes=selector.probes())
    found, _ = choose(c, selector, make_allocation("shared"), 600)
    with fast.references():
        wanted, _ = choose(c, selector, make_allocation("shared"), 600)
    both = [c.media_among(rows) for rows in (found, wanted)]
    assert float((both[0] & both[1]).sum() / both[1].sum()) > 0.98


def test_the_environment_turns_them_off(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    """Asked for with 0, without a warning; otherwise the reason is said if there is one."""
    for asked in ("0", "1"):
        monkeypatch.setenv(kernels.ENVIRONMENT, asked)
        kernels.install.cache_clear()
        kernels.reason_not_to.cache_clear()
        reason = kernels.reason_not_to()
        assert (reason == kernels.OFF) == (asked == "0")
        assert kernels.install() == (reason is None)
        assert len(recwarn) == (reason not in (None, kernels.OFF))
    kernels.install.cache_clear()
    kernels.reason_not_to.cache_clear()


def test_keep_takes_what_it_can() -> None:
    score, modality = torch.zeros(1, 1, 4), torch.full((1, 1, 4), VISUAL, dtype=torch.int8)
    groups = [((VISUAL, AUDIO), torch.ones(1, 1, dtype=torch.int64))]
    assert keep.keep(score.double(), modality, groups, 1) is None
    assert keep.keep(score, modality, [], 1) is None
    big = torch.zeros(1, 1, keep.LARGEST + 1)
    assert keep.keep(big, big.to(torch.int8), groups, 1) is None


def test_change_of_torch_reads_the_gram_it_is_given() -> None:
    c = candidates(dtype=torch.float64)
    assert c.output_weight is not None
    gram = own_gram(c.output_weight, 2, 4)
    assert torch.equal(Change(c).own_gram, gram)
    without = dataclasses.replace(c, output_weight=None, output_gram=gram)
    selector = make_selector("perturbation")
    assert torch.equal(selector.score(without, 3).score, selector.score(c, 3).score)


def test_steps_are_named() -> None:
    with pytest.raises(ValueError, match="unknown step 'other'"):
        fast.provide("other", None)
    assert fast.provided() == [] or torch.cuda.is_available()
    assert TEXT == 0, "the kernels mark text by the first bit"
