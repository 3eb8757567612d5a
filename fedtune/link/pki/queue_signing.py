"""The CA's half of a queue: every request is renewed, signed or left, and one roster goes back with the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from fedtune.errors import ConfigError
from fedtune.link.pki import authority
from fedtune.link.pki.queue_files import ROSTER, Answer, Waiting, digest, load, write_answer
from fedtune.link.pki.roster import Roster
from fedtune.store.files import write_bytes

Verdict: TypeAlias = Literal["sign", "reject", "leave"]
Outcome: TypeAlias = Literal["enrolled", "renewed", "rejected", "left", "failed"]


@dataclass(frozen=True)
class Result:
    """What became of one request."""

    name: str
    outcome: Outcome
    text: str = ""
    """Why it failed or was left, or what was signed; empty: the outcome says it."""


def is_renewal(current: Roster, waiting: Waiting) -> bool:
    """Return whether a request is signed by the key that the roster has under its name, for the same role.

    Whose key it is was settled when it was enrolled: there is no fingerprint to compare.
    """
    known = current.parties.get(waiting.request.name)
    return known is not None and authority.renewal_fault(known, waiting.request) is None


def sign_queue(
    ca: Path, queue: Path, decide: Callable[[Waiting], Verdict], *, days: int, replace: bool = False, now: int
) -> Iterator[Result]:
    """Answer the requests of a queue, one after the other, and put the newest roster beside the answers.

    Args:
        ca: folder of the CA.
        queue: folder with the requests; answers go there, too.
        decide: says what is done with a request that is no renewal.
        days: life of the certificates.
        replace: whether a known party may have other keys, another organisation or role, if `decide` has it signed.
        now: seconds since 1970.

    Raises:
        ConfigError: if the CA cannot sign at all.
        StoreError: if the queue cannot be read or written.
    """
    authority.current_roster(ca)
    waiting, problems = load(queue)
    for problem in problems:
        yield Result("", "failed", problem)
    changed = False
    for request in waiting:
        # What was answered before the queue was carried a second time is not signed again.
        if request.answered:
            continue
        try:
            result = answer_one(ca, queue, request, decide, days=days, replace=replace, now=now)
        # A request that must not be signed costs no other one anything; the disk that is full costs all.
        except ConfigError as error:
            result = Result(request.request.name, "failed", str(error))
        changed = changed or result.outcome in ("enrolled", "renewed")
        yield result
    if not changed:
        authority.renew(ca, now=now)
    write_bytes(queue / ROSTER, authority.read_ca_file(ca / authority.ROSTER))


def answer_one(
    ca: Path, queue: Path, waiting: Waiting, decide: Callable[[Waiting], Verdict], *, days: int, replace: bool, now: int
) -> Result:
    """Answer one request.

    Raises:
        ConfigError: if it must not be signed, with the reason.
        StoreError: if it cannot be written.
    """
    name = waiting.request.name
    renewal = is_renewal(authority.current_roster(ca), waiting)
    verdict = "sign" if renewal else decide(waiting)
    if verdict == "leave":
        return Result(name, "left")
    if verdict == "reject":
        write_answer(queue, name, Answer(digest(waiting.data), b"", "the person who signs has rejected it"))
        return Result(name, "rejected")
    bundle = authority.sign_request(ca, waiting.data, days=days, replace=replace and not renewal, now=now)
    write_answer(queue, name, Answer(digest(waiting.data), bundle))
    # The roster does not say which hosts a coordinator had, so they are not compared but shown.
    hosts = f", for {', '.join(waiting.request.hosts)}" if waiting.request.role == "coordinator" else ""
    return Result(name, "renewed", f"renewed{hosts}") if renewal else Result(name, "enrolled", f"enrolled{hosts}")
