"""Leave-one-out in closed form equals taking the token out and running attention again."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from candidates import candidates
from torch import Tensor

from omnimem_train.memory import Candidates, Probes, make_selector
from omnimem_train.memory.perturbation import Change, Perturbation


def removed(c: Candidates, b: int, g: int, p: int, i: int) -> Tensor:
    """(N, E): change of what each head of group `g` adds to the layer's output for probe `p` without candidate `i`."""
    row, d = int(c.query_rows[p]), c.tokens.keys.shape[-1]
    keys, values = c.tokens.keys[b, g, : row + 1], c.tokens.values[b, g, : row + 1]
    rest = torch.arange(row + 1) != i
    assert c.output_weight is not None
    changes = []
    for head in range(g * c.group, (g + 1) * c.group):
        weight = c.output_weight[:, head * d : (head + 1) * d]

        def output(here: Tensor, query: Tensor = c.queries[b, head, p]) -> Tensor:
            if not here.any():
                return torch.zeros(d, dtype=values.dtype)
            return ((keys[here] @ query) * c.scaling).softmax(0) @ values[here]

        changes.append(weight @ (output(torch.ones_like(rest)) - output(rest)))
    return torch.stack(changes)


def brute_force(c: Candidates, group_norm: str) -> Tensor:
    """(B, G, S): the norms of the changes, averaged over the probes that see a candidate."""
    result = torch.zeros(c.shape, dtype=c.tokens.keys.dtype)
    for b in range(c.shape[0]):
        for g in range(c.shape[1]):
            for i in range(c.n):
                found = []
                for p, row in enumerate(c.query_rows.tolist()):
                    if i <= row:
                        change = removed(c, b, g, p, i)
                        found.append(change.sum(0).norm() if group_norm == "sum" else change.norm(dim=-1).mean())
                result[b, g, i] = sum(found) / len(found)
    return result


