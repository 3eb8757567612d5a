"""A fork server without torch, whose clients do what the spec names; started as a process by several tests."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.errors import ClientError, ConfigError, Fault
from fedtune.messages import Assignment, ClientUpdate, LoraResult
from fedtune.simulation.fork_server import PerformBytes, Prepared, serve


def prepare(spec: Mapping[str, Any], parts: Mapping[str, memoryview]) -> Prepared:
    if spec.get("start") == "fault":
        raise ConfigError(Fault("model.base", "a base", "none", "give one"), source="a.toml")
    if spec.get("start") == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if spec.get("start") == "break":
        raise MemoryError("no room")
    if spec.get("start") == "a thread that ends":
        threading.Timer(0.1, lambda: None).start()  # as a pool of a library that nobody waits for
    if spec.get("start") == "threads":
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    if "forks" in spec:
        left = iter(range(spec["forks"]))
        fork = os.fork
        os.fork = lambda: fork() if next(left, None) is not None else scarce()
    if "once" in spec and not Path(spec["once"]).exists():
        Path(spec["once"]).touch()
    elif "once" in spec:
        raise ConfigError(Fault("model.base", "a base", "none", "give one"))

    def make_worker(place: int) -> PerformBytes:
        return lambda assignment, threads: act(spec, parts, place, assignment, threads)

    return Prepared(make_worker, tuple(spec.get("devices", ["cpu"])))


def scarce() -> int:
    raise BlockingIOError("no process left")


def act(
    spec: Mapping[str, Any], parts: Mapping[str, memoryview], place: int, assignment: Assignment, threads: int
) -> ClientUpdate:
    client = assignment.plan.client
    match spec.get("acts", {}).get(client):
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "kill the server":
            os.kill(os.getppid(), signal.SIGKILL)
            signal.pause()
        case "leave":
            os._exit(3)
        case "hang":
            print("on stdout", flush=True)
            signal.pause()
        case "fail":
            raise ClientError(f"{client}: expected a loss; got none")
        case "break":
            raise RuntimeError("a kernel\nis missing")
        case "tell":
            facts = {
                "pid": os.getpid(),
                "place": place,
                "threads": threads,
                "sigint": signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
                "session": os.getsid(0),
                "oom_score_adj": int(Path("/proc/self/oom_score_adj").read_text()),
                "parent": os.getppid(),
                "descriptors": descriptors(),
                "parts": {name: bytes(part).decode() for name, part in parts.items()},
            }
            raise ClientError(json.dumps(facts))
    tensors = {name: np.array(tensor) for blob in assignment.lora.blobs.values() for name, tensor in blob.items()}
    return ClientUpdate(client, assignment.round, 5, LoraResult(tensors, base=assignment.base))


def descriptors() -> list[str]:
    """Return what each open descriptor but the standard three stands for."""
    found = []
    for number in range(3, 256):
        with suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{number}").partition(":")[0])
    return sorted(found)


if __name__ == "__main__":
    serve(int(sys.argv[-1]), prepare)
