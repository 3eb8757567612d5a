from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fedtune.errors import TemporaryError
from fedtune.link.pki import authority, certificates, enrollment, invitations, queue_files
from fedtune.link.pki.identity import load_identity
from fedtune.link.pki.queue_signing import Verdict, sign_queue
from fedtune.link.pki.roster import RosterFile
from fedtune.link.server.enrolment import Desk
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.ceremony import enroll_parties
from tests.link.harness import Clock
from tests.link.pki.registry import make_registry

NOW = 1_800_000_000
DAY_S = 86_400


@dataclass
class Counter:
    """A desk, its CA and what it has recorded."""

    folder: Path
    desk: Desk
    time: Clock
    places: dict[str, Path]
    roster: RosterFile
    events: list[tuple[str, dict[str, int | str]]] = field(default_factory=list)

    def invite(self, name: str = "anna", org: str = "a", *, hours: int = 24) -> invitations.Code:
        server = self.desk._identity
        return invitations.invite(
            self.desk.folder,
            address="localhost:1",
            server="localhost:2",
            name=name,
            org=org,
            ca=server.ca,
            root=server.root,
            hours=hours,
            now=int(self.time.now),
        )

    def request(self, place: str, name: str = "anna", **changes: object) -> bytes:
        given = {"name": name, "org": "a", "role": "client", **changes}
        return enrollment.make_request(self.folder / "sites" / place, **given)  # type: ignore[arg-type]

    def enrol(self, code: invitations.Code, data: bytes) -> pb.EnrolReply:
        identifier, signature = code.prove(data)
        return self.desk.enrol(pb.EnrolRequest(invitation=identifier, request=data, signature=signature))

    def sign(self, verdict: Verdict = "sign") -> list[str]:
        results = sign_queue(self.places["ca"], self.desk.queue, lambda one: verdict, days=90, now=int(self.time.now))
        return [one.outcome for one in results]

    def names(self) -> list[str]:
        queue = self.desk.queue
        return [one.request.name for one in queue_files.load(queue)[0]] if queue.is_dir() else []

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]


@pytest.fixture
def counter(tmp_path: Path) -> Counter:
    places = dict(enroll_parties(tmp_path, now=NOW))
    identity = load_identity(places["server"], role="coordinator", now=NOW)
    wall = Clock(float(NOW))
    roster = RosterFile(places["server"] / "roster", identity.root, now=wall)
    events: list[tuple[str, dict[str, int | str]]] = []

    def record(kind: str, **fields: int | str) -> None:
        events.append((kind, dict(fields)))

    desk = Desk(tmp_path / "enrolment", identity, roster, record=record, now=wall)
    return Counter(tmp_path, desk, wall, places, roster, events)


def reason(reply: pb.EnrolReply) -> str:
    return pb.Reason.Name(reply.refusal.reason)


def test_a_request_waits_until_it_is_signed_and_then_the_site_has_its_bundle(counter: Counter) -> None:
    code, data = counter.invite(), counter.request("one")
    assert counter.enrol(code, data).pending.retry_after_ms > 0
    assert counter.names() == ["anna"]
    assert counter.sign() == ["enrolled"]
    # Not before the roster of this server names the certificate: the site would be refused for good with it.
    assert counter.enrol(code, data).WhichOneof("what") == "pending"
    counter.desk.look()
    bundle = counter.enrol(code, data).bundle
    assert enrollment.accept_bundle(counter.folder / "sites" / "one", bundle, now=NOW).name == "anna"
    assert counter.kinds() == ["queued", "roster", "delivered"]


@pytest.mark.guarantee("G5")
def test_a_call_may_be_repeated_and_replayed_without_harm(counter: Counter) -> None:
    code, data = counter.invite(), counter.request("one")
    for _ in range(3):
        assert counter.enrol(code, data).WhichOneof("what") == "pending"
    counter.sign()
    counter.desk.look()
    assert counter.enrol(code, data).bundle == counter.enrol(code, data).bundle
    assert counter.kinds().count("queued") == 1
    # The signature of one request does not carry another.
    identifier, signature = code.prove(data)
    other = pb.EnrolRequest(invitation=identifier, request=counter.request("two"), signature=signature)
    assert reason(counter.desk.enrol(other)) == "INVITATION_UNKNOWN"


