"""Which engine runs a recipe's clients on one machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt


@dataclass(frozen=True)
class EngineSettings:
    """The recipe's table `engine`: it changes how long a run takes, never what comes out of it."""

    name: Literal["inprocess", "processes", "ray"] = "inprocess"
    """inprocess: one client after the other; processes: several at once over one copy of the base; ray: Flower's own
    simulation engine (needs the extra `ray`)."""
    workers: Annotated[int, Ge(1)] | None = None
    """Worker processes of `processes` and `ray`; none takes as many as the cores carry, at most one per client."""
    timeout_s: Annotated[float, Gt(0)] | None = None
    """Seconds after which `processes` takes one client's work for hung, and its process is replaced; none waits."""
