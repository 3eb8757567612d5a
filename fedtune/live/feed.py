"""What the live page shows of a run, changed by its events and read by any number of open pages."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal, TypeAlias

from fedtune.live.rows import client_after, finite, round_row, visible
from fedtune.messages import Failure
from fedtune.rounds.events import ClientFinished, Event, Note, Phase, RoundFinished, RoundStarted
from fedtune.rounds.record import RoundRecord

State: TypeAlias = Literal["preparing", "running", "finished", "stopped"]
RECENT = 5
"""Rounds whose median length gives the estimated end."""
MOST_PROBLEMS, MOST_NOTES = 50, 20
"""Kept for a page, the newest."""


@dataclass
class Client:
    """One client, and when it changed last, as a number of the feed's."""

    row: dict[str, Any] = field(default_factory=lambda: dict(EMPTY))
    version: int = 0


EMPTY: Mapping[str, Any] = {
    "state": "",
    "round": 0,
    "before": None,
    "after": None,
    "up": 0,
    "down": 0,
    "used": 0,
    "problem": "",
}


class Feed:
    """The page's content; each change has a number, so that an open page is sent what is new to it alone."""

    def __init__(self, name: str, *, rounds: int = 0, now: Callable[[], float] = time.time) -> None:
        """Begin with nothing but the run's name and, where it is known, how many rounds it has."""
        self._now, self._changed, self._version = now, threading.Condition(), 1
        self._head: dict[str, Any] = {
            "name": visible(name),
            "state": "preparing",
            "text": "",
            "phase": "",
            "round": 0,
            "rounds": rounds,
            "done": 0,
            "asked": 0,
            "answered": 0,
            "connected": None,
            "up": 0,
            "down": 0,
            "began": self._milliseconds(),
            "round_began": None,
            "seconds": None,
        }
        self._rounds: list[dict[str, Any]] = []
        self._round_versions: list[int] = []
        self._clients: dict[str, Client] = {}
        self._connected: set[str] = set()
        self._answered: set[str] = set()
        self._problems: deque[dict[str, Any]] = deque(maxlen=MOST_PROBLEMS)
        self._notes: deque[str] = deque(maxlen=MOST_NOTES)
        self._named: set[tuple[int, str]] = set()
        self._versions = {"problems": 0, "notes": 0}
        self._recent: deque[float] = deque(maxlen=RECENT)
        self.closed = False

    def __call__(self, event: Event) -> None:
        """Take an event of the rounds."""
        with self._changed:
            match event:
                case RoundStarted(round, rounds, cohort):
                    self._start_round(round, rounds, cohort)
                case ClientFinished(round, outcome, _):
                    client, self._version = outcome.client, self._version + 1
                    self._answered.add(client)
                    self._head["answered"] = len(self._answered)
                    if isinstance(outcome, Failure):
                        self._add_problem(round, client, outcome.kind, outcome.reason)
                        self._set_client(client, state=outcome.kind, round=round, problem=visible(outcome.reason))
                    else:
                        self._set_client(client, state="answered", round=round)
                case RoundFinished(record):
                    self._add_round(record)
                case Note(text):
                    self._add_note(text)
                case Phase(text):
                    self._head["phase"] = visible(text)
            self._notify()

    def load(self, records: Sequence[RoundRecord]) -> None:
        """Take rounds that are on the disk already."""
        with self._changed:
            for record in records:
                self._add_round(record)
            self._notify()

    def connect(self, client: str) -> None:
        """Show that a client of a served run is connected."""
        with self._changed:
            self._version += 1
            self._connected.add(client)
            self._set_client(client, state="connected")
            self._notify()

    def disconnect(self, client: str, reason: str = "") -> None:
        """Show that it is not, and what went wrong, if anything did."""
        with self._changed:
            self._version += 1
            self._connected.discard(client)
            self._set_client(client, state="away", **({"problem": visible(reason)} if reason else {}))
            self._notify()

    def add_problem(self, client: str, kind: str, reason: str, round: int | None = None) -> None:
        """Show what went wrong beside the updates of a round."""
        with self._changed:
            self._version += 1
            self._add_problem(round, client, kind, reason)
            if client:
                self._set_client(client, problem=visible(reason))
            self._notify()

    def serve(self) -> None:
        """Count connected clients from now on: this run's come and go."""
        with self._changed:
            self._head["connected"] = len(self._connected)
            self._notify()

    def set_state(self, state: State, text: str = "") -> None:
        """Say what the run does now, and why."""
        with self._changed:
            if (self._head["state"], self._head["text"]) != (state, visible(text)):
                self._head |= {"state": state, "text": visible(text), "phase": ""}
                self._notify()

    def close(self) -> None:
        """Say that nothing will change any more."""
        with self._changed:
            self.closed = True
            self._notify()

    def since(self, version: int) -> tuple[int, Mapping[str, Any]]:
        """Return the number of the last change, and all that has changed since another; since 0 everything."""
        with self._changed:
            rows = zip(self._rounds, self._round_versions, strict=True)
            content: dict[str, Any] = {
                "reset": version == 0,
                "head": {**self._head, "now": self._milliseconds()},
                "rounds": [row for row, changed in rows if changed > version],
                "clients": {name: one.row for name, one in self._clients.items() if one.version > version},
            }
            for name, values in (("problems", self._problems), ("notes", self._notes)):
                if self._versions[name] > version:
                    content[name] = list(values)
            return self._version, content

    def wait(self, version: int, seconds: float) -> bool:
        """Wait for a change after the given one, and return whether there is one, or the feed is closed."""
        with self._changed:
            return self._changed.wait_for(lambda: self._version > version or self.closed, seconds)

    def _start_round(self, round: int, rounds: int, cohort: Sequence[str]) -> None:
        self._version += 1
        self._answered = set()
        self._head |= {"state": "running", "text": "", "phase": "", "round": round, "rounds": rounds}
        self._head |= {"asked": len(cohort), "answered": 0, "round_began": self._milliseconds()}
        for client in cohort:
            self._set_client(client, state="at work", round=round)

    def _add_round(self, record: RoundRecord) -> None:
        self._version += 1
        if self._rounds and record.round <= self._rounds[-1]["n"]:
            return  # of a run whose earlier rounds were loaded from its directory
        self._rounds.append({**round_row(record), "at": self._milliseconds()})
        self._round_versions.append(self._version)
        for name, client in record.clients.items():
            earlier = self._clients.get(visible(name), Client()).row
            self._set_client(name, **client_after(earlier, record.round, client))
            if client.status != "ok":
                self._add_problem(record.round, name, client.status, client.reason)
        for reply in record.unsolicited:
            self._add_problem(record.round, reply.client, reply.kind, reply.reason)
        if record.round:
            self._recent.append(record.seconds)
        self._head |= {"round": record.round, "done": record.round, "phase": "", "round_began": self._milliseconds()}
        self._head["up"] += record.bytes_up
        self._head["down"] += record.bytes_down
        self._head["seconds"] = finite(median(self._recent)) if self._recent else None

    def _set_client(self, name: str, **values: Any) -> None:
        client = self._clients.setdefault(visible(name), Client())
        client.row, client.version = {**client.row, **values}, self._version
        if self._head["connected"] is not None:
            self._head["connected"] = len(self._connected)

    def _add_problem(self, round: int | None, client: str, kind: str, reason: str) -> None:
        if round is not None:
            if (round, client) in self._named:
                return  # a client may fail twice: when its update is late, and in the round's record
            self._named.add((round, client))
        row = {"round": round, "client": visible(client), "kind": kind, "reason": visible(reason)}
        self._problems.append({**row, "at": self._milliseconds()})
        self._versions["problems"] = self._version

    def _add_note(self, text: str) -> None:
        self._version += 1
        self._notes.append(visible(text))
        self._versions["notes"] = self._version

    def _notify(self) -> None:
        self._version += 1
        self._changed.notify_all()

    def _milliseconds(self) -> int:
        return int(1000 * self._now())
