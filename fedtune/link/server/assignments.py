"""Open tasks by client, the bytes that belong to them, and the results that the round loop has not collected yet."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TypeAlias

from fedtune.link import uploads
from fedtune.link.envelopes import EVALUATE, HELLO, RESULT, TRAIN, UPDATE
from fedtune.link.rejections import rejection
from fedtune.link.settings import KIB
from fedtune.wire.v1 import link_pb2 as pb

Body: TypeAlias = bytes | memoryview
"""Bytes of a part; a view of a mapped file where the part was pushed."""
MAX_INLINE_BYTES = 512 * KIB
"""Of all parts that travel within one `Work` message: with its header far below the 2 MiB that a client receives."""


@dataclass
class Task:
    """A signed task of one client, open as long as its reply can still be used."""

    client: str
    digest: bytes
    envelope: pb.Envelope
    header: pb.Header
    max_reply_bytes: int
    """An honest reply is never larger."""
    deadline: float
    """On the dispatcher's clock; the round loop does not wait longer."""
    posted: float
    message_ids: list[str] = field(default_factory=list)
    """Under which the round loop waits for the reply: one for each time it asked."""
    reply: TaskReply | None = None

    @property
    def is_answered(self) -> bool:
        """Whether all bytes of a reply are here."""
        return self.reply is not None and self.reply.is_whole

    @property
    def has_receipt(self) -> bool:
        return self.reply is not None and self.reply.receipt is not None


@dataclass
class TaskReply:
    """What has arrived of a client's reply to a task."""

    digest: bytes
    header: pb.Header
    bodies: dict[bytes, Body] = field(default_factory=dict)
    """Whole parts by digest."""
    is_whole: bool = False
    receipt: pb.Envelope | None = None


@dataclass(frozen=True)
class ReceivedParts:
    """A whole reply, for the round loop."""

    client: str
    bodies: Mapping[str, Body]
    """By key."""


@dataclass(frozen=True)
class Withdrawn:
    """A task that will have no reply."""

    client: str
    reason: str


Result: TypeAlias = ReceivedParts | Withdrawn


