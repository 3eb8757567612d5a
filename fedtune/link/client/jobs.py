"""Jobs of a client: the tasks that it works on, each in a thread of its own, and the first fault of any thread."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

from fedtune.errors import ClientError, FedtuneError
from fedtune.wire.v1 import link_pb2 as pb


class StoppedError(FedtuneError):
    """The client is to end, or the task that it works on has been withdrawn."""


@dataclass
class Job:
    """A task that a thread works on."""

    task: bytes
    """Digest of the task's header."""
    header: pb.Header
    stop: threading.Event
    """Set when the client is to end."""
    over: threading.Event = field(default_factory=threading.Event)
    """Set when the reply is of no use any more."""
    training: bool = False
    """Whether the trainer works for it now."""
    phase: pb.Progress.Phase = pb.Progress.PHASE_UNSET
    """What is done for it now; while it trains, how far is the trainer's to say."""
    done_bytes: int = 0
    """That have travelled in this phase."""
    total_bytes: int = 0
    leaving: bool = False
    """Whether its reply, which needs no round to decide about it, is on its way: the server may have it already."""

    def begin(self, phase: pb.Progress.Phase, total_bytes: int = 0) -> None:
        """Note what is done now, for the server to hear."""
        self.phase, self.done_bytes, self.total_bytes = phase, 0, total_bytes

    def check(self) -> None:
        """Raise `StoppedError` if the thread should give up."""
        if self.stop.is_set() or self.over.is_set():
            raise StoppedError("stopped")

    def wait(self, seconds: float) -> None:
        """Wait, unless the thread should give up; a client that ends sets `over` of all its jobs, too."""
        self.check()
        self.over.wait(seconds)
        self.check()


class ThreadGuard:
    """Keeps the first fault of any thread of a client, for the main loop to raise."""

    def __init__(self, stop: threading.Event, close_channel: Callable[[], None]) -> None:
        """Begin without a fault.

        Args:
            stop: set when the client is to end.
            close_channel: called after a fault; it ends the call in which the main loop waits for the server.
        """
        self._stop, self._close_channel = stop, close_channel
        self.fault: FedtuneError | None = None

    def start(self, work: Callable[[], None], *, name: str) -> threading.Thread:
        """Do work in a daemon thread whose fault ends the client."""
        # Daemon: a thread deep in a call must not keep a client from ending.
        thread = threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
        thread.start()
        return thread

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except StoppedError:
            pass
        except FedtuneError as error:
            # The first fault is the cause; later ones come from the channel that it closes.
            self.fault = self.fault or error
            self._close_channel()
        except BaseException as error:
            # A ValueError is what gRPC raises on a channel that was closed before a call began.
            if self.fault is None and not self._stop.is_set():
                # A thread that ends in silence would leave a site that is connected, and does nothing for ever.
                traceback.print_exc()
                self.fault = ClientError(f"a thread of this client ended by {type(error).__name__}; see its log")
                self._close_channel()
