"""The planners that learn: which arms fit a client's memory and what they cost; a policy chooses among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any, Literal

from fedtune.messages import Client, Failure, Plan, PlannedClient, Training
from fedtune.planning.floor import Floor
from fedtune.planning.planner import ClientObservation, Cost, Costs, Speed, lora_scale, optimizer_steps, steps_of_share
from fedtune.planning.policy import Arm, Candidate, Choice, GainOf, Observed, Policy, Probe
from fedtune.seeds import derive

MEMORY_SHARE = 0.85
"""Share of a machine's main memory that the system leaves free; assumed, not measured."""


def all_modules(rank: int, top: float) -> tuple[int, ...]:
    """Return no ranks by module: all modules have the plan's."""
    return ()


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
    trainings: Sequence[Training]
    """With `steps` set."""
    costs: Sequence[Cost]
    memory_gb: float | None
    """None where it is not known."""
    ran_out_gb: float | None
    """The least at which it ran out of memory; None where it never has."""
    feasible: tuple[bool, ...]

    @property
    def any_feasible(self) -> bool:
        return any(self.feasible)

    def in_memory(self) -> Sequence[bool]:
        """Return which arms fit the memory, as it is stated and as it was seen, whatever the round allows."""
        return [
            (self.memory_gb is None or cost.memory_gb <= self.memory_gb)
            and (self.ran_out_gb is None or cost.memory_gb < self.ran_out_gb)
            for cost in self.costs
        ]


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
    floor: Floor
    """Which pruning ratios a round allows to whom."""
    sparing: frozenset[Arm] = frozenset()
    """Arms that save memory more than time: only for clients that hold no other arm with the whole model."""
    module_ranks: Callable[[int, float], tuple[int, ...]] = all_modules
    """(rank, share of the blocks) -> the rank of every target module, as `Plan.ranks`"""

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

    def _options(self, learned: Learned, round: int, client: Client) -> Options:
        whole = self._training(client)
        trainings = [with_share(whole, arm.share) for arm in self.policy.arms]
        costs = [self.costs(client.name, arm, each) for arm, each in zip(self.policy.arms, trainings, strict=True)]
        own = Options(client, trainings, costs, self._memory_gb(client), learned.too_large.get(client.name), ())
        allowed, fits = self._ratio_test(round, own), own.in_memory()
        plain = [arm.ratio == 0 and arm not in self.sparing for arm in self.policy.arms]
        spared = any(fit and whole for fit, whole in zip(fits, plain, strict=True))
        seen, feasible = set[Any](), []
        for place, arm in enumerate(self.policy.arms):
            fit = allowed(arm.ratio) and fits[place] and not (spared and arm in self.sparing)
            # Of arms that ask this client for the same, as shares of one step do, the first is the only one.
            order = self._order(arm, trainings[place])
            feasible.append(fit and order not in seen)
            seen |= {order} if fit else set()
        return replace(own, feasible=tuple(feasible))

    def _order(self, arm: Arm, training: Training) -> tuple[Any, ...]:
        """Return what a client is asked for with an arm, by which two of them may be the same."""
        return arm.ratio, arm.rank, self.module_ranks(arm.rank, arm.top), arm.back, training.steps, arm.down_rank

    def _ratio_test(self, round: int, own: Options) -> Callable[[float], bool]:
        """Return the test whether a round allows a client a ratio."""
        kind = self.speeds.get(own.client.name, Speed()).kind
        return self.floor.ratio_test(round, own.client.name, kind, holds_whole=self._holds_whole(own))

    def _holds_whole(self, own: Options) -> bool:
        """Return whether a client can train the whole base with one of the arms."""
        return any(fits and arm.ratio == 0 for arm, fits in zip(self.policy.arms, own.in_memory(), strict=True))

    def _gain_of(self, own: Options) -> GainOf:
        """Return in which model a client's gain counts."""
        kind = self.speeds.get(own.client.name, Speed()).kind
        return self.floor.gain_of(own.client.name, kind, holds_whole=self._holds_whole(own))

    def _training(self, client: Client) -> Training:
        training = self.training(client.name)
        return replace(training, steps=optimizer_steps(training, client.num_examples), epochs=None)

    def _memory_gb(self, client: Client) -> float | None:
        speed = self.speeds.get(client.name)
        if speed is not None and speed.memory_gb is not None:
            return speed.memory_gb
        return MEMORY_SHARE * client.memory_bytes / 1e9 if client.memory_bytes else None

    def _candidate(self, own: Options, *, weight: float) -> Candidate:
        speed, name = self.speeds.get(own.client.name, Speed()), own.client.name
        return Candidate(
            client=name,
            weight=weight,
            feasible=own.feasible,
            tflop=tuple(cost.tflop for cost in own.costs),
            megabytes=tuple(cost.megabytes for cost in own.costs),
            memory_gb=tuple(cost.memory_gb for cost in own.costs),
            overhead_s=speed.overhead_s,
            s_per_tflop=speed.s_per_tflop,
            s_per_mb=speed.s_per_mb,
            gain_of=self._gain_of(own),
            probe=Probe(own.client.s_per_tflop, own.client.s_per_mb),
        )

    def _plan(self, own: Options, choice: Choice) -> PlannedClient:
        name, index = own.client.name, choice.arms[own.client.name]
        arm = self.policy.arms[index]
        in_memory = [each.ratio for each, fits in zip(self.policy.arms, own.in_memory(), strict=True) if fits]
        plan = Plan(
            client=name,
            rank=arm.rank,
            scale=lora_scale(arm.rank, self.alpha, rslora=self.rslora),
            training=own.trainings[index],
            ratio=arm.ratio,
            ranks=self.module_ranks(arm.rank, arm.top),
            back=arm.back,
        )
        return PlannedClient(
            plan,
            # The least pruned structure that fits: in it a new client's loss before training is measured.
            first_ratio=min(in_memory, default=arm.ratio),
            deadline_s=choice.deadline_s,
            why=choice.why.get(name, ""),
            down_rank=arm.down_rank,
            top=arm.top,
            share=arm.share,
            whole_requested=self._gain_of(own) != "own" and self._holds_whole(own),
        )

    def _unfit(self, learned: Learned, round: int, own: Options) -> Failure:
        """Return the failure of a client without a feasible arm: what the smallest arm needs, and what there is."""
        name, memory, allowed = own.client.name, own.memory_gb, self._ratio_test(round, own)
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
            expected=f"at least {need:.3g} GB of memory, for {arm_text(arm)}",
            hint=f"{got}; lower client.batch or data.max_tokens, or {self._advice(round, own)}",
            kind="unfit",
        )

    def _advice(self, round: int, own: Options) -> str:
        if self.floor.lacks_ranking(round):
            return "name a file in pruning.ranking: without one the first round prunes no client"
        if max(arm.ratio for arm in self.policy.arms) == 0:
            return "write [pruning], by which a part of the base is enough"
        return "allow larger planner.ratios"

    def _cost(self, seen: ClientObservation) -> Cost:
        arm = arm_of(seen)
        return self.costs(
            seen.client, arm, with_share(self._training(Client(seen.client, seen.num_examples)), arm.share)
        )

    def _observation(self, seen: ClientObservation) -> Observed:
        known = [part for part in (seen.compute_s, seen.transfer_s) if part is not None and isfinite(part)]
        late, used = seen.status == "late", seen.status == "ok"
        # The seconds of a client that was given up are a bound and no measurement.
        timed, speed = len(known) == 2 and not late, self.speeds.get(seen.client, Speed())
        return Observed(
            client=seen.client,
            arm=arm_of(seen),
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
            probe=Probe(seen.probed_s_per_tflop, seen.probed_s_per_mb),
            loss_before=seen.loss_before if used else None,
            loss_after=seen.loss_after if used else None,
            importance=seen.importance if used else None,
            whole_loss_before=seen.whole_loss_before if used else None,
            whole_loss_after=seen.whole_loss_after if used else None,
        )


def arm_of(seen: ClientObservation) -> Arm:
    """Return the arm that a client was asked for."""
    return Arm(seen.ratio, seen.rank, seen.top, seen.back, seen.share, seen.down_rank)


def with_share(training: Training, share: float) -> Training:
    """Return the training with a share of its steps, at least one."""
    assert training.steps is not None  # epochs are resolved before
    return training if share == 1 else replace(training, steps=steps_of_share(training.steps, share))


def arm_text(arm: Arm) -> str:
    """Return an arm in words, without what it leaves as the recipe has it.

    >>> arm_text(Arm(0.0, 8, top=0.4, share=0.5))
    'a ratio of 0 and rank 8, the top 0.4 of the blocks, 0.5 of the steps'
    """
    parts = [f"a ratio of {arm.ratio:g} and rank {arm.rank}"]
    parts += [f"the top {arm.top:g} of the blocks"] if arm.top < 1 else []
    parts += [f"{arm.back:g} of the backward pass left out"] if arm.back else []
    parts += [f"{arm.share:g} of the steps"] if arm.share < 1 else []
    parts += [f"at most rank {arm.down_rank} sent"] if arm.down_rank is not None else []
    return ", ".join(parts)
