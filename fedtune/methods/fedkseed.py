"""FedKSeed: all parameters tuned by forward passes; seeds and scalars travel (Qin et al., ICML 2024, 2312.06353).

The model after any history is w0 - 2^-e sum_k A_k z_k with K integers A_k and directions z_k from a counter, so the
server holds integers and no model. Where the published code adds floats in the order of arrival, here a cohort's
scalars are averaged as whole numbers; where it draws with the device's own generator, every device gets the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, inf, log2
from statistics import median
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Gt, Interval

from fedtune.adapter import Adapter, Factors
from fedtune.directions import downlink, ids, manifest, pro
from fedtune.directions.bank import DirectionBank, headroom, total
from fedtune.directions.banks import BANKS
from fedtune.directions.checks import STATE, block_checks, first_wrong
from fedtune.directions.downlink import MAX_LOG, Logged, LoggedRound
from fedtune.directions.kron import Kron
from fedtune.directions.ledger import SeedLedger
from fedtune.directions.manifest import Manifest
from fedtune.directions.rebuild import EXPONENTS
from fedtune.directions.sums import counted, increments, weighted_sum
from fedtune.directions.trainable import Reach, trainable
from fedtune.directions.ways import displacement_for
from fedtune.errors import RoundError
from fedtune.methods.method import LinearMethod, Seeds
from fedtune.round import (
    Assignment,
    BankName,
    Blueprint,
    ClientUpdate,
    Estimator,
    LocalAdapter,
    Plan,
    Probe,
    Sampling,
    SeedState,
    Weighting,
)
from fedtune.seeds import derive
from fedtune.tensors import Array, Tensors

PROVISIONAL = 26
"""e of the first round where `scalar_step` is measured: nothing is added up in it."""
COARSE = 8.0
"""A scalar of one is an eighth of the root mean square of g: five bits of entropy in a scalar of eight."""
FINE = 16
"""Units that a perturbation has at least."""
MAX_SHIFT = 24
"""A message has no room for more."""
LARGEST = 127
SATURATED = 0.01
"""Share of scalars at their bound above which the next round's are twice as coarse."""


@dataclass(frozen=True)
class FedKSeedSettings:
    """Settings of `fedkseed`."""

    name: Literal["fedkseed"] = "fedkseed"
    bank: BankName = "hadamard"
    """Where directions come from: `hadamard` is exact and fast, `gaussian` nearest to the paper and slow, `kron` is
    added in the forward pass, never rewrites a weight and makes an adapter."""
    seeds: Annotated[int, Interval(ge=1, le=4096)] = 4096
    """K, a power of two (of four for `kron`); 1024 is enough for `gaussian`, whose rebuilds cost K draws a weight."""
    perturbation: Annotated[float, Interval(ge=1e-6, le=1)] = 5e-4
    """Distance along a direction, in every weight, at which losses are compared (the paper's epsilon)."""
    estimator: Estimator = "two-sided"
    """`two-sided`: the loss on both sides of the weights; `one-sided`: one loss at them and one per query."""
    queries: Annotated[int, Interval(ge=2, le=64)] = 8
    """Directions per optimizer step, for `one-sided`; `client.steps` counts directions and must be a multiple."""
    normalise: bool = True
    """`one-sided`: divide by the standard deviation of the step's losses instead of by the perturbation (FZOO)."""
    scalar_step: Literal["auto"] | Annotated[float, Interval(gt=0, le=1e-3)] = "auto"
    """Change of every weight that a scalar of one stands for; auto: the first round measures it and moves nothing."""
    fraction_bits: Annotated[int, Interval(ge=0, le=8)] = 4
    """Bits of the server's sums below a scalar of one: what a mean over clients is rounded to."""
    sampling: Sampling = "uniform"
    """How clients draw seeds: `uniform`, `distinct` (each at most once a round), `pro` (by what they did before)."""
    pro: Literal["repaired", "paper"] = "repaired"
    """Rule of `pro`; the paper's starves seeds that were never drawn."""
    clip: Literal["quantile", "none"] | Annotated[float, Gt(0)] = "quantile"
    """Bound on |g|: twice the client's running 0.9-quantile, none, or a number."""
    weights: Weighting = "examples"
    """`examples`: 1 to 127, in proportion to the largest of the cohort; `uniform`: all alike."""
    sync: Literal["auto", "whole"] = "auto"
    """`auto`: a client is sent the shortest form of what it has missed; `whole`: always all K integers."""
    public_log: bool = False
    """Let `auto` send every client's scalars to every client, the shortest form; nothing of a client is hidden then."""
    trainable: Sequence[str] = ()
    """Globs over the names of tensors to move; none takes all, for `kron` the weights of `adapter.targets`."""
    vectors: bool = False
    """`kron`: move biases and norms as well."""
    embeddings: bool = False
    """`kron`: move embeddings and all other matrices as well."""


