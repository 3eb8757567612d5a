from __future__ import annotations

import urllib.request

import pytest

from fedtune.cli.live import LiveOptions, live_feed, live_options, live_page, live_server
from fedtune.rounds.events import Event, Note, Phase


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
    ("error", "text"), [(KeyboardInterrupt(), "Ctrl-C"), (OSError("disk full\nmore"), "disk full")]
)
def test_a_run_that_stops_says_so_on_its_page(error: BaseException, text: str) -> None:
    feed, said = live_feed("ward", 3), list[str]()
    with pytest.raises(type(error)), live_server(LiveOptions("0.0.0.0", 0), feed, said.append):
        raise error
    assert (feed.since(0)[1]["head"]["state"], feed.since(0)[1]["head"]["text"]) == ("stopped", text)
    assert "?token=" in said[0]
    assert said[1].startswith("warning: the live page shows clients' names")
