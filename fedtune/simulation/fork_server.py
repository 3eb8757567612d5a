"""The process that loads the base once and forks workers that share its memory, and the loop that each worker runs."""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

from fedtune.errors import ConfigError, FedtuneError, RoundError
from fedtune.messages import Assignment, ClientUpdate
from fedtune.rounds.failures import debug_traceback, failure_of
from fedtune.tensors import Tensors
from fedtune.wire.codec import blob_decoder, decode_assignment, encode_update
from fedtune.wire.v1 import round_pb2 as pb

ALIGNMENT = 64
"""Parts of a payload start at a multiple of this, so that arrays can be used where they lie."""

LEAVE_S = 2.0
"""Seconds that threads of the libraries are given to end after loading."""

MAX_MESSAGE_BYTES = 64 * 1024
"""Of the control socket."""

PR_SET_PDEATHSIG = 1  # linux/prctl.h

PerformBytes: TypeAlias = Callable[[Assignment, int], ClientUpdate]
"""Performs an assignment with a number of CPU threads."""


@dataclass(frozen=True)
class Prepared:
    """What a fork server has loaded."""

    make_worker: Callable[[int], PerformBytes]
    """Called in a worker, with its place among the workers; returns what performs its assignments."""
    devices: tuple[str, ...] = ("cpu",)
    """Where workers compute, in turn."""


Prepare: TypeAlias = Callable[[Mapping[str, Any], Mapping[str, memoryview]], Prepared]
"""Loads what a payload describes, in one thread and without touching a GPU: neither outlives a fork."""


def write_payload(spec: Mapping[str, Any], parts: Mapping[str, bytes]) -> int:
    """Return the descriptor of a file in memory that holds a JSON value and named bytes."""
    places, end = dict[str, tuple[int, int]](), 0
    for name, part in parts.items():
        places[name] = (end, len(part))
        end += len(part) + -len(part) % ALIGNMENT
    head = json.dumps({"spec": spec, "parts": places}).encode()
    head = len(head).to_bytes(8, "little") + head
    descriptor = os.memfd_create("fedtune")
    with open(descriptor, "wb", closefd=False) as file:
        file.write(head + bytes(-len(head) % ALIGNMENT))
        for part in parts.values():
            file.write(part)
            file.write(bytes(-len(part) % ALIGNMENT))
    return descriptor


def read_payload(descriptor: int) -> tuple[Mapping[str, Any], Mapping[str, memoryview]]:
    """Return what `write_payload` wrote; the parts are views of the file's own memory, so they are never copied."""
    view = memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
    length = int.from_bytes(view[:8], "little")
    head = json.loads(bytes(view[8 : 8 + length]))
    start = 8 + length + -(8 + length) % ALIGNMENT
    return head["spec"], {name: view[start + at : start + at + size] for name, (at, size) in head["parts"].items()}


