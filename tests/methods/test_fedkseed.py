from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from math import inf
from statistics import median
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.directions import sampling as sampling_module
from fedtune.directions.bank import BANKS, displacement, headroom, perturb
from fedtune.directions.blocks import INT32_LIMIT
from fedtune.directions.consistency import STATE, block_checks, sample_places
from fedtune.directions.downlink import MAX_LOG
from fedtune.directions.sampling import paper_probabilities, repaired_probabilities
from fedtune.directions.seed_ledger import Manifest, describe_base
from fedtune.errors import ConfigError, RoundError
from fedtune.lora.adapter import delta
from fedtune.messages import (
    AdmittedUpdate,
    Assignment,
    Blueprint,
    ClientUpdate,
    Plan,
    PlannedClient,
    ProbeResult,
    ProbeSeeds,
    SeedState,
    Training,
)
from fedtune.methods.fedkseed import COARSE, METHOD
from fedtune.methods.fedkseed_state import PROVISIONAL, FedKSeedSettings, FedKSeedState
from fedtune.methods.method import LinearMethod
from fedtune.methods.seed_room import rounds_left
from fedtune.methods.serialization import decode, digest, encode
from fedtune.probing.replica import Replicas, restore
from fedtune.seeds import derive, generator
from fedtune.store.seeds import kron_adapter
from fedtune.tensors import Array
from fedtune.wire.codec import decode_assignment, encode_assignment

SEED = 11
BASE = describe_base(
    {
        "embed.weight": np.zeros((30, 6), np.float32),
        "layer.bias": np.zeros(6, np.float32),
        "layer.weight": np.zeros((6, 10), np.float32),
        "wide.weight": np.zeros((3, 4100), np.float32),
    }
)
MODULES = {"layer": (6, 10), "wide": (3, 4100)}


def settled(**changes: Any) -> FedKSeedSettings:
    """Return settings of a small pool whose scalars need not be measured first: a scalar of one is 2^-20."""
    return FedKSeedSettings(**{"seeds": 8, "scalar_step": 2.0**-20, **changes})


def first(manifest: Manifest = BASE, **changes: Any) -> FedKSeedState:
    blueprint = Blueprint(MODULES, {}, max_rank=1, seed=SEED, manifest=manifest.encode() if manifest.entries else b"")
    return METHOD.init(blueprint, settled(**changes))


def plan(client: str = "ann", steps: int = 4) -> Plan:
    return Plan(client, rank=1, scale=1.0, training=Training(batch=1, learning_rate=1.0, steps=steps))


def assigned(state: FedKSeedState, client: str = "ann", steps: int = 4) -> Assignment:
    return METHOD.assign(state, SEED, PlannedClient(plan(client, steps)))


def assigned_whole(state: FedKSeedState, client: str = "ann", steps: int = 4) -> Assignment | None:
    return METHOD.assign_whole(state, SEED, PlannedClient(plan(client, steps)))


def probe(state: FedKSeedState, client: str = "ann", steps: int = 4) -> ProbeSeeds:
    return assigned(state, client, steps).probe


def answer(
    state: FedKSeedState, client: str, scalars: Sequence[int] = (), *, examples: int = 10, rms: float | None = None
) -> AdmittedUpdate:
    """Return what an honest client sends."""
    probed = ProbeResult(np.array(scalars, np.int8), state=state.digest[:STATE], checks=state.checks, rms=rms)
    return AdmittedUpdate(ClientUpdate(client, state.round + 1, examples, probed))


def drawn(state: FedKSeedState, client: str, steps: int) -> Array:
    """Return the seeds as the client draws them, from its assignment alone."""
    asked, order = probe(state, client, steps), assigned(state, client, steps)
    key = derive(order.seed, "fedkseed.ids")
    return sampling_module.sample_ids(key, steps, asked.seeds, sampling=asked.sampling, levels=asked.levels)


def by_hand(state: FedKSeedState, cohort: Mapping[str, tuple[int, Sequence[int]]]) -> list[int]:
    """Return the accumulators after a round: weight and scalars by client, in fractions."""
    sums = [Fraction(0)] * len(state.sums)
    total = sum(weight for weight, _ in cohort.values())
    for client, (weight, scalars) in cohort.items():
        for k, q in zip(drawn(state, client, len(scalars)).tolist(), scalars, strict=True):
            sums[k] += Fraction(weight * q * 2**state.shift, total)
    return [int(old) + round(new) for old, new in zip(state.sums.tolist(), sums, strict=True)]


def fingerprint(state: FedKSeedState) -> str:
    return digest(encode(state))


def rounds(state: FedKSeedState, count: int, *, steps: int = 4, fleet: Sequence[str] = ("ann", "bob", "cleo")) -> Any:
    """Return the state some rounds on; clients' scalars are random, and so is who takes part."""
    for _ in range(count):
        rng = generator(derive(SEED, "test.cohort", state.round))
        cohort = [name for name in fleet if rng.random() < 0.6] or [fleet[0]]
        state = METHOD.aggregate(state, [random_answer(state, name, steps) for name in cohort])
    return state


def random_answer(state: FedKSeedState, client: str, steps: int = 4) -> AdmittedUpdate:
    rng = generator(derive(SEED, "test.scalars", state.round, client))
    examples = int(rng.integers(1, 200))
    if not state.calibrated:
        return answer(state, client, examples=examples, rms=float(rng.uniform(1e-5, 1e-4)))
    return answer(state, client, rng.integers(-120, 121, steps).tolist(), examples=examples)


