from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.lora import dense, lowrank
from fedtune.lora.adapter import Factors, delta
from fedtune.lora.dense import Dense
from fedtune.lora.lowrank import LowRank
from fedtune.messages import AdmittedUpdate, Blueprint, ClientUpdate, LoraResult, cohort_weights
from fedtune.methods import flora, serialization
from fedtune.methods.flora import METHOD, FloraSettings, FloraState, grouped_products, product
from fedtune.methods.method import LinearMethod
from fedtune.tensors import Array


def f32(values: Any) -> Array:
    return np.array(values, np.float32)


MODES = ("reinit", "svt", "continue")


def exact(state: FloraState, name: str = "m") -> Any:
    """Delta, dense in float64, before any truncation."""
    return delta(lowrank.unpack(state.delta)[name].factors)


def unbounded(state: FloraState) -> FloraState:
    """The same state, whose next round keeps everything."""
    return replace(state, settings=replace(state.settings, state_max_rank="exact"))


def test_scalars_by_hand(federate: Any) -> None:
    federation = federate({"m": (1, 1)}, max_rank=1)
    updates = [
        federate.update(f"c{b}", {"m": Factors(a=f32([[a]]), b=f32([[b]]))}, examples=1) for b, a in [(1, 2), (3, 4)]
    ]
    assert exact(METHOD.aggregate(federation.state(METHOD), updates)) == pytest.approx(7)


def test_two_ranks_by_hand(federate: Any, two_ranks: Any) -> None:
    state = METHOD.aggregate(federate({"m": (2, 3)}, max_rank=2).state(METHOD), two_ranks)
    np.testing.assert_allclose(exact(state), [[0.5, 0.75, -0.5], [1.75, 0.75, -0.25]], atol=1e-6)
    np.testing.assert_allclose(state.delta["m.s"], [2.101334, 0.578270], atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    ranks=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    rslora=st.booleans(),
    seed=st.integers(0, 2**31),
    rate=st.sampled_from([1.0, 0.5]),
)
def test_delta_grows_by_exactly_what_clients_changed(
    federate: Any, mode: str, m: int, n: int, ranks: list[int], rslora: bool, seed: int, rate: float
) -> None:
    federation = federate({"m": (m, n)}, max_rank=max(ranks), seed=seed)
    fleet = federate.fleet(ranks, seed=seed, rslora=rslora)
    state = federation.state(METHOD, mode=mode, server_learning_rate=rate)
    for _ in range(3):
        total = sum(member[3] for member in fleet)
        expected = exact(state)
        for member in fleet:
            assignment = federation.assign(METHOD, state, member)
            change = delta(federation.end(assignment, size=0.1)["m"]) - delta(federation.start(assignment)["m"])
            expected = expected + rate * member[3] / total * change
        state = federation.round(METHOD, state, fleet)
        assert federate.close(exact(state), expected, relative=3e-6 if mode == "continue" else 1e-6)


