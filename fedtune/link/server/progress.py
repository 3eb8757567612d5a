"""How far clients are with their tasks: what rises is progress, and a client without any for long is lost."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from fedtune.wire.v1 import link_pb2 as pb

LEAST_CPU_MS = 1000
"""Of computation that count as progress: a thread that only wakes up now and then computes less than that."""


@dataclass(frozen=True)
class TaskProgress:
    """How far a client says that it is with a task."""

    phase: pb.Progress.Phase
    done: int
    total: int
    """0: not known."""
    cpu_ms: int


@dataclass
class Peak:
    """The furthest that a client has come with a task."""

    done: int
    total: int
    cpu_ms: int

    def rise(self, said: TaskProgress) -> bool:
        """Take what a client says; return whether it is further than before."""
        # The first total counts: with a new one in each call a client could go on for ever.
        self.total = self.total or said.total
        steps = self.done < said.done <= (self.total or said.done)
        computes = said.cpu_ms >= self.cpu_ms + LEAST_CPU_MS
        if steps:
            self.done = said.done
        if computes:
            self.cpu_ms = said.cpu_ms
        return steps or computes


class Progress:
    """Progress by client; not thread-safe, the dispatcher calls it with its lock held."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Begin with no client; `clock` returns seconds from any start."""
        self._clock = clock
        self._rose_at: dict[str, float] = {}
        self._said: dict[str, dict[bytes, TaskProgress]] = {}  # by client and task
        self._peaks: dict[str, dict[bytes, Peak]] = {}
        self._processes: dict[str, int] = {}
        self._sizes: dict[str, dict[bytes, int]] = {}  # most bytes of a part that have travelled, by client and digest

    def hear(self, client: str, process: int, task: bytes, said: TaskProgress) -> None:
        """Take what a process of a client says of an open task."""
        if self._processes.setdefault(client, process) != process:
            # A new process begins its tasks anew, below what the one before had done; to begin is no progress.
            self._processes[client] = process
            self._peaks.pop(client, None)
        self._said.setdefault(client, {})[task] = said
        # Of bytes that travel the server knows itself how many there are.
        if said.phase == pb.Progress.WORKING:
            # What it has computed before is no progress with this task.
            peak = self._peaks.setdefault(client, {}).setdefault(task, Peak(0, said.total, said.cpu_ms))
            if peak.rise(said):
                self.note(client)

    def note_bytes(self, client: str, part: bytes, num_bytes: int) -> int:
        """Note how many bytes of a part have travelled, in either direction; return how many more than before.

        The same bytes again are no progress.
        """
        sizes = self._sizes.setdefault(client, {})
        if (gained := num_bytes - sizes.get(part, 0)) <= 0:
            return 0
        sizes[part] = num_bytes
        self.note(client)
        return gained

    def note(self, client: str) -> None:
        """Note that a client has come further, or that it waits for the server alone."""
        self._rose_at[client] = self._clock()

    def retain(self, client: str, tasks: Collection[bytes]) -> None:
        """Forget all tasks of a client but these, which are open."""
        for task in self._said.get(client, {}).keys() - set(tasks):
            del self._said[client][task]
            self._peaks.get(client, {}).pop(task, None)
        if not tasks:
            self._sizes.pop(client, None)

    def idle_s(self, client: str, *, since: float) -> float:
        """Return the seconds for which a client has come no further; before its task was posted they do not count."""
        return self._clock() - max(since, self._rose_at.get(client, since))

    def of(self, client: str) -> TaskProgress | None:
        """Return how far a client is with the task that it has begun last; None if it has said nothing."""
        tasks = self._said.get(client)
        return next(reversed(tasks.values())) if tasks else None
