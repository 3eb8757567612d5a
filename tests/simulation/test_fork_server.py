from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.messages import Assignment, Plan, Training, TrainLora
from fedtune.simulation.fork_server import read_payload, write_payload
from fedtune.wire.codec import decode_update, encode_assignment

SCRIPT = Path(__file__).with_name("scripted.py")


def test_a_payload_comes_back_from_memory() -> None:
    parts = {"ann": b"abc", "bob": b"", "cyd": bytes(range(200))}
    descriptor = write_payload({"seed": 3, "labels": ["a", "b"]}, parts)
    spec, views = read_payload(descriptor)
    os.close(descriptor)
    assert spec == {"seed": 3, "labels": ["a", "b"]}
    assert {name: bytes(view) for name, view in views.items()} == parts


def test_the_parts_of_a_payload_are_aligned_and_not_copied() -> None:
    descriptor = write_payload({}, {"ann": bytes(3), "bob": np.arange(4).tobytes()})
    _, parts = read_payload(descriptor)
    os.close(descriptor)
    array = np.frombuffer(parts["bob"], np.int64)
    assert array.tolist() == [0, 1, 2, 3]
    assert array.ctypes.data % 64 == 0
    with pytest.raises(TypeError, match="read-only"):
        parts["ann"][0] = 1


@contextmanager
def tended(**spec: Any) -> Iterator[socket.socket]:
    """Give the control socket of a nursery that has been told to load."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        process = subprocess.Popen([sys.executable, SCRIPT, str(theirs.fileno())], pass_fds=[theirs.fileno()])
        theirs.close()
        payload = write_payload(spec, {"data": b"shared"})
        socket.send_fds(ours, [b'{"verb": "load"}'], [payload])
        os.close(payload)
        yield ours
    process.wait()


def ask(control: socket.socket, message: Any = None, *descriptors: int) -> Any:
    if message is not None:
        socket.send_fds(control, [json.dumps(message).encode()], descriptors)
    return json.loads(control.recv(65536) or b"null")


@contextmanager
def forked(control: socket.socket) -> Iterator[tuple[int, Connection[bytes, bytes]]]:
    ours, theirs = socket.socketpair()
    with theirs:
        pid = ask(control, {"verb": "fork", "place": 0}, theirs.fileno())["pid"]
    with Connection(ours.detach()) as connection:
        yield pid, connection


def test_it_loads_forks_and_ends_as_told() -> None:
    with tended(devices=["cuda:0", "cuda:1"]) as control:
        assert ask(control) == {"devices": ["cuda:0", "cuda:1"]}
        with forked(control) as (pid, connection):
            assert ask(control, {"verb": "end", "pid": pid}) == {"status": -signal.SIGKILL}
            with pytest.raises(EOFError):
                connection.recv_bytes()


def test_a_worker_leaves_when_its_connection_closes() -> None:
    with tended() as control:
        ask(control)
        with forked(control) as (pid, connection):
            process = os.pidfd_open(pid)
            connection.close()
            assert select.select([process], [], [], 60)[0]
            os.close(process)
        assert ask(control, {"verb": "end", "pid": pid}) == {"status": 0}


def test_a_worker_keeps_bodies_until_it_is_told_to_drop_them() -> None:
    blob = {"x.a": np.arange(6, dtype=np.float32)}
    plan = Plan("ann", 2, 2.0, Training(batch=1, learning_rate=0.1, steps=1))
    order = encode_assignment(Assignment("flora", 1, 3, plan, TrainLora(a_key=4, blobs={"global": blob}), base="base"))
    (digest,) = order.blobs

    def given(connection: Connection[bytes, bytes], *, bodies: list[str], drop: list[str]) -> tuple[bytes, bytes]:
        connection.send_bytes(json.dumps({"client": "ann", "threads": 1, "drop": drop, "bodies": bodies}).encode())
        connection.send_bytes(order.header)
        for name in bodies:
            connection.send_bytes(order.blobs[name])
        return connection.recv_bytes(), connection.recv_bytes()

    with tended() as control:
        ask(control)
        with forked(control) as (_, connection):
            for bodies in ([digest], []):
                word, content = given(connection, bodies=bodies, drop=[])
                assert word == b"update"
                update = decode_update(content, client="ann", limit_bytes=10_000)
                assert update.lora.tensors["x.a"].tolist() == [0, 1, 2, 3, 4, 5]
            word, content = given(connection, bodies=[], drop=[digest])
            assert word == b"failed"
            assert b"expected a body of digest" in content


def test_a_thread_that_is_about_to_end_is_waited_for() -> None:
    with tended(start="a thread that ends") as control:
        assert ask(control)["devices"]


def test_a_thread_beside_the_first_is_refused_because_it_would_not_outlive_a_fork() -> None:
    with tended(start="threads") as control:
        assert "expected one thread in the process that forks the workers; got 2" in ask(control)["error"]
        assert ask(control) is None
