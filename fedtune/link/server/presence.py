"""Which clients are here: signs of life, calls that are held for them, and the bytes that each has sent today."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedtune.link.server.traffic import DayTraffic
from fedtune.link.settings import LinkSettings


@dataclass(frozen=True)
class ClientPresence:
    """How a client is connected."""

    connected: bool
    seen_s: float
    """Seconds since its last sign of life; 0 while a call is held."""
    open_tasks: int
    num_bytes: int
    """That it has sent within 24 hours."""
    work: str = ""
    """How far it is with its work, in words; empty if it has said nothing."""


class Presence:
    """Signs of life by client; not thread-safe, the dispatcher calls it with its lock held."""

    def __init__(self, settings: LinkSettings, clock: Callable[[], float], on_arrival: Callable[[], None]) -> None:
        """Begin with no client.

        Args:
            settings: leases.
            clock: seconds from any start.
            on_arrival: called when a client comes for the first time, or again after its lease has ended.
        """
        self._settings, self._clock, self._on_arrival = settings, clock, on_arrival
        self._seen: dict[str, float] = {}
        self._held_calls: dict[str, int] = {}
        self._listeners: dict[str, list[Callable[[], None]]] = {}
        self._sent, self._fetched_again = DayTraffic(clock), DayTraffic(clock)

    def sign_of_life(self, client: str) -> None:
        now = self._clock()
        if client not in self._seen or now - self._seen[client] >= self._settings.lease_s:
            self._on_arrival()
        self._seen[client] = now

    def hold(self, client: str, change: int) -> None:
        """Note that one more call of a client is held (1), or one fewer (-1)."""
        self._held_calls[client] = self._held_calls.get(client, 0) + change
        self.sign_of_life(client)

    def clients(self) -> Sequence[str]:
        """Return the clients whose last sign of life is younger than `lease_s`, or that have a call held."""
        # Sorted: cohorts are drawn by position, and must not depend on who came first.
        return sorted(client for client in self._seen if self._is_connected(client))

    def clients_with_calls(self) -> Sequence[str]:
        return [client for client, calls in self._held_calls.items() if calls > 0]

    def has_call(self, client: str) -> bool:
        """Return whether a call is held for a client: only a living process has one."""
        return self._held_calls.get(client, 0) > 0

    def is_lost(self, client: str, *, since: float) -> bool:
        """Return whether a client has been silent for longer than `lost_s`; one never seen counts from `since`."""
        return not self._held_calls.get(client) and self.silence_s(client, since=since) > self._settings.lost_s

    def silence_s(self, client: str, *, since: float) -> float:
        """Return the seconds since a client's last sign of life, or since a time if it never gave one."""
        return self._clock() - self._seen.get(client, since)

    def status(self, open_tasks: Callable[[str], int], work: Callable[[str], str]) -> Mapping[str, ClientPresence]:
        """Return the presence of every client that has ever come, with the number of its tasks and its `work`."""
        now = self._clock()
        return {
            client: ClientPresence(
                connected=self._is_connected(client),
                seen_s=0.0 if self._held_calls.get(client) else now - seen,
                open_tasks=open_tasks(client),
                num_bytes=self.day_bytes(client),
                work=work(client),
            )
            for client, seen in sorted(self._seen.items())
        }

    def count_bytes(self, client: str, num_bytes: int) -> None:
        """Count bytes that a client has sent, which is a sign of life, too."""
        # Not `sign_of_life`: the round loop need not wake for bytes of a client that is here already.
        self._seen[client] = self._clock()
        self._sent.count(client, num_bytes)

    def day_bytes(self, client: str) -> int:
        """Return the bytes that a client has sent within 24 hours."""
        return self._sent.of(client)

    def count_fetched_again(self, client: str, num_bytes: int) -> None:
        """Count bytes that a client has fetched though it had fetched them before."""
        if num_bytes:
            self._fetched_again.count(client, num_bytes)

    def fetched_again(self, client: str) -> int:
        """Return the bytes that a client has fetched once more within 24 hours."""
        return self._fetched_again.of(client)

    def add_listener(self, client: str, listener: Callable[[], None]) -> None:
        self._listeners.setdefault(client, []).append(listener)

    def remove_listener(self, client: str, listener: Callable[[], None]) -> None:
        self._listeners[client].remove(listener)

    def wake(self, client: str) -> None:
        """Call the listeners of a client."""
        for listener in self._listeners.get(client, ()):
            listener()

    def wake_all(self) -> None:
        for client in list(self._listeners):
            self.wake(client)

    def _is_connected(self, client: str) -> bool:
        # A held call counts for as long as it lasts: gRPC's keepalive ends it 40 s after its client has gone.
        return bool(self._held_calls.get(client)) or self._clock() - self._seen[client] < self._settings.lease_s
