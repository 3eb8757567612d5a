from __future__ import annotations

import http.client
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedtune.api import Run
from fedtune.cli import live
from fedtune.cli.live import LiveOptions, live_feed, live_options, live_page, live_server
from fedtune.cli.main import app
from fedtune.live.server import LiveAddress
from fedtune.rounds.events import Event, Note, Phase
from tests.link.federation import federation
from tests.report.conftest import write_directory
from tests.test_link import FLORA, SITE, SITES, scripted


def test_a_port_or_an_address_asks_for_a_page_by_itself() -> None:
    assert live_options(False, None, None) is None
    assert live_options(True, None, None) == LiveOptions("127.0.0.1", None)
    assert live_options(False, 8100, None) == LiveOptions("127.0.0.1", 8100)
    assert live_options(False, None, "0.0.0.0") == LiveOptions("0.0.0.0", None)
    assert LiveOptions("127.0.0.1", 8100).words == ["--live", "--live-port", "8100", "--live-address", "127.0.0.1"]


def test_the_page_is_served_from_the_first_event_on_and_its_address_is_said() -> None:
    feed, seen = live_feed("ward", 3), list[Event]()
    with live_page(LiveOptions("127.0.0.1", 0), feed, seen.append) as watch:
        assert not seen
        watch(Phase("loading the base"))
        assert isinstance(seen[0], Note)
        url = seen[0].text.removeprefix("live page: ")
        with urllib.request.urlopen(url, timeout=30) as answer:
            assert b"fedtune live" in answer.read()
    assert seen[1:] == [Phase("loading the base")]
    assert feed.since(0)[1]["head"]["state"] == "finished"


def test_without_the_option_nothing_is_served() -> None:
    def watch(event: Event) -> None: ...

    with live_page(None, live_feed("ward", 3), watch) as given:
        assert given is watch


@pytest.mark.parametrize(
    ("error", "text"), [(KeyboardInterrupt(), "by a signal"), (OSError("disk full\nmore"), "disk full")]
)
def test_a_run_that_stops_says_so_on_its_page(error: BaseException, text: str) -> None:
    feed, said = live_feed("ward", 3), list[str]()
    with pytest.raises(type(error)), live_server(LiveOptions("0.0.0.0", 0), feed, said.append):
        raise error
    assert (feed.since(0)[1]["head"]["state"], feed.since(0)[1]["head"]["text"]) == ("stopped", text)
    assert "?token=" in said[0]
    assert said[1].startswith("warning: the live page shows clients' names")


def messages(url: str) -> Iterator[Any]:
    """Yield what a page gets, until its server ends."""
    connection = http.client.HTTPConnection(url.removeprefix("http://").rstrip("/"), timeout=60)
    connection.request("GET", "/events")
    answer = connection.getresponse()
    while line := answer.readline():
        if line.startswith(b"data: "):
            yield json.loads(line[6:])


def test_simulate_shows_its_run_from_the_command_line(
    ran: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = list[Any]()

    def simulate(*arguments: Any, watch: Any, **options: Any) -> Run:
        urls = list[str]()

        def announcement(address: LiveAddress) -> list[str]:
            urls.append(address.url)
            return []

        monkeypatch.setattr(live, "announcement", announcement)
        watch(Phase("loading the base"))
        shown.append(next(messages(urls[0])))
        return ran

    monkeypatch.setattr("fedtune.api.simulate", simulate)
    recipe = str(ran.path / "recipe.toml")
    done = CliRunner().invoke(app, ["simulate", recipe, "--live-port", "0", "--quiet", "--set", "report.plots=false"])
    assert done.exit_code == 0, done.output
    assert (shown[0]["head"]["phase"], shown[0]["head"]["connected"]) == ("loading the base", None)


def test_report_shows_a_directory_until_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[str]()

    def look() -> None:
        assert next(messages(said[0].removeprefix("live page: ")))["head"]["state"] == "finished"

    monkeypatch.setattr(live, "wait_for_ctrl_c", look)
    live.show_directory(write_directory(tmp_path / "run"), LiveOptions("127.0.0.1", 0), said.append)
    assert said[1] == "Ctrl-C ends it"


def test_report_sends_a_run_to_a_tracker_before_it_shows_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "wait_for_ctrl_c", lambda: None)
    monkeypatch.setattr("fedtune.runs.tracked.check_packages", lambda names: None)
    monkeypatch.setattr("fedtune.runs.tracked.send_run", lambda run, name: f"{name}: 3 rounds sent")
    run = write_directory(tmp_path / "run")
    done = CliRunner().invoke(app, ["report", str(run), "--track", "mlflow", "--live-port", "0"])
    assert done.exit_code == 0, done.output
    assert [line.partition(":")[0] for line in done.output.splitlines()] == ["mlflow", "live page", "Ctrl-C ends it"]


@pytest.mark.slow
def test_serve_shows_its_run_with_the_clients_that_are_connected(tmp_path: Path) -> None:
    with federation(tmp_path, FLORA, SITES, site=dict.fromkeys(SITES, SITE)) as running:
        running.serve("--live-port", "0")
        running.until(lambda: running.events("server", "note"))
        texts = [event["text"] for event in running.events("server", "note")]
        (url,) = [text.removeprefix("live page: ") for text in texts if text.startswith("live page: ")]
        scripted(running, *SITES, seconds=0.0)
        heads = [content["head"] for content in messages(url)]
        assert running.exit_statuses("server", *SITES) == [0] * 4
    assert max(head["connected"] for head in heads) == len(SITES)
    assert (heads[-1]["state"], heads[-1]["done"], heads[-1]["name"]) == ("finished", 4, heads[0]["name"])
