"""A signal ends `serve` and `join` in the same way, whatever they are at: no moment of theirs lets it through."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from fedtune.cli.main import app
from fedtune.cli.stop_signals import until_signal
from tests.link.federation import federation
from tests.test_link import FLORA, SITE, SITES, scripted

NUMBERS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture
def outer() -> Iterator[list[int]]:
    """The signals that came where the block had no handler: there a process ends by the signal itself."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in NUMBERS}
    yield came
    for number, handler in before.items():
        signal.signal(number, handler)


def strike_at(place: int, number: int, *, fails: bool = False) -> bool:
    """Run some work, with a signal at one moment of what calls it; returns whether it has so many moments.

    They are its calls, lines and returns, before, between and after which Python looks for signals.
    """
    seen = 0

    def on_event(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal seen
        if seen == place:
            seen += 1
            signal.raise_signal(number)
        else:
            seen += 1
        return on_event

    def on_call(frame: FrameType, event: str, _: Any) -> Any:
        return on_event(frame, event, None) if frame.f_code is until_signal.__code__ else None

    def work() -> None:
        if fails:
            raise ValueError("of the work")

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        until_signal(work)
    except ValueError:
        assert fails
    finally:
        sys.settrace(before)
    return seen > place


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_at_any_moment_around_the_work_does_not_escape(number: int, fails: bool, outer: list[int]) -> None:
    handlers = [signal.getsignal(one) for one in NUMBERS]
    place = 0
    while strike_at(place, number, fails=fails):
        place += 1
        assert [signal.getsignal(one) for one in NUMBERS] == handlers
    assert place > 15
    assert 0 < len(outer) < place  # before its handler was there, or after; the others were taken


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_ends_the_work_and_what_follows_goes_on(number: int, outer: list[int]) -> None:
    seen = []

    def work() -> None:
        seen.append("begun")
        signal.raise_signal(number)
        seen.append("never")

    until_signal(work)
    assert (seen, outer) == (["begun"], [])


def test_another_interrupt_and_errors_pass_through(outer: list[int]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt  # of no signal that came here

    def fail() -> None:
        raise ValueError("why")

    with pytest.raises(ValueError, match="why"):
        until_signal(fail)
    with pytest.raises(KeyboardInterrupt):
        until_signal(interrupt)


@pytest.mark.slow
def test_a_site_without_a_server_that_is_terminated_ends_with_status_0(tmp_path: Path) -> None:
    """As in chaos, where a site that was killed at the very end finds no server any more."""
    with federation(tmp_path, FLORA, SITES, site={name: SITE for name in SITES}) as fed:
        scripted(fed, "site-a", seconds=0.0)
        fed.until(lambda: fed.events("site-a", "unreached"))
        assert fed.kill("site-a", signal.SIGTERM) == 0


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("fedtune.deployment.join.join", ["join", "site.toml"]),
        ("fedtune.deployment.coordinator.coordinate", ["serve", "recipe.toml"]),
        ("fedtune.config.link.bind_server", ["serve", "recipe.toml"]),
        ("fedtune.cli.event_log.event_writer", ["join", "site.toml"]),
    ],
)
def test_commands_over_a_network_end_with_status_0(
    target: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outer: list[int]
) -> None:
    def stopped(*args: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)

    if target != "fedtune.config.link.bind_server":
        monkeypatch.setattr("fedtune.config.link.bind_server", lambda *args: (None, None, tmp_path))
    recipe = SimpleNamespace(name="x", rounds=SimpleNamespace(count=1))
    monkeypatch.setattr("fedtune.deployment.server_setup.data_at_sites", lambda *args, **options: recipe)
    monkeypatch.setattr(target, stopped)
    result = CliRunner().invoke(app, words)
    assert (result.exit_code, result.output) == (0, "")


def test_a_dry_run_that_is_stopped_does_not_say_that_the_server_s_run_is_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stopped(*args: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("fedtune.deployment.join.dry_run", stopped)
    # A shell has its background jobs ignore Ctrl-C, and with them a test run that is one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = CliRunner().invoke(app, ["join", "site.toml", "--dry-run"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.exit_code == 130
