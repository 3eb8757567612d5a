"""How many rounds a run has, at which rate each trains, which clients take part, and how many updates end one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil, cos, inf, pi
from typing import Annotated, Literal, TypeAlias

from annotated_types import Ge, Gt, Interval

from fedtune.messages import OMIT_DEFAULT, Assignment, Client, DescendSeeds, ProbeSeeds, Training
from fedtune.rounds.transport import Rule
from fedtune.seeds import derive, generator

Metric: TypeAlias = Literal[
    "loss",
    "perplexity",
    "bits_per_character",
    "accuracy",
    "macro_f1",
    "rouge_l",
    "exact_match",
    "reward_accuracy",
    "reward_margin",
    "preferred",
]
"""A score by which rounds are compared; of the first three lower ones are better."""


@dataclass(frozen=True)
class Schedule:
    """How many rounds there are, who takes part in each, and when it ends; the recipe's table `rounds`."""

    count: Annotated[int, Ge(1)] = 3
    """Rounds of the run."""
    cohort: Annotated[int, Ge(1)] | Annotated[float, Gt(0)] | None = None
    """Clients drawn for each round: their number, or their share of all clients (a number with a decimal point, at most
    1.0); none takes all."""
    min_clients: Annotated[int, Ge(1)] = 1
    """Usable updates that a round needs; with fewer the run stops and can be resumed."""
    max_norm: Annotated[float, Gt(0)] | None = 10.0
    """Of three or more updates, one whose change is more than this many times as large as the cohort's median is
    refused; none compares no sizes. The change of the layers, that of the factors and that of modules_to_save are
    compared each for itself. A client that trains many times as many steps as most, as with `client.epochs` and far
    more examples, moves further than they do: then set it higher, or give `client.steps`."""
    norm_cap: Literal["plan"] | Annotated[float, Gt(0)] | None = field(default="plan", metadata=OMIT_DEFAULT)
    """Largest change of one update, whatever the others are, so also in cohorts of one and two. plan: what the planned
    steps of the optimiser can reach, which honest training never leaves, or 1e6 where that has no limit, as with sgd
    without `client.clip_norm`; a number: the norm of each of the three changes that `max_norm` names; none: all that
    is finite."""
    weight_cap: Annotated[float, Ge(1)] | None = field(default=10.0, metadata=OMIT_DEFAULT)
    """Largest weight of an organisation in a round, in medians of the cohort's organisations (of two the smaller one);
    its clients share it in proportion. Clients that no roster assigns to an organisation are each one of their own.
    none: clients count as they say."""
    deadline_s: Annotated[float, Gt(0)] | None = None
    """Over a network, a round ends after this time if `min_clients` have answered; none: after 24 hours."""
    grace_s: Annotated[float, Ge(0)] = 60.0
    """Over a network, how much longer than `deadline_s` a round waits for `min_clients`."""
    over_select: Annotated[float, Ge(1)] = 1.0
    """Ask this many times as many clients as `cohort` says; the round ends when `cohort` updates are there, and later
    ones are not used."""
    attempts: Annotated[int, Ge(1)] = 1
    """Over a network, how often a round waits for `deadline_s` before too few updates stop the run."""
    keep: Literal["last", "best"] = field(default="last", metadata=OMIT_DEFAULT)
    """The round whose model is the result: the last one, or the one with the best score among those that were
    evaluated (`evaluate.every`)."""
    metric: Metric = field(default="loss", metadata=OMIT_DEFAULT)
    """Score that says which round is best, on the test data, or without such over the clients' held-out rows (of three
    or more clients the median, so that none of them decides alone): for causal models loss, perplexity,
    bits_per_character, and with `evaluate.generate` rouge_l and exact_match; for classification loss, accuracy and
    macro_f1; with the objective dpo loss, reward_accuracy, reward_margin and preferred."""
    patience: Annotated[int, Ge(1)] | None = field(default=None, metadata=OMIT_DEFAULT)
    """The run ends after so many evaluations in a row without a better score; none runs all rounds."""
    schedule: Literal["constant", "linear", "cosine"] = field(default="constant", metadata=OMIT_DEFAULT)
    """How `client.learning_rate` falls from round to round, after `warmup`: not at all, or in a line or a half cosine
    to `final_rate` of it in the last round. Within a round, `client.schedule` goes on from there."""
    warmup: Annotated[int, Ge(0)] = field(default=0, metadata=OMIT_DEFAULT)
    """First rounds over which the learning rate rises in a line: of 4, they train at 1/5, 2/5, 3/5 and 4/5 of
    `client.learning_rate`; fewer than `count`."""
    final_rate: Annotated[float, Interval(gt=0, le=1)] = field(default=0.1, metadata=OMIT_DEFAULT)
    """Learning rate of the last round with the schedule linear or cosine, as a share of `client.learning_rate`. Above
    0, since a round costs its clients the same time and bytes at any rate."""

    @property
    def rule(self) -> Rule:
        return Rule(quorum=self.min_clients, deadline_s=self.deadline_s, grace_s=self.grace_s)


