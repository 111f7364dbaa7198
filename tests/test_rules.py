"""What single rules do, against plain loops: redundancy, history, and each rule's own promises."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from candidates import candidates
from torch import Tensor

from omnimem_train.memory import (
    AUDIO,
    TEXT,
    VISUAL,
    Candidates,
    EvidenceSelector,
    LayerMemory,
    ScoringSelector,
    Selector,
    choose,
    make_allocation,
    make_selector,
    selectors,
)
from omnimem_train.memory import redundancy as redundancy_module
from omnimem_train.memory.infinipot import InfiniPotV, frames_of, novelty, pooled
from omnimem_train.memory.perturbation import output_norm
from omnimem_train.memory.redundancy import later_key, neighbour_cosine, sequence_cosine

shared = make_allocation("shared")

# Redundancy and history -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 7, None])
def test_later_key_by_brute_force(block: int | None) -> None:
    c = candidates(dtype=torch.float64)
    keys, modality = c.tokens.keys, c.tokens.modality
    found = later_key(keys, modality, block)
    for b, g, i in torch.cartesian_prod(*(torch.arange(n) for n in c.shape)).tolist():
        rho = 0.0
        for j in range(i + 1, c.n):
            if modality[b, g, i] == modality[b, g, j] != TEXT:
                rho = max(rho, float(torch.cosine_similarity(keys[b, g, i], keys[b, g, j], dim=0)))
        assert found[b, g, i] == pytest.approx(rho, abs=1e-12)


def test_later_key_never_holds_the_whole_map(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []

    def watched(x: Tensor, y: Tensor) -> Tensor:
        held.append(x.shape[:-1].numel() * y.shape[-2])
        return x @ y.mT

    monkeypatch.setattr(redundancy_module, "products", watched)
    monkeypatch.setattr(redundancy_module, "BLOCK_NUMBERS", 2**16)
    s = 1024
    later_key(torch.randn(1, 2, s, 4), torch.full((1, 2, s), VISUAL))
    assert max(held) <= 2**16 < 2 * s * s
    assert sum(held) < 2 * s * s * 0.6  # what lies before a key is not computed


def test_neighbour_cosine_by_brute_force() -> None:
    c = candidates(dtype=torch.float64)
    x, modality = c.tokens.values, c.tokens.modality
    found = neighbour_cosine(x, modality)
    for b, g, i in torch.cartesian_prod(*(torch.arange(n) for n in c.shape)).tolist():
        same = [j for j in range(c.n) if modality[b, g, j] == modality[b, g, i]]
        at = same.index(i)
        near = [same[k] for k in (at - 1, at + 1) if 0 <= k < len(same)]
        cosines = [float(torch.cosine_similarity(x[b, g, i], x[b, g, j], dim=0)) for j in near]
        assert found[b, g, i] == pytest.approx(sum(cosines) / max(1, len(cosines)), abs=1e-12)


def test_neighbour_cosine_of_a_lonely_token_is_zero() -> None:
    assert neighbour_cosine(torch.ones(1, 1, 3, 2), torch.tensor([[[TEXT, VISUAL, AUDIO]]])).tolist() == [[[0, 0, 0]]]


def test_sequence_cosine_counts_a_missing_neighbour_as_one() -> None:
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]])
    assert sequence_cosine(x).tolist() == [[0.5, 0.5, 1.0]]
    assert sequence_cosine(x[:, :1]).tolist() == [[1.0]]


SCORING = [name for name, cls in selectors().items() if issubclass(cls, ScoringSelector)]


@pytest.mark.parametrize("name", SCORING)
def test_redundancy_is_one_factor_for_all_rules(name: str) -> None:
    """score' = (score - lowest if negative) x (1 - rho), for tokens the rule does not protect."""
    plain, discounted = (make_selector(name, redundancy=r) for r in ("none", "later_key"))
    if plain.shared_heads or name == "critical_kv":
        pytest.skip("averages over heads, or applies rho before its first stage: see the next test")
    assert isinstance(plain, ScoringSelector)
    c = candidates(plain, n_chunk=90, dtype=torch.float64)
    score, rho = plain.measure(c, 9).score, later_key(c.tokens.keys, c.tokens.modality)
    lowest = score.masked_fill(c.is_text, float("inf")).amin(-1, keepdim=True).clamp(max=0)
    protected = plain.protected(c)
    free = torch.ones(c.n, dtype=torch.bool) if protected is None else ~protected
    if name == "infinipot_v":
        free = ~plain.forced(c, 9)  # type: ignore[attr-defined]
    free = free & ~c.is_text
    wanted = ((score - lowest) * (1 - rho))[free.expand(c.shape)]
    found = discounted.score(c, 9)
    torch.testing.assert_close(found.score[free.expand(c.shape)], wanted)
    assert found.redundancy is not None
    torch.testing.assert_close(found.redundancy, rho)


