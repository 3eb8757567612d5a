from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import ShapeError
from fedtune.lora import lowrank
from fedtune.lora.adapter import Factors, delta
from fedtune.lora.lowrank import LowRank, compress, energy_kept, truncate, weighted_sum, weighted_sums, zero
from fedtune.seeds import derive, generator
from fedtune.tensors import Array


def f32(values: Any) -> Array:
    return np.array(values, np.float32)


Parts = list[tuple[Factors, float]]


def draw(m: int, n: int, rank: int, *, key: int) -> Factors:
    rng = generator(derive(key, "test.lowrank"))
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((rank, n), (m, rank)))
    return Factors(a=a, b=b)


def dense(parts: Parts) -> Array:
    total: Array = np.sum([weight * delta(factors) for factors, weight in parts], axis=0)
    return total


def relative(low: LowRank, expected: Array) -> float:
    return float(np.linalg.norm(delta(low.factors) - expected) / np.linalg.norm(expected))


def orthonormal(low: LowRank) -> bool:
    eye = np.eye(low.rank)
    return bool(np.abs(low.u.T @ low.u - eye).max() < 1e-6 and np.abs(low.vt @ low.vt.T - eye).max() < 1e-6)


def test_two_ranks_by_hand() -> None:
    first = Factors(a=f32([[1, 0, -1]]), b=f32([[2], [4]]))
    second = Factors(a=f32([[0, 2, 0], [1, 1, 1]]), b=f32([[0.5, 0], [0, 1]]))
    low = weighted_sum([(first, 0.25), (second, 0.75)])
    np.testing.assert_allclose(delta(low.factors), [[0.5, 0.75, -0.5], [1.75, 0.75, -0.25]], atol=1e-6)
    np.testing.assert_allclose(low.s, [2.101334, 0.578270], atol=1e-6)
    assert np.sum(np.square(low.s)) == pytest.approx(4.75)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 60),
    n=st.integers(1, 60),
    ranks=st.lists(st.integers(0, 8), min_size=1, max_size=5),
    size=st.sampled_from([1.0, 1e-6, 1e6]),
    key=st.integers(0, 2**31),
)
def test_the_sum_is_exact_orthonormal_and_of_least_rank(
    m: int, n: int, ranks: list[int], size: float, key: int
) -> None:
    parts = [(draw(m, n, rank, key=key + i), size * (i + 1)) for i, rank in enumerate(ranks)]
    low = weighted_sum(parts)
    assert low.rank <= min(m, n, sum(ranks))
    assert low.u.dtype == low.s.dtype == low.vt.dtype == np.float32
    if low.rank:
        assert relative(low, dense(parts)) < 1e-6
        assert orthonormal(low)
        assert np.all(np.diff(low.s) <= 0)
        assert np.all(np.take_along_axis(low.u, np.abs(low.u).argmax(axis=0)[None], axis=0) > 0)
        again = compress({"x": low.factors})["x"]
        assert again.rank == low.rank
        np.testing.assert_allclose(again.s, low.s, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 60),
    n=st.integers(1, 60),
    ranks=st.lists(st.integers(0, 8), min_size=1, max_size=8),
    bound=st.integers(1, 30),
    key=st.integers(0, 2**31),
)
def test_a_bounded_sum_is_the_best_of_its_rank_and_says_what_it_has_cut(
    m: int, n: int, ranks: list[int], bound: int, key: int
) -> None:
    parts = [(draw(m, n, rank, key=key + i), 1 / (i + 1)) for i, rank in enumerate(ranks)]
    low, whole = weighted_sum(parts, bound), dense(parts)
    u, s, vt = np.linalg.svd(whole, full_matrices=False)
    size = min(bound, int(np.count_nonzero(s > 1e-6 * s[0])))
    assert low.rank == size
    cut = (u[:, size:] * s[size:]) @ vt[size:]
    assert np.linalg.norm(whole - delta(low.factors)) <= (1 + 1e-6) * np.linalg.norm(cut) + 1e-6 * np.linalg.norm(s)
    assert low.dropped == pytest.approx(float(np.sum(s[bound:] ** 2)), abs=1e-10 * np.sum(s**2))
    if size:
        assert orthonormal(low)
    again = lowrank.unpack(lowrank.pack({"x": low}))["x"]
    assert again.dropped == low.dropped