def test_continue_obeys_the_closed_form_of_exact_starts(federate: Any) -> None:
    # Delta' = U diag(S_i (1 - eta + eta pi_i)) Vt + eta sum p_k b_k a_k, pi_i the share of clients with r_k < i.
    federation, fleet, eta = federate({"m": (12, 9)}, max_rank=6), federate.fleet([6, 3, 1], seed=5), 0.7
    state = federation.state(METHOD, mode="continue", server_learning_rate=eta)
    state = federation.round(METHOD, state, fleet)
    low, total = lowrank.unpack(state.delta)["m"], sum(member[3] for member in fleet)
    pi = np.array([sum(n for _, r, _, n in fleet if r < i) / total for i in range(1, low.rank + 1)])
    kept = (low.u * (low.s * (1 - eta + eta * pi))).astype(np.float64) @ low.vt
    expected = kept + eta * federation.mean(METHOD, state, fleet, "m")
    assert federate.close(exact(federation.round(METHOD, state, fleet)), expected, relative=3e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wire_dtype", ["fp32", "bf16"])
def test_every_client_starts_from_the_same_model(federate: Any, mode: str, wire_dtype: str) -> None:
    federation, fleet = federate({"m": (30, 20)}, max_rank=6), federate.fleet([6, 3, 1], seed=0)
    state = federation.state(METHOD, mode=mode, wire_dtype=wire_dtype, max_rank=5)
    for _ in range(2):
        state = federation.round(METHOD, state, fleet)
    expected = delta(METHOD.adapter(state)["m"])
    for member in fleet:
        assignment = federation.assign(METHOD, state, member)
        model = federation.frozen(assignment, "m") + delta(federation.start(assignment)["m"])
        assert federate.close(model, expected, relative=1e-6 if wire_dtype == "fp32" else 1e-2)


@settings(max_examples=20, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    wire_dtype=st.sampled_from(["fp32", "bf16", "fp16"]),
    seed=st.integers(0, 2**31),
)
def test_clients_that_do_not_train_leave_delta_as_it_is(
    federate: Any, ranks: list[int], wire_dtype: str, seed: int
) -> None:
    federation, fleet = federate({"m": (12, 17)}, max_rank=8, seed=seed), federate.fleet(ranks, seed=seed)
    state = federation.state(METHOD, mode="continue", wire_dtype=wire_dtype)
    before = federation.round(METHOD, state, fleet)
    after = federation.round(METHOD, before, fleet, size=0.0)
    assert federate.close(exact(after), exact(before), relative=2e-7)


@pytest.mark.parametrize("mode", MODES)
def test_a_change_counts_from_what_the_client_decoded(federate: Any, mode: str) -> None:
    federation, member = federate({"m": (12, 17)}, max_rank=4), ("c", 4, 2.0, 1)
    state = federation.round(METHOD, federation.state(METHOD, mode=mode, wire_dtype="bf16"), [member])
    assignment = federation.assign(METHOD, state, member)
    start, update = federation.start(assignment)["m"], federation.answer(assignment, size=1e-3)
    a, b = (update.lora.tensors[name].astype(np.float64) for name in ("m.a", "m.b"))
    if assignment.lora.upload == "difference":
        a, b = start.a + a, start.b + b
    expected = b @ a - delta(start)
    # Delta itself rests in float32, so the change is read to 1e-7 of Delta.
    got = exact(METHOD.aggregate(state, [update])) - exact(state)
    assert np.linalg.norm(got - expected) < 2e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("mode", ["reinit", "continue"])
def test_a_hundred_tiny_rounds_over_a_bf16_wire_add_up(federate: Any, mode: str) -> None:
    # Merging each round into a bf16 base would lose most of them.
    federation, fleet = federate({"m": (16, 12)}, max_rank=4), federate.fleet([4, 2], seed=3)
    state = federation.state(METHOD, mode=mode, wire_dtype="bf16")
    state = federation.round(METHOD, state, fleet, size=0.3)
    expected, merged = exact(state), exact(state).astype(ml_dtypes.bfloat16)
    for _ in range(100):
        before, updates = exact(state), federation.updates(METHOD, state, fleet, size=1e-4)
        state = METHOD.aggregate(state, updates)
        expected = expected + (exact(state) - before)
        merged = (merged.astype(np.float64) + exact(state) - before).astype(ml_dtypes.bfloat16)
    assert federate.close(exact(state), expected, relative=1e-6)
    first = exact(federation.round(METHOD, federation.state(METHOD, mode=mode, wire_dtype="bf16"), fleet, size=0.3))
    change = exact(state) - first
    assert np.linalg.norm(change) > 1e-4
    assert not federate.close(merged.astype(np.float64) - first, change, relative=0.1)


@pytest.mark.parametrize("mode", MODES)
def test_a_client_that_skipped_rounds_holds_the_model_of_a_veteran(federate: Any, mode: str) -> None:
    federation, fleet = federate({"m": (16, 12)}, max_rank=4), federate.fleet([4, 4, 2], seed=3)
    state = federation.state(METHOD, mode=mode)
    for number in range(1, 9):
        present = fleet if not 3 <= number <= 7 else fleet[1:]
        state = federation.round(METHOD, state, present)
    models = []
    for member in fleet[:2]:
        assignment = federation.assign(METHOD, state, member)
        models.append(federation.frozen(assignment, "m") + delta(federation.start(assignment)["m"]))
    np.testing.assert_allclose(models[0], models[1], atol=1e-12)


def test_svt_at_tau_one_is_reinit(federate: Any) -> None:
    federation, fleet = federate({"m": (16, 12)}, max_rank=4), federate.fleet([4, 2], seed=3)
    one, other = federation.state(METHOD, mode="reinit"), federation.state(METHOD, mode="svt", tau=1.0)
    for _ in range(3):
        one, other = federation.round(METHOD, one, fleet), federation.round(METHOD, other, fleet)
    for name in one.delta:
        np.testing.assert_array_equal(one.delta[name], other.delta[name])


def test_reinit_is_the_papers_merge(federate: Any) -> None:
    federation, fleet = federate({"m": (16, 12)}, max_rank=4), federate.fleet([4, 2, 1], seed=3)
    state, merged = federation.state(METHOD), np.zeros((16, 12))
    for _ in range(3):
        merged = merged + federation.mean(METHOD, state, fleet, "m")
        state = federation.round(METHOD, state, fleet)
        assert federate.close(delta(METHOD.adapter(state)["m"]), merged)


def test_truncation_goes_down_but_delta_stays_whole(federate: Any) -> None:
    federation, fleet = federate({"m": (16, 12), "k": (5, 30)}, max_rank=4), federate.fleet([4, 2], seed=3)
    state = federation.round(METHOD, federation.state(METHOD, mode="svt", max_rank=2), fleet)
    assert {name: low.rank for name, low in lowrank.unpack(state.delta).items()} == {"m": 6, "k": 5}
    energy = METHOD.energy_kept(state)
    for name, low in state.broadcast.items():
        assert low.rank <= 2
        dropped = np.linalg.norm(exact(state, name) - delta(low.factors)) ** 2
        assert 1 - energy[name] == pytest.approx(dropped / np.linalg.norm(exact(state, name)) ** 2, abs=1e-6)


def test_the_servers_rank_can_be_bounded(federate: Any) -> None:
    federation, fleet = federate({"m": (16, 12)}, max_rank=4), federate.fleet([4, 2], seed=3)
    state = federation.round(METHOD, federation.state(METHOD, state_max_rank=3), fleet)
    assert state.delta["m.s"].shape == (3,)


def test_a_bounded_state_is_the_best_approximation_and_adds_up_what_it_has_dropped(federate: Any) -> None:
    federation, fleet = federate({"m": (30, 40)}, max_rank=4), federate.fleet([4, 4], seed=3)
    state = federation.state(METHOD, mode="continue", state_max_rank="auto")
    dropped = 0.0
    for _ in range(4):
        updates = federation.updates(METHOD, state, fleet)
        u, s, vt = np.linalg.svd(exact(METHOD.aggregate(unbounded(state), updates)))
        state = METHOD.aggregate(state, updates)
        assert federate.close(exact(state), (u[:, :8] * s[:8]) @ vt[:8])
        dropped += float(np.sum(s[8:] ** 2))
        assert lowrank.unpack(state.delta)["m"].dropped == pytest.approx(dropped, rel=1e-5, abs=1e-9)
    assert state.delta["m.s"].shape == (8,)
    kept = float(np.sum(exact(state) ** 2))
    assert METHOD.state_energy_kept(state)["m"] == pytest.approx(kept / (kept + dropped), rel=1e-5)
    assert METHOD.state_energy_kept(federation.state(METHOD)) == {}
    again = serialization.decode(b"".join(serialization.encode(state)), state)
    assert serialization.digest(serialization.encode(again)) == serialization.digest(serialization.encode(state))


def test_all_that_is_kept_is_sent_and_is_of_twice_the_mean_rank(federate: Any) -> None:
    federation = federate({"m": (60, 70)}, max_rank=8)
    state = federation.state(METHOD, mode="continue", state_max_rank="auto")
    # The mean of 8, 2 and 1 is 11/3, whose double is rounded up; a round of small clients cuts nothing of it.
    for ranks, kept in (([2, 1], 3), ([8, 2, 1], 8), ([2, 1], 8), ([8, 8], 16)):
        fleet = federate.fleet(ranks, seed=3)
        state = federation.round(METHOD, state, fleet)
        assert state.delta["m.s"].shape == (kept,)
        for member in fleet:
            assignment = federation.assign(METHOD, state, member)
            sent = federation.frozen(assignment, "m") + delta(federation.start(assignment)["m"])
            assert federate.close(sent, exact(state))
    assert METHOD.energy_kept(state)["m"] == 1.0


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "continue"])
def test_a_client_is_sent_at_most_twice_its_own_rank_and_the_rest_stays_at_the_server(federate: Any, mode: str) -> None:
    federation, fleet = federate({"m": (60, 70)}, max_rank=8), federate.fleet([8, 2, 1], seed=3)
    state = federation.state(METHOD, mode=mode, state_max_rank="auto", tau=1.0)
    for _ in range(3):
        state = federation.round(METHOD, state, fleet)
    assert state.delta["m.s"].shape == (16,)
    low = lowrank.unpack(state.delta)["m"]
    for member in fleet:
        blobs = federation.assign(METHOD, state, member).lora.blobs
        assert sum(blob["m.a"].shape[0] for blob in blobs.values()) == 2 * member[1]
        sent = federation.frozen(federation.assign(METHOD, state, member), "m")
        assert federate.close(sent, delta(low.components(0, 2 * member[1]).factors))
    assert METHOD.energy_kept(state)["m"] == 1.0  # that of the client of the largest rank
    # No change at any client: what was not sent down is still there.
    assert federate.close(exact(federation.round(METHOD, state, fleet, size=0.0)), exact(state), relative=2e-7)


