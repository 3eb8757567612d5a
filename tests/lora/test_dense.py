from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.lora import dense, lowrank
from fedtune.lora.adapter import Factors, delta
from fedtune.lora.dense import Dense, add, cut_down, energy, energy_kept, leading, pack, unpack, with_lead
from fedtune.seeds import derive, generator
from fedtune.tensors import Array


def matrix(m: int, n: int, *, key: int, decay: float = 0.9) -> Array:
    """A matrix whose singular values fall by a factor."""
    rng = generator(derive(key, "test.dense"))
    u, v = (np.linalg.qr(rng.standard_normal((size, min(m, n))))[0] for size in (m, n))
    whole: Array = ((u * decay ** np.arange(min(m, n))) @ v.T).astype(np.float32)
    return whole


def draw(m: int, n: int, rank: int, *, key: int) -> Factors:
    rng = generator(derive(key, "test.dense.factors"))
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((rank, n), (m, rank)))
    return Factors(a=a, b=b)


def as_matrix(change: dense.Summed) -> Array:
    return change.weight.astype(np.float64) if isinstance(change, Dense) else delta(change.factors)


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 50),
    n=st.integers(1, 50),
    size=st.integers(1, 8),
    decay=st.floats(0.3, 0.9),
    key=st.integers(0, 2**31),
)
def test_leading_triples_are_those_of_a_full_decomposition(m: int, n: int, size: int, decay: float, key: int) -> None:
    weight = matrix(m, n, key=key, decay=decay)
    low, s = leading(weight, np.zeros((0, n), np.float32), size), np.linalg.svd(weight, compute_uv=False)
    np.testing.assert_allclose(low.s, s[: low.rank], rtol=1e-4, atol=1e-6)
    assert low.rank == min(size, m, n)
    eye = np.eye(low.rank)
    assert np.abs(low.u.T @ low.u - eye).max() < 2e-6
    assert np.abs(low.vt @ low.vt.T - eye).max() < 2e-6


def test_triples_stay_orthonormal_and_leading_over_hundreds_of_sums() -> None:
    change: dense.Summed = with_lead(matrix(60, 50, key=0), np.zeros((0, 50), np.float32), size=6, tau=1.0)
    exact = as_matrix(change)
    for number in range(300):
        part = draw(60, 50, 3, key=number)
        change = add(change, [(part, 1e-3)], max_rank=None, lead=6, tau=1.0)
        exact = exact + 1e-3 * delta(part)
    assert isinstance(change, Dense)
    assert np.linalg.norm(change.weight - exact) < 1e-6 * np.linalg.norm(exact)
    np.testing.assert_allclose(change.lead.s, np.linalg.svd(exact, compute_uv=False)[:6], rtol=1e-4)
    assert np.abs(change.lead.u.T @ change.lead.u - np.eye(6)).max() < 2e-6


def test_a_change_is_a_matrix_from_half_its_numbers_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "NARROW", 8)
    before, forms = lowrank.zero(40, 40), []
    change: dense.Summed = before
    total = np.zeros((40, 40))
    for number in range(6):  # 40 * 40 / 2 = 800 numbers are those of rank 10
        part = draw(40, 40, 4, key=number)
        change = add(change, [(part, 0.5)], max_rank=None, lead=4, tau=1.0)
        total += 0.5 * delta(part)
        forms.append(isinstance(change, Dense))
        assert np.linalg.norm(as_matrix(change) - total) < 1e-6 * np.linalg.norm(total)
        np.testing.assert_allclose(change.s[:1], np.linalg.svd(total, compute_uv=False)[:1], rtol=1e-3)
    assert forms == [False, False, True, True, True, True]
    bounded = add(change, [(draw(40, 40, 4, key=9), 0.5)], max_rank=5, lead=4, tau=1.0)
    assert not isinstance(bounded, Dense)
    assert bounded.rank == 5


def test_what_is_split_adds_up_whatever_the_triples_accuracy() -> None:
    weight = matrix(30, 20, key=1, decay=1.0)  # equal singular values: no triple is better than another
    change = with_lead(weight, np.zeros((0, 20), np.float32), size=4, tau=1.0)
    assert isinstance(change, Dense)
    rest, first = change.components(3, change.rank), change.components(0, 3)
    assert isinstance(rest, Dense)
    np.testing.assert_allclose(rest.weight + delta(first.factors), weight, atol=1e-6)
    assert change.components(0, change.rank) is change
    assert change.components(1, 3).rank == 2
    np.testing.assert_array_equal(delta(change.factors), weight)
    wide = Dense(weight.T, lowrank.zero(20, 30))
    np.testing.assert_array_equal(delta(wide.factors), weight.T)
    assert wide.factors.rank == 20
    assert lowrank.smallest({"x": wide.factors})["x.w"] is wide.weight
    assert lowrank.smallest({"x": change.factors})["x.w"] is change.weight


@pytest.mark.parametrize("tau", [0.5, 0.9, 0.999, 1.0])
def test_triples_grow_until_they_hold_the_share_that_is_sent(tau: float) -> None:
    weight = matrix(40, 30, key=2, decay=0.8)
    change = with_lead(weight, np.zeros((0, 30), np.float32), size=1, tau=tau)
    sent = cut_down(change, tau=tau, max_rank=None)
    assert energy_kept(change, sent) >= tau - 1e-6
    s = np.linalg.svd(weight, compute_uv=False)
    if tau < 1:
        assert sent.rank == 1 + int(np.searchsorted(np.cumsum(s**2)[:-1], tau * np.sum(s**2)))
        assert cut_down(change, tau=tau, max_rank=2).rank == min(2, sent.rank)
    else:
        assert sent is change
        assert cut_down(change, tau=tau, max_rank=1).rank == 1
    assert energy(change) == pytest.approx(float(np.sum(s.astype(np.float64) ** 2)), rel=1e-6)


def test_a_change_of_zero_has_no_energy() -> None:
    change = with_lead(np.zeros((6, 5), np.float32), np.zeros((0, 5), np.float32), size=2, tau=0.9)
    assert energy(change) == 0.0
    assert energy_kept(change, change) == 1.0


def test_flat_forms_give_both_kinds_back() -> None:
    whole = with_lead(matrix(9, 7, key=3), np.zeros((0, 7), np.float32), size=2, tau=1.0)
    changes = {"a": whole, "b": lowrank.compress({"b": draw(5, 4, 2, key=0)})["b"]}
    again = unpack(pack(changes))
    assert isinstance(again["a"], Dense)
    np.testing.assert_array_equal(again["a"].weight, as_matrix(whole))
    np.testing.assert_array_equal(again["b"].s, changes["b"].s)
