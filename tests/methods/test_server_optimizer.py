"""FedAvgM, FedAdam and FedYogi: steps computed by hand, plain at its limits, durable to the last bit."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import StoreError
from fedtune.lora.adapter import Factors, pack
from fedtune.messages import AdmittedUpdate, ClientUpdate, LoraResult
from fedtune.methods import METHODS, with_settings
from fedtune.methods.method import LinearMethod, Method
from fedtune.methods.serialization import decode, digest, encode
from fedtune.methods.server_optimizer import RULES, OptimizedState, with_server_optimizer
from fedtune.methods.settings import ServerOptimizer

LINEAR = [name for name, method in sorted(METHODS.items()) if isinstance(method, LinearMethod)]
SAVED = {"head": np.zeros(1, np.float32)}
HALF = {"beta1": 0.5, "beta2": 0.75, "tau": 0.5}


def optimized(method_name: str, **optimizer: Any) -> LinearMethod[Any]:
    method = METHODS[method_name]
    assert isinstance(method, LinearMethod)
    return with_server_optimizer(method, ServerOptimizer(**optimizer))


def clients(*values: float) -> list[AdmittedUpdate]:
    """Clients of one example each, whose b and head have a value."""
    results = [
        LoraResult(
            pack({"m": Factors(a=np.ones((1, 1), np.float32), b=np.full((1, 1), value, np.float32))}),
            saved={"head": np.full(1, value, np.float32)},
        )
        for value in values
    ]
    return [AdmittedUpdate(ClientUpdate(f"c{place}", 1, 1, result)) for place, result in enumerate(results)]


def first(method: Method[Any], federate: Any, **chosen: Any) -> Any:
    """The state before round 1: b and head are 0."""
    return federate({"m": (1, 1)}, max_rank=1, saved=SAVED).state(method, **chosen)


def moved(state: OptimizedState) -> tuple[float, float]:
    return float(state.inner.tensors["m.b"][0, 0]), float(state.saved["head"][0])


def two_rounds(federate: Any, rate: float, **optimizer: Any) -> list[tuple[float, float]]:
    """(b, head) after two rounds in which the clients come to means of 2 and of 4."""
    method = optimized("fedit", **optimizer)
    state = first(method, federate, server_learning_rate=rate)
    after = []
    for values in ((1.0, 3.0), (2.0, 6.0)):
        state = method.aggregate(state, clients(*values))
        after.append(moved(state))
    return after


def test_fedavgm_by_hand(federate: Any) -> None:
    # m = 2, x = 1; then m = 2/2 + (4 - 1) = 4, x = 1 + 4/2 = 3.
    assert two_rounds(federate, 0.5, name="fedavgm", momentum=0.5) == [(1.0, 1.0), (3.0, 3.0)]


def test_fedadam_by_hand(federate: Any) -> None:
    # Change 2: m = 1, v = 3/4 * 1/4 + 1/4 * 4 = 19/16, x = m / (sqrt(v) + 1/2).
    x = 1 / (np.sqrt(19 / 16) + 0.5)
    # Change 4 - x: m and v go on from there.
    m, v = 0.5 * 1 + 0.5 * (4 - x), 0.75 * 19 / 16 + 0.25 * (4 - x) ** 2
    got = two_rounds(federate, 1.0, name="fedadam", **HALF)
    np.testing.assert_allclose(got, [(x, x), (y := x + m / (np.sqrt(v) + 0.5), y)], rtol=1e-6)


def test_fedyogi_by_hand(federate: Any) -> None:
    # Change 2: v = 1/4 - 1/4 * 4 * sign(1/4 - 4) = 5/4, where FedAdam has 19/16.
    x = 1 / (np.sqrt(5 / 4) + 0.5)
    m, v = 0.5 + 0.5 * (4 - x), 5 / 4 + 0.25 * (4 - x) ** 2
    got = two_rounds(federate, 1.0, name="fedyogi", **HALF)
    np.testing.assert_allclose(got, [(x, x), (y := x + m / (np.sqrt(v) + 0.5), y)], rtol=1e-6)


def test_fedyogi_forgets_large_changes_slowly(federate: Any) -> None:
    # A change of 0 leaves v; FedAdam would decay it.
    one = np.ones(1)
    assert RULES["fedyogi"](ServerOptimizer(beta2=0.5), one, 4 * one, 0 * one)[1] == 4
    assert RULES["fedadam"](ServerOptimizer(beta2=0.5), one, 4 * one, 0 * one)[1] == 2


@pytest.mark.parametrize("name", LINEAR)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), rounds=st.integers(1, 3))
def test_no_momentum_and_a_rate_of_one_is_the_plain_mean(federate: Any, name: str, seed: int, rounds: int) -> None:
    plain, method = METHODS[name], optimized(name, name="fedavgm", momentum=0.0)
    federation = federate({"m": (5, 4)}, max_rank=2, saved=SAVED, seed=seed)
    fleet = federate.fleet([2, 2, 2], seed=seed)
    expected, state = federation.state(plain), federation.state(method)
    for _ in range(rounds):
        expected, state = federation.round(plain, expected, fleet), federation.round(method, state, fleet)
        assert digest(encode(state.inner)) == digest(encode(expected))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", LINEAR)
def test_a_run_goes_on_to_the_last_bit_from_its_stored_state(federate: Any, name: str, rule: str) -> None:
    method = optimized(name, name=rule)
    federation, fleet = federate({"m": (5, 4)}, max_rank=2, saved=SAVED), federate.fleet([2, 2], seed=1)
    state = start = federation.state(method, server_learning_rate=0.1)
    for _ in range(3):
        stored = decode(b"".join(encode(state)), start)
        assert stored.settings == state.settings
        resumed, state = federation.round(method, stored, fleet), federation.round(method, state, fleet)
        assert digest(encode(resumed)) == digest(encode(state))


def test_memory_is_durable_and_fedavgm_has_no_variance(federate: Any) -> None:
    for rule in RULES:
        method = optimized("fedit", name=rule)
        header = b"".join(encode(first(method, federate)))
        assert b'"momentum/local/m.b"' in header
        assert b'"inner.tensors/m.b"' in header
        assert (b'"variance/saved/head"' in header) == (rule != "fedavgm")


def test_a_state_of_another_rule_is_no_state_of_the_plain_method(federate: Any) -> None:
    plain, method = METHODS["fedit"], optimized("fedit", name="fedadam")
    with pytest.raises(StoreError, match="resume with the fedtune and the method that wrote it"):
        decode(b"".join(encode(first(method, federate))), first(plain, federate))


@pytest.mark.parametrize("name", LINEAR)
def test_clients_are_asked_what_the_method_asks_them(federate: Any, name: str) -> None:
    plain, method = METHODS[name], optimized(name, name="fedyogi")
    federation, member = federate({"m": (5, 4)}, max_rank=2, saved=SAVED), ("c", 2, 1.0, 3)
    asked, expected = (federation.assign(m, federation.state(m), member) for m in (method, plain))
    assert {role: sorted(tensors) for role, tensors in asked.lora.blobs.items()} == {
        role: sorted(tensors) for role, tensors in expected.lora.blobs.items()
    }
    assert (asked.plan, asked.seed, asked.method) == (expected.plan, expected.seed, name)


def test_the_method_is_wrapped_where_its_settings_name_a_rule() -> None:
    method = METHODS["fedit"]
    assert with_settings(method, method.settings()) is method
    wrapped = with_settings(method, method.settings(server_optimizer=ServerOptimizer("fedadam")))
    assert wrapped.name == "fedit"
    assert wrapped.init is not method.init
    assert with_settings(METHODS["flora"], METHODS["flora"].settings()) is METHODS["flora"]


def test_every_operation_reads_the_inner_state() -> None:
    """An operation that is added to `Method` must be handed on too."""
    method = METHODS["fedit"]
    assert isinstance(method, LinearMethod)
    of_state = {
        "assign",
        "assign_whole",
        "change",
        "displacement",
        "aggregate",
        "adapter",
        "energy_kept",
        "seeds",
        "refuse",
        "figures",
        "state_energy_kept",
        "remarks",
        "structure",
        "ranking",
        "moments",
        "second",
    }
    rest = {
        "name",
        "settings",
        "init",
        "start",
        "ranks",
        "modules",
        "task",
        "why_not_linear",
        "why_not_pruned",
        "why_not_asynchronous",
        "downlink_rank",
        "decomposed",
        "wire_dtype",
        "down_dtype",
        "faults",
        "averages_factors",
        "freezes",
    }
    linear = {"contribution", "current", "weights", "advance"}
    assert {field.name for field in fields(method)} == of_state | rest | linear
    assert set(method.operations) == (of_state | linear) - {"aggregate", "advance"}


def test_one_field_at_a_time_changes_a_linear_method_and_aggregation_follows(federate: Any) -> None:
    method = METHODS["fedit"]
    assert isinstance(method, LinearMethod)
    doubled = replace(
        method, contribution=lambda state, update: {k: 2 * v for k, v in method.contribution(state, update).items()}
    )
    assert doubled.aggregate(first(doubled, federate), clients(1.0, 3.0)).tensors["m.b"] == 4.0
