"""Every part of flwr that is not its public interface: the one place to look when Flower moves."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedtune.errors import ConfigError, ExtraError, Fault

__all__ = [
    "NodeInfo",
    "Run",
    "check_ray",
    "check_version",
    "context",
    "enter_task",
    "in_simulation",
    "kill_workers",
    "leave_task",
    "simulate",
    "skip_reports",
    "stamp",
]

SUPPORTED = ((1, 41), (1, 42))
"""Minor versions whose internals are the ones used here."""


def check_version(installed: str) -> None:
    """Refuse a flwr whose internals are not known to be the ones used here.

    Raises:
        ConfigError: naming the version.
    """
    if tuple(int(part) for part in re.findall(r"\d+", installed)[:2]) not in SUPPORTED:
        raise ConfigError(Fault("", "flwr>=1.41,<1.43", f"flwr {installed}", 'run pip install "flwr>=1.41,<1.43"'))


check_version(version("flwr"))


def enter_task(run_id: int = 1) -> None:
    """Give this process the identity that `Message(...)` reads; Flower does so in the processes that it starts."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, 1, 1


def leave_task() -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        setattr(TaskIdentity, name, None)


def context(run_config: Mapping[str, bool | int | float | str]) -> Context:
    """Return what Flower hands to a server app that it starts."""
    return Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(run_config))


def stamp(message: Message, message_id: str) -> None:
    """Name a message, as a Grid does when it is pushed; the field has no setter."""
    message.metadata.__dict__["_message_id"] = message_id


def in_simulation() -> bool:
    """Return whether this process is a worker of Flower's simulation engine."""
    ray = sys.modules.get("ray")  # never imported for the question: a deployed client has no use for it
    return ray is not None and bool(ray.is_initialized())


def check_ray() -> None:
    """Refuse to simulate without Ray; flwr would end the process.

    Raises:
        ExtraError: naming the extra.
    """
    try:
        import ray  # noqa: F401
    except ImportError:
        raise ExtraError('expected ray, which Flower\'s engine runs on; run pip install "fedtune[ray]"') from None


def simulate(server_app: ServerApp, client_app: ClientApp, *, clients: int, backend: Mapping[str, Any]) -> None:
    """Run both apps in Flower's simulation engine on Ray; returns when the server app has ended.

    (The public `run_simulation` is deprecated and prints so; `flwr run` starts processes of its own.)
    """
    import ray._private.worker as driver
    from flwr.simulation.run_simulation import _run_simulation
    from flwr.supercore.telemetry import EventType

    # Ray prints on stdout that a worker has died, whatever its log level; that worker's client says so as well.
    driver._worker_logs_enabled = False
    skip_reports()
    _run_simulation(
        num_supernodes=clients,
        exit_event=EventType.PYTHON_API_RUN_SIMULATION_LEAVE,
        client_app=client_app,
        server_app=server_app,
        backend_name="ray",
        backend_config=dict(backend),
    )


def skip_reports() -> None:
    """Where Flower's telemetry is switched off, have it not even describe this machine.

    Switched off it sends nothing, but does the rest: in a thread that outlives the engine it starts the program `file`
    and writes an id into the user's home. And in a program that imports flwr before fedtune it is not switched off, as
    flwr reads the variable once.
    """
    from flwr.supercore import telemetry

    if os.environ.get("FLWR_TELEMETRY_ENABLED") != "1":
        telemetry.create_event = lambda event_type, event_details: "disabled"


def kill_workers() -> None:
    """End the work of all of the engine's workers at once: it has no way to be interrupted, and waits for each."""
    import ray
    from ray._private import state

    for actor in state.actors().values() if ray.is_initialized() else ():
        if actor["State"] == "ALIVE":
            with suppress(ProcessLookupError):
                os.kill(actor["Pid"], signal.SIGKILL)