# ---- the first state


def test_it_probes_has_no_adapter_and_is_not_private_by_type() -> None:
    assert not isinstance(METHOD, LinearMethod)  # a log, Pro and the check for saturation read each client's scalars
    assert METHOD.task is ProbeSeeds
    state = first()
    assert METHOD.adapter(state) == {}
    assert state.saved == {}
    tuned = METHOD.global_model(state)
    assert tuned.seeds is not None
    assert tuned.seeds.ledger.digest == state.digest
    assert tuned.seeds.manifest == BASE
    assert tuned.seeds.trainable == [0, 1, 2, 3]


def test_the_first_state_is_k_zeros_of_the_runs_own_bank_and_base() -> None:
    state = first(seeds=64)
    assert state.sums.dtype == np.int32
    assert state.sums.tolist() == [0] * 64
    assert (state.round, state.coarseness, state.shift) == (0, 0, 4)
    assert state.bank == BANKS["hadamard"](64, derive(SEED, "fedkseed.bank"))
    assert state.ledger.manifest == BASE.digest
    assert bytes.fromhex(state.base) == BASE.digest


def test_the_unit_follows_from_the_step_of_a_scalar() -> None:
    # lr 3e-7 and steps of 0.8 g are 2^-22; four bits below it are 2^-26.
    assert first(scalar_step=2.4e-7).exponent == 26
    assert first(scalar_step=2.0**-20).exponent == 24
    assert first(scalar_step=2.0**-20, fraction_bits=0).exponent == 20
    assert first(scalar_step=2.0**-20, fraction_bits=8).exponent == 28
    # The perturbation is a whole number of units: 5e-4 at e = 26 becomes 4.99994e-4.
    assert first(scalar_step=2.4e-7).perturbation == 33_554
    assert METHOD.figures(first(scalar_step=2.0**-20))["scalar_step"] == 2.0**-20


@given(step=st.floats(min_value=1e-40, max_value=1e-3), perturbation=st.floats(min_value=1e-6, max_value=1))
@settings(deadline=None, max_examples=50)
def test_no_step_is_so_small_that_the_perturbation_leaves_32_bits(step: float, perturbation: float) -> None:
    for bank in ("hadamard", "gaussian"):
        state = first(scalar_step=step, perturbation=perturbation, bank=bank)
        assert 0 <= state.exponent <= 125
        assert state.perturbation >= 1
        assert headroom(state.bank, state.sums, amount=state.perturbation) > 0
        assert assigned(state, steps=1).round == 1


@pytest.mark.parametrize(("bank", "seeds"), [("hadamard", 12), ("kron", 8), ("gaussian", 3)])
def test_a_pool_of_another_size_than_the_bank_has_is_refused(bank: str, seeds: int) -> None:
    with pytest.raises(ConfigError, match="the nearest is"):
        first(bank=bank, seeds=seeds)


def test_kron_moves_layers_alone_and_patterns_choose_among_them() -> None:
    def names(**changes: Any) -> list[str]:
        state = first(bank="kron", seeds=16, **changes)
        return [BASE.entries[ordinal].name for ordinal in state.trainable]

    assert names() == ["layer.weight", "wide.weight"]
    assert names(trainable=("layer.*",)) == ["layer.weight"]
    assert names(vectors=True, embeddings=True) == ["embed.weight", "layer.bias", "layer.weight", "wide.weight"]
    with pytest.raises(ConfigError, match="which names none"):
        names(trainable=("absent",))


def test_the_head_of_modules_to_save_is_a_layer_to_kron() -> None:
    head = {"embed.weight": np.zeros((30, 6), np.float32), "layer.bias": np.zeros(6, np.float32)}
    blueprint = Blueprint({}, head, max_rank=1, seed=SEED, manifest=BASE.encode())
    state = METHOD.init(blueprint, settled(bank="kron", seeds=16))
    assert state.trainable == [0]


# ---- one round


def test_what_a_client_is_told() -> None:
    state = first(sampling="distinct", trainable=("layer.*",), clip=0.5)
    order, asked = assigned(state, "ann", 4), probe(state)
    assert (order.method, order.round, type(order.task), order.plan) == ("fedkseed", 1, ProbeSeeds, plan())
    assert order.seed == derive(SEED, "client", 1, "ann")
    assert asked == ProbeSeeds(
        bank="hadamard",
        seeds=8,
        key=derive(SEED, "fedkseed.bank"),
        exponent=24,
        shift=4,
        perturbation=round(5e-4 * 2**24),
        state=SeedState("log", 0, b"", 0, state.digest),  # of no rounds: the shortest form of zeros
        sampling="distinct",
        clip=0.5,
        trainable=("layer.*",),
    )
    assert assigned_whole(state) is None


@pytest.mark.parametrize(("clip", "sent"), [("quantile", 0.0), ("none", inf), (0.25, 0.25)])
def test_the_clip_travels_as_a_number(clip: Any, sent: float) -> None:
    assert probe(first(clip=clip)).clip == sent


def test_queries_and_normalisation_are_told_for_one_sided_steps_alone() -> None:
    two_sided, one_sided = probe(first(queries=4)), probe(first(queries=4, estimator="one-sided"))
    plain = probe(first(queries=4, estimator="one-sided", normalise=False))
    assert [(asked.estimator, asked.queries, asked.normalise) for asked in (two_sided, one_sided, plain)] == [
        *(("two-sided", 1, False), ("one-sided", 4, True), ("one-sided", 4, False))
    ]


