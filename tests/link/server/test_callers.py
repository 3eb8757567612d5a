"""Who may call is asked with every call, while it lasts, and before anything is written."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.link.pki import authority
from fedtune.link.pki.certificates import key_digest
from fedtune.link.pki.roster import SKEW_S, Party, Roster
from fedtune.link.rejections import RejectionError
from fedtune.link.server.blocklist import Blocklist
from fedtune.link.server.callers import Caller, Callers, read_certificate
from fedtune.link.settings import LinkSettings
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.ceremony import copy_roster
from tests.link.harness import assignment
from tests.link.link_server import SETTINGS, LinkServer, greeting, run_link_server
from tests.link.server.test_receiving import DATA, pushing, trickle
from tests.link.server.test_service import begun, post_task, reason, until


def test_a_certificate_names_its_party_and_another_file_none(link: LinkServer) -> None:
    identity = link.identities["site-a"]
    dates = identity.not_before, identity.not_after
    pem, key = identity.certificate, key_digest(identity.certificate)
    assert read_certificate(pem) == Caller("care", "site-a", identity.serial, *dates, key, pem)
    with pytest.raises(RejectionError, match="NOT_IN_ROSTER"):
        read_certificate(identity.ca)


DAY_S = 86_400
CALLER = Caller("care", "anna", "ab", 1000, 1000 + 90 * DAY_S)
PARTY = Party("anna", "org", "client", b"k" * 32, ("ab",), 1000, 1000 + 90 * DAY_S)
ROSTER = Roster("care", 1, 1000 + 200 * DAY_S, {"anna": PARTY})


@pytest.mark.guarantee("G6")
@pytest.mark.parametrize(
    ("now", "party", "barred", "why"),
    [
        (2000, {}, "", ""),
        (1001 + 90 * DAY_S, {}, "", "its time in the roster ended on"),
        (2000, {"state": "revoked"}, "", "it is revoked"),
        (2000, {"role": "coordinator"}, "", "it is no client of the roster"),
        (2000, {"name": "ben"}, "", "it is no client of the roster"),
        (2000, {}, "anna too slow", "it is barred: too slow"),
        (1001 + 200 * DAY_S, {"not_after": 10**12}, "", ""),  # the server's own roster has ended
    ],
)
def test_a_client_is_excluded_whatever_certificate_it_brings(
    tmp_path: Path, now: int, party: dict[str, Any], barred: str, why: str
) -> None:
    entry = replace(PARTY, **party)
    roster: Any = SimpleNamespace(current=lambda: replace(ROSTER, parties={entry.name: entry}))
    (tmp_path / "barred").write_text(barred)
    exclusion = Callers(roster, Blocklist(tmp_path / "barred"), now=lambda: now).exclusion("anna")
    assert exclusion.startswith(why)
    assert bool(exclusion) == bool(why)


@pytest.mark.guarantee("G6")
@pytest.mark.parametrize(
    ("now", "certificate", "party", "code"),
    [
        (2000, {}, {}, ""),
        (1000 + 90 * DAY_S, {}, {}, ""),  # in its last second
        (1001 + 90 * DAY_S, {}, {"not_after": 1000 + 180 * DAY_S}, "CERTIFICATE_ENDED"),
        (1001 + 90 * DAY_S, {"not_after": 1000 + 180 * DAY_S}, {}, "CERTIFICATE_ENDED"),
        (1000 - SKEW_S, {}, {}, ""),  # a clock that is behind by an hour
        (999 - SKEW_S, {}, {}, "CERTIFICATE_ENDED"),
        (2000, {"serial": "cd"}, {}, "SERIAL_UNKNOWN"),
        (2000, {}, {"state": "revoked"}, "REVOKED"),
        (2000, {}, {"role": "coordinator"}, "WRONG_ROLE"),
        (2000, {"name": "ben"}, {}, "NOT_IN_ROSTER"),
        (2000, {"federation": "other"}, {}, "WRONG_FEDERATION"),
        (1001 + 200 * DAY_S, {"not_after": 10**12}, {"not_after": 10**12}, "ROSTER_OLD"),
    ],
)
def test_a_caller_is_admitted_by_its_certificate_the_roster_and_the_dates_of_both(
    tmp_path: Path, now: int, certificate: dict[str, Any], party: dict[str, Any], code: str
) -> None:
    roster: Any = SimpleNamespace(current=lambda: replace(ROSTER, parties={"anna": replace(PARTY, **party)}))
    excused = list[str]()
    callers = Callers(roster, Blocklist(tmp_path / "barred"), now=lambda: now, excuse=excused.append)
    caller = replace(CALLER, **certificate)
    if not code:
        assert callers.admit(caller).name == "anna"
        return
    with pytest.raises(RejectionError) as caught:
        callers.admit(caller)
    assert reason(caught.value.refusal) == code
    # The coordinator's own fault costs no client its place in the round.
    assert excused == (["anna"] if code == "ROSTER_OLD" else [])


def revoke(link: LinkServer) -> None:
    authority.revoke(link.places["ca"], "site-a", now=int(link.time.now))
    copy_roster(link.places["ca"], link.places, to=["server"])
    link.clock.now += 2


def end_certificate(link: LinkServer) -> None:
    link.time.now += 91 * DAY_S


def bar(link: LinkServer) -> None:
    link.dispatcher.blocklist.block("site-a", "by the operator")


@pytest.mark.guarantee("G2")
@pytest.mark.parametrize(
    ("change", "code"), [(revoke, "REVOKED"), (bar, "BARRED"), (end_certificate, "CERTIFICATE_ENDED")]
)
def test_calls_under_way_end_when_their_member_is_taken_out(
    tmp_path: Path, change: Callable[[LinkServer], None], code: str
) -> None:
    with run_link_server(tmp_path, replace(SETTINGS, hold_s=300, stall_s=60, part_kib=256)) as link:
        held, calls, body = list[pb.NextReply](), link.calls(), bytes(2**27)
        post_task(link, "site-a", assignment("site-a", 1).header, {sha256(body).hexdigest(): body})
        fetched: Any = link.calls().fetch(pb.FetchRequest(digest=sha256(body).digest()), timeout=60)
        assert next(fetched).data
        _, first = begun(link, "site-a", DATA)
        epoch = greeting(calls).epoch
        ends = threading.Event()
        thread, acks = pushing(link, "site-a", trickle(first, ends=ends, each=pb.PushPart(data=bytes(4096))))
        offered = [pb.Header.FromString(task.envelope.header) for task in link.dispatcher._tasks.of_client("site-a")]
        holding = [task.digest for task in link.dispatcher._tasks.of_client("site-a")]
        assert len(offered) == len(holding)
        question = pb.NextRequest(epoch=epoch, holding=holding)
        waiter = threading.Thread(target=lambda: held.append(calls.next(question, timeout=60)))
        waiter.start()
        until(link, lambda: link.dispatcher.status()["site-a"].seen_s == 0.0)
        change(link)
        waiter.join()
        thread.join()
        ends.set()
        assert reason(held[0].refusal) == code
        assert reason(acks[-1].refusal) == code
        # What was under way when it was taken out may still be in buffers; the whole body never comes.
        chunks = list(fetched)
        assert reason(chunks[-1].refusal) == code
        assert sum(len(one.data) for one in chunks) < len(body)


@pytest.mark.guarantee("G14")
def test_a_member_that_is_refused_all_the_time_is_put_off_without_a_look(tmp_path: Path) -> None:
    with run_link_server(tmp_path, LinkSettings(listen="127.0.0.1:0", drain_s=0)) as link:
        calls = link.calls()
        codes = [reason(greeting(calls, protocols=[99]).refusal) for _ in range(31)]
        assert codes == ["PROTOCOL"] * 30 + ["TOO_MANY_CALLS"]
        assert reason(greeting(link.calls("site-b")).refusal) == "REASON_UNSET"
