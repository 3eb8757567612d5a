"""Quality under Budget, Cost to Target, Robustness: how studies on phones compare methods, from the records of runs.

The names are those of EdgeFlowerTune, Geng et al. 2026, arXiv 2605.08636. docs/how-to/compare.md says in one sentence
what each number is here.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from fedtune.errors import ConfigError, Fault
from fedtune.report.curves import Floats, client_names, last
from fedtune.report.differences import Group
from fedtune.report.reader import Run, finite
from fedtune.report.robustness import Robustness, robustness_of
from fedtune.report.spread import Spread, mean_and_spread
from fedtune.report.time_to_target import Ratio, paired_ratio, time_to

Resource: TypeAlias = Literal["bytes", "seconds", "joules"]
RESOURCES: Sequence[Resource] = ("bytes", "seconds", "joules")

LOWER_IS_BETTER: Mapping[str, bool] = {
    "loss": True,
    "perplexity": True,
    "bits_per_character": True,
    "accuracy": False,
    "macro_f1": False,
    "rouge_l": False,
    "exact_match": False,
    "reward_accuracy": False,
    "reward_margin": False,
    "preferred": False,
}
"""Measures of quality."""
UNITS: Mapping[str, tuple[Resource, float]] = {
    **{unit: ("bytes", size) for unit, size in {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9}.items()},
    **{unit: ("seconds", size) for unit, size in {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}.items()},
    **{unit: ("joules", size) for unit, size in {"J": 1.0, "kJ": 1e3, "MJ": 1e6, "Wh": 3600.0}.items()},
}
"""Of a budget: what it is of, and how many bytes, seconds or joules it has."""


Scores: TypeAlias = Sequence[Mapping[int, Floats]]
"""By recipe and seed: the measure after each round, where less is better."""
Spent: TypeAlias = Sequence[Mapping[int, Mapping[Resource, Floats]]]


@dataclass(frozen=True)
class ProtocolSettings:
    """What a reader wants to know; the defaults need no choice."""

    budgets: Mapping[Resource, float] = field(default_factory=dict)
    """Bytes, seconds or joules per client; what is not named: the least that any of the runs has spent."""
    target: float | None = None
    """Of the measure; None: by seed the value at which the weakest recipe ends."""
    measure: str = "loss"
    """Of quality: one of `LOWER_IS_BETTER`."""


@dataclass(frozen=True)
class UnderBudget:
    """Quality under Budget: the best value that each recipe was evaluated at before it had spent more."""

    resource: Resource
    budget: float
    """Per client."""
    quality: tuple[Spread, ...]
    """By recipe."""


@dataclass(frozen=True)
class ToTarget:
    """Cost to Target: what each recipe spent per client until it was first evaluated at the target or better."""

    resource: Resource
    costs: tuple[Mapping[int, float | None], ...]
    """By recipe and seed; None: never reached."""
    mean: tuple[Spread, ...]
    """By recipe; NaN unless every seed reached it."""
    ratio: tuple[Ratio, ...]
    """By recipe: of its costs to the first recipe's, paired by seed."""


@dataclass(frozen=True)
class Protocols:
    """The three protocols over the compared recipes; empty where the records do not hold what they need."""

    measure: str
    scored_on: str
    """test data | clients' held-out rows; empty where the runs share no evaluation."""
    clock: str
    """devices | this machine: whose seconds are counted."""
    targets: Mapping[int, float]
    """By seed."""
    under_budget: tuple[UnderBudget, ...] = ()
    to_target: tuple[ToTarget, ...] = ()
    robustness: tuple[Robustness, ...] = ()
    notes: tuple[str, ...] = ()
    """What was asked for and cannot be said, with the reason, and what does not go together."""


def protocol_settings(
    budgets: Sequence[str] = (), target: float | None = None, measure: str = "loss"
) -> ProtocolSettings:
    """Return the settings of texts such as `10MB`, `600s` and `5kJ`.

    Raises:
        ConfigError: with everything that is wrong.

    >>> protocol_settings(["10MB", "2h"]).budgets
    {'bytes': 10000000.0, 'seconds': 7200.0}
    """
    faults, known = [], dict[Resource, float]()
    for text in budgets:
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([A-Za-z]+)\s*", text)
        unit, value = (UNITS.get(match[2]), float(match[1])) if match else (None, 0.0)
        if unit is None or not 0 < value * unit[1] < math.inf:
            expected = "a number above 0 with a unit, such as 10MB, 600s or 5kJ"
            faults.append(Fault("--budget", expected, repr(text), f"per client, in one of {', '.join(UNITS)}"))
        elif unit[0] in known:
            faults.append(Fault("--budget", f"one budget in {unit[0]}", f"a second one, {text!r}", "leave one out"))
        else:
            known[unit[0]] = value * unit[1]
    if target is not None and not math.isfinite(target):
        faults.append(Fault("--target", "a finite number", repr(target)))
    if measure not in LOWER_IS_BETTER:
        faults.append(Fault("--measure", f"one of {', '.join(LOWER_IS_BETTER)}", repr(measure)))
    if faults:
        raise ConfigError(faults)
    return ProtocolSettings(known, target, measure)


