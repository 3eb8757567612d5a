"""FedKSeed: all parameters tuned by forward passes; seeds and scalars travel (Qin et al., ICML 2024, 2312.06353).

The model after any history is w0 - 2^-e sum_k A_k z_k with K integers A_k and directions z_k from a counter, so the
server holds integers and no model. Where the published code adds floats in the order of arrival, here a cohort's
scalars are averaged as whole numbers; where it draws with the device's own generator, every device gets the same bits.

A client may also descend: it follows the slopes along all directions by first-order steps, as Ferret does (Shu et al.,
ICML 2025, 2409.06277) but inside the K numbers, and sends what each has moved by. Both kinds add to one exact sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from math import inf, sqrt
from statistics import median, median_low
from typing import Any

import numpy as np

from fedtune.directions import downlink, sampling
from fedtune.directions.bank import BANKS
from fedtune.directions.consistency import STATE, first_wrong
from fedtune.directions.downlink import (
    MAX_LOG,
    MAX_SCALAR,
    MAX_SHIFT,
    MAX_WEIGHT,
    LoggedRound,
    LoggedUpdate,
    count_scalars,
    increments,
    weighted_sum,
)
from fedtune.directions.seed_ledger import Manifest, decode_manifest
from fedtune.directions.space import plain_banks
from fedtune.directions.trainable import TensorSelection, trainable_ordinals
from fedtune.lora.adapter import Adapter
from fedtune.messages import (
    AdmittedUpdate,
    Assignment,
    Blueprint,
    DescendResult,
    DescendSeeds,
    Plan,
    PlannedClient,
    ProbeResult,
    ProbeSeeds,
    SeedState,
    SeedTask,
)
from fedtune.methods.fedkseed_guard import (
    diverges,
    guard_figures,
    guard_remarks,
    halve_rate,
    losses_of,
    set_back,
    watch,
)
from fedtune.methods.fedkseed_rate import (
    chosen_rate,
    measurements,
    rate_figures,
    rate_remarks,
    step_size,
    with_rate,
)
from fedtune.methods.fedkseed_state import DESCENDING, FedKSeedSettings, FedKSeedState, faults, units
from fedtune.methods.method import Method, SeedModel
from fedtune.methods.seed_room import check_headroom, fewest_rounds_left, largest_shift
from fedtune.seeds import derive
from fedtune.tensors import Array, Tensors

COARSE = 8.0
"""A scalar of one is an eighth of the root mean square of g: five bits of entropy in a scalar of eight."""
SATURATED = 0.01
"""Share of scalars at their bound above which the next round's are twice as coarse."""


def init(blueprint: Blueprint, settings: FedKSeedSettings) -> FedKSeedState:
    """Return the first state: K zeros.

    Raises:
        ConfigError: if K is none of the bank's sizes, or the bank cannot move the tensors that are asked for.
    """
    listed = decode_manifest(blueprint.manifest) if blueprint.manifest else Manifest(())
    layers = {f"{name}.weight" for name in blueprint.modules} | {
        name for name, array in blueprint.saved.items() if array.ndim == 2
    }
    ordinals = trainable_ordinals(listed, reach(settings), layers) if listed.entries else ()
    # Refuses a K that the bank does not have.
    BANKS[settings.bank](settings.seeds, 0)
    zeros, verbs = np.zeros(settings.seeds, np.int64), blueprint.verbs
    descends, probes = "descend" in verbs, not verbs or "probe" in verbs
    exponent, coarseness = units(settings, settings.scalar_step, descends=descends)
    state = FedKSeedState(
        settings=settings,
        manifest=listed,
        round=0,
        seed=blueprint.seed,
        base=listed.digest.hex(),
        trainable=list(ordinals),
        exponent=exponent if probes else DESCENDING.start,
        calibrated=settings.scalar_step != "auto" or not probes,
        guarded=True,
        coarseness=coarseness if probes else 0,
        longest=0,
        accumulators={"a": zeros.astype(np.int32)},
        drawn={"sizes": zeros, "visits": zeros} if settings.sampling == "pro" else {},
        acknowledged={},
        past={},
        log={},
        verbs=verbs,
    )
    return replace(state, accumulators={"a": np.zeros(state.bank.size, np.int32)})


def reach(settings: FedKSeedSettings) -> TensorSelection:
    return TensorSelection(settings.bank, settings.trainable, vectors=settings.vectors, embeddings=settings.embeddings)


def assign(state: FedKSeedState, seed: int, planned: PlannedClient) -> Assignment:
    """Send the accumulators in the shortest form that the client can read, and how to measure or to descend.

    Raises:
        RoundError: if the sums could leave 32 bits in this round.
    """
    return assignment_with(state, seed, planned, form_for(state, planned.plan.client))


