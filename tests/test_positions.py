"""A moved key is the key computed at its new place, and compacting closes gaps without changing order."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from omnimem_train.memory import AUDIO, TEXT, VISUAL, LayerMemory, Rotary, compact, end

HALF = 8


def rotary(dtype: torch.dtype = torch.float32, base: float = 1e6) -> Rotary:
    """Three axes in sections of 2, 3, 3 frequencies, as M-RoPE has them."""
    frequencies = base ** (-torch.arange(HALF, dtype=torch.float64) / HALF)
    return Rotary(frequencies.to(dtype), torch.tensor([0, 0, 1, 1, 1, 2, 2, 2]))


def computed(keys: Tensor, positions: Tensor, r: Rotary) -> Tensor:
    """Keys (..., 2 * HALF) rotated pair by pair of channels, with angles rounded as a model does in that precision."""
    result = torch.empty_like(keys)
    for i in range(HALF):
        angle = positions[..., r.axis[i]].to(r.inverse_frequencies.dtype) * r.inverse_frequencies[i]
        a, b = keys[..., i], keys[..., i + HALF]
        result[..., i] = a * angle.cos() - b * angle.sin()
        result[..., i + HALF] = b * angle.cos() + a * angle.sin()
    return result


def places(seed: int, largest: int) -> Tensor:
    return torch.randint(0, largest, (2, 2, 9, 3), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_turning_adds_positions(dtype: torch.dtype) -> None:
    r, keys = rotary(dtype), torch.randn(2, 2, 9, 2 * HALF, dtype=dtype)
    old, by = places(0, 100), places(1, 100) - 50
    found = r.turn(computed(keys, old, r), by)
    torch.testing.assert_close(found, computed(keys, old + by, r), rtol=0, atol=1e-5)
    torch.testing.assert_close(r.turn(found, -by), computed(keys, old, r), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("largest", [100, 90_000, 1_000_000])
def test_moving_is_computing_at_the_new_position(dtype: torch.dtype, largest: int) -> None:
    """Also an hour and more into a stream (25 positions a second), where float32 angles are themselves rounded."""
    r, keys = rotary(dtype), torch.randn(2, 2, 9, 2 * HALF, dtype=dtype)
    old, new = places(0, largest), places(1, 100)
    found = r.move(computed(keys, old, r), old, new)
    torch.testing.assert_close(found, computed(keys, new, r), rtol=0, atol=1e-5)


def test_half_precision_is_turned_in_float32() -> None:
    r, keys = rotary(), torch.randn(2, 2, 9, 2 * HALF)
    half = r.turn(keys.bfloat16(), places(0, 50))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, r.turn(keys.bfloat16().float(), places(0, 50)).bfloat16(), rtol=0, atol=0)
    low = Rotary(r.inverse_frequencies.bfloat16(), r.axis)
    assert low.angles(places(0, 50)).dtype == torch.float32


def memory(time: list[int], modality: list[int], dtype: torch.dtype = torch.float64) -> tuple[LayerMemory, Tensor]:
    """A memory at these times (one head), and its keys before rotation."""
    n = len(time)
    kind = torch.tensor([modality], dtype=torch.int8)
    rows = torch.arange(n) % 3
    at = torch.tensor([time])
    flat = kind != VISUAL
    positions = torch.stack([at, torch.where(flat, at, rows), torch.where(flat, at, rows + 4)], dim=-1)
    keys = torch.randn(1, 1, n, 2 * HALF, dtype=dtype, generator=torch.Generator().manual_seed(3))
    index = torch.arange(n)[None]
    rotated = computed(keys, positions.unsqueeze(1), rotary(dtype))
    return LayerMemory.from_chunk(rotated, keys, positions, kind, index.float(), index), keys


def test_compact_closes_gaps_and_keeps_order() -> None:
    time, kinds = [2, 3, 10, 10, 12, 40, 40, 41], [TEXT, VISUAL, VISUAL, AUDIO, AUDIO, VISUAL, VISUAL, TEXT]
    m, keys = memory(time, kinds)
    found = compact(m, rotary(torch.float64))
    assert found.positions[0, 0, :, 0].tolist() == [2, 3, 4, 4, 5, 6, 6, 7]
    flat = (m.modality != VISUAL).unsqueeze(-1)
    assert torch.equal(found.positions[..., 1:].masked_fill(flat, 0), m.positions[..., 1:].masked_fill(flat, 0))
    for axis in (1, 2):
        assert torch.equal(found.positions[..., axis][flat[..., 0]], found.positions[..., 0][flat[..., 0]])
    torch.testing.assert_close(found.keys, computed(keys, found.positions, rotary(torch.float64)), rtol=0, atol=1e-5)
    for name in ("values", "modality", "time_s", "index", "evidence"):
        assert torch.equal(getattr(found, name), getattr(m, name))


@pytest.mark.parametrize(
    ("max_gap", "wanted"), [(1, [0, 1, 2, 3]), (3, [0, 2, 5, 6]), (10, [0, 2, 12, 13]), (99, None)]
)
def test_larger_gaps_may_stay(max_gap: int, wanted: list[int] | None) -> None:
    m, _ = memory([0, 2, 50, 51], [AUDIO] * 4)
    found = compact(m, rotary(torch.float64), max_gap)
    assert found.positions[0, 0, :, 0].tolist() == (wanted or [0, 2, 50, 51])
    if wanted is None:
        assert torch.equal(found.keys, m.keys)


def test_compact_follows_time_not_rows() -> None:
    """Sound after its pictures in the stream but at the same moments: steps are taken in order of time."""
    m, keys = memory([5, 9, 5, 9], [VISUAL, VISUAL, AUDIO, AUDIO])
    found = compact(m, rotary(torch.float64))
    assert found.positions[0, 0, :, 0].tolist() == [5, 6, 5, 6]
    torch.testing.assert_close(found.keys, computed(keys, found.positions, rotary(torch.float64)), rtol=0, atol=1e-5)


def test_heads_and_streams_move_by_themselves() -> None:
    one, _ = memory([0, 5, 9], [AUDIO] * 3)
    two, _ = memory([0, 1, 30], [AUDIO] * 3)

    def joined(dim: int) -> LayerMemory:
        parts = zip(one.tensors(), two.tensors(), strict=True)
        return LayerMemory.from_tensors(
            None if a is None or b is None else torch.cat([a, b], dim=dim) for a, b in parts
        )

    r = rotary(torch.float64)
    for dim in (0, 1):
        found = compact(joined(dim), r).keys
        assert torch.equal(found, torch.cat([compact(one, r).keys, compact(two, r).keys], dim=dim))


def test_compact_again_changes_nothing() -> None:
    m, _ = memory([2, 3, 10, 10, 12], [TEXT, VISUAL, VISUAL, AUDIO, AUDIO])
    once = compact(m, rotary(torch.float64))
    twice = compact(once, rotary(torch.float64))
    assert torch.equal(once.positions, twice.positions)
    assert torch.equal(once.keys, twice.keys)


def test_gradient_goes_through_a_move() -> None:
    m, _ = memory([0, 5, 9], [AUDIO] * 3)
    keys = m.keys.clone().requires_grad_()
    moved = compact(dataclasses.replace(m, keys=keys), rotary(torch.float64)).keys
    weight = torch.randn_like(moved)
    (gradient,) = torch.autograd.grad((moved * weight).sum(), keys)
    # a rotation: the gradient is the weight turned the other way
    torch.testing.assert_close(gradient.norm(dim=-1), weight.norm(dim=-1))


def test_empty_memory() -> None:
    nothing = LayerMemory.empty(2, 1, 2 * HALF)
    assert compact(nothing, rotary()).n_tokens == 0
    assert end(nothing).tolist() == [0, 0]


def test_end_is_after_the_latest_of_any_head() -> None:
    m, _ = memory([2, 9, 7], [AUDIO] * 3)
    assert end(m).tolist() == [10]