@pytest.mark.parametrize("shape", [(64, 172), (172, 64), (64, 64)])
@pytest.mark.parametrize("decay", [0.95, 0.5])
def test_a_narrow_layers_sum_is_as_accurate_as_its_dense_decomposition(shape: tuple[int, int], decay: float) -> None:
    m, n = shape
    rng = generator(derive(0, "test.narrow"))
    parts = []
    for client in range(10):
        factors = draw(m, n, 16, key=client)
        s = np.float32(decay) ** rng.integers(0, 40, 16).astype(np.float32)
        parts.append((Factors(a=factors.a, b=factors.b * s), 0.1))
    for bound in (None, 32):
        low, exact = weighted_sum(parts, bound), np.linalg.svd(dense(parts), compute_uv=False)
        np.testing.assert_allclose(low.s, exact[: low.rank], rtol=1e-5, atol=1e-7 * exact[0])
        assert orthonormal(low)


def test_gram_and_qr_agree_and_gram_knows_when_it_cannot() -> None:
    factors = draw(50, 70, 12, key=0)
    x, y = factors.b.astype(np.float64), factors.a.astype(np.float64)
    gram, qr = lowrank._by_gram(x, y), lowrank._by_qr(x, y)
    assert gram is not None
    np.testing.assert_allclose(gram.s, qr.s, rtol=1e-12)
    u, vt = gram.vectors(12)
    np.testing.assert_allclose((u * gram.s) @ vt, x @ y, atol=1e-11)
    x[:, 1] = x[:, 0] + 1e-6 * x[:, 1]  # in x' x the difference of these columns has lost most of its digits
    assert lowrank._by_gram(x, y) is None
    almost = np.concatenate([x[:, 2:], x[:, 2:] + 1e-11 * x[::-1, 2:]], axis=1)  # here the probe finds the loss
    assert lowrank._by_gram(almost, np.concatenate([y[2:], -y[2:]])) is None


@pytest.mark.parametrize("change", [1e-4, 1e-6])
def test_a_small_difference_of_large_terms_keeps_its_digits(change: float) -> None:
    base, tiny = draw(80, 90, 8, key=1), draw(80, 90, 8, key=2)
    moved = Factors(a=base.a, b=(base.b + np.float32(change) * tiny.b).astype(np.float32))
    parts = [(moved, 1.0), (base, -1.0)]
    assert relative(weighted_sum(parts), dense(parts)) < 1e-6


def test_what_cancels_leaves_rank_zero() -> None:
    for shape in ((80, 90), (3, 4)):  # stacked, and summed densely
        factors = draw(*shape, 5, key=3)
        assert weighted_sum([(factors, 0.3), (factors, 0.7), (factors, -1.0)]).rank == 0


def test_equal_clients_add_no_rank() -> None:
    factors = draw(80, 90, 5, key=3)
    low = weighted_sum([(factors, 1 / 7)] * 7)
    assert low.rank == 5
    assert relative(low, delta(factors)) < 1e-6
    assert orthonormal(low)


def test_directions_far_apart_in_size_stay_orthonormal() -> None:
    factors = draw(80, 90, 6, key=4)
    graded = Factors(a=factors.a, b=factors.b * f32([1, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5]))
    low = compress({"x": graded})["x"]
    assert low.rank == 6
    assert orthonormal(low)


@pytest.mark.parametrize(("m", "n", "rank"), [(5, 7, 0), (5, 7, 2), (5, 7, 9), (1, 1, 1)])
def test_zero_has_rank_zero_and_works_everywhere(m: int, n: int, rank: int) -> None:
    low = compress({"x": Factors(a=np.zeros((rank, n), np.float32), b=np.zeros((m, rank), np.float32))})["x"]
    assert (low.rank, low.shape) == (0, (m, n))
    assert truncate(low, tau=0.9, max_rank=3).rank == 0
    assert energy_kept(low, low) == 1
    assert lowrank.adapter({"m": low}) == lowrank.smallest(lowrank.adapter({"m": low})) == {}
    assert weighted_sum([(zero(m, n).factors, 1.0), (low.factors, 1.0)]).rank == 0