def assign_whole(state: FedKSeedState, seed: int, planned: PlannedClient) -> Assignment | None:
    """Send the accumulators in a form that needs no earlier state; None where `assign` has done so already."""
    if form_for(state, planned.plan.client).since == 0:
        return None
    return assignment_with(state, seed, planned, state.forms[0])


def form_for(state: FedKSeedState, client: str) -> SeedState:
    """Return the shortest form that a client can read, by the round that it has last worked on."""
    since = state.acknowledged.get(client, 0)
    return state.forms[since if str(since) in state.past else 0]


def assignment_with(state: FedKSeedState, seed: int, planned: PlannedClient, form: SeedState) -> Assignment:
    plan, task = task_of(state, planned, probe_with(state, form))
    return Assignment(
        method="fedkseed",
        round=state.round + 1,
        seed=derive(seed, "client", state.round + 1, plan.client),
        plan=plan,
        task=task,
    )


def task_of(state: FedKSeedState, planned: PlannedClient, probe: ProbeSeeds) -> tuple[Plan, SeedTask]:
    """Return what a client is asked, and by which plan, after a check that the sums have room for every answer."""
    plan, probing = planned.plan, planned.probing
    training = probing or plan.training
    measured = replace(plan, training=halve_rate(state, with_rate(state, training)))
    asks_rate = training.learning_rate == "auto" and not state.chosen
    descends = planned.verb in ("descend", "auto")
    # All measure in the first round where it settles unit or rate: as many as there are give the best median.
    if not descends or (not state.trained and (asks_rate or not state.calibrated)):
        check_headroom(state, measured)
        return measured, replace(probe, calibrate=probe.calibrate or asks_rate, curvatures=asks_rate)
    plan = replace(plan, training=halve_rate(state, plan.training))
    bank, settings = state.bank, state.settings
    task = DescendSeeds(
        probe=probe,
        count=bank.newest.stop - bank.newest.start,
        largest_shift=largest_shift(state, plan.training),
        bits=settings.scalar_bits,
        fallback=measured.training if planned.verb == "auto" else None,
    )
    if task.fallback is not None:
        check_headroom(state, measured)
    return plan, task


def probe_with(state: FedKSeedState, form: SeedState) -> ProbeSeeds:
    """Return the task to measure from a state in this form."""
    settings, one_sided = state.settings, state.settings.estimator == "one-sided"
    keys = [bank.key for bank in plain_banks(state.bank)]
    return ProbeSeeds(
        bank=settings.bank,
        seeds=settings.seeds,
        key=keys[-1],
        exponent=state.exponent,
        shift=state.shift,
        perturbation=state.perturbation,
        state=form,
        sampling=settings.sampling,
        levels=state.levels,
        estimator=settings.estimator,
        queries=settings.queries if one_sided else 1,
        normalise=settings.normalise and one_sided,
        # On the wire 0 asks for the running quantile, and infinity for no bound.
        clip={"quantile": 0.0, "none": inf}.get(settings.clip, settings.clip),  # type: ignore[arg-type]
        trainable=settings.trainable,
        vectors=settings.vectors,
        embeddings=settings.embeddings,
        calibrate=not state.calibrated,
        groups=settings.groups,
        earlier=tuple(keys[:-1]),
        # With a state that builds on earlier ones a client knows it already.
        head={} if form.since else state.head,
    )


def refuse(state: FedKSeedState, update: AdmittedUpdate) -> str:
    """Return why an update does not belong to this state; empty if it does.

    Names the first block of displacements that the client has otherwise than the server.
    """
    if update.seeds.state != state.digest[:STATE]:
        return (
            f"expected work on the state {state.digest[:STATE].hex()}; got {update.seeds.state.hex()}: another base, "
            "bank, round or history"
        )
    wrong = first_wrong(state.checks, update.seeds.checks, state.digest, state.manifest, state.trainable)
    if wrong is None:
        return ""
    return f"expected the displacements of {wrong[0]}, block {wrong[1]}, as the server makes them; got others"