class Assignments:
    """The open tasks of a run; not thread-safe, the dispatcher calls it with its lock held."""

    def __init__(self, folder: Path, *, inline_bytes: int) -> None:
        """Begin without tasks.

        Args:
            folder: where pushed parts of replies lie.
            inline_bytes: up to which a part travels with its task.
        """
        self._folder, self._inline_bytes = folder, inline_bytes
        self._tasks: dict[str, dict[bytes, Task]] = {}  # by client and task digest
        self._bodies: dict[bytes, Body] = {}  # of open tasks, by digest
        self._waiting: dict[str, Task] = {}  # by message id: not collected yet
        self._results: dict[str, Result] = {}  # by message id: ready to be collected
        self._numbers = count()

    def of_client(self, client: str) -> Sequence[Task]:
        # A copy: callers close tasks while they go through it.
        return list(self._tasks.get(client, {}).values())

    def all(self) -> Sequence[Task]:
        return [task for tasks in list(self._tasks.values()) for task in list(tasks.values())]

    def get(self, client: str, digest: bytes) -> Task | None:
        return self._tasks.get(client, {}).get(digest)

    def add(self, task: Task, contents: Mapping[str, Body]) -> Task:
        """Open a task with the bytes of its parts by key; returns the open one if its digest is the same."""
        # The open task, if it is the same one: what has arrived of its reply stays.
        task = self._tasks.setdefault(task.client, {}).setdefault(task.digest, task)
        self._bodies |= {part.digest: contents[part.key] for part in task.header.parts}
        return task

    def new_message_id(self, task: Task) -> str:
        """Return a new id under which the round loop waits for the task's reply."""
        # The counter keeps ids apart when a task is asked again: the decline of the first question, not collected
        # yet, must not be taken for the reply to the second.
        message_id = f"{task.digest.hex()}.{next(self._numbers)}"
        task.message_ids.append(message_id)
        self._waiting[message_id] = task
        return message_id

    def waiting_task(self, message_id: str) -> Task | None:
        """Return the task of a message id without a result; None if it has one or is not known."""
        return None if message_id in self._results else self._waiting.get(message_id)

    def set_result(self, task: Task, result: Result) -> None:
        """Have a result ready for every message id under which the task is waited for."""
        for message_id in task.message_ids:
            if message_id in self._waiting:
                self._results[message_id] = result

    def withdraw(self, message_id: str, task: Task, reason: str) -> None:
        """Have a withdrawal ready for one message id."""
        self._results[message_id] = Withdrawn(task.client, reason)

    def end_waiting(self, task: Task, reason: str) -> None:
        """Withdraw a task and forget that anything waits for it: later results for its message ids are dropped."""
        for message_id in task.message_ids:
            if self._waiting.pop(message_id, None) is not None:
                self.withdraw(message_id, task, reason)

    def collect(self, message_ids: Collection[str]) -> Mapping[str, Result]:
        """Return the results that are ready, and forget them."""
        results = {
            message_id: self._results.pop(message_id) for message_id in message_ids if message_id in self._results
        }
        for message_id in results:
            self._waiting.pop(message_id, None)
        return results

    def work(self, task: Task, *, left_s: float) -> pb.Work:
        """Return a task as it is offered to its client, with the parts that are small enough to travel with it."""
        inline, left = list[pb.Inline](), MAX_INLINE_BYTES
        for part in task.header.parts:
            if part.num_bytes <= min(self._inline_bytes, left):
                inline.append(pb.Inline(digest=part.digest, data=bytes(self._bodies[part.digest])))
                left -= part.num_bytes
        return pb.Work(order=task.envelope, inline=inline, left_ms=int(1000 * left_s))

    def body(self, client: str, digest: bytes) -> Body:
        """Return a part of an open task of a client.

        Raises:
            RejectionError: if no open task of this client has such a part, whatever other clients' tasks have.
        """
        # By this client's own tasks: a digest seen elsewhere must not fetch what another client was sent.
        if not any(part.digest == digest for task in self.of_client(client) for part in task.header.parts):
            raise rejection(pb.NOT_WANTED, "digest", "a part of an open task of this client", digest[:16].hex())
        return self._bodies[digest]

    def missing_part(self, client: str, reply: bytes, digest: bytes) -> pb.Part:
        """Return the part of a client's reply whose bytes are not here yet.

        Raises:
            RejectionError: if no such bytes are expected.
        """
        for task in self.of_client(client):
            if task.reply is not None and task.reply.digest == reply and not task.reply.is_whole:
                for part in task.reply.header.parts:
                    if part.digest == digest and digest not in task.reply.bodies:
                        return part
        raise rejection(pb.NOT_WANTED, "digest", "a part that the server has asked for", digest[:16].hex())

    def close(self, task: Task) -> None:
        """Forget a task, its files, and the bodies that no other task needs."""
        self._tasks.get(task.client, {}).pop(task.digest, None)
        self.remove_files(task)
        # Clients of a round share bodies: only the last task that names one frees it.
        needed = {part.digest for other in self.all() for part in other.header.parts}
        for part in task.header.parts:
            if part.digest not in needed:
                self._bodies.pop(part.digest, None)

    def remove_files(self, task: Task) -> None:
        """Remove from the disk what has arrived of a task's reply."""
        if task.reply is not None:
            for part in task.reply.header.parts:
                uploads.part_path(self._folder, task.client, part.digest).unlink(missing_ok=True)


def is_hello(task: Task) -> bool:
    return task.header.task == HELLO


def is_training(task: Task) -> bool:
    return task.header.task == TRAIN


def check_parts(task: Task, header: pb.Header) -> None:
    """Check that a reply has the parts that its task allows, before a byte of them is taken.

    Raises:
        RejectionError: if keys or sizes are others.
    """
    keys = [part.key for part in header.parts]
    if task.header.task in (TRAIN, EVALUATE):
        if keys != [UPDATE]:
            raise rejection(pb.PARTS, "parts", [UPDATE], keys[:4])
    elif task.header.task == RESULT:
        if keys:
            raise rejection(pb.PARTS, "parts", "none", keys[:4])
    elif "" not in keys:
        raise rejection(pb.PARTS, "parts", "a profile and its body", keys[:4])
    total = total_bytes(header)
    if total > task.max_reply_bytes:
        raise rejection(pb.BODY_SIZE, "parts", f"at most {task.max_reply_bytes} bytes", total)


def total_bytes(header: pb.Header) -> int:
    return sum(part.num_bytes for part in header.parts)
