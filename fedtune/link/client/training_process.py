"""The process that holds a site's model and data: started by the link, told what to do, replaced if it dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from fedtune.errors import ClientError, ConfigError, Fault

END_S = 5.0
"""That the process is given to end by itself."""


class Trainer(Protocol):
    """Does what an order asks, with files instead of values: bodies may be larger than the memory."""

    def profile(self, into: Path) -> None:
        """Write what the client says of itself: `front`, and a file per body under its digest (hex).

        Raises:
            ConfigError: if the site's own file is wrong, or the process died.
        """
        ...

    def perform(self, folder: Path, bodies: Sequence[str], into: Path) -> None:
        """Do the assignment in `folder/front` with its bodies, and write the encoded update.

        Raises:
            ClientError: with the reason why it could not be done.
        """
        ...

    def kill(self) -> None:
        """End what is being done at once; the next order starts anew."""
        ...


class ProcessTrainer:
    """A trainer in a process of its own, so that whatever happens to it, the client's signs of life go on."""

    def __init__(self, command: Sequence[str], *, died: Callable[[str], None] = lambda reason: None) -> None:
        """Bind a command, which is started when it is first needed.

        Args:
            command: it is given two descriptors as last arguments: of the socket that it is told on, and of a pipe
                whose end means that this process has gone.
            died: told when the process has ended without being asked to.
        """
        self._command, self._died = tuple(command), died
        self._lock = threading.Lock()  # one order at a time
        self._process: subprocess.Popen[bytes] | None = None
        self._requests = self._replies = self._life = -1

    def profile(self, into: Path) -> None:
        try:
            reply = self._ask({"do": "profile", "into": str(into)})
        except ClientError as error:
            raise ConfigError(Fault("", "a training process that loads base and data", str(error))) from None
        if "failed" in reply:
            raise ConfigError(Fault("", "a site whose base and data can be loaded", reply["failed"]))

    def perform(self, folder: Path, bodies: Sequence[str], into: Path) -> None:
        reply = self._ask({"do": "perform", "folder": str(folder), "bodies": list(bodies), "into": str(into)})
        if "failed" in reply:
            raise ClientError(str(reply["failed"]))

    def kill(self) -> None:
        process = self._process
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()

    def close(self) -> None:
        """End the process."""
        process = self._process
        if process is None:
            return
        self._shut()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._process = None

    def _ask(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        with self._lock:
            if self._process is None:
                self._start()
            try:
                os.write(self._requests, json.dumps(request).encode() + b"\n")
                line = self._line()
            except BrokenPipeError:
                line = b""
            if line.endswith(b"\n"):
                reply: Mapping[str, Any] = json.loads(line)
                return reply
            assert self._process is not None
            self._shut()
            code = self._process.wait()
            self._process = None
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"status {code}"
            reason = f"the training process ended ({how})"
            self._died(reason)
            raise ClientError(f"expected an update; {reason}; this site's own log says more")

    def _start(self) -> None:
        theirs_in, self._requests = os.pipe()
        self._replies, theirs_out = os.pipe()
        their_life, self._life = os.pipe()
        theirs = (theirs_in, theirs_out, their_life)
        try:
            self._process = subprocess.Popen(
                [*self._command, *map(str, theirs)],
                pass_fds=theirs,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the link process, which ends this one
            )
        finally:
            for descriptor in theirs:
                os.close(descriptor)

    def _line(self) -> bytes:
        data = b""
        while not data.endswith(b"\n") and (more := os.read(self._replies, 65536)):
            data += more
        return data

    def _shut(self) -> None:
        for descriptor in (self._requests, self._replies, self._life):
            with suppress(OSError):
                os.close(descriptor)
        self._requests = self._replies = self._life = -1