def rate_share(schedule: Schedule, number: int) -> float:
    """Return the learning rate of a round, by its number from 1, as a share of `client.learning_rate`.

    >>> [rate_share(Schedule(5, schedule="linear", warmup=1, final_rate=0.4), number) for number in range(1, 6)]
    [0.5, 1.0, 0.8, 0.6, 0.4]
    """
    if number <= schedule.warmup:
        return number / (schedule.warmup + 1)
    # Past the last round, as where a run is scored that went on further than its recipe says, the rate stays.
    progress = min(1.0, (number - schedule.warmup - 1) / max(1, schedule.count - schedule.warmup - 1))
    shape = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + cos(pi * progress))}[schedule.schedule]
    # Rounded: the last bit of a cosine differs between machines, and sites hold the rate of an order against their own.
    return 1.0 if shape == 1.0 else round(schedule.final_rate + (1.0 - schedule.final_rate) * shape, 9)


def rate_text(learning_rate: Literal["auto"] | float, schedule: Schedule) -> str:
    """Return a client's learning rate in words, with how it changes from round to round.

    >>> rate_text("auto", Schedule(9))
    'that the first round measures'

    >>> rate_text(0.01, Schedule(9, schedule="cosine", warmup=2))
    '0.01 from round 3 on, falling to 0.001 in round 9 (cosine)'
    """
    text = "that the first round measures" if learning_rate == "auto" else f"{learning_rate:g}"
    share = rate_share(schedule, schedule.count)
    last = f"{share:.3g} of it" if learning_rate == "auto" else f"{learning_rate * share:.3g}"
    start = f" from round {schedule.warmup + 1} on" if schedule.warmup else ""
    fall = f", falling to {last} in round {schedule.count} ({schedule.schedule})" if share < 1.0 else ""
    return f"{text}{start}{fall}"


def with_scheduled_rate(assignment: Assignment, schedule: Schedule) -> Assignment:
    """Return an assignment at the learning rate of its round."""
    training = scheduled_training(assignment.plan.training, schedule, assignment)
    task = assignment.task
    if isinstance(task, DescendSeeds) and task.fallback is not None:
        task = replace(task, fallback=scheduled_training(task.fallback, schedule, assignment))
    return replace(assignment, plan=replace(assignment.plan, training=training), task=task)


def scheduled_training(training: Training, schedule: Schedule, order: Assignment) -> Training:
    """Return a client's training at the learning rate of an order's round; at its own if the order moves nothing."""
    # Measured at the full rate, or the scalars of the rounds after a warm-up would leave the unit that it gives.
    measures = isinstance(order.task, ProbeSeeds) and order.task.calibrate
    share = 1.0 if measures or training.learning_rate == "auto" else rate_share(schedule, order.round)
    return training if share == 1.0 else replace(training, learning_rate=training.rate * share)


def cohort_size(fleet: int, cohort: int | float | None) -> int:
    """Return how many clients of a fleet a round takes: all, a number of them, or a share rounded up."""
    if cohort is None:
        return fleet
    # 0.07 * 100 is a little more than 7 in binary: without the small number the share would be rounded up to 8.
    return min(fleet, cohort if isinstance(cohort, int) else ceil(cohort * fleet - 1e-9))


def enough(asked: int, schedule: Schedule) -> float:
    """Return with how many updates a round ends at once in which so many clients are asked; infinite: when all answer.

    >>> enough(13, Schedule(5, cohort=10, over_select=1.3)), enough(13, Schedule(5, cohort=0.5, over_select=1.3))
    (10, 10)
    """
    # Without clients to spare, an early end would leave out the slow ones in every round.
    if schedule.over_select == 1 or schedule.cohort is None:
        return inf
    if isinstance(schedule.cohort, int):
        return min(schedule.cohort, asked)
    return max(1, int(asked / schedule.over_select + 1e-9))


def sample(
    fleet: Sequence[Client],
    cohort: int | float | None,
    *,
    seed: int,
    round: int,
    over_select: float = 1.0,
    draw: int = 0,
) -> Sequence[Client]:
    """Return the round's clients, sorted by name: all, a number of them, or a share of the fleet rounded up.

    With `over_select` above 1 so many times more are asked, as far as there are any. Draws of one round differ in
    their number.
    """
    size = min(len(fleet), ceil(over_select * cohort_size(len(fleet), cohort) - 1e-9))
    if size == len(fleet):
        return fleet
    # Positions, not names or ids, are drawn: numpy would turn 64-bit ids into rounded floats.
    purpose = f"cohort {draw}" if draw else "cohort"
    drawn = generator(derive(seed, purpose, round)).choice(len(fleet), size=size, replace=False)
    return [fleet[position] for position in sorted(drawn.tolist())]
