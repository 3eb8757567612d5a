"""Trackers beside a run: each is sent the rounds by a thread of its own, and none can stop or delay the run."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from fedtune.rounds.events import Event, Note, RoundFinished, Watch
from fedtune.rounds.record import RoundRecord
from fedtune.store.round_records import read_rounds
from fedtune.tracking.sending import Sender
from fedtune.tracking.tracker import Ending, TrackerName

PAUSE_S = 1.0
"""Between two requests: rounds that end in the meantime travel together, as trackers limit requests and not numbers."""
END_S, STOP_S = 30.0, 5.0
"""How long a run that has ended waits for its trackers; and one that was stopped, whose user wants to leave."""


class Delivery:
    """One tracker's thread."""

    def __init__(
        self,
        name: TrackerName,
        run: Path,
        start: Callable[[], Sender],
        say: Callable[[str], None],
        *,
        pause_s: float = PAUSE_S,
    ) -> None:
        """Start nothing yet.

        Args:
            name: of the tracker.
            run: the run directory, whose earlier rounds are sent first.
            start: begins the run in the tracker.
            say: called from the thread with what there is to say.
            pause_s: between two requests, in seconds.
        """
        self._name, self._run, self._start, self._say, self._pause_s = name, run, start, say, pause_s
        self._changed = threading.Condition()
        self._records: list[RoundRecord] = []
        self._ending: Ending | None = None
        self._over = False
        # A daemon: a server that does not answer must not keep this process from ending.
        self._thread = threading.Thread(target=self._work, name=f"fedtune {name}", daemon=True)

    def put(self, record: RoundRecord) -> None:
        """Have a round sent, unless the tracker has failed before."""
        if self._thread.ident is None:
            self._thread.start()
        with self._changed:
            if not self._over:
                self._records.append(record)
                self._changed.notify_all()

    def end(self, ending: Ending) -> None:
        """Say that the run has ended."""
        with self._changed:
            self._ending = ending
            self._changed.notify_all()

    def wait(self, seconds: float) -> None:
        """Wait until the tracker has everything, though not for longer than that."""
        if self._thread.ident is None:
            return
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._say(f"{self._name}: no answer within {seconds:.0f} s; {advice(self._name, self._run)}")

    def _work(self) -> None:
        try:
            self._deliver()
        # Another package's code, and a network: whatever it raises, the run is worth more than its copy elsewhere.
        except Exception as error:
            self._say(f"{self._name}: {reason(error)}; the run is not tracked; {advice(self._name, self._run)}")
        finally:
            with self._changed:
                self._over, self._records = True, []

    def _deliver(self) -> None:
        sender = self._start()
        self._say(f"{self._name}: {sender.place}")
        sender.send(read_rounds(self._run))
        while True:
            sent_at = time.monotonic()
            records, ending = self._next()
            sender.send(records)
            if ending is not None:
                return sender.end(ending)
            with self._changed:
                rest = self._pause_s + sent_at - time.monotonic()
                self._changed.wait_for(lambda: self._ending is not None, max(0.0, rest))

    def _next(self) -> tuple[Sequence[RoundRecord], Ending | None]:
        """Wait for rounds or the end, and return both."""
        with self._changed:
            self._changed.wait_for(lambda: self._records or self._ending is not None)
            records, self._records = self._records, []
            return records, self._ending


@contextmanager
def follow(
    run: Path,
    names: Sequence[TrackerName],
    watch: Watch,
    *,
    title: str = "",
    clients: bool = False,
    result: Callable[[], Path] | None = None,
    starts: Callable[..., Sender] = Sender,
) -> Iterator[Watch]:
    """Give an observer of a run that sends each round to these trackers, until the block ends.

    A tracker that fails costs a note and is left alone from then on. What there is to say is said to `watch` in the
    run's own thread.

    Args:
        run: the run directory.
        names: of the trackers; without one, `watch` itself is given.
        watch: the observer to pass every event on to.
        title: of the run in the trackers; the folder's name without it.
        clients: whether they learn names and losses of single clients.
        result: returns the folder to send at the end; without it none is sent.
        starts: makes the sender of a tracker.
    """
    if not names:
        yield watch
        return
    notes: queue.SimpleQueue[str] = queue.SimpleQueue()
    deliveries = [
        Delivery(name, run, partial(starts, name, run, title=title, clients=clients), notes.put)
        for name in dict.fromkeys(names)
    ]

    def pass_on_notes() -> None:
        while not notes.empty():
            watch(Note(notes.get()))

    def observe(event: Event) -> None:
        if isinstance(event, RoundFinished):
            for delivery in deliveries:
                delivery.put(event.record)
        watch(event)
        pass_on_notes()

    ending = Ending("interrupted")
    try:
        yield observe
        ending = Ending("finished", result() if result else None)
    finally:
        for delivery in deliveries:
            delivery.end(ending)
        within = time.monotonic() + (END_S if ending.state == "finished" else STOP_S)
        for delivery in deliveries:
            delivery.wait(max(0.0, within - time.monotonic()))
        pass_on_notes()


def reason(error: Exception) -> str:
    r"""Return what went wrong in one line; packages write whole pages.

    >>> reason(OSError("no route to host\n\nsee ..."))
    'no route to host'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300].rstrip(".")


def advice(name: TrackerName, run: Path) -> str:
    return f"afterwards: fedtune report {run} --track {name}"
