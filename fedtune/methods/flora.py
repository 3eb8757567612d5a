"""FLoRA: clients' adapters are stacked, so mixed ranks add up exactly (Wang et al., NeurIPS 2024, arXiv 2409.05976).

The state is the cumulative change of the base, Delta, exact up to the rank that the server keeps. Every round adds the
weighted sum of what each client changed against what it was really sent; casts and truncation of what goes down
therefore never accumulate (the server keeps more than it sends, which is error feedback), and a client that missed
rounds, or joins late, needs nothing but the current round's message.

Clients may be pruned, each in its own way: factors travel in the pruned layer's coordinates, and the sum is taken after
the scatter to the base's, so it is as exact (`methods.pruning`).

m: out features, n: in features, r: rank of a client, p: rank of what is sent down
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Gt, Interval

from fedtune.lora import dense, lowrank
from fedtune.lora.adapter import Adapter, Factors, draw_a, pack, stack
from fedtune.lora.dense import Summed, cut_down
from fedtune.messages import (
    OMIT_DEFAULT,
    AdmittedUpdate,
    Assignment,
    Blueprint,
    PlannedClient,
    TrainLora,
    View,
    Weighting,
    WireDtype,
    cohort_weights,
)
from fedtune.methods import pruning
from fedtune.methods.change import Change, Terms, product_change, product_terms, quick_square, saved_change
from fedtune.methods.method import Cohort, Method, make_assignment, mean_saved
from fedtune.methods.serialization import NOT_PERSISTED, OMIT_EMPTY
from fedtune.methods.settings import down_dtype
from fedtune.number_formats import from_wire, to_wire
from fedtune.pruning.least_squares import moments_to_wire
from fedtune.pruning.ranking import PruningSettings, Ranking, rank_units, structure_at
from fedtune.pruning.structure import (
    FULL,
    BlockLayout,
    LayerSlice,
    ModelStructure,
    cuts,
    scatter_factors,
    slice_adapter,
)
from fedtune.seeds import derive
from fedtune.tensors import Array, Tensors, cast

ROW_NORM = 1 / np.sqrt(3)
"""Norm of a freshly drawn row of A (entries uniform in +-1/sqrt(n)): learning rates are tuned to it."""


@dataclass(frozen=True)
class FloraSettings:
    """Settings of `flora`."""

    name: Literal["flora"] = "flora"
    """Name of the method."""
    mode: Literal["reinit", "svt", "continue"] = "continue"
    """What the next round starts from. continue: the leading part of the global change is trained on, the rest is
    frozen; reinit: a fresh adapter beside the frozen change (the paper); svt: as reinit, and only `tau` of the change
    is sent down (after FLoRIST, arXiv 2506.09199). On real data continue learns most (`simulations/methods30`)."""
    tau: Annotated[float, Interval(gt=0, le=1)] | None = None
    """Share of the global change's squared singular values that is sent down; none: 0.9 in mode svt, else 1."""
    max_rank: Annotated[int, Ge(1)] | None = None
    """Largest rank of any module that is sent down; none sends as many as `tau` needs."""
    state_max_rank: Literal["auto", "exact"] | Annotated[int, Ge(1)] | None = "auto"
    """Largest rank of any module that the server keeps; the sum is exact up to this rank, and beyond it the best
    approximation. auto: in mode continue twice the mean rank of a round's clients, of that round in which it was
    largest; in the other modes twice the largest planned rank; exact, or none: everything, up to a layer's smaller
    side."""
    down_rank: Literal["auto"] | Annotated[int, Ge(1)] | None = field(default="auto", metadata=OMIT_DEFAULT)
    """Largest rank of any module that one client is sent; what is left out stays at the server. In mode continue,
    clients that lack a part learn it again, and then it counts twice: a smaller `state_max_rank` is better there. auto:
    in the other modes twice the client's own rank where `state_max_rank` is auto, else no bound; none: no bound."""
    server_learning_rate: Annotated[float, Gt(0)] = 1.0
    """Factor on the clients' mean change; 1 adds it as it is."""
    weights: Weighting = "examples"
    """examples: clients count in proportion to their training examples; uniform: all count the same."""
    wire_dtype: WireDtype = "int8"
    """Number format in which clients send what their factors changed by: numbers of 32 or 16 bits, or codes of 8 or 4
    bits that share a scale with 63 neighbours. modules_to_save always travel in fp32."""
    down_dtype: WireDtype | None = field(default=None, metadata=OMIT_DEFAULT)
    """Number format in which clients are sent the global change; none: as `wire_dtype`."""
    coverage: Literal["normalised", "zero"] = "normalised"
    """For modules that only some clients trained, and rows and columns that only some of the pruned ones kept, with the
    table `pruning` and without it. normalised: their change is divided by these clients' share of the weights; zero:
    the other clients count as no change."""
    coverage_floor: Annotated[float, Interval(gt=0, le=1)] = 0.2
    """With normalised: the share that is divided by is at least this."""


