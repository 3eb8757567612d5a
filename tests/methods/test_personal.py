"""Linear methods whose clients keep tensors: the mean is over the rest, and the server's own values stay."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedtune.messages import (
    AdmittedUpdate,
    Assignment,
    Blueprint,
    ClientUpdate,
    LoraResult,
    Personal,
    PersonalTrace,
    Plan,
    PlannedClient,
    Training,
)
from fedtune.methods import METHODS, with_settings
from fedtune.methods.method import LinearMethod, Method
from fedtune.methods.personal import with_personal
from fedtune.methods.settings import ServerOptimizer
from fedtune.number_formats import from_wire, to_wire
from fedtune.tensors import Tensors

BLUEPRINT = Blueprint(
    modules={"x": (8, 6), "y": (4, 6)},
    saved={"norm.weight": np.ones(3, np.float32), "head.weight": np.ones((2, 3), np.float32)},
    max_rank=4,
    seed=5,
)
SHARE_A, FEDBN = Personal("share-a"), Personal("fedbn")


def started(name: str, personal: Personal | None, **settings: Any) -> tuple[Method[Any], Any]:
    method = METHODS[name]
    own = method.settings(**{"wire_dtype": "fp32", **settings})
    whole = with_settings(with_personal(method, personal), own)
    return whole, whole.init(BLUEPRINT, own)


def planned(client: str = "ann", rank: int = 4) -> PlannedClient:
    return PlannedClient(Plan(client, rank, 2.0, Training(steps=1)))


def answer(order: Assignment, personal: Personal, seed: int = 0) -> AdmittedUpdate:
    """Return an update with numbers for all that an order lets a client send."""
    rng = np.random.default_rng(seed)
    rank, own = order.plan.rank, personal.in_full()
    tensors: dict[str, Any] = {}
    for name, (m, n) in BLUEPRINT.modules.items():
        shapes = {f"{name}.a": (rank, n), f"{name}.b": (m, rank)}
        shapes = {key: shape for key, shape in shapes.items() if key[-1] in order.lora.train}
        tensors |= {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    saved = {key: rng.standard_normal(t.shape).astype(np.float32) for key, t in BLUEPRINT.saved.items()}
    result = LoraResult(
        {key: t for key, t in tensors.items() if not own.keeps(key)},
        {key: t for key, t in saved.items() if not own.keeps(key)},
        personal=PersonalTrace(b"", bytes(8)),
    )
    return AdmittedUpdate(ClientUpdate(order.plan.client, order.round, 3, result), upload=order.lora.upload)


@pytest.mark.parametrize("name", ["fedit", "zeropad"])
def test_b_of_share_a_is_in_no_order_and_in_no_mean(name: str) -> None:
    method, state = started(name, SHARE_A)
    assert isinstance(method, LinearMethod)
    order = method.assign(state, 1, planned())
    assert sorted(order.lora.blobs["local"]) == ["x.a", "y.a"]
    assert order.lora.personal == SHARE_A.in_full()
    updates = [answer(order, SHARE_A, seed) for seed in range(3)]
    assert sorted(method.contribution(state, updates[0])) == sorted(method.current(state))
    assert not any(key.endswith(".b") for key in method.current(state))
    after = method.aggregate(state, updates)
    assert all(after.tensors[key].tobytes() == state.tensors[key].tobytes() for key in ("x.b", "y.b"))
    mean = np.mean([update.lora.tensors["x.a"] for update in updates], axis=0)
    np.testing.assert_allclose(after.tensors["x.a"] - state.tensors["x.a"], mean, atol=1e-6)


def test_codes_and_scales_of_what_stays_are_left_out_of_orders() -> None:
    method, state = started("fedit", SHARE_A, wire_dtype="int8")
    blob = method.assign(state, 1, planned()).lora.blobs["local"]
    assert sorted(blob) == ["x.a", "x.a.scales", "y.a", "y.a.scales"]


def test_what_a_cohort_is_sent_is_one_mapping_so_that_it_is_encoded_once() -> None:
    method, state = started("fedit", SHARE_A)
    orders = [method.assign(state, 1, planned(name)) for name in ("ann", "bob")]
    assert orders[0].lora.blobs["local"] is orders[1].lora.blobs["local"]
    ranks = started("zeropad", SHARE_A)
    small, large = (ranks[0].assign(ranks[1], 1, planned("ann", rank)).lora.blobs["local"] for rank in (2, 4))
    assert (small["x.a"].shape, large["x.a"].shape) == ((2, 6), (4, 6))


def test_norms_that_stay_do_not_move_on_the_server_by_a_bit() -> None:
    method, state = started("fedit", FEDBN, server_learning_rate=0.3)
    order = method.assign(state, 1, planned())
    assert sorted(order.lora.blobs["saved"]) == ["head.weight"]
    after = method.aggregate(state, [answer(order, FEDBN, seed) for seed in range(3)])
    assert after.saved["norm.weight"].tobytes() == state.saved["norm.weight"].tobytes()
    assert (after.saved["head.weight"] != state.saved["head.weight"]).all()


def test_an_optimiser_remembers_nothing_of_what_stays() -> None:
    method, state = started("fedit", SHARE_A, server_optimizer=ServerOptimizer("fedadam"), server_learning_rate=0.01)
    assert sorted(key for key in state.momentum if key.endswith(".b")) == []
    after = method.aggregate(state, [answer(method.assign(state, 1, planned()), SHARE_A)])
    assert after.inner.tensors["x.b"].tobytes() == state.inner.tensors["x.b"].tobytes()


@pytest.mark.parametrize(("name", "keep"), [("fedit", "*.b"), ("fedit", "*.a"), ("zeropad", "x.*"), ("ffa", "x.b")])
def test_the_bound_of_an_update_is_that_of_one_that_leaves_what_stays_as_it_is(name: str, keep: str) -> None:
    personal = Personal("fedrep", keep=[keep])
    method, state = started(name, personal)
    plain, _ = started(name, None)
    order, whole = method.assign(state, 1, planned(rank=2 if name == "zeropad" else 4)), None
    update = answer(order, personal)
    whole = plain.assign(state, 1, PlannedClient(order.plan))
    blanks: Tensors = {
        key: np.zeros((shape[0], order.plan.rank) if key.endswith(".b") else (order.plan.rank, shape[1]), np.float32)
        for module, shape in BLUEPRINT.modules.items()
        for key in (f"{module}.a", f"{module}.b")
        if key[-1] in order.lora.train
    }
    padded = replace(
        update, update=replace(update.update, result=replace(update.lora, tensors={**blanks, **update.lora.tensors}))
    )
    expected = [part for part in plain.change(state, BLUEPRINT, whole, padded)]
    for ours, theirs in zip(method.change(state, BLUEPRINT, order, update), expected, strict=True):
        assert ours.factors.keys() == theirs.factors.keys()
        for key in ours.factors:
            np.testing.assert_array_equal(ours.factors[key], theirs.factors[key])
        for key, terms in ours.product.items():
            for left, right in zip(terms, theirs.product[key], strict=True):
                np.testing.assert_array_equal(left.b @ left.a, right.b @ right.a)


@pytest.mark.parametrize("personal", [None, Personal("finetune")])
def test_without_a_state_a_method_is_as_it_was(personal: Personal | None) -> None:
    assert with_personal(METHODS["flora"], personal) is METHODS["flora"]


def test_a_second_model_changes_nothing_of_an_order_but_that_it_is_asked_for() -> None:
    method, state = started("fedit", Personal("ditto"))
    plain, _ = started("fedit", None)
    ours, theirs = (each.assign(state, 1, planned()) for each in (method, plain))
    assert ours.lora.personal == Personal("ditto", strength=0.1)
    assert replace(ours, task=replace(ours.lora, personal=None)) == theirs
    assert from_wire(ours.lora.blobs["local"]).keys() == to_wire(state.tensors, "fp32").keys()
