"""The journal of rounds in a run directory: each step is durable before the next is taken, so any crash is harmless.

What is on the disk before what happens: `open` before the first assignment is sent, the updates before `accept` or
`close` names them, `close` before the round is aggregated, the state before `commit` names it, `commit` before the
round's line is written, and that line before the next `open`. Until then the round can be done again to the same bytes:
the state that it started from and its updates are not removed. `keep` names a state that stays longer, as that of the
best round; it is written while that state is the last one.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from fedtune.errors import StoreError
from fedtune.messages import Failure, Weight
from fedtune.methods.serialization import digest, why_not_finite
from fedtune.rounds.journal import Ask, InterruptedRound, OpenOrders, Probed
from fedtune.store import files
from fedtune.store.blobs import Blobs
from fedtune.store.history import History, replay_journal
from fedtune.store.journal import End, Journal
from fedtune.store.lock import lock_run
from fedtune.store.orders import Place, ask_fields, grouped_asks
from fedtune.store.round_records import last_line_digest, mend_rounds
from fedtune.store.run_directory import summary_digest

WRITING_SHARE = 0.05
"""Share of a round's time that may be spent on making each accepted update durable at once."""
GROUP_S = 1.0
"""Seconds: beyond that share, updates that arrive closer together are made durable together."""
GROUP_BYTES = 64 * 1024 * 1024
"""Waiting updates of this size together are made durable at any time: they are in memory until then."""


