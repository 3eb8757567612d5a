"""A trainer in this process: the link's threads ask, and the thread that owns model and data does the work."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from fedtune.errors import ClientError, ConfigError, Fault, FedtuneError, may_pass
from fedtune.link.client.training_process import WorkProgress
from fedtune.link.client.training_server import TrainingSite, run_request
from fedtune.probing.steps import OnStep

LoadHere: TypeAlias = Callable[[OnStep], TrainingSite]
"""From what hears of each step to the site, whose base and data are in this process."""


class WithdrawnError(ClientError):
    """The work under way is of no use any more."""


@dataclass
class Request:
    """What a thread of the link waits for."""

    what: Mapping[str, Any]
    done: threading.Event = field(default_factory=threading.Event)
    reply: Mapping[str, Any] = field(default_factory=dict)


class LocalTrainer:
    """Does the work of tasks in the thread that calls `work`, such as the main thread of a notebook or a launcher.

    A Trainer's progress bars, its signal handlers and its collectives belong to that thread. Work that the server
    withdraws ends at its next step.
    """

    def __init__(self, load: LoadHere, *, interrupts: bool = True) -> None:
        """Bind what loads the site.

        Args:
            load: called once, in the thread of `work`.
            interrupts: whether a step may raise an error to end work that was withdrawn: not where other processes wait
                for the same step.
        """
        self._load, self._interrupts = load, interrupts
        self._site: TrainingSite | None = None
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._progress, self._withdrawn, self._closed = WorkProgress(), threading.Event(), False

    def profile(self, into: Path, labels: Sequence[str] = ()) -> None:
        reply = self._ask({"do": "profile", "into": str(into), "labels": list(labels)})
        if "failed" in reply:
            raise ConfigError(Fault("", "a site whose base and data can be used", reply["failed"]))

    def perform(self, folder: Path, bodies: Sequence[str], into: Path) -> Mapping[str, float]:
        return self._work("perform", folder, bodies, into)

    def score(self, folder: Path, bodies: Sequence[str], into: Path) -> Mapping[str, float]:
        return self._work("score", folder, bodies, into)

    def progress(self) -> WorkProgress:
        return self._progress

    def kill(self) -> None:
        self._withdrawn.set()

    @property
    def is_withdrawn(self) -> bool:
        """Whether the work under way is of no use any more."""
        return self._withdrawn.is_set()

    def close(self) -> None:
        """Have `work` return, once it is done with what it does."""
        self._closed = True
        self._withdrawn.set()
        self._requests.put(None)

    def work(self) -> None:
        """Do what is asked, one request after the other, until `close`.

        Raises:
            KeyboardInterrupt: of Ctrl-C, also where it came within the work.
        """
        while (request := self._requests.get()) is not None:
            try:
                request.reply = self._reply(request.what)
            finally:
                # Also of an interrupt: the thread that waits would wait for ever.
                request.reply = request.reply or {"failed": "this site was stopped"}
                request.done.set()

    def _reply(self, what: Mapping[str, Any]) -> Mapping[str, Any]:
        self._withdrawn.clear()
        self._progress = WorkProgress()
        if self._closed:
            return {"failed": "this site was stopped"}
        try:
            if self._site is None:
                self._site = self._load(self._step)
            return {"done": run_request(self._site, what)}
        except FedtuneError as error:
            if isinstance(error.__cause__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            return {"failed": str(error), **({"passing": True} if may_pass(error) else {})}

    def _step(self, done: int, total: int) -> None:
        self._progress = WorkProgress(done, total, int(1000 * time.process_time()))
        if self._interrupts and self._withdrawn.is_set():
            raise WithdrawnError("expected the round to go on; got an end of it by the server")

    def _work(self, what: str, folder: Path, bodies: Sequence[str], into: Path) -> Mapping[str, float]:
        reply = self._ask({"do": what, "folder": str(folder), "bodies": list(bodies), "into": str(into)})
        if "failed" in reply:
            raise ClientError(str(reply["failed"]))
        measured: Mapping[str, float] = reply["done"]
        return measured

    def _ask(self, what: Mapping[str, Any]) -> Mapping[str, Any]:
        request = Request(what)
        self._requests.put(request)
        request.done.wait()
        return request.reply
