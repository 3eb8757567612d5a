"""The planner `deadline`: learns every client's speed, and chooses arms for the whole cohort by its common end (ours).

A round lasts as long as its slowest client. So for every possible end of the round each client takes its best arm that
is done by then, and the end with the largest quality per second wins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedtune.planning.policy import Arm, Candidate, Choice, GainOf, Observed
from fedtune.planning.quality import (
    TAUGHT,
    LogLikelihood,
    Taught,
    gains,
    hypotheses,
    quality,
    shares,
    updated_likelihood,
)
from fedtune.planning.rates import NO_RATES, Rates, expected_rates, update_rates
from fedtune.seeds import derive, generator
from fedtune.tensors import Array

MOST_DEADLINES = 60
"""Ends of a round that are tried: more cost time and gain nothing."""
LATE_SHARE = 1.25
"""The deadline that is sent, over the time at which the round is expected to end: room for an error of the model."""


@dataclass(frozen=True)
class DeadlineMemory:
    """What the planner has learned."""

    clients: Mapping[str, Rates] = field(default_factory=dict)
    likely: Mapping[Taught, LogLikelihood] = field(default_factory=dict)
    """Of the hypotheses on quality, over all clients, by the model that they are about."""
    rounds: int = 0
    """That were observed."""


@dataclass(frozen=True)
class Deadline:
    """Chooses the arms with the largest summed quality per second, for a round as long as its slowest client.

    With `draws` it is a contextual bandit that samples (Thompson): times follow from the cost model, and the quality is
    that of one hypothesis a round, drawn as likely as it is by then. Arms of which little is known are tried as long as
    they may be the best ones; without it, the mean over the hypotheses decides.
    """

    arms: tuple[Arm, ...]
    draws: bool = False
    explore: int = 0
    """Clients per round that try another arm which ends in time."""
    deadline_s: float | None = None
    server_s: float = 0.0
    """Seconds of a round in which the server works."""
    true_seconds: Callable[[int, Candidate, Sequence[Arm]], Sequence[float]] | None = None
    """(round, client, arms) -> the true seconds of every arm: for comparisons, since no deployment knows them."""

    def start(self) -> DeadlineMemory:
        """Return what is known before the first round: nothing."""
        return DeadlineMemory()

    def choose(self, memory: DeadlineMemory, round: int, candidates: Sequence[Candidate], *, key: int) -> Choice:
        """Return the arms of a round; a client that is late with every arm takes its fastest."""
        if not candidates:
            return Choice({})
        # By name, so that sums and draws do not depend on the order in which clients were listed.
        cohort = sorted(candidates, key=lambda client: client.client)
        seconds, doubts = self._seconds(memory, round, cohort)  # (clients, arms), infinite where not feasible
        worth = self._worth(memory, cohort, round=round, key=key)  # (clients, arms)
        ends = candidate_ends(seconds) if self.deadline_s is None else np.array([self.deadline_s])
        weights = np.array([client.weight for client in cohort])
        chosen, end = best_arms(seconds, worth, weights, ends, self.server_s)
        # Clients that explore end by the deadline, even where the slowest one cannot.
        room = end if self.deadline_s is None else min(end, self.deadline_s)
        chosen = self._with_exploration(chosen, seconds, room, round=round, key=key)
        arms = {client.client: int(arm) for client, arm in zip(cohort, chosen, strict=True)}
        what = "drawn quality" if self.draws else "quality"
        why = {
            client.client: "; ".join(
                [f"{seconds[row, arm]:.3g} s of {end:.3g} s", f"{what} {worth[row, arm]:.2f}", *doubts[row]]
            )
            for row, (client, arm) in enumerate(zip(cohort, chosen.tolist(), strict=True))
        }
        return Choice(arms, deadline_s=float(LATE_SHARE * (self.deadline_s or end)), why=why)

    def learn(self, memory: DeadlineMemory, observed: Sequence[Observed]) -> DeadlineMemory:
        """Return what is known after a round: two rates of each client, and how likely each hypothesis is."""
        clients, now = dict(memory.clients), memory.rounds + 1
        for seen in sorted(observed, key=lambda client: client.client):
            clients[seen.client] = update_rates(clients.get(seen.client, NO_RATES), seen, now)
        of = hypotheses(self.arms)
        likely = {
            taught: updated_likelihood(memory.likely.get(taught, ()), gains(observed, taught), self.arms, of)
            for taught in TAUGHT
        }
        return DeadlineMemory(clients, likely, now)

    def _seconds(
        self, memory: DeadlineMemory, round: int, cohort: Sequence[Candidate]
    ) -> tuple[Array, Sequence[Sequence[str]]]:
        """Return the expected seconds of every client's arms, (clients, arms), and what clients were not believed."""
        feasible = np.array([client.feasible for client in cohort])
        if self.true_seconds is not None:
            seconds = np.array([self.true_seconds(round, client, self.arms) for client in cohort])
            return np.where(feasible, seconds, np.inf), [[] for _ in cohort]
        now = memory.rounds + 1
        compute, doubts = expected_rates(memory.clients, cohort, "compute", now)
        transfer, more = expected_rates(memory.clients, cohort, "transfer", now)
        tflop = np.array([client.tflop for client in cohort])
        megabytes = np.array([client.megabytes for client in cohort])
        overhead = np.array([client.overhead_s for client in cohort])
        seconds = compute[:, None] * tflop + transfer[:, None] * megabytes + overhead[:, None]
        return np.where(feasible, seconds, np.inf), [
            list(filter(None, pair)) for pair in zip(doubts, more, strict=True)
        ]

    def _worth(self, memory: DeadlineMemory, cohort: Sequence[Candidate], *, round: int, key: int) -> Array:
        """Return the quality of every client's arms in the model that counts for it, (clients, arms)."""
        of = hypotheses(self.arms)
        per_hypothesis = quality(self.arms, of)
        rng = generator(derive(key, "bandit.hypothesis", round))
        by_view: dict[GainOf, Array] = {}
        for taught in TAUGHT:  # both in any case: a draw must not depend on who else is in the cohort
            share = shares(memory.likely.get(taught, ()), of)
            by_view[taught] = per_hypothesis[rng.choice(len(of), p=share)] if self.draws else share @ per_hypothesis
        by_view["both"] = 0.5 * (by_view["own"] + by_view["whole"])
        return np.array([by_view[client.gain_of] for client in cohort])

    def _with_exploration(self, chosen: Array, seconds: Array, room: float, *, round: int, key: int) -> Array:
        """Return the arms, those of some clients drawn again among all that end in time."""
        if not self.explore:
            return chosen
        rng = generator(derive(key, "deadline.explore", round))
        arms = chosen.copy()
        for client in rng.permutation(len(chosen))[: self.explore].tolist():
            in_time = np.flatnonzero(seconds[client] <= room)
            arms[client] = int(rng.choice(in_time)) if in_time.size else arms[client]
        return arms


