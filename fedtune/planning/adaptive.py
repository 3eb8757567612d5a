"""The planners that learn: what each arm would cost a client, what fits its memory, and a policy that chooses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Annotated, Any, Literal, TypeAlias

from annotated_types import Ge, Gt, Interval

from fedtune.messages import Client, Failure, Plan, PlannedClient, Training
from fedtune.planning.fixed import scale, steps
from fedtune.planning.planner import ClientObservation
from fedtune.planning.policy import Arm, Candidate, Choice, Observed, Policy
from fedtune.pruning.ranking import PruningSettings
from fedtune.seeds import derive

PolicyName: TypeAlias = Literal["deadline", "s-ucb", "ucb", "thompson", "random", "oracle"]

MEMORY_SHARE = 0.85
"""Of the main memory that a machine says it has: what the system leaves (assumed)."""


@dataclass(frozen=True)
class AdaptiveSettings:
    """Settings of the planners that choose a pruning ratio and a rank for every client and round."""

    name: PolicyName = "deadline"
    """deadline: learns each client's speed and chooses for the whole cohort (ours, the default); s-ucb: a tree of arms
    per client (FedSpine-style, formula ours); ucb and thompson: bandits over a few and over all arms; random; oracle:
    deadline with the simulated clock's true times, for comparisons (needs fleet.by = "round")."""
    ratios: Sequence[Annotated[float, Interval(ge=0, le=0.875)]] = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
    """Pruning ratios to choose from; without the table `pruning` only 0 is."""
    ranks: Sequence[Annotated[int, Ge(1)]] = (2, 4, 8, 16, 32)
    """LoRA ranks to choose from."""
    explore: Annotated[int, Ge(0)] = 0
    """deadline: clients per round that try another arm within the deadline."""
    deadline_s: Annotated[float, Gt(0)] | None = None
    """deadline: seconds that a round is to take; none lets the planner choose."""
    reward: Literal["time", "fedmp"] = "time"
    """ucb and thompson: time punishes only who is slower than the cohort's median; fedmp is FedMP's."""


@dataclass(frozen=True)
class Cost:
    """What one arm would cost one client in one round."""

    tflop: float
    megabytes: float
    memory_gb: float


Costs: TypeAlias = Callable[[str, Arm, Training], Cost]
"""(client, arm, how it trains) -> its cost; made of the base and the client's texts by the top floors."""

Traffic: TypeAlias = Callable[[ClientObservation], float]
"""Megabytes that a client's round took, down and up; where a proxy is charged, what it would have taken."""


@dataclass(frozen=True)
class Speed:
    """What is known of a client's device before it has done anything."""

    memory_gb: float | None = None
    """Usable; None where it is not known."""
    s_per_tflop: float | None = None
    s_per_mb: float | None = None
    overhead_s: float = 0.0


@dataclass(frozen=True)
class Learned:
    """What a planner has learned."""

    policy: Any
    """The policy's own memory."""
    too_large: Mapping[str, float] = field(default_factory=dict)
    """By client, the least memory in GB at which it ran out."""


