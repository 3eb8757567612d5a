"""Which trial of a search runs next, and for how many rounds: a function of the results so far, for each kind.

Successive halving: Jamieson and Talwalkar, arXiv 1502.07943. Asynchronous: Li et al., arXiv 1810.05934. Population
based training: Jaderberg et al., arXiv 1711.09846. A trial that goes on does so from its own journal, so its rounds are
those of a run that was never paused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fedtune.rounds.scores import LOWER_IS_BETTER
from fedtune.search.settings import USUAL_TRIALS, SearchKind, SearchSettings, Value, rungs
from fedtune.search.space import draw_values, grid, perturb, size
from fedtune.search.tpe import draw_by_tpe
from fedtune.seeds import derive, generator


@dataclass(frozen=True)
class Step:
    """Some rounds of one trial."""

    trial: int
    """Its number, from 0."""
    until: int
    """The round after which it pauses or ends."""
    values: Mapping[str, Value]
    """Of the settings of the space."""
    since: int = 0
    """The round after which it begins."""
    segment: int = 0
    """How often its state was replaced by another trial's."""
    source: int | None = None
    """The trial whose state after `since` replaces its own; None: its own."""
    source_segment: int = 0


@dataclass(frozen=True)
class Cost:
    """What some rounds took."""

    client_rounds: int = 0
    """Clients that were asked, summed over rounds."""
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0
    """On this machine; the only number here that another run of the same search does not give again."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.client_rounds + other.client_rounds,
            self.bytes_down + other.bytes_down,
            self.bytes_up + other.bytes_up,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True)
class Result:
    """How one step ended."""

    step: Step
    score: float | None
    """After its last round, on the clients' held-out rows; None if it failed."""
    reason: str = ""
    """Why it failed."""
    cost: Cost = Cost()
    """Of its own rounds."""
    scores: Mapping[int, float] = field(default_factory=dict)
    """By round, those on the way, and of round 0."""
    state: str = ""
    """Digest of the server's state after its last round."""


@dataclass(frozen=True)
class Search:
    """What decides the course of a search."""

    settings: SearchSettings
    rounds: int
    """Of a trial that is not stopped early."""
    seed: int

    @property
    def trials(self) -> int:
        """How many trials are begun."""
        settings = self.settings
        if settings.trials is not None:
            return settings.trials
        most = len(grid(settings.space)) if settings.kind == "grid" else size(settings.space)
        return most if most is not None and (settings.kind == "grid" or most < USUAL_TRIALS) else USUAL_TRIALS

    @property
    def rungs(self) -> tuple[int, ...]:
        return rungs(self.settings, self.rounds)

    def order(self, results: Sequence[Result]) -> Sequence[Result]:
        """Return those of the results that have a score, the best first; of equal ones the lower trial first."""
        sign = 1.0 if self.settings.metric in LOWER_IS_BETTER else -1.0
        scored = [(sign * result.score, result.step.trial, result) for result in results if result.score is not None]
        return [result for *_, result in sorted(scored, key=lambda entry: entry[:2])]


def next_step(search: Search, results: Sequence[Result]) -> Step | None:
    """Return what is to be run after these results; None when the search is done."""
    return KINDS[search.settings.kind](search, results)


def first_values(search: Search, trial: int) -> Mapping[str, Value]:
    """Return the values with which a trial begins, where they do not depend on scores."""
    if search.settings.kind == "grid":
        return grid(search.settings.space)[trial]
    before: list[Mapping[str, Value]] = []
    for number in range(trial + 1):
        before.append(draw_values(search.settings, search.seed, number, before))
    return before[-1]


def independent(search: Search, results: Sequence[Result]) -> Step | None:
    """Random and grid: one trial after the other, each over all rounds."""
    trial = len(results)
    return Step(trial, search.rounds, first_values(search, trial)) if trial < search.trials else None


def tpe(search: Search, results: Sequence[Result]) -> Step | None:
    """As the above, with the scores of earlier trials in mind."""
    trial = len(results)
    if trial >= search.trials:
        return None
    earlier = [(result.step.values, result.score) for result in results]
    lower = search.settings.metric in LOWER_IS_BETTER
    values = draw_by_tpe(search.settings.space, search.seed, trial, earlier, lower_is_better=lower)
    return Step(trial, search.rounds, values)


