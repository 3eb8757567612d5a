"""The devices that a recipe's clients are simulated on, and the planner, costs and clock that follow from them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import ceil, floor, log2
from typing import Any

from fedtune.config import Recipe, planned_training
from fedtune.config.recipe import method_of, planner_type_of, requested_arm, requested_ratio, verb_request
from fedtune.devices.cost import (
    PROXIES,
    Body,
    Trained,
    Work,
    flops_per_token,
    round_bytes,
    round_flops,
    sizes,
    trained_modules,
    trained_of,
)
from fedtune.devices.cost import block_parameters as blocks_of
from fedtune.devices.memory import Footprint, Memory, Rates, memory, memory_at, rates
from fedtune.devices.profiles import FLEETS, PROFILES, DeviceProfile, Provenance, check
from fedtune.devices.simulated_clock import PASSES, Load, SimulatedClock
from fedtune.errors import ConfigError, Fault, RoundError, ShapeError
from fedtune.messages import BaseDtype, Blueprint, Client, Failure, Plan, PlannedClient, ProbeSeeds, Training, Verb
from fedtune.methods.fedkseed_state import FedKSeedSettings
from fedtune.model.settings import quantised_format
from fedtune.planning.adaptive import MEMORY_SHARE, arm_text, with_share
from fedtune.planning.arms import AdaptiveSettings, ranks_of
from fedtune.planning.fedpipe import FedPipeSettings
from fedtune.planning.fixed import FixedSettings
from fedtune.planning.planner import ClientObservation, Cost, Planner, PlannerInputs, Speed, optimizer_steps
from fedtune.planning.policy import Arm, Candidate
from fedtune.planning.two_adapters import TwoAdapters
from fedtune.pruning.depth import backward_blocks, module_ranks
from fedtune.pruning.structure import FAMILIES
from fedtune.rounds.clock import Clock, CompletedWork
from fedtune.rounds.probe import Prober
from fedtune.runs.seed_costs import round_tokens, seed_flops, seed_footprint, seed_load

SLOWER: Mapping[BaseDtype, float] = {"": 1.0, "int8": 1.07, "nf4": 1.39}
"""Times as long as over float32 weights that a step takes: measured on a CPU, and assumed of other devices."""
SIMULATED_METHODS = "Time is simulated: operations, bytes and traces of the devices below, never this machine's clock"


@dataclass(frozen=True)
class Lengths:
    """Lengths of a client's examples, in tokens."""

    mean: float
    longest: float


def rounded_up(tokens: float) -> float:
    """Return a number rounded up to three binary digits behind its first.

    >>> rounded_up(300), rounded_up(128), rounded_up(1.0)
    (320.0, 128.0, 1.0)
    """
    step = 2.0 ** (floor(log2(max(1.0, tokens))) - 3)
    return ceil(tokens / step) * step


