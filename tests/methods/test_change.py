"""What an update changes, in factors: held against dense matrices in float64, by hand and for every method."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.lora.adapter import Factors, delta, pack
from fedtune.messages import AdmittedUpdate, ClientUpdate, LoraResult, ProbeResult, Size
from fedtune.methods import METHODS
from fedtune.methods.change import (
    Change,
    change_of,
    exact_square,
    extent_of,
    product_change,
    product_terms,
    quick_square,
    size_of,
    squared_product,
)
from fedtune.methods.method import end_of
from fedtune.seeds import generator

ADAPTERS = sorted(set(METHODS) - {"fedkseed"})
MODULES = {"q": (6, 5), "v": (2, 5)}


def whole(parts: Iterable[Change]) -> Change:
    """All parts of a change as one."""
    whole = Change()
    for part in parts:
        whole = Change(
            {**whole.product, **part.product},
            {**whole.factors, **part.factors},
            {**whole.saved, **part.saved},
            {**whole.scalars, **part.scalars},
        )
    return whole


def dense(change: Change, module: str) -> Any:
    return delta(product_change(change.product[module]))


@given(m=st.integers(1, 6), n=st.integers(1, 6), r=st.integers(1, 4), p=st.integers(0, 4), key=st.integers(0, 2**32))
def test_the_factored_change_is_the_dense_one(m: int, n: int, r: int, p: int, key: int) -> None:
    p, rng = min(p, r), generator(key)
    a0, da, db = (rng.standard_normal(shape).astype(np.float32) for shape in ((r, n), (r, n), (m, r)))
    b0 = rng.standard_normal((m, p)).astype(np.float32)
    whole = np.concatenate([b0, np.zeros((m, r - p), np.float32)], axis=1).astype(np.float64)
    end = (a0 + da).astype(np.float64)
    moved = (whole + db) @ end - whole @ (end - da)
    terms = product_terms(a0 + da, da=da, db=db, b0=b0)
    np.testing.assert_allclose(delta(product_change(terms)), moved, atol=1e-12)
    extent = extent_of([Change(product={"x": terms})])
    assert extent.sizes["change"].norm == pytest.approx(np.linalg.norm(moved), abs=1e-9)


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("wire_dtype", ["fp32", "bf16", "int8", "int4"])
def test_every_methods_change_is_the_clients_end_minus_its_start(name: str, wire_dtype: str, federate: Any) -> None:
    rank = 2
    federation = federate(MODULES, max_rank=3 if METHODS[name].ranks == "any" else 2, saved={"head": np.ones(4, "f4")})
    method = METHODS[name]
    state = federation.state(method, wire_dtype=wire_dtype)
    for _ in range(2):  # in the second round the start is no longer zero
        asked = federation.assign(method, state, ("anna", rank, 2.0, 3))
        update = federation.answer(asked, examples=3)
        start, change = federation.start(asked), whole(method.change(state, federation.blueprint, asked, update))
        ends = end_of(pack(start), update)
        for module in MODULES:
            end = {side: ends.get(f"{module}.{side}", getattr(start[module], side)).astype(np.float64) for side in "ab"}
            np.testing.assert_allclose(dense(change, module), end["b"] @ end["a"] - delta(start[module]), atol=1e-5)
            np.testing.assert_allclose(change.factors[f"{module}.b"], end["b"] - start[module].b, atol=1e-6)
            if asked.lora.train == "ab":
                np.testing.assert_allclose(change.factors[f"{module}.a"], end["a"] - start[module].a, atol=1e-6)
        np.testing.assert_array_equal(change.saved["head"], np.full(4, 3, np.float32))
        state = method.aggregate(state, [update])


def test_differences_of_factors_are_multiplied_out(federate: Any) -> None:
    federation, method = federate(MODULES, max_rank=2), METHODS["flora"]
    state = federation.state(method, mode="continue")
    for _ in range(2):
        asked = federation.assign(method, state, ("anna", 2, 2.0, 3))
        update = federation.answer(asked)
        change, start = whole(method.change(state, federation.blueprint, asked, update)), federation.start(asked)
        for module in MODULES:
            da, db = (update.lora.tensors[f"{module}.{side}"].astype(np.float64) for side in "ab")
            moved = (start[module].b + db) @ (start[module].a + da) - delta(start[module])
            np.testing.assert_allclose(dense(change, module), moved, atol=1e-6)
        # The very function that is summed: with one client the state moves by its change.
        after = method.aggregate(state, [update])
        for module in MODULES:
            moved = delta(method.adapter(after)[module]) - (
                delta(method.adapter(state)[module]) if module in method.adapter(state) else 0
            )
            np.testing.assert_allclose(moved, dense(change, module), atol=1e-6)
        state = after


def test_a_rank_that_a_client_has_cut_counts_in_the_change_and_not_among_its_numbers(federate: Any) -> None:
    federation, method = federate({"q": (6, 5)}, max_rank=2), METHODS["hetlora"]
    state = federation.round(method, federation.state(method), [("anna", 2, 1.0, 3)])
    asked = federation.assign(method, state, ("anna", 2, 1.0, 3))
    start = federation.start(asked)["q"]
    still = {"q.a": np.zeros_like(start.a[:1]), "q.b": np.zeros_like(start.b[:, :1])}
    update = AdmittedUpdate(ClientUpdate("anna", 2, 3, LoraResult(still)), upload="difference")
    change = whole(method.change(state, federation.blueprint, asked, update))
    assert extent_of([change]).sizes["factors"].norm == 0
    gone = start.b[:, 1:].astype(np.float64) @ start.a[1:]
    np.testing.assert_allclose(dense(change, "q"), -gone, atol=1e-6)


def test_the_change_of_seeds_is_their_scalars(federate: Any) -> None:
    method = METHODS["fedkseed"]
    federation = federate(MODULES, max_rank=2)
    state = federation.blueprint and method.init(federation.blueprint, method.settings(seeds=16, scalar_step=2.0**-12))
    update = AdmittedUpdate(ClientUpdate("anna", 1, 3, ProbeResult(np.array([3, -4], np.int8))))
    asked = federation.assign(method, state, ("anna", 2, 1.0, 3))
    extent = extent_of(method.change(state, federation.blueprint, asked, update))
    assert extent.sizes == {"scalars": Size(5.0, "scalars")}


def test_the_part_with_the_largest_share_is_named_and_no_number_stays_none() -> None:
    assert size_of({"b": 9.0, "a": 16.0}) == Size(5.0, "a")
    assert size_of({"b": 9.0, "a": 9.0}).largest == "a"
    assert size_of({"b": -1e-20}) == Size(0.0, "b")
    assert size_of({"a": 1.0, "b": float("inf")}) == Size(float("inf"), "b")
    nan = size_of({"a": float("inf"), "b": float("nan"), "c": 1.0})
    assert np.isnan(nan.norm)


@pytest.mark.guarantee("G4")
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("value", [3e38, 1e30, 1e19, -3e38])
def test_a_change_that_float32_cannot_hold_has_no_norm_that_a_bound_admits(
    name: str, value: float, federate: Any
) -> None:
    federation, method = federate(MODULES, max_rank=2, saved={"head": np.full(4, -value, np.float32)}), METHODS[name]
    state = federation.state(method)
    asked = federation.assign(method, state, ("anna", 2, 2.0, 3))
    honest = federation.answer(asked)
    spoilt = LoraResult(
        {key: np.full_like(array, value) for key, array in honest.lora.tensors.items()},
        {"head": np.full(4, value, np.float32)},
    )
    change = method.change(state, federation.blueprint, asked, AdmittedUpdate(ClientUpdate("anna", 1, 3, spoilt)))
    for size in extent_of(change).sizes.values():
        assert not size.norm <= 1e6


@given(
    m=st.integers(512, 600),
    n=st.integers(512, 600),
    second=st.booleans(),
    b_size=st.integers(-37, 37),
    a_size=st.integers(-37, 37),
    left=st.sampled_from([1.0, 0.3, 1e-3, 1e-6, 0.0]),
    key=st.integers(0, 2**32),
)
def test_the_quick_norm_of_a_product_is_the_exact_one_to_a_thousandth(
    m: int, n: int, second: bool, b_size: int, a_size: int, left: float, key: int
) -> None:
    """Of any size that float32 holds, and of terms of which any share cancels."""
    rng = generator(key)
    b = (rng.standard_normal((m, 16)) * 10.0**b_size).astype(np.float32)
    a = (rng.standard_normal((16, n)) * 10.0**a_size).astype(np.float32)
    terms = [Factors(a=a, b=b)]
    if second:
        terms.append(Factors(a=a, b=((left - 1) * b).astype(np.float32)))
    with np.errstate(over="ignore", invalid="ignore"):
        quick, exact = squared_product(terms), exact_square(product_change(terms))
    assert quick == pytest.approx(exact, rel=2e-3, abs=1e-20)


@pytest.mark.guarantee("G4")
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 3e38, -3e38])
@pytest.mark.parametrize("place", ["b", "a", "both"])
@pytest.mark.parametrize("terms", [1, 2])
def test_one_spoilt_number_among_many_leaves_no_norm_that_a_bound_admits(value: float, place: str, terms: int) -> None:
    b, a = np.ones((600, 16), np.float32), np.ones((16, 600), np.float32)
    if place != "a":
        b[3, 2] = value
    if place != "b":
        a[2, 3] = value
    parts = [Factors(a=np.ones_like(a), b=np.ones_like(b)), Factors(a=a, b=b)][-terms:]
    size = extent_of([Change(product={"x": parts}, factors={"x.a": a, "x.b": b})]).sizes
    assert not size["change"].norm <= 1e6
    assert not size["factors"].norm <= 1e6


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_quick_square_is_finite_where_every_number_is(dtype: Any, order: Any) -> None:
    large = float(np.finfo(np.float16).max) if dtype == np.float16 else 3e38
    numbers = np.full((5, 7), large).astype(dtype).copy(order=order)
    with np.errstate(over="ignore", invalid="ignore"):
        assert quick_square(numbers) == pytest.approx(35 * float(numbers[0, 0]) ** 2)
        for bits in (np.inf, np.nan):
            numbers[4, 6] = bits
            assert not np.isfinite(quick_square(numbers))
        # A signalling NaN, which arithmetic would warn of.
        numbers.view(np.uint16 if numbers.itemsize == 2 else np.uint32)[4, 6] = (
            0x7C01 if dtype == np.float16 else (0x7F81 if numbers.itemsize == 2 else 0x7F800001)
        )
        assert np.isnan(quick_square(numbers))


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_change_is_measured_layer_by_layer_and_never_in_memory_as_a_whole(name: str, federate: Any) -> None:
    modules = {f"layers.{index:02d}": (256, 256) for index in range(48)}
    federation, method = federate(modules, max_rank=8), METHODS[name]
    state = federation.state(method)
    asked = federation.assign(method, state, ("anna", 8, 2.0, 3))
    update = federation.answer(asked)
    extent_of(method.change(state, federation.blueprint, asked, update))  # fills what a round computes once
    tracemalloc.start()
    extent = extent_of(method.change(state, federation.blueprint, asked, update))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # In float32 the factors alone are that many; one layer of them is a 48th.
    assert peak < 4 * sum(extent.factors.values()) / 3


def test_ffa_draws_its_a_once_for_a_round(federate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    federation, method = federate(MODULES, max_rank=3), METHODS["ffa"]
    state = federation.state(method)
    asked = federation.assign(method, state, ("anna", 2, 2.0, 3))
    update = federation.answer(asked)
    drawn = extent_of(change_of(state.saved, federation.blueprint, asked, update))
    state.drawn  # noqa: B018  # now it is there
    monkeypatch.setattr("fedtune.methods.change.draw_a", None)
    monkeypatch.setattr("fedtune.methods.ffa.draw_a", None)
    assert extent_of(method.change(state, federation.blueprint, asked, update)) == drawn
