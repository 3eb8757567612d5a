"""Which engine runs a recipe's clients on one machine, and which devices they simulate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt

from fedtune.messages import OMIT_DEFAULT


@dataclass(frozen=True)
class EngineSettings:
    """What runs the clients on this machine; the recipe's table `engine`.

    It changes how long a run takes, never its result; `batch_clients` alone changes the last bits of sums.
    """

    name: Literal["inprocess", "processes", "ray"] = "inprocess"
    """inprocess: one client after the other; processes: several at once, over one copy of the base; ray: Flower's
    simulation engine (needs the extra `ray`)."""
    workers: Annotated[int, Ge(1)] | None = None
    """Worker processes of `processes` and `ray`; none: as many as the cores carry, at most one per client."""
    timeout_s: Annotated[float, Gt(0)] | None = None
    """With `processes`: a client that works longer than this is taken for stuck, fails, and its process is replaced;
    none waits for ever."""
    batch_clients: Literal["auto"] | Annotated[int, Ge(1)] = field(default="auto", metadata=OMIT_DEFAULT)
    """With `inprocess`: clients of equal plans that train at the same time, in one forward pass, at most; 1 trains one
    after the other. auto: on CUDA as many as its memory takes, elsewhere 1, for a CPU gains nothing by it."""
    memory_check: bool = field(default=True, metadata=OMIT_DEFAULT)
    """Refuse a run on the CPU whose largest client needs more memory than is free, before the base is loaded."""


@dataclass(frozen=True)
class FleetSettings:
    """The devices that clients are simulated to be, and the clock that turns their work into seconds; the recipe's
    table `fleet`.

    The learning is real, the time is simulated: it follows from operations, bytes and device profiles, never from this
    machine's clock.
    """

    name: Literal["fedspine80", "orin8", "phones", "lognormal"] = "fedspine80"
    """fedspine80: 30 TX2, 40 Xavier NX and 10 AGX Xavier; orin8: 4 Orin Nano, 2 Orin NX and 2 AGX Orin; phones:
    4 of each 10 slow, 4 middling and 2 fast phones over Wi-Fi, with their power, so that a run records joules;
    lognormal: random speeds after FedScale. With another number of clients the shares stay the same."""
    by: Literal["time", "round"] = "time"
    """A device's speed and bandwidth change with simulated time, or with the number of the round, which makes runs
    comparable round by round."""
    late: Literal["wait", "drop"] = "wait"
    """A client that misses the planner's deadline is waited for, up to three times the deadline, or its update is
    dropped."""
    server_s: Annotated[float, Ge(0)] = 0.0
    """Simulated seconds that the server adds to every round."""
    proxy: Literal["none", "roberta-base", "llama-7b", "smollm2-135m"] = "none"
    """The clock counts operations, bytes and memory as if this larger model were trained; none counts those of the
    model itself."""


@dataclass(frozen=True)
class DeviceOverride:
    """Simulated devices that differ from the fleet's; one table `device` of the recipe."""

    clients: Sequence[str]
    """Names or globs."""
    profile: str | None = None
    """Kind of device to start from: nano, tx2, xavier-nx, agx-xavier, orin-nano-8, orin-nx-16, agx-orin-64,
    phone-low, phone-mid or phone-high; none: the one that the fleet gave."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The fields of `DeviceProfile` that change, by name."""

    def covers(self, client: str) -> bool:
        return any(fnmatchcase(client, glob) for glob in self.clients)