def by_rung(results: Sequence[Result]) -> Mapping[int, Sequence[Result]]:
    """Return the results by the round at which they ended, in the order in which they came."""
    reached: dict[int, list[Result]] = {}
    for result in results:
        reached.setdefault(result.step.until, []).append(result)
    return reached


def next_rung(search: Search, result: Result, until: int) -> Step:
    """Return the step that takes a trial on from where a result left it."""
    step = result.step
    return Step(step.trial, until, step.values, since=step.until, segment=step.segment)


def halving(search: Search, results: Sequence[Result]) -> Step | None:
    """sha: all trials reach a rung; then the best ceil(n / reduction) of its n trials go on to the next one."""
    reached, survivors = by_rung(results), list[Result]()
    for place, rung in enumerate(search.rungs):
        done = reached.get(rung, [])
        if place == 0 and len(done) < search.trials:
            return Step(len(done), rung, first_values(search, len(done)))
        if place and len(done) < len(survivors):
            return next_rung(search, survivors[len(done)], rung)
        best = search.order(done)[: math.ceil(len(done) / search.settings.reduction)]
        survivors = sorted(best, key=lambda result: result.step.trial)
    return None


def asynchronous_halving(search: Search, results: Sequence[Result]) -> Step | None:
    """asha: from the highest rung down, a trial goes on that is in the top 1 / reduction of all that reached its rung.

    Where no trial is, the next one begins.
    """
    reached = by_rung(results)
    for rung, following in zip(search.rungs[-2::-1], search.rungs[:0:-1], strict=True):
        done, promoted = reached.get(rung, []), {result.step.trial for result in reached.get(following, [])}
        for result in search.order(done)[: len(done) // search.settings.reduction]:
            if result.step.trial not in promoted:
                return next_rung(search, result, following)
    begun = len(reached.get(search.rungs[0], []))
    return Step(begun, search.rungs[0], first_values(search, begun)) if begun < search.trials else None


def population(search: Search, results: Sequence[Result]) -> Step | None:
    """pbt: all trials reach a rung; then the worst quarter, and all that failed, copy one of the best quarter.

    Those that copy come first: the trials whose states they take have not gone on yet.
    """
    reached, before = by_rung(results), list[Result]()
    for place, rung in enumerate(search.rungs):
        done = reached.get(rung, [])
        if place == 0:
            if len(done) < search.trials:
                return Step(len(done), rung, first_values(search, len(done)))
        else:
            steps = next_generation(search, before, rung)
            if len(done) < len(steps):
                return steps[len(done)]
        before = sorted(done, key=lambda result: result.step.trial)
    return None


def next_generation(search: Search, before: Sequence[Result], until: int) -> Sequence[Step]:
    """Return what the trials of a population do from one rung to the next."""
    ranked = search.order(before)
    if not ranked:
        return []
    quarter = max(1, len(before) // 4)
    best = ranked[:quarter]
    scored = {result.step.trial for result in ranked}
    # Of a population that is almost all failed, the best ones stay what they are.
    worst = (
        {result.step.trial for result in ranked[max(len(best), len(ranked) - quarter) :]} if len(ranked) > 1 else set()
    )
    copying, going_on = [], []
    for result in before:
        step = result.step
        if step.trial in scored - worst:
            going_on.append(next_rung(search, result, until))
            continue
        rng = generator(derive(search.seed, "search.pbt", until, str(step.trial)))
        better = best[int(rng.integers(len(best)))].step
        values = perturb(better.values, search.settings.space, search.seed, step.trial, until)
        copying.append(
            Step(
                step.trial,
                until,
                values,
                since=better.until,
                segment=step.segment + 1,
                source=better.trial,
                source_segment=better.segment,
            )
        )
    return [*copying, *going_on]


KINDS: Mapping[SearchKind, Callable[[Search, Sequence[Result]], Step | None]] = {
    "random": independent,
    "grid": independent,
    "tpe": tpe,
    "sha": halving,
    "asha": asynchronous_halving,
    "pbt": population,
}


def best_result(search: Search, results: Sequence[Result]) -> Result | None:
    """Return the best of those that ran the most rounds; None where every trial failed.

    Scores after different numbers of rounds are of different models of a trial: a trial that was stopped early is
    never preferred to one that went on.
    """
    scored = [result for result in results if result.score is not None]
    most = max((result.step.until for result in scored), default=0)
    return next(iter(search.order([result for result in scored if result.step.until == most])), None)
