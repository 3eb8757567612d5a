from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from fedtune.link.client.renewal import REQUEST, Renewal
from fedtune.link.pki import authority, enrollment
from fedtune.link.pki.identity import current_dates, load_identity
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.ceremony import enroll_parties
from tests.link.harness import Clock

NOW = 1_800_000_000
DAY_S = 86_400


class UnknownError(grpc.RpcError):
    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNIMPLEMENTED


@dataclass
class Site:
    """A client's renewal with a server that is played by `answer`."""

    renewal: Renewal
    folder: Path
    ca: Path
    time: Clock
    clock: Clock
    requests: list[bytes] = field(default_factory=list)
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    answer: Callable[[bytes], pb.EnrolReply] = lambda data: pb.EnrolReply(pending=pb.Wait(retry_after_ms=600_000))

    def pass_days(self, days: float) -> None:
        self.time.now += days * DAY_S
        self.clock.now += days * DAY_S

    def sign(self, data: bytes) -> pb.EnrolReply:
        return pb.EnrolReply(bundle=authority.sign_request(self.ca, data, now=int(self.time.now)))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    places = enroll_parties(tmp_path, now=NOW)
    identity = load_identity(places["site-a"], role="client", now=NOW)
    wall, clock = Clock(float(NOW)), Clock()

    def renew(request: pb.RenewRequest, timeout: float) -> pb.EnrolReply:
        result.requests.append(request.request)
        return result.answer(request.request)

    def record(kind: str, **fields: int | str) -> None:
        result.events.append((kind, dict(fields)))

    calls: Any = SimpleNamespace(renew=renew)
    renewal = Renewal(identity, calls, record=record, clock=clock, now=wall)
    result = Site(renewal, places["site-a"], places["ca"], wall, clock)
    return result


def test_a_site_asks_at_two_thirds_of_the_life_of_its_certificate_and_installs_the_next(site: Site) -> None:
    site.pass_days(59)
    site.renewal.look()
    assert not site.requests
    site.pass_days(2)
    site.renewal.look()
    site.renewal.look()
    assert len(site.requests) == 1
    site.answer = site.sign
    site.clock.now += 3600
    site.renewal.look()
    # The same request until it is answered: another would wait in the queue anew.
    assert site.requests[0] == site.requests[1]
    identity = load_identity(site.folder, role="client", now=int(site.time.now))
    assert identity.not_after == NOW + 151 * DAY_S
    assert [kind for kind, _ in site.events] == ["note", "renewed"]
    assert not (site.folder / REQUEST).exists()
    site.clock.now += 3600
    site.renewal.look()
    assert len(site.requests) == 2


@pytest.mark.parametrize("kind", ["refused", "unknown", "closed", "damaged", "garbage", "foreign", "older"])
def test_what_goes_wrong_ends_no_client_and_changes_no_file(site: Site, kind: str, tmp_path: Path) -> None:
    def answer(data: bytes) -> pb.EnrolReply:
        match kind:
            case "refused":
                return pb.EnrolReply(refusal=pb.Refusal(reason=pb.RENEWAL_OFF, passing=True))
            case "unknown":
                raise UnknownError
            case "closed":
                raise ValueError("closed")
            case "damaged":
                return pb.EnrolReply(bundle=b"{}")
            case "garbage":
                return pb.EnrolReply(bundle=enrollment.pack_bundle(b"no certificate", b"", b"", b""))
            case "foreign":
                authority.create_authority(tmp_path / "foe", "care", now=NOW)
                return pb.EnrolReply(bundle=authority.sign_request(tmp_path / "foe", data, now=int(site.time.now)))
        return pb.EnrolReply(bundle=authority.sign_request(site.ca, data, days=1, now=NOW))

    files = {path.name: path.read_bytes() for path in site.folder.iterdir()}
    site.answer = answer
    site.pass_days(61)
    for _ in range(3):
        site.renewal.look()
    assert len(site.requests) == 1
    assert {path.name: path.read_bytes() for path in site.folder.iterdir() if path.name != REQUEST} == files
    assert [one for one, _ in site.events] == ([] if kind in ("unknown", "closed") else ["warning"])
    site.answer = site.sign
    site.pass_days(1.1)
    site.renewal.look()
    assert current_dates(load_identity(site.folder, role="client", now=int(site.time.now)))[1] > NOW + 150 * DAY_S


def test_a_certificate_that_begins_later_is_installed_when_it_does(site: Site) -> None:
    site.pass_days(61)
    bundle = authority.sign_request(site.ca, site.renewal._request(), now=int(site.time.now) + 7200)
    site.answer = lambda data: pb.EnrolReply(bundle=bundle)
    files = {path.name: path.read_bytes() for path in site.folder.iterdir()}
    site.renewal.look()
    assert {path.name: path.read_bytes() for path in site.folder.iterdir()} == files
    assert not site.events
    site.pass_days(1 / 12)
    site.renewal.look()
    assert [kind for kind, _ in site.events] == ["renewed"]


def test_a_request_of_other_keys_is_not_sent_again(site: Site, tmp_path: Path) -> None:
    other = enrollment.make_request(tmp_path / "other", name="site-a", org="x", role="client")
    (site.folder / REQUEST).write_bytes(other)
    site.pass_days(61)
    site.renewal.look()
    assert site.requests[0] != other
