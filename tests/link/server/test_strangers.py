"""Without a valid certificate no call is reached, and with one each client is itself in all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedtune.link.client.channel import dial, link_stub
from fedtune.link.envelopes import digest
from fedtune.link.pki import authority, certificates
from fedtune.link.pki.identity import Identity, load_identity
from fedtune.link.settings import JoinSettings
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.ceremony import enroll_parties
from tests.link.harness import assignment
from tests.link.link_server import LinkServer, greeting
from tests.link.server.test_service import CALLS, accepting, parts, post_task, reason, signed, status

DAY_S = 86_400


def certified(
    link: LinkServer, *, begins_s: int, days: int = 90, name: str = "site-a", server: bool = False
) -> Identity:
    """Return the identity of a site with another certificate of the federation's CA, for the same key."""
    identity, ca = link.identities["site-a"], link.places["ca"]
    pem = certificates.issue_certificate(
        certificates.load_tls_key(identity.tls_key).public_key(),
        f"{certificates.SCHEME}care/org-{name}/{name}",
        hosts=("localhost",) if server else (),
        server=server,
        days=days,
        ca=identity.ca,
        ca_key=certificates.load_tls_key((ca / authority.CA_KEY).read_bytes()),
        now=int(time.time()) + begins_s,
    )
    return replace(identity, certificate=pem)


def self_signed(link: LinkServer) -> Identity:
    """Return an identity whose certificate its own key has signed, under the name of the CA."""
    identity, key = link.identities["site-a"], certificates.new_tls_key()
    ca = certificates.ca_certificate("care", key, years=1, now=int(time.time()))
    pem = certificates.issue_certificate(
        key.public_key(),
        f"{certificates.SCHEME}care/org-site-a/site-a",
        hosts=(),
        server=False,
        days=90,
        ca=ca,
        ca_key=key,
        now=int(time.time()),
    )
    return replace(identity, tls_key=certificates.pem_of(key), certificate=pem)


def strangers(link: LinkServer, folder: Path) -> Mapping[str, Callable[[], grpc.Channel | Identity]]:
    """Return what no call may be made with, by what is wrong with it."""
    own = link.identities["site-a"]
    place = enroll_parties(folder / "other", clients=("site-a",))["site-a"]
    other = replace(load_identity(place, role="client", now=int(time.time())), ca=own.ca)
    address = f"localhost:{link.port}"
    anchors = grpc.ssl_channel_credentials(own.ca)
    return {
        "no TLS": lambda: grpc.insecure_channel(address),
        "no certificate": lambda: grpc.secure_channel(address, anchors),
        "a certificate of another CA": lambda: other,
        "a certificate that its own key signed": lambda: self_signed(link),
        "a certificate that has ended": lambda: certified(link, begins_s=-100 * DAY_S),
        "a certificate that has not begun": lambda: certified(link, begins_s=10 * DAY_S),
        "the coordinator's certificate": lambda: link.identities["server"],
        "a certificate of a server": lambda: certified(link, begins_s=0, server=True),
    }


@pytest.mark.guarantee("G6")
def test_no_stranger_reaches_any_call(link: LinkServer, tmp_path: Path, cases: Callable[[int], None]) -> None:
    for what, make in strangers(link, tmp_path).items():
        for call in CALLS:
            made = make()  # a connection of its own for each call
            stub = dial(made, JoinSettings(f"localhost:{link.port}")) if isinstance(made, Identity) else link_stub(made)
            assert status(lambda call=call, stub=stub: CALLS[call](stub)) in (  # type: ignore[misc]
                grpc.StatusCode.UNAVAILABLE,
                grpc.StatusCode.INTERNAL,
            ), (what, call)
            stub.close()
            cases(1)
    assert not link.dispatcher.status()
    assert reason(greeting(link.calls()).refusal) == "REASON_UNSET"


@pytest.mark.guarantee("G6")
def test_a_certificate_that_the_roster_does_not_name_is_refused_in_every_call(
    link: LinkServer, cases: Callable[[int], None]
) -> None:
    """Of the right CA and the right key, as one that was issued without the roster, or replaced since."""
    for name, expected in (("site-a", "SERIAL_UNKNOWN"), ("site-c", "NOT_IN_ROSTER"), ("server", "WRONG_ROLE")):
        calls = dial(certified(link, begins_s=0, name=name), JoinSettings(f"localhost:{link.port}"))
        for call, ask in CALLS.items():
            assert reason(ask(calls)) in (expected, "SERIAL_UNKNOWN"), (name, call)
            cases(1)
        calls.close()


@pytest.mark.guarantee("G6")
def test_a_client_gets_sends_and_finishes_nothing_of_another(link: LinkServer, cases: Callable[[int], None]) -> None:
    body, data = bytes(range(256)) * 100, bytes(range(256)) * 200
    task, _ = post_task(link, "site-a", assignment("site-a", 1).header, {sha256(body).hexdigest(): body})
    answer = signed(link, "site-a", task, data)
    captured = pb.SubmitRequest(envelope=answer)
    assert link.calls().submit(captured, timeout=10).wanted.parts
    thief: Any = link.calls("site-b")
    (no,) = thief.fetch(pb.FetchRequest(digest=sha256(body).digest()), timeout=10)
    assert reason(no.refusal) == "NOT_WANTED"
    acks = list(thief.push(parts(answer, data), timeout=10))
    assert reason(acks[-1].refusal) == "NOT_WANTED"
    assert reason(thief.submit(captured, timeout=10).refusal) == "AUTHOR_MISMATCH"
    assert not link.dispatcher.collect([link.ids[digest(task)]])
    # What it captured is the other's all the same, byte for byte.
    assert list(link.calls().push(parts(answer, data), timeout=10))[-1].complete
    with accepting(link, task) as received:
        link.calls().submit(captured, timeout=30)
    assert [(one.client, bytes(one.bodies["update"])) for one in received] == [("site-a", data)]
    cases(3)