@dataclass(frozen=True)
class Fleet:
    """The devices of a recipe's clients, and what a round costs them."""

    recipe: Recipe
    body: Body | None
    """None for a base without a cost model."""
    profiles: Mapping[str, DeviceProfile] = field(default_factory=dict)
    """By client; empty where no devices are simulated."""
    tokens: Mapping[str, Lengths] = field(default_factory=dict)
    """By client, where the texts are known."""
    proxy: Body | None = None
    """A larger model whose costs the clock uses in place of the trained model's."""
    heap: float | None = None
    """Of clients on this machine, as measured; see `devices.memory.HEAP`."""
    runtime: float | None = None
    """Bytes of interpreter and libraries, likewise."""

    @property
    def charged(self) -> Body:
        """The model whose operations, bytes and memory are counted."""
        body = self.proxy or self.body
        assert body is not None  # called only where costs are known
        return body

    def lengths(self, client: str) -> Lengths:
        longest = float(self.recipe.data.max_tokens)
        return self.tokens.get(client) or Lengths(longest, longest)

    def work(self, client: str, training: Training, rank: int, down_rank: int | None = None) -> Work:
        """Return a client's work in a round at a rank, apart from the ratio; `down_rank`: as the planner chose it."""
        assert training.steps is not None  # the planner has resolved epochs
        length = self.lengths(client)
        return Work(
            steps=training.steps,
            rows=training.rows,
            passes=training.accumulation,
            tokens=length.mean,
            longest=length.longest,
            checkpointing=training.gradient_checkpointing,
            side_tokens=self.side_tokens(training, length.mean),
            global_rank=self.global_rank(rank, down_rank),
            start_copy=training.proximal > 0,
        )

    def side_tokens(self, training: Training, length: float) -> float:
        """Return the tokens that go forward beside those that are trained on, where texts are so long."""
        assert training.steps is not None  # the planner has resolved epochs
        scored = 2 * 16 * length if self.recipe.pruning else 0.0
        # By the reference once, at most: rows that are seen again are not measured again.
        referred = training.steps * training.accumulation * training.rows * length if training.preference else 0.0
        return scored + referred

    def training_of(self, arm: Arm) -> Trained | None:
        """Return which modules of the charged model an arm trains; None: all of them, with the whole backward pass."""
        if arm.top == 1.0 and arm.back == 0.0:
            return None
        key = arm.rank, arm.top, arm.back
        if key not in self._trained:
            self._trained[key] = trained_modules(self.charged, arm.rank, top=arm.top, back=arm.back)
        return self._trained[key]

    @cached_property
    def _trained(self) -> dict[tuple[int, float, float], Trained]:
        """What each arm trains: of thousands of clients once."""
        return {}

    def trained_by(self, plan: Plan) -> Trained | None:
        """Return the same of a plan; of a larger model that stands in, the same share of its blocks."""
        if not plan.ranks:
            return self.training_of(Arm(plan.ratio, plan.rank, back=plan.back))
        assert self.body is not None  # costs are known
        if self.charged is self.body:
            return trained_of(self.body, plan.rank_of(self.body.modules), plan.back)
        blocks = backward_blocks(plan.rank_of(self.body.modules), self.body.layout, ())
        top = max(blocks, 1) / len(self.body.layout.blocks)
        return trained_modules(self.charged, plan.rank, top=top, back=plan.back)

    def global_rank(self, rank: int, down_rank: int | None = None) -> float:
        """Rank of what a client is sent: the recipe's bound for its rank, or an estimate, twice the largest rank."""
        largest = method_of(self.recipe).downlink_rank(self.recipe.method, rank)
        if down_rank is not None:
            return float(down_rank if largest is None else min(down_rank, largest))
        planner = self.recipe.planner
        rank = self.recipe.adapter.rank
        ranks = ranks_of(planner, rank) if isinstance(planner, AdaptiveSettings) else (rank,)
        return float(largest if largest is not None else 2 * max(ranks))

    def cost(self, client: str, arm: Arm, training: Training) -> Cost:
        """Return what an arm costs a client in a round."""
        pruning, work = self.recipe.pruning, self.work(client, training, arm.rank, arm.down_rank)
        trained = self.training_of(arm)
        method, settings = method_of(self.recipe), self.recipe.method
        traffic = round_bytes(
            self.charged,
            pruning,
            arm.ratio,
            arm.rank,
            global_rank=work.global_rank,
            wire_dtype=method.wire_dtype(settings),
            down_dtype=method.down_dtype(settings) if method.down_dtype else None,
            trained=trained,
        )
        return Cost(
            tflop=round_flops(self.charged, pruning, arm.ratio, arm.rank, work, trained) / 1e12,
            megabytes=max(1e-6, sum(traffic) / 1e6),
            memory_gb=self.memory(client, arm, training).total / 1e9,
        )

    def memory(self, client: str, arm: Arm, training: Training, verb: Verb | None = None) -> Memory:
        """Return the memory that an arm needs at a client's peak, by part."""
        return memory(self.charged, self.recipe.pruning, self.footprint(client, arm, training, verb))

    def planned_costs(self, planned: PlannedClient) -> Mapping[str, float]:
        """Return what the cost model expects of a plan: `planned_s` of a simulated device, else `planned_bytes`."""
        plan = planned.plan
        if self.body is None or method_of(self.recipe).task is ProbeSeeds or plan.base_dtype:
            return {}
        arm = Arm(plan.ratio, plan.rank, planned.top, plan.back, planned.share, planned.down_rank)
        if plan.client not in self.profiles:
            same = (arm, plan.training, self.lengths(plan.client))
            if same not in self._planned_bytes:
                self._planned_bytes[same] = round(self.memory(plan.client, arm, plan.training).total)
            return {"planned_bytes": self._planned_bytes[same]}
        known, cost = speed(self.profiles[plan.client]), self.cost(plan.client, arm, plan.training)
        transfer_s = cost.megabytes * (known.s_per_mb or 0.0)
        return {"planned_s": cost.tflop * (known.s_per_tflop or 0.0) + transfer_s + known.overhead_s}

    @cached_property
    def _planned_bytes(self) -> dict[Any, float]:
        """Expected memory by what it depends on: a hundred clients that are alike are counted once."""
        return {}

    def traffic(self, arm: Arm) -> tuple[float, float]:
        """Return about the bytes (down, up) of a round, from the numbers that travel alone."""
        method, settings = method_of(self.recipe), self.recipe.method
        return round_bytes(
            self.charged,
            self.recipe.pruning,
            arm.ratio,
            arm.rank,
            # Without a frozen change the factors that are trained come down, and nothing else.
            global_rank=self.global_rank(arm.rank, arm.down_rank) if method.freezes else arm.rank,
            wire_dtype=method.wire_dtype(settings),
            down_dtype=method.down_dtype(settings) if method.down_dtype else None,
            trained=self.training_of(arm),
        )

    def footprint(self, client: str, arm: Arm, training: Training, verb: Verb | None = None) -> Footprint:
        """Return what the memory of a client's work depends on; along seeds it probes, unless `verb` says otherwise."""
        body, length, method = self.charged, self.lengths(client), method_of(self.recipe)
        names = sorted(body.modules)
        ranks = module_ranks(names, body.layout, arm.rank, arm.top) or [arm.rank] * len(names)
        simulated = client in self.profiles
        settings = self.recipe.method
        usual = Footprint(
            ranks={name: rank for name, rank in zip(names, ranks, strict=True) if rank > 0},
            rows=training.rows,
            longest=length.longest,
            mean=length.mean,
            ratio=arm.ratio,
            # A simulated device has only what is left of the base; fedtune's own clients cut it out of a whole one.
            whole=not simulated,
            back=arm.back,
            base_dtype=quantised_format(self.recipe.model.dtype) or "",
            global_rank=self.global_rank(arm.rank, arm.down_rank) if method.freezes else 0.0,
            checkpointing=training.gradient_checkpointing,
            packed=training.packing,
            half=training.autocast == "bf16",
            dropout=training.dropout > 0,
            start_copy=training.proximal > 0,
            moments=2 if training.optimizer == "adamw" else int(training.momentum > 0),
            forward_only=method.task is ProbeSeeds,
            device="cuda" if simulated else "cpu",
            heap=None if simulated else self.heap,
            runtime=None if simulated else self.runtime,
        )
        return (
            seed_footprint(usual, body, settings, verb or "probe") if isinstance(settings, FedKSeedSettings) else usual
        )

    def cost_by_format(self, client: str, arm: Arm, training: Training, base_dtype: BaseDtype) -> Cost:
        """Return what an arm costs a client of a kind in a round over a base of a number format, its memory by part."""
        kind, pruning = self.kind(client), self.recipe.pruning
        # What neither lengths nor batches change is counted once: planners ask for thousands of clients and options.
        usual = (arm, replace(training, batch=1, accumulation=1, steps=1), client in self.profiles)
        if usual not in self._usual:
            costs = [replace(self, tokens={client: Lengths(t, t)}).cost(client, arm, usual[1]) for t in (1.0, 2.0)]
            self._usual[usual] = costs[0], costs[1], self.footprint(client, arm, usual[1])
        short, longer, footprint = self._usual[usual]
        resident: BaseDtype = quantised_format(self.recipe.model.dtype) or ""
        base_dtype = base_dtype or resident
        own = replace(footprint, rows=training.rows, longest=kind.longest, mean=kind.mean, base_dtype=base_dtype)
        if (usual, base_dtype) not in self._rates:
            self._rates[usual, base_dtype] = rates(self.charged, pruning, own)
        known = memory_at(self._rates[usual, base_dtype], self.charged, own)
        parts = {part: size / 1e9 for part, size in known.by_part().items()}
        if base_dtype != resident and client not in self.profiles:
            # A client of fedtune reads the codes from the resident base, and holds both.
            parts["weights"] += rates(self.charged, pruning, replace(own, base_dtype=resident)).weights / 1e9
        # Operations per token rise in a line with the tokens, by attention.
        per_token = short.tflop + (kind.mean - 1) * (longer.tflop / 2 - short.tflop)
        examples = (training.steps or 1) * training.batch * training.accumulation
        return Cost(
            tflop=SLOWER[base_dtype] * examples * kind.mean * per_token,
            megabytes=short.megabytes,
            memory_gb=sum(parts.values()),
            memory_parts=parts,
        )

    # Caches of the function above.
    @cached_property
    def _usual(self) -> dict[tuple[Arm, Training, bool], tuple[Cost, Cost, Footprint]]:
        return {}

    @cached_property
    def _rates(self) -> dict[tuple[tuple[Arm, Training, bool], BaseDtype], Rates]:
        return {}

    def kind(self, client: str) -> Lengths:
        """Return a client's lengths, rounded up by an eighth at most: those of many clients are then the same."""
        length, most = self.lengths(client), float(self.recipe.data.max_tokens)
        return Lengths(*(min(most, rounded_up(tokens)) for tokens in (length.mean, length.longest)))

    def load(self, done: CompletedWork) -> Load:
        """Return the load of a finished round on a client's device, from the tokens and bytes that were counted."""
        if isinstance(self.recipe.method, FedKSeedSettings):
            return seed_load(done, self.charged, self.recipe.method, self.lengths(done.plan.client).mean)
        plan, measured, pruning = done.plan, done.measured, self.recipe.pruning
        work, trained = self.work(plan.client, plan.training, plan.rank, done.down_rank), self.trained_by(plan)
        size = sizes(self.charged.layout, pruning, plan.ratio)
        flops = flops_per_token(self.charged, size, plan.rank, work, trained)
        factor = self.traffic_factor(plan.ratio, plan.rank, done.down_rank)
        operations = flops * (measured.tokens + 0.5 * measured.side_tokens)
        if trained is not None:
            # Losses and scores of other tokens are of whole forward passes, whatever is trained.
            side = flops_per_token(self.charged, size, plan.rank, work)
            operations = flops * measured.tokens + 0.5 * side * measured.side_tokens
        return Load(
            tflop=SLOWER[plan.base_dtype] * operations / 1e12,
            gigabytes=self.gigabytes(plan.client, Arm(plan.ratio, plan.rank), plan.training, trained),
            bytes_down=done.traffic.down * factor,
            bytes_up=done.traffic.up * factor,
        )

    def megabytes(self, seen: ClientObservation) -> float:
        """Return a client's counted megabytes, down and up together; with a proxy, scaled to the proxy's size."""
        factor = self.traffic_factor(seen.ratio, seen.rank, seen.down_rank)
        return (seen.bytes_down + seen.bytes_up) / 1e6 * factor

    def traffic_factor(self, ratio: float, rank: int, down_rank: int | None = None) -> float:
        """Return by how much more bytes the proxy would send than the model that was trained."""
        # Seeds and scalars are as many of any base.
        if self.proxy is None or self.body is None or method_of(self.recipe).task is ProbeSeeds:
            return 1.0
        sent = self.global_rank(rank, down_rank)
        both = [
            sum(round_bytes(body, self.recipe.pruning, ratio, rank, global_rank=sent, wire_dtype="bf16"))
            for body in (self.proxy, self.body)
        ]
        return both[0] / both[1]

    def verb(self, client: str, examples: int, has_gb: float | None) -> tuple[Verb | None, Training]:
        """Return what a client does, and how it trains, with steps: with `auto` as the memory of its device allows.

        Args:
            client: its name.
            examples: that it holds.
            has_gb: of its device; None: not known, and taken to be enough.
        """
        asked = verb_request(self.recipe, client)
        _, training = planned_training(self.recipe, client)
        training = replace(training, steps=optimizer_steps(training, examples), epochs=None)
        if asked.verb != "auto":
            return asked.verb, training
        need = self.memory(client, Arm(0.0, 1), training, "descend").total
        if has_gb is None or need <= has_gb * 1e9 or asked.probing is None:
            return "descend", training
        return "probe", replace(asked.probing, steps=optimizer_steps(asked.probing, examples), epochs=None)

    def seed_flops(self, settings: FedKSeedSettings, client: str, verb: Verb | None, training: Training) -> float:
        """Return the operations of a round of a client that steps along seeds."""
        mean, verb = self.lengths(client).mean, verb or "probe"
        tokens = round_tokens(verb, settings, training, mean)
        return seed_flops(self.charged, settings, verb, training, tokens, mean)

    def misfit_descending(self, client: Client, training: Training) -> str:
        """Return why descending does not fit a client's memory; empty where it does, or that is not known."""
        has = self.memory_gb(client)
        if has is None or self.body is None:
            return ""
        need = self.memory(client.name, Arm(0.0, 1), training, "descend").total / 1e9
        if need <= has:
            return ""
        return (
            f"expected {need:.3g} GB of memory to descend; has {has:.3g} GB; "
            "lower descend.batch, or let it probe with verb = 'auto'"
        )

    def misfit(self, client: Client, arm: Arm, training: Training) -> str:
        """Return why an arm does not fit a client's memory; empty where it does, or that is not known."""
        has = self.memory_gb(client)
        if has is None or self.body is None:
            return ""
        need = self.memory(client.name, arm, training).total / 1e9
        if need <= has:
            return ""
        return (
            f"expected {need:.3g} GB of memory, for {arm_text(arm)}; has {has:.3g} GB; "
            "lower client.batch, raise planner.ratio, or let a planner choose"
        )

    def memory_gb(self, client: Client) -> float | None:
        profile = self.profiles.get(client.name)
        if profile is not None:
            return profile.memory_gb
        return MEMORY_SHARE * client.memory_bytes / 1e9 if client.memory_bytes else None

    def planner(self, blueprint: Blueprint) -> Planner:
        """Return the planner that the recipe names.

        Raises:
            ConfigError: if it needs costs and the base has no cost model, or its upper blocks and they are not known.
        """
        recipe = self.recipe
        if blueprint.anatomy is None and (asked := asks_for_top(recipe)):
            expected, got = f"a base of {', '.join(FAMILIES)}", f"{recipe.model.base!r}, whose blocks are not known"
            raise ConfigError(Fault(asked, expected, got, "leave it out"))
        inputs = PlannerInputs(
            seed=recipe.seed,
            rounds=recipe.rounds.count,
            training=partial(planned_training, recipe),
            alpha=recipe.adapter.alpha,
            rslora=recipe.adapter.rslora,
            ratio=partial(requested_ratio, recipe),
            arm=partial(requested_arm, recipe),
            pruning=recipe.pruning,
            ranking=bool(blueprint.ranking),
            base=recipe.model.base,
            layout=blueprint.anatomy,
            modules=tuple(blueprint.modules),
            selective=blueprint.anatomy is not None,  # the same blocks that can be pruned
            partial=method_of(recipe).modules == "any",
            costs=None if self.body is None else self.cost,
            traffic=self.megabytes,
            speeds={name: speed(profile) for name, profile in self.profiles.items()},
            misfit=self.misfit,
            server_s=recipe.fleet.server_s if recipe.fleet else 0.0,
            true_seconds=self.true_seconds,
            module_shapes=blueprint.modules,
            costs_by_format=None if self.body is None else self.cost_by_format,
            kind=self.kind,
            memory_gb=self.memory_gb,
            verb=partial(verb_request, recipe),
            misfit_descending=self.misfit_descending,
        )
        planner = planner_type_of(recipe).create(recipe.planner, inputs)
        if recipe.pruning is not None and recipe.pruning.adapters == "two":
            planner = TwoAdapters(planner, recipe.pruning)
        if (
            isinstance(recipe.planner, FixedSettings | AdaptiveSettings | FedPipeSettings)
            or method_of(recipe).task is ProbeSeeds
        ):
            return planner  # the recipe's rules have bounded its ranks
        method = method_of(recipe)
        return RankChecked(
            planner,
            blueprint.max_rank,
            equal=method.ranks == "equal",
            modules=tuple(blueprint.modules),
            alike=method.modules == "equal",
        )

    def true_seconds(self, round: int, candidate: Candidate, arms: Sequence[Arm]) -> Sequence[float]:
        """Return the seconds of every arm for a client in a round; only for traces that do not depend on time."""
        clock = self.clock()
        assert isinstance(clock, SimulatedClock)  # config asks the oracle for a fleet by rounds
        name, seconds = candidate.client, []
        training = planned_training(self.recipe, name)[1]
        for arm, tflop, megabytes in zip(arms, candidate.tflop, candidate.megabytes, strict=True):
            load = Load(
                tflop,
                self.gigabytes(name, arm, with_share(training, arm.share), self.training_of(arm)),
                megabytes / 2 * 1e6,
                megabytes / 2 * 1e6,
            )
            seconds.append(clock.client(name, load, round=round, now_s=0.0).seconds)
        return seconds

    def gigabytes(self, client: str, arm: Arm, training: Training, trained: Trained | None = None) -> float:
        """Return the gigabytes of weights that are read in a round, once per pass and step."""
        layout, work = self.charged.layout, self.work(client, training, arm.rank)
        pruned = blocks_of(layout, sizes(layout, self.recipe.pruning, arm.ratio))
        weights = self.charged.parameters - blocks_of(layout, sizes(layout, None, 0.0)) + pruned
        passes: float = PASSES + work.checkpointing
        if trained is not None:
            # Backward passes read the weights of what they go through.
            passes = 1 + (1 - trained.back + work.checkpointing) * trained.depth
        return passes * work.steps * work.passes * weights * layout.number_bytes / 1e9

    def clock(self) -> Clock | None:
        """Return the simulated clock; None without a simulated fleet."""
        settings = self.recipe.fleet
        if settings is None or self.body is None:
            return None
        return SimulatedClock(
            self.profiles,
            self.load,
            seed=self.recipe.seed,
            by=settings.by,
            late=settings.late,
            server_s=settings.server_s,
        )

    def prober(self) -> Prober | None:
        """Return what asks simulated devices for their speed; None where the planner does not want to know it."""
        clock, planner = self.clock(), self.recipe.planner
        if not isinstance(clock, SimulatedClock) or not isinstance(planner, AdaptiveSettings) or not planner.probe:
            return None
        return Prober(clock.probes, repeatable=True)

    def summary(self) -> Mapping[str, Any]:
        """Return the devices as summary.json describes them."""
        if not self.profiles or self.recipe.fleet is None:
            return {}
        proxy = self.recipe.fleet.proxy
        of = "" if proxy == "none" else f"; proxy: operations, bytes and memory are those of {proxy}"
        return {
            "clients": {name: profile.name for name, profile in self.profiles.items()},
            "profiles": {profile.name: profile.as_table() for profile in self.profiles.values()},
            "clock": f"{SIMULATED_METHODS}{of}.",
        }


