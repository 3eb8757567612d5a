"""The planner `expgrad`: learns within one run with which settings clients train best, by exponentiated gradients.

FedEx, Khodak et al., NeurIPS 2021, arXiv 2106.04502, algorithm 2. Named `expgrad` since `fedex` is FedEx-LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import exp, isfinite, log, sqrt
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from annotated_types import Ge, Gt, Interval

from fedtune.messages import Client, Failure, PlannedClient, Training
from fedtune.planning import fixed
from fedtune.planning.fixed import Fixed
from fedtune.planning.planner import ClientObservation, PlanChoices, PlannerInputs, PlannerType
from fedtune.seeds import derive, generator
from fedtune.tensors import Array

StepSize: TypeAlias = Literal["adaptive", "aggressive", "auto", "constant"]
Score: TypeAlias = Literal["change", "loss"]

KEYS: Mapping[str, str] = {
    "learning_rates": "learning_rate",
    "steps": "steps",
    "batches": "batch",
    "dropouts": "dropout",
    "weight_decays": "weight_decay",
}
"""The lists of the planner's settings, each with the key of the table `client` that it gives values for."""
MOST_DEVIATIONS = 10.0
"""A client's score counts as at most so many median deviations from its round's median: one that diverges, or makes its
losses up, would otherwise decide the course of all arms alone."""
LEAST_SCORES = 3
"""Of a round; of fewer, none is more usual than the other."""
COUNTED_FAILURES = ("failed", "refused", "late")
"""Outcomes of which an arm gets the worst score so far: training that diverges must not stay as likely as it was."""


@dataclass(frozen=True)
class ExpGradSettings:
    """Settings of the planner `expgrad`: each client draws an arm, one value of each list, and good arms gain weight.

    Clients must hold rows out: an arm is scored by the loss on them.
    """

    name: Literal["expgrad"] = "expgrad"
    """Name of the planner."""
    learning_rates: Sequence[Annotated[float, Gt(0)]] = ()
    """Values of `client.learning_rate` to try; none keeps the recipe's. As in the lists below, all combinations are the
    arms: two to four values of one or two keys differ visibly after some tens of rounds."""
    steps: Sequence[Annotated[int, Ge(1)]] = ()
    """Values of `client.steps` to try."""
    batches: Sequence[Annotated[int, Ge(1)]] = ()
    """Values of `client.batch` to try."""
    dropouts: Sequence[Annotated[float, Interval(ge=0, lt=1)]] = ()
    """Values of `client.dropout` to try."""
    weight_decays: Sequence[Annotated[float, Ge(0)]] = ()
    """Values of `client.weight_decay` to try."""
    score: Score = "change"
    """Of a client's round, lower is better. change: its held-out loss after training minus that before; loss: the one
    after alone, as published, by which a client with hard texts speaks against the arm that it happened to draw."""
    step_size: StepSize = "adaptive"
    """Of the update of the arms' log weights, over sqrt(2 ln c) with c arms. adaptive: divided by the root of the
    summed squares of all gradients' largest entries; aggressive: by the largest entry of this gradient; auto: by the
    root of the number of rounds; constant: by 1."""
    discount: Annotated[float, Interval(ge=0, le=1)] = 0.5
    """How much less each round counts than the next one in the mean of past scores, from which scores are taken; 0
    leaves the last round alone, 1 counts all alike."""
    cutoff: Annotated[float, Ge(0)] = 0.1
    """Entropy of the arms' weights, in nats, below which exploring ends and every client gets the best arm; 0 never."""


@dataclass(frozen=True)
class ExpGradMemory:
    """What is known of the arms; follows from the rounds so far."""

    log_weights: tuple[float, ...]
    """z: theta = exp z sums to 1."""
    norms: float = 0.0
    """adaptive: sum over rounds of the squared largest entry of the gradient; auto: number of rounds."""
    score_sum: float = 0.0
    """Discounted sum of the rounds' mean scores."""
    score_weight: float = 0.0
    """Discounted number of rounds."""
    worst: float | None = None
    """Largest score of a client so far."""

    @property
    def weights(self) -> Array:
        """theta, the probability of each arm."""
        weights: Array = np.exp(np.array(self.log_weights))
        return weights

    @property
    def baseline(self) -> float:
        """b, the discounted mean of past scores; 0 before the first."""
        return self.score_sum / self.score_weight if self.score_weight else 0.0

    @property
    def entropy(self) -> float:
        """Of theta, in nats."""
        return -sum(exp(z) * z for z in self.log_weights)