def test_half_precision_parts_are_summed_in_float64() -> None:
    parts = [(draw(40, 30, 4, key=key), 1 / 3) for key in range(3)]
    half = [(Factors(a=f.a.astype(np.float16), b=f.b.astype(np.float16)), weight) for f, weight in parts]
    assert relative(weighted_sum(half), dense(half)) < 1e-6


def test_parts_of_different_layers_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"one \(out, in\)"):
        weighted_sum([(draw(3, 4, 1, key=0), 1.0), (draw(4, 3, 1, key=0), 1.0)])
    with pytest.raises(ShapeError, match="expected u"):
        LowRank(u=np.zeros((3, 2)), s=np.zeros(1), vt=np.zeros((1, 4)))


def diagonal(*s: float) -> LowRank:
    eye = np.eye(len(s), dtype=np.float32)
    return LowRank(u=eye, s=np.array(s, np.float32), vt=eye)


def test_truncation_by_hand() -> None:
    low = diagonal(4, 3, 2, 1)  # squares 16 + 9 + 4 + 1 = 30
    assert [truncate(low, tau=tau, max_rank=None).rank for tau in (0.5, 16 / 30, 0.54, 0.9, 29 / 30, 1.0)] == [
        1,
        1,
        2,
        3,
        3,
        4,
    ]
    assert truncate(low, tau=1.0, max_rank=2).rank == 2
    assert energy_kept(low, truncate(low, tau=1.0, max_rank=2)) == pytest.approx(25 / 30)


def test_ties_at_the_cut_stay_unless_the_rank_is_limited() -> None:
    low = diagonal(2, 1, 1 - 5e-8, 0.5)
    assert truncate(low, tau=0.7, max_rank=None).rank == 3
    assert truncate(low, tau=0.7, max_rank=2).rank == 2


@settings(max_examples=30, deadline=None)
@given(m=st.integers(2, 30), n=st.integers(2, 30), key=st.integers(0, 2**31), tau=st.floats(0.01, 1.0))
def test_the_reported_error_is_the_true_one_and_tau_is_monotone(m: int, n: int, key: int, tau: float) -> None:
    low = compress({"x": draw(m, n, 6, key=key)})["x"]
    part = truncate(low, tau=tau, max_rank=None)
    assert energy_kept(low, part) >= tau - 1e-7
    assert part.rank <= truncate(low, tau=min(1.0, tau * 1.1), max_rank=None).rank
    whole = delta(low.factors)
    dropped = np.linalg.norm(whole - delta(part.factors)) ** 2 / np.linalg.norm(whole) ** 2
    assert 1 - energy_kept(low, part) == pytest.approx(dropped, abs=1e-6)


def test_flat_forms_give_the_change_back() -> None:
    changes = {**compress({"a.b": draw(30, 40, 3, key=0), "c": draw(4, 3, 3, key=1)}), "none": zero(2, 2)}
    for name, low in lowrank.unpack(lowrank.pack(changes)).items():
        np.testing.assert_array_equal(low.u, changes[name].u)
        np.testing.assert_array_equal(low.vt, changes[name].vt)
    sent = lowrank.smallest(lowrank.adapter(changes))
    assert sent.keys() == {"a.b.a", "a.b.b", "c.w"}
    np.testing.assert_allclose(sent["c.w"], delta(changes["c"].factors), atol=1e-5)


def test_many_modules_at_once_are_each_their_own_sum_to_the_bit() -> None:
    parts = {f"m{i}": [(draw(20 + i, 30, 3, key=i), 0.5), (draw(20 + i, 30, 2, key=i + 50), 0.5)] for i in range(9)}
    together = weighted_sums(parts)
    assert list(together) == list(parts)
    for name, low in together.items():
        alone = weighted_sums({name: parts[name]})[name]
        np.testing.assert_array_equal(low.u, alone.u)
        np.testing.assert_array_equal(low.s, alone.s)
    assert weighted_sums({}) == {}
