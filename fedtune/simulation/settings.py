"""Which engine runs a recipe's clients on one machine, and which devices they simulate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt


@dataclass(frozen=True)
class EngineSettings:
    """The recipe's table `engine`: it changes how long a run takes, never its result."""

    name: Literal["inprocess", "processes", "ray"] = "inprocess"
    """inprocess: one client after the other; processes: several at once over one copy of the base; ray: Flower's own
    simulation engine (needs the extra `ray`)."""
    workers: Annotated[int, Ge(1)] | None = None
    """Worker processes of `processes` and `ray`; none takes as many as the cores carry, at most one per client."""
    timeout_s: Annotated[float, Gt(0)] | None = None
    """Seconds after which `processes` replaces the process of a client that has not answered; none waits."""


@dataclass(frozen=True)
class FleetSettings:
    """The devices that clients simulate, and the clock that turns their work into seconds; table `fleet`.

    The training is real, the time is simulated: from operations, bytes and traces, never from this machine's clock.
    """

    name: Literal["fedspine80", "orin8", "lognormal"] = "fedspine80"
    """fedspine80: 30 TX2, 40 Xavier NX, 10 AGX Xavier; orin8: 4 Orin Nano, 2 Orin NX, 2 AGX Orin; lognormal: after
    FedScale. Other numbers of clients are divided in the same proportion."""
    by: Literal["time", "round"] = "time"
    """What a device's speed and bandwidth depend on: simulated time, or the number of the round."""
    late: Literal["wait", "drop"] = "wait"
    """A client that misses the planner's deadline is waited for, up to three times that, or dropped."""
    server_s: Annotated[float, Ge(0)] = 0.0
    """Seconds of a round in which the server works."""
    proxy: Literal["none", "roberta-base", "llama-7b"] = "none"
    """A larger model whose operations, bytes and memory the clock takes in place of the one that is trained."""


@dataclass(frozen=True)
class DeviceOverride:
    """What is different for some clients' devices; one table `device` of the recipe."""

    clients: Sequence[str]
    """Names or globs."""
    profile: str | None = None
    """A known device that takes the place of the fleet's."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The fields of `DeviceProfile` that change, by name."""

    def covers(self, client: str) -> bool:
        return any(fnmatchcase(client, glob) for glob in self.clients)
