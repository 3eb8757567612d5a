"""The queue of requests between a coordinator and the CA: a folder that a person carries; no file in it is trusted."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from fedtune.errors import ConfigError, Fault, FedtuneError, WireError
from fedtune.link.pki.dsse import canonical_json, parse_json, read_fields
from fedtune.link.pki.enrollment import MAX_BUNDLE_BYTES, Request, read_request
from fedtune.link.pki.signing import fingerprint
from fedtune.store.files import remove, store_errors, write_bytes

REQUEST, ANSWER = ".request.json", ".answer.json"
ROSTER, REGISTRAR = "roster", "registrar.json"
"""The newest roster on its way back from the CA; a registrar's request on its way there."""
MAX_REQUEST_BYTES = 16 * 2**10
MAX_WAITING = 2000
"""Requests of a queue; further ones are put off until some are answered."""


@dataclass(frozen=True)
class Waiting:
    """A request in a queue, its signatures verified."""

    request: Request
    data: bytes
    since: float
    """Seconds since 1970, by the clock of the machine that wrote the file."""
    answered: bool

    @property
    def fingerprint(self) -> str:
        """To compare by voice with the site."""
        return fingerprint(self.data)


@dataclass(frozen=True)
class Answer:
    """What the CA has answered to a request."""

    request: str
    """Digest (hex) of the request."""
    bundle: bytes
    """Empty if it was rejected."""
    reason: str = ""


def read_regular(path: Path, longest: int) -> bytes | None:
    """Return the content of a regular file of at most so many bytes; None for anything else, such as a link.

    A queue has been on a stick and on another machine: a link in it would have the CA read a file of its own, and a
    pipe hold it for ever.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > longest:
            return None
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(longest)
    finally:
        os.close(descriptor)


def digest(data: bytes) -> str:
    return sha256(data).hexdigest()


def put(queue: Path, data: bytes, request: Request) -> bool:
    """Put a verified request into a queue; return False if that is full.

    A later one under a name takes the place of the earlier: the caller has made sure that it is of the same keys.
    """
    path = queue / f"{request.name}{REQUEST}"
    if read_regular(path, MAX_REQUEST_BYTES) == data:
        return True
    if not path.exists() and count(queue) >= MAX_WAITING:
        drop_signed(queue)
        if count(queue) >= MAX_WAITING:
            return False
    write_bytes(path, data)
    return True


def drop_signed(queue: Path) -> None:
    """Remove the requests of a queue that have been signed; their answers stay, and are all that a site still needs."""
    for waiting in load(queue)[0]:
        answer = read_answer(queue, waiting.request.name)
        if waiting.answered and answer is not None and answer.bundle:
            remove(queue / f"{waiting.request.name}{REQUEST}")


def rejection_of(queue: Path, name: str, key: bytes) -> str | None:
    """Return why the last request of a name was rejected, if it is of this signing key; None if it was not."""
    answer = read_answer(queue, name)
    data = read_regular(queue / f"{name}{REQUEST}", MAX_REQUEST_BYTES)
    if answer is None or answer.bundle or data is None or answer.request != digest(data):
        return None
    try:
        return answer.reason if read_request(data).key == key else None
    except WireError:
        return None


def forget_rejected(queue: Path, name: str) -> None:
    """Remove a request that was rejected, and that answer: a new code lets the same keys ask once more."""
    answer = read_answer(queue, name)
    if answer is not None and not answer.bundle:
        for end in (REQUEST, ANSWER):
            remove(queue / f"{name}{end}")


def count(queue: Path) -> int:
    """Return how many requests lie in a queue, answered or not."""
    try:
        return sum(name.endswith(REQUEST) for name in os.listdir(queue))
    except FileNotFoundError:
        return 0


def load(queue: Path) -> tuple[Sequence[Waiting], Sequence[str]]:
    """Return the requests of a queue, oldest first, and a sentence for each file that is none.

    Raises:
        StoreError: if the folder cannot be read.
    """
    with store_errors(queue):
        names = sorted(name for name in os.listdir(queue) if name.endswith(REQUEST))
    waiting, problems = list[Waiting](), list[str]()
    for name in names[:MAX_WAITING]:
        try:
            waiting.append(load_one(queue, name))
        except FedtuneError as error:
            problems.append(f"{name}: left out: {error}")
    if len(names) > MAX_WAITING:
        problems.append(f"expected at most {MAX_WAITING} requests; got {len(names)}; the last ones are left out")
    return sorted(waiting, key=lambda one: (one.since, one.request.name)), problems


def load_one(queue: Path, name: str) -> Waiting:
    """Return the request of one file.

    Raises:
        WireError: if it is no request, or one of another name than its file's.
    """
    data = read_regular(queue / name, MAX_REQUEST_BYTES)
    if data is None:
        raise WireError(f"expected a regular file of at most {MAX_REQUEST_BYTES} bytes; got something else")
    request = read_request(data)
    # Two files could hold one request under two names, and one of them answer the other's.
    if name != f"{request.name}{REQUEST}":
        raise WireError(f"expected the request of {name.removesuffix(REQUEST)[:100]!r}; got that of {request.name!r}")
    answer = read_answer(queue, request.name)
    is_answered = answer is not None and answer.request == digest(data)
    try:
        since = (queue / name).lstat().st_mtime
    except OSError:
        since = time.time()
    return Waiting(request, data, since, is_answered)


def write_answer(queue: Path, name: str, answer: Answer) -> None:
    """Write what the CA answers to the request of a name, in one step."""
    body = {"request": answer.request, "bundle": answer.bundle.decode(), "reason": answer.reason}
    write_bytes(queue / f"{name}{ANSWER}", canonical_json(body) + b"\n")


def read_answer(queue: Path, name: str) -> Answer | None:
    """Return the answer to the request of a name; None if there is none, or its file is damaged."""
    # Quotes and line breaks of the bundle are escaped once more.
    data = read_regular(queue / f"{name}{ANSWER}", 2 * MAX_BUNDLE_BYTES)
    if data is None:
        return None
    try:
        request, bundle, reason = read_fields(
            parse_json(data, "answer"), {"request": str, "bundle": str, "reason": str}, "answer"
        )
    except WireError:
        return None
    return Answer(request, bundle.encode(), reason)


def read_given(path: Path, longest: int, step: str) -> bytes:
    """Return a file of a queue that a person has named.

    Raises:
        ConfigError: if it is no regular file, naming the command that writes such a file.
    """
    data = read_regular(path, longest)
    if data is None:
        raise ConfigError(Fault("", f"a regular file {path}", "none", f"it is made by {step}"))
    return data