def aggregate(state: FedKSeedState, updates: Sequence[AdmittedUpdate]) -> FedKSeedState:
    """Return the state after one round: A += RNE(sum_i w_i x_i / sum_i w_i), in whole numbers.

    x_i is what client i alone would add to the accumulators of the newest bank, whether it has probed or descended.
    """
    cohort = sorted(updates, key=lambda update: update.client)
    measured = measurements(state, cohort)
    after = replace(state, chosen=chosen_rate(state, measured)) if measured else state
    # A round that measures the step moves nothing: its scalars are in no unit yet.
    if not state.calibrated:
        return with_history(state, cohort, calibrate(after, [step_size(after, update.probe) for update in cohort]))
    stepped = [update for update in cohort if update.client not in measured]
    losses = losses_of(stepped)
    if not stepped or diverges(state, losses):
        return with_history(state, cohort, set_back(after, losses) if stepped else after)
    weighted = integer_weights(state, stepped)
    logged = [
        LoggedUpdate(sample_key(state, update.client), weight, update.probe.scalars)
        for update, weight in weighted
        if isinstance(update.seeds, ProbeResult)
    ]
    moved = [(update.descend, weight) for update, weight in weighted if isinstance(update.seeds, DescendResult)]
    after = watch(state, with_sums(after, logged, moved), losses)
    return with_history(state, cohort, with_descent(with_scalars(after, state, logged, moved), state, moved))


