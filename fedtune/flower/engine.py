"""Flower's own simulation engine on Ray, driven by the same round loop as every other engine."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Event, Thread

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedtune.errors import ConfigError, Fault, RoundError
from fedtune.flower import shim
from fedtune.flower.grid_transport import GridTransport
from fedtune.messages import Client, Failure
from fedtune.rounds.transport import Answer, Rule
from fedtune.wire.codec import EncodedAssignment

LONGEST_FOLDER = 40
"""Characters of Ray's temporary folder: the paths of its sockets below it must not exceed 107."""


@dataclass(frozen=True)
class Share:
    """What each worker of the engine gets of the machine; Ray knows one share for all."""

    threads: int = 1
    gpus: float = 0.0
    """Of one GPU; 0 where the clients work on the CPU."""


@dataclass
class EngineState:
    """The engine's thread, as the main thread sees it."""

    ready: Event = field(default_factory=Event)
    """The grid is there, or the engine has ended."""
    ended: Event = field(default_factory=Event)
    release: Event = field(default_factory=Event)
    """The main thread does not need the engine any more."""
    grid: Grid | None = None
    error: BaseException | None = None

    def sleep(self, seconds: float) -> None:
        """Wait, as `time.sleep`, but not for clients of an engine that has ended.

        Raises:
            RoundError: if it has.
        """
        if self.ended.wait(seconds):
            raise RoundError(f"Flower's simulation engine ended: {self.error or 'for no reason given'}") from self.error


@dataclass(frozen=True)
class RayTransport:
    """A `GridTransport` on one machine: every client is waited for, and a dead worker ends the run."""

    over: GridTransport

    def clients(self) -> Sequence[Client]:
        """Return the clients, once all have said hello."""
        return self.over.clients()

    def exchange(self, assignments: Mapping[str, EncodedAssignment], rule: Rule) -> Iterator[Answer]:
        """Yield one answer per client.

        Raises:
            RoundError: if a worker process died; Flower would hand the dead one further messages and fail them all.
        """
        for answer in self.over.exchange(assignments, replace(rule, deadline_s=None)):
            if isinstance(answer, Failure) and answer.code == "WORKER_DIED":
                raise RoundError(
                    f"{answer.client}: expected a living worker; its process died (out of memory?), and Ray's engine "
                    'does not replace it; resume the run with engine = "processes", which does'
                )
            yield answer


@contextmanager
def ray_transport(
    client_app: ClientApp, *, clients: int, workers: int, share: Share, start_s: float = 1800.0
) -> Iterator[RayTransport]:
    """Start Flower's simulation engine beside the main thread, give a transport over its grid, and end it.

    After `kill -9` of this process, Ray's agents may run on, and its folder `ray-*` stays in the temporary folder.
    `ray stop --force` ends every Ray of this user; then the folder can be deleted.

    Args:
        client_app: must hold nothing that is large or loaded: it travels to a worker with every message.
        clients: how many there are; each gets its place as `partition-id`.
        workers: processes that do their work.
        share: of the machine, for each worker.
        start_s: seconds within which all clients must have said hello; the first of each worker loads the base.

    Raises:
        ExtraError: if ray is not installed.
        ConfigError: if the temporary folder's path is too long for Ray's sockets.
        RoundError: if the engine does not start, or ends before it should.
    """
    shim.check_ray()
    running = EngineState()
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        running.grid = grid
        running.ready.set()
        running.release.wait()

    with scratch() as folder, quiet_logs():
        backend = {
            "client_resources": {"num_cpus": share.threads, "num_gpus": share.gpus},
            "init_args": {
                "num_cpus": workers * share.threads,
                "include_dashboard": False,
                "log_to_driver": False,
                "logging_level": logging.CRITICAL,
                "_temp_dir": folder,
            },
        }
        thread = Thread(target=run_engine, args=(running, server_app, client_app, clients, backend), name="flower")
        thread.start()
        try:
            running.ready.wait()
            if running.grid is None:
                running.sleep(0)
            assert running.grid is not None
            yield RayTransport(
                GridTransport(
                    running.grid,
                    expected=clients,
                    patience_s=start_s,
                    hello_s=start_s,
                    closed=True,
                    sleep=running.sleep,
                )
            )
        except BaseException:
            # The clients' work is of no more use, and the engine would wait for it.
            shim.kill_workers()
            raise
        finally:
            running.release.set()
            thread.join()


@contextmanager
def scratch() -> Iterator[str]:
    """Give a folder for Ray's sockets and logs, which goes when the block ends.

    Raises:
        ConfigError: if it lies too deep for a socket's path.
    """
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        if len(folder) > LONGEST_FOLDER:
            expected = f"a temporary folder of at most {LONGEST_FOLDER} characters, for Ray's sockets lie below it"
            raise ConfigError(Fault("TMPDIR", expected, folder, "set TMPDIR to a shorter one"))
        yield folder


@contextmanager
def quiet_logs() -> Iterator[None]:
    """Silence Flower's and Ray's log inside the block: what matters is raised, or is a client's failure by name."""
    loggers = [logging.getLogger(name) for name in ("flwr", "ray")]
    before = [(logger.level, logger.disabled) for logger in loggers]
    for logger in loggers:
        logger.disabled = not os.environ.get("FEDTUNE_DEBUG")
    try:
        yield
    finally:
        for logger, (level, disabled) in zip(loggers, before, strict=True):
            logger.setLevel(level)
            logger.disabled = disabled


def run_engine(
    running: EngineState, server_app: ServerApp, client_app: ClientApp, clients: int, backend: dict[str, object]
) -> None:
    """Run the engine until it ends; an error that ends it is kept for the main thread."""
    try:
        shim.simulate(server_app, client_app, clients=clients, backend=backend)
    except RuntimeError as error:
        running.error = error.__cause__ or error
    finally:
        running.ended.set()
        running.ready.set()
        running.release.set()