def test_what_is_told_can_travel() -> None:
    for changes in ({}, {"bank": "kron", "seeds": 16}, {"sampling": "pro"}, {"sync": "whole", "clip": 0.5}):
        state = rounds(first(**changes), 3)
        order = assigned(state)
        encoded = encode_assignment(order)
        assert decode_assignment(encoded.header, encoded.blobs).probe == order.probe


def test_a_round_by_hand() -> None:
    state = first(weights="uniform")
    after = METHOD.aggregate(state, [answer(state, "ann", [10, -5, 127, 1]), answer(state, "bob", [-127, 2, 0, 3])])
    expected = by_hand(state, {"ann": (1, [10, -5, 127, 1]), "bob": (1, [-127, 2, 0, 3])})
    assert after.sums.tolist() == expected
    assert after.round == 1
    assert after.sums.dtype == np.int32
    # Seen on paper: ann alone adds each scalar times 2^4 to the seed that she has drawn.
    alone = METHOD.aggregate(state, [answer(state, "ann", [10, -5, 127, 1])])
    plain = [0] * 8
    for k, q in zip(drawn(state, "ann", 4).tolist(), [10, -5, 127, 1], strict=True):
        plain[k] += 16 * q
    assert alone.sums.tolist() == plain
    assert state.sums.tolist() == [0] * 8


@pytest.mark.parametrize("sampling", ["uniform", "distinct", "pro"])
def test_many_rounds_by_hand(sampling: str) -> None:
    state = first(sampling=sampling, fraction_bits=2)
    for number in range(4):
        scalars = {name: generator(derive(number, name)).integers(-99, 100, 6).tolist() for name in ("ann", "bob")}
        weights = {"ann": 127, "bob": 42}  # 100 examples and 33 of them: 127 * 0.33 = 41.9
        expected = by_hand(state, {name: (weights[name], scalars[name]) for name in scalars})
        cohort = [answer(state, name, scalars[name], examples={"ann": 100, "bob": 33}[name]) for name in scalars]
        state = METHOD.aggregate(state, cohort)
        assert state.sums.tolist() == expected
    assert state.round == 4


def test_every_client_counts_by_its_examples() -> None:
    # A public implementation added all histories up, whatever the clients' sizes.
    state = first()
    results = {
        examples: METHOD.aggregate(
            state, [answer(state, "ann", [90] * 4, examples=examples), answer(state, "bob", [-90] * 4, examples=100)]
        ).sums.tolist()
        for examples in (1, 50, 100)
    }
    assert results[1] == by_hand(state, {"ann": (1, [90] * 4), "bob": (127, [-90] * 4)})
    assert results[50] == by_hand(state, {"ann": (64, [90] * 4), "bob": (127, [-90] * 4)})  # 63.5 to the even one
    assert results[100] == by_hand(state, {"ann": (127, [90] * 4), "bob": (127, [-90] * 4)})
    assert len({tuple(each) for each in results.values()}) == 3


def test_no_client_is_so_small_that_it_does_not_count() -> None:
    state = first()
    cohort = [answer(state, "ann", [127] * 4, examples=1), answer(state, "bob", [0] * 4, examples=10**9)]
    # One part of 128 of 127 * 16 is 16 and a bit per scalar.
    assert METHOD.aggregate(state, cohort).sums.tolist() == by_hand(state, {"ann": (1, [127] * 4), "bob": (127, [0])})
    assert METHOD.aggregate(state, cohort).sums.any()


def test_uniform_weights_ignore_the_examples() -> None:
    state = first(weights="uniform")
    after = [
        METHOD.aggregate(
            state, [answer(state, "ann", [9] * 4, examples=size), answer(state, "bob", [5] * 4, examples=1)]
        )
        for size in (1, 1000)
    ]
    assert after[0].sums.tolist() == after[1].sums.tolist()


def test_two_clients_of_a_round_and_two_rounds_of_a_client_draw_different_seeds() -> None:
    # In a public port every client's generator had the same seed: all drew the same 200 of 4096.
    state = first(seeds=4096)
    later = replace(state, round=1)
    found = [drawn(state, "ann", 200), drawn(state, "bob", 200), drawn(later, "ann", 200), drawn(later, "bob", 200)]
    assert len({tuple(each.tolist()) for each in found}) == 4
    union = set(np.concatenate(found).tolist())
    assert len(union) > 700  # of 4096, 800 draws hit 726 on average


def test_the_order_of_arrival_changes_no_bit() -> None:
    fleet = ("cleo", "ann", "dan", "bob")
    state = rounds(first(sampling="pro", sync="auto"), 2, fleet=fleet)
    updates = [random_answer(state, name) for name in fleet]
    found = set()
    for number in range(8):
        random.Random(number).shuffle(updates)
        found.add(fingerprint(METHOD.aggregate(state, updates)))
    assert len(found) == 1
    logged = first(public_log=True)
    updates = [random_answer(logged, name) for name in fleet]
    assert len({fingerprint(METHOD.aggregate(logged, each)) for each in (updates, updates[::-1])}) == 1