@dataclass(frozen=True)
class Layout:
    """What the base gives: which tensors there are, and which of them are moved."""

    manifest: Manifest
    trainable: tuple[int, ...]


@dataclass(frozen=True)
class FedKSeedState:
    settings: FedKSeedSettings
    layout: Layout
    round: int
    """Rounds completed."""
    seed: int
    """The run's; keys of the clients' draws follow from it."""
    base: str
    """Digest (hex) of the base's manifest."""
    exponent: int
    """e of the displacement unit 2^-e."""
    calibrated: bool
    """Whether e is the run's own, and not that of a first round that measures it."""
    coarseness: int
    """j: a scalar of one stands for 2^j times the step that the run began with."""
    longest: int
    """Scalars of the longest update so far."""
    accumulators: Tensors
    """`a`, int32 (K,)."""
    drawn: Tensors
    """`pro`: `sizes`, the sum of |scalar|, and `visits` of each seed, int64 (K,); empty for other samplings."""
    acknowledged: Mapping[str, int]
    """By client, the last round whose result it has worked on."""
    past: Tensors
    """Accumulators after rounds that some client may have kept, by round, int32 (K,)."""
    log: Tensors
    """`public_log`: what each of the last rounds added, by round, as `downlink.encode_log` makes it."""

    @property
    def saved(self) -> Tensors:
        """Nothing is averaged in full beside the seeds."""
        return {}

    @property
    def sums(self) -> Array:
        """A, int32 (K,)."""
        return self.accumulators["a"]

    @cached_property
    def bank(self) -> DirectionBank:
        return BANKS[self.settings.bank](self.settings.seeds, derive(self.seed, "fedkseed.bank"))

    @cached_property
    def ledger(self) -> SeedLedger:
        return SeedLedger(self.bank, self.exponent, self.round, bytes.fromhex(self.base), self.sums)

    @cached_property
    def digest(self) -> bytes:
        return self.ledger.digest

    @property
    def shift(self) -> int:
        """A scalar of one moves an accumulator by 2^shift."""
        return self.settings.fraction_bits + self.coarseness

    @property
    def perturbation(self) -> int:
        """E, in displacement units."""
        return max(1, round(self.settings.perturbation * 2.0**self.exponent))

    @cached_property
    def levels(self) -> bytes:
        """A byte per seed for `pro`, which decides how often it is drawn; empty for other samplings."""
        if self.settings.sampling != "pro":
            return b""
        rule = pro.paper if self.settings.pro == "paper" else pro.repaired
        return ids.levels(rule(self.drawn["sizes"], self.drawn["visits"])).tobytes()

    @cached_property
    def checks(self) -> bytes:
        """What a client's blocks must be, made here without the base."""
        return block_checks(self.ledger, self.layout.manifest, self.layout.trainable, displacement_for(self.bank))

    @cached_property
    def forms(self) -> Mapping[int, SeedState]:
        """The shortest message by the round that a client has last worked on; 0 serves clients that hold nothing."""
        return {since: self.sent(since) for since in {0, *map(int, self.past)}}

    def sent(self, since: int) -> SeedState:
        forms = {"whole": downlink.encode_whole(self.sums)}
        if self.settings.sync == "auto":
            known = self.past[str(since)] if since else np.zeros_like(self.sums)
            forms["changed"] = downlink.encode_changed(self.sums, known)
            missed = [str(number) for number in range(since + 1, self.round + 1)]
            if set(missed) <= self.log.keys():
                forms["log"] = b"".join(self.log[number].tobytes() for number in missed)
        form, data = downlink.smallest(forms)
        return SeedState(form, 0 if form == "whole" else since, data, self.round, self.digest)  # type: ignore[arg-type]