@dataclass(frozen=True)
class FloraState:
    settings: FloraSettings = field(metadata=NOT_PERSISTED)
    round: int
    """Rounds completed."""
    max_rank: int = field(metadata=NOT_PERSISTED)
    """The largest planned rank."""
    seed: int
    """The run's seed: fresh factors are drawn from it by client and server alike."""
    delta: Tensors
    """Delta as `dense.pack` makes it flat, float32; its rank never exceeds min(m, n)."""
    saved: Tensors
    anatomy: BlockLayout | None = field(default=None, metadata=NOT_PERSISTED)
    """Of the base's blocks, where clients are pruned."""
    pruning: PruningSettings | None = field(default=None, metadata=NOT_PERSISTED)
    worth: Tensors = field(default_factory=dict)
    """`heads` and `channels`: pooled scores of all clients so far, float32; empty before the first."""
    order: Tensors = field(default_factory=dict)
    """The scores that rank heads and channels: the pooled ones, which small changes do not move."""
    scored: int = 0
    """Round of the last scores."""
    ratios: Mapping[str, float] = field(default_factory=dict)
    """By client, the pruning ratio of its last participation."""
    second: Tensors = field(default_factory=dict, metadata=OMIT_EMPTY)
    """The repair adapter, in the base's coordinates and laid out as `delta`; empty before clients have trained it."""
    second_structure: Tensors = field(default_factory=dict, metadata=OMIT_EMPTY)
    """`digest`: of the structure that it is of, 32 bytes."""
    beside: Mapping[str, Summed] = field(default_factory=dict, metadata=NOT_PERSISTED)
    """A change that clients are sent frozen, beside delta; not empty only in `repair`."""
    moments: Tensors = field(default_factory=dict, metadata=OMIT_EMPTY)
    """Of the base's layers, pooled over clients, float32 (`pruning.least_squares`); empty where nothing is repaired."""

    @cached_property
    def broadcast(self) -> Mapping[str, Summed]:
        """The part of Delta that is sent down, before the cast to the wire format."""
        whole = dense.unpack(self.delta)
        return {name: cut_down(change, tau=self.tau, max_rank=self.settings.max_rank) for name, change in whole.items()}

    @property
    def tau(self) -> float:
        """Share of Delta's squared singular values that is sent down."""
        return self.settings.tau if self.settings.tau is not None else 0.9 if self.settings.mode == "svt" else 1.0

    def blobs(
        self, ranks: Mapping[str, int], structure: ModelStructure | None = None, planned: int | None = None
    ) -> Mapping[str, Tensors]:
        """Return what a client is sent in wire format, once for all clients like it, so it is encoded once.

        In mode continue it trains the leading components of each module, as many as its rank there, and the rest is
        frozen; else all are.

        Args:
            ranks: of the modules that it trains, by name.
            structure: what is left of its model.
            planned: largest rank that it is sent, where the planner has chosen one.
        """
        continues, down = self.settings.mode == "continue", down_rank(self.settings, max(ranks.values()), planned)
        trained = {name: ranks.get(name, 0) if continues else 0 for name in self.broadcast}
        key = (tuple(trained.values()), down, structure.digest if structure else b"")
        if key not in self._blobs:
            # Truncated over the whole base and cut afterwards: the clients then hold slices of one model.
            rest = lowrank.adapter(
                {name: low.components(trained[name], down or low.rank) for name, low in self.broadcast.items()}
            )
            if self.beside:
                first = {name: low.components(0, down or low.rank) for name, low in self.beside.items()}
                rest = stack([(lowrank.adapter(first), 1.0), (rest, 1.0)])
            cut, dtype = self.cut(structure), down_dtype(self.settings)
            # To the nearest, and always from the exact state: each round's rounding is gone with the round.
            frozen = to_wire(lowrank.smallest(slice_adapter(rest, cut)), dtype)
            begun = {name: min(rank, down or rank) for name, rank in trained.items() if name in ranks}
            local = warm_start({name: self.broadcast[name] for name in begun}, begun, dtype, cut)
            self._blobs[key] = {"global": frozen, "local": local}
        return self._blobs[key]

    def local_start(self, update: AdmittedUpdate) -> Tensors:
        """Return what a client trained on from, as it has decoded it, float32."""
        local = self.blobs(update.ranks, update.structure, update.down_rank)["local"]
        if id(local) not in self._starts:
            self._starts[id(local)] = cast(from_wire(local), "fp32")
        return self._starts[id(local)]

    def cut(self, structure: ModelStructure | None) -> Mapping[str, LayerSlice]:
        """Return the rows and columns of every layer that a structure keeps; layers kept whole are left out."""
        if structure is None or self.anatomy is None:
            return {}
        if structure.digest not in self._cuts:
            self._cuts[structure.digest] = cuts(structure, self.anatomy)
        return self._cuts[structure.digest]

    def structure(self, ratio: float) -> ModelStructure | None:
        """Return what the ranking keeps at a pruning ratio; None: all of it."""
        if ratio == 0 or self.anatomy is None or self.pruning is None or not self.order:
            return None
        if ratio not in self._structures:
            self._structures[ratio] = structure_at(self.ranking, self.anatomy, self.pruning, ratio)
        return self._structures[ratio]

    @cached_property
    def ranking(self) -> Ranking:
        assert self.anatomy is not None  # checked in `structure`
        assert self.pruning is not None
        return rank_units(self.order, self.anatomy, self.pruning)

    def of(self, view: View) -> FloraState:
        """Return the state of one of the two adapters."""
        # Not the repair adapter of that of the repair adapter.
        return self.repair if view == "deployed" and not self.beside else self

    @cached_property
    def repair(self) -> FloraState:
        """The state of the repair adapter, as if it was the global change; delta is frozen beside it."""
        second = self.second if self.second_digest == self.deployed_digest else {}
        if not second:  # before the first round of it, or after a new ranking
            second = lowrank.pack({name: lowrank.zero(*low.shape) for name, low in self.broadcast.items()})
        return replace(self, delta=second, second={}, second_structure={}, beside=self.broadcast)

    @property
    def second_digest(self) -> bytes:
        """Digest of the structure that the repair adapter is of."""
        return self.second_structure["digest"].tobytes() if self.second_structure else b""

    @property
    def deployed_digest(self) -> bytes:
        """Digest of the structure that is deployed; empty before heads and channels are ranked."""
        structure = self.structure(self.pruning.target) if self.pruning else None
        return structure.digest if structure else b""

    @cached_property
    def moments_on_the_wire(self) -> Tensors:
        """The moments as clients are sent them."""
        return moments_to_wire(self.moments)

    # Caches of the functions above; their content follows from the state alone.
    @cached_property
    def _blobs(self) -> dict[tuple[tuple[int, ...], int | None, bytes], Mapping[str, Tensors]]:
        return {}

    @cached_property
    def _starts(self) -> dict[int, Tensors]:
        return {}

    @cached_property
    def _structures(self) -> dict[float, ModelStructure]:
        return {}

    @cached_property
    def _cuts(self) -> dict[bytes, Mapping[str, LayerSlice]]:
        return {}


