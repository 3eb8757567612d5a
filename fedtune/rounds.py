"""The one loop: plan, assign, exchange, admit, aggregate, and hand each round's record on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt


@dataclass(frozen=True)
class Schedule:
    """How many rounds, and who takes part; the recipe's table `rounds`."""

    count: Annotated[int, Ge(1)]
    cohort: Annotated[int, Ge(1)] | Annotated[float, Gt(0)] | None = None
    """Clients per round: a whole number of them, or a share of the fleet in (0, 1]; none takes all."""
    min_clients: Annotated[int, Ge(1)] = 1
    """Admitted updates without which a round cannot be completed."""
    max_norm: Annotated[float, Gt(0)] | None = 10.0
    """An update whose change has more than so many times the cohort's median norm is refused; none takes any."""