def init(blueprint: Blueprint, settings: FedKSeedSettings) -> FedKSeedState:
    """Return the first state: K zeros.

    Raises:
        ConfigError: if K is none of the bank's sizes, or the bank cannot move the tensors that are asked for.
    """
    listed = manifest.decode(blueprint.manifest) if blueprint.manifest else Manifest(())
    layers = {f"{name}.weight" for name in blueprint.modules} | {
        name for name, array in blueprint.saved.items() if array.ndim == 2
    }
    ordinals = trainable(listed, reach(settings), layers) if listed.entries else ()
    zeros, (exponent, coarseness) = np.zeros(settings.seeds, np.int64), units(settings, settings.scalar_step)
    state = FedKSeedState(
        settings=settings,
        layout=Layout(listed, ordinals),
        round=0,
        seed=blueprint.seed,
        base=listed.digest.hex(),
        exponent=exponent,
        calibrated=settings.scalar_step != "auto",
        coarseness=coarseness,
        longest=0,
        accumulators={"a": zeros.astype(np.int32)},
        drawn={"sizes": zeros, "visits": zeros} if settings.sampling == "pro" else {},
        acknowledged={},
        past={},
        log={},
    )
    assert state.bank.size == settings.seeds  # and a ConfigError before that, if the bank has no such size
    return state


def reach(settings: FedKSeedSettings) -> Reach:
    return Reach(settings.bank, settings.trainable, vectors=settings.vectors, embeddings=settings.embeddings)


def units(settings: FedKSeedSettings, step: float | Literal["auto"]) -> tuple[int, int]:
    """Return (e, j) such that a scalar of one changes weights by about `step` and the perturbation is a whole number.

    e is at least so large that the perturbation is rounded by no more than a 32nd of itself, and at most so large that
    it fits; where that makes units too fine for the step, j makes it up.
    """
    wanted = PROVISIONAL if step == "auto" else settings.fraction_bits - round(log2(step))
    least, most = ceil(log2(FINE / settings.perturbation)), int(log2(2**27 / settings.perturbation))
    exponent = max(EXPONENTS.start, least, min(wanted, most, EXPONENTS.stop - 1))
    return exponent, max(0, min(exponent - wanted, MAX_SHIFT - settings.fraction_bits))


def assign(state: FedKSeedState, seed: int, plan: Plan) -> Assignment:
    """Send the accumulators in the shortest form that the client can read, and how to measure.

    Raises:
        RoundError: if the sums could leave 32 bits in this round.
    """
    check_headroom(state, plan)
    since = state.acknowledged.get(plan.client, 0)
    form = state.forms[since if str(since) in state.past else 0]
    order = order_of(state, seed, plan, form)
    if form.since == 0:
        return order
    return replace(order, whole=order_of(state, seed, plan, state.forms[0]))


def order_of(state: FedKSeedState, seed: int, plan: Plan, form: SeedState) -> Assignment:
    settings, one_sided = state.settings, state.settings.estimator == "one-sided"
    return Assignment(
        method="fedkseed",
        round=state.round + 1,
        seed=derive(seed, "client", state.round + 1, plan.client),
        plan=plan,
        local=LocalAdapter(a_key=0),
        probe=Probe(
            bank=settings.bank,
            seeds=settings.seeds,
            key=state.bank.key,
            exponent=state.exponent,
            shift=state.shift,
            perturbation=state.perturbation,
            state=form,
            sampling=settings.sampling,
            levels=state.levels,
            estimator=settings.estimator,
            queries=settings.queries if one_sided else 1,
            normalise=settings.normalise and one_sided,
            clip={"quantile": 0.0, "none": inf}.get(settings.clip, settings.clip),  # type: ignore[arg-type]
            trainable=settings.trainable,
            vectors=settings.vectors,
            embeddings=settings.embeddings,
            calibrate=not state.calibrated,
        ),
    )


