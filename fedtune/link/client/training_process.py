"""The process that holds a site's model and data: started when it is first needed, and anew after it has died."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from fedtune.errors import ClientError, ConfigError, Fault, TemporaryError
from fedtune.link.client.memory_watch import watch_memory
from fedtune.link.settings import GIB
from fedtune.messages import OUT_OF_MEMORY

END_S = 5.0
"""Within which the process must end by itself before it is killed."""


@dataclass(frozen=True)
class WorkProgress:
    """How far a trainer is with its work."""

    done: int = 0
    """Optimizer steps, or seeds."""
    total: int = 0
    """0: not known."""
    cpu_ms: int = 0
    """That the trainer has computed since it was started; it rises also where there are no steps."""
    obstacle: str = ""
    """Why it waits between two steps; empty while it works."""


class Trainer(Protocol):
    """Does the work of tasks, with files instead of values: bodies may be larger than the memory."""

    def profile(self, into: Path, labels: Sequence[str] = ()) -> None:
        """Write the client's profile: its header as `front`, and each body under its digest (hex).

        Args:
            into: folder to write.
            labels: class names that the client must use; none: its own.

        Raises:
            ConfigError: if the site's own file is wrong, or the process died.
        """
        ...

    def perform(self, folder: Path, bodies: Sequence[str], into: Path) -> Mapping[str, float]:
        """Do the assignment in `folder/front` with its bodies, write the encoded update, and return what was measured.

        Raises:
            ClientError: with the reason why it could not be done.
        """
        ...

    def score(self, folder: Path, bodies: Sequence[str], into: Path) -> Mapping[str, float]:
        """Score the model of the request in `folder/front`, write the encoded scores, and return them.

        Raises:
            ClientError: with the reason why it could not be done.
        """
        ...

    def progress(self) -> WorkProgress:
        """Return how far the current work is."""
        ...

    def kill(self) -> None:
        """End the current work at once; the next task starts anew."""
        ...


class ProcessTrainer:
    """A trainer in a process of its own, so that whatever happens to it, the client's signs of life go on."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        max_bytes: int | None = None,
        on_exit: Callable[[str], None] = lambda reason: None,
        idle_s: float | None = None,
    ) -> None:
        """Bind a command, which is started when it is first needed.

        Args:
            command: gets three descriptors as last arguments: of the pipe with requests, of the one for replies, and
                of one whose end means that this process has gone.
            max_bytes: main memory, above which the process is ended; None: no limit.
            on_exit: called with the reason when the process has ended without being asked to.
            idle_s: without a request for so long the process is ended, which gives its memory back; None: never.
        """
        self._command, self._max_bytes, self._on_exit = tuple(command), max_bytes, on_exit
        # One request at a time: requests and replies share two pipes.
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._killed: subprocess.Popen[bytes] | None = None  # by `kill`, which is no news to who called it
        self._excessive: subprocess.Popen[bytes] | None = None  # the one that took too much memory
        self._requests = self._replies = self._life = -1
        self._unread = b""  # of the pipe of replies, behind the line that was read last
        self._progress = WorkProgress()
        self._idle_s = idle_s
        self._idle: threading.Timer | None = None

    def profile(self, into: Path, labels: Sequence[str] = ()) -> None:
        try:
            reply = self._ask({"do": "profile", "into": str(into), "labels": list(labels)})
        except ClientError as error:
            raise ConfigError(Fault("", "a training process that loads base and data", str(error))) from None
        if "failed" in reply:
            # Without space nothing must be changed in the site's file: another start may succeed.
            kind = TemporaryError if reply.get("passing") else ConfigError
            raise kind(Fault("", "a site whose base and data can be loaded", reply["failed"]))

    def perform(self, folder: Path, bodies: Sequence[str], into: Path) -> Mapping[str, float]:
        return self._work("perform", folder, bodies, into)

    def score(self, folder: Path, bodies: Sequence[str], into: Path) -> Mapping[str, float]:
        return self._work("score", folder, bodies, into)

    def _work(self, what: str, folder: Path, bodies: Sequence[str], into: Path) -> Mapping[str, float]:
        reply = self._ask({"do": what, "folder": str(folder), "bodies": list(bodies), "into": str(into)})
        if "failed" in reply:
            raise ClientError(str(reply["failed"]))
        measured: Mapping[str, float] = reply["done"]
        return measured

    def progress(self) -> WorkProgress:
        return self._progress

    def kill(self) -> None:
        # Without the lock, which is held for as long as the work takes that is to end.
        process = self._process
        if process is not None:
            self._killed = process
            with suppress(ProcessLookupError):
                process.kill()

    def close(self) -> None:
        """End the process."""
        if self._idle is not None:
            self._idle.cancel()
            self._idle.join()
        self._end()

    def _end_idle(self) -> None:
        # A request that has come meanwhile holds the lock, and goes first.
        if self._lock.acquire(blocking=False):
            try:
                self._end()
            finally:
                self._lock.release()

    def _end(self) -> None:
        process = self._process
        if process is None:
            return
        # It exits when its pipes end; only if it does not in time is it killed.
        self._close_pipes()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._process = None

    def _ask(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        with self._lock:
            if self._idle is not None:
                self._idle.cancel()
            try:
                return self._exchange(request)
            finally:
                if self._idle_s is not None and self._process is not None:
                    self._idle = threading.Timer(self._idle_s, self._end_idle)
                    self._idle.daemon = True
                    self._idle.start()

    def _exchange(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        if self._process is None:
            self._start()
        try:
            os.write(self._requests, json.dumps(request).encode() + b"\n")
            while (line := self._read_line()).endswith(b"\n"):
                reply: Mapping[str, Any] = json.loads(line)
                if "at" not in reply:
                    return reply
                done, total, cpu_ms = reply["at"]
                self._progress = WorkProgress(done, total, cpu_ms, reply.get("waits", ""))
        except BrokenPipeError:
            pass
        assert self._process is not None
        self._close_pipes()
        code, asked = self._process.wait(), self._process is self._killed
        excessive = self._process is self._excessive
        self._process = None
        status = f"killed by {signal.Signals(-code).name}" if code < 0 else f"status {code}"
        reason = f"the training process ended ({status})"
        if excessive:
            # In these words a planner reads that the device cannot hold so much.
            limit = (self._max_bytes or 0) / GIB
            reason = f"{OUT_OF_MEMORY}: the training process took more than policy.max_memory_gib = {limit:g}"
        if not asked:
            self._on_exit(reason)
        raise ClientError(f"expected an update; {reason}; this site's own log says more")

    def _start(self) -> None:
        child_requests, self._requests = os.pipe()
        self._replies, child_replies = os.pipe()
        self._unread, self._progress = b"", WorkProgress()
        # Nothing is ever written to it: the operating system ends it when this process dies, even by SIGKILL, and the
        # child then exits instead of training for a client that has gone.
        child_life, self._life = os.pipe()
        child_ends = (child_requests, child_replies, child_life)
        try:
            self._process = subprocess.Popen(
                [*self._command, *map(str, child_ends)],
                pass_fds=child_ends,
                stdin=subprocess.DEVNULL,
                # Ctrl-C is for the link process, which ends this one.
                start_new_session=True,
            )
            if self._max_bytes is not None:
                watch = partial(watch_memory, self._process, self._max_bytes, self._note_excess)
                threading.Thread(target=watch, name="fedtune memory", daemon=True).start()
        finally:
            for descriptor in child_ends:
                os.close(descriptor)

    def _note_excess(self) -> None:
        self._excessive = self._process

    def _read_line(self) -> bytes:
        """Return the next line of the process, without its newline's end if the process has gone."""
        while b"\n" not in self._unread and (more := os.read(self._replies, 65536)):
            self._unread += more
        line, newline, self._unread = self._unread.partition(b"\n")
        return line + newline

    def _close_pipes(self) -> None:
        for descriptor in (self._requests, self._replies, self._life):
            with suppress(OSError):
                os.close(descriptor)
        self._requests = self._replies = self._life = -1
