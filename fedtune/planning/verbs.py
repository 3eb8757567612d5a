"""How a client computes its update where clients of one run may differ in it: by forward passes alone, or descending.

With `fedkseed` a client that descends takes steps along gradients inside the numbers that the others measure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, TypeAlias

from annotated_types import Ge, Interval

from fedtune.messages import Client, Failure, PlannedClient, Training, VerbChoice

DESCENDING: tuple[VerbChoice, ...] = ("descend", "auto")
"""The choices with which a client is ordered to descend, if its memory allows that."""


@dataclass(frozen=True)
class DescendSettings:
    """How a client that descends trains in one round of `fedkseed`: first-order steps inside the numbers of the seeds.

    For clients whose verb is `descend` or `auto`; the table `client` is about those that probe, and about both where a
    key here says so.
    """

    steps: Annotated[int, Ge(1)] = 8
    """Optimizer steps (Adam) per round, each of a forward and a backward pass."""
    learning_rate: Annotated[float, Interval(gt=0, le=1)] = 0.01
    """How far a step moves the trained weights: root mean square of the change, as a share of that of the base's own
    weights, so that one value serves models of any size; with n numbers, `method.seeds` for each of `method.groups`,
    and more than 4096 of them, over the square root of n / 4096. Where only one or two clients descend, whose noise no
    mean takes out, a third of it; a small model with many groups bears twice as much and more."""
    batch: Annotated[int, Ge(1)] | None = None
    """Examples per forward pass; none: as `client.batch`."""
    accumulation: Annotated[int, Ge(1)] = 1
    """Forward passes per optimizer step: one step sees batch * accumulation examples."""


@dataclass(frozen=True)
class VerbRequest:
    """What a recipe asks of one client, where clients of its method may differ in it."""

    verb: VerbChoice | None = None
    """None: as the method does."""
    probing: Training | None = None
    """How it probes, with steps or epochs; None where no client of the run does."""


Misfit: TypeAlias = Callable[[Client, Training], str]
"""(client, how it trains) -> why that does not fit its device; empty if it does, or is not known"""


def no_request(client: str) -> VerbRequest:
    """Return the request of a method whose clients all do the same."""
    return VerbRequest()


def fits_everywhere(client: Client, training: Training) -> str:
    """Return no objection, as where no device's memory is known."""
    return ""


def where_it_fits(planned: PlannedClient, client: Client, misfit: Misfit) -> PlannedClient | Failure:
    """Return a client's plan where its device can do it; with `auto`, of one that is too small to descend, to probe.

    Args:
        planned: with its verb.
        client: of the fleet.
        misfit: of descending.
    """
    if planned.verb not in DESCENDING or not (why := misfit(client, planned.plan.training)):
        return planned
    if planned.verb == "descend" or planned.probing is None:
        return Failure.from_text(client.name, why, kind="unfit")
    # Probing is what the plan then is of: the costs of a round, and the clock, read its training.
    plan = replace(planned.plan, training=planned.probing)
    return replace(planned, plan=plan, verb="probe", why=f"probes, for descending it needs more: {why}")