@pytest.mark.parametrize("group_norm", ["mean", "sum"])
@pytest.mark.parametrize("seed", range(4))
def test_equals_removal(seed: int, group_norm: str) -> None:
    selector = Perturbation(redundancy="none", group_norm=group_norm, n_probes=4)
    c = candidates(
        probes=selector.probes(), group=3, n_old=8, n_forgotten=2, n_chunk=8, dtype=torch.float64, seed=seed, batch=1
    )
    found = selector.score(c, 3)
    torch.testing.assert_close(found.score, brute_force(c, group_norm), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("group_norm", ["mean", "sum"])
def test_equals_removal_in_float32(group_norm: str) -> None:
    selector = Perturbation(redundancy="none", group_norm=group_norm, n_probes=4)
    exact = candidates(probes=selector.probes(), n_old=8, n_forgotten=2, n_chunk=8, dtype=torch.float64, batch=1)
    wanted = brute_force(exact, group_norm)
    found = selector.score(to_float32(exact), 3).score
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def to_float32(c: Candidates) -> Candidates:
    """The same candidates in single precision."""
    tokens = dataclasses.replace(c.tokens, keys=c.tokens.keys.float(), values=c.tokens.values.float(), hidden=None)
    assert c.output_weight is not None
    return dataclasses.replace(c, tokens=tokens, queries=c.queries.float(), output_weight=c.output_weight.float())


def attended(sharpness: float) -> Candidates:
    """All queries look at candidate 3, the more the sharper: at 12, 1 - A is about 1e-5; at 100 it underflows."""
    c = candidates(probes=Probes("last", 3), n_old=0, n_forgotten=0, n_chunk=9, dtype=torch.float64, batch=1, seed=2)
    keys = c.tokens.keys.clone()
    keys[:, :, 3] = c.queries.view(1, 2, 2, 3, -1).mean(dim=(2, 3))
    queries = keys[:, :, 3].repeat_interleave(2, dim=1).unsqueeze(2).expand_as(c.queries)
    size = (queries * queries).sum(-1, keepdim=True) * c.scaling
    tokens = dataclasses.replace(c.tokens, keys=keys)
    return dataclasses.replace(c, tokens=tokens, queries=queries / size * sharpness)


@pytest.mark.parametrize("group_norm", ["mean", "sum"])
@pytest.mark.parametrize("sharpness", [12.0, 17.0, 25.0])
def test_a_token_that_gets_nearly_all_attention(sharpness: float, group_norm: str) -> None:
    """1 - A and v - o lose all their digits there in float32; the score must not."""
    selector = Perturbation(redundancy="none", group_norm=group_norm)
    c = attended(sharpness)
    attention = next(c.attention_blocks())[0]
    assert (1 - attention.amax(-1) < 2e-3).any()
    wanted = brute_force(c, group_norm)
    torch.testing.assert_close(selector.score(c, 3).score, wanted, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(selector.score(to_float32(c), 3).score.double(), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("group_norm", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_attention_on_one_token_is_finite(dtype: torch.dtype, group_norm: str) -> None:
    """A = 1 exactly: nothing else is seen, or all else underflows. What is left without it is then no output at all."""
    c = attended(5000.0)
    c = c if dtype == torch.float64 else to_float32(c)
    assert (next(c.attention_blocks())[0].amax(-1) == 1).all()
    found = Perturbation(redundancy="none", group_norm=group_norm).score(c, 3).score
    assert found.isfinite().all()
    assert (found.argmax(-1) == 3).all()
    alone = candidates(n_old=0, n_chunk=1, n_forgotten=0, dtype=dtype)
    wanted = brute_force(alone, group_norm)
    torch.testing.assert_close(Perturbation(redundancy="none", group_norm=group_norm).score(alone, 1).score, wanted)


def test_group_norm_is_at_most_the_sum_of_the_heads() -> None:
    """|| sum of changes || <= sum of || changes || = N x mean, and equal for a single head."""
    for group in (1, 3):
        c = candidates(probes=Probes("spread", 5), group=group, dtype=torch.float64)
        mean, total = (Perturbation(redundancy="none", group_norm=n).score(c, 3).score for n in ("mean", "sum"))
        assert (total <= group * mean * (1 + 1e-9)).all()
        assert torch.allclose(total, group * mean) == (group == 1)


def test_blocks_of_probes_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    from omnimem_train.memory import selector as selector_module

    c = candidates(probes=Probes("all"), dtype=torch.float64)
    wanted = Perturbation().score(c, 3).score
    monkeypatch.setattr(selector_module, "BLOCK_NUMBERS", 5 * 2 * 2 * 2 * c.n)
    assert len(list(c.attention_blocks())) > 3
    torch.testing.assert_close(Perturbation().score(c, 3).score, wanted)


def test_gram_matrices_are_those_of_the_projection() -> None:
    c = candidates(group=2, dtype=torch.float64)
    assert c.output_weight is not None
    gram, d = Change(c).gram, 8
    for g in range(2):
        for h in range(2):
            for k in range(2):
                left, right = (c.output_weight[:, (2 * g + x) * d : (2 * g + x + 1) * d] for x in (h, k))
                torch.testing.assert_close(gram[g, h, k], left.T @ right)


def test_probes() -> None:
    assert Perturbation().probes() == Probes("spread", 64)
    assert Perturbation(n_probes=0).probes() == Probes("all")


def test_approximate_is_the_bound_of_critical_kv() -> None:
    """Mean attention times the L1 norm of the projected value, each averaged over the group."""
    selector = make_selector("perturbation", approximate=True, redundancy="none")
    c = candidates(selector, dtype=torch.float64)
    assert c.output_weight is not None
    attention = next(c.attention_blocks())[0]
    for g in range(2):
        i, norms = 20, []
        for head in (2 * g, 2 * g + 1):
            norms.append((c.output_weight[:, head * 8 : (head + 1) * 8] @ c.tokens.values[0, g, i]).abs().sum())
        sees = c.query_rows >= i
        wanted = attention[0, g, :, sees, i].mean() * sum(norms) / 2
        assert selector.score(c, 3).score[0, g, i] == pytest.approx(float(wanted))


def test_a_repeated_token_of_loud_values_yields_to_its_copy() -> None:
    """Default redundancy: (1 - rho) of an exact earlier copy is 0."""
    selector = make_selector("perturbation")
    c = candidates(selector, n_forgotten=0, dtype=torch.float64)
    visual = (c.tokens.modality[0, 0] == 1).nonzero().flatten().tolist()
    keys, values = c.tokens.keys.clone(), c.tokens.values.clone()
    keys[:, :, visual[2]], values[:, :, visual[2]] = keys[:, :, visual[-4]], 100.0
    scored = selector.score(dataclasses.replace(c, tokens=dataclasses.replace(c.tokens, keys=keys, values=values)), 3)
    assert scored.score[:, :, visual[2]].abs().max() < 1e-9 * scored.score.max()
    assert scored.importance is not None
    assert (scored.importance[:, :, visual[2]] > scored.importance.median()).all()
    assert math.isclose(float(scored.redundancy[0, 0, visual[2]]), 1.0)  # type: ignore[index]
