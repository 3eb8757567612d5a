"""The state of a run that follows from its journal: every record is checked against those before it, then applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.errors import StoreError
from fedtune.messages import Failure, Weight
from fedtune.rounds.journal import Probed
from fedtune.store import journal, orders
from fedtune.store.journal import End, Record
from fedtune.store.orders import Place, Sent


@dataclass
class Round:
    """A round that has begun."""

    number: int
    state: str
    """Digest of the state that it starts from."""
    cohort: Mapping[str, int]
    """Clients by name, with the examples they had enrolled."""
    orders: Mapping[str, str]
    """SHA-256 (hex) of each client's assignment, or `unfit`."""
    updates: dict[str, Place] = field(default_factory=dict)
    """Accepted updates by client, in the order of their arrival."""
    failures: Mapping[str, Failure] | None = None
    """Why the others are not used; None while the round waits for them."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Bytes received from each client that failed."""
    memory: Mapping[str, int] = field(default_factory=dict)
    """Main memory in bytes, of the clients that reported it."""
    weights: Mapping[str, Weight] = field(default_factory=dict)
    """Of the clients whose weight is not their examples alone."""
    probes: Mapping[str, Probed] = field(default_factory=dict)
    """How fast those clients are that measured it."""
    asks: list[float] = field(default_factory=list)
    """Of an asynchronous round: the seconds of the run at each of its asks; empty for other rounds."""
    settled: Mapping[str, Sent] = field(default_factory=dict)
    """Of the same, once its buffer is full: the orders that it has settled, by client."""
    used: Sequence[str] = ()
    """Clients of that buffer."""

    @property
    def missing(self) -> Sequence[str]:
        """Clients that the round still waits for, in the order of the cohort."""
        return [] if self.failures is not None else [name for name in self.cohort if name not in self.updates]