@dataclass(frozen=True)
class Adaptive:
    """Plans by a policy over arms; memory is a hard constraint, which no client has to fail to teach."""

    policy: Policy[Any]
    training: Callable[[str], Training]
    """From a client's name to how it trains."""
    costs: Costs
    traffic: Traffic
    speeds: Mapping[str, Speed]
    """By client, where a device's profile is known."""
    alpha: float | Literal["2r"]
    rslora: bool
    seed: int
    rounds: int
    pruning: PruningSettings | None = None
    ranking: bool = False
    """Whether the recipe brings an order of heads and channels along: else the first round prunes nobody."""

    def start(self) -> Learned:
        """Return what is known before the first round."""
        return Learned(self.policy.start())

    def plan(self, learned: Learned, round: int, cohort: Sequence[Client]) -> Mapping[str, PlannedClient | Failure]:
        """Return a plan for each client that an arm fits, and of the others what the smallest would need."""
        trained = {client.name: self._training(client) for client in cohort}
        costs = {
            name: [self.costs(name, arm, training) for arm in self.policy.arms] for name, training in trained.items()
        }
        fits = {client.name: self._feasible(learned, client, round, costs[client.name]) for client in cohort}
        able = [client for client in sorted(cohort, key=lambda client: client.name) if any(fits[client.name])]
        total = sum(client.num_examples for client in able)
        candidates = [
            self._candidate(client, client.num_examples / total, fits[client.name], costs[client.name])
            for client in able
        ]
        choice = self.policy.choose(learned.policy, round, candidates, key=derive(self.seed, "planner", round))
        return {
            client.name: self._plan(client, trained[client.name], choice, costs[client.name])
            if any(fits[client.name])
            else self._unfit(learned, client, round, costs[client.name])
            for client in cohort
        }

    def observe(self, learned: Learned, seen: Sequence[ClientObservation]) -> Learned:
        """Return what is known after a round."""
        observed = [self._observed(each) for each in seen if each.rank > 0]
        too_large = dict(learned.too_large)
        for each in seen:
            if each.out_of_memory and each.rank > 0:
                needed = self._cost(each).memory_gb
                too_large[each.client] = min(needed, too_large.get(each.client, needed))
        return Learned(self.policy.learn(learned.policy, observed), too_large)

    def allowed(self, round: int) -> Callable[[float], bool]:
        """Return whether a ratio is one of this round's: between the ramp and the largest, at the end the target's."""
        settings = self.pruning
        if settings is None or (round == 1 and not self.ranking and settings.policy != "local"):
            return lambda ratio: ratio == 0
        least = settings.ratio(round, self.rounds)
        if settings.target and (least == settings.target or settings.policy == "vote"):
            # In the last rounds recovery must happen in the structure that is deployed; voters share one structure.
            wanted = least if settings.policy == "vote" else settings.target
            nearest = min((arm.ratio for arm in self.policy.arms), key=lambda ratio: (abs(ratio - wanted), ratio))
            return lambda ratio: ratio == nearest
        largest = max(arm.ratio for arm in self.policy.arms)
        return lambda ratio: ratio >= min(least, largest)

    def _training(self, client: Client) -> Training:
        training = self.training(client.name)
        return replace(training, steps=steps(training, client.num_examples), epochs=None)

    def _memory_gb(self, client: Client) -> float | None:
        speed = self.speeds.get(client.name)
        if speed is not None and speed.memory_gb is not None:
            return speed.memory_gb
        return MEMORY_SHARE * client.memory_bytes / 1e9 if client.memory_bytes else None

    def _feasible(self, learned: Learned, client: Client, round: int, costs: Sequence[Cost]) -> tuple[bool, ...]:
        has, allowed = self._memory_gb(client), self.allowed(round)
        banned = learned.too_large.get(client.name)
        return tuple(
            allowed(arm.ratio)
            and (has is None or cost.memory_gb <= has)
            and (banned is None or cost.memory_gb < banned)
            for arm, cost in zip(self.policy.arms, costs, strict=True)
        )

    def _candidate(self, client: Client, weight: float, fits: tuple[bool, ...], costs: Sequence[Cost]) -> Candidate:
        speed = self.speeds.get(client.name, Speed())
        return Candidate(
            client=client.name,
            weight=weight,
            feasible=fits,
            tflop=tuple(cost.tflop for cost in costs),
            megabytes=tuple(cost.megabytes for cost in costs),
            memory_gb=tuple(cost.memory_gb for cost in costs),
            overhead_s=speed.overhead_s,
            s_per_tflop=speed.s_per_tflop,
            s_per_mb=speed.s_per_mb,
        )

    def _plan(self, client: Client, training: Training, choice: Choice, costs: Sequence[Cost]) -> PlannedClient:
        arm, has = self.policy.arms[choice.arms[client.name]], self._memory_gb(client)
        fitting = [
            each.ratio
            for each, cost in zip(self.policy.arms, costs, strict=True)
            if has is None or cost.memory_gb <= has
        ]
        plan = Plan(
            client=client.name,
            rank=arm.rank,
            scale=scale(arm.rank, self.alpha, rslora=self.rslora),
            training=training,
            ratio=arm.ratio,
        )
        return PlannedClient(
            plan,
            first_ratio=min(fitting, default=arm.ratio),
            deadline_s=choice.deadline_s,
            why=choice.why.get(client.name, ""),
        )

    def _unfit(self, learned: Learned, client: Client, round: int, costs: Sequence[Cost]) -> Failure:
        """Say what the smallest thing that could be asked would need, and what there is."""
        allowed, has = self.allowed(round), self._memory_gb(client)
        open_now = [
            (cost.memory_gb, arm) for arm, cost in zip(self.policy.arms, costs, strict=True) if allowed(arm.ratio)
        ]
        if not open_now:
            expected = f"a ratio that round {round} allows in planner.ratios"
            return Failure(client.name, expected=expected, got="none", hint="add one", kind="unfit")
        need, arm = min(open_now, key=lambda each: (each[0], each[1].rank))
        there = f"has {has:.3g} GB" if has is not None else "its size is not known"
        if (banned := learned.too_large.get(client.name)) is not None:
            there += f", and ran out of memory at {banned:.3g} GB"
        return Failure(
            client.name,
            expected=f"at least {need:.3g} GB of memory, for a ratio of {arm.ratio:g} and rank {arm.rank}",
            hint=f"{there}; lower client.batch or data.max_tokens, or {self._smaller(round)}",
            kind="unfit",
        )

    def _smaller(self, round: int) -> str:
        if self.pruning is not None and all(self.allowed(round)(ratio) == (ratio == 0) for ratio in (0, 0.5)):
            return "name a file in pruning.ranking: without one the first round prunes nobody"
        return "allow larger planner.ratios"

    def _cost(self, seen: ClientObservation) -> Cost:
        client = Client(seen.client, seen.num_examples)
        return self.costs(seen.client, Arm(seen.ratio, seen.rank), self._training(client))

    def _observed(self, seen: ClientObservation) -> Observed:
        known = [part for part in (seen.compute_s, seen.transfer_s) if part is not None and isfinite(part)]
        late, used = seen.status == "late", seen.status == "ok"
        timed, speed = len(known) == 2 and not late, self.speeds.get(seen.client, Speed())
        return Observed(
            client=seen.client,
            arm=Arm(seen.ratio, seen.rank),
            tflop=self._cost(seen).tflop,
            # As counted: in the first round next to nothing comes down, which would look like a fast connection.
            megabytes=self.traffic(seen),
            compute_s=seen.compute_s if timed else None,
            transfer_s=seen.transfer_s if timed else None,
            used=used,
            late_s=sum(known) if late and len(known) == 2 else None,
            overhead_s=speed.overhead_s,
            s_per_tflop=speed.s_per_tflop,
            s_per_mb=speed.s_per_mb,
            loss_before=seen.loss_before if used else None,
            loss_after=seen.loss_after if used else None,
            importance=seen.importance if used else None,
        )
