"""The planners that learn: which arms fit a client's memory and what they cost; a policy chooses among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Annotated, Any, Literal, TypeAlias

from annotated_types import Ge, Gt, Interval

from fedtune.messages import Client, Failure, Plan, PlannedClient, Training
from fedtune.planning.planner import ClientObservation, Cost, Costs, Speed, lora_scale, optimizer_steps
from fedtune.planning.policy import Arm, Candidate, Choice, Observed, Policy
from fedtune.pruning.ranking import PruningSettings
from fedtune.seeds import derive

PolicyName: TypeAlias = Literal["deadline", "s-ucb", "ucb", "thompson", "random", "oracle"]

MEMORY_SHARE = 0.85
"""Share of a machine's main memory that the system leaves free; assumed, not measured."""


@dataclass(frozen=True)
class AdaptiveSettings:
    """Settings of the planners that choose an *arm*, a pruning ratio and a rank, for every client and round."""

    name: PolicyName = "deadline"
    """deadline: learns each client's speed and lets the cohort end together; s-ucb: a tree of arms per client
    (FedSpine-style, formula ours); ucb: a bandit over a few arms; thompson: a bandit over all; random: any arm that
    fits; oracle: deadline with the simulated clock's true times, for comparisons (needs `fleet.by = "round"`)."""
    ratios: Sequence[Annotated[float, Interval(ge=0, le=0.875)]] = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
    """Pruning ratios to choose from; without the table `pruning` there is only 0."""
    ranks: Sequence[Annotated[int, Ge(1)]] = (2, 4, 8, 16, 32)
    """LoRA ranks to choose from."""
    explore: Annotated[int, Ge(0)] = 0
    """With deadline: clients per round that try another arm that still ends in time."""
    deadline_s: Annotated[float, Gt(0)] | None = None
    """With deadline: seconds that every round is to take; none lets the planner choose."""
    reward: Literal["time", "fedmp"] = "time"
    """With ucb and thompson. time: only clients slower than the cohort's median lose; fedmp: the fall of the loss,
    divided by the distance from the cohort's mean time, as in FedMP."""


@dataclass(frozen=True)
class Learned:
    """What a planner has learned."""

    policy: Any
    """The policy's own memory."""
    too_large: Mapping[str, float] = field(default_factory=dict)
    """By client, the least memory in GB at which it ran out."""


@dataclass(frozen=True)
class Options:
    """What one client may be asked in one round; sequences run over the arms."""

    client: Client
    training: Training
    """With `steps` set."""
    costs: Sequence[Cost]
    memory_gb: float | None
    """None where it is not known."""
    feasible: tuple[bool, ...]

    @property
    def any_feasible(self) -> bool:
        return any(self.feasible)