def test_redundancy_where_it_is_more_than_a_factor() -> None:
    """Rules with one set for all heads average over heads; CriticalKV applies rho to the attention it starts from."""
    for name in ("tova", "omnimem"):
        selector = make_selector(name, redundancy="later_key")
        c = candidates(selector, dtype=torch.float64)
        free = ~c.is_text[0, 0] & (torch.arange(c.n) < c.n - 1)
        plain = make_selector(name).score(c, 5).score
        rho = later_key(c.tokens.keys, c.tokens.modality)
        wanted = (plain * (1 - rho)).mean(1, keepdim=True).expand(c.shape)
        torch.testing.assert_close(selector.score(c, 5).score[..., free], wanted[..., free])
    critical = make_selector("critical_kv", redundancy="later_key", window_size=4, first_stage_ratio=0.0)
    c = candidates(critical, dtype=torch.float64)
    y = make_selector("snapkv", redundancy="later_key", window_size=4).score(c, 5).score
    found = critical.score(c, 5).score
    second = found < 1e30
    torch.testing.assert_close(found[second], ((y + 1e-4) * output_norm(c))[second])


@pytest.mark.parametrize("name", SCORING)
def test_of_duplicates_the_newest_stays(name: str) -> None:
    """A picture token whose key comes again later is the first to go, whatever the rule thinks of it."""
    options = {"window_size": 1} if name in ("snapkv", "critical_kv") else {}
    options |= {"first_stage_ratio": 0.0} if name == "critical_kv" else {}
    selector = make_selector(name, redundancy="later_key", **options)
    c = candidates(selector, n_chunk=30, n_forgotten=0, dtype=torch.float64)
    media, visual = ((~c.is_text[0, 0]).nonzero(), (c.tokens.modality[0, 0] == VISUAL).nonzero())
    older, newer = int(visual[5]), int(visual[-3])
    keys = c.tokens.keys.clone()
    keys[:, :, older] = keys[:, :, newer]
    c = dataclasses.replace(c, tokens=dataclasses.replace(c.tokens, keys=keys))
    score = selector.score(c, 5).score[0, 0, media]
    lowest = score <= score.min() + 1e-6
    assert lowest[media == older].all()
    assert not lowest[media == newer].any()
    rows, _ = choose(c, selector, shared, len(media) - int(lowest.sum()))
    assert older not in rows[0, 0]
    assert newer in rows[0, 0]


# Single rules ---------------------------------------------------------------------------------------------------------


def stream(selector: Selector, n_chunks: int, n: int, budget: int, seed: int = 0) -> LayerMemory:
    """What is left of a stream of plain visual chunks, the way the stream loop does it."""
    memory = LayerMemory.empty(1, 1, 2)
    for chunk in range(n_chunks):
        row = torch.arange(chunk * n, (chunk + 1) * n)[None]
        new = LayerMemory.from_chunk(
            torch.zeros(1, 1, n, 2),
            torch.zeros(1, 1, n, 2),
            row.unsqueeze(-1).expand(1, n, 3),
            torch.full((1, n), VISUAL, dtype=torch.int8),
            row.float(),
            row,
        )
        tokens = memory.append(new)
        c = Candidates(tokens, memory.n_tokens, torch.zeros(1, 1, 0, 2), row[0, :0], 1.0, seed=seed * 1000 + chunk)
        rows, scored = choose(c, selector, shared, budget)
        if scored is not None and scored.importance is not None:
            tokens = tokens.with_evidence(scored.importance)
        memory = tokens.gather(rows)
    return memory