def serve(descriptor: int, prepare: Prepare) -> None:
    """Load the payload that comes first, then fork and end workers on request, until the control socket closes.

    The process ends with that. Each message is one packet of JSON, with a descriptor where one is needed: `load` (the
    payload), `fork` (the worker's socket) and `end`; the answers are `devices`, `pid` and `status`, or `error`, or the
    `faults` of a ConfigError.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control, workers = socket.socket(fileno=descriptor), set[int]()
    with exit_after(lambda text: send_answer(control, {"error": text})):
        try:
            prepared = load_payload(control, prepare)
            while prepared is not None:
                request, descriptors = receive(control)
                if request is None:
                    break
                if request["verb"] == "fork":
                    fork(control, descriptors[0], request["place"], prepared, workers)
                else:
                    os.kill(request["pid"], signal.SIGKILL)  # changes nothing where it is dead already
                    send_answer(control, {"status": os.waitstatus_to_exitcode(os.waitpid(request["pid"], 0)[1])})
                    workers.discard(request["pid"])
        finally:
            for pid in workers:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def load_payload(control: socket.socket, prepare: Prepare) -> Prepared | None:
    """Load what the first message describes; None if there is no message, or the load failed, which is answered."""
    request, descriptors = receive(control)
    if request is None:
        return None
    spec, parts = read_payload(descriptors[0])
    os.close(descriptors[0])
    try:
        prepared = prepare(spec, parts)
        names = threads(LEAVE_S)
        if len(names) > 1:
            raise RoundError(
                f"expected one thread in the process that forks the workers; got {len(names)} ({', '.join(names)}); "
                'find what starts them (a profiler, a pool of a library), or set engine.name = "inprocess"'
            )
    except ConfigError as error:
        send_answer(control, {"faults": [asdict(fault) for fault in error.faults], "source": error.source})
        return None
    except FedtuneError as error:
        send_answer(control, {"error": str(error)})
        return None
    gc.collect()
    gc.freeze()  # else each worker's first collection would write into, and so copy, every page that holds an object
    send_answer(control, {"devices": prepared.devices})
    return prepared


def threads(limit_s: float) -> Sequence[str]:
    """Return the names of this process's threads, after waiting some seconds for all but one to end.

    Libraries load with pools of threads that they do not wait for.
    """
    deadline = time.monotonic() + limit_s
    while True:
        names = []
        for task in Path("/proc/self/task").iterdir():
            with suppress(OSError):  # it has ended meanwhile
                names.append((task / "comm").read_text().strip())
        if len(names) < 2 or time.monotonic() > deadline:
            return names
        time.sleep(0.01)


def fork(control: socket.socket, descriptor: int, place: int, prepared: Prepared, workers: set[int]) -> None:
    """Fork a worker on its end of a socket, and answer with its process id."""
    parent = os.getpid()
    try:
        pid = os.fork()
    except OSError as error:  # no memory, or too many processes
        os.close(descriptor)
        send_answer(control, {"error": str(error)})
        return
    if pid == 0:
        control.close()
        connection: Connection[bytes, bytes] = Connection(descriptor)
        with exit_after(lambda text: send_result(connection, b"broken", text.encode())):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == parent:  # else it died before its death could be noticed
                with suppress(OSError):
                    # Where memory runs out, the system must kill a worker before its parent or the user's process.
                    Path("/proc/self/oom_score_adj").write_text("500")
                work(connection, prepared.make_worker(place))
    os.close(descriptor)
    workers.add(pid)
    send_answer(control, {"pid": pid})


def work(connection: Connection[bytes, bytes], perform: PerformBytes) -> None:
    """Perform assignments one after the other, until the connection closes.

    A request is a JSON value, an assignment's header, and those of its bodies that this worker does not have yet. The
    answer is a word and its content: `update` with its bytes, `failed` with the reason, or `broken` with the reason
    where the error is not fedtune's own: it ends this process, whose memory or GPU it may have spoiled.
    """
    bodies, decoders = dict[str, bytes](), dict[str, Callable[[pb.Blob, bytes], Tensors]]()

    def decode(header: pb.Blob, body: bytes) -> Tensors:
        return decoders[header.digest.hex()](header, body)

    while True:
        try:
            request, header = json.loads(connection.recv_bytes()), connection.recv_bytes()
            for digest in request["drop"]:
                del bodies[digest], decoders[digest]
            for digest in request["bodies"]:
                bodies[digest], decoders[digest] = connection.recv_bytes(), blob_decoder()
        except EOFError:
            return
        try:
            assignment = decode_assignment(header, bodies, decode=decode)
            word, content = b"update", encode_update(perform(assignment, request["threads"]))
        except (Exception, SystemExit) as error:
            word = b"failed" if isinstance(error, FedtuneError) else b"broken"
            content = failure_of(request["client"], error).reason.encode()
            debug_traceback(error)
        # Last, because the reader kills a broken process.
        send_result(connection, word, content)
        if word == b"broken":
            return


@contextmanager
def exit_after(report: Callable[[str], None]) -> Iterator[None]:
    """End this process after the block, whatever happens in it; an error is reported in one line first.

    Its traceback is printed only where FEDTUNE_DEBUG asks for it.
    """
    status = 1
    try:
        yield
        status = 0
    except BaseException as error:
        if os.environ.get("FEDTUNE_DEBUG"):
            traceback.print_exc()
        sys.stderr.flush()
        report(
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        )  # last, because the reader may kill this process
        raise
    finally:
        os._exit(status)  # a fork must not run the exit handlers of its parent


def receive(control: socket.socket) -> tuple[Any, list[int]]:
    """Return a message's JSON value, None at the end, and the descriptors that came with it."""
    data, descriptors, _, _ = socket.recv_fds(control, MAX_MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
    return (json.loads(data) if data else None), descriptors


def send_answer(control: socket.socket, message: Mapping[str, Any]) -> None:
    with suppress(OSError):  # the other end has closed; the next `receive` says so
        control.send(json.dumps(message).encode())


def send_result(connection: Connection[bytes, bytes], word: bytes, content: bytes) -> None:
    with suppress(OSError):  # as above
        connection.send_bytes(word)
        connection.send_bytes(content)