@dataclass(frozen=True)
class Adaptive:
    """Plans by a policy over arms. Memory is a hard constraint: infeasible arms are never tried."""

    policy: Policy[Any]
    training: Callable[[str], Training]
    """client -> how it trains"""
    costs: Costs
    traffic: Callable[[ClientObservation], float]
    """Megabytes of a client's round."""
    speeds: Mapping[str, Speed]
    """By client, where a device's profile is known."""
    alpha: float | Literal["2r"]
    rslora: bool
    seed: int
    rounds: int
    pruning: PruningSettings | None = None
    ranking: bool = False
    """Whether heads and channels are ranked from the start: else no client is pruned in the first round."""

    def start(self) -> Learned:
        """Return what is known before the first round."""
        return Learned(self.policy.start())

    def plan(self, learned: Learned, round: int, cohort: Sequence[Client]) -> Mapping[str, PlannedClient | Failure]:
        """Return a plan for each client that an arm fits; for the others what the smallest arm would need."""
        options = {client.name: self._options(learned, round, client) for client in cohort}
        # By name: sums and draws must not depend on the order in which clients were listed.
        feasible = [own for _, own in sorted(options.items()) if own.any_feasible]
        total = sum(own.client.num_examples for own in feasible)
        candidates = [self._candidate(own, weight=own.client.num_examples / total) for own in feasible]
        choice = self.policy.choose(learned.policy, round, candidates, key=derive(self.seed, "planner", round))
        return {
            name: self._plan(own, choice) if own.any_feasible else self._unfit(learned, round, own)
            for name, own in options.items()
        }

    def observe(self, learned: Learned, seen: Sequence[ClientObservation]) -> Learned:
        """Return what is known after a round."""
        # Rank 0: the client had no plan.
        asked = [client for client in seen if client.rank > 0]
        too_large = dict(learned.too_large)
        for client in asked:
            if client.out_of_memory:
                needed = self._cost(client).memory_gb
                # The least that was too much: every arm that needs as much is out for this client, for good.
                too_large[client.client] = min(needed, too_large.get(client.client, needed))
        observed = [self._observation(client) for client in asked]
        return Learned(self.policy.learn(learned.policy, observed), too_large)

    def ratio_filter(self, round: int) -> Callable[[float], bool]:
        """Return the test whether a round allows a ratio: from the ramp's to the largest, in the end only the target.

        Voters share one structure, so for them it is the ramp's in every round.
        """
        settings = self.pruning
        if settings is None or (round == 1 and not self.ranking and settings.policy != "local"):
            # Nothing says yet what may go: the first round's clients score heads and channels.
            return lambda ratio: ratio == 0
        least = settings.ratio(round, self.rounds)
        if settings.target and (least == settings.target or settings.policy == "vote"):
            # In the last rounds clients must recover in the structure that is deployed.
            wanted = least if settings.policy == "vote" else settings.target
            # The target need not be one of the arms; of two as near, the smaller ratio loses less.
            nearest = min((arm.ratio for arm in self.policy.arms), key=lambda ratio: (abs(ratio - wanted), ratio))
            return lambda ratio: ratio == nearest
        largest = max(arm.ratio for arm in self.policy.arms)
        # Never above the largest arm, or none would be left.
        return lambda ratio: ratio >= min(least, largest)

    def _options(self, learned: Learned, round: int, client: Client) -> Options:
        training = self._training(client)
        costs = [self.costs(client.name, arm, training) for arm in self.policy.arms]
        memory, allowed = self._memory_gb(client), self.ratio_filter(round)
        ran_out = learned.too_large.get(client.name)
        feasible = tuple(
            allowed(arm.ratio)
            and (memory is None or cost.memory_gb <= memory)
            and (ran_out is None or cost.memory_gb < ran_out)
            for arm, cost in zip(self.policy.arms, costs, strict=True)
        )
        return Options(client, training, costs, memory, feasible)

    def _training(self, client: Client) -> Training:
        training = self.training(client.name)
        return replace(training, steps=optimizer_steps(training, client.num_examples), epochs=None)

    def _memory_gb(self, client: Client) -> float | None:
        speed = self.speeds.get(client.name)
        if speed is not None and speed.memory_gb is not None:
            return speed.memory_gb
        return MEMORY_SHARE * client.memory_bytes / 1e9 if client.memory_bytes else None

    def _candidate(self, own: Options, *, weight: float) -> Candidate:
        speed = self.speeds.get(own.client.name, Speed())
        return Candidate(
            client=own.client.name,
            weight=weight,
            feasible=own.feasible,
            tflop=tuple(cost.tflop for cost in own.costs),
            megabytes=tuple(cost.megabytes for cost in own.costs),
            memory_gb=tuple(cost.memory_gb for cost in own.costs),
            overhead_s=speed.overhead_s,
            s_per_tflop=speed.s_per_tflop,
            s_per_mb=speed.s_per_mb,
        )

    def _plan(self, own: Options, choice: Choice) -> PlannedClient:
        name, memory = own.client.name, own.memory_gb
        arm = self.policy.arms[choice.arms[name]]
        in_memory = [
            arm.ratio
            for arm, cost in zip(self.policy.arms, own.costs, strict=True)
            if memory is None or cost.memory_gb <= memory
        ]
        plan = Plan(
            client=name,
            rank=arm.rank,
            scale=lora_scale(arm.rank, self.alpha, rslora=self.rslora),
            training=own.training,
            ratio=arm.ratio,
        )
        return PlannedClient(
            plan,
            # The least pruned structure that fits: in it a new client's loss before training is measured.
            first_ratio=min(in_memory, default=arm.ratio),
            deadline_s=choice.deadline_s,
            why=choice.why.get(name, ""),
        )

    def _unfit(self, learned: Learned, round: int, own: Options) -> Failure:
        """Return the failure of a client without a feasible arm: what the smallest arm needs, and what there is."""
        name, memory, allowed = own.client.name, own.memory_gb, self.ratio_filter(round)
        open_now = [
            (cost.memory_gb, arm) for arm, cost in zip(self.policy.arms, own.costs, strict=True) if allowed(arm.ratio)
        ]
        if not open_now:
            expected = f"a ratio that round {round} allows in planner.ratios"
            return Failure(name, expected=expected, got="none", hint="add one", kind="unfit")
        need, arm = min(open_now, key=lambda option: (option[0], option[1].rank))
        got = f"has {memory:.3g} GB" if memory is not None else "its size is not known"
        if (ran_out := learned.too_large.get(name)) is not None:
            got += f", and ran out of memory at {ran_out:.3g} GB"
        return Failure(
            name,
            expected=f"at least {need:.3g} GB of memory, for a ratio of {arm.ratio:g} and rank {arm.rank}",
            hint=f"{got}; lower client.batch or data.max_tokens, or {self._advice(round)}",
            kind="unfit",
        )

    def _advice(self, round: int) -> str:
        # Asked at two ratios: without a ranking a round allows 0 and nothing else.
        if self.pruning is not None and all(self.ratio_filter(round)(ratio) == (ratio == 0) for ratio in (0, 0.5)):
            return "name a file in pruning.ranking: without one the first round prunes no client"
        return "allow larger planner.ratios"

    def _cost(self, seen: ClientObservation) -> Cost:
        client = Client(seen.client, seen.num_examples)
        return self.costs(seen.client, Arm(seen.ratio, seen.rank), self._training(client))

    def _observation(self, seen: ClientObservation) -> Observed:
        known = [part for part in (seen.compute_s, seen.transfer_s) if part is not None and isfinite(part)]
        late, used = seen.status == "late", seen.status == "ok"
        # The seconds of a client that was given up are a bound and no measurement.
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
