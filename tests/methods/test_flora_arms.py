"""FLoRA over clients that train some of the modules, each of a rank of its own, and are sent less than all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.lora import dense
from fedtune.lora.adapter import Adapter, Factors, delta
from fedtune.messages import AdmittedUpdate, Assignment, Blueprint, Plan, PlannedClient, Training
from fedtune.methods.flora import METHOD, FloraState
from fedtune.tensors import Array

MODULES = {"a.q": (6, 5), "a.v": (4, 5), "b.q": (6, 5), "b.v": (9, 7)}
MODES = ("reinit", "svt", "continue")
TRAINING = Training(batch=1, learning_rate=1.0, steps=1)


def planned(name: str, ranks: tuple[int, ...], down_rank: int | None = None, scale: float = 2.0) -> PlannedClient:
    plain = ranks if len(set(ranks)) > 1 else ()
    return PlannedClient(Plan(name, max(ranks), scale, TRAINING, ranks=plain), down_rank=down_rank)


def first(federate: Any, max_rank: int = 4, **changes: Any) -> tuple[Any, FloraState]:
    federation = federate(MODULES, max_rank=max_rank)
    return federation, federation.state(METHOD, **changes)


def answer(federation: Any, state: FloraState, client: PlannedClient, *, examples: int, size: float = 0.1) -> Any:
    """Return (assignment, update) of a client whose factors move at random."""
    assignment = METHOD.assign(state, federation.blueprint.seed, client)
    update = federation.answer(assignment, size=size, examples=examples)
    return assignment, replace(update, down_rank=client.down_rank)


def change(federation: Any, assignment: Assignment, name: str, size: float = 0.1) -> Array:
    """Return what a client changed of one module, dense and in float64; zeros of one that it does not train."""
    start, end = federation.start(assignment), federation.end(assignment, size=size)
    return delta(end[name]) - delta(start[name]) if name in start else np.zeros(MODULES[name])


def whole(state: FloraState, name: str) -> Array:
    return delta(dense.unpack(state.delta)[name].factors)


@settings(max_examples=15, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    fleet=st.lists(
        st.tuples(
            st.tuples(*(st.integers(0, 4) for _ in MODULES)).filter(any),
            st.integers(1, 9),
            st.sampled_from([None, 1, 3]),
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_delta_grows_by_the_dense_sum_of_what_each_client_changed_of_each_module(
    federate: Any, mode: str, fleet: list[tuple[tuple[int, ...], int, int | None]]
) -> None:
    federation, state = first(federate, mode=mode, coverage="zero")
    total = sum(examples for _, examples, _ in fleet)
    for _ in range(3):
        pairs = [
            answer(federation, state, planned(f"c{at}", ranks, down), examples=examples)
            for at, (ranks, examples, down) in enumerate(fleet)
        ]
        after = METHOD.aggregate(state, [update for _, update in pairs])
        for name in MODULES:
            parts = [
                n / total * change(federation, order, name) for (_, n, _), (order, _) in zip(fleet, pairs, strict=True)
            ]
            assert federate.close(whole(after, name), whole(state, name) + sum(parts), relative=5e-6)
        state = after


@pytest.mark.parametrize("mode", MODES)
def test_a_module_that_no_client_has_trained_keeps_every_bit(federate: Any, mode: str) -> None:
    federation, state = first(federate, mode=mode, state_max_rank="auto")
    everything = [answer(federation, state, planned(n, (4, 4, 4, 4)), examples=2)[1] for n in ("ann", "bob")]
    state = METHOD.aggregate(state, everything)
    upper = [answer(federation, state, planned(n, (0, 0, 2, 4)), examples=2)[1] for n in ("ann", "bob")]
    assert upper[0].lora.tensors.keys() == {f"b.{layer}.{side}" for layer in "qv" for side in "ab"}
    after = METHOD.aggregate(state, upper)
    for key, array in state.delta.items():
        same = np.array_equal(after.delta[key], array)
        assert same == key.startswith("a."), key


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", [(4, 4, 4, 4), (0, 3, 1, 4)])
def test_where_all_train_the_same_coverage_changes_no_bit(federate: Any, mode: str, ranks: tuple[int, ...]) -> None:
    states = [first(federate, mode=mode, coverage=kind) for kind in ("normalised", "zero")]
    ends = []
    for federation, state in states:
        for _ in range(2):
            updates = [answer(federation, state, planned(n, ranks), examples=k)[1] for n, k in (("ann", 3), ("bob", 7))]
            state = METHOD.aggregate(state, updates)
        ends.append(state)
    assert all(np.array_equal(ends[0].delta[key], array) for key, array in ends[1].delta.items())


@pytest.mark.parametrize("mode", MODES)
def test_ranks_that_are_all_the_plans_are_plain_flora_to_the_bit(federate: Any, mode: str) -> None:
    """Written out or left out: one assignment's tensors, and one state."""
    federation, state = first(federate, mode=mode)
    plain, written = (Plan("ann", 3, 2.0, TRAINING, ranks=ranks) for ranks in ((), (3, 3, 3, 3)))
    for _ in range(2):
        pairs = [answer(federation, state, PlannedClient(plan), examples=2) for plan in (plain, written)]
        ends = [METHOD.aggregate(state, [update]) for _, update in pairs]
        assert all(np.array_equal(ends[0].delta[key], array) for key, array in ends[1].delta.items())
        state = ends[0]


