from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fedtune.errors import ConfigError, TemporaryError, WireError
from fedtune.link.client import enrolment
from fedtune.link.client.enrolment import enrol, install, own_request
from fedtune.link.pki import authority, enrollment
from fedtune.link.pki.identity import Identity
from fedtune.link.pki.invitations import Code
from fedtune.link.pki.queue_files import forget_rejected
from tests.link.enrolment_office import Office, enrolment_office
from tests.link.middlebox import listening, proxying


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    with enrolment_office(tmp_path / "office") as office:
        yield office


def ask(code: Code, folder: Path, meanwhile: Callable[[], object] | None = None) -> Identity | None:
    """Ask once, and after `meanwhile` once more."""
    left = [meanwhile] if meanwhile is not None else []

    def wait(seconds: float) -> bool:
        if not left:
            return False
        left.pop()()
        return True

    return enrol(code, folder, wait=wait, now=time.time)


def test_one_command_waits_until_the_request_is_signed(office: Office, tmp_path: Path) -> None:
    code = office.invite()
    accepted = ask(code, tmp_path / "a", office.sign)
    assert accepted is not None
    assert (accepted.name, accepted.org, accepted.role) == ("anna", "a", "client")
    assert office.kinds() == ["enrolment", "queued", "roster", "delivered"]
    assert {path.name for path in (tmp_path / "a").iterdir()} >= {"tls.crt", "ca.crt", "root.pub", "roster"}
    # The same command again changes nothing.
    again = ask(code, tmp_path / "a")
    assert again is not None
    assert again.serial == accepted.serial


def test_a_site_that_gave_up_comes_back_with_the_same_fingerprint(office: Office, tmp_path: Path) -> None:
    code = office.invite()
    assert ask(code, tmp_path / "a") is None
    first = own_request(tmp_path / "a", name="anna", org="a")
    office.sign()
    assert ask(code, tmp_path / "a") is not None
    assert own_request(tmp_path / "a", name="anna", org="a") == first


def test_a_site_enrols_through_a_proxy_and_tries_a_wrong_password_once(office: Office, tmp_path: Path) -> None:
    code = office.invite()
    with listening(proxying("anna:right")) as box:
        with pytest.raises(ConfigError, match="rejects the password of 'anna'") as caught:
            enrol(
                code,
                tmp_path / "a",
                proxy=f"http://anna:geheim@127.0.0.1:{box.port}",
                wait=lambda seconds: False,
                now=time.time,
            )
        assert len(box.heads) == 1
        assert "geheim" not in str(caught.value)
        right = f"http://anna:right@127.0.0.1:{box.port}"
        assert enrol(code, tmp_path / "a", proxy=right, wait=lambda seconds: False, now=time.time) is None
    assert office.kinds() == ["enrolment", "queued"]


@pytest.mark.guarantee("G6")
def test_a_code_that_another_site_has_used_says_what_to_do(office: Office, tmp_path: Path) -> None:
    code = office.invite()
    ask(code, tmp_path / "a")
    with pytest.raises(ConfigError, match=r"INVITATION_USED.*if that was not this site, warn the coordinator"):
        ask(code, tmp_path / "b")
    office.sign("reject")
    before = own_request(tmp_path / "a", name="anna", org="a")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"REQUEST_REJECTED.*rejected it; ask the coordinator why"):
            ask(code, tmp_path / "a")
    # With a new code the same keys ask with another request, which has another fingerprint; the old code has ended.
    forget_rejected(office.desk.queue, "anna")
    newer = office.invite()
    assert ask(newer, tmp_path / "a") is None
    assert own_request(tmp_path / "a", name="anna", org="a") != before
    with pytest.raises(ConfigError, match="INVITATION_UNKNOWN"):
        ask(code, tmp_path / "a")
    assert ask(newer, tmp_path / "a", office.sign) is not None


@pytest.mark.guarantee("G6")
def test_a_server_of_another_federation_gets_no_request(office: Office, tmp_path: Path) -> None:
    with enrolment_office(tmp_path / "other") as other:
        code = office.invite(port=other.port)
        with pytest.raises(ConfigError, match="shows another certificate; something between may open TLS"):
            ask(code, tmp_path / "a")
    assert other.kinds() == ["enrolment"]


def test_a_service_that_is_away_is_a_passing_error(office: Office, tmp_path: Path) -> None:
    code = office.invite(port=1)
    with pytest.raises(TemporaryError, match="no answer from localhost:1"):
        ask(code, tmp_path / "a")


def test_a_folder_of_another_federation_is_left_alone(office: Office, tmp_path: Path) -> None:
    ask(office.invite(), tmp_path / "a", office.sign)
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    with enrolment_office(tmp_path / "other") as other:
        code = other.invite()
    with pytest.raises(ConfigError, match=r"the federation that .* is enrolled in; got a code of another"):
        ask(code, tmp_path / "a")
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before


def test_a_code_for_another_name_than_the_enrolled_one_is_refused(office: Office, tmp_path: Path) -> None:
    assert ask(office.invite(), tmp_path / "a", office.sign) is not None
    with pytest.raises(ConfigError, match=r"expected one for anna of a; got one for bob of b"):
        ask(replace(office.invite(), name="bob", org="b"), tmp_path / "a")


def test_a_bundle_with_other_anchors_than_the_code_s_is_not_installed(office: Office, tmp_path: Path) -> None:
    now = int(time.time())
    authority.create_authority(tmp_path / "foe", "care", now=now)
    data = own_request(tmp_path / "a", name="anna", org="a")
    bundle = authority.sign_request(tmp_path / "foe", data, now=now)
    with pytest.raises(WireError, match="expected the anchors of the code's federation"):
        install(office.invite(), tmp_path / "a", bundle, now=now)
    assert not (tmp_path / "a" / "tls.crt").exists()


def test_a_request_stays_the_same_until_keys_or_name_change(tmp_path: Path) -> None:
    first = own_request(tmp_path, name="anna", org="a")
    assert own_request(tmp_path, name="anna", org="a") == first
    assert enrollment.read_request(own_request(tmp_path, name="bob", org="a")).name == "bob"
    (tmp_path / enrolment.REQUEST).write_text("{}")
    second = own_request(tmp_path, name="anna", org="a")
    assert second != first
    (tmp_path / "tls.key").unlink()
    assert own_request(tmp_path, name="anna", org="a") != second