def test_random_samples_the_whole_stream_evenly() -> None:
    """40 chunks of 10, budget 20: without stored draws almost all that is left would be from the last few chunks."""
    kept = torch.cat([stream(make_selector("random"), 40, 10, 20, seed).index.flatten() for seed in range(40)])
    quarters = torch.histc(kept.float(), bins=4, min=0, max=400) / kept.numel()
    assert ((quarters > 0.19) & (quarters < 0.31)).all(), quarters


def test_uniform_stays_even_over_the_whole_stream() -> None:
    kept = stream(make_selector("uniform"), 40, 10, 20).index.flatten()
    step = kept.diff().float()
    assert kept[0] == 0
    assert kept[-1] >= 375
    assert step.max() <= 2 * step.mean() + 1


@pytest.mark.parametrize("n_sink", [0, 3, 50])
def test_sliding_window_keeps_sinks_and_the_newest(n_sink: int) -> None:
    kept = stream(make_selector("sliding_window", n_sink=n_sink), 6, 10, 8).index.flatten().tolist()
    sinks = min(n_sink, 8)
    assert kept == [*range(sinks), *range(60 - (8 - sinks), 60)]


def test_omnimem_is_the_papers_formula() -> None:
    selector = make_selector("omnimem", lam=0.5)
    c = candidates(selector, dtype=torch.float64)
    found = selector.score(c, 5)
    assert c.tokens.hidden is not None
    assert found.importance is not None
    attention = torch.cat([a for a, _ in c.attention_blocks()], dim=3).flatten(1, 2)  # (B, H, P, S)
    for b in range(2):
        modality = c.tokens.modality[b, 0]
        for i in range(c.n):
            a = attention[b, :, :, i].mean(0).sum()
            same = [j for j in range(c.n) if modality[j] == modality[i]]
            at = same.index(i)
            near = [same[k] for k in (at - 1, at + 1) if 0 <= k < len(same)]
            x = c.tokens.hidden[b]
            s = sum(torch.cosine_similarity(x[i], x[j], dim=0) for j in near) / len(near)
            assert found.importance[b, 0, i] == pytest.approx(float(a), rel=1e-9)
            assert found.score[b, 1, i] == pytest.approx(float(a**0.5 * (1 - s)), rel=1e-9)


def test_omnimem_approximate_importance_is_one_softmax_of_mean_logits() -> None:
    selector = make_selector("omnimem", importance="approximate")
    c = candidates(selector, dtype=torch.float64)
    keys = c.tokens.keys.repeat_interleave(c.group, dim=1)
    logits = (torch.einsum("bhpd,bhsd->bhps", c.queries, keys) * c.scaling).mean(1)
    logits = logits.masked_fill(torch.arange(c.n) > c.query_rows[:, None], float("-inf"))
    found = selector.score(c, 5).importance
    assert found is not None
    torch.testing.assert_close(found[:, 0], logits.softmax(-1).sum(1))


@pytest.mark.parametrize("name", [n for n, cls in selectors().items() if issubclass(cls, EvidenceSelector)])
def test_history_averages_what_was_stored(name: str) -> None:
    fresh, averaged = (make_selector(name, history=h) for h in ("fresh", "average"))
    c = candidates(fresh, dtype=torch.float64)
    new, mixed = fresh.score(c, 5).importance, averaged.score(c, 5).importance
    assert new is not None
    assert mixed is not None
    old = c.tokens.evidence[..., : c.n_memory].double()
    torch.testing.assert_close(mixed[..., : c.n_memory], (new[..., : c.n_memory] + old) / 2)
    torch.testing.assert_close(mixed[..., c.n_memory :], new[..., c.n_memory :])
    assert averaged.keeps_evidence
    assert not fresh.keeps_evidence
    _, scored = choose(c, averaged, shared, c.n)
    assert scored is not None, "evidence is measured also while nothing has to go"
    assert choose(c, fresh, shared, c.n)[1] is None