@dataclass(frozen=True)
class RankChecked:
    """A planner of another package whose ranks are checked: a method would cut them, or fail after the training."""

    planner: Planner
    largest: int
    """The largest rank that the run was prepared for."""
    equal: bool
    """Whether the method needs that rank of every client."""
    modules: Sequence[str] = ()
    """Names of those that get an adapter."""
    alike: bool = False
    """Whether the method needs all modules of every client, of one rank."""

    def start(self) -> Any:
        return self.planner.start()

    def plan(self, learned: Any, round: int, cohort: Sequence[Client]) -> Mapping[str, PlannedClient | Failure]:
        """Return the planner's plans.

        Raises:
            RoundError: naming the first client whose rank the method cannot combine.
        """
        plans = self.planner.plan(learned, round, cohort)
        for name, own in plans.items():
            rank = own.plan.rank if isinstance(own, PlannedClient) else self.largest
            if rank > self.largest or (self.equal and rank != self.largest):
                expected = f"rank {self.largest} for all clients" if self.equal else f"rank {self.largest} at most"
                hint = "set adapter.rank, or largest_rank of the planner's type"
                raise RoundError(f"round {round}: {name}: expected {expected}; got {rank}; {hint}", final=True)
            if isinstance(own, PlannedClient) and (why := self.modules_fault(own)):
                raise RoundError(f"round {round}: {name}: {why}", final=True)
        return plans

    def modules_fault(self, planned: PlannedClient) -> str:
        """Return why the method cannot combine what a plan trains of the modules; empty if it can."""
        plan = planned.plan
        if self.alike and (plan.ranks or planned.down_rank is not None):
            return (
                "ranks: expected one rank for all modules, which the method needs; got ranks by module; leave them out"
            )
        try:
            plan.rank_of(self.modules)
        except ShapeError as error:
            return f"{error}; see pruning.depth.module_ranks"
        return ""

    def observe(self, learned: Any, seen: Sequence[ClientObservation]) -> Any:
        return self.planner.observe(learned, seen)


