"""What each client's work takes of the machine, and which client starts next on which worker."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Interval


@dataclass(frozen=True)
class Resources:
    """What one client takes of the machine while it trains."""

    threads: Annotated[int, Ge(1)] = 1
    """CPU threads that the client trains with; another number changes the last bits of the result."""
    gpu_share: Annotated[float, Interval(gt=0, le=1)] | None = None
    """Share of a GPU that the client takes; none: an equal share of the workers on it. Without a GPU it has no effect.
    """


@dataclass(frozen=True)
class Machine:
    """The cores, GPUs and worker processes that clients share."""

    cores: int
    """CPU threads that clients may use at the same time."""
    workers: int
    """Worker processes; they have the places 0, 1, ..."""
    devices: Sequence[str] = ("cpu",)
    """Where the workers compute, in turn: `cpu` alone, or GPUs by name."""

    def device(self, place: int) -> str:
        return self.devices[place % len(self.devices)]

    def threads(self, resources: Resources) -> int:
        return min(resources.threads, self.cores)  # a client that wants more than there are runs alone

    def share(self, resources: Resources, device: str) -> float:
        """Return the share of a device that the work takes, at most 1; the CPU is shared by threads instead."""
        if device == "cpu":
            return 0.0
        neighbours = sum(self.device(place) == device for place in range(self.workers))
        return 1 / neighbours if resources.gpu_share is None else min(resources.gpu_share, 1.0)


def start_order(needs: Mapping[str, Resources]) -> Sequence[str]:
    """Return clients in the order of their start: the widest first, equals in the order given.

    Then no client starves: what runs beside a wide client fits beside the next one, which is no wider.
    """
    return sorted(needs, key=lambda name: (-(needs[name].gpu_share or 0), -needs[name].threads))


def next_start(
    waiting: Iterable[str],
    needs: Mapping[str, Resources],
    running: Mapping[int, Resources],
    idle: Collection[int],
    machine: Machine,
) -> tuple[str, int] | None:
    """Return the first waiting client that fits beside what runs, and the idle worker for it.

    Args:
        waiting: clients, in the order of `start_order`.
        needs: by client.
        running: by the worker's place.
        idle: places of the workers that are free.
        machine: what there is to share.

    Returns:
        (client, place), the place on the least loaded device; None if nothing fits until a running client ends. While
        none runs, something always fits.
    """
    free = machine.cores - sum(machine.threads(resources) for resources in running.values())
    load = dict.fromkeys(machine.devices, 0.0)
    for place, resources in running.items():
        load[machine.device(place)] += machine.share(resources, machine.device(place))
    places = sorted(idle, key=lambda place: (load[machine.device(place)], place))
    too_wide = set[Resources]()
    for client in waiting:
        resources = needs[client]
        if resources in too_wide or machine.threads(resources) > free:
            too_wide.add(resources)
            continue
        for place in places:
            device = machine.device(place)
            # A tolerance, because nine ninths add up to a little more than 1 in floats.
            if load[device] + machine.share(resources, device) <= 1 + 1e-9:
                return client, place
        too_wide.add(resources)
    return None
