"""How long clients take per unit of work: measured in earlier rounds, said by a profile, or probed for this round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, inf, isfinite, log, nan
from typing import Literal, TypeAlias

import numpy as np

from fedtune.planning.policy import Candidate, Observed
from fedtune.tensors import Array

Kind: TypeAlias = Literal["compute", "transfer"]
"""Seconds per TFLOP, or per MB down and up together."""
FADES: Mapping[Kind, float] = {"compute": 0.97, "transfer": 0.9}
"""What a round leaves of the last deviation from a client's own mean: modes of a device last longer than the weather of
its network. With the mean of the last measurements alone, rounds took 1.54 times the clairvoyant time, and not 1.50."""
QUICK = 0.8
"""Weight of a measurement in a client's present deviation."""
FORGETTING = 0.98
"""Weight of a client's older measurements in its mean against the next one."""
OF_PROFILE = 0.5
"""As how many measurements a device's profile counts."""
FASTER = 4.0
"""A rate counts as at most so many times as fast as the device's profile says; a probed one also as slow."""
LONGEST_S = 1e9
"""Thirty years: a longer time is no measurement."""
UNKNOWN = 1.5
"""A client of which nothing is known is planned with so many times the fleet's median time."""


@dataclass(frozen=True)
class Rate:
    """What is known of one client's time per unit of work; logarithms, so that twice and half are equally far off."""

    mean: float = nan
    """Over its measurements."""
    recent: float = nan
    """As it was at the last one."""
    count: float = 0.0
    """Measurements, older ones weighing less; 0 where only bounds are known."""
    last: int = 0
    """Round of the last one."""

    def forecast(self, now: int, fades: float) -> float:
        """Return the logarithm that a round may expect: the deviation from the mean fades with time."""
        return self.mean + fades ** max(0, now - self.last) * (self.recent - self.mean)

    def slower(self, factor: float) -> Rate:
        """Return the rate of a client that is slower by a factor."""
        return replace(self, mean=self.mean + log(factor), recent=self.recent + log(factor))


@dataclass(frozen=True)
class Rates:
    """Of one client."""

    compute: Rate = Rate()
    transfer: Rate = Rate()
    probed_compute: Rate = Rate()
    """Measured times over those that the probe of the same round led to expect."""
    probed_transfer: Rate = Rate()

    def of(self, kind: Kind) -> Rate:
        return self.compute if kind == "compute" else self.transfer

    def of_probe(self, kind: Kind) -> Rate:
        return self.probed_compute if kind == "compute" else self.probed_transfer


NO_RATES = Rates()


def update_rates(rates: Rates, seen: Observed, now: int) -> Rates:
    """Return a client's rates after a round; impossible measurements are left out."""
    if seen.late_s is not None:
        # A bound, not nothing: else a late client would seem as fast as before, and be late again.
        return with_lower_bound(rates, seen, seen.late_s, now)
    probed_s = None if seen.probe.s_per_tflop is None else seen.probe.s_per_tflop * seen.tflop
    sent_s = None if seen.probe.s_per_mb is None else seen.probe.s_per_mb * seen.megabytes
    # Two rates: with one for the whole time, rounds took 1.47 times the clairvoyant time, and not 1.22.
    return Rates(
        update_rate(rates.compute, seen.compute_s, seen.tflop, now, FADES["compute"], seen.s_per_tflop),
        update_rate(rates.transfer, seen.transfer_s, seen.megabytes, now, FADES["transfer"], seen.s_per_mb),
        update_rate(rates.probed_compute, seen.compute_s, probed_s, now),
        update_rate(rates.probed_transfer, seen.transfer_s, sent_s, now),
    )


def update_rate(
    rate: Rate, seconds: float | None, work: float | None, now: int, fades: float = 1.0, prior: float | None = None
) -> Rate:
    """Return a rate after a measurement.

    Args:
        rate: before it.
        seconds: that were measured.
        work: what was done in them.
        now: the round's number.
        fades: what a round leaves of a deviation from the mean.
        prior: what the device's profile says.
    """
    if seconds is None or work is None or not 0 < seconds <= LONGEST_S or not 0 < work < inf:
        return rate
    measured = log(seconds / work)
    if rate.count == 0:
        # Nothing was measured: what there is are bounds, which a measurement replaces.
        known = prior is not None and 0 < prior < inf
        start = log(prior) if known and prior else measured
        rate = Rate(start, start, OF_PROFILE if known else 0.0, now)
    count = FORGETTING * rate.count + 1
    mean = rate.mean + (measured - rate.mean) / count
    deviation = rate.forecast(now, fades) - rate.mean
    return Rate(mean, mean + deviation + QUICK * (measured - mean - deviation), count, now)


