"""One client on several devices: a process per device computes its share of every batch, and all take the same step."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from fedtune.client.share_process import result_digest
from fedtune.errors import ClientError
from fedtune.messages import Assignment, ClientUpdate, TrainLora
from fedtune.model.shares import ALONE, Shares, connect
from fedtune.simulation.fork_client import exit_reason
from fedtune.simulation.fork_server import write_payload
from fedtune.wire.codec import encode_assignment

COMMAND = (sys.executable, "-P", "-m", "fedtune.client.share_process")
"""Starts a process; -P because a file of the working directory must not be imported in place of a library."""

LEAVE_S = 2.0
"""Seconds within which a process that has ended is heard of: why it ends, it says before its sockets close."""

Work = Callable[[Shares], ClientUpdate]
"""`perform` with all but the shares bound."""


class ShareError(Exception):
    """Another process of the client cannot do its share: the text says why."""


@dataclass(eq=False)
class Companion:
    """A process beside the first one."""

    place: int
    process: subprocess.Popen[bytes]
    connection: Connection[bytes, bytes]

    def receive(self) -> Mapping[str, Any]:
        """Return its next answer.

        Raises:
            ShareError: if it has ended, or says why it ends.
        """
        try:
            message: Mapping[str, Any] = json.loads(self.connection.recv_bytes())
        except (EOFError, OSError) as error:
            ended = exit_reason(self.process.wait())
            raise ShareError(f"expected every process to work; got process {self.place}, which {ended}") from error
        if "failed" in message:
            raise ShareError(f"process {self.place}: {message['failed']}")
        return message


class SharedWork:
    """The processes of a client beside this one, each with the base on its own device; started when they are needed.

    All perform the same assignment on the same examples: each computes its share of the rows of every batch, the
    gradients are summed up, and every process takes the same step. After any error they are ended, and started anew
    for the next assignment; none outlives this process.
    """

    def __init__(
        self,
        spec: Mapping[str, Any],
        parts: Mapping[str, bytes],
        devices: Sequence[str],
        *,
        base: str,
        command: Sequence[str] = COMMAND,
    ) -> None:
        """Take what they are to load.

        Args:
            spec: settings, of `worker_process.payload`.
            parts: examples, of the same.
            devices: of all processes, the first of which is this one.
            base: digest that it must have in each of them.
            command: runs `share_process.main` on its last arguments.
        """
        self._spec, self._parts, self._devices, self._base = spec, parts, devices, base
        self._command = command
        self._companions = list[Companion]()
        self._shares, self._life = ALONE, -1

    def __enter__(self) -> SharedWork:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def perform(self, assignment: Assignment, work: Work, *, threads: int) -> ClientUpdate:
        """Return what `work` gives for this process's shares, while the other processes compute theirs.

        What is no plain training of an adapter is done by this process alone.

        Raises:
            ClientError: if a process ends, or they disagree about the result; and whatever `work` raises.
        """
        if not isinstance(assignment.task, TrainLora) or assignment.task.pruning is not None:
            return work(ALONE)
        try:
            return self._perform(assignment, work, threads)
        except BaseException as error:
            reason = str(error) if isinstance(error, ShareError) else self._reason(error)
            self.close()
            if reason:
                raise ClientError(f"{assignment.plan.client}: {reason}") from error
            raise

    def close(self) -> None:
        """End the other processes."""
        if self._life != -1:
            os.close(self._life)
            self._life = -1
        for companion in self._companions:
            companion.connection.close()
            companion.process.kill()
            companion.process.wait()
        self._companions.clear()
        self._shares = ALONE

    def _perform(self, assignment: Assignment, work: Work, threads: int) -> ClientUpdate:
        if not self._companions:
            self._start()
        for companion in self._companions:
            send(companion, assignment, threads)
        update = work(self._shares)
        results = {companion.receive()["result"] for companion in self._companions}
        if results != {result_digest(update)}:
            raise ShareError("expected the same adapter of every process; got others; use devices of one kind")
        return update

    def _reason(self, error: BaseException) -> str:
        """Return why another process has ended, where this one's error is that it has; empty where it is not."""
        if not isinstance(error, RuntimeError | OSError):
            return ""
        for companion in self._companions:
            # One that fails says so before its sockets close; one that is killed says nothing.
            try:
                while companion.connection.poll(LEAVE_S):
                    companion.receive()
            except ShareError as reason:
                return str(reason)
        return ""

    def _start(self) -> None:
        """Start the other processes, and wait until each has the base.

        Raises:
            ShareError: if one ends, or has another base.
        """
        with tempfile.TemporaryDirectory() as folder:
            store, payload = Path(folder) / "store", write_payload(self._spec, self._parts)
            read, self._life = os.pipe()
            try:
                for place in range(1, len(self._devices)):
                    self._companions.append(start(self._command, place, self._devices, store, payload, read))
            finally:
                os.close(read)
                os.close(payload)
            # Before this process waits for them too, without end if one of them had not come so far.
            for companion in self._companions:
                companion.receive()
            self._shares = connect(store, 0, len(self._devices))
            for companion in self._companions:
                if (digest := companion.receive()["base"]) != self._base:
                    expected, got = self._base[:12], digest[:12]
                    raise ShareError(f"expected base {expected} in every process; got {got} in {companion.place}")


def start(
    command: Sequence[str], place: int, devices: Sequence[str], store: Path, payload: int, life: int
) -> Companion:
    """Start one process, with this process's module path."""
    ours, theirs = socket.socketpair()
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    with theirs:
        descriptors = (payload, theirs.fileno(), life)
        process = subprocess.Popen(
            [*command, str(place), str(len(devices)), devices[place], str(store), *map(str, descriptors)],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C goes to a terminal's whole group; this process decides what it means
        )
    return Companion(place, process, Connection(ours.detach()))


def send(companion: Companion, assignment: Assignment, threads: int) -> None:
    encoded = encode_assignment(assignment)
    head = {"threads": threads, "bodies": list(encoded.blobs)}
    for part in (json.dumps(head).encode(), encoded.header, *encoded.blobs.values()):
        companion.connection.send_bytes(part)