def arms_of(settings: ExpGradSettings) -> tuple[Mapping[str, Any], ...]:
    """Return the arms: every combination of the listed values, by the key of `client` that each is for.

    >>> arms_of(ExpGradSettings(learning_rates=(0.1, 0.2), steps=(5,)))
    ({'learning_rate': 0.1, 'steps': 5}, {'learning_rate': 0.2, 'steps': 5})
    """
    lists = {key: tuple(getattr(settings, name)) for name, key in KEYS.items() if getattr(settings, name)}
    return tuple(dict(zip(lists, values, strict=True)) for values in product(*lists.values()))


def with_arm(training: Training, arm: Mapping[str, Any]) -> Training:
    """Return how a client trains with an arm's values; steps take the place of epochs."""
    changed = replace(training, **arm)
    return replace(changed, epochs=None) if "steps" in arm else changed


def uniform(arms: int) -> ExpGradMemory:
    return ExpGradMemory((-log(arms),) * arms)


def descend(
    memory: ExpGradMemory, gradient: Sequence[float], mean_score: float, *, step_size: StepSize, discount: float
) -> ExpGradMemory:
    """Return what is known after one step along a gradient of the arms, and the mean score of its round.

    z <- z - eta g; z <- z - logsumexp z. eta_t = sqrt(2 ln c) / d_t, with d_t as `ExpGradSettings.step_size` says.
    """
    g, z = np.array(gradient), np.array(memory.log_weights)
    largest = float(np.abs(g).max())
    norms = memory.norms + {"adaptive": largest**2, "auto": 1.0}.get(step_size, 0.0)
    divisor = {"adaptive": sqrt(norms), "aggressive": largest, "auto": sqrt(norms), "constant": 1.0}[step_size]
    if divisor:  # else the gradient is 0, and nothing moves
        z = z - sqrt(2.0 * log(len(z))) / divisor * g
    peak = z.max()
    z = z - (peak + np.log(np.exp(z - peak).sum()))
    return replace(
        memory,
        log_weights=tuple(map(float, z)),
        norms=norms,
        score_sum=discount * memory.score_sum + mean_score,
        score_weight=discount * memory.score_weight + 1.0,
    )