def with_lower_bound(rates: Rates, seen: Observed, late_s: float, now: int) -> Rates:
    """Return the rates of a client that was given up: both rise until it would have taken at least that long.

    Whether it computed or waited for the network is not known, so both rise by the same factor. Where no rate is known,
    all of the time counts as computation.
    """
    compute = known_or_prior(rates.compute, seen.s_per_tflop)
    transfer = known_or_prior(rates.transfer, seen.s_per_mb)
    if not 0 < late_s <= LONGEST_S or not seen.tflop > 0:
        return rates
    if not isfinite(compute.mean):
        start = log(late_s / seen.tflop)
        return replace(rates, compute=Rate(start, start))
    expected = exp(compute.forecast(now, FADES["compute"])) * seen.tflop
    if isfinite(transfer.mean):
        expected += exp(transfer.forecast(now, FADES["transfer"])) * seen.megabytes
    more = max(1.0, (late_s - seen.overhead_s) / expected)
    return replace(rates, compute=compute.slower(more), transfer=transfer.slower(more))


def known_or_prior(rate: Rate, prior: float | None) -> Rate:
    if isfinite(rate.mean) or prior is None or prior <= 0:
        return rate
    return Rate(log(prior), log(prior))


def expected_rates(
    clients: Mapping[str, Rates], cohort: Sequence[Candidate], kind: Kind, now: int
) -> tuple[Array, Sequence[str]]:
    """Return seconds per unit of work by client, and by client why its probe was not believed; empty where it was.

    Probed for this round; else measured; else of its profile; else of what others needed.
    """
    fleet = [exp(rate) for rates in clients.values() if isfinite(rate := rates.of(kind).forecast(now, FADES[kind]))]
    own = np.array([own_rate(clients.get(client.client), client, kind, now) for client in cohort])
    known = own[np.isfinite(own)]
    others = float(np.median(fleet or known.tolist() or [1.0]))
    rates = np.where(np.isfinite(own), own, UNKNOWN * others)
    return with_probes(rates, clients, cohort, kind, fleet)


def own_rate(rates: Rates | None, client: Candidate, kind: Kind, now: int) -> float:
    """Return a client's seconds per unit of work, measured or of its profile; NaN where nothing is known."""
    prior = client.s_per_tflop if kind == "compute" else client.s_per_mb
    rate = rates.of(kind).forecast(now, FADES[kind]) if rates else nan
    if not isfinite(rate):
        return nan if prior is None else prior
    # A client that claims to be far faster than its device would otherwise set the pace of all others.
    return exp(rate) if prior is None else max(exp(rate), prior / FASTER)


def with_probes(
    rates: Array, clients: Mapping[str, Rates], cohort: Sequence[Candidate], kind: Kind, fleet: Sequence[float]
) -> tuple[Array, Sequence[str]]:
    """Return the rates, those of clients that have measured themselves for this round as these say, within bounds.

    A probe is a small task of another kind: it is scaled by what its client's rounds took in relation to its probes so
    far, or where it has none, the others'. Bounds are four times the device's profile; without one, the range of the
    fleet's measured rates; without any, the middle half of the cohort's probes.
    """
    probes = np.array([probe_of(client, kind) for client in cohort])
    probed = np.isfinite(probes)
    if not probed.any():
        return rates, [""] * len(cohort)
    ratios = {name: each.of_probe(kind).mean for name, each in clients.items() if each.of_probe(kind).count}
    usual = float(np.median(list(ratios.values()))) if ratios else 0.0
    scaled = probes * np.exp([ratios.get(client.client, usual) for client in cohort])
    low, high = (min(fleet), max(fleet)) if fleet else tuple(np.quantile(scaled[probed], (0.25, 0.75)))
    priors = [client.s_per_tflop if kind == "compute" else client.s_per_mb for client in cohort]
    lows = np.array([low if prior is None else prior for prior in priors]) / FASTER
    highs = np.array([high if prior is None else prior for prior in priors]) * FASTER
    bounded = np.clip(scaled, lows, highs)
    return np.where(probed, bounded, rates), [
        "" if not there or claim == used else probe_text(kind, claim, used)
        for there, claim, used in zip(probed.tolist(), scaled.tolist(), bounded.tolist(), strict=True)
    ]


def probe_of(client: Candidate, kind: Kind) -> float:
    probe = client.probe.s_per_tflop if kind == "compute" else client.probe.s_per_mb
    # A claim of no time, or of none that ends, is no measurement.
    return probe if probe is not None and 0 < probe <= LONGEST_S else nan


def probe_text(kind: Kind, claim: float, used: float) -> str:
    """Return in words how a probe was bounded.

    >>> probe_text("compute", 0.001, 0.25)
    'its probe claims 250 times the speed that is believed of its device'
    """
    if claim < used:
        what = "speed" if kind == "compute" else "bandwidth"
        return f"its probe claims {used / claim:.3g} times the {what} that is believed of its device"
    what = "time" if kind == "compute" else "time of transfer"
    return f"its probe claims {claim / used:.3g} times the {what} that is believed of its device"