def test_a_round_edits_nothing_that_it_received() -> None:
    for changes in ({"sampling": "pro"}, {"public_log": True}, {"scalar_step": "auto"}):
        state = rounds(first(**changes), 3)
        for part in (state.accumulators, state.drawn, state.past, state.log):
            for array in part.values():
                array.flags.writeable = False
        before, updates = fingerprint(state), [random_answer(state, "ann"), random_answer(state, "bob")]
        METHOD.aggregate(state, updates)
        assigned(state)
        assert fingerprint(state) == before


# ---- saturation


@pytest.mark.parametrize(("at_bound", "coarser"), [(0, 0), (1, 0), (2, 1), (100, 1)])
def test_more_than_a_hundredth_of_scalars_at_their_bound_makes_the_next_ones_coarser(
    at_bound: int, coarser: int
) -> None:
    state = first()
    scalars = [(-127, 127)[i % 2] if i < at_bound else 126 for i in range(100)]
    after = METHOD.aggregate(state, [answer(state, "ann", scalars)])
    assert (after.coarseness, after.shift, probe(after).shift) == (coarser, 4 + coarser, 4 + coarser)
    # This round itself is added at the step that its clients were told.
    assert after.sums.tolist() == by_hand(state, {"ann": (1, scalars)})


def test_the_share_at_the_bound_is_that_of_all_the_cohort() -> None:
    state = first()
    full, calm = answer(state, "ann", [127] * 2 + [1] * 98), answer(state, "bob", [1] * 100)
    assert METHOD.aggregate(state, [full]).coarseness == 1
    assert METHOD.aggregate(state, [full, calm]).coarseness == 0


def test_a_coarser_scalar_moves_twice_as_far_and_the_unit_stays() -> None:
    fine = first()
    coarse = METHOD.aggregate(fine, [answer(fine, "ann", [127, -127, 127, -127])])
    assert coarse.exponent == fine.exponent
    after = METHOD.aggregate(coarse, [answer(coarse, "bob", [1, 2, 3, 4])])
    assert (after.sums - coarse.sums).tolist() == [
        2 * each - 2 * old
        for each, old in zip(
            by_hand(replace(coarse, coarseness=0), {"bob": (1, [1, 2, 3, 4])}), coarse.sums.tolist(), strict=True
        )
    ]
    assert METHOD.figures(coarse)["scalar_step"] == 2 * METHOD.figures(fine)["scalar_step"]


# ---- the first round of "auto"


def test_the_first_round_chooses_the_unit_from_the_median_of_what_clients_measured() -> None:
    state = first(scalar_step="auto")
    assert (state.calibrated, state.exponent, probe(state).calibrate) == (False, PROVISIONAL, True)
    sizes = {"ann": 2.0**-14, "bob": 1.0, "cleo": 1e-30}
    after = METHOD.aggregate(state, [answer(state, name, rms=rms) for name, rms in sizes.items()])
    # The median over 8 is 2^-17; with four bits below it u = 2^-21.
    assert (after.calibrated, after.exponent, after.round) == (True, 21, 1)
    assert not after.sums.any()
    asked = probe(after)
    assert (asked.calibrate, asked.exponent, asked.shift) == (False, 21, 4)
    assert asked.perturbation == round(5e-4 * 2**21)
    assert METHOD.figures(after)["scalar_step"] == median(sizes.values()) / COARSE
    assert after.digest != replace(after, exponent=PROVISIONAL).digest


@pytest.mark.guarantee("G4")
@pytest.mark.parametrize("others", [1, 4])
def test_one_clients_claim_does_not_make_the_unit_too_coarse_for_all(others: int) -> None:
    """With half of a claim of 1e6 as the median of two, every honest scalar would round to zero."""
    state = first(scalar_step="auto")
    honest = [answer(state, f"site-{index}", rms=2.0**-14) for index in range(others)]
    after = METHOD.aggregate(state, [answer(state, "eve", rms=1e6), *honest])
    assert after.exponent == 21


def test_the_first_round_adds_no_scalars_even_if_some_come() -> None:
    state = first(scalar_step="auto", sampling="pro", public_log=False)
    after = METHOD.aggregate(state, [answer(state, "ann", [127] * 4, rms=2.0**-14)])
    assert not after.sums.any()
    assert not after.drawn["visits"].any()
    assert (after.coarseness, after.longest) == (0, 0)


def test_gradients_of_zero_leave_the_unit_provisional() -> None:
    state = first(scalar_step="auto")
    after = METHOD.aggregate(state, [answer(state, name, rms=0.0) for name in ("ann", "bob")])
    assert (after.calibrated, after.exponent) == (True, PROVISIONAL)


@pytest.mark.parametrize("rms", [1e-300, 5e-324, 1e6])
def test_no_size_that_is_admitted_breaks_the_unit(rms: float) -> None:
    state = first(scalar_step="auto")
    after = METHOD.aggregate(state, [answer(state, "ann", rms=rms)])
    assert 0 <= after.exponent <= 125
    assert headroom(after.bank, after.sums, amount=after.perturbation) > 0


# ---- headroom


