"""The planner `deadline`: learns every client's speed, and chooses for the cohort by its common end (ours)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np

from fedtune.planning.policy import Arm, Candidate, Choice, Observed
from fedtune.seeds import derive, generator
from fedtune.tensors import Array

FORGETTING = 0.8
"""Of a client's older measurements."""
JUMP = np.log(1.8)
"""A rate that is further off than this twice running is taken for another mode of the device."""
FASTER = 4.0
"""No device is taken to be more than so many times as fast as its profile says."""
LONGEST_S = 1e9
"""Thirty years; who says to have worked for longer is not believed."""
MOST_DEADLINES = 60
QUALITY_FORGETTING = 0.99
LATE_SHARE = 1.25
"""What is sent as the deadline, over the time at which the round is expected to end."""
UNKNOWN = 1.5
"""Times the fleet's median that a client is taken to need of which nothing is known."""

HYPOTHESES = np.array(
    list(product((0.55, 0.65, 0.75, 0.85, 0.95), (1.5, 3.0, 6.0, 10.0, 16.0), (1.0, 2.0, 3.0)))
)  # (75, 3): pn, rn, w


def quality(arms: Sequence[Arm], hypotheses: Array = HYPOTHESES) -> Array:
    """Return what each hypothesis says an arm is worth, (hypotheses, arms): clip(1 - (p/pn)^w) (1 - e^(-r/rn))."""
    ratio = np.array([arm.ratio for arm in arms])
    rank = np.array([arm.rank for arm in arms], np.float64)
    pn, rn, w = (hypotheses[:, i : i + 1] for i in range(3))
    found: Array = np.clip(1 - (ratio / pn) ** w, 0, 1) * (1 - np.exp(-rank / rn))
    return found


@dataclass(frozen=True)
class Rate:
    """What is known of one client's time per unit of work."""

    log_s: float
    """Logarithm of the seconds per TFLOP, or per MB."""
    count: int = 0
    """Own measurements since the last jump; 0 where only bounds are known."""
    misses: int = 0
    """Measurements running that were far off."""


@dataclass(frozen=True)
class Rates:
    compute: Rate
    transfer: Rate


@dataclass(frozen=True)
class DeadlineMemory:
    """What the planner has learned."""

    clients: Mapping[str, Rates] = field(default_factory=dict)
    log_likelihood: tuple[float, ...] = (0.0,) * len(HYPOTHESES)
    """Of the hypotheses on quality, over all clients."""