def init(blueprint: Blueprint, settings: FloraSettings) -> FloraState:
    """Return the first state: a change of zero."""
    delta = {name: lowrank.zero(m, n) for name, (m, n) in blueprint.modules.items()}
    return FloraState(
        settings=settings,
        round=0,
        max_rank=blueprint.max_rank,
        seed=blueprint.seed,
        delta=lowrank.pack(delta),
        saved=blueprint.saved,
        anatomy=blueprint.anatomy if blueprint.pruning else None,
        pruning=blueprint.pruning,
        order=dict(blueprint.ranking) if blueprint.pruning else {},
        moments=cast(blueprint.moments, "fp32") if blueprint.pruning else {},
    )


def start(state: FloraState, adapter: Adapter, saved: Tensors) -> FloraState:
    """Return the first state with a change that is there already: of any ranks, and exact."""
    delta = {**dense.unpack(state.delta), **lowrank.compress(adapter)}
    return replace(state, delta=dense.pack(delta), saved={**state.saved, **saved})


def assign(state: FloraState, seed: int, planned: PlannedClient) -> Assignment:
    """Send Delta: frozen beside a fresh adapter, or its leading components to train, by the ranks of the plan."""
    plan, ranks = planned.plan, planned.plan.rank_of(state.broadcast)
    pruned, structure = pruning.pruning_task(state, planned)
    task = TrainLora(
        a_key=_a_key(state, plan.client),
        # A round changes a factor by a hundredth or less: in bf16 the difference keeps its digits, the factor does not.
        upload="difference",
        wire_dtype=state.settings.wire_dtype,
        pruning=pruned,
    )
    blobs = {
        **state.of(plan.view).blobs(ranks, structure, planned.down_rank),
        **pruning.moments_sent(state, pruned),
    }
    return make_assignment("flora", state, seed, plan, task, blobs)