@pytest.mark.parametrize(("bank", "seeds"), [("hadamard", 8), ("kron", 16), ("gaussian", 8)])
def test_a_round_that_could_leave_32_bits_is_not_begun(bank: str, seeds: int) -> None:
    start = first(bank=bank, seeds=seeds)
    growth = 127 * 4 * 16 + seeds // 2
    room = (INT32_LIMIT - 1) // start.bank.max_abs - start.perturbation
    sums = np.zeros(seeds, np.int64)
    sums[3] = -(room - growth)
    state = replace(start, accumulators={"a": sums.astype(np.int32)})
    assert rounds_left(state, 4) == 1
    assert probe(state).state.round == 0
    # The worst of rounds, and the perturbation on top, still fit into 32 bits: neither end meets an overflow.
    worst = [127 if k != 3 else -127 for k in drawn(state, "ann", 4).tolist()]
    after = METHOD.aggregate(state, [answer(state, "ann", worst)])
    displacement(state.bank, perturb(state.bank, after.sums, 3, -after.perturbation), ordinal=0, shape=(30, 6))
    assert rounds_left(after, 4) == 0
    sums[3] -= 1
    with pytest.raises(RoundError, match=r"round 1: expected room for 4 more scalars in sums of 32 bits; got sum") as e:
        assigned(replace(start, accumulators={"a": sums.astype(np.int32)}))
    assert e.value.final
    # Fewer scalars would have had room.
    assert assigned(replace(start, accumulators={"a": sums.astype(np.int32)}), steps=3).round == 1


def test_rounds_left_is_counted_down_by_hand() -> None:
    state = first()
    growth = 127 * 200 * 16 + 4
    assert rounds_left(state, 200) == (2**31 - 1 - state.perturbation) // growth
    coarser = replace(state, coarseness=3)
    assert rounds_left(coarser, 200) == (2**31 - 1 - state.perturbation) // (127 * 200 * 128 + 4)
    assert rounds_left(first(seeds=4096), 200) == (2**31 - 1 - state.perturbation) // 408_448


def test_a_coarseness_that_a_client_would_refuse_has_no_headroom_before() -> None:
    # The schema allows shifts to 24; at 25 even one scalar could leave 32 bits.
    assert rounds_left(replace(first(), coarseness=21), 1) == 0


# ---- what is refused


def test_work_on_the_servers_own_state_is_not_refused() -> None:
    state = rounds(first(), 3)
    assert METHOD.refuse(state, random_answer(state, "ann")) == ""
    calibrating = first(scalar_step="auto")
    assert METHOD.refuse(calibrating, random_answer(calibrating, "ann")) == ""


def spoiled(state: FedKSeedState, /, **changes: Any) -> AdmittedUpdate:
    good = answer(state, "ann", [1, 2, 3, 4])
    assert good.probe is not None
    return AdmittedUpdate(replace(good.update, result=replace(good.probe, **changes)))


def test_work_on_another_state_is_refused_with_both_digests() -> None:
    state = rounds(first(), 3)
    for other in (
        rounds(first(), 2),
        replace(state, exponent=state.exponent + 1),
        replace(state, seed=SEED + 1),
        replace(state, base=bytes(32).hex()),
        replace(state, accumulators={"a": state.sums + 1}),
    ):
        reason = METHOD.refuse(state, spoiled(state, state=other.digest[:8]))
        assert reason.startswith(f"expected work on the state {state.digest[:8].hex()}; got {other.digest[:8].hex()}")
    for cut in (b"", state.digest[:7], state.digest):
        assert METHOD.refuse(state, spoiled(state, state=cut))


@pytest.mark.parametrize(("bank", "seeds"), [("hadamard", 64), ("kron", 64), ("gaussian", 8)])
def test_the_planted_wrong_block_is_named(bank: str, seeds: int) -> None:
    state = rounds(first(bank=bank, seeds=seeds), 2)

    def off(kind: Any, sums: Array, *, ordinal: int, shape: Any, blocks: range) -> Array:
        y = displacement(kind, sums, ordinal=ordinal, shape=shape, blocks=blocks)
        return y + ((ordinal, blocks.start) == place)

    for place in sample_places(state.digest, BASE, state.trainable):
        theirs = block_checks(state.ledger, BASE, state.trainable, off)
        name = BASE.entries[place[0]].name
        assert METHOD.refuse(state, spoiled(state, checks=theirs)) == (
            f"expected the displacements of {name}, block {place[1]}, as the server makes them; got others"
        )
    assert METHOD.refuse(state, spoiled(state, checks=b""))
    assert METHOD.refuse(state, spoiled(state, checks=state.checks[:-1]))
    assert METHOD.refuse(state, spoiled(state, checks=state.checks + b"\0"))


# ---- short messages