@dataclass(frozen=True)
class Deadline:
    """Chooses the arms whose summed quality per second is the largest, for a round as long as its slowest client."""

    arms: tuple[Arm, ...]
    explore: int = 0
    """Clients per round that try another arm which ends in time."""
    deadline_s: float | None = None
    server_s: float = 0.0
    """Seconds of a round in which the server works."""
    known: Callable[[int, Candidate], Sequence[float]] | None = None
    """(round, client) -> the true seconds of every arm: for comparisons alone, since no deployment can know them."""

    def start(self) -> DeadlineMemory:
        """Return what is known before the first round: nothing."""
        return DeadlineMemory()

    def choose(self, memory: DeadlineMemory, round: int, candidates: Sequence[Candidate], *, key: int) -> Choice:
        """Return the arms of a round; a client that no arm brings home in time takes its fastest."""
        if not candidates:
            return Choice({})
        cohort = sorted(candidates, key=lambda each: each.client)
        if self.known is None:
            seconds = self._seconds(memory, cohort)  # (clients, arms)
        else:
            seconds = np.array([self.known(round, each) for each in cohort])
        feasible = np.array([each.feasible for each in cohort])
        seconds = np.where(feasible, seconds, np.inf)
        worth = self._quality(memory)  # (arms,)
        shared = np.broadcast_to(worth, seconds.shape)
        weights = np.array([each.weight for each in cohort])
        bounds = [self.deadline_s] if self.deadline_s is not None else deadlines(seconds)
        chosen, end = best(seconds, shared, weights, np.array(bounds), self.server_s)
        room = end if self.deadline_s is None else min(end, self.deadline_s)
        chosen = self._explored(chosen, seconds, room, round=round, key=key)
        limit = LATE_SHARE * (self.deadline_s or end)
        why = {
            each.client: f"{seconds[i, a]:.3g} s of {end:.3g} s; quality {worth[a]:.2f}"
            for i, (each, a) in enumerate(zip(cohort, chosen.tolist(), strict=True))
        }
        arms = {each.client: int(a) for each, a in zip(cohort, chosen, strict=True)}
        return Choice(arms, deadline_s=float(limit), why=why)

    def learn(self, memory: DeadlineMemory, observed: Sequence[Observed]) -> DeadlineMemory:
        """Return what is known after a round: two rates of each client, and which hypotheses the losses speak for."""
        clients = dict(memory.clients)
        for each in sorted(observed, key=lambda one: one.client):
            known = clients.get(each.client, Rates(Rate(np.nan), Rate(np.nan)))
            if each.late_s is not None:
                clients[each.client] = with_lower_bound(known, each, each.late_s)
                continue
            clients[each.client] = Rates(
                update_rate(known.compute, each.compute_s, each.tflop),
                update_rate(known.transfer, each.transfer_s, each.megabytes),
            )
        return DeadlineMemory(clients, self._judged(memory, observed))

    def _seconds(self, memory: DeadlineMemory, cohort: Sequence[Candidate]) -> Array:
        compute = rates_of(memory, cohort, "compute")
        transfer = rates_of(memory, cohort, "transfer")
        tflop = np.array([each.tflop for each in cohort])
        megabytes = np.array([each.megabytes for each in cohort])
        overhead = np.array([each.overhead_s for each in cohort])
        found: Array = compute[:, None] * tflop + transfer[:, None] * megabytes + overhead[:, None]
        return found

    def _quality(self, memory: DeadlineMemory) -> Array:
        likely = np.array(memory.log_likelihood)
        share = np.exp(likely - likely.max())
        found: Array = (share / share.sum()) @ quality(self.arms)
        return found

    def _explored(self, chosen: Array, seconds: Array, room: float, *, round: int, key: int) -> Array:
        """Return the arms with some of them drawn again among those that end in time: never a straggler."""
        if not self.explore:
            return chosen
        rng = generator(derive(key, "deadline.explore", round))
        found = chosen.copy()
        for client in rng.permutation(len(chosen))[: self.explore].tolist():
            in_time = np.flatnonzero(seconds[client] <= room)
            found[client] = int(rng.choice(in_time)) if in_time.size else found[client]
        return found

    def _judged(self, memory: DeadlineMemory, observed: Sequence[Observed]) -> tuple[float, ...]:
        """Return the log-likelihoods after a round.

        Each hypothesis may be scaled to the round's gains, which fall over the run: only the contrast between clients
        teaches.
        """
        pairs = [
            (each.arm, each.loss_before - each.loss_after)
            for each in sorted(observed, key=lambda one: one.client)
            if each.loss_before is not None and each.loss_after is not None
        ]
        pairs = [(arm, gain) for arm, gain in pairs if np.isfinite(gain)]
        scale = float(np.median([abs(gain) for _, gain in pairs])) if pairs else 0.0
        if len(pairs) < 3 or scale == 0:
            return memory.log_likelihood
        gains = np.array([gain for _, gain in pairs]) / scale  # (n,)
        said = quality([arm for arm, _ in pairs])  # (hypotheses, n)
        size = (said * said).sum(axis=1)
        factor = np.maximum(0.0, said @ gains / np.where(size > 0, size, 1.0))
        residual = ((gains - factor[:, None] * said) ** 2).sum(axis=1)
        noise = 2 * max(float(residual.min()) / len(pairs), 1e-4)
        return tuple((QUALITY_FORGETTING * np.array(memory.log_likelihood) - residual / noise).tolist())