def aggregate(state: FloraState, updates: Sequence[AdmittedUpdate]) -> FloraState:
    """Return the state after one round: each of both adapters after the updates of those clients that trained it."""
    weights = state.settings.weights
    whole = cohort_weights([update for update in updates if update.view == "whole"], weights)
    deployed = cohort_weights([update for update in updates if update.view == "deployed"], weights)
    own: dict[str, Any] = {}
    if whole:
        own["delta"] = sum_of(state, whole)
        # A head that was trained in the deployed model is not the whole one's.
        own["saved"] = mean_saved(state.saved, whole, state.settings.server_learning_rate)
    if deployed:
        own["second"] = sum_of(state.repair, deployed)
        own["second_structure"] = {"digest": np.frombuffer(state.deployed_digest, np.uint8)}
    return replace(state, round=state.round + 1, **own, **pruning.fields_after(state, cohort_weights(updates, weights)))


def sum_of(state: FloraState, cohort: Cohort) -> Tensors:
    """Return Delta + server_learning_rate * sum of p_k * change_k, recompressed."""
    settings = state.settings
    bound, lead = state_rank(state, cohort), max(state.max_rank, settings.max_rank or 0)
    if bound is None:
        # Client by client, as releases before 0.3.0 added up: runs that they began go on to the same bits.
        changes = [(product(state, update), share * update.discount) for update, share in cohort]
    else:
        changes = list(grouped_products(state, cohort))
    if settings.coverage == "normalised":
        scale = pruning.coverage(
            cohort, state.broadcast, state.anatomy, weights=settings.weights, floor=settings.coverage_floor
        )
        # One scale for all clients, and not one for each: the scaled sum is as exact as the plain one.
        changes = [(pruning.scale_by_coverage(adapter, scale), weight) for adapter, weight in changes]
    rate, before = settings.server_learning_rate, dense.unpack(state.delta)
    parts = {
        name: [(adapter[name], rate * weight) for adapter, weight in changes if name in adapter] for name in before
    }
    # What no client of the cohort has trained stays as it is, to the last bit.
    parts = {name: added for name, added in parts.items() if added}
    # The broadcast is truncated further than the state: what it leaves out is not lost, so losses do not add up.
    if isinstance(settings.down_rank, int):
        lead = max(lead, settings.down_rank)
    bounds = bound if bound is None else module_bounds(state, cohort, bound)
    total = dense.sums({name: before[name] for name in parts}, parts, max_rank=bounds, lead=lead, tau=state.tau)
    summed = {name: replace(low, dropped=before[name].dropped + low.dropped) for name, low in total.items()}
    return dense.pack({name: summed.get(name, low) for name, low in before.items()})


