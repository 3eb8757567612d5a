"""What clients say of their tasks when they ask for more: how far they are, and which they do not believe."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from fedtune.link.audit_log import RecordEvent
from fedtune.link.rejections import reason_name
from fedtune.link.server.assignments import Task, is_hello
from fedtune.link.server.presence import Presence
from fedtune.link.server.progress import Progress, TaskProgress
from fedtune.wire.v1 import link_pb2 as pb

PHASES = {
    pb.Progress.FETCHING: "fetching",
    pb.Progress.WORKING: "working",
    pb.Progress.SENDING: "sending",
    pb.Progress.WAITING: "paused at",
}
LARGEST = 2**53
"""Of a number that a client says of its progress: a status in JSON keeps it exactly."""


class Reports:
    """Reports by client; not thread-safe, the dispatcher calls it with its lock held."""

    def __init__(self, presence: Presence, record: RecordEvent, clock: Callable[[], float], *, lost_s: float) -> None:
        """Begin without reports.

        Args:
            presence: of the clients.
            record: receives the events.
            clock: seconds from any start.
            lost_s: without progress, after which a round waits for a client no longer.
        """
        self._presence, self._record, self._lost_s = presence, record, lost_s
        self.progress = Progress(clock)
        self._dropped: dict[str, tuple[bytes, str]] = {}  # by client: the last task that it does not believe, and why

    def hear(
        self,
        client: str,
        process: int,
        open_tasks: Collection[bytes],
        progress: Sequence[pb.Progress],
        dropped: Sequence[pb.Dropped],
    ) -> None:
        """Take what a process of a client says; of tasks that are not open it is ignored."""
        self.progress.retain(client, open_tasks)
        if (last := self._dropped.get(client)) is not None and last[0] not in open_tasks:
            del self._dropped[client]
        for said in progress:
            if said.order in open_tasks:
                numbers = (min(LARGEST, number) for number in (said.done, said.total, said.cpu_ms))
                self.progress.hear(client, process, said.order, TaskProgress(said.phase, *numbers))
        for task in dropped:
            # Said again with every call: once is enough for a log.
            code = reason_name(task.reason)
            if task.order in open_tasks and self._dropped.get(client) != (task.order, code):
                self._dropped[client] = task.order, code
                reason = "it does not believe its task; its roster may have ended, or be another than the server's"
                self._record("dropped", client=client, order=task.order.hex(), code=code, reason=reason)

    def lost_reason(self, task: Task) -> str:
        """Return why a round waits for a client's reply no longer; empty if it does."""
        client, since = task.client, task.posted
        if self._presence.is_lost(client, since=since):
            return f"no sign of life for {self._presence.silence_s(client, since=since):.0f} s"
        idle_s = self.progress.idle_s(client, since=since)
        # A hello waits for the base to be loaded, and no round for a hello.
        if is_hello(task) or idle_s <= self._lost_s:
            return ""
        if client in self._dropped:
            return f"it drops its tasks for {idle_s:.0f} s ({self._dropped[client][1]})"
        said = self.describe(client) or "it says nothing of its work; releases before 0.3 do not"
        return f"no progress for {idle_s:.0f} s, though it asks ({said})"

    def describe(self, client: str) -> str:
        """Return how far a client is with its work, in words; empty if it has said nothing."""
        if (said := self.progress.of(client)) is None:
            return ""
        of = f" of {said.total}" if said.total else ""
        unit = "step " if said.phase in (pb.Progress.WORKING, pb.Progress.WAITING) else ""
        number = f" {unit}{said.done}{of}" if said.done or said.total else ""
        return f"{PHASES.get(said.phase, 'preparing')}{number}{'' if unit else ' bytes' if number else ''}"