def check_headroom(state: FedKSeedState, plan: Plan) -> None:
    """Raise RoundError before a round in which a client's sums could leave 32 bits."""
    assert plan.training.steps is not None  # the planner resolves epochs
    left = rounds_left(state, plan.training.steps)
    if left < 1:
        raise RoundError(
            f"round {state.round + 1}: expected room for {plan.training.steps} more scalars in sums of 32 bits; got "
            f"sum |A| = {total(state.sums)} with e = {state.exponent}; export the model and start a new run from it, "
            "or start again with a larger method.scalar_step",
            final=True,
        )


def rounds_left(state: FedKSeedState, steps: int) -> int:
    """Return how many rounds of so many scalars, each at its bound on one side, still fit into 32 bits."""
    growth = (LARGEST * steps << state.shift) + state.settings.seeds // 2  # half a unit of rounding per seed
    return headroom(state.bank, state.sums, amount=state.perturbation) // growth


def refuse(state: FedKSeedState, update: ClientUpdate) -> str:
    """Return why an update does not belong to this state; empty if it does.

    Names the first block of displacements that the client has otherwise than the server.
    """
    assert update.probed is not None  # admitted as an answer to a probe
    if update.probed.state != state.digest[:STATE]:
        return (
            f"expected work on the state {state.digest[:STATE].hex()}; got {update.probed.state.hex()}: another base, "
            "bank, round or history"
        )
    layout = state.layout
    wrong = first_wrong(state.checks, update.probed.checks, state.digest, layout.manifest, layout.trainable)
    if wrong is None:
        return ""
    return f"expected the displacements of {wrong[0]}, block {wrong[1]}, as the server makes them; got others"


def aggregate(state: FedKSeedState, updates: Sequence[ClientUpdate]) -> FedKSeedState:
    """Return the state after one round: A_k += RNE(2^shift * sum_i w_i a_ik / sum_i w_i), in whole numbers."""
    cohort = sorted(updates, key=lambda update: update.client)
    if not state.calibrated:
        return kept(state, cohort, calibrated(state, [update.probed.rms for update in cohort if update.probed]))
    logged = [
        Logged(sample_key(state, update.client), weight, scalars(update)) for update, weight in weighed(state, cohort)
    ]
    parts = [(counted(drawn_ids(state, one), one.scalars, len(state.sums)), one.weight) for one in logged]
    sums, weight = weighted_sum(parts, len(state.sums))
    return kept(state, cohort, advance(state, sums, weight, logged))


def advance(state: FedKSeedState, sums: Array, weight: int, logged: Sequence[Logged]) -> FedKSeedState:
    """Return the state after a weighted sum of scalars has been added; of `logged` only counts and log are taken."""
    added = (state.sums + increments(sums, weight, state.shift)).astype(np.int32)
    number = state.round + 1
    log = state.log
    if state.settings.sync == "auto" and state.settings.public_log:
        entry = downlink.encode_log([LoggedRound(state.shift, logged)])
        log = {name: data for name, data in log.items() if int(name) > number - MAX_LOG}
        log = {**log, str(number): np.frombuffer(entry, np.uint8)}
    every = np.concatenate([one.scalars for one in logged])
    saturated = float(np.mean(np.abs(every.astype(np.int16)) == LARGEST))
    return replace(
        state,
        accumulators={"a": added},
        coarseness=state.coarseness + (saturated > SATURATED and state.shift < MAX_SHIFT),
        longest=max(state.longest, *(len(one.scalars) for one in logged)),
        drawn=visited(state, logged),
        log=log,
    )


def kept(state: FedKSeedState, cohort: Sequence[ClientUpdate], after: FedKSeedState) -> FedKSeedState:
    """Return the state of the next round, with what must be known of the past to send short messages in it."""
    number = state.round + 1
    if state.settings.sync != "auto":
        return replace(after, round=number)
    # Who has answered holds the state that it started from.
    acknowledged = {**state.acknowledged, **{update.client: state.round for update in cohort}}
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


def calibrated(state: FedKSeedState, sizes: Sequence[float | None]) -> FedKSeedState:
    """Return the state with e chosen from what the first cohort measured: the median of its root mean squares."""
    step = median(size for size in sizes if size is not None) / COARSE
    exponent, coarseness = units(state.settings, min(step, 1e-3) or "auto")
    return replace(state, calibrated=True, exponent=exponent, coarseness=coarseness)