def state_rank(state: FloraState, cohort: Cohort) -> int | None:
    """Return the largest rank that the server keeps after a round; None: no bound."""
    settings = state.settings
    if not is_bounded(settings):
        return None
    if isinstance(settings.state_max_rank, int):
        return settings.state_max_rank
    if settings.mode != "continue":
        return 2 * state.max_rank
    # Everything that is kept is sent, to every client: a round's downloads then hold at most twice the numbers that
    # its uploads do.
    ranks = [max(update.ranks.values()) for update, _ in cohort]
    before = max(low.rank for low in dense.unpack(state.delta).values())
    # Never less than before: a round of small clients must not cut what larger ones have taught.
    return max(before, ceil(2 * sum(ranks) / len(ranks)))


def module_bounds(state: FloraState, cohort: Cohort, bound: int) -> int | Mapping[str, int]:
    """Return the largest rank that the server keeps of each module, where clients give modules ranks of their own.

    Twice the mean rank of a module, as `state_rank` has it for all: else each would be kept at twice the largest one's,
    and most of what is sent would be of modules that have earned no such rank.
    """
    settings = state.settings
    ragged = any(len(set(update.ranks.values())) > 1 for update, _ in cohort)
    if settings.state_max_rank != "auto" or settings.mode != "continue" or not ragged:
        return bound
    bounds = {}
    for name, low in dense.unpack(state.delta).items():
        ranks = [update.ranks[name] for update, _ in cohort if name in update.ranks]
        # Never less than before: see `state_rank`.
        bounds[name] = max(low.rank, ceil(2 * sum(ranks) / len(ranks)) if ranks else 0)
    return bounds


def is_bounded(settings: FloraSettings) -> bool:
    """Return whether the rank of what the server keeps has a bound."""
    return settings.state_max_rank not in ("exact", None)


def down_rank(settings: FloraSettings, rank: int, planned: int | None = None) -> int | None:
    """Return the largest rank that a client of a rank is sent; None: no other bound than that of the state.

    Args:
        settings: the method's, of which a number bounds what is planned.
        rank: largest of the client's modules.
        planned: what the planner has chosen for the client, in place of the settings.
    """
    if planned is not None:
        return min(planned, settings.down_rank) if isinstance(settings.down_rank, int) else planned
    if settings.down_rank == "auto":
        return 2 * rank if settings.state_max_rank == "auto" and settings.mode != "continue" else None
    return settings.down_rank


def downlink_rank(settings: FloraSettings, rank: int, planned: int | None = None) -> int | None:
    """Return the largest rank that a client of a rank is sent, whatever bounds it; None: no bound is known."""
    bounds = [down_rank(settings, rank, planned), settings.max_rank]
    bounds += [settings.state_max_rank] if isinstance(settings.state_max_rank, int) else []
    return min((bound for bound in bounds if bound is not None), default=None)