@pytest.mark.guarantee("G6")
def test_a_code_that_is_used_twice_late_or_for_somebody_else_is_refused(counter: Counter) -> None:
    code = counter.invite()
    for changes in ({"name": "bob"}, {"org": "b"}, {"role": "auditor"}, {"role": "coordinator", "hosts": ("h",)}):
        assert reason(counter.enrol(code, counter.request("one", **changes))) == "REQUEST_DIFFERS"
    assert counter.names() == []
    first = counter.request("one")
    counter.enrol(code, first)
    assert reason(counter.enrol(code, counter.request("two"))) == "INVITATION_USED"
    assert [one.data for one in queue_files.load(counter.desk.queue)[0]] == [first]
    late = counter.invite("bob")
    counter.time.now += 24 * 3600 + 1
    assert reason(counter.enrol(late, counter.request("bob", name="bob"))) == "INVITATION_ENDED"
    # A person may sign after days: who asked in time still gets the answer.
    assert counter.enrol(code, first).WhichOneof("what") == "pending"
    counter.time.now += 31 * DAY_S
    assert reason(counter.enrol(code, first)) == "INVITATION_ENDED"


@pytest.mark.guarantee("G16")
def test_an_hour_of_clock_skew_between_the_parties_changes_nothing(counter: Counter) -> None:
    code, data = counter.invite(), counter.request("one")
    counter.time.now -= 3600  # the coordinator's clock is set back after the code was made
    assert counter.enrol(code, data).WhichOneof("what") == "pending"
    results = sign_queue(
        counter.places["ca"], counter.desk.queue, lambda one: "sign", days=90, now=int(counter.time.now) + 3600
    )
    assert [one.outcome for one in results] == ["enrolled"]
    counter.desk.look()
    bundle = counter.enrol(code, data).bundle
    # The CA's clock is an hour ahead of the site's: its certificate begins later, and a site waits for that by itself.
    with pytest.raises(TemporaryError, match="check this clock"):
        enrollment.accept_bundle(counter.folder / "sites" / "one", bundle, now=int(counter.time.now) - 3600)
    assert enrollment.accept_bundle(counter.folder / "sites" / "one", bundle, now=int(counter.time.now)).name == "anna"


def test_the_holder_of_a_code_may_ask_anew_with_the_same_keys(counter: Counter) -> None:
    code, first = counter.invite(), counter.request("one")
    counter.enrol(code, first)
    second = counter.request("one")
    assert second != first
    counter.enrol(code, second)
    assert [one.data for one in queue_files.load(counter.desk.queue)[0]] == [second]


@pytest.mark.guarantee("G6")
def test_guesses_and_malformed_requests_learn_nothing_and_leave_nothing(counter: Counter) -> None:
    code, data = counter.invite(), counter.request("one")
    identifier, signature = code.prove(data)
    replies = [
        counter.desk.enrol(pb.EnrolRequest(invitation=bytes(16), request=data, signature=signature)),
        counter.desk.enrol(pb.EnrolRequest(invitation=identifier, request=data, signature=bytes(64))),
        counter.desk.enrol(pb.EnrolRequest(invitation=b"../../x", request=data, signature=signature)),
        counter.desk.enrol(pb.EnrolRequest()),
    ]
    assert len({one.SerializeToString() for one in replies}) == 1
    assert reason(replies[0]) == "INVITATION_UNKNOWN"
    for bad in (b"", b"{}", data[:-9], b"x" * 20_000):
        assert reason(counter.enrol(code, bad)) == "MALFORMED"
    assert counter.names() == []
    assert counter.kinds().count("refused") == 8
    assert counter.enrol(code, data).WhichOneof("what") == "pending"


def test_a_restart_loses_nothing(counter: Counter) -> None:
    code, data = counter.invite(), counter.request("one")
    counter.enrol(code, data)
    folder, identity, record = counter.desk.folder, counter.desk._identity, counter.desk._record
    again = Desk(folder, identity, counter.roster, record=record, now=counter.time)
    counter.desk = again
    assert reason(counter.enrol(code, counter.request("two"))) == "INVITATION_USED"
    counter.sign()
    again.look()
    assert counter.enrol(code, data).bundle