def candidate_ends(seconds: Array) -> Array:
    """Return the ends of a round that are tried: every time that an arm takes, or as many quantiles of them."""
    times = np.unique(seconds[np.isfinite(seconds)])
    if times.size <= MOST_DEADLINES:
        return times
    return np.asarray(np.quantile(times, np.linspace(0.02, 0.98, MOST_DEADLINES)))


def best_arms(seconds: Array, quality: Array, weights: Array, ends: Array, server_s: float) -> tuple[Array, float]:
    """Return (arm of each client, end of the round) with the largest quality per second.

    Args:
        seconds: (clients, arms), infinite where an arm is not feasible.
        quality: (clients, arms).
        weights: (clients,).
        ends: ends of the round to try; ties go to the earlier end.
        server_s: seconds of the round in which the server works.
    """
    # Arms by falling quality, then rising time, then rising index: the first that ends in time is the best one.
    order = np.lexsort((seconds, -quality), axis=1)  # (clients, arms)
    ordered, rows = np.take_along_axis(seconds, order, axis=1), np.arange(len(seconds))
    fastest = seconds.argmin(axis=1)
    best: tuple[Array, float, float] = (fastest, -np.inf, np.inf)  # arms, quality per second, end
    for bound in np.sort(ends):
        in_time = ordered <= bound
        first = in_time.argmax(axis=1)
        chosen = np.where(in_time[rows, first], order[rows, first], fastest)
        # The slowest client's time, which may be below the bound, or above it where one is late with every arm.
        end = float(seconds[rows, chosen].max())
        value = float(weights @ quality[rows, chosen]) / (end + server_s)
        # Values equal but for rounding are a tie, so that the choice is the same on every machine.
        if value > best[1] * (1 + 1e-12) or (value >= best[1] * (1 - 1e-12) and end < best[2]):
            best = (chosen, value, end)
    return best[0], best[2]