class RunJournal:
    """Implements `rounds.journal.AsyncJournal` in a run directory, whose lock `create` and `reopen` hold."""

    def __init__(self, run: Path, history: History, end: End, *, group_s: float, clock: Callable[[], float]) -> None:
        self._run, self._history = run, history
        self._journal, self._blobs = Journal(run / "journal", end), Blobs(run / "blobs")
        self._group_s, self._clock = group_s, clock
        self._opened_at = self._flushed_at = clock()
        self._flushing_s = 0.0
        """Time that this round's flushes took."""
        self._flush_s = 0.0
        """Time that the last flush took, which the next is expected to take."""
        self._waiting: list[tuple[str, bytes]] = []
        """Accepted updates that are not durable yet."""

    @classmethod
    @contextmanager
    def create(
        cls, run: Path, *, group_s: float = GROUP_S, clock: Callable[[], float] = time.monotonic
    ) -> Iterator[Self]:
        """Give the journal of a new run, which `begin` must start.

        Args:
            run: the run directory.
            group_s: seconds within which updates are made durable together, if that is what it takes to spend no more
                than `WRITING_SHARE` of a round on it; 0 makes each durable at once.
            clock: monotonic, in seconds; says when updates become durable and nothing else.

        Raises:
            StoreError: if another process writes the directory, or it holds a run.
        """
        with lock_run(run):
            history, end = replay_journal(run) if (run / "journal").exists() else (History(), End())
            if history.inputs:
                raise StoreError(
                    f"{run}: expected a new run; it holds one; pass --resume to continue it, --fresh to start another"
                )
            files.sweep(run)  # of a process that was killed before the run had begun
            with files.store_errors(run):
                files.sync_folder(run.resolve().parent)  # the run directory's own name
            with cls._writing(run, history, end, group_s, clock) as journal:
                yield journal

    @classmethod
    @contextmanager
    def reopen(
        cls, run: Path, *, group_s: float = GROUP_S, clock: Callable[[], float] = time.monotonic
    ) -> Iterator[Self]:
        """Give the journal of a run that is resumed after a crash, or after its end; `begin` must be called first.

        What a crash left half done is removed: the torn end of the journal and of rounds.jsonl, blobs that are not
        needed, and files that were not renamed into place. The arguments are those of `create`.

        Raises:
            StoreError: if another process writes the directory, or the journal is missing or damaged.
        """
        with lock_run(run):
            history, end = replay_journal(run)
            check_begun(run, history)
            files.sweep(run)
            mend_rounds(run)
            with cls._writing(run, history, end, group_s, clock) as journal:
                journal._blobs.sweep(history.needed().keys())
                yield journal

    @classmethod
    @contextmanager
    def _writing(
        cls, run: Path, history: History, end: End, group_s: float, clock: Callable[[], float]
    ) -> Iterator[Self]:
        journal = cls(run, history, end, group_s=group_s, clock=clock)
        try:
            yield journal
            journal.flush()
        except BaseException:
            # So that no client is asked again for an update that arrived before the run was stopped.
            if journal._journal.usable:
                with suppress(StoreError):
                    journal.flush()
            raise
        finally:
            journal._journal.close()

    @staticmethod
    def inputs(run: Path) -> Mapping[str, Any]:
        """Return what a run was started with; needs no lock.

        Raises:
            StoreError: if the folder holds no run that has begun, or its journal is damaged.
        """
        history, _ = replay_journal(run)
        check_begun(run, history)
        return history.inputs[0]

    @property
    def first(self) -> Mapping[str, Any]:
        """What the run was started with."""
        return self._history.inputs[0]

    @property
    def end(self) -> tuple[int, str]:
        """Number of the journal's records, and the SHA-256 (hex) of the last."""
        return self._journal.end.count, self._journal.end.head

    @property
    def begun(self) -> int:
        """Number of the last round that has begun, committed or not; 0 before the first."""
        return self._history.round.number if self._history.round else 0

    @property
    def committed(self) -> int:
        """Number of the last committed round; 0 before the first."""
        return self._history.committed

    def begin(self, inputs: Mapping[str, Any]) -> None:
        """Note what this process was started with: integers, strings, and lists or mappings of them.

        Raises:
            StoreError: if that cannot be written.
        """
        # A served run has its number before its journal: the one under which its sites know it.
        run = self._history.run or str(inputs.get("number", "")) or secrets.token_hex(8)
        self._note("start", {"run": run, "inputs": inputs})

    def resume(self, reported: int) -> bytes | None:
        """Return the encoded state to go on from; None for the method's first state.

        Args:
            reported: number of the last round whose line was written; 0 before the first.

        Raises:
            StoreError: if the journal does not hold the round that the lines end with, or its state is damaged.
        """
        history = self._history
        if reported != history.committed and not (history.repeatable and reported == history.committed - 1):
            raise self._wrong_last_line(reported)
        return self._blobs.get(history.digests[reported - 1], f"the state of round {reported}") if reported else None

    def interrupted_round(self, round: int) -> InterruptedRound | None:
        """Return a round that had begun: the open one, or the last committed one, if its line is missing.

        Raises:
            StoreError: if an update of it is missing or damaged.
        """
        current = self._history.open or self._history.repeatable
        if current is None or current.number != round:
            return None
        return InterruptedRound(
            cohort=current.cohort,
            digests=current.orders,
            updates=self._updates(current.updates),
            failures=current.failures,
            sizes=current.sizes,
            memory=current.memory,
            weights=current.weights,
            probes=current.probes,
        )

    def _updates(self, places: Mapping[str, Place]) -> Mapping[str, bytes]:
        needed = self._history.needed()
        blobs = {place.blob: b"" for place in places.values()}
        for name in blobs:
            blobs[name] = self._blobs.get(name, needed[name])
        return {
            client: blobs[place.blob][place.offset : place.offset + place.length] for client, place in places.items()
        }

    def open_orders(self, round: int) -> OpenOrders:
        """Return what is known of an asynchronous round's orders, and of those that earlier rounds have left.

        Raises:
            StoreError: if an update of them is missing or damaged.
        """
        current = self._history.open or self._history.repeatable
        if current is not None and (current.number != round or not current.asks):
            current = None
        sent = {**self._history.sent, **(current.settled if current else {})}
        updates = self._updates({name: one.update for name, one in sent.items() if one.update})
        earlier = grouped_asks(one for one in sent.values() if one.round < round)
        if current is None:
            return OpenOrders(earlier, updates=updates)
        asks = [
            # An ask without clients says as well that the round has begun.
            next(iter(grouped_asks(s for s in sent.values() if (s.round, s.ask) == (round, place))), Ask(round, now_s))
            for place, now_s in enumerate(current.asks)
        ]
        used = current.used if current.failures is not None else None
        return OpenOrders(earlier, asks, updates, used, current.failures or {}, current.sizes)

    def version(self, round: int) -> bytes:
        """Return the encoded state after a round that an order starts from which no round has settled.

        Raises:
            StoreError: if it is missing or damaged.
        """
        name = self._history.digests[round - 1]
        return self._blobs.get(name, f"the state of round {round}, which an order starts from")

    def ask(self, ask: Ask, *, state: str) -> None:
        """Note the orders of an asynchronous round before they are sent; the first of a round begins it.

        Raises:
            StoreError: if a client has an order already, the round before is not committed, or the directory cannot
                be written.
        """
        # What came before it must not be after it in the journal.
        self.flush()
        needed, begins = self._history.needed().keys(), self._history.open is None
        self._note("ask", {**ask_fields(ask), "state": state, **(self._line() if begins else {})})
        self._blobs.release(needed - self._history.needed().keys())
        if begins:
            self._opened_at = self._flushed_at = self._clock()
            self._flushing_s = 0.0

    def settle(
        self, round: int, used: Sequence[str], failures: Mapping[str, Failure], sizes: Mapping[str, int]
    ) -> None:
        """Note a round's buffer and whom it waits for no more, together with the updates that are not durable yet.

        Raises:
            StoreError: if a client of the buffer has no update, or the directory cannot be written.
        """
        reasons = {name: [why.kind, why.reason] for name, why in failures.items()}
        self._note_updates("settle", {"used": list(used), "failures": reasons, "sizes": sizes})

    def open(
        self,
        round: int,
        *,
        state: str,
        cohort: Mapping[str, int],
        digests: Mapping[str, str],
        memory: Mapping[str, int] | None = None,
        weights: Mapping[str, Weight] | None = None,
        probes: Mapping[str, Probed] | None = None,
    ) -> None:
        """Note the start of a round, then remove the blobs that only a repetition of the round before would need.

        Raises:
            StoreError: if the round before is not committed, or the directory cannot be written.
        """
        needed = self._history.needed().keys()
        # Without reported memory the record has the bytes that releases before 0.2.0 wrote.
        reported: dict[str, Any] = {"memory": memory} if memory else {}
        if weights:
            reported["weights"] = {name: [weight.examples, weight.uniform] for name, weight in weights.items()}
        if probes:
            # As texts, which give every bit of a number again: records hold no fractions.
            reported["probes"] = {
                name: ["" if value is None else repr(value) for value in seconds] for name, seconds in probes.items()
            }
        fields = {"round": round, "state": state, "cohort": cohort, "orders": digests, **reported}
        self._note("open", {**fields, **self._line()})
        self._blobs.release(needed - self._history.needed().keys())
        self._opened_at = self._flushed_at = self._clock()
        self._flushing_s = 0.0

    def accept(self, round: int, client: str, update: bytes) -> None:
        """Store an update: at once while that takes a small share of the round's time, otherwise with the next ones.

        So an update can be lost in a crash only in a round that is short compared with its flushes, where the clients
        can soon repeat it. In rounds of slow clients every update is durable at once, also those that arrive together.

        Raises:
            StoreError: if the directory cannot be written.
        """
        self._waiting.append((client, update))
        now = self._clock()
        cheap = self._flushing_s + self._flush_s <= WRITING_SHARE * (now - self._opened_at)
        late = now - self._flushed_at >= self._group_s
        if cheap or late or sum(len(update) for _, update in self._waiting) >= GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        """Make every accepted update durable.

        Raises:
            StoreError: if the directory cannot be written.
        """
        if self._waiting:
            began = self._clock()
            self._note_updates("accept", {})
            self._flushed_at = self._clock()
            self._flush_s = self._flushed_at - began
            self._flushing_s += self._flush_s

    def close(self, round: int, failures: Mapping[str, Failure], sizes: Mapping[str, int]) -> None:
        """Note that the round no longer waits for clients, together with the updates that are not durable yet.

        Unsolicited replies are not noted: a crash after this loses them, and nothing is computed from them.

        Raises:
            StoreError: if a client has neither an update nor a failure, or the directory cannot be written.
        """
        reasons = {name: [why.kind, why.reason] for name, why in failures.items()}
        self._note_updates("close", {"failures": reasons, "sizes": sizes})

    def commit(self, round: int, state: Sequence[bytes | memoryview]) -> str:
        """Store the state after the round and return its digest; a repeated round must give the same state.

        A state that is not finite, which releases before 0.3.0 committed, is replaced by what its repetition gives.

        Raises:
            StoreError: if the repeated round gives another state, or the directory cannot be written.
        """
        if self._history.repeatable and round == self._history.committed:
            noted, repeated = self._history.digests[-1], digest(state)
            if repeated != noted and self.why_not_finite(round):
                needed = self._history.needed().keys()
                self._note("commit", {"round": round, "state": self._blobs.put(state), "replaces": noted})
                self._blobs.release(needed - self._history.needed().keys())
            elif repeated != noted:
                raise StoreError(
                    f"{self._run}: round {round}: expected the state {noted[:12]}, which the journal notes; "
                    f"got {repeated[:12]} when done again; "
                    "resume with the versions and the threads that the run was started with"
                )
            return repeated
        name = self._blobs.put(state)  # durable before the record that names it
        self._note("commit", {"round": round, "state": name})
        return name

    @property
    def kept_round(self) -> int:
        """Number of the round whose state is kept beside the last one; 0 for none."""
        return self._history.kept_round

    def keep(self, round: int) -> None:
        """Keep the state of the last committed round from now on, in place of the one that was kept before.

        Raises:
            StoreError: if it is another round, or that cannot be written.
        """
        if round != self._history.kept_round:
            needed = self._history.needed().keys()
            self._note("keep", {"round": round})
            self._blobs.release(needed - self._history.needed().keys())

    def state(self, round: int) -> bytes:
        """Return the encoded state after a round that is the last one or kept.

        Raises:
            StoreError: if it is missing or damaged.
        """
        return self._blobs.get(self._history.digests[round - 1], f"the state of round {round}")

    def why_not_finite(self, round: int) -> str:
        """Return which tensor of the state after a round is not finite; empty if all are, or it is no state at all.

        Raises:
            StoreError: if the state is missing or damaged.
        """
        data = self.state(round)
        with suppress(StoreError):
            return why_not_finite(data)
        return ""

    def finish(self, reported: int) -> None:
        """Note that the last round's line is written, and remove the blobs that only its repetition would need.

        More rounds may follow.

        Args:
            reported: number of the last round whose line was written; 0 before the first.

        Raises:
            StoreError: if a round is open or has no line yet, or the directory cannot be written.
        """
        if reported != self.committed:
            raise self._wrong_last_line(reported)
        summary = summary_digest(self._run)
        if not self._history.finished or self._history.summary != summary:
            needed = self._history.needed().keys()
            noted = {"summary": summary} if summary else {}
            self._note("final", {"round": self._history.committed, **self._line(), **noted})
            self._blobs.release(needed - self._history.needed().keys())

    def _line(self) -> Mapping[str, str]:
        """Return the digest of the last round's line, as records note it once the line stays as it is."""
        digest = last_line_digest(self._run)
        return {"line": digest} if digest else {}

    def _note_updates(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Store the waiting updates in one blob, and append one record with their places in it.

        One record, so that what a crash leaves of it is the journal's end and can be cut off: of several records the
        disk might hold a later one without an earlier one.
        """
        updates, offset = [], 0
        for client, update in self._waiting:
            updates.append([client, offset, len(update)])
            offset += len(update)
        blob = self._blobs.put([update for _, update in self._waiting]) if self._waiting else ""
        number = self._history.open.number if self._history.open else 0
        self._note(kind, {"round": number, "blob": blob, "updates": updates, **fields})
        self._waiting.clear()

    def _note(self, kind: str, fields: Mapping[str, Any]) -> None:
        # Applied before it is written: the journal never holds a record that could not be replayed.
        try:
            self._history.apply(kind, fields)
        except StoreError as error:
            raise StoreError(f"{self._run}: {error}") from error
        self._journal.append(kind, fields)

    def _wrong_last_line(self, reported: int) -> StoreError:
        return StoreError(
            f"{self._run}: expected rounds.jsonl to end with round {self.committed}, as the journal does; "
            f"got {reported}; put back a copy of the run directory, or start the run again with --fresh"
        )


def check_begun(run: Path, history: History) -> None:
    if not history.inputs:
        raise StoreError(
            f"{run}: expected a run that has begun; it was stopped before that; start it again with --fresh"
        )
