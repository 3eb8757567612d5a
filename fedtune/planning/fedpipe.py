"""The planner `fedpipe`: for each site a depth, a base format, a batch and ranks by module under its memory and time.

FedPipe-style, after Fang et al., arXiv 2404.06448, of which no code and only the opening could be read; formulas ours.
One table of a knapsack answers for all sites, since their importance is the same: see `allocation`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import inf, isfinite
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Gt, Interval

from fedtune.errors import ConfigError, Fault
from fedtune.messages import BaseDtype, Client, Failure, ImportanceName, Plan, PlannedClient, Training
from fedtune.planning import importance as scores
from fedtune.planning.allocation import Allocation, OneRank, Targets, by_importance, worth
from fedtune.planning.deadline import LATE_SHARE
from fedtune.planning.planner import (
    ClientObservation,
    Cost,
    PlanChoices,
    Planner,
    PlannerInputs,
    PlannerType,
    Speed,
    lora_scale,
    optimizer_steps,
)
from fedtune.planning.policy import Arm, Candidate, Observed, Probe
from fedtune.planning.rates import NO_RATES, Kind, Rates, expected_rates, update_rates
from fedtune.planning.site_options import (
    LOST,
    Option,
    Sites,
    Table,
    best_end,
    fastest,
    fit,
    prefer,
    sites,
    split,
    table_of,
    take,
)
from fedtune.pruning.structure import FAMILIES
from fedtune.tensors import Array

MEASURED: Mapping[str, ImportanceName] = {"gain": "gain", "gradient": "gradient", "svd": "svd", "adalora": "adalora"}
"""Kinds of importance that clients measure, as plans name them."""
BETTER = 1.05
"""Times as much as before that a new plan must be worth: another one costs the client a rebuilt model."""
LARGEST_FACTOR = 4.0
"""Times the predicted memory that a client may claim to have needed."""


@dataclass(frozen=True)
class FedPipeSettings:
    """Settings of the planner `fedpipe`: ranks by module, depth, base format and batch for each site's memory and time.

    `adapter.rank` is the budget: no site trains more numbers than that rank has in every target module.
    """

    name: Literal["fedpipe"] = "fedpipe"
    """Name of the planner."""
    importance: Literal["uniform", "gain", "gradient", "svd", "adalora", "random"] = "uniform"
    """How the budget is divided among modules. uniform: one rank for all that a site trains; the others give rank 1 to
    all of them first, and the rest by importance. gain: sum of |gradient of B|, what a first step of Adam gains;
    gradient: squared norm of the weight's gradient, estimated; svd: effect of the adapter's singular components on the
    loss; adalora: sensitivity times uncertainty; random: drawn, for comparisons."""
    warmup: Annotated[int, Ge(1)] = 2
    """First rounds, at rank 1 everywhere, in which clients measure the importance; none where it is not measured."""
    ranks: Sequence[Annotated[int, Ge(1)]] = (1, 2, 4, 8, 16)
    """Ranks that a module may have; 1 must be among them."""
    base_dtypes: Sequence[Literal["int8", "nf4"]] = ()
    """Number formats in which a site may hold the frozen base where `model.dtype` does not fit; none: as `model.dtype`
    everywhere."""
    least_share: Annotated[float, Interval(gt=0, le=1)] = 0.5
    """Least share of its steps that a slow site is asked for, before fewer of its blocks are trained."""
    deadline_s: Annotated[float, Gt(0)] | None = None
    """Seconds that every round is to take; none lets the planner choose."""
    replan_every: Annotated[int, Ge(1)] = 5
    """Rounds that a site's plan stays as it is; after them it changes where another is worth 5 % more."""


@dataclass(frozen=True)
class LastPlan:
    """What a client was last asked for."""

    ranks: tuple[int, ...]
    """By sorted name of the modules."""
    base_dtype: BaseDtype
    steps: int
    batch: int
    since: int
    """Round in which it was last weighed against others."""


