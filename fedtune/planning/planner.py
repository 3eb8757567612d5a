"""Who is asked to do what: the planners and the seam through which the round loop calls them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fedtune.messages import Client, Failure, PlannedClient


@dataclass(frozen=True)
class ClientObservation:
    """What one client of a round came to, as a planner learns from it; all of it stands in the round's line."""

    client: str
    num_examples: int
    ratio: float
    rank: int
    status: str = "ok"
    """`ok`, or the kind of failure."""
    out_of_memory: bool = False
    """Whether it failed because memory ran out."""
    compute_s: float | None = None
    transfer_s: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    importance: float | None = None
    bytes_down: int = 0
    bytes_up: int = 0


class Planner(Protocol):
    """Chooses pruning ratio, rank, batch and steps of each client of a round, and learns from what came of it.

    What it has learned is a value that follows from the rounds so far: after a crash it is made again from their lines.
    """

    def start(self) -> Any:
        """Return what is known before the first round."""
        ...

    def plan(self, learned: Any, round: int, cohort: Sequence[Client]) -> Mapping[str, PlannedClient | Failure]:
        """Return one plan per client of the cohort, by name; a failure of the kind `unfit` where nothing fits."""
        ...

    def observe(self, learned: Any, seen: Sequence[ClientObservation]) -> Any:
        """Return what is known after a round."""
        ...
