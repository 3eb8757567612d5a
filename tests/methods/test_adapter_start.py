"""A run starts at an adapter exactly, whatever the method, or is refused with the reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import ConfigError
from fedtune.lora.adapter import Adapter, Factors, delta, draw_a, unpack
from fedtune.messages import Blueprint, Plan, PlannedClient, Training
from fedtune.methods import METHODS
from fedtune.methods.adapter_start import fill, fill_leading, project
from fedtune.seeds import derive

SHAPES = {"x": (5, 7), "y": (6, 4), "z": (3, 3)}
BLUEPRINT = Blueprint(SHAPES, saved={}, max_rank=4, seed=3)
STARTING = [name for name, method in METHODS.items() if method.start]


def adapter_of(ranks: dict[str, int], *, seed: int = 0) -> Adapter:
    rng = np.random.default_rng(seed)
    return {
        name: Factors(
            a=rng.normal(size=(rank, SHAPES[name][1])).astype(np.float32),
            b=rng.normal(size=(SHAPES[name][0], rank)).astype(np.float32),
        )
        for name, rank in ranks.items()
    }


def within(ranks: dict[str, int]) -> Adapter:
    """Return an adapter whose rows lie in those of the A that `ffa` draws from the blueprint's seed."""
    key, rng = derive(BLUEPRINT.seed, "lora.shared_a"), np.random.default_rng(1)
    return {
        name: Factors(
            a=(rng.normal(size=(rank, 4)) @ draw_a(key, name, 4, SHAPES[name][1])).astype(np.float32),
            b=rng.normal(size=(SHAPES[name][0], rank)).astype(np.float32),
        )
        for name, rank in ranks.items()
    }


def started(method: str, adapter: Adapter) -> Any:
    made = METHODS[method]
    assert made.start is not None
    return made.start(made.init(BLUEPRINT, made.settings()), adapter, {})


def test_every_method_that_trains_adapters_starts_from_one() -> None:
    assert set(STARTING) == set(METHODS) - {"fedkseed"}


@pytest.mark.parametrize("method", STARTING)
@pytest.mark.parametrize("ranks", [{"x": 4, "y": 4, "z": 3}, {"x": 2, "z": 1}, {"y": 3}], ids=str)
def test_the_global_model_before_round_1_is_the_adapter(method: str, ranks: dict[str, int]) -> None:
    adapter = within(ranks) if method == "ffa" else adapter_of(ranks)
    model = METHODS[method].global_model(started(method, adapter)).adapter
    for name, (m, n) in SHAPES.items():
        expected = delta(adapter[name]) if name in adapter else np.zeros((m, n))
        got = delta(model[name]) if name in model else np.zeros((m, n))
        np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("method", ["flora", "fedex"])
def test_these_take_more_ranks_than_they_train(method: str) -> None:
    adapter = adapter_of({"x": 9, "y": 5})
    model = METHODS[method].global_model(started(method, adapter)).adapter
    for name, factors in adapter.items():
        np.testing.assert_allclose(delta(model[name]), delta(factors), atol=2e-5)


@pytest.mark.parametrize("method", ["fedit", "zeropad", "hetlora", "flexlora"])
def test_the_others_name_the_module_whose_rank_is_too_large(method: str) -> None:
    expected = (
        rf"adapter.start: expected at most rank 4 in every module, .*'{method}' trains; got 5 in x; set adapter.rank"
    )
    with pytest.raises(ConfigError, match=expected):
        started(method, adapter_of({"x": 5}))


def test_ffa_refuses_a_change_outside_the_rows_of_its_frozen_a() -> None:
    with pytest.raises(ConfigError, match=r"adapter.start: expected an adapter over the A that .* seed draws.*% of x"):
        started("ffa", adapter_of({"x": 2}))


def test_places_that_an_adapter_leaves_can_be_trained() -> None:
    tensors = METHODS["fedit"].init(BLUEPRINT, METHODS["fedit"].settings()).tensors
    filled = fill(tensors, adapter_of({"x": 2}), method="fedit")
    np.testing.assert_array_equal(filled["x.a"][2:], tensors["x.a"][2:])
    assert np.abs(filled["x.a"]).min() > 0
    assert not filled["x.b"][:, 2:].any()
    np.testing.assert_array_equal(filled["y.b"], tensors["y.b"])


def test_a_client_of_smaller_rank_gets_the_largest_components() -> None:
    """Columns of 1 and 10: the larger one comes last in the adapter, and first in what a client of rank 1 trains."""
    a = np.eye(2, 7, dtype=np.float32)
    b = np.zeros((5, 2), np.float32)
    b[0, 0], b[1, 1] = 1.0, 10.0
    method = METHODS["zeropad"]
    planned = PlannedClient(Plan("c", 1, 2.0, Training(steps=1)))
    state = started("zeropad", {"x": Factors(a=a, b=b)})
    state = replace(state, settings=replace(state.settings, wire_dtype="fp32"))
    sent = delta(unpack(dict(method.assign(state, 0, planned).lora.blobs["local"]))["x"])
    assert sent[1, 1] == pytest.approx(10.0, rel=1e-5)
    assert abs(sent[0, 0]) < 1e-5
    assert fill_leading(state.tensors, {}, method="zeropad") == state.tensors


@given(st.integers(1, 3), st.integers(0, 2**16))
def test_a_projection_keeps_every_change_within_the_rows(rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(3, 6)).astype(np.float32)
    factors = Factors(a=(rng.normal(size=(rank, 3)) @ a).astype(np.float32), b=rng.normal(size=(4, rank)))
    b = project({"m": factors}, {"m": a})["m.b"]
    np.testing.assert_allclose(b @ a, factors.b @ factors.a, rtol=1e-4, atol=1e-3)