def asks_for_top(recipe: Recipe) -> str:
    """Return the key by which a recipe lets clients train the upper blocks alone; empty if it has none."""
    planner = recipe.planner
    if isinstance(planner, FixedSettings) and planner.top < 1.0:
        return "planner.top"
    rows = [place for place, row in enumerate(recipe.override) if row.top is not None and row.top < 1.0]
    return f"override.{rows[0]}.top" if rows else ""


def speed(profile: DeviceProfile) -> Speed:
    """Return what a planner knows about a device before the first round: its mean speeds."""
    megabit_s = 8.0 * 0.5 * (1 / profile.up_mbps + 1 / profile.down_mbps)
    return Speed(
        memory_gb=profile.memory_gb,
        s_per_tflop=1.0 / (profile.tflops * profile.mean_mode),
        s_per_mb=megabit_s,
        overhead_s=profile.overhead_s,
        kind=profile.name,
    )


def fleet_of(
    recipe: Recipe,
    clients: Sequence[str],
    blueprint: Blueprint,
    *,
    parameters: int,
    tokens: Mapping[str, Lengths] | None = None,
    absent: Collection[str] = (),
) -> Fleet:
    """Return the devices that a recipe's clients are simulated on; it may name others that are `absent`.

    Raises:
        ConfigError: if an override matches no client or is impossible, or the base has no cost model.
    """
    body = body_of(recipe, blueprint, parameters)
    if recipe.fleet is None:
        return Fleet(recipe, body, tokens=tokens or {})
    if body is None:
        raise ConfigError(
            Fault(
                "fleet",
                f"a base of {', '.join(FAMILIES)}",
                f"{recipe.model.base!r}, for which no cost model exists",
                "leave it out",
            )
        )
    profiles = dict(FLEETS[recipe.fleet.name](clients, recipe.seed))
    for place, override in enumerate(recipe.device):
        covered = [name for name in clients if override.covers(name)]
        if not covered and not any(override.covers(name) for name in absent):
            known = f"{', '.join(sorted(clients)[:8])}{', ...' * (len(clients) > 8)}"
            expected, got = f"names or patterns of clients ({known})", f"{list(override.clients)}, which match none"
            raise ConfigError(Fault(f"device.{place}.clients", expected, got))
        for name in covered:
            start = PROFILES[override.profile] if override.profile else profiles[name]
            profiles[name] = with_overrides(start, override.fields, place) if override.fields else start
    make = PROXIES.get(recipe.fleet.proxy)
    return Fleet(recipe, body, profiles, tokens or {}, make() if make else None)


def with_overrides(start: DeviceProfile, fields: Mapping[str, Any], place: int) -> DeviceProfile:
    """Return a profile with a recipe's changes, renamed, so that reports do not mix it with the original."""
    provenance: Mapping[str, Provenance] = {**start.provenance, **{name: "recipe" for name in fields}}
    return check(replace(start, name=f"{start.name}*{place + 1}", provenance=provenance, **fields))


def body_of(recipe: Recipe, blueprint: Blueprint, parameters: int) -> Body | None:
    """Return the sizes from which a base's costs follow; None for a base without a cost model."""
    adapter = recipe.adapter
    if blueprint.anatomy is None:
        return None
    return Body(
        layout=blueprint.anatomy,
        modules=blueprint.modules,
        parameters=parameters,
        saved=sum(array.size for array in blueprint.saved.values()),
        classifies=recipe.model.task == "classification",
        virtual=adapter.tokens if adapter.kind in ("p-tuning", "prompt") else 0,
        prefix=adapter.tokens if adapter.kind == "prefix" else 0,
    )
