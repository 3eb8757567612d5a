"""Who is asked to do what: the planners and the seam through which the round loop calls them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from fedtune.round import Client, Plan


class Planner(Protocol):
    """Chooses rank, batch and steps of each client of a round."""

    def plan(self, round: int, cohort: Sequence[Client]) -> Mapping[str, Plan]:
        """Return one plan per client of the cohort, by name."""
        ...
