from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from fedtune.errors import ConfigError, StoreError
from fedtune.link.pki import authority, enrollment, queue_files
from fedtune.link.pki.identity import parse_root_key
from fedtune.link.pki.queue_files import Waiting
from fedtune.link.pki.queue_signing import Result, Verdict, sign_queue
from fedtune.link.pki.roster import decode
from fedtune.store.lock import lock_run

Decide: TypeAlias = Callable[[Waiting], Verdict]
NOW = 1_800_000_000


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    authority.create_authority(tmp_path / "ca", "care", now=NOW)
    return tmp_path / "ca"


@pytest.fixture
def queue(tmp_path: Path) -> Path:
    (tmp_path / "queue").mkdir()
    return tmp_path / "queue"


def ask(queue: Path, name: str, **changes: object) -> bytes:
    given = {"name": name, "org": "a", "role": "client", **changes}
    data = enrollment.make_request(queue.parent / "keys" / name, **given)  # type: ignore[arg-type]
    queue_files.put(queue, data, enrollment.read_request(data))
    return data


def sign(ca: Path, queue: Path, decide: Verdict | Decide = "sign", **more: object) -> list[Result]:
    verdict = decide if callable(decide) else lambda waiting: decide
    return list(sign_queue(ca, queue, verdict, **{"days": 90, "now": NOW, **more}))  # type: ignore[arg-type]


def test_one_command_signs_all_and_one_roster_goes_back(ca: Path, queue: Path, tmp_path: Path) -> None:
    asked = {name: ask(queue, name) for name in ("anna", "bob")}
    assert {(one.name, one.outcome) for one in sign(ca, queue)} == {("anna", "enrolled"), ("bob", "enrolled")}
    newest = decode((queue / "roster").read_bytes(), parse_root_key((ca / "roster.pub").read_bytes()))
    assert newest == authority.current_roster(ca)
    for name, data in asked.items():
        answer = queue_files.read_answer(queue, name)
        assert answer is not None
        assert answer.request == queue_files.digest(data)
        assert enrollment.accept_bundle(tmp_path / "keys" / name, answer.bundle, now=NOW).name == name


def test_what_was_answered_is_not_signed_again_but_the_roster_is_renewed(ca: Path, queue: Path) -> None:
    ask(queue, "anna")
    sign(ca, queue)
    before = authority.current_roster(ca)
    assert sign(ca, queue, now=NOW + 20 * 86_400) == []
    after = authority.current_roster(ca)
    assert after.parties == before.parties
    assert (after.version, after.valid_until) == (before.version + 1, NOW + 50 * 86_400)


def test_a_renewal_is_signed_without_asking_and_new_keys_are_not(ca: Path, queue: Path) -> None:
    ask(queue, "anna")
    sign(ca, queue)
    asked = list[str]()

    def decide(waiting: Waiting) -> Verdict:
        asked.append(waiting.request.name)
        return "sign"

    ask(queue, "anna")
    assert [one.outcome for one in sign(ca, queue, decide)] == ["renewed"]
    assert not asked
    assert len(authority.current_roster(ca).parties["anna"].serials) == 2
    for key in (queue.parent / "keys" / "anna").iterdir():
        key.unlink()
    ask(queue, "anna")
    (result,) = sign(ca, queue, decide)
    assert asked == ["anna"]
    assert result.outcome == "failed"
    assert "--replace" in result.text
    assert [one.outcome for one in sign(ca, queue, decide, replace=True)] == ["enrolled"]


def test_the_hosts_of_a_server_are_shown_also_where_nothing_is_asked(ca: Path, queue: Path) -> None:
    texts = list[str]()
    for hosts in (("fl.example.org",), ("other.example.org", "192.0.2.1")):
        ask(queue, "server", role="coordinator", hosts=hosts)
        texts += [one.text for one in sign(ca, queue)]
    assert texts == ["enrolled, for fl.example.org", "renewed, for other.example.org, 192.0.2.1"]


def test_a_request_may_be_left_or_rejected(ca: Path, queue: Path) -> None:
    ask(queue, "anna")
    assert [one.outcome for one in sign(ca, queue, "leave")] == ["left"]
    assert queue_files.read_answer(queue, "anna") is None
    assert [one.outcome for one in sign(ca, queue, "reject")] == ["rejected"]
    answer = queue_files.read_answer(queue, "anna")
    assert answer is not None
    assert not answer.bundle
    assert "anna" not in authority.current_roster(ca).parties


def test_one_bad_request_costs_the_others_nothing(ca: Path, queue: Path) -> None:
    ask(queue, "anna")
    (queue / "bob.request.json").write_text("{}")
    data = enrollment.make_request(queue.parent / "keys" / "anna", name="carl", org="a", role="client")
    (queue / "carl.request.json").write_bytes(data)
    results = sign(ca, queue)
    assert [one.outcome for one in results].count("failed") == 2
    assert any("bob.request.json: left out" in one.text for one in results)
    assert any("a key of carl alone; got the one of anna" in one.text for one in results)
    assert set(authority.current_roster(ca).parties) == {"anna"}


def test_two_operators_at_once_do_not_sign_two_rosters_of_one_version(ca: Path, queue: Path) -> None:
    ask(queue, "anna")
    with lock_run(ca), pytest.raises(StoreError, match="no other process writes it"):
        sign(ca, queue)
    assert authority.current_roster(ca).version == 1
    with lock_run(ca), pytest.raises(StoreError):
        authority.revoke(ca, "anna", now=NOW)
    assert [one.outcome for one in sign(ca, queue)] == ["enrolled"]


def test_a_folder_that_is_no_ca_signs_nothing(tmp_path: Path, queue: Path) -> None:
    with pytest.raises(ConfigError, match="fedtune ca init"):
        sign(tmp_path / "none", queue)
    assert not (tmp_path / "none").exists()
