"""Clients that descend, alone and beside those that probe: one exact sum, groups, redrawn banks, and what is asked."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.directions.consistency import STATE
from fedtune.directions.downlink import pad_zeros
from fedtune.directions.numbers import LARGEST_NUMBER
from fedtune.directions.seed_ledger import decode_ledger
from fedtune.messages import (
    AdmittedUpdate,
    Assignment,
    Blueprint,
    ClientUpdate,
    DescendResult,
    DescendSeeds,
    Plan,
    PlannedClient,
    ProbeResult,
    ProbeSeeds,
    Training,
    Verb,
    VerbChoice,
    Weight,
)
from fedtune.methods.fedkseed import METHOD
from fedtune.methods.fedkseed_state import DESCENDING, FedKSeedSettings, FedKSeedState, bank_key, faults
from fedtune.methods.serialization import decode, digest, encode
from fedtune.wire.codec import decode_assignment, encode_assignment
from tests.methods.test_fedkseed import BASE, MODULES, SEED, drawn

PROBING = Training(batch=1, learning_rate=1.0, steps=4)
DESCENT = Training(batch=2, learning_rate=0.02, steps=8)
MIXED: tuple[Verb, ...] = ("descend", "probe")


def first(verbs: tuple[Verb, ...] = MIXED, **changes: Any) -> FedKSeedState:
    blueprint = Blueprint(MODULES, {}, max_rank=1, seed=SEED, manifest=BASE.encode(), verbs=verbs)
    return METHOD.init(blueprint, FedKSeedSettings(**{"seeds": 4, "scalar_step": 2.0**-20, **changes}))


def asked(state: FedKSeedState, client: str = "gpu", verb: VerbChoice | None = "descend") -> Assignment:
    training = PROBING if verb == "probe" else DESCENT
    probing = PROBING if state.probes else None
    return METHOD.assign(state, SEED, PlannedClient(Plan(client, 1, 1.0, training), verb=verb, probing=probing))


def update(state: FedKSeedState, client: str, result: ProbeResult | DescendResult, examples: int) -> AdmittedUpdate:
    own = replace(result, state=state.digest[:STATE], checks=state.checks)
    return AdmittedUpdate(ClientUpdate(client, state.round + 1, examples, own), weight=Weight(examples, 1))


def descended(
    state: FedKSeedState, client: str, numbers: Sequence[int], shift: int = 0, *, examples: int = 10
) -> AdmittedUpdate:
    result = DescendResult(np.array(numbers, np.int8), shift, state.settings.scalar_bits)
    return update(state, client, result, examples)


def probed(state: FedKSeedState, client: str, scalars: Sequence[int], *, examples: int = 10) -> AdmittedUpdate:
    return update(state, client, ProbeResult(np.array(scalars, np.int8)), examples)


# ---- the sum


def test_one_descends_and_one_probes_by_hand() -> None:
    state = first(fraction_bits=0, weights="uniform")
    assert (state.exponent, state.shift) == (24, 4)  # units fine enough for those that descend; a scalar is 16 of them
    ids = drawn(state, "phone", 2).tolist()
    after = METHOD.aggregate(state, [descended(state, "gpu", [3, -1, 0, 7], 5), probed(state, "phone", [1, -2])])
    sums = [3 * 32, -32, 0, 7 * 32]
    for k, q in zip(ids, (1, -2), strict=True):
        sums[k] += q * 16
    assert after.sums.tolist() == [value // 2 for value in sums]
    assert all(value % 2 == 0 for value in sums)


def test_ties_go_to_the_even_number_and_weights_count() -> None:
    state = first(verbs=("descend",))
    pair = [descended(state, "a", [1, 3, -1, -3]), descended(state, "b", [0, 0, 0, 0])]
    assert METHOD.aggregate(state, pair).sums.tolist() == [0, 2, 0, -2]
    heavy = [descended(state, "a", [4, 8, -4, 0], examples=30), descended(state, "b", [0, 0, 0, 100], examples=10)]
    # By 127 and 42 of 169.
    assert METHOD.aggregate(state, heavy).sums.tolist() == [3, 6, -3, 25]


ONE = st.tuples(st.booleans(), st.integers(1, 500), st.integers(0, 24), st.integers(0, 2**32 - 1))


@settings(deadline=None, max_examples=40)
@given(st.lists(ONE, min_size=1, max_size=6), st.sampled_from([1, 2, "tensor"]), st.sampled_from([8, 4, 2]))
def test_the_sum_is_that_of_big_integers_in_every_order(cohort: Any, groups: Any, bits: Any) -> None:
    state = first(seeds=8, groups=groups, scalar_bits=bits)
    size = state.bank.newest.stop
    bound, updates, exact, total = LARGEST_NUMBER[bits], [], [Fraction(0)] * size, 0
    most = max(examples for _, examples, _, _ in cohort)
    for place, (descends, examples, shift, key) in enumerate(cohort):
        rng, name = random.Random(key), f"client-{place}"
        weight = max(1, round(127 * examples / most))
        total += weight
        if descends:
            numbers = [rng.randint(-bound, bound) for _ in range(size)]
            updates.append(descended(state, name, numbers, shift, examples=examples))
            exact = [sum_ + weight * number * 2**shift for sum_, number in zip(exact, numbers, strict=True)]
        else:
            scalars = [rng.randint(-127, 127) for _ in range(5)]
            updates.append(probed(state, name, scalars, examples=examples))
            for k, q in zip(drawn(state, name, 5).tolist(), scalars, strict=True):
                for group in range(size // 8):
                    exact[8 * group + k] += weight * q * 2**state.shift
    expected = np.array([round(value / total) for value in exact], object).astype(np.int64).astype(np.int32)
    after = METHOD.aggregate(state, updates)
    assert after.sums.tolist() == expected.tolist()
    shuffled = random.Random(0).sample(updates, len(updates))
    assert digest(encode(METHOD.aggregate(state, shuffled))) == digest(encode(after))


def test_where_all_probe_the_verbs_change_no_bit() -> None:
    plain, stated = first(verbs=()), first(verbs=("probe",))
    for _ in range(3):
        answers = [probed(plain, name, [5, -127, 64, 1], examples=size) for name, size in (("a", 3), ("b", 70))]
        plain, stated = METHOD.aggregate(plain, answers), METHOD.aggregate(stated, answers)
    assert digest(encode(plain)) == digest(encode(stated))


def test_a_scalar_moves_its_number_in_every_group() -> None:
    state = first(groups=2, fraction_bits=0)
    (k,) = drawn(state, "phone", 1).tolist()
    after = METHOD.aggregate(state, [probed(state, "phone", [3])])
    assert np.flatnonzero(after.sums).tolist() == [k, 4 + k]
    assert set(after.sums[[k, 4 + k]].tolist()) == {48}


def test_ten_clients_of_either_kind_count_by_their_examples_alone() -> None:
    state = first(weights="uniform", fraction_bits=0)
    pushes = [descended(state, f"gpu-{n}", [16, 0, 0, 0]) for n in range(9)]
    after = METHOD.aggregate(state, [*pushes, descended(state, "other", [0, 16, 0, 0])])
    assert after.sums.tolist() == [14, 2, 0, 0]


# ---- what is asked


def test_what_a_client_is_asked_follows_from_its_verb() -> None:
    state = first(scalar_bits=4, groups=2)
    task = asked(state).descend
    assert (task.count, task.bits, task.fallback) == (8, 4, None)
    assert task.probe.groups == 2
    assert asked(state).plan.training == DESCENT
    auto = asked(state, verb="auto")
    assert auto.descend.fallback == PROBING
    assert auto.plan.training == DESCENT
    probing = asked(state, verb="probe")
    assert isinstance(probing.task, ProbeSeeds)
    assert probing.plan.training == PROBING
    for order in (asked(state), auto, probing):
        assert decode_assignment(encode_assignment(order).header, {}).task == order.task


def test_in_a_mixed_run_all_measure_first_and_none_where_nobody_probes() -> None:
    mixed = first(scalar_step="auto")
    for verb in ("descend", "auto", "probe"):
        order = asked(mixed, verb=verb)
        assert isinstance(order.task, ProbeSeeds)
        assert (order.task.calibrate, order.plan.training) == (True, PROBING)
    rms = update(mixed, "gpu", ProbeResult(np.empty(0, np.int8), rms=1e-7), 10)
    settled = METHOD.aggregate(mixed, [rms])
    assert isinstance(asked(settled).task, DescendSeeds)
    assert settled.exponent in DESCENDING
    alone = first(verbs=("descend",), scalar_step="auto")
    assert isinstance(asked(alone).task, DescendSeeds)
    assert alone.exponent == 24


@pytest.mark.parametrize("rms", [0.0, 1e-12, 1e-7, 1e-5, 1e-2, 1e6])
def test_the_unit_of_a_mixed_run_suits_both(rms: float) -> None:
    start = first(scalar_step="auto")
    state = METHOD.aggregate(start, [update(start, "phone", ProbeResult(np.empty(0, np.int8), rms=rms), 10)])
    assert state.exponent in DESCENDING
    assert 0 <= state.shift <= 24
    assert isinstance(asked(state).task, DescendSeeds)


def test_the_largest_shift_is_what_the_steps_reach_and_the_sums_have_room_for() -> None:
    state = first(verbs=("descend",), seeds=4096)
    # 2 * 8 steps of 0.02 * 2^24 / 64 units, of which 127 are one number: 660, so 2^10.
    assert asked(state).descend.largest_shift == 10
    sums = np.zeros(4096, np.int64)
    for shift, room in ((10, 127 * 4096 * 2**10 + 2048), (9, 127 * 4096 * 2**10 + 2047), (0, 127 * 4096 + 2048)):
        sums[0] = 2**31 - 1 - room
        full = replace(state, accumulators={"a": sums.astype(np.int32)})
        assert asked(full).descend.largest_shift == shift
        # The worst answer leaves the sums within what a ledger may hold.
        worst = descended(full, "gpu", np.where(sums < 0, -127, 127).tolist(), shift)
        decode_ledger(METHOD.aggregate(full, [worst]).ledger.encode())


# ---- redrawn banks


def test_a_bank_is_redrawn_after_so_many_rounds_and_the_earlier_ones_stay() -> None:
    state = first(verbs=("descend",), redraw=4)
    keys = [bank_key(SEED, number) for number in range(3)]
    for number in range(9):
        task, bank = asked(state).descend, number // 4
        assert (task.probe.key, task.probe.earlier) == (keys[bank], tuple(keys[:bank]))
        assert (task.count, len(state.sums)) == (4, 4 * (bank + 1))
        before, state = state, METHOD.aggregate(state, [descended(state, "gpu", [1, 2, 3, 4])])
        assert (state.sums[: 4 * bank] == before.sums[: 4 * bank]).all()
    assert state.sums.tolist() == [4, 8, 12, 16, 4, 8, 12, 16, 1, 2, 3, 4]
    assert METHOD.figures(state)["banks"] == 3


def test_the_model_of_a_run_has_no_bank_along_which_nothing_has_moved() -> None:
    state = first(verbs=("descend",), redraw=4)
    for _ in range(4):
        state = METHOD.aggregate(state, [descended(state, "gpu", [1, 2, 3, 4])])
    tuned = METHOD.global_model(state).seeds
    assert tuned is not None
    assert (len(state.sums), tuned.ledger.bank.size) == (8, 4)
    assert decode_ledger(tuned.ledger.encode()).accumulators.tolist() == [4, 8, 12, 16]


def test_a_client_that_holds_fewer_banks_is_sent_what_has_changed_since() -> None:
    state = first(verbs=("descend",), redraw=4, seeds=64)
    for _ in range(5):
        state = METHOD.aggregate(state, [descended(state, "gpu", [1] * 64)])
    form = asked(state).probe.state
    assert (form.form, form.since) == ("changed", 4)
    assert pad_zeros(state.past["4"], 128).tolist() == [4] * 64 + [0] * 64


def test_a_log_is_sent_only_where_all_have_probed() -> None:
    state = first(public_log=True, seeds=1024, scalar_step=2.0**-18)
    state = METHOD.aggregate(state, [probed(state, "a", [1, 2]), probed(state, "b", [3, 4])])
    state = METHOD.aggregate(state, [probed(state, "a", [1, 2])])
    assert asked(state, "a", verb="probe").probe.state.form == "log"
    state = METHOD.aggregate(state, [probed(state, "a", [1, 2]), descended(state, "b", [9] * 1024)])
    assert asked(state, "a", verb="probe").probe.state.form != "log"
    state = METHOD.aggregate(state, [probed(state, "a", [1, 2])])
    assert asked(state, "a", verb="probe").probe.state.form == "log"
    assert asked(state, "b", verb="probe").probe.state.form != "log"


# ---- the state


def test_a_state_that_was_kept_goes_on_to_the_same_bits() -> None:
    state = first(redraw=4, groups=2)
    for number in range(6):
        cohort = [descended(state, "gpu", list(range(-4, 4)), number), probed(state, "phone", [7, -7])]
        state = METHOD.aggregate(state, cohort)
        again = decode(b"".join(encode(state)), first(redraw=4, groups=2))
        assert (again.digest, again.widest, again.grown) == (state.digest, state.widest, state.grown)
        assert asked(again) == asked(state)
        state = again


def test_a_state_of_a_run_that_probes_alone_names_nothing_of_descending() -> None:
    state = first(verbs=("probe",))
    state = METHOD.aggregate(state, [probed(state, "a", [1, 2])])
    assert b"widest" not in b"".join(encode(state))
    assert b"grown" not in b"".join(encode(state))


def test_the_figures_of_a_round_in_which_clients_descend_by_hand() -> None:
    state = first(verbs=("descend",), groups=2)
    state = METHOD.aggregate(state, [descended(state, "a", [1, 2, 3, 4, 0, 0, 0, 9], 6)])
    figures: Mapping[str, Any] = METHOD.figures(state)
    assert figures["sum_abs"] == 10 * 64
    assert figures["displacement_rms"] == pytest.approx(np.sqrt(111 / 2) * 2.0**-18)
    assert figures["number_step"] == 2.0**-18
    room = 2**31 - 1 - 640
    assert figures["rounds_left"] == (room - (127 * 4 * 64 + 2)) // 640


def test_one_client_that_states_a_larger_shift_does_not_end_the_run() -> None:
    state = first(verbs=("descend",))
    honest = [descended(state, name, [64] * 4, 3) for name in ("a", "b")]
    assert METHOD.aggregate(state, [*honest, descended(state, "liar", [64] * 4, 24)]).widest == 3


# ---- what does not go together


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"groups": 3}, "method.groups"),
        ({"groups": 4, "bank": "kron"}, "method.groups"),
        ({"redraw": 4, "sampling": "pro"}, "method.redraw"),
        ({"verb": "descend", "sampling": "pro"}, "method.sampling"),
        ({"verb": "descend", "public_log": True}, "method.public_log"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_by_name(changes: Mapping[str, Any], path: str) -> None:
    assert [fault.path for fault in faults(FedKSeedSettings(**changes), [4])] == [path]