@dataclass(frozen=True)
class FedPipeMemory:
    """What the planner has learned."""

    rounds: int = 0
    """Completed."""
    importance: scores.Importance | None = None
    """As measured; None before it was."""
    rates: Mapping[str, Rates] = field(default_factory=dict)
    plans: Mapping[str, LastPlan] = field(default_factory=dict)
    too_large: Mapping[str, float] = field(default_factory=dict)
    """By client, the least predicted memory in GB at which it ran out."""
    factor: Mapping[str, float] = field(default_factory=dict)
    """By client, the largest peak memory over the predicted one, at least 1."""


@dataclass(frozen=True, eq=False)
class Cohort:
    """Clients of a round, by name, with what they could do."""

    clients: Sequence[Client]
    training: Sequence[Training]
    tables: Sequence[Table]
    sites: Sites
    limits: Array
    """GB of memory, infinite where it is not known."""

    def of(self, rows: Array) -> Cohort:
        """Return some of the clients."""
        chosen = rows.tolist()
        clients, training, tables = (
            [sequence[row] for row in chosen] for sequence in (self.clients, self.training, self.tables)
        )
        return Cohort(clients, training, tables, take(self.sites, rows), self.limits[rows])


@dataclass(frozen=True, eq=False)
class FedPipe:
    """Plans by a knapsack over ranks, for the end of the round with the largest value per second."""

    settings: FedPipeSettings
    targets: Targets
    training: Callable[[str], tuple[int, Training]]
    """client -> its rank, which is its budget, and how it trains"""
    costs: Callable[[str, Arm, Training, BaseDtype], Cost]
    kind: Callable[[str], object]
    """client -> what its costs depend on: those of equal kind cost the same"""
    traffic: Callable[[ClientObservation], float]
    speeds: Mapping[str, Speed]
    memory_gb: Callable[[Client], float | None]
    alpha: float | Literal["2r"]
    rslora: bool
    seed: int
    server_s: float = 0.0
    measures_memory: bool = False
    """Whether clients' peaks are those of the devices that are planned for."""

    def start(self) -> FedPipeMemory:
        """Return what is known before the first round: nothing."""
        return FedPipeMemory()

    def plan(
        self, learned: FedPipeMemory, round: int, cohort: Sequence[Client]
    ) -> Mapping[str, PlannedClient | Failure]:
        """Return a plan for each client that an option fits; for the others what the smallest would need."""
        everyone = self._cohort(learned, sorted(cohort, key=lambda client: client.name))
        able = everyone.sites.feasible.any(axis=1)
        unfit = {
            everyone.clients[row].name: self._unfit(learned, everyone, row) for row in np.flatnonzero(~able).tolist()
        }
        fitting = everyone.of(np.flatnonzero(able))
        return {**unfit, **(self._plans(learned, round, fitting) if fitting.clients else {})}

    def is_warmup(self, round: int) -> bool:
        """Return whether clients measure importance in a round at rank 1 everywhere."""
        return self.settings.importance in MEASURED and round <= self.settings.warmup

    def allocation(self, learned: FedPipeMemory, round: int, budget: int) -> Allocation:
        """Return which ranks a budget buys in a round."""
        if self.is_warmup(round):
            return OneRank(self.targets, (1,))
        importance = self._importance(learned)
        if importance is None:
            return OneRank(self.targets, range(1, max(self.settings.ranks) + 1))
        return by_importance(self.targets, importance, self.settings.ranks, budget)

    def _importance(self, learned: FedPipeMemory) -> scores.Importance | None:
        if self.settings.importance == "random":
            return scores.random_shares(list(self.targets.modules), self.seed)
        return learned.importance if self.settings.importance in MEASURED else None

    def _cohort(self, learned: FedPipeMemory, clients: Sequence[Client]) -> Cohort:
        """Return clients with their options under their budgets."""
        training, ranks, tables = list[Training](), list[int](), list[Table]()
        for client in clients:
            rank, own = self.training(client.name)
            own = replace(own, steps=optimizer_steps(own, client.num_examples), epochs=None)
            key = (self.kind(client.name), own)
            if key not in self._tables:
                self._tables[key] = table_of(self.options, self.targets, own, partial(self._cost, client.name))
            training.append(own)
            ranks.append(rank)
            tables.append(self._tables[key])
        limits = np.array([self._limit(learned, client) for client in clients])
        compute, transfer = self._rates(learned, clients, "compute"), self._rates(learned, clients, "transfer")
        examples = np.array([client.num_examples for client in clients], np.float64)
        cohort = sites(
            tables,
            memory_gb=limits,
            ranks=np.array(ranks, np.float64),
            compute=compute,
            transfer=transfer,
            overhead=np.array([self.speeds.get(client.name, Speed()).overhead_s for client in clients]),
            steps=np.array([own.steps for own in training], np.float64),
            weights=examples / examples.sum(),
        )
        return Cohort(clients, training, tables, cohort, limits)

    def _limit(self, learned: FedPipeMemory, client: Client) -> float:
        """Return how many GB a plan may be predicted to take."""
        has = self.memory_gb(client)
        limit = inf if has is None else has / learned.factor.get(client.name, 1.0)
        # Less than what was too much, whatever the device is said to have.
        return min(limit, learned.too_large.get(client.name, inf) * (1 - 1e-6))

    def _rates(self, learned: FedPipeMemory, clients: Sequence[Client], kind: Kind) -> Array:
        speeds = [self.speeds.get(client.name, Speed()) for client in clients]
        cohort = [
            Candidate(
                client.name,
                0.0,
                (),
                (),
                (),
                (),
                s_per_tflop=speed.s_per_tflop,
                s_per_mb=speed.s_per_mb,
                probe=Probe(client.s_per_tflop, client.s_per_mb),
            )
            for client, speed in zip(clients, speeds, strict=True)
        ]
        return expected_rates(learned.rates, cohort, kind, learned.rounds + 1)[0]

    def _cost(self, client: str, depth: int, rank: int, training: Training, base_dtype: BaseDtype) -> Cost:
        blocks = len(self.targets.blocks)
        return self.costs(client, Arm(0.0, rank, top=depth / blocks if blocks else 1.0), training, base_dtype)

    # A cache: its content follows from the recipe alone.
    @cached_property
    def _tables(self) -> dict[tuple[object, Training], Table]:
        return {}

    @cached_property
    def options(self) -> Sequence[Option]:
        formats: Sequence[BaseDtype] = ("", *sorted(set(self.settings.base_dtypes)))
        return [Option(base_dtype, depth) for base_dtype in formats for depth in self.targets.depths]

    def _plans(self, learned: FedPipeMemory, round: int, cohort: Cohort) -> Mapping[str, PlannedClient]:
        budget = int(cohort.sites.room.max())
        allocation, end = self.allocation(learned, round, budget), self.settings.deadline_s or inf
        if self.is_warmup(round):
            # Rank 1 in every module that fits: importance is wanted of all of them, and soon.
            end = inf
        elif self.settings.deadline_s is None and self._times_known(learned, cohort):
            end = best_end(cohort.sites, allocation, least_share=self.settings.least_share, server_s=self.server_s)
        fitting = fit(cohort.sites, allocation, end, least_share=self.settings.least_share)
        # In the warm-up not by what is about as good: every block counts.
        chosen = fitting.value.argmax(axis=1) if self.is_warmup(round) else prefer(cohort.sites, fitting)
        quickest, least_share = fastest(cohort.sites, least_share=self.settings.least_share)
        new = dict[str, tuple[LastPlan, float]]()
        for row, client in enumerate(cohort.clients):
            late = not np.isfinite(fitting.value[row].max())
            o = int(quickest[row] if late else chosen[row])
            numbers = cohort.sites.least[row, o] if late else fitting.numbers[row, o]
            share = least_share[row] if late else fitting.share[row, o]
            option, training = cohort.sites.options[o], cohort.training[row]
            assert training.steps is not None  # resolved in `_cohort`
            own = LastPlan(
                allocation.ranks(option.depth, float(numbers)),
                option.base_dtype,
                steps=max(1, round_half_up(share * training.steps)),
                batch=cohort.tables[row].batches[int(cohort.sites.batch[row, o])],
                since=round,
            )
            new[client.name] = self._kept_or_new(learned, round, cohort, row, own, end)
        longest = max(seconds for _, seconds in new.values())
        known = isfinite(end) or self.settings.deadline_s is not None
        deadline = LATE_SHARE * max(longest, self.settings.deadline_s or 0.0) if known else None
        return {
            client.name: self._order(round, cohort, row, *new[client.name], deadline)
            for row, client in enumerate(cohort.clients)
        }

    def _kept_or_new(
        self, learned: FedPipeMemory, round: int, cohort: Cohort, row: int, new: LastPlan, end: float
    ) -> tuple[LastPlan, float]:
        """Return the plan of a client, with its seconds: the last one where a new one is not worth the change."""
        last = learned.plans.get(cohort.clients[row].name)
        if last is None or self.is_warmup(round) or self.is_warmup(last.since) or last.ranks == new.ranks:
            return new, self._seconds(cohort, row, new)
        limit, seconds = float(cohort.limits[row]), self._seconds(cohort, row, last)
        if self._memory_gb(cohort.tables[row], last) > limit:
            return new, self._seconds(cohort, row, new)
        young = round - last.since < self.settings.replan_every
        if young or (seconds <= end * (1 + 1e-9) and self._value(learned, new) <= BETTER * self._value(learned, last)):
            return last, seconds
        return new, self._seconds(cohort, row, new)

    def _value(self, learned: FedPipeMemory, plan: LastPlan) -> float:
        importance = self._importance(learned) or scores.uniform(list(self.targets.modules))
        return (1 - LOST[plan.base_dtype]) * plan.steps * worth(self.targets, plan.ranks, importance)

    def _place(self, plan: LastPlan) -> int:
        """Return the place of a plan's option."""
        return self.options.index(Option(plan.base_dtype, self.targets.depth(plan.ranks)))

    def _seconds(self, cohort: Cohort, row: int, plan: LastPlan) -> float:
        own, o = take(cohort.sites, np.array([row])), self._place(plan)
        numbers = np.full_like(own.least, self.targets.cost(plan.ranks))
        return float(own.seconds(numbers, plan.steps / own.steps)[0, o])

    def _memory_gb(self, table: Table, plan: LastPlan) -> float:
        o = self._place(plan)
        b = table.batches.index(plan.batch) if plan.batch in table.batches else 0
        return float(table.memory_gb[o, b] + table.gb_per_number[o, b] * self.targets.cost(plan.ranks))

    def _order(
        self, round: int, cohort: Cohort, row: int, plan: LastPlan, seconds: float, deadline_s: float | None
    ) -> PlannedClient:
        client, recipe, largest = cohort.clients[row], cohort.training[row], max(plan.ranks)
        training = replace(split(recipe, plan.batch), steps=plan.steps)
        depth, blocks = self.targets.depth(plan.ranks), len(self.targets.blocks)
        why = f"{self.targets.cost(plan.ranks):,} numbers in {depth} of {blocks} blocks"
        why += f"; {seconds:.3g} s" if deadline_s is not None else ""
        return PlannedClient(
            Plan(
                client=client.name,
                rank=largest,
                scale=lora_scale(largest, self.alpha, rslora=self.rslora),
                training=training,
                # One rank for all says nothing more: the order is then that of a planner without ranks by module.
                ranks=() if set(plan.ranks) == {largest} else plan.ranks,
                base_dtype=plan.base_dtype,
                importance=self._score_request(round),
            ),
            deadline_s=deadline_s,
            why=why,
            share=plan.steps / (recipe.steps or 1),
            batch=plan.batch if plan.batch != recipe.batch else None,
        )

    def _score_request(self, round: int) -> ImportanceName:
        """Return the importance that clients measure in a round: in the first ones, and before plans are weighed."""
        again = (round - self.settings.warmup) % self.settings.replan_every == 0
        return MEASURED.get(self.settings.importance, "") if self.is_warmup(round) or again else ""

    def _unfit(self, learned: FedPipeMemory, cohort: Cohort, row: int) -> Failure:
        """Return the failure of a client that no option fits: what the smallest needs, by part, and what there is."""
        client, table = cohort.clients[row], cohort.tables[row]
        need = (table.memory_gb + table.gb_per_number * table.least[:, None])[:, -1]
        option = table.options[int(need.argmin())]
        training = split(cohort.training[row], table.batches[-1])
        cost = self._cost(client.name, option.depth, 1, training, option.base_dtype)
        parts = ", ".join(f"{part} {gb:.2g}" for part, gb in cost.memory_parts.items() if gb >= 0.005)
        has = self.memory_gb(client)
        got = "its size is not known" if has is None else f"has {has:.3g} GB"
        if (ran_out := learned.too_large.get(client.name)) is not None:
            got += f", and ran out of memory at {ran_out:.3g} GB"
        if (factor := learned.factor.get(client.name, 1.0)) > 1:
            got += f", and needed {factor:.2g} times what was predicted"
        formats = "" if self.settings.base_dtypes else "allow planner.base_dtypes, "
        blocks = f", for rank 1 in {option.depth} of {len(self.targets.blocks)} blocks"
        return Failure(
            client.name,
            expected=f"at least {cost.memory_gb:.3g} GB of memory{f' ({parts})' if parts else ''}{blocks}",
            hint=f"{got}; {formats}lower data.max_tokens, or set client.gradient_checkpointing = true",
            kind="unfit",
        )

    def _times_known(self, learned: FedPipeMemory, cohort: Cohort) -> bool:
        profiles = any(
            client.name in self.speeds and self.speeds[client.name].s_per_tflop is not None for client in cohort.clients
        )
        return profiles or any(isfinite(rates.compute.mean) for rates in learned.rates.values())

    def observe(self, learned: FedPipeMemory, seen: Sequence[ClientObservation]) -> FedPipeMemory:
        """Return what is known after a round."""
        round = learned.rounds + 1
        # Rank 0: the client had no plan.
        asked = sorted((client for client in seen if client.rank > 0), key=lambda client: client.client)
        rates, plans = dict(learned.rates), dict(learned.plans)
        too_large, factor = dict(learned.too_large), dict(learned.factor)
        for client in asked:
            cohort = self._cohort(learned, [Client(client.client, client.num_examples)])
            plan = plans[client.client] = self._observed_plan(learned, client, cohort.training[0], round)
            table, o, numbers = cohort.tables[0], self._place(plan), self.targets.cost(plan.ranks)
            predicted = self._memory_gb(table, plan)
            if client.out_of_memory:
                # The least that was too much: every plan that needs as much is out for this client, for good.
                too_large[client.client] = min(predicted, too_large.get(client.client, inf))
            elif self.measures_memory and client.status == "ok" and client.peak_bytes:
                measured = min(client.peak_bytes / 1e9 / predicted, LARGEST_FACTOR)
                factor[client.client] = max(measured, factor.get(client.client, 1.0))
            work = (table.tflop[o] + table.tflop_per_number[o] * numbers) * plan.steps / (cohort.training[0].steps or 1)
            observed = self._outcome(client, float(work))
            rates[client.client] = update_rates(rates.get(client.client, NO_RATES), observed, round)
        reports = [self._report(client) for client in asked if client.status == "ok" and client.module_importance]
        importance = scores.pool(learned.importance, reports, list(self.targets.modules))
        return FedPipeMemory(round, importance, rates, plans, too_large, factor)

    def _observed_plan(
        self, learned: FedPipeMemory, seen: ClientObservation, training: Training, round: int
    ) -> LastPlan:
        plan = LastPlan(
            ranks=seen.ranks or (seen.rank,) * len(self.targets.modules),
            base_dtype=seen.base_dtype,
            steps=seen.steps or training.steps or 1,
            batch=seen.batch or training.batch,
            since=round,
        )
        last = learned.plans.get(seen.client)
        if last is None or replace(plan, since=last.since) != last or self.is_warmup(round):
            return plan
        return last if round - last.since < self.settings.replan_every else plan

    def _outcome(self, seen: ClientObservation, tflop: float) -> Observed:
        """Return a round as the rates learn from it; the seconds of a client that was given up are a bound alone."""
        speed, late = self.speeds.get(seen.client, Speed()), seen.status == "late"
        known = [part for part in (seen.compute_s, seen.transfer_s) if part is not None and isfinite(part)]
        return Observed(
            client=seen.client,
            arm=Arm(0.0, seen.rank),
            tflop=tflop,
            megabytes=self.traffic(seen),
            compute_s=None if late else seen.compute_s,
            transfer_s=None if late else seen.transfer_s,
            late_s=sum(known) if late and len(known) == 2 else None,
            overhead_s=speed.overhead_s,
            s_per_tflop=speed.s_per_tflop,
            s_per_mb=speed.s_per_mb,
            probe=Probe(seen.probed_s_per_tflop, seen.probed_s_per_mb),
        )

    def _report(self, seen: ClientObservation) -> scores.Report:
        names = sorted(self.targets.modules)
        trained = [name for name, rank in zip(names, seen.ranks or (1,) * len(names), strict=True) if rank > 0]
        return scores.Report(seen.num_examples, dict(zip(trained, seen.module_importance, strict=True)))