@pytest.mark.parametrize(("down", "shape"), [(1, (1, 1)), (3, (3, 3)), (6, (4, 6)), (None, (4, 8))])
def test_the_rank_that_goes_down_can_be_set(federate: Any, down: int | None, shape: tuple[int, int]) -> None:
    federation, fleet = federate({"m": (60, 70)}, max_rank=4), federate.fleet([4, 4], seed=3)
    state = federation.state(METHOD, mode="continue", state_max_rank=8, down_rank=down)
    for _ in range(2):
        state = federation.round(METHOD, state, fleet)
    blobs = federation.assign(METHOD, state, fleet[0]).lora.blobs
    local, frozen = (len(blobs.get(role, {}).get("m.a", ())) for role in ("local", "global"))
    assert (local, local + frozen) == shape
    # What a client has trained counts against what it was sent, of whatever rank.
    updates = federation.updates(METHOD, state, fleet)
    moved = sum(update.num_examples * delta(product(state, update)["m"]) for update in updates)
    total = sum(update.num_examples for update in updates)
    after = METHOD.aggregate(unbounded(state), updates)
    assert federate.close(exact(after) - exact(state), moved / total, relative=1e-5)


def test_clients_that_start_alike_share_one_start_in_the_sum(federate: Any) -> None:
    federation, fleet = federate({"m": (60, 70)}, max_rank=4), federate.fleet([4, 4, 4, 2, 2], seed=3)
    state = federation.state(METHOD, mode="continue", wire_dtype="bf16")
    for _ in range(2):
        state = federation.round(METHOD, state, fleet)
    cohort = cohort_weights(federation.updates(METHOD, state, fleet, size=1e-3), "examples")
    parts = list(grouped_products(state, cohort))
    assert sorted(adapter["m"].rank for adapter, _ in parts) == [2, 2, 2, 4, 4, 4, 4]  # one by one: twice 4 4 4 2 2
    together = sum(weight * delta(adapter["m"]) for adapter, weight in parts)
    apart = sum(share * delta(product(state, update)["m"]) for update, share in cohort)
    assert federate.close(together, apart, relative=1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_a_state_kept_as_a_matrix_is_the_same_model(federate: Any, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    federation, fleet = federate({"m": (40, 30)}, max_rank=4), federate.fleet([4, 4, 2], seed=3)
    factored = federation.state(METHOD, mode=mode, tau=1.0)
    matrix = factored
    for _ in range(4):
        updates = federation.updates(METHOD, factored, fleet)
        factored = METHOD.aggregate(factored, updates)
        with monkeypatch.context() as patched:
            patched.setattr(dense, "NARROW", 8)
            matrix = METHOD.aggregate(matrix, federation.updates(METHOD, matrix, fleet))
            again = serialization.decode(b"".join(serialization.encode(matrix)), matrix)
            # A resumed run goes on to the bit.
            first, other = (METHOD.aggregate(state, updates) for state in (matrix, again))
            assert serialization.digest(serialization.encode(first)) == serialization.digest(
                serialization.encode(other)
            )
        assert isinstance(dense.unpack(matrix.delta)["m"], Dense)
        scale = np.linalg.norm(exact(factored))
        if mode != "continue":  # there what clients train on, and so what they send, differs by the triples' accuracy
            assert np.linalg.norm(delta(METHOD.adapter(matrix)["m"]) - exact(factored)) < 1e-6 * scale
        for member in fleet:
            assignment = federation.assign(METHOD, matrix, member)
            model = federation.frozen(assignment, "m") + delta(federation.start(assignment)["m"])
            assert np.linalg.norm(model - delta(METHOD.adapter(matrix)["m"])) < 1e-6 * scale
    with monkeypatch.context() as patched:
        patched.setattr(dense, "NARROW", 8)
        still = federation.round(METHOD, matrix, fleet, size=0.0)
        assert federate.close(delta(METHOD.adapter(still)["m"]), delta(METHOD.adapter(matrix)["m"]), relative=2e-7)


@pytest.mark.parametrize("keys", [{"max_rank": 5}, {"down_rank": 6}, {"mode": "svt", "tau": 0.8}])
def test_what_is_sent_of_a_matrix_is_what_is_sent_of_factors(
    federate: Any, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    federation, fleet = federate({"m": (40, 30)}, max_rank=4), federate.fleet([4, 4, 2], seed=3)
    factored = federation.state(METHOD, **{"mode": "reinit", "state_max_rank": "exact"} | keys)
    for _ in range(3):
        factored = federation.round(METHOD, factored, fleet, size=0.1)
    whole = exact(factored).astype(np.float32)
    lead = dense.with_lead(whole, np.zeros((0, 30), np.float32), size=6, tau=factored.tau)
    matrix = replace(factored, delta=dense.pack({"m": lead}))
    for member in fleet:
        sent = [federation.frozen(federation.assign(METHOD, state, member), "m") for state in (matrix, factored)]
        assert federate.close(sent[0], sent[1], relative=1e-3)
        assert np.linalg.matrix_rank(sent[0]) == np.linalg.matrix_rank(sent[1])
    assert METHOD.energy_kept(matrix)["m"] == pytest.approx(METHOD.energy_kept(factored)["m"], rel=1e-5)


def test_the_frozen_part_goes_dense_where_that_is_smaller(federate: Any) -> None:
    federation, fleet = federate({"wide": (60, 50), "small": (6, 5)}, max_rank=4), federate.fleet([4, 2], seed=3)
    state = federation.round(METHOD, federation.state(METHOD), fleet)
    sent = federation.assign(METHOD, state, fleet[0]).lora.blobs["global"]
    assert {name: tensor.shape for name, tensor in sent.items()} == {
        "wide.a": (6, 50),
        "wide.b": (60, 6),
        "small.w": (6, 5),
    }
    np.testing.assert_allclose(sent["small.w"], exact(state, "small"), atol=1e-6)


def test_nothing_empty_is_sent(federate: Any) -> None:
    federation = federate({"m": (6, 5), "still": (6, 5)}, max_rank=2)
    state = federation.state(METHOD, mode="continue")
    assert federation.assign(METHOD, state, ("c", 2, 1.0, 1)).lora.blobs == {}
    change = {"m": Factors(a=np.ones((2, 5), np.float32), b=np.ones((6, 2), np.float32))}
    state = METHOD.aggregate(state, [federate.update("c", change, examples=1)])  # `still` missing: a change of zero
    assert federation.assign(METHOD, state, ("c", 2, 1.0, 1)).lora.blobs["local"].keys() == {"m.a", "m.b"}
    assert METHOD.adapter(state).keys() == {"m"}


def test_every_client_draws_its_own_a_in_every_round(federate: Any) -> None:
    federation, fleet = federate({"m": (6, 5)}, max_rank=2), [("a", 2, 1.0, 1), ("b", 2, 1.0, 1)]
    state = federation.state(METHOD)
    later = federation.round(METHOD, state, fleet)
    keys = {federation.assign(METHOD, s, member).lora.a_key for s in (state, later) for member in fleet}
    assert len(keys) == 4


@pytest.mark.parametrize("seed", range(5))
def test_among_like_clients_no_direction_that_goes_down_is_one_clients(federate: Any, seed: int) -> None:
    # Not a guarantee: of a client that dwarfs the others, or is orthogonal to them, the sum keeps the directions.
    federation, fleet = federate({"m": (40, 30)}, max_rank=8, seed=seed), [("a", 4, 1.0, 1), ("b", 4, 1.0, 1)]
    state = federation.state(METHOD)
    updates = federation.updates(METHOD, state, fleet)
    low = METHOD.aggregate(state, updates).broadcast["m"]
    assert isinstance(low, LowRank)
    for update in updates:
        a, b = update.lora.tensors["m.a"], update.lora.tensors["m.b"]
        assert np.max(np.abs(low.vt @ (a / np.linalg.norm(a, axis=1, keepdims=True)).T)) < 0.999
        assert np.max(np.abs(low.u.T @ (b / np.linalg.norm(b, axis=0)))) < 0.999


def test_a_step_edits_nothing_it_received(federate: Any) -> None:
    federation, fleet = federate({"m": (6, 5)}, max_rank=2), federate.fleet([2, 2], seed=0)
    state = federation.round(METHOD, federation.state(METHOD, mode="continue"), fleet)
    updates = federation.updates(METHOD, state, fleet)
    for tensors in (state.delta, *(update.lora.tensors for update in updates)):
        for tensor in tensors.values():
            tensor.setflags(write=False)
    assert METHOD.aggregate(state, updates).round == 2


def test_it_is_not_linear() -> None:
    assert not isinstance(METHOD, LinearMethod)


def test_modules_of_their_own_ranks_are_kept_at_twice_their_own_mean() -> None:
    """Ranks 4 and 1, 2 and 1: twice the means are 6 and 2; twice the mean of the largest would be 6 for both."""
    modules = {"a": (12, 10), "b": (12, 10)}
    state = flora.init(Blueprint(modules, {}, max_rank=4, seed=0), FloraSettings())
    rng = np.random.default_rng(0)

    def admitted(client: str, ranks: Mapping[str, int]) -> AdmittedUpdate:
        factors = {f"{name}.a": rng.standard_normal((rank, 10)).astype(np.float32) for name, rank in ranks.items()}
        factors |= {f"{name}.b": rng.standard_normal((12, rank)).astype(np.float32) for name, rank in ranks.items()}
        return AdmittedUpdate(ClientUpdate(client, 1, 5, LoraResult(factors)), upload="difference")

    after = flora.aggregate(state, [admitted("x", {"a": 4, "b": 1}), admitted("y", {"a": 2, "b": 1})])
    assert {name: low.rank for name, low in dense.unpack(after.delta).items()} == {"a": 6, "b": 2}
    # Where all modules of a client are alike, the bound is one for all, as before.
    alike = flora.aggregate(state, [admitted("x", {"a": 4, "b": 4}), admitted("y", {"a": 2, "b": 2})])
    assert {low.rank for low in dense.unpack(alike.delta).values()} == {6}