def test_critical_kv_spends_its_first_stage_on_media() -> None:
    """Text that attention loves takes no place of the assured."""
    selector = make_selector("critical_kv", window_size=1, first_stage_ratio=1.0)
    c = candidates(selector)
    rows, scored = choose(c, selector, shared, 6)
    assert scored is not None
    assert ((scored.score > 1e30) & ~c.is_text).sum(-1).eq(6).all()
    assert (scored.score > 1e30).gather(-1, rows).sum(-1).eq(6).all()


def test_infinipot_reads_partial_frames() -> None:
    """Slots come from positions: dropping tokens of old frames leaves novelty and pooling of the others alone."""
    selector = InfiniPotV()
    whole, partial = (
        candidates(selector, mix="visual", n_forgotten=n, n_chunk=22, batch=1, dtype=torch.float64) for n in (0, 9)
    )
    index = partial.tokens.index
    assert index.shape[-1] < whole.n
    frames, frames_left = (frames_of(c, VISUAL, False) for c in (whole, partial))
    two = torch.full((1, 2), 2)
    wanted = novelty(whole.tokens.keys, frames, two).gather(-1, index)
    torch.testing.assert_close(novelty(partial.tokens.keys, frames_left, two), wanted)
    visual = partial.tokens.modality == VISUAL
    ones = torch.ones(whole.shape, dtype=torch.float64)
    for layer in (0, 1, 3):  # (in layer 2 the token line closes up)
        wanted = pooled(ones, frames, layer, 4)
        assert (wanted[whole.tokens.modality == VISUAL].min() < 1) == (layer < 3), "borders lose score"
        found = pooled(torch.ones(partial.shape, dtype=torch.float64), frames_left, layer, 4)
        torch.testing.assert_close(found[visual], wanted.gather(-1, index)[visual])


def test_infinipot_where_the_original_stops() -> None:
    """No reference frame means one; layers beyond a multiple of four are not pooled."""
    none, one = (InfiniPotV(tar_ratio=1.0, query_ratio=r) for r in (0.0, 0.3))
    c = candidates(none, mix="visual", n_chunk=12)
    assert (frames_of(c, VISUAL, False).n_frames * 0.3).floor().eq(1).all()
    assert torch.equal(choose(c, none, shared, 15)[0], choose(c, one, shared, 15)[0])
    size = torch.rand(c.shape)
    frames = frames_of(c, VISUAL, False)
    for layer in (3, 4, 5):
        assert torch.equal(pooled(size, frames, layer, 6), size.masked_fill(~frames.members, 0))


def test_infinipot_moving_grid() -> None:
    """Rows and columns that count from their frame's time describe the same picture."""
    selector, moving = make_selector("infinipot_v"), make_selector("infinipot_v", grid="moving")
    c = candidates(selector, mix="visual", n_chunk=40)
    positions = c.tokens.positions.clone()
    positions[..., 1:] += torch.where(c.is_text, 0, positions[..., 0]).unsqueeze(-1)
    shifted = dataclasses.replace(c, tokens=dataclasses.replace(c.tokens, positions=positions))
    assert torch.equal(choose(c, selector, shared, 15)[0], choose(shifted, moving, shared, 15)[0])
    assert not torch.equal(choose(c, selector, shared, 15)[0], choose(shifted, selector, shared, 15)[0])


def test_infinipot_forces_the_newest_frames_first() -> None:
    selector = make_selector("infinipot_v", tar_ratio=1.0, query_ratio=1.0)
    c = candidates(selector, mix="visual")
    rows, _ = choose(c, selector, shared, 7)
    media = (~c.is_text).cumsum(-1) - 1
    newest = (media >= media.amax(-1, keepdim=True) - 6) & ~c.is_text
    assert newest.gather(-1, rows).sum(-1).eq(7).all()