def grouped_products(state: FloraState, cohort: Cohort) -> Iterator[tuple[Adapter, float]]:
    """Yield weighted adapters whose sum is the weighted sum of what the clients have changed.

    All clients that were sent the same for a module started from one b0, so their second terms b0 da add up to one of
    its rank: of K clients the sum has rank (K + 1) r, and not 2 K r.
    """
    groups: dict[tuple[int, int | None, bytes, int], dict[str, Factors]] = {}
    for update, whole_share in cohort:
        share, version = whole_share * update.discount, (update.origin or state).round
        sent, ranks, own = update.structure.digest if update.structure else b"", update.ranks, dict[str, Factors]()
        for name, (end, *start) in products(state, update):
            shared = groups.setdefault((ranks[name], update.down_rank, sent, version), {})
            own[name] = end
            for term in start:
                sum_a = share * term.a.astype(np.float64)
                shared[name] = Factors(a=shared[name].a + sum_a if name in shared else sum_a, b=term.b)
        yield own, share
    yield from ((shared, 1.0) for shared in groups.values() if shared)


def product(state: FloraState, update: AdmittedUpdate) -> Adapter:
    """Return what one client changed, in the base's coordinates: b @ a at its end minus b @ a at its start.

    A fresh adapter starts at b = 0. From differences: b a - b0 a0 = db (a0 + da) + b0 da, of twice the rank.
    """
    return {name: product_change(terms) for name, terms in products(state, update)}


def products(state: FloraState, update: AdmittedUpdate) -> Iterator[tuple[str, Terms]]:
    """Yield the same by module, one after the other, each as a sum of products."""
    # What its client was sent, whatever has been added since.
    state = (update.origin or state).of(update.view)
    sent, cut, local = update.lora.tensors, state.cut(update.structure), dict[str, Array]()
    key, differs = _a_key(state, update.client), update.upload == "difference"
    if state.settings.mode == "continue":
        # After the cast to the wire format: what the client has decoded and trained on.
        local = dict(state.local_start(update))
    for name in sorted({each.rpartition(".")[0] for each in sent}):
        factors, shape = float32_factors(sent, name), state.broadcast[name].shape
        terms: Terms = (factors,)
        if differs:
            start = float32_factors(local, name) if f"{name}.a" in local else None
            # In every round but the first most modules have all of their rows: none is drawn then.
            whole = start is not None and start.rank == factors.rank
            fresh = None if whole else initial_a(key, name, factors.rank, shape, cut)
            terms = _product(factors, start, fresh)
        if cut:
            terms = [scatter_factors(term, cut.get(name, FULL), shape) for term in terms]
        yield name, terms


def float32_factors(tensors: Tensors, name: str) -> Factors:
    a, b = (tensors[f"{name}.{side}"].astype(np.float32, copy=False) for side in "ab")
    return Factors(a=a, b=b)


def change(state: FloraState, blueprint: Blueprint, assignment: Assignment, update: AdmittedUpdate) -> Iterator[Change]:
    """Yield what an update changes: the products that `aggregate` sums, and the numbers that training has moved."""
    state = state.of(update.view)
    task, sent, cut = assignment.lora, update.lora.tensors, state.cut(update.structure)
    differs = update.upload == "difference"
    local = state.local_start(update) if state.settings.mode == "continue" else {}
    for name, moved in products(state, update):
        a, b = (sent[f"{name}.{side}"].astype(np.float32, copy=False) for side in "ab")
        if differs:
            # Rows that are drawn fresh have norms of at most 1: nothing needs to be drawn for a bound.
            start = float(len(a) - len(local.get(f"{name}.a", ())))
            start += sum(quick_square(local[f"{name}.{side}"]) for side in "ab" if f"{name}.{side}" in local)
        else:
            a0 = initial_a(task.a_key, name, len(a), blueprint.modules[name], cut)
            a, start = a - a0, quick_square(a0)
        yield Change({name: moved}, {f"{name}.a": a, f"{name}.b": b}, start=start, rounded=0.0 if differs else start)
    yield Change(saved=saved_change(state.saved, update))


def initial_a(key: int, name: str, rank: int, shape: tuple[int, int], cut: Mapping[str, LayerSlice]) -> Array:
    """Return a fresh A as its client drew it: over the base's whole input, then cut."""
    fresh, into = draw_a(key, name, rank, shape[1]), cut.get(name, FULL).into
    return fresh if into is None else fresh[:, into]