def round_half_up(value: float) -> int:
    return int(value + 0.5)


def create(settings: FedPipeSettings, inputs: PlannerInputs) -> Planner:
    """Return the planner of a recipe.

    Raises:
        ConfigError: if there is no cost model for the base.
    """
    if inputs.costs_by_format is None or inputs.layout is None:
        expected = f"a base of {', '.join(FAMILIES)}, for a planner that weighs memory and time"
        got = f"{inputs.base!r}, for which no cost model exists"
        raise ConfigError(Fault("planner", expected, got, 'set planner = "fixed"'))
    return FedPipe(
        settings=settings,
        targets=Targets(inputs.module_shapes, inputs.layout),
        training=inputs.training,
        costs=inputs.costs_by_format,
        kind=inputs.kind,
        traffic=inputs.traffic,
        speeds=inputs.speeds,
        memory_gb=inputs.memory_gb,
        alpha=inputs.alpha,
        rslora=inputs.rslora,
        seed=inputs.seed,
        server_s=inputs.server_s,
        measures_memory=not inputs.speeds,
    )


def choices(settings: FedPipeSettings, rank: int, ratio: float) -> PlanChoices:
    """Return what is chosen: any of the ranks for each module, fewer steps, smaller batches, other base formats."""
    largest = max(settings.ranks)
    ranks = range(1, largest + 1) if settings.importance == "uniform" else sorted({1, *settings.ranks})
    return PlanChoices(
        ranks=tuple(ranks),
        ratios=(),
        fewer_steps=True,
        module_ranks=True,
        base_dtypes=tuple(settings.base_dtypes),
        splits_batches=True,
        importance=(MEASURED[settings.importance],) if settings.importance in MEASURED else (),
    )


PLANNER = PlannerType(
    "fedpipe", FedPipeSettings, create, largest_rank=lambda settings: max(settings.ranks), choices=choices
)
