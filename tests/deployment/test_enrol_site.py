from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.deployment.enrol_site import enrol
from fedtune.errors import ConfigError, WireError
from fedtune.link.pki import invitations
from tests.link.enrolment_office import enrolment_office


def test_a_site_reads_its_fingerprint_while_it_waits_and_that_of_the_federation_at_the_end(tmp_path: Path) -> None:
    said = list[str]()
    with enrolment_office(tmp_path / "office") as office:
        code = office.invite()
        line = invitations.encode(code)

        def sign(seconds: float) -> bool:
            office.sign()
            return True

        lines = enrol("-", tmp_path / "a", lines=[line[:50] + "\n", line[50:]], wait=sign, say=said.append)
    assert lines is not None
    assert lines[0].startswith("anna of a is enrolled as client in care, until ")
    assert lines[1].endswith(code.anchors)
    assert "--server localhost:9000" in lines[2]
    assert said[0] == f"anna of a; the keys stay in {tmp_path / 'a'}"
    assert said[1].startswith("fingerprint, to compare by voice")
    assert "waiting until it is signed" in said[2]


def test_what_is_no_invitation_is_said_before_keys_are_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fedtune enroll invite"):
        enrol("none.txt", tmp_path / "a", wait=lambda seconds: False, say=print)
    with pytest.raises(WireError, match=r"the code of an invitation|first|changed"):
        enrol("fedtune.invitation.12.abc", tmp_path / "a", wait=lambda seconds: False, say=print)
    assert not (tmp_path / "a").exists()