def protocols(groups: Sequence[Group], settings: ProtocolSettings | None = None) -> Protocols:
    """Return the three protocols over the runs of each recipe."""
    asked = settings or ProtocolSettings()
    runs = [run for group in groups for run in group]
    scored_on, quality = shared_quality(runs, asked.measure)
    clock = "devices" if all(run.rounds[-1].clock_s for run in runs) else "this machine"
    spent = [{run.seed: costs(run, clock) for run in group} for group in groups]
    known = [kind for kind in RESOURCES if all(kind in of for by_seed in spent for of in by_seed.values())]
    notes = [f"a budget in {kind}: not every run has recorded {kind}" for kind in asked.budgets if kind not in known]
    notes += [
        f"{name}: bytes are those of the model that was trained, seconds and joules those of its fleet.proxy"
        for name in names_with_proxy(groups)
    ]
    notes += [
        f"{run.name}, seed {run.seed}, has no summary: per client means of the {len(client_names(run))} clients that "
        "its rounds name"
        for run in runs
        if run.summary is None
    ]
    robustness = tuple(robustness_of(groups, index) for index in range(len(groups)))
    if quality is None:
        notes.append(f"{asked.measure}: the runs share no evaluation of it")
        return Protocols(asked.measure, "", clock, {}, robustness=robustness, notes=tuple(notes))
    sign = 1.0 if LOWER_IS_BETTER[asked.measure] else -1.0
    # Below, less is better: the signs of other measures are turned, and turned back in what is returned.
    scores = [{run.seed: sign * quality(run) for run in group} for group in groups]
    target = None if asked.target is None else sign * asked.target
    targets = targets_of(scores, target)
    notes += [*notes_on_targets(scores, targets), *notes_on_evaluations(groups, quality)]
    return Protocols(
        measure=asked.measure,
        scored_on=scored_on,
        clock=clock,
        targets={seed: sign * value for seed, value in targets.items()},
        under_budget=tuple(under_budget(kind, scores, spent, asked.budgets.get(kind), sign) for kind in known),
        to_target=tuple(to_target(kind, scores, spent, targets) for kind in known) if targets else (),
        robustness=robustness,
        notes=tuple(notes),
    )


def names_with_proxy(groups: Sequence[Group]) -> Sequence[str]:
    """Return the names of the recipes whose clock counts the operations of a larger model."""
    fleets = {group[0].name: tomllib.loads(group[0].recipe).get("fleet", {}) for group in groups}
    return [name for name, fleet in fleets.items() if isinstance(fleet, dict) and fleet.get("proxy", "none") != "none"]


def notes_on_targets(scores: Scores, targets: Mapping[int, float]) -> Sequence[str]:
    """Return a sentence where some of the seeds have no target."""
    shared = sorted(set.intersection(*(set(by_seed) for by_seed in scores)))
    if not shared:
        return ["no cost to a target: the recipes share no seed"]
    absent = ", ".join(str(seed) for seed in shared if seed not in targets)
    reason = "a recipe ends there no better than it starts; --target sets one"
    return [f"no target for seed {absent}: {reason}"] if absent else []


def notes_on_evaluations(groups: Sequence[Group], quality: Callable[[Run], Floats]) -> Sequence[str]:
    """Return a sentence for each recipe that was evaluated after other rounds than the first one."""
    first = groups[0][0]
    reason = (
        "the best of more values is better by chance, and a target is noticed earlier; keep evaluate.every the same"
    )
    notes = []
    for group in groups[1:]:
        runs = first, group[0]
        end = min(run.rounds[-1].round for run in runs)  # the last round is evaluated wherever it is
        if len({scored_rounds(run, quality, end) for run in runs}) > 1:
            notes.append(f"{group[0].name} was evaluated after other rounds than {first.name}: {reason}")
    return notes


