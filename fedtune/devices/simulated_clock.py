"""The simulated clock: operations and bytes of a fleet turned into seconds, the same on every machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fedtune.devices import traces
from fedtune.devices.profiles import DeviceProfile
from fedtune.devices.traces import By
from fedtune.messages import Client
from fedtune.rounds.clock import ClientTime, CompletedWork
from fedtune.rounds.probe import LIMIT_S, PROBE_MB, PROBE_TFLOP, SpeedProbe

PASSES = 2
"""Times that the weights are read in a step, forward and backward; 3 where activations are computed twice."""
PATIENCE = 3.0
"""Deadlines for which a late client is waited for."""


@dataclass(frozen=True)
class Load:
    """What a client did in a round, in the units of a device."""

    tflop: float
    gigabytes: float
    """Weights that were read, once per pass and step."""
    bytes_down: float
    bytes_up: float


def integrated_seconds(start_s: float, work: float, rate: Callable[[float], tuple[float, float]]) -> float:
    """Return the seconds that work takes whose rate is constant in pieces, integrated exactly.

    >>> integrated_seconds(0, 10, lambda now: (1, 4 - now) if now < 4 else (0.5, float("inf")))
    16.0
    """
    now, left = start_s, work
    while left > 0:
        speed, lasts = rate(now)
        if speed * lasts >= left:
            now += left / speed
            break
        left -= speed * lasts
        now += lasts
    return now - start_s


@dataclass(frozen=True)
class SimulatedClock:
    """The clock of a fleet; every policy that asks it meets the same world (common random numbers)."""

    profiles: Mapping[str, DeviceProfile]
    """By client."""
    load: Callable[[CompletedWork], Load]
    """From what a client did to what that asks of a device."""
    seed: int
    by: By = "time"
    late: Literal["wait", "drop"] = "wait"
    server_s: float = 0.0

    def client_times(
        self, round: int, now_s: float, done: Mapping[str, CompletedWork], late: Mapping[str, float]
    ) -> Mapping[str, ClientTime]:
        """Return how long each client took in a round that began at `now_s`."""
        return {name: self.client(name, self.load(each), round=round, now_s=now_s) for name, each in done.items()}

    def client(self, name: str, load: Load, *, round: int, now_s: float) -> ClientTime:
        """Return the time of one client: it downloads, works, and uploads, one after the other."""
        profile, seed = self.profiles[name], self.seed
        net = profile.net_sigma, seed, name
        down = traces.bandwidth(profile.down_mbps, *net, by=self.by, round=round)
        up = traces.bandwidth(profile.up_mbps, *net, by=self.by, round=round)
        first = profile.latency_s + integrated_seconds(now_s, load.bytes_down, down)
        # A step takes as long as its operations or as reading its weights, whichever is more; both follow the mode.
        work_s = max(load.tflop / profile.tflops, load.gigabytes / profile.memory_gbps) * traces.noise(
            seed, name, round
        )
        # Integrated over the modes: a long computation meets several of them.
        mode = traces.speed(profile, seed, name, by=self.by, round=round)
        # Work starts when the download is over, which decides the mode that it runs in.
        compute = integrated_seconds(now_s + first, work_s, mode)
        begin = now_s + first + compute + profile.overhead_s
        second = profile.latency_s + integrated_seconds(begin, load.bytes_up, up)
        # The device sleeps while it waits for others: what that takes is not counted.
        joules = profile.joules(work_s=compute + profile.overhead_s, down_s=first, up_s=second)
        return ClientTime(compute, first + second, overhead_s=profile.overhead_s, down_s=first, joules=joules)

    def probes(self, round: int, now_s: float, cohort: Sequence[Client], limit_s: float) -> Mapping[str, SpeedProbe]:
        """Return what clients measure of their speed before a round, and how long that takes them."""
        return {client.name: self.probe(client.name, round=round, now_s=now_s, limit_s=limit_s) for client in cohort}

    def probe(self, name: str, *, round: int, now_s: float, limit_s: float = LIMIT_S) -> SpeedProbe:
        """Return what one client measures: its speed and bandwidth at this time, with an error of some percent."""
        profile, seed = self.profiles[name], self.seed
        tflops = profile.tflops * traces.speed(profile, seed, name, by=self.by, round=round)(now_s)[0]
        net = profile.net_sigma, seed, name
        down = traces.bandwidth(profile.down_mbps, *net, by=self.by, round=round)(now_s)[0] / 1e6
        up = traces.bandwidth(profile.up_mbps, *net, by=self.by, round=round)(now_s)[0] / 1e6
        compute, transfer = traces.probe_errors(seed, name, round)
        return SpeedProbe(
            s_per_tflop=compute / tflops,
            # As a planner counts them: what goes down and what goes up together.
            s_per_mb=transfer * 0.5 * (1 / down + 1 / up),
            seconds=min(limit_s, PROBE_TFLOP / tflops) + profile.latency_s + min(limit_s, PROBE_MB / down),
        )

    def overdue(self, deadlines_s: Mapping[str, float], spent: Mapping[str, ClientTime]) -> Mapping[str, float]:
        """Return the clients that are given up: after the deadline, or with `late = "wait"` after thrice that time."""
        share = 1.0 if self.late == "drop" else PATIENCE
        bounds = {name: share * deadline_s for name, deadline_s in deadlines_s.items()}
        return {name: bound for name, bound in bounds.items() if name in spent and spent[name].seconds > bound}

    def round_seconds(self, spent: Mapping[str, ClientTime]) -> float:
        """Return the seconds of a round: its slowest client's, then the server's."""
        return max((each.seconds for each in spent.values()), default=0.0) + self.server_s

    def reachable(self, round: int, client: str) -> bool:
        """Return whether a device can be reached in a round, by its availability."""
        return traces.available(self.profiles[client], self.seed, client, round)