def _product(difference: Factors, start: Factors | None, fresh: Array | None) -> Terms:
    if start is None:
        assert fresh is not None  # else there is no A
        return (Factors(a=fresh + difference.a, b=difference.b),)
    # (r, n); where r > p, the columns of b0 that go with fresh rows are zero
    a0 = start.a if fresh is None else np.concatenate([start.a, fresh[start.rank :]])
    return product_terms(a0 + difference.a, da=difference.a, db=difference.b, b0=start.b)


def warm_start(
    changes: Mapping[str, Summed],
    rank: int | Mapping[str, int],
    wire_dtype: WireDtype,
    cut: Mapping[str, LayerSlice] | None = None,
) -> Tensors:
    """Return the leading components as a trainable start in wire format: a = c vt, b = u s / c, c = 1 / sqrt(3).

    Args:
        changes: by module.
        rank: components, of every module or by name.
        wire_dtype: of the result.
        cut: what is kept of each module.

    They lead over the whole base, and are cut to a structure after that: so all clients hold slices of one model.
    """
    # All of S in b: with its root in both factors, a toy federation had four times the error after six rounds.
    ranks = dict.fromkeys(changes, rank) if isinstance(rank, int) else rank
    leading = {name: low.components(0, ranks[name]) for name, low in changes.items()}
    factors = slice_adapter(lowrank.adapter(leading), cut or {})
    c = np.float32(ROW_NORM)
    return to_wire(pack({name: Factors(a=c * f.a, b=f.b / c) for name, f in factors.items()}), wire_dtype)


def adapter(state: FloraState) -> Adapter:
    """Return what clients are sent, in float32: the model that is scored and exported is the one they train on."""
    return lowrank.adapter(state.broadcast)


def second(state: FloraState) -> Adapter:
    """Return the repair adapter as clients are sent it, in float32; empty before there is one."""
    return lowrank.adapter(state.repair.broadcast) if state.second_digest == state.deployed_digest != b"" else {}


def energy_kept(state: FloraState) -> Mapping[str, float]:
    """Return the share of Delta's squared singular values that a client of the largest rank is sent."""
    whole, down = dense.unpack(state.delta), down_rank(state.settings, state.max_rank)
    sent = {name: low.components(0, down or low.rank) for name, low in state.broadcast.items()}
    return {name: dense.energy_kept(whole[name], change) for name, change in sent.items()}


def state_energy_kept(state: FloraState) -> Mapping[str, float]:
    """Return |Delta|^2 over itself and all squared singular values that were cut off; nothing where none were."""
    whole = {name: low for name, low in dense.unpack(state.delta).items() if low.dropped}
    energy = {name: dense.energy(low) for name, low in whole.items()}
    return {name: energy[name] / (energy[name] + low.dropped) for name, low in whole.items()}


def _a_key(state: FloraState, client: str) -> int:
    # Another A for each client: with one for all, a toy federation had 1.5 times the error.
    return derive(state.seed, "lora.init", state.round + 1, client)


METHOD = Method(
    name="flora",
    settings=FloraSettings,
    init=init,
    start=start,
    assign=assign,
    aggregate=aggregate,
    change=change,
    adapter=adapter,
    energy_kept=energy_kept,
    state_energy_kept=state_energy_kept,
    decomposed=lambda state: state.broadcast,
    structure=FloraState.structure,
    ranking=lambda state: state.order,
    second=lambda state: (second(state), state.second_digest),
    # As clients are sent them: what is scored and exported is repaired as they repair it.
    moments=lambda state: state.moments_on_the_wire,
    why_not_linear="it stacks the clients' factors, which share no coordinates; ffa averages clients of any ranks",
    why_not_pruned="",
    why_not_asynchronous="",
    modules="any",
    downlink_rank=downlink_rank,
    wire_dtype=lambda settings: settings.wire_dtype,
    down_dtype=down_dtype,
    freezes=True,
)