class Device:
    """A client that follows its assignments with what it remembers."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.replicas = Replicas()
        self.forms = list[tuple[str, int]]()
        """Of the messages after the first round: before it there is nothing to send."""

    def arrive(self, state: FedKSeedState) -> None:
        """Hold that what the server sends leads to where it stands."""
        order = assigned(state, self.name)
        encoded = encode_assignment(order)
        found = self.read(decode_assignment(encoded.header, encoded.blobs))
        if found is None:
            whole = assigned_whole(state, self.name)
            assert whole is not None, "a client that needs the whole must be able to get it"
            self.forms.append(("lost", 0))
            found = self.read(whole)
        assert found is not None
        assert found.digest == state.digest
        assert found.accumulators.tolist() == state.sums.tolist()
        assert block_checks(found, BASE, state.trainable, displacement) == state.checks

    def read(self, order: Assignment) -> Any:
        asked = order.probe
        assert asked is not None
        if asked.state.round:
            self.forms.append((asked.state.form, asked.state.since))
        return restore(
            asked.state,
            bank=BANKS[asked.bank](asked.seeds, asked.key),
            exponent=asked.exponent,
            manifest=BASE.digest,
            sampling=asked.sampling,
            replicas=self.replicas,
        )


FLEET = ("ann", "bob", "cleo", "dan", "eve", "fay")


def cohort_of(round: int) -> list[str]:
    """Return who takes part: ann always; dan at first and after 20 rounds; eve from round 9 on; others now and then."""
    rng = generator(derive(SEED, "test.who", round))
    names = ["ann", *(name for name in ("bob", "cleo") if rng.random() < 0.4)]
    if round in (2, 3, 22, 23):
        names.append("dan")
    if round >= 9 and rng.random() < 0.5:
        names.append("eve")
    return names


def simulate(state: FedKSeedState, count: int, *, silent: Sequence[int] = (), forgets: Sequence[int] = ()) -> Any:
    """Return (state, devices) after some rounds in which every client of the cohort arrives where the server is.

    In `silent` rounds bob arrives, and keeps what he was sent, but his answer is lost; in `forgets` ann starts anew.
    """
    devices = {name: Device(name) for name in FLEET}
    for number in range(1, count + 1):
        assert state.round == number - 1
        cohort = sorted({*cohort_of(number), *(["bob"] if number in silent else [])})
        if number in forgets:
            devices["ann"].replicas = Replicas()
        for name in cohort:
            devices[name].arrive(state)
        answers = [random_answer(state, name) for name in cohort if not (name == "bob" and number in silent)]
        state = METHOD.aggregate(state, answers)
    return state, devices


MODES: Mapping[str, Mapping[str, Any]] = {
    "whole": {"sync": "whole"},
    "changed": {"sync": "auto"},
    "log": {"sync": "auto", "public_log": True},
    "log, distinct": {"sync": "auto", "public_log": True, "sampling": "distinct"},
    "pro": {"sync": "auto", "sampling": "pro"},
    "measured first": {"sync": "auto", "public_log": True, "scalar_step": "auto"},
    "kron": {"sync": "auto", "bank": "kron"},
}


@pytest.mark.parametrize("mode", MODES)
def test_every_client_always_arrives_where_the_server_is(mode: str) -> None:
    state, devices = simulate(first(seeds=256, **MODES[mode]), 26)
    forms = {form for device in devices.values() for form, _ in device.forms}
    assert "lost" not in forms
    if mode == "whole":
        assert forms == {"whole"}
        assert (state.past, state.acknowledged, state.log) == ({}, {}, {})
        return
    assert forms >= {"log"} if MODES[mode].get("public_log") else forms <= {"changed", "whole"}
    # Who was there in the round before is sent what that round changed, and no more.
    assert [since for _, since in devices["ann"].forms] == list(range(25))
    # A client that was away for 18 rounds is sent all of it, as is one that joins in round 9 or later.
    assert [since for _, since in devices["dan"].forms] == [0, 1, 0, 21]
    assert devices["eve"].forms[0][1] == 0
    assert all(since > 0 for _, since in devices["eve"].forms[1:])


def test_a_short_message_is_shorter() -> None:
    sizes = {}
    for mode in ("whole", "changed", "log"):
        state = rounds(first(seeds=256, **MODES[mode]), 6, fleet=("ann",))
        sizes[mode] = len(probe(state).state.data)
    # Four scalars: a bit per seed and 2 bytes each, or key, weight, count and scalars with 3 bytes in front.
    assert sizes == {"whole": 512, "changed": 256 // 8 + 2 * 4, "log": 3 + 11 + 4}


def test_what_a_client_was_sent_though_its_answer_was_lost_does_no_harm() -> None:
    for mode in ("changed", "log"):
        _, devices = simulate(first(seeds=256, **MODES[mode]), 22, silent=(3, 5, 6, 7, 12, 20, 21))
        assert "lost" not in {form for form, _ in devices["bob"].forms}


def test_a_client_that_forgot_gets_the_whole_and_is_short_again_after() -> None:
    for mode in ("changed", "log"):
        _, devices = simulate(first(seeds=256, **MODES[mode]), 12, forgets=(6, 9))
        forms = [form for form, _ in devices["ann"].forms]
        assert forms.count("lost") == 2
        # What follows each time refers to nothing.
        assert all(devices["ann"].forms[place + 1][1] == 0 for place, form in enumerate(forms) if form == "lost")


def test_a_log_spans_rounds_in_which_scalars_became_coarser() -> None:
    state, ann = first(public_log=True, seeds=4096), Device("ann")
    for scalars in ([5, 6, 7, 8], [127, -127, 127, -127], [5, 6, 7, 8], [127] * 4, [1, 2, 3, 4]):
        state = METHOD.aggregate(state, [answer(state, "bob", scalars)])
    assert state.coarseness == 2
    ann.arrive(state)
    assert probe(state, "ann").state.form == "log"


def test_the_server_forgets_what_nobody_can_refer_to() -> None:
    state = first(public_log=True, seeds=256)
    for number in range(40):
        who = ["ann"] if number else ["ann", "bob"]
        state = METHOD.aggregate(state, [random_answer(state, name) for name in who])
        number_of_rounds = state.round
        assert list(state.log) == [str(n) for n in range(max(1, number_of_rounds - MAX_LOG + 1), number_of_rounds + 1)]
        assert set(state.past) == {str(since) for since in state.acknowledged.values()}
        assert all(since >= number_of_rounds - MAX_LOG for since in state.acknowledged.values())
        assert state.acknowledged.get("ann", 0) == number_of_rounds - 1
    assert list(state.past) == ["39"]


def test_a_client_16_rounds_behind_is_still_sent_what_it_missed_and_17_not() -> None:
    state = first(public_log=True, seeds=4096)
    for _ in range(2):
        state = METHOD.aggregate(state, [random_answer(state, "bob", 1)])
    assert state.acknowledged == {"bob": 1}
    while state.round < 17:
        state = METHOD.aggregate(state, [random_answer(state, "ann", 1)])
    asked = probe(state, "bob").state
    assert (asked.form, asked.since, len(asked.data)) == ("log", 1, 16 * (3 + 11 + 1))
    state = METHOD.aggregate(state, [random_answer(state, "ann", 1)])
    assert probe(state, "bob").state.since == 0


def test_a_client_whose_message_needs_nothing_has_no_other_to_ask_for() -> None:
    state = rounds(first(seeds=256), 3, fleet=("ann",))
    order = assigned(state, "ann")
    whole = assigned_whole(state, "ann")
    assert order.probe.state.since == 2
    assert whole is not None
    assert whole.probe.state.since == 0
    assert replace(whole, task=order.probe) == order
    assert assigned_whole(state, "new") is None


# ---- the state at rest


@pytest.mark.parametrize("mode", MODES)
def test_a_state_that_was_kept_goes_on_to_the_same_bits(mode: str) -> None:
    start = first(seeds=64, **MODES[mode])
    state = start
    for number in range(6):
        kept = decode(b"".join(encode(state)), start)
        assert fingerprint(kept) == fingerprint(state)
        assert kept.digest == state.digest
        fleet = FLEET[: 1 + number % 3]
        for name in (*fleet, "new"):
            assert assigned(kept, name) == assigned(state, name)
        state, again = (METHOD.aggregate(each, [random_answer(each, name) for name in fleet]) for each in (state, kept))
        assert fingerprint(again) == fingerprint(state)
        assert METHOD.figures(again) == METHOD.figures(state)
    assert state.sums.any()


# ---- pro


def test_pro_draws_evenly_before_the_first_visit_and_by_its_rule_after() -> None:
    for name, rule in (("repaired", repaired_probabilities), ("paper", paper_probabilities)):
        state = first(sampling="pro", pro=name)
        assert probe(state).levels == bytes([255] * 8)
        after = METHOD.aggregate(state, [answer(state, "ann", [100, -100, 3, 0]), answer(state, "bob", [-9, 8, 7, -6])])
        sizes, visits = np.zeros(8, np.int64), np.zeros(8, np.int64)
        for client, scalars in (("ann", [100, -100, 3, 0]), ("bob", [-9, 8, 7, -6])):
            for k, q in zip(drawn(state, client, 4).tolist(), scalars, strict=True):
                sizes[k], visits[k] = sizes[k] + abs(q), visits[k] + 1
        assert after.drawn["sizes"].tolist() == sizes.tolist()
        assert after.drawn["visits"].tolist() == visits.tolist()
        assert probe(after).levels == sampling_module.quantise_levels(rule(sizes, visits)).tobytes()
        assert len(set(probe(after).levels)) > 1


def test_pro_counts_a_scalar_of_minus_127_as_127_in_the_unit_of_the_next_round() -> None:
    state = first(sampling="pro")
    after = METHOD.aggregate(state, [answer(state, "ann", [-127] * 4)])
    assert (after.coarseness, after.drawn["sizes"].sum()) == (1, 4 * (127 // 2))


def test_other_samplings_send_no_levels_and_count_nothing() -> None:
    for sampling in ("uniform", "distinct"):
        state = rounds(first(sampling=sampling), 2)
        assert (probe(state).levels, state.drawn) == (b"", {})


# ---- what is noted and exported


def test_the_figures_of_a_round_by_hand() -> None:
    state = replace(
        first(), accumulators={"a": np.array([3, 0, -4, 0, 0, 0, 0, 0], np.int32)}, coarseness=1, longest=200
    )
    assert METHOD.figures(state) == {
        "seeds_moved": 2,
        "sum_abs": 7,
        "displacement_rms": 5 * 2.0**-24,
        "scalar_step": 2.0 ** (5 - 24),
        "exponent": 24,
        "coarseness": 1,
        "rounds_left": (2**31 - 1 - 7 - state.perturbation) // (127 * 200 * 32 + 4),
    }
    assert "rounds_left" not in METHOD.figures(first())  # nobody has sent scalars yet


def test_the_figures_count_the_longest_update_so_far() -> None:
    state = first()
    after = METHOD.aggregate(state, [answer(state, "ann", [1] * 9), answer(state, "bob", [1] * 5)])
    assert after.longest == 9
    assert METHOD.aggregate(after, [answer(after, "ann", [1] * 2)]).longest == 9


def test_large_accumulators_do_not_overflow_the_figures() -> None:
    state = replace(first(), accumulators={"a": np.full(8, 2**27, np.int32)})
    noted = METHOD.figures(state)
    assert noted["sum_abs"] == 2**30
    assert noted["displacement_rms"] == pytest.approx(2.0**27 * 8**0.5 * 2.0**-24, rel=1e-12)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("most", [9, 2**19])
def test_a_kron_run_has_the_form_of_an_adapter_exactly(transposed: bool, most: int) -> None:
    start = first(bank="kron", seeds=16)
    sums = generator(3).integers(-most, most, 16, endpoint=True).astype(np.int32)
    assert np.abs(sums.astype(np.int64)).sum() < 2**24
    state = replace(start, accumulators={"a": sums})
    change = METHOD.global_model(state).seeds
    assert change is not None
    adapter = kron_adapter(change, transposed=transposed)
    assert set(adapter) == {"layer", "wide"}
    for name, factors in adapter.items():
        ordinal = BASE.ordinals[f"{name}.weight"]
        shape = BASE.entries[ordinal].shape  # (out, in), or (in, out) where layers are transposed
        y = displacement(state.bank, sums, ordinal=ordinal, shape=shape).reshape(shape).astype(np.float64)
        assert factors.a.dtype == factors.b.dtype == np.float32
        assert factors.a.shape[0] == factors.b.shape[1] == 4
        product = factors.b.astype(np.float64) @ factors.a.astype(np.float64)
        np.testing.assert_array_equal(product, -(2.0**-state.exponent) * (y.T if transposed else y))
        # In float32 too: every sum is a whole number of units below 2^24.
        np.testing.assert_array_equal(delta(factors), product.astype(np.float32))


def test_a_kron_run_that_has_not_moved_is_an_adapter_of_zero() -> None:
    change = METHOD.global_model(first(bank="kron", seeds=16)).seeds
    assert change is not None
    assert not any(delta(factors).any() for factors in kron_adapter(change, transposed=False).values())


# ---- a learning rate that the first round measures


def auto(state: FedKSeedState, client: str = "ann") -> Assignment:
    training = Training(batch=1, learning_rate="auto", steps=4)
    return METHOD.assign(state, SEED, PlannedClient(Plan(client, rank=1, scale=1.0, training=training)))


def measured(state: FedKSeedState, client: str, slope: float = 10.0, curvature: float = 2000.0) -> AdmittedUpdate:
    slopes = tuple(slope * (1 + 0.1 * number) for number in range(8))
    probed = ProbeResult(np.empty(0, np.int8), state=state.digest[:STATE], checks=state.checks)
    probed = replace(probed, slopes=slopes, curvatures=(curvature,) * 8)
    return AdmittedUpdate(ClientUpdate(client, state.round + 1, 10, probed))


THREE = ("ann", "bob", "cleo")


@pytest.mark.parametrize("scalar_step", ["auto", 2.0**-20])
def test_a_rate_is_measured_once_and_then_asked_for(scalar_step: Any) -> None:
    state = first(scalar_step=scalar_step)
    order = auto(state)
    assert (order.probe.calibrate, order.probe.curvatures) == (True, True)
    after = METHOD.aggregate(state, [measured(state, name) for name in THREE])
    assert after.sums.tolist() == state.sums.tolist()
    assert (after.round, after.calibrated) == (1, True)
    order = auto(after)
    assert (order.probe.calibrate, order.probe.curvatures) == (False, False)
    assert order.plan.training.learning_rate == 0.5 / 2000
    [remark] = METHOD.remarks(after)
    assert remark == (
        "learning rate 0.00025 chosen from 24 measurements of 3 clients (curvature 2e+03, agreement 1.00)"
    )
    assert METHOD.figures(after)["learning_rate"] == 0.00025
    if scalar_step == "auto":
        # A scalar of one is an eighth of a usual step: the rate times the slopes' root mean square, 13.7.
        assert METHOD.figures(after)["scalar_step"] == 2.0 ** round(np.log2(0.00025 * 13.7 / COARSE))
    else:
        assert after.exponent == state.exponent
    # Said once, asked for ever after, and resumed.
    later = METHOD.aggregate(after, [answer(after, name, [1, 2, 3, 4]) for name in THREE])
    assert METHOD.remarks(later) == ()
    assert auto(later).plan.training.learning_rate == 0.00025
    assert decode(b"".join(encode(later)), like=state).chosen == later.chosen


def test_a_rate_beyond_the_largest_is_cut_to_it() -> None:
    state = first(largest_rate=1e-4)
    after = METHOD.aggregate(state, [measured(state, name) for name in THREE])
    assert auto(after).plan.training.learning_rate == 1e-4


def test_clients_with_a_rate_of_their_own_step_while_the_others_measure() -> None:
    state = first(weights="uniform")
    stepped = answer(state, "bob", [1, 2, 3, 4])
    after = METHOD.aggregate(state, [measured(state, "ann"), stepped, measured(state, "cleo")])
    assert after.sums.tolist() == METHOD.aggregate(state, [stepped]).sums.tolist()
    assert after.chosen["clients"] == 2
    assert assigned(after, "bob").plan.training.learning_rate == 1.0


def test_a_state_without_a_measured_rate_is_written_as_it_always_was() -> None:
    state = METHOD.aggregate(first(), [answer(first(), "ann", [1, 2, 3, 4])])
    assert b"chosen" not in b"".join(encode(state))


def test_slopes_that_agree_on_nothing_end_the_run_with_what_to_do() -> None:
    state = first()
    with pytest.raises(RoundError, match=r"round 1: expected slopes .*head = 'lda'"):
        METHOD.aggregate(state, [measured(state, name, slope=0.0) for name in THREE])
