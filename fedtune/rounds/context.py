"""What the rounds of a run have in common: method, planner, transport, schedule, and where each step is recorded."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from fedtune.messages import Blueprint
from fedtune.methods.method import Method
from fedtune.planning.planner import Planner
from fedtune.rounds.asynchronous import AsyncSettings
from fedtune.rounds.clock import Clock
from fedtune.rounds.events import Watch
from fedtune.rounds.journal import AsyncJournal, NullJournal
from fedtune.rounds.probe import Prober
from fedtune.rounds.schedule import Schedule
from fedtune.rounds.transport import Transport


@dataclass(frozen=True)
class RoundContext:
    """What the rounds of a run have in common."""

    method: Method[Any]
    """What is sent, and how it is combined."""
    settings: Any
    """The method's own."""
    planner: Planner
    """What each client is asked to do."""
    transport: Transport
    """How messages travel."""
    schedule: Schedule
    """How many rounds, and who takes part."""
    blueprint: Blueprint
    """Of the base model."""
    base: str
    """Digest of the base model, which every client must hold."""
    labels: tuple[str, ...] = ()
    """Class names that the clients must use, where their own may differ."""
    date: str = ""
    """The day that the clients' chat templates write, where their own may differ."""
    journal: AsyncJournal = field(default_factory=NullJournal)
    """Makes every step durable."""
    first: Method[Any] | None = None
    """The method of round 1 alone, where that only prepares the others; every client that is there takes part in it."""
    clock: Clock | None = None
    """Says how long clients took; None where clients share one machine, whose times say nothing of their devices."""
    prober: Prober | None = None
    """Asks clients for their speed before every round; None where the planner reads none."""
    asynchronous: AsyncSettings | None = None
    """Rounds that wait for updates and not for clients; None: every round waits for its own cohort."""
    live: bool = False
    """Whether asynchronous rounds take updates as they come over the transport, and not as a simulated clock says."""
    watch: Watch = lambda event: None
    """Called when a round starts and when a client is done."""

    def at(self, round: int) -> RoundContext:
        """Return what holds for one round."""
        if self.first is None or round != 1:
            return self
        # A sample may lack a class that others hold, and a class without an example has no mean.
        every = replace(self.schedule, cohort=None, over_select=1.0)
        return replace(self, method=self.first, schedule=every, asynchronous=None)
