"""What a served run says of itself while it runs: warnings in time, and how far the sites are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.deployment.watch import NOW, RunNow, Watch, read_now, watching
from fedtune.errors import StoreError
from fedtune.link.pki.identity import WEEK_S, load_identity
from fedtune.link.pki.roster import RosterFile
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.ceremony import enroll_parties
from tests.link.harness import Clock, Harness, make_harness

AT = 1_800_000_000
DAY_S = 86_400


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    return make_harness(tmp_path)


@pytest.fixture
def clock() -> Clock:
    return Clock(float(AT))


@pytest.fixture
def watched(tmp_path: Path, harness: Harness, clock: Clock) -> tuple[Watch, list[str]]:
    """Return the watch of a run whose roster ends in 30 days and whose certificate in 90, and the texts of warnings."""
    place = enroll_parties(tmp_path / "parties", now=AT)["server"]
    identity, texts = load_identity(place, role="coordinator", now=AT), list[str]()
    roster = RosterFile(place / "roster", identity.root, now=clock)

    def record(kind: str, **fields: Any) -> None:
        assert kind == "warning"
        texts.append(str(fields["text"]))

    (tmp_path / "link").mkdir()
    return Watch(tmp_path / "link", harness.dispatcher, identity, roster, record, now=clock), texts


@pytest.mark.guarantee("G6")
def test_a_week_before_the_roster_ends_it_is_said_once_a_day(watched: tuple[Watch, list[str]], clock: Clock) -> None:
    watch, texts = watched
    clock.now = AT + 22 * DAY_S
    watch.look()
    assert not texts
    clock.now = AT + 30 * DAY_S - WEEK_S
    for _ in range(3):
        watch.look()
        clock.now += 10
    (text,) = texts
    assert text.startswith("the roster (version ")
    assert "fedtune roster renew" in text
    clock.now += DAY_S
    watch.look()
    assert len(texts) == 2
    clock.now = AT + 31 * DAY_S
    watch.look()
    assert " ended on " in texts[-1]


@pytest.mark.guarantee("G6")
def test_the_status_reads_what_ends_soon_and_how_far_each_site_is(
    watched: tuple[Watch, list[str]], harness: Harness, tmp_path: Path
) -> None:
    _, _, order = harness.post("anna")
    harness.dispatcher.sign_of_life("anna")
    working = pb.Progress(order=order, phase=pb.Progress.WORKING, done=3, total=10)
    harness.dispatcher.hear("anna", 1, [working], [])
    watched[0].look()
    now = read_now(tmp_path / "link")
    assert now.work == {"anna": "working step 3 of 10"}
    assert now.warnings(now=AT + 22 * DAY_S) == []
    assert [text.split(" ends")[0] for text in now.warnings(now=AT + 29 * DAY_S)] == [
        f"the roster (version {now.roster_version})"
    ]
    assert len(now.warnings(now=AT + 89 * DAY_S)) == 2
    assert not (tmp_path / "link" / NOW).stat().st_mode & 0o077


def test_a_run_that_no_server_has_served_says_nothing(tmp_path: Path) -> None:
    assert read_now(tmp_path) == RunNow()
    assert RunNow().warnings(now=AT) == ()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": 1}', json.dumps({"certificate": 1, "work": {}})])
def test_a_damaged_file_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / NOW).write_text(text)
    with pytest.raises(StoreError, match="expected what a server has said"):
        read_now(tmp_path)


def test_it_looks_until_the_block_ends(
    watched: tuple[Watch, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = list[int]()

    def look() -> None:
        looks.append(1)
        if len(looks) > 1:
            raise StoreError("a full disk")

    monkeypatch.setattr(watched[0], "look", look)
    with watching(watched[0], every_s=0.001):
        assert looks
        while len(looks) < 4:  # a full disk does not end it
            pass
    assert len(looks) >= 4
