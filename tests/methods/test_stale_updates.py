"""Updates whose clients started from an earlier state: what they add, by hand and against sums of whole products."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.lora.adapter import Factors, delta
from fedtune.methods import METHODS, with_settings
from fedtune.methods.method import LinearMethod
from fedtune.methods.serialization import digest, encode
from fedtune.methods.settings import RobustRule, ServerOptimizer
from fedtune.tensors import Array
from tests.methods.conftest import Federate

ALLOWED = sorted(name for name, method in METHODS.items() if not method.why_not_asynchronous)
FLEET = [("ann", 2, 1.0, 1), ("bob", 2, 1.0, 3), ("cyd", 2, 1.0, 4)]


def f32(values: Any) -> Array:
    return np.array(values, np.float32)


def test_an_update_adds_its_change_times_its_discount_to_the_current_values(federate: Any) -> None:
    """w = 10 now, ann started from 1 and ended at 3 (discount 1/2), bob from 10 and ended at 14; p = 1/4 and 3/4."""
    method, federation = METHODS["fedit"], federate({"m": (1, 1)}, max_rank=1, saved={"head": f32([10])})
    now = replace(federation.state(method), round=4, tensors={"m.a": f32([[10]]), "m.b": f32([[10]])})
    before = replace(now, round=1, tensors={"m.a": f32([[1]]), "m.b": f32([[1]])}, saved={"head": f32([1])})
    ann = federate.update("ann", {"m": Factors(a=f32([[3]]), b=f32([[3]]))}, examples=1)
    bob = federate.update("bob", {"m": Factors(a=f32([[14]]), b=f32([[14]]))}, examples=3)
    ann, bob = with_head(ann, 3), with_head(bob, 14)
    after = method.aggregate(now, [replace(ann, origin=before, discount=0.5), bob])
    # 10 + 1/4 * 1/2 * (3 - 1) + 3/4 * (14 - 10). Divided by the sum of p s it would be 13.71.
    assert after.tensors["m.a"] == after.tensors["m.b"] == after.saved["head"] == 13.25
    fresh = method.aggregate(now, [replace(ann, origin=before), bob])
    assert fresh.tensors["m.a"] == fresh.saved["head"] == 13.5


def with_head(update: Any, value: float) -> Any:
    result = replace(update.lora, saved={"head": f32([value])})
    return replace(update, update=replace(update.update, result=result))


def test_a_buffer_of_stale_updates_alone_takes_a_shorter_step(federate: Any) -> None:
    """The trap of multiplying weights by discounts and dividing by their sum: then staleness would change nothing."""
    method, federation = METHODS["ffa"], federate({"m": (3, 5)}, max_rank=2)
    state = federation.state(method)
    updates = federation.updates(method, state, FLEET)
    whole, half = (
        method.aggregate(state, [replace(update, discount=discount) for update in updates]).tensors["m.b"]
        for discount in (1.0, 0.5)
    )
    np.testing.assert_allclose(half, whole / 2, rtol=1e-6)


@pytest.mark.parametrize("name", ALLOWED)
@pytest.mark.parametrize("rule", ["none", "clip", "median"])
def test_fresh_updates_are_aggregated_to_the_same_bits(federate: Any, name: str, rule: Any) -> None:
    """An update that started from the current state, named or not, is what it always was."""
    method, federation = METHODS[name], federate({"m": (4, 6)}, max_rank=2, saved={"head": np.ones(3, np.float32)})
    if isinstance(method, LinearMethod):
        method = with_settings(method, method.settings(robust=RobustRule(rule)))
    state = federation.state(method)
    state = federation.round(method, state, FLEET)
    updates = federation.updates(method, state, FLEET)
    plain = method.aggregate(state, updates)
    assert digest(encode(plain)) == digest(encode(method.aggregate(state, [replace(u, origin=None) for u in updates])))
    moved = method.aggregate(state, [replace(u, origin=state, discount=0.5) for u in updates])
    assert digest(encode(plain)) != digest(encode(moved))


@pytest.mark.parametrize("mode", ["continue", "reinit"])
def test_flora_adds_the_products_of_stale_updates_exactly(federate: Any, mode: str) -> None:
    """Delta += sum of p_i s_i (b a - b0 a0), each with the b0 a0 that its own client was sent."""
    method, federation = METHODS["flora"], federate({"m": (7, 6)}, max_rank=2)
    states = [federation.state(method, mode=mode, state_max_rank="exact")]
    for size in (0.1, 0.2):
        states.append(federation.round(method, states[-1], FLEET, size=size))
    versions, discounts = [0, 2, 1], [3**-0.5, 1.0, 2**-0.5]
    total, expected, updates = 8, dense(states[-1]), []
    for member, version, discount in zip(FLEET, versions, discounts, strict=True):
        order = federation.assign(method, states[version], member)
        begin, end = federation.start(order)["m"], federation.end(order, size=0.3)["m"]
        expected = expected + member[3] / total * discount * (product(end) - product(begin))
        origin = None if version == 2 else states[version]
        answer = federation.answer(order, size=0.3, examples=member[3])
        updates.append(replace(answer, origin=origin, discount=discount))
    after = method.aggregate(states[-1], updates)
    np.testing.assert_allclose(dense(after), expected, rtol=0, atol=2e-6 * float(np.abs(expected).max()))
    # Taken for updates of the current state, they would add products of starts that their clients never had.
    wrong = method.aggregate(states[-1], [replace(update, origin=None) for update in updates])
    assert float(np.abs(dense(wrong) - expected).max()) > 1e-3


def product(factors: Factors) -> Array:
    return np.asarray(factors.b.astype(np.float64) @ factors.a.astype(np.float64))


def dense(state: Any) -> Array:
    return np.asarray(delta(METHODS["flora"].adapter(state)["m"]), np.float64)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.floats(-4, 4), st.floats(-4, 4), st.floats(0.01, 1), st.integers(1, 9)), min_size=1),
    st.floats(-4, 4),
)
def test_every_buffer_moves_by_the_weighted_discounted_changes(
    members: list[tuple[float, float, float, int]], now: float
) -> None:
    method = METHODS["fedit"]
    federation = Federate()({"m": (1, 1)}, max_rank=1)
    state = replace(federation.state(method), tensors={"m.a": f32([[now]]), "m.b": f32([[now]])})
    updates, total = [], sum(examples for *_, examples in members)
    for place, (start, end, discount, examples) in enumerate(members):
        update = Federate.update(f"c{place}", {"m": Factors(a=f32([[end]]), b=f32([[end]]))}, examples=examples)
        origin = replace(state, tensors={"m.a": f32([[start]]), "m.b": f32([[start]])})
        updates.append(replace(update, origin=origin, discount=discount))
    moved = sum(n / total * s * (float(f32(end)) - float(f32(start))) for start, end, s, n in members)
    after = method.aggregate(state, updates)
    np.testing.assert_allclose(after.tensors["m.a"], float(f32(now)) + moved, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["fedavgm", "fedadam"])
def test_server_optimisers_step_along_the_discounted_change(federate: Any, optimizer: Any) -> None:
    """The pseudo-gradient is sum of p_i s_i u_i, whatever rule makes a step of it."""
    plain, chosen = METHODS["fedit"], ServerOptimizer(optimizer)
    method, federation = (
        with_settings(plain, plain.settings(server_optimizer=chosen)),
        federate({"m": (1, 1)}, max_rank=1),
    )
    state = federation.state(method)
    first = replace(state, inner=replace(state.inner, tensors={"m.a": f32([[1]]), "m.b": f32([[1]])}))
    now = replace(state, inner=replace(state.inner, tensors={"m.a": f32([[10]]), "m.b": f32([[10]])}))
    ann = federate.update("ann", {"m": Factors(a=f32([[3]]), b=f32([[3]]))}, examples=1)
    stale = method.aggregate(now, [replace(ann, origin=first, discount=0.5)])
    same = federate.update("ann", {"m": Factors(a=f32([[11]]), b=f32([[11]]))}, examples=1)
    assert digest(encode(stale)) == digest(encode(method.aggregate(now, [same])))


def test_methods_that_refuse_say_what_to_take() -> None:
    assert ALLOWED == ["fedit", "ffa", "flora", "zeropad"]
    for name in METHODS.keys() - set(ALLOWED):
        assert "take " in METHODS[name].why_not_asynchronous