def rates_of(memory: DeadlineMemory, cohort: Sequence[Candidate], what: str) -> Array:
    """Return seconds per unit of work by client: measured, else of its profile, else of what others needed."""
    found = []
    for each in cohort:
        rates = memory.clients.get(each.client)
        prior = each.s_per_tflop if what == "compute" else each.s_per_mb
        rate: Rate | None = getattr(rates, what) if rates else None
        if rate is not None and np.isfinite(rate.log_s):
            seconds = float(np.exp(rate.log_s))
            found.append(seconds if prior is None else max(seconds, prior / FASTER))
        else:
            found.append(np.nan if prior is None else prior)
    rates_ = np.array(found)
    known = rates_[np.isfinite(rates_)]
    everybody = [float(np.exp(getattr(each, what).log_s)) for each in memory.clients.values()]
    others = [rate for rate in everybody if np.isfinite(rate)] or known.tolist() or [1.0]
    return np.where(np.isfinite(rates_), rates_, UNKNOWN * float(np.median(others)))


def with_lower_bound(rates: Rates, each: Observed, late_s: float) -> Rates:
    """Return the rates of a client that was given up: both rise until it would not have come before that.

    Where it stuck is not known. Of a client of which nothing is known all of the time is taken for work.
    """
    compute = rates.compute.log_s if np.isfinite(rates.compute.log_s) else logarithm(each.s_per_tflop)
    transfer = rates.transfer.log_s if np.isfinite(rates.transfer.log_s) else logarithm(each.s_per_mb)
    if not 0 < late_s <= LONGEST_S or not each.tflop > 0:
        return rates
    if not np.isfinite(compute):
        return replace(rates, compute=replace(rates.compute, log_s=float(np.log(late_s / each.tflop))))
    there = np.exp(compute) * each.tflop + (np.exp(transfer) * each.megabytes if np.isfinite(transfer) else 0.0)
    more = float(np.log(max(1.0, (late_s - each.overhead_s) / there)))
    return Rates(replace(rates.compute, log_s=compute + more), replace(rates.transfer, log_s=transfer + more))


def logarithm(seconds: float | None) -> float:
    return float(np.log(seconds)) if seconds is not None and seconds > 0 else float("nan")


def update_rate(rate: Rate, seconds: float | None, work: float) -> Rate:
    """Return a rate after a measurement; impossible ones are left out."""
    if seconds is None or not 0 < seconds <= LONGEST_S or not work > 0:
        return rate
    found = float(np.log(seconds / work))
    if rate.count == 0:
        return replace(rate, log_s=found, count=1)
    misses = rate.misses + 1 if abs(found - rate.log_s) > JUMP else 0
    if misses >= 2:
        return replace(rate, log_s=found, count=1, misses=0)
    count = rate.count + 1
    gain = (1 - FORGETTING) / (1 - FORGETTING**count)
    return replace(rate, log_s=rate.log_s + gain * (found - rate.log_s), count=count, misses=misses)


def deadlines(seconds: Array) -> Array:
    """Return the ends of a round that are tried: every time that an arm takes, or as many quantiles of them."""
    times = np.unique(seconds[np.isfinite(seconds)])
    if times.size <= MOST_DEADLINES:
        return times
    found: Array = np.quantile(times, np.linspace(0.02, 0.98, MOST_DEADLINES))
    return found


def best(seconds: Array, worth: Array, weights: Array, bounds: Array, server_s: float) -> tuple[Array, float]:
    """Return (arm of each client, end of the round) of the bound with the largest worth per second.

    Args:
        seconds: (clients, arms), infinite where an arm is not feasible.
        worth: (clients, arms).
        weights: (clients,).
        bounds: ends to try; ties go to the earlier end.
        server_s: of the round.
    """
    # Arms by falling worth, then rising time, then rising index: the first that ends in time is the best one.
    order = np.lexsort((seconds, -worth), axis=1)  # (clients, arms)
    ordered, every = np.take_along_axis(seconds, order, axis=1), np.arange(len(seconds))
    fastest = seconds.argmin(axis=1)
    found: tuple[Array, float, float] = (fastest, -np.inf, np.inf)
    for bound in np.sort(bounds):
        fits = ordered <= bound
        first = fits.argmax(axis=1)
        chosen = np.where(fits[every, first], order[every, first], fastest)
        end = float(seconds[every, chosen].max())
        value = float(weights @ worth[every, chosen]) / (end + server_s)
        if value > found[1] * (1 + 1e-12) or (value >= found[1] * (1 - 1e-12) and end < found[2]):
            found = (chosen, value, end)
    return found[0], found[2]