def test_a_crash_between_the_claim_and_the_queue_is_mended_by_the_next_call(
    counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, data = counter.invite(), counter.request("one")
    with monkeypatch.context() as patch:
        patch.setattr(queue_files, "put", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            counter.enrol(code, data)
    assert counter.names() == []
    assert counter.enrol(code, data).WhichOneof("what") == "pending"
    assert counter.names() == ["anna"]


def test_a_request_that_is_rejected_is_said_and_a_full_queue_passes(
    counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, data = counter.invite(), counter.request("one")
    counter.enrol(code, data)
    assert counter.sign("reject") == ["rejected"]
    assert "the person who signs has rejected it" in counter.enrol(code, data).refusal.found
    monkeypatch.setattr(queue_files, "MAX_WAITING", 1)
    reply = counter.enrol(counter.invite("bob"), counter.request("bob", name="bob"))
    assert (reason(reply), reply.refusal.passing) == ("QUEUE_FULL", True)


def test_a_rejected_request_does_not_come_back_with_other_bytes_but_with_a_new_code(counter: Counter) -> None:
    code = counter.invite()
    counter.enrol(code, counter.request("one"))
    assert counter.sign("reject") == ["rejected"]
    again = counter.request("one")
    assert reason(counter.enrol(code, again)) == "REQUEST_REJECTED"
    assert counter.sign() == []
    queue_files.forget_rejected(counter.desk.queue, "anna")
    assert counter.enrol(counter.invite(), again).WhichOneof("what") == "pending"
    assert reason(counter.enrol(code, again)) == "INVITATION_UNKNOWN"
    assert counter.sign() == ["enrolled"]
    queue_files.forget_rejected(counter.desk.queue, "anna")
    assert counter.names() == ["anna"]


def test_signed_requests_make_room_in_a_full_queue(counter: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_files, "MAX_WAITING", 1)
    code, data = counter.invite(), counter.request("one")
    counter.enrol(code, data)
    counter.sign()
    counter.desk.look()
    assert counter.enrol(counter.invite("bob"), counter.request("bob", name="bob")).WhichOneof("what") == "pending"
    assert counter.names() == ["bob"]
    assert counter.enrol(code, data).bundle


def test_a_full_disk_puts_the_request_off(counter: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    code, data = counter.invite(), counter.request("one")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fedtune.store.files.write", full)
        reply = counter.enrol(code, data)
    assert (reason(reply), reply.refusal.passing) == ("DISK_LOW", True)
    assert counter.enrol(code, data).WhichOneof("what") == "pending"


# ---- renewals ----


def renew(counter: Counter, name: str = "site-a", data: bytes = b"") -> pb.EnrolReply:
    return counter.desk.renew(counter.roster.current().parties[name], pb.RenewRequest(request=data))


def own(counter: Counter, name: str = "site-a", **changes: object) -> bytes:
    given = {"name": name, "org": f"org-{name}", "role": "client", **changes}
    return enrollment.make_request(counter.places[name], **given)  # type: ignore[arg-type]


@pytest.mark.guarantee("G6")
def test_a_client_renews_its_own_certificate_and_no_other_one(counter: Counter) -> None:
    data = own(counter)
    # Of another client; and under its own name with other keys.
    for bad in (own(counter, "site-b"), counter.request("x", name="site-a", org="org-site-a")):
        assert reason(renew(counter, data=bad)) == "REQUEST_DIFFERS"
    for changes in ({"org": "other"}, {"role": "auditor"}):
        assert reason(renew(counter, data=own(counter, **changes))) == "REQUEST_DIFFERS"
    assert reason(renew(counter, data=b"{}")) == "MALFORMED"
    assert renew(counter, data=data).WhichOneof("what") == "pending"
    assert counter.sign("leave") == ["renewed"]
    counter.desk.look()
    bundle = renew(counter, data=data).bundle
    renewed = enrollment.accept_bundle(counter.places["site-a"], bundle, now=NOW)
    assert renewed.serial in counter.roster.current().parties["site-a"].serials


# ---- what comes back ----


@pytest.mark.parametrize("kind", ["older", "foreign", "damaged", "link"])
def test_a_roster_in_the_queue_that_is_not_the_next_one_changes_nothing(counter: Counter, kind: str) -> None:
    queue, ca = counter.desk.queue, counter.places["ca"]
    queue.mkdir(parents=True)
    older = (ca / "roster").read_bytes()
    counter.desk._identity.folder.joinpath("roster").write_bytes(older)
    newest = authority.revoke(ca, "site-b", now=NOW)
    (queue / "roster").write_bytes((ca / "roster").read_bytes())
    counter.desk.look()
    assert counter.roster.current() == newest
    if kind == "older":
        (queue / "roster").write_bytes(older)
    elif kind == "foreign":
        authority.create_authority(counter.folder / "other", "care", now=NOW)
        (queue / "roster").write_bytes((counter.folder / "other" / "roster").read_bytes())
    elif kind == "damaged":
        (queue / "roster").write_bytes(older[:-5])
    else:
        (queue / "roster").unlink()
        (queue / "roster").symlink_to(ca / "roster.key")
    for _ in range(3):
        counter.desk.look()
    assert counter.roster.current() == newest
    assert counter.kinds() == (["roster"] if kind == "link" else ["roster", "warning"])


def test_a_roster_that_could_not_be_written_is_taken_over_later(
    counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, ca = counter.desk.queue, counter.places["ca"]
    queue.mkdir(parents=True)
    newest = authority.revoke(ca, "site-b", now=NOW)
    (queue / "roster").write_bytes((ca / "roster").read_bytes())

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fedtune.store.files.write", full)
        counter.desk.look()
    assert counter.roster.current().version < newest.version
    counter.desk.look()
    assert counter.roster.current() == newest
    assert counter.kinds() == ["warning", "roster"]


def test_a_certificate_of_the_server_that_begins_later_is_waited_for(counter: Counter) -> None:
    folder = counter.places["server"]
    counter.time.now += 61 * DAY_S
    counter.desk.look()
    before, asked = (folder / "tls.crt").read_bytes(), (counter.desk.queue / "server.request.json").read_bytes()
    # The CA's clock is an hour ahead.
    ahead = int(counter.time.now) + 3600
    list(sign_queue(counter.places["ca"], counter.desk.queue, lambda one: "leave", days=90, now=ahead))
    for _ in range(2):
        counter.desk.look()
    assert (counter.desk.queue / "server.request.json").read_bytes() == asked
    assert (folder / "tls.crt").read_bytes() == before
    counter.time.now += 3600
    counter.desk.look()
    assert (folder / "tls.crt").read_bytes() != before


def test_the_server_asks_for_its_own_next_certificate_and_installs_it(counter: Counter) -> None:
    folder = counter.places["server"]
    counter.desk.look()
    assert counter.names() == []
    counter.time.now += 61 * DAY_S
    for _ in range(3):
        counter.desk.look()
    assert counter.names() == ["server"]
    before = (folder / "tls.crt").read_bytes()
    assert counter.sign("leave") == ["renewed"]
    counter.desk.look()
    after = (folder / "tls.crt").read_bytes()
    assert after != before
    assert certificates.hosts_of(after) == certificates.hosts_of(before) == ("localhost", "127.0.0.1")
    counter.desk.look()
    assert counter.kinds() == ["queued", "roster", "renewed"]
    assert (folder / "tls.crt").read_bytes() == after


def test_a_registrar_extends_the_roster_and_its_end_is_said_in_time(tmp_path: Path) -> None:
    registry = make_registry(tmp_path, days=40, certificate_days=38)
    wall, events = Clock(float(NOW)), list[tuple[str, dict[str, int | str]]]()
    roster = RosterFile(registry.file, registry.server.root, now=wall)

    def record(kind: str, **fields: int | str) -> None:
        events.append((kind, dict(fields)))

    desk = Desk(tmp_path / "enrolment", registry.server, roster, record=record, now=wall)
    desk.look()
    assert not events
    wall.now += 25 * DAY_S
    desk.look()
    desk.look()
    assert [kind for kind, _ in events] == ["roster"]
    assert roster.current().valid_until == NOW + 39 * DAY_S
    request, statement = registry.ask("site-a", until=int(wall.now) + 92 * DAY_S)
    party, data = roster.current().parties["site-a"], registry.places["site-a"]
    call = pb.RenewRequest(request=own_bytes(data), statement=statement)
    assert desk.renew(party, call).bundle
    # No longer than the one that it has, or hardly so: a client that asks all the time would use up the versions.
    for _ in range(2):
        version = roster.current().version
        assert desk.renew(roster.current().parties["site-a"], call).WhichOneof("what") == "pending"
        assert roster.refresh().version == version
        wall.now += 3600
    wall.now += 4 * 3600
    assert desk.renew(roster.current().parties["site-a"], call).bundle
    assert request.name == "site-a"
    # A damaged answer to the server itself, and no roster: the step after them is taken all the same.
    (desk.queue / "server.answer.json").write_text('{"bundle":"x","reason":"","request":""}')
    (desk.queue / "roster").write_text("damaged")
    wall.now += 13 * DAY_S
    desk.look()
    assert [kind for kind, _ in events[-4:]] == ["warning", "warning", "roster", "warning"]
    assert "the delegation of the registrar ends on" in str(events[-1][1]["text"])
    # In its last days a certificate would end with it: the CA signs instead.
    assert desk.renew(roster.current().parties["site-a"], call).WhichOneof("what") == "pending"


def own_bytes(folder: Path) -> bytes:
    return enrollment.make_request(folder, name="site-a", org="org-site-a", role="client")