def with_sums(
    state: FedKSeedState, logged: Sequence[LoggedUpdate], moved: Sequence[tuple[DescendResult, int]]
) -> FedKSeedState:
    """Return the state with what a cohort adds to its accumulators; nothing else is changed."""
    newest, seeds = state.bank.newest, state.settings.seeds
    size = newest.stop - newest.start
    # Number k of every group moves with seed k, so that one step moves all weights.
    measured = (
        (np.tile(count_scalars(sampled_ids(state, one), one.scalars, seeds), size // seeds) << state.shift, one.weight)
        for one in logged
    )
    parts = chain(measured, ((one.numbers.astype(np.int64) << one.shift, weight) for one, weight in moved))
    sums, weight = weighted_sum(parts, size)
    added = state.sums.astype(np.int64)
    added[newest] += increments(sums, weight, 0)
    # Within 32 bits: a round in which the sums could leave them has been refused by `seed_room`.
    return replace(state, accumulators={"a": added.astype(np.int32)})


def with_scalars(
    after: FedKSeedState,
    state: FedKSeedState,
    logged: Sequence[LoggedUpdate],
    moved: Sequence[tuple[DescendResult, int]],
) -> FedKSeedState:
    """Return a state after a round with what its scalars say: how coarse the next ones are, counts, and the log."""
    log = state.log
    # A log is read by clients that hold one bank of one group, and holds scalars alone.
    if (
        state.settings.sync == "auto"
        and state.settings.public_log
        and not moved
        and len(state.sums) == state.settings.seeds
    ):
        number = state.round + 1
        entry = downlink.encode_log([LoggedRound(state.shift, logged)])
        log = {name: data for name, data in log.items() if int(name) > number - MAX_LOG}
        log = {**log, str(number): np.frombuffer(entry, np.uint8)}
    if not logged:
        return replace(after, log=log)
    every = np.concatenate([one.scalars for one in logged])
    # Widened first: the absolute value of -128 does not fit into int8.
    saturated = float(np.mean(np.abs(every.astype(np.int16)) == MAX_SCALAR))
    coarser = saturated > SATURATED and state.shift < MAX_SHIFT
    return replace(
        after,
        coarseness=state.coarseness + coarser,
        longest=max(state.longest, *(len(one.scalars) for one in logged)),
        drawn=seed_visits(state, logged, coarser=coarser),
        log=log,
    )


def with_descent(
    after: FedKSeedState, state: FedKSeedState, moved: Sequence[tuple[DescendResult, int]]
) -> FedKSeedState:
    """Return a state after a round with how large the numbers of clients were that have descended."""
    if not moved:
        return after
    # The lower of the middle ones: one client that states more must not end the run for all.
    usual = median_low([result.shift for result, _ in moved])
    before, bank = state.bank.span(state.sums), state.bank
    grown = max(state.grown, 1, bank.span(after.accumulators["a"]) - before)
    return replace(after, widest=max(state.widest, usual), grown=grown)


def with_history(state: FedKSeedState, cohort: Sequence[AdmittedUpdate], after: FedKSeedState) -> FedKSeedState:
    """Return the state of the next round, with what must be known of the past to send short messages in it."""
    number = state.round + 1
    if state.settings.sync != "auto":
        return replace(after, round=number)
    # Who has answered holds the state that it started from.
    acknowledged = {**state.acknowledged, **{update.client: state.round for update in cohort}}
    # A client that was away for longer gets the accumulators whole.
    oldest = max(1, number - MAX_LOG)
    acknowledged = {name: since for name, since in sorted(acknowledged.items()) if since >= oldest}
    wanted = set(acknowledged.values())
    past = {**state.past, str(state.round): state.sums}
    return replace(
        after,
        round=number,
        acknowledged=acknowledged,
        past={name: sums for name, sums in past.items() if int(name) in wanted},
    )


def calibrate(state: FedKSeedState, sizes: Sequence[float | None]) -> FedKSeedState:
    """Return the state with e chosen from what the first cohort measured: the median of its root mean squares."""
    # The median, and of two the smaller one: no single client's report may set the unit of a whole run.
    measured = [size for size in sizes if size is not None]
    step = (min(measured) if len(measured) == 2 else median(measured)) / COARSE
    # Bounded as the recipe's own setting is; a step of 0, where no loss moved, leaves the provisional unit.
    exponent, coarseness = units(state.settings, min(step, 1e-3) or "auto", descends=state.descends)
    return replace(state, calibrated=True, exponent=exponent, coarseness=coarseness)


def integer_weights(state: FedKSeedState, cohort: Sequence[AdmittedUpdate]) -> Sequence[tuple[AdmittedUpdate, int]]:
    """Return each update with its whole weight, 1 to 127."""
    counts = [update.counts(state.settings.weights) for update in cohort]
    if state.settings.weights == "uniform" and len(set(counts)) == 1:
        return [(update, 1) for update in cohort]
    # Whole numbers keep the weighted sum in integers, so that no order of arrival changes a bit of it.
    most = max(counts)
    return [(update, max(1, round(MAX_WEIGHT * count / most))) for update, count in zip(cohort, counts, strict=True)]


def sample_key(state: FedKSeedState, client: str) -> int:
    """Return the key of a client's draws in the coming round; the client derives it from its assignment's seed."""
    return derive(derive(state.seed, "client", state.round + 1, client), "fedkseed.ids")


def sampled_ids(state: FedKSeedState, one: LoggedUpdate) -> Array:
    settings = state.settings
    return sampling.sample_ids(
        one.key, len(one.scalars), settings.seeds, sampling=settings.sampling, levels=state.levels
    )


def seed_visits(state: FedKSeedState, logged: Sequence[LoggedUpdate], *, coarser: bool) -> Tensors:
    """Return how large the scalars of each seed were and how often it was drawn, this round's added.

    In the unit of the coming round: twice as coarse a scalar is half as large.
    """
    if not state.drawn:
        return {}
    size, sizes, visits = state.settings.seeds, state.drawn["sizes"], state.drawn["visits"]
    for entry in logged:
        drawn = sampled_ids(state, entry)
        sizes = sizes + count_scalars(drawn, np.abs(entry.scalars.astype(np.int16)), size)
        visits = visits + np.bincount(drawn, minlength=size)
    return {"sizes": sizes >> int(coarser), "visits": visits}


def no_adapter(state: FedKSeedState) -> Adapter:
    """Return nothing: the whole change lies in the seeds."""
    return {}


def seeds(state: FedKSeedState) -> SeedModel:
    return SeedModel(state.settled, state.moved_base, state.trainable, state.head)


def figures(state: FedKSeedState) -> Mapping[str, Any]:
    """Return what a round's line notes of the accumulators."""
    left, newest = fewest_rounds_left(state), state.bank.newest
    groups = (newest.stop - newest.start) // state.settings.seeds
    return (
        {
            "seeds_moved": int(np.count_nonzero(state.sums)),
            "sum_abs": state.bank.span(state.sums),
            "displacement_rms": sqrt(np.square(state.sums, dtype=np.float64).sum() / groups) * 2.0**-state.exponent,
            "scalar_step": 2.0 ** (state.shift - state.exponent),
            "exponent": state.exponent,
            "coarseness": state.coarseness,
        }
        | dict(rate_figures(state))
        | dict(guard_figures(state))
        | ({} if left is None else {"rounds_left": left})
        | ({"number_step": 2.0 ** (state.widest - state.exponent)} if state.grown else {})
        | ({"banks": len(plain_banks(state.bank))} if state.settings.redraw else {})
    )


def remarks(state: FedKSeedState) -> Sequence[str]:
    """Return what users should hear of the last round: a rate that it has chosen, and whether it was undone."""
    return (*rate_remarks(state), *guard_remarks(state))


METHOD = Method(
    name="fedkseed",
    settings=FedKSeedSettings,
    init=init,
    assign=assign,
    aggregate=aggregate,
    adapter=no_adapter,
    task=ProbeSeeds,
    assign_whole=assign_whole,
    seeds=seeds,
    refuse=refuse,
    figures=figures,
    remarks=remarks,
    faults=faults,
    why_not_asynchronous="it adds whole numbers and guards one state at a time; take ffa or flora",
    why_not_linear="it adds whole numbers along seeds, of which each client's are at most 127; method.clip bounds them",
    why_not_pruned="its directions move every weight of the base",
)
