"""The commands pause and resume, and a process that obeys them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.cli.edge import main
from fedtune.cli.edge_options import DONE, RETRY, USAGE
from fedtune.link.client.pause import read_pause
from fedtune.store.lock import lock_run

SITE = """\
name = "site-a"
[model]
base = "base"
[adapter]
targets = ["q_proj"]
[data]
source = "rows.jsonl"
fields = { text = "text" }
[link]
address = "localhost:9000"
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "site.toml").write_text(SITE)
    return tmp_path / "site.toml"


def test_a_device_is_paused_before_it_has_ever_run(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pause", str(site)]) == DONE
    assert capsys.readouterr().out == "paused until resume; it is not running\n"
    assert read_pause(site.parent / "state") == float("inf")
    assert main(["resume", str(site)]) == DONE
    assert main(["resume", str(site)]) == DONE
    assert capsys.readouterr().out == "resumed\nit was not paused\n"


def test_a_pause_has_an_end_that_is_shown(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (site.parent / "state").mkdir()
    with lock_run(site.parent / "state"):
        assert main(["pause", str(site), "--for", "2h"]) == DONE
    assert capsys.readouterr().out.endswith("; it stops within seconds\n")
    left = read_pause(site.parent / "state")
    assert left is not None
    assert 7190 < left <= 7200
    assert main(["pause", str(site), "--until", "23:59"]) == DONE
    assert "23:59; it is not running" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--for", "soon"], ["--until", "25:00"]])
def test_what_is_no_time_changes_nothing(site: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pause", str(site), *words]) == USAGE
    assert "; got " in capsys.readouterr().err
    assert not (site.parent / "state").exists()


def test_without_space_a_pause_may_be_ordered_again_later(
    site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedtune.store.files.write", full)
    assert main(["pause", str(site)]) == RETRY
    assert len(capsys.readouterr().err.splitlines()) == 1
