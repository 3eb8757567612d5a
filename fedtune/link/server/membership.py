"""Which clients may act in a run: the one process that is served under a name, who is refused, who knows of the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence

from fedtune.link.audit_log import RecordEvent
from fedtune.link.server.presence import Presence
from fedtune.wire.v1 import link_pb2 as pb


class Membership:
    """The clients of a run; not thread-safe, the dispatcher calls it with its lock held."""

    def __init__(self, presence: Presence, record: RecordEvent, *, informed: Collection[str] = ()) -> None:
        """Begin without refusals.

        Args:
            presence: of the clients.
            record: receives the events.
            informed: clients that know from an earlier process that the run is complete.
        """
        self._presence, self._record = presence, record
        self.enrolled: Callable[[], Collection[str]] = lambda: ()
        """Returns the clients that may still come: those that are to hear of the end, too."""
        self.exclusion: Callable[[str], str] = lambda client: ""
        """Returns why a client may not call any more; empty if it may."""
        self._served: dict[str, int] = {}  # number of the process that acts for a client
        self._rivals: dict[str, int] = {}  # the process that was turned away last, for the log to name it once
        self._refusals: dict[str, pb.Refusal] = {}
        self._readmissions = Counter[str]()
        self._informed = set(informed)
        self._seen = set[str]()

    def claim(self, client: str, process: int) -> bool:
        """Return whether a process may act under a client's name: the first one, until it has gone.

        The first and not the newest: two processes that displace each other would take turns in training for nothing.
        """
        served = self._served.get(client, process)
        if process and served != process and self._presence.has_call(client):
            # One a client: a set of all would grow with every number that somebody makes up.
            if self._rivals.get(client) != process:
                self._rivals[client] = process
                reason = "a second process under this name was turned away; the first is served until it has gone"
                self._record("rival", client=client, reason=reason)
            return False
        # Releases before 0.3 send no number.
        if process:
            self._served[client] = process
        return True

    def reads_names(self, client: str) -> bool:
        """Return whether a client knows the names of a cohort in an order: releases before 0.3 refuse such a header."""
        return client in self._served

    def refuse(self, client: str, refusal: pb.Refusal) -> None:
        """Give a client no part in the run until it says hello again."""
        self._refusals[client] = refusal
        self._presence.wake(client)

    def refusal(self, client: str) -> pb.Refusal | None:
        """Return why a client takes no part; None if it may."""
        return self._refusals.get(client)

    def readmit(self, client: str) -> None:
        """Lift the refusal of a client that says hello anew: its operator may have mended the cause."""
        if self._refusals.pop(client, None) is not None:
            self._readmissions[client] += 1

    def readmissions(self, client: str) -> int:
        """Return how often a client came again after it was refused."""
        return self._readmissions[client]

    def here(self) -> Sequence[str]:
        """Return the clients that are connected, not refused, and may call."""
        connected = self._presence.clients()
        return [client for client in connected if client not in self._refusals and not self.exclusion(client)]

    def record_changes(self) -> None:
        """Record which clients have gone since the last call, and which are back."""
        here = set(self._presence.clients())
        for client in sorted(self._seen - here):
            self._record("left", client=client)
        self._seen = here

    def inform(self, client: str, *, finished: bool) -> None:
        """Note that a client knows that there is no more work: for good, or until the server is back."""
        if finished and client not in self._informed:
            self._record("informed", client=client)
        self._informed.add(client)

    def list_uninformed(self, *, finished: bool) -> Sequence[str]:
        """Return the clients that do not know yet that there is no more work, and may still ask.

        At the end of a run these are all that are enrolled: when they ask later, no server would answer them.
        """
        here = {*self._presence.clients_with_calls(), *((*self.here(), *self.enrolled()) if finished else ())}
        return sorted(here - self._informed - self._refusals.keys())
