from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import ShapeError
from fedtune.lora.adapter import Factors, delta, draw_a, inner, norm, pack, stack, unpack
from fedtune.seeds import derive, generator
from fedtune.tensors import Array


def f32(values: Any) -> Array:
    return np.array(values, np.float32)


def draw(m: int, n: int, rank: int, *, key: int) -> Factors:
    rng = generator(derive(key, "test.adapter"))
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((rank, n), (m, rank)))
    return Factors(a=a, b=b)


def test_stacking_by_hand_gives_seven_where_averaging_gives_six() -> None:
    first, second = (Factors(a=f32([[a]]), b=f32([[b]])) for b, a in [(1, 2), (3, 4)])
    assert delta(stack([({"m": first}, 0.5), ({"m": second}, 0.5)])["m"]) == 7


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 20),
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    key=st.integers(0, 2**31),
)
def test_the_delta_of_a_stack_is_the_weighted_sum_of_deltas(m: int, n: int, ranks: list[int], key: int) -> None:
    parts = [(draw(m, n, rank, key=key + i), 0.1 + i) for i, rank in enumerate(ranks)]
    stacked = stack([({"m": factors}, weight) for factors, weight in parts])["m"]
    assert stacked.rank == sum(ranks)
    expected = sum(weight * delta(factors) for factors, weight in parts)
    np.testing.assert_allclose(delta(stacked), expected, atol=1e-4, rtol=1e-5)


def test_a_missing_module_adds_nothing() -> None:
    one, two = draw(3, 4, 2, key=0), draw(5, 6, 1, key=1)
    stacked = stack([({"x": one}, 1.0), ({"y": two}, 1.0)])
    assert {name: factors.rank for name, factors in stacked.items()} == {"x": 2, "y": 1}


def test_stacking_two_sizes_of_one_module_is_refused_by_name() -> None:
    with pytest.raises(ShapeError, match="x: expected one"):
        stack([({"x": draw(3, 4, 1, key=0)}, 1.0), ({"x": draw(4, 3, 1, key=0)}, 1.0)])


def test_inner_products_and_norms_need_no_dense_matrix() -> None:
    left, right = draw(7, 9, 3, key=0), draw(7, 9, 5, key=1)
    assert inner(left, right) == pytest.approx(np.sum(delta(left) * delta(right)))
    assert norm({"x": left, "y": right}) == pytest.approx(np.sqrt(np.sum(delta(left) ** 2) + np.sum(delta(right) ** 2)))
    assert norm({}) == 0


def test_norms_by_hand() -> None:
    assert norm({"m": Factors(a=f32([[1, 0, -1]]), b=f32([[1], [2]]))}) == pytest.approx(3.162278)


def test_a_fresh_a_is_bounded_and_has_the_norm_of_kaiming_uniform() -> None:
    a = draw_a(5, "m", 16, 3000)
    assert a.dtype == np.float32
    assert np.abs(a).max() <= 1 / np.sqrt(3000)
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1 / np.sqrt(3), rtol=0.05)
    assert np.abs(a.mean()) < 1e-3


def test_a_smaller_rank_draws_the_first_rows() -> None:
    np.testing.assert_array_equal(draw_a(5, "m", 3, 17), draw_a(5, "m", 8, 17)[:3])


def test_module_and_key_both_count() -> None:
    drawn = [draw_a(key, module, 1, 8).tobytes() for key in (1, 2) for module in ("m", "k")]
    assert len(set(drawn)) == 4


def test_pack_and_unpack_are_inverse_even_where_names_hold_dots_and_factors_look_alike() -> None:
    adapter = {"model.layers.0.q_proj": draw(4, 4, 4, key=0), "model.layers.0.a": draw(1, 7, 1, key=1)}
    flat = pack(adapter)
    assert flat.keys() == {f"{name}.{side}" for name in adapter for side in "ab"}
    for name, factors in unpack(flat).items():
        np.testing.assert_array_equal(factors.a, adapter[name].a)
        np.testing.assert_array_equal(factors.b, adapter[name].b)


@pytest.mark.parametrize(
    ("drop", "add", "message"),
    [("m.a", None, "both factors"), ("m.b", None, "both factors"), (None, "m.w", "only factors"), (None, "m", "only")],
)
def test_unpaired_and_strange_tensors_are_refused(drop: str | None, add: str | None, message: str) -> None:
    flat = dict(pack({"m": draw(3, 4, 2, key=0)}))
    if drop:
        del flat[drop]
    if add:
        flat[add] = np.zeros((3, 4))
    with pytest.raises(ShapeError, match=message):
        unpack(flat)


def test_factors_that_disagree_on_the_rank_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"a \(2, 4\) and b \(3, 1\)"):
        Factors(a=np.zeros((2, 4)), b=np.zeros((3, 1)))