@dataclass
class History:
    """What a run has done so far."""

    run: str = ""
    """Identifier of the run, drawn at its start."""
    inputs: list[Mapping[str, Any]] = field(default_factory=list)
    """Recipe, digests and versions that each process of the run was started with."""
    digests: list[str] = field(default_factory=list)
    """SHA-256 (hex) of the states after rounds 1, 2, ..."""
    round: Round | None = None
    """The last round that has begun; it may be committed."""
    finished: bool = False
    kept_round: int = 0
    """Round whose state stays until another one takes its place; 0 for none."""
    lines: dict[int, str] = field(default_factory=dict)
    """By round, the SHA-256 (hex) of its line of rounds.jsonl, noted once it can not be written again."""
    summary: str = ""
    """SHA-256 (hex) of summary.json; empty while it may be written again."""
    sent: dict[str, Sent] = field(default_factory=dict)
    """Of an asynchronous run: the orders that no round has settled, by client."""

    @property
    def committed(self) -> int:
        """Number of the last committed round; 0 before the first."""
        return len(self.digests)

    @property
    def open(self) -> Round | None:
        """The round that has begun and is not committed."""
        return self.round if self.round is not None and self.round.number > self.committed else None

    @property
    def repeatable(self) -> Round | None:
        """The last committed round, while its first state and updates are still there: until another round begins."""
        return None if self.open or self.finished else self.round

    @property
    def missing(self) -> Sequence[str]:
        """Clients that are waited for, in the order of the cohort, or in which they were asked."""
        if self.open and self.open.asks:
            return [name for name, order in self.sent.items() if order.update is None and self.open.failures is None]
        return self.open.missing if self.open else []

    def needed(self) -> Mapping[str, str]:
        """Return the blobs that must be there, by name, with a description of each."""
        # While the last round may be repeated, the state that it started from must stay as well.
        states = [self.committed - 1, self.committed] if self.repeatable else [self.committed]
        needed = {self.digests[number - 1]: f"the state of round {number}" for number in states if number > 0}
        if self.kept_round:
            needed.setdefault(self.digests[self.kept_round - 1], f"the state of round {self.kept_round}, the best one")
        current = self.open or self.repeatable
        needed |= self._needed_by_orders(current)
        if current is not None:
            members: dict[str, list[str]] = {}
            for client, place in current.updates.items():
                members.setdefault(place.blob, []).append(client)
            for blob, names in members.items():
                few = ", ".join(names[:5]) + ", ..." * (len(names) > 5)
                needed[blob] = f"the update of {few} in round {current.number}"
        return needed

    def _needed_by_orders(self, current: Round | None) -> Mapping[str, str]:
        """Return the states that orders start from which may be sent again, and the updates that answer them."""
        needed = {}
        for name, order in [*self.sent.items(), *(current.settled.items() if current else ())]:
            if order.round > 1:
                needed[self.digests[order.round - 2]] = (
                    f"the state of round {order.round - 1}, which {name} starts from"
                )
            if order.update:
                needed[order.update.blob] = f"the update of {name} in round {order.round}"
        return needed

    def apply(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Apply one record, or raise and leave everything unchanged.

        Raises:
            StoreError: if it cannot follow the records before it.
        """
        step = STEPS.get(kind)
        if step is None:
            raise StoreError(
                f"expected a record of the kinds {', '.join(STEPS)}; got {kind!r}; use the fedtune that wrote it"
            )
        if not self.inputs and kind != "start":
            raise StoreError(f"expected a journal to begin with start; got {kind}")
        try:
            step(self, fields)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(
                f"expected the fields of {kind}; got {sorted(fields)} ({error!r}); use the fedtune that wrote it"
            ) from error


def start(history: History, fields: Mapping[str, Any]) -> None:
    run, inputs = fields["run"], dict(fields["inputs"])
    if history.run not in ("", run):  # journals of two runs mixed by hand
        raise StoreError(f"expected the run {history.run}; got {run}")
    history.run, history.summary = run, ""
    history.inputs.append(inputs)


def begin(history: History, fields: Mapping[str, Any]) -> None:
    number, state = fields["round"], fields["state"]
    check_beginning(history, number, state)
    if history.sent:
        raise StoreError(f"expected an asynchronous round, while {min(history.sent)} works; got one that waits for all")
    cohort, digests = dict(fields["cohort"]), dict(fields["orders"])
    if cohort.keys() != digests.keys():
        raise StoreError(f"expected an assignment for each client of {sorted(cohort)}; got {sorted(digests)}")
    memory = {str(name): int(num_bytes) for name, num_bytes in fields.get("memory", {}).items()}
    weights = {
        str(name): Weight(int(examples), int(uniform))
        for name, (examples, uniform) in fields.get("weights", {}).items()
    }
    if any(min(weight.examples, weight.uniform) < 1 for weight in weights.values()):
        raise ValueError("weights")
    probes = {str(name): read_probe(seconds) for name, seconds in fields.get("probes", {}).items()}
    note_line(history, fields, number - 1)
    history.round = Round(number, state, cohort, digests, memory=memory, weights=weights, probes=probes)
    history.finished = False


def check_beginning(history: History, number: int, state: str) -> None:
    """Raise a StoreError unless a round may begin now, from a state."""
    last = history.committed
    if history.open or number != last + 1:
        raise StoreError(f"expected round {last + 1} to begin once, after round {last} is committed; got {number}")
    if history.digests and state != history.digests[-1]:
        raise StoreError(
            f"expected round {number} to start from the state {history.digests[-1][:12]}; got {state[:12]}"
        )


def ask(history: History, fields: Mapping[str, Any]) -> None:
    number, state, current = fields["round"], fields["state"], history.open
    if current is None:
        check_beginning(history, number, state)
        sent = orders.read_ask(fields, 0, history.sent)
        note_line(history, fields, number - 1)
        history.round = Round(number, state, {}, {}, asks=[float(fields["now"])])
        history.finished = False
    else:
        if not waiting(history, fields).asks or state != current.state:
            raise StoreError(f"expected round {current.number} to ask clients, from its state; got {state[:12]}")
        sent = orders.read_ask(fields, len(current.asks), history.sent)
        current.asks.append(float(fields["now"]))
    history.sent |= sent


def settle(history: History, fields: Mapping[str, Any]) -> None:
    # Everything is checked before anything is assigned: a record that is refused must leave no trace.
    current = waiting(history, fields)
    if not current.asks:
        raise StoreError("expected an asynchronous round to settle a buffer; got one that waits for its cohort")
    sent = {**history.sent, **orders.with_updates(history.sent, fields)}
    failures, sizes = read_failures(fields)
    used = [str(name) for name in fields["used"]]
    orders.check_settled(sent, used, failures)
    current.settled = {name: sent[name] for name in (*used, *failures)}
    current.used, current.failures, current.sizes = used, failures, sizes
    history.sent = {name: order for name, order in sent.items() if name not in current.settled}


def read_probe(seconds: Any) -> Probed:
    """Return the two speeds of a client; raises ValueError if they are none."""
    s_per_tflop, s_per_mb = (float(value) if value else None for value in seconds)
    return s_per_tflop, s_per_mb


def accept(history: History, fields: Mapping[str, Any]) -> None:
    current = waiting(history, fields)
    if current.asks:
        history.sent |= orders.with_updates(history.sent, fields)
        return
    current.updates |= places(current, fields)


def close(history: History, fields: Mapping[str, Any]) -> None:
    # Everything is checked before anything is assigned: a record that is refused must leave no trace.
    current = waiting(history, fields)
    if current.asks:
        raise StoreError("expected an asynchronous round to settle a buffer; got one that is closed")
    updates = {**current.updates, **places(current, fields)}
    failures, sizes = read_failures(fields)
    if updates.keys() & failures.keys() or updates.keys() | failures.keys() != current.cohort.keys():
        raise StoreError(
            f"expected an update or a failure of each client of {sorted(current.cohort)}; "
            f"got updates of {sorted(updates)}, failures of {sorted(failures)}"
        )
    current.updates, current.failures, current.sizes = updates, failures, sizes


def read_failures(fields: Mapping[str, Any]) -> tuple[Mapping[str, Failure], Mapping[str, int]]:
    """Return why clients of a round are not used, and the bytes that came from each of them."""
    failures = {name: Failure.from_text(name, reason, kind=kind) for name, (kind, reason) in fields["failures"].items()}
    sizes = {name: int(num_bytes) for name, num_bytes in fields["sizes"].items()}
    if sizes.keys() != failures.keys():
        raise StoreError(f"expected the bytes that came from each of {sorted(failures)}; got those of {sorted(sizes)}")
    return failures, sizes


def commit(history: History, fields: Mapping[str, Any]) -> None:
    if "replaces" in fields:
        # Only while the round can be repeated: its state is not sent to anyone before the next one opens.
        last = history.digests[-1:]
        if not history.repeatable or history.committed != fields["round"] or last != [fields["replaces"]]:
            raise StoreError(f"expected the state of the last round to be replaced; got round {fields['round']}")
        history.digests[-1] = str(fields["state"])
        return
    current = history.open
    if current is None or current.number != fields["round"] or current.failures is None:
        raise StoreError(f"expected a round to be closed before it is committed; got round {fields['round']}")
    history.digests.append(str(fields["state"]))


def finish(history: History, fields: Mapping[str, Any]) -> None:
    if history.open or fields["round"] != history.committed:
        raise StoreError(f"expected a run to end after round {history.committed}; got {fields['round']}")
    note_line(history, fields, history.committed)
    history.finished, history.summary = True, str(fields.get("summary", ""))
    # Who still works then is not waited for: more rounds would ask all anew.
    history.sent.clear()


def note_line(history: History, fields: Mapping[str, Any], number: int) -> None:
    """Note the digest of a round's line; releases before 0.3.0 wrote none."""
    if line := fields.get("line"):
        history.lines[number] = str(line)


def keep(history: History, fields: Mapping[str, Any]) -> None:
    # Only of the last state, or of one that is kept already: any other one may have been removed.
    if history.open or fields["round"] not in (history.committed, history.kept_round) or not fields["round"]:
        raise StoreError(f"expected to keep the state of round {history.committed}; got round {fields['round']}")
    history.kept_round = fields["round"]


STEPS = {
    "start": start,
    "open": begin,
    "accept": accept,
    "close": close,
    "ask": ask,
    "settle": settle,
    "commit": commit,
    "final": finish,
    "keep": keep,
}
"""The function that applies each kind of record."""


def waiting(history: History, fields: Mapping[str, Any]) -> Round:
    """Return the open round, which must be the record's and still wait for clients."""
    current = history.open
    if current is None or current.number != fields["round"] or current.failures is not None:
        raise StoreError(f"expected a round that waits for clients; got round {fields['round']}")
    return current


def places(current: Round, fields: Mapping[str, Any]) -> Mapping[str, Place]:
    """Return where the updates that a record accepts are stored, by client."""
    stored: dict[str, Place] = {}
    for client, offset, length in fields["updates"]:
        if client not in current.cohort or client in current.updates or client in stored:
            raise StoreError(f"expected one update of each client in {sorted(current.cohort)}; got another of {client}")
        stored[client] = Place(fields["blob"], offset, length)
    return stored


def has_begun(run: Path) -> bool:
    """Return whether a run has begun: if not, it was killed before that, and there is nothing to resume.

    Raises:
        StoreError: if the journal is damaged.
    """
    return (run / "journal").exists() and bool(replay_journal(run)[0].inputs)


def replay_journal(run: Path) -> tuple[History, End]:
    """Return what a run has done according to its journal, and where the records end; safe beside the run's writer.

    Raises:
        StoreError: if there is none, or naming the first record that cannot be trusted.
    """
    path, history = run / "journal", History()
    if not path.exists():
        raise StoreError(f"{run}: expected a run that can be resumed; got a folder without a journal; start a new run")

    def apply(record: Record) -> None:
        try:
            history.apply(record.kind, record.fields)
        except StoreError as error:
            raise StoreError(f"{path}, record {record.n} ({record.kind}): {error}") from error

    return history, journal.read(path, apply)