def scored_rounds(run: Run, quality: Callable[[Run], Floats], end: int) -> frozenset[int]:
    """Return the rounds before `end` after which a run was evaluated."""
    scores = zip(run.rounds, quality(run), strict=True)
    return frozenset(record.round for record, score in scores if record.round < end and not math.isnan(score))


def costs(run: Run, clock: str) -> Mapping[Resource, Floats]:
    """Return what a run has spent per client until the end of each round: (rounds,) by what is known of it.

    Bytes and joules are those of all clients, divided by the number of clients of the federation. A round's joules are
    known where every client whose update was used has some.
    """
    clients = max(1, len(client_names(run)))
    spent: dict[Resource, Floats] = {
        "bytes": np.cumsum([float(record.bytes_up + record.bytes_down) for record in run.rounds]) / clients,
        "seconds": np.array([record.clock_s for record in run.rounds])
        if clock == "devices"
        else np.cumsum([record.seconds for record in run.rounds]),
    }
    replies = [(client.status, client.joules) for record in run.rounds for client in record.clients.values()]
    if any(status == "ok" for status, _ in replies) and all(
        joules is not None for status, joules in replies if status == "ok"
    ):
        by_round = [sum(client.joules or 0.0 for client in record.clients.values()) for record in run.rounds]
        spent["joules"] = np.cumsum(by_round) / clients
    return spent


def shared_quality(runs: Sequence[Run], measure: str) -> tuple[str, Callable[[Run], Floats] | None]:
    """Return on what all runs were scored, and the function from a run to its values by round; NaN: not evaluated."""

    def on_test(run: Run) -> Floats:
        return np.array([finite(record.test.get(measure)) if record.test else math.nan for record in run.rounds])

    def on_clients(run: Run) -> Floats:
        rounds = [[finite(metrics.get(measure)) for metrics in record.held_out.values()] for record in run.rounds]
        known = [[value for value in values if not math.isnan(value)] for values in rounds]
        return np.array([float(np.mean(values)) if values else math.nan for values in known])

    for scored_on, read in (("test data", on_test), ("clients' held-out rows", on_clients)):
        if all(not np.isnan(read(run)).all() for run in runs):
            return scored_on, read
    return "", None


def under_budget(resource: Resource, scores: Scores, spent: Spent, budget: float | None, sign: float) -> UnderBudget:
    if budget is None:
        budget = min(float(of[resource][-1]) for by_seed in spent for of in by_seed.values())
    quality = [
        mean_and_spread(
            [sign * best_within(spent[place][seed][resource], values, budget) for seed, values in own.items()]
        )
        for place, own in enumerate(scores)
    ]
    return UnderBudget(resource, budget, tuple(quality))


def best_within(cost: Floats, scores: Floats, budget: float) -> float:
    """Return the lowest score of the rounds at whose end no more than the budget was spent; NaN for none.

    The base, before the first round, costs nothing.

    >>> best_within(np.array([0.0, 5.0, 9.0]), np.array([3.0, 2.0, 1.0]), 8.0)
    2.0
    """
    within = scores[(cost <= budget) & ~np.isnan(scores)]
    return float(within.min()) if within.size else math.nan


def targets_of(scores: Scores, target: float | None) -> Mapping[int, float]:
    """Return the target by seed that all recipes share; without one of the reader's, where the weakest recipe ends.

    A seed in which a recipe ends above its start has no target: it is there before it begins.
    """
    shared = sorted(set.intersection(*(set(by_seed) for by_seed in scores)))
    if target is not None:
        return dict.fromkeys(shared, target)
    ends = {seed: [last(by_seed[seed]) for by_seed in scores] for seed in shared}
    return {
        seed: max(values)
        for seed, values in ends.items()
        if not any(map(math.isnan, values)) and not any(by_seed[seed][0] <= max(values) for by_seed in scores)
    }


def to_target(resource: Resource, scores: Scores, spent: Spent, targets: Mapping[int, float]) -> ToTarget:
    costs = [
        {seed: time_to(of[seed][resource], own[seed], target) for seed, target in targets.items()}
        for own, of in zip(scores, spent, strict=True)
    ]
    reached = [all(map(math.isfinite, by_seed.values())) for by_seed in costs]
    return ToTarget(
        resource=resource,
        costs=tuple({seed: cost if math.isfinite(cost) else None for seed, cost in own.items()} for own in costs),
        mean=tuple(
            mean_and_spread(list(own.values())) if whole else Spread(math.nan, None)
            for own, whole in zip(costs, reached, strict=True)
        ),
        ratio=tuple(paired_ratio(list(own.values()), list(costs[0].values())) for own in costs),
    )