def weighed(state: FedKSeedState, cohort: Sequence[ClientUpdate]) -> Sequence[tuple[ClientUpdate, int]]:
    """Return each update with its whole weight, 1 to 127."""
    if state.settings.weights == "uniform":
        return [(update, 1) for update in cohort]
    most = max(update.num_examples for update in cohort)
    return [(update, max(1, round(LARGEST * update.num_examples / most))) for update in cohort]


def scalars(update: ClientUpdate) -> Array:
    assert update.probed is not None  # admitted as an answer to a probe
    return update.probed.scalars


def sample_key(state: FedKSeedState, client: str) -> int:
    """Return the key of a client's draws in the coming round; the client derives it from its assignment's seed."""
    return derive(derive(state.seed, "client", state.round + 1, client), "fedkseed.ids")


def drawn_ids(state: FedKSeedState, one: Logged) -> Array:
    settings = state.settings
    return ids.drawn(one.key, len(one.scalars), settings.seeds, sampling=settings.sampling, levels=state.levels)


def visited(state: FedKSeedState, logged: Sequence[Logged]) -> Tensors:
    """Return how large the scalars of each seed were and how often it was drawn, this round's added."""
    if not state.drawn:
        return {}
    size, sizes, visits = len(state.sums), state.drawn["sizes"], state.drawn["visits"]
    for one in logged:
        drawn = drawn_ids(state, one)
        sizes = sizes + counted(drawn, np.abs(one.scalars.astype(np.int16)), size)
        visits = visits + np.bincount(drawn, minlength=size)
    return {"sizes": sizes, "visits": visits}


def no_adapter(state: FedKSeedState) -> Adapter:
    """Return nothing: the whole change lies in the seeds."""
    return {}


def seeds(state: FedKSeedState) -> Seeds:
    return Seeds(state.ledger, state.layout.manifest, state.layout.trainable)


def kron_adapter(change: Seeds, *, transposed: bool) -> Adapter:
    """Return the change of every matrix that the kron bank moves, as factors of rank p and scale 1.

    W - u U^T M V is B = -u U^T M (out, p) and A = V (p, in); where a layer holds its weight as (in, out), as GPT-2's
    do, B = -u (M V)^T and A = U. Exact in float32 as long as sum |A| is below 2^24.

    Args:
        change: of a run with the bank `kron` that moves matrices of linear layers alone.
        transposed: whether the layers hold their weights as (in, out).
    """
    bank, unit = change.ledger.bank, np.float64(2.0**-change.ledger.exponent)
    assert isinstance(bank, Kron)
    M = change.ledger.accumulators.reshape(bank.rank, bank.rank).astype(np.float64)
    found = {}
    for ordinal in change.trainable:
        entry = change.manifest.entries[ordinal]
        U, V = (side.astype(np.float64) for side in bank.factors(ordinal, entry.shape))  # (p, R) and (p, C)
        b, a = ((M @ V).T, U) if transposed else (U.T @ M, V)
        found[entry.name.removesuffix(".weight")] = Factors(a=a.astype(np.float32), b=(-unit * b).astype(np.float32))
    return found


def figures(state: FedKSeedState) -> Mapping[str, Any]:
    """Return what a round's line notes of the accumulators."""
    return {
        "seeds_moved": int(np.count_nonzero(state.sums)),
        "sum_abs": total(state.sums),
        "displacement_rms": float(np.sqrt(np.square(state.sums, dtype=np.float64).sum())) * 2.0**-state.exponent,
        "scalar_step": 2.0 ** (state.shift - state.exponent),
        "exponent": state.exponent,
        "coarseness": state.coarseness,
        "rounds_left": rounds_left(state, max(1, state.longest)),
    }


METHOD = LinearMethod(
    name="fedkseed",
    settings=FedKSeedSettings,
    init=init,
    assign=assign,
    aggregate=aggregate,
    adapter=no_adapter,
    verb="probe",
    seeds=seeds,
    refuse=refuse,
    figures=figures,
)
