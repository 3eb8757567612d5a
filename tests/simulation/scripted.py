"""A fork server without torch, whose clients do what the spec names; started as a process by several tests."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.errors import ClientError, ConfigError, Fault, ShapeError, WireError
from fedtune.messages import Assignment, ClientUpdate, LoraResult, Measured
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


def stop(error: BaseException) -> Callable[[ClientUpdate], ClientUpdate]:
    def act(update: ClientUpdate) -> ClientUpdate:
        raise error

    return act


def changed(change: Callable[[np.ndarray], Any]) -> Callable[[ClientUpdate], ClientUpdate]:
    def act(update: ClientUpdate) -> ClientUpdate:
        first, *_ = sorted(update.lora.tensors)
        tensors = {**update.lora.tensors, first: change(update.lora.tensors[first])}
        return replace(update, result=replace(update.lora, tensors=tensors))

    return act


FAULTS: dict[str, Callable[[ClientUpdate], ClientUpdate]] = {
    "index": stop(IndexError("index out of range in self")),
    "torch": stop(RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)")),
    "key": stop(KeyError("no such column")),
    "assertion": stop(AssertionError()),
    "memory": stop(MemoryError()),
    "recursion": stop(RecursionError("maximum recursion depth exceeded")),
    "exit": stop(SystemExit(0)),
    "text": stop(ValueError("two\nlines and a \x1b[31mcolour; got 'one'; " + "expected less " * 40)),
    "file": stop(FileNotFoundError(2, "No such file or directory", "rows.jsonl")),
    "own error": stop(ClientError("own error: expected a finite loss; got nan")),
    "own lines": stop(ConfigError([Fault("a", "1", "2"), Fault("b", "3", "4", "do it")], source="x.toml")),
    "full device": stop(ClientError("full device: expected its batch of 4 to fit; memory ran out; lower client.batch")),
    "shape": stop(ShapeError("x: expected (2, 3) as in the base; got (3, 3)")),
    "wire": stop(WireError("accumulators: expected sums; got none")),
    "not finite": changed(lambda tensor: np.full_like(tensor, np.nan)),
    "other shape": changed(lambda tensor: tensor[..., :-1].copy()),
    "other base": lambda update: replace(update, result=replace(update.lora, base="ab" * 32)),
    "loss": lambda update: replace(update, measured=Measured(loss_before=np.nan)),
    "other round": lambda update: replace(update, round=9),
}
"""What goes wrong with the update of the client of that name, on every engine; see `tests/test_failures.py`."""


def faulty(assignment: Assignment) -> ClientUpdate:
    """Return the update of a client, unless its name is one of `FAULTS`."""
    client, rank = assignment.plan.client, assignment.plan.rank
    tensors = {
        f"{module}.{side}": np.full((rank, size) if side == "a" else (size, rank), 0.01, np.float32)
        for module in ("layer.q", "layer.v")
        for side, size in (("a", 6), ("b", 4))
    }
    update = ClientUpdate(client, assignment.round, 5, LoraResult(tensors, base=assignment.base))
    fault = FAULTS.get(client)
    return fault(update) if fault else update


def scarce() -> int:
    raise BlockingIOError("no process left")


def act(
    spec: Mapping[str, Any], parts: Mapping[str, memoryview], place: int, assignment: Assignment, threads: int
) -> ClientUpdate:
    client = assignment.plan.client
    if spec.get("faults"):
        return faulty(assignment)
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
