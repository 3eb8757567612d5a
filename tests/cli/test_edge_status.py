from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedtune.cli.edge import main
from fedtune.cli.edge_options import DONE
from fedtune.link.client import pause
from fedtune.link.client.site_status import StatusFile
from fedtune.link.client.socket_bytes import SocketBytes
from fedtune.store.lock import lock_run
from tests.cli.test_edge_pause import SITE
from tests.link.client.test_site_status import ROUND, Meter


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "site.toml").write_text(SITE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "state").mkdir()
    return tmp_path / "state"


def test_a_device_that_has_never_run_says_so(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status"]) == DONE
    assert capsys.readouterr().out == "device      not running\nnext check  when it is started\n"


def test_the_last_round_and_the_bytes_of_the_day_are_shown(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meter = Meter()
    status = StatusFile(state, meter)
    for kind, fields in ROUND:
        status.record(kind, **fields)
    status.record("unreached", server="x", reason="no server listens on \x1b[2J")
    meter.total = SocketBytes(1900, 5200)
    status.look()
    with lock_run(state):
        assert main(["status"]) == DONE
        shown = capsys.readouterr().out
        assert main(["status", "--json"]) == DONE
        facts = json.loads(capsys.readouterr().out)
    assert "round       3; trained last in round 3" in shown
    assert "training    own loss 3.0 to 2.5, 1.2 s" in shown
    assert "today       1.9 kB sent, 5.2 kB received, TLS and gRPC included" in shown
    assert "next check  within 30 s" in shown
    assert "\x1b" not in shown
    assert (facts["running"], facts["connection"], facts["up_bytes"]) == (True, "no connection", 1900)


def test_why_a_device_waits_is_shown(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pause.pause(state, None)
    with lock_run(state):
        assert main(["status"]) == DONE
    shown = capsys.readouterr().out
    assert "waits       paused by its owner\nnext check  after resume\n" in shown