def grown(name: str, adapters: Mapping[str, Adapter], examples: Mapping[str, int], **changes: Any) -> Array:
    """Return the first change of one module that some clients have trained, dense."""
    blueprint = Blueprint(MODULES, {}, 4, 0)
    state = METHOD.init(blueprint, METHOD.settings(mode="reinit", wire_dtype="fp32", **changes))
    return whole(
        METHOD.aggregate(state, [sent(client, own, examples[client]) for client, own in adapters.items()]), name
    )


def sent(client: str, adapter: Adapter, examples: int) -> AdmittedUpdate:
    from fedtune.lora.adapter import pack
    from fedtune.messages import ClientUpdate, LoraResult

    return AdmittedUpdate(ClientUpdate(client, 1, examples, LoraResult(pack(adapter))))


def ones(*names: str) -> Adapter:
    return {
        name: Factors(a=np.ones((1, MODULES[name][1]), np.float32), b=np.ones((MODULES[name][0], 1), np.float32))
        for name in names
    }


def test_a_module_that_a_third_has_trained_moves_as_far_as_one_that_all_have_by_hand() -> None:
    """Two of ann's examples for each of bob's four: bob alone trains a.q."""
    fleet = {"ann": ones("b.q", "b.v"), "bob": ones("a.q", "b.q", "b.v")}
    examples = {"ann": 8, "bob": 4}
    for name, moved, floor in (("b.q", 1.0, 0.2), ("a.q", 1.0, 0.2), ("a.q", 2 / 3, 0.5), ("a.v", 0.0, 0.2)):
        got = grown(name, fleet, examples, coverage_floor=floor)
        np.testing.assert_allclose(got, np.full(MODULES[name], moved), rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(grown("a.q", fleet, examples, coverage="zero"), np.full((6, 5), 1 / 3), rtol=1e-6)


def test_uniform_weights_cover_by_clients_and_not_by_examples() -> None:
    fleet = {"ann": ones("b.q"), "bob": ones("a.q", "b.q")}
    got = grown("a.q", fleet, {"ann": 900, "bob": 1}, weights="uniform", coverage_floor=0.6)
    np.testing.assert_allclose(got, np.full((6, 5), 0.5 / 0.6), rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("down_rank", [1, 2, 6])
def test_a_client_is_sent_at_most_its_down_rank_and_the_leading_part_of_the_global_change(
    federate: Any, mode: str, down_rank: int
) -> None:
    federation, state = first(federate, mode=mode, wire_dtype="fp32")
    for at in range(2):
        state = METHOD.aggregate(
            state, [answer(federation, state, planned(f"c{at}{n}", (4,) * 4), examples=1)[1] for n in "ab"]
        )
    assignment, _ = answer(federation, state, planned("ann", (2, 0, 2, 1), down_rank), examples=1)
    start = federation.start(assignment)
    for name, low in state.broadcast.items():
        received = federation.frozen(assignment, name) + (delta(start[name]) if name in start else 0.0)
        expected = delta(low.components(0, down_rank).factors)
        assert federate.close(received, expected, relative=2e-6), name


def test_what_is_planned_for_a_client_does_not_go_beyond_the_settings_bound(federate: Any) -> None:
    federation, state = first(federate, down_rank=2, state_max_rank=4)
    state = METHOD.aggregate(state, [answer(federation, state, planned(n, (4,) * 4), examples=1)[1] for n in "ab"])
    orders = [METHOD.assign(state, 0, planned("ann", (4,) * 4, down)) for down in (None, 9, 1)]
    ranks = [
        max(a.shape[0] for name, a in order.lora.blobs["global"].items() if name.endswith(".a")) for order in orders
    ]
    assert ranks == [2, 2, 1]


def test_clients_that_were_sent_the_same_of_a_module_share_its_second_term(federate: Any) -> None:
    """Also beside modules of other ranks: or the factored sum of a round would be nearly twice as large."""
    from fedtune.methods.flora import grouped_products

    federation, state = first(federate, mode="continue", state_max_rank="auto")
    state = METHOD.aggregate(state, [answer(federation, state, planned(n, (2,) * 4), examples=1)[1] for n in "ab"])
    plans = [planned("ann", (0, 0, 2, 2)), planned("bob", (2, 2, 2, 2)), planned("cyd", (1, 0, 2, 2))]
    updates = [answer(federation, state, plan, examples=1)[1] for plan in plans]
    cohort = [(update, 1 / 3) for update in updates]
    rank = {
        name: sum(part[name].rank for part, _ in grouped_products(state, cohort) if name in part) for name in MODULES
    }
    assert rank == {"a.q": 1 + 2 + 1 + 2, "a.v": 2 + 2, "b.q": 3 * 2 + 2, "b.v": 3 * 2 + 2}
