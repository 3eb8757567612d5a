"""What an update changes, in factors: held against dense matrices in float64, by hand and for every method."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.lora.adapter import delta
from fedtune.messages import AdmittedUpdate, ClientUpdate, LoraResult, ProbeResult, Size
from fedtune.methods import METHODS
from fedtune.methods.change import Change, product_change, size_of, sizes
from fedtune.seeds import generator

ADAPTERS = sorted(set(METHODS) - {"fedkseed"})
MODULES = {"q": (6, 5), "v": (2, 5)}


@given(m=st.integers(1, 6), n=st.integers(1, 6), r=st.integers(1, 4), p=st.integers(0, 4), key=st.integers(0, 2**32))
def test_the_factored_change_is_the_dense_one(m: int, n: int, r: int, p: int, key: int) -> None:
    p, rng = min(p, r), generator(key)
    a0, da, db = (rng.standard_normal(shape).astype(np.float32) for shape in ((r, n), (r, n), (m, r)))
    b0 = rng.standard_normal((m, p)).astype(np.float32)
    whole = np.concatenate([b0, np.zeros((m, r - p), np.float32)], axis=1).astype(np.float64)
    end = (a0 + da).astype(np.float64)
    dense = (whole + db) @ end - whole @ (end - da)
    change = product_change(a0 + da, da=da, db=db, b0=b0)
    np.testing.assert_allclose(delta(change), dense, atol=1e-12)
    assert sizes(Change(product={"x": change}))["change"].norm == pytest.approx(np.linalg.norm(dense), abs=1e-9)


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("wire_dtype", ["fp32", "bf16"])
def test_every_methods_change_is_the_clients_end_minus_its_start(name: str, wire_dtype: str, federate: Any) -> None:
    rank = 2
    federation = federate(MODULES, max_rank=3 if METHODS[name].ranks == "any" else 2, saved={"head": np.ones(4, "f4")})
    method = METHODS[name]
    state = federation.state(method, wire_dtype=wire_dtype)
    for _ in range(2):  # in the second round the start is no longer zero
        asked = federation.assign(method, state, ("anna", rank, 2.0, 3))
        update = federation.answer(asked, examples=3)
        start, change = federation.start(asked), method.change(state, federation.blueprint, asked, update)
        for module in MODULES:
            end = {
                side: update.lora.tensors.get(f"{module}.{side}", getattr(start[module], side)).astype(np.float64)
                for side in "ab"
            }
            dense = end["b"] @ end["a"] - delta(start[module])
            np.testing.assert_allclose(delta(change.product[module]), dense, atol=1e-5)
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
        change, start = method.change(state, federation.blueprint, asked, update), federation.start(asked)
        for module in MODULES:
            da, db = (update.lora.tensors[f"{module}.{side}"].astype(np.float64) for side in "ab")
            dense = (start[module].b + db) @ (start[module].a + da) - delta(start[module])
            np.testing.assert_allclose(delta(change.product[module]), dense, atol=1e-6)
        # The very function that is summed: with one client the state moves by its change.
        after = method.aggregate(state, [update])
        for module in MODULES:
            moved = delta(method.adapter(after)[module]) - (
                delta(method.adapter(state)[module]) if module in method.adapter(state) else 0
            )
            np.testing.assert_allclose(moved, delta(change.product[module]), atol=1e-6)
        state = after


def test_a_rank_that_a_client_has_cut_counts_in_the_change_and_not_among_its_numbers(federate: Any) -> None:
    federation, method = federate({"q": (6, 5)}, max_rank=2), METHODS["hetlora"]
    state = federation.round(method, federation.state(method), [("anna", 2, 1.0, 3)])
    asked = federation.assign(method, state, ("anna", 2, 1.0, 3))
    start = federation.start(asked)["q"]
    kept = {"q.a": start.a[:1], "q.b": start.b[:, :1]}
    update = AdmittedUpdate(ClientUpdate("anna", 2, 3, LoraResult(kept)))
    change = method.change(state, federation.blueprint, asked, update)
    assert sizes(change)["factors"].norm == 0
    gone = start.b[:, 1:].astype(np.float64) @ start.a[1:]
    np.testing.assert_allclose(delta(change.product["q"]), -gone, atol=1e-6)


def test_the_change_of_seeds_is_their_scalars(federate: Any) -> None:
    method = METHODS["fedkseed"]
    federation = federate(MODULES, max_rank=2)
    state = federation.blueprint and method.init(federation.blueprint, method.settings(seeds=16, scalar_step=2.0**-12))
    update = AdmittedUpdate(ClientUpdate("anna", 1, 3, ProbeResult(np.array([3, -4], np.int8))))
    asked = federation.assign(method, state, ("anna", 2, 1.0, 3))
    assert sizes(method.change(state, federation.blueprint, asked, update)) == {"scalars": Size(5.0, "scalars")}


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
    for size in sizes(change).values():
        assert not size.norm <= 1e6