@dataclass(frozen=True)
class ExpGrad:
    """Draws an arm for every client of a round, and learns from their held-out losses."""

    settings: ExpGradSettings
    arms: tuple[Mapping[str, Any], ...]
    recipe: Fixed
    """Plans what no arm changes."""
    seed: int

    def start(self) -> ExpGradMemory:
        """Return what is known before the first round: every arm is as likely as the others."""
        return uniform(len(self.arms))

    def plan(
        self, learned: ExpGradMemory, round: int, cohort: Sequence[Client]
    ) -> Mapping[str, PlannedClient | Failure]:
        """Return the plan of an arm for every client, drawn among those that fit its device."""
        return {client.name: self.plan_for(learned, round, client) for client in cohort}

    def plan_for(self, learned: ExpGradMemory, round: int, client: Client) -> PlannedClient | Failure:
        plans = [self.plan_of_arm(client, arm, round) for arm in self.arms]
        probability = self.probabilities(learned, [not isinstance(plan, Failure) for plan in plans])
        if probability is None:
            return plans[0]
        rng = generator(derive(self.seed, "expgrad", round, client.name))
        drawn = int(rng.choice(len(plans), p=probability))
        planned = plans[drawn]
        assert isinstance(planned, PlannedClient)  # the others have probability 0
        values = ", ".join(f"{key} {value:g}" for key, value in self.arms[drawn].items())
        why = f"arm {drawn + 1} of {len(plans)}: {values}; weight {learned.weights[drawn]:.3g}"
        batch = planned.plan.training.batch if "batch" in self.arms[drawn] else None
        return replace(planned, arm=drawn, arm_probability=float(probability[drawn]), batch=batch, why=why)

    def plan_of_arm(self, client: Client, arm: Mapping[str, Any], round: int) -> PlannedClient | Failure:
        """Return what the planner `fixed` plans for a client that trains with an arm's values."""
        rank, training = self.recipe.training(client.name)
        changed = with_arm(training, arm)
        planner = replace(self.recipe, training=lambda name: (rank, changed))
        return planner.fitting_plan(client, pruned=planner.ranking or round > 1)

    def probabilities(self, learned: ExpGradMemory, feasible: Sequence[bool]) -> Array | None:
        """Return with which probability a client gets each arm; None if none fits it."""
        if not any(feasible):
            return None
        weights = np.where(feasible, learned.weights, 0.0)
        if learned.entropy < self.settings.cutoff or not weights.sum():
            # Beside the weights of 0 that float64 gives arms long given up: where only such arms fit, one is taken.
            best = int(np.where(feasible, learned.log_weights, -np.inf).argmax())
            weights = np.eye(len(self.arms))[best]
        probabilities: Array = weights / weights.sum()
        return probabilities

    def observe(self, learned: ExpGradMemory, seen: Sequence[ClientObservation]) -> ExpGradMemory:
        """Return what is known after a round: g_j = sum over the clients of arm j of w (s - b) / theta_j.

        w are the clients' shares of the examples, of which each holds out the same share. Once exploring has ended
        nothing is learned any more.
        """
        if learned.entropy < self.settings.cutoff:
            return learned
        scores = clip_scores({client.client: self.score(client) for client in seen if client.arm is not None})
        measured = [score for score in scores.values() if score is not None]
        worst = max([*measured, *([] if learned.worst is None else [learned.worst])], default=None)
        if worst is None:
            return learned
        counted = [
            (client, worst if (score := scores[client.client]) is None else score)
            for client in sorted(seen, key=lambda client: client.client)
            if client.arm is not None
            and (scores[client.client] is not None or client.status in COUNTED_FAILURES)
            and client.num_examples > 0
        ]
        total = sum(client.num_examples for client, _ in counted)
        if not total:
            return replace(learned, worst=worst)
        gradient, mean = [0.0] * len(self.arms), 0.0
        for client, score in counted:
            assert client.arm is not None
            weight = client.num_examples / total
            # Not theta's: where some arms do not fit a device, it draws the others more often.
            gradient[client.arm] += weight * (score - learned.baseline) / client.arm_probability
            mean += weight * score
        step_size, discount = self.settings.step_size, self.settings.discount
        return replace(descend(learned, gradient, mean, step_size=step_size, discount=discount), worst=worst)

    def score(self, client: ClientObservation) -> float | None:
        """Return the score of a client's round; None where it has measured none."""
        before, after = client.loss_before, client.loss_after
        if client.status != "ok" or after is None or not isfinite(after):
            return None
        if self.settings.score == "loss":
            return after
        return None if before is None or not isfinite(before) else after - before


def clip_scores(scores: Mapping[str, float | None]) -> Mapping[str, float | None]:
    """Return a round's scores, those far from their median brought to `MOST_DEVIATIONS` of it.

    >>> clip_scores({"a": 1.0, "b": 2.0, "c": 3.0, "d": 1e12, "e": None})
    {'a': 1.0, 'b': 2.0, 'c': 3.0, 'd': 12.5, 'e': None}
    """
    measured = np.array([score for score in scores.values() if score is not None])
    if len(measured) < LEAST_SCORES:
        return scores
    middle = float(np.median(measured))
    room = MOST_DEVIATIONS * float(np.median(np.abs(measured - middle)))
    if not room:  # most are equal: what differs is not measured by them
        return scores
    return {
        name: None if score is None else min(max(score, middle - room), middle + room) for name, score in scores.items()
    }


def create(settings: ExpGradSettings, inputs: PlannerInputs) -> ExpGrad:
    """Return the planner of a recipe."""
    plain = fixed.create(fixed.FixedSettings(), inputs)
    return ExpGrad(settings, arms=arms_of(settings), recipe=plain, seed=inputs.seed)


def choices(settings: ExpGradSettings, rank: int, ratio: float) -> PlanChoices:
    """Return what is chosen: one of the arms, and all else as the recipe and its overrides say."""
    return PlanChoices(ranks=(rank,), ratios=(ratio,), trainings=arms_of(settings))


PLANNER = PlannerType("expgrad", ExpGradSettings, create, choices=choices)
