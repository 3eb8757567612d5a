"""Federations whose clocks differ by an hour, each way: hello, rounds, receipts and the end as ever."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.link.federation import federation
from tests.link.harness import Clock
from tests.link.link_server import run_link_server
from tests.link.site import collect_one, post, run_site, until
from tests.test_link import FLORA, SITE, SITES, last_state, reference

HOUR_S = 3600
SKEWS = [(1, -1), (-1, 1), (1, 0), (-1, 0)]
"""Hours of the server's clock and of one site's."""
YEAR_S = 365.25 * 24 * HOUR_S
WORDS = {1970: "the certificate of server begins on", 2090: "has ended by this clock, and the server has none newer"}
"""What a site says whose clock shows such a year, while it tries again."""
SKEWED = """
import runpy, sys, time, types
import fedtune.link, grpc._channel
machine = types.ModuleType("machine")
vars(machine).update(vars(time))
for name, module in list(sys.modules.items()):
    if name.startswith("grpc") and hasattr(module, "time"):
        module.time = machine
shift_s = float(sys.argv[1])
time.time = lambda: machine.time() + shift_s
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
"""Runs a module with another clock. Monotonic clocks, which measure how long something takes, stay as they are, and so
does the clock that gRPC adds a timeout to: its core reads the machine's."""


@pytest.mark.guarantee("G16")
@pytest.mark.parametrize(("server", "site"), SKEWS)
def test_a_round_completes_where_clocks_differ_by_an_hour(tmp_path: Path, server: int, site: int) -> None:
    with run_link_server(tmp_path) as link:
        link.time.now += server * HOUR_S
        with run_site(link, now=lambda: time.time() + site * HOUR_S) as running:
            for number in (1, 2):
                message_id = post(link, number)
                assert collect_one(link, message_id).client == "site-a"
                link.dispatcher.settle("site-a", number, None)
                until(link, lambda number=number: running.kinds().count("receipt") == number)  # type: ignore[misc]
                link.dispatcher.end_round(number)
        assert "refused" not in running.kinds()
        assert len(running.trainer.done) == 2


@pytest.mark.guarantee("G16")
@pytest.mark.parametrize("year", [1970, 2090])
def test_a_clock_that_jumps_to_another_age_and_back_costs_a_pause_and_nothing_else(
    tmp_path: Path, year: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is trained, sent, believed or deleted meanwhile, and the same process goes on when the clock is right."""
    monkeypatch.setattr("fedtune.link.client.client.WATCH_S", 0.02)
    monkeypatch.setattr("fedtune.link.client.backoff.SERVER_PAUSE_S", 0.02)
    with run_link_server(tmp_path) as link:
        clock = Clock(time.time())
        with run_site(link, now=clock) as running:
            message_id = post(link, 1)
            collect_one(link, message_id)
            link.dispatcher.settle("site-a", 1, None)
            until(link, lambda: "receipt" in running.kinds())
            before = {path: path.read_bytes() for path in running.state.rglob("*") if path.is_file()}
            right, clock.now = clock.now, (year - 1970) * YEAR_S
            until(link, lambda: "refused" in running.kinds())
            message_id = post(link, 2)
            until(link, lambda: [kind for kind, _ in running.events].count("redial") > 0)
            assert not link.dispatcher.collect([message_id])
            reasons = {str(fields["reason"]) for kind, fields in running.events if kind == "refused"}
            assert all(WORDS[year] in reason for reason in reasons), reasons
            assert running.thread.is_alive()
            assert len(running.trainer.done) == 1
            assert all(path.read_bytes() == data for path, data in before.items())
            clock.now = right
            assert collect_one(link, message_id).client == "site-a"
        assert len(running.trainer.done) == 2


@pytest.mark.slow
@pytest.mark.guarantee("G16")
@pytest.mark.parametrize(("server", "site"), SKEWS)
def test_a_federation_whose_clocks_differ_by_an_hour_ends_in_the_same_bytes(
    tmp_path: Path, server: int, site: int
) -> None:
    """With the real processes; certificates begin before the earliest of the clocks."""
    with federation(tmp_path, FLORA, SITES, site=dict.fromkeys(SITES, SITE), now=int(time.time()) - 2 * HOUR_S) as fed:
        common = ["--config", str(tmp_path / "server.toml"), "--log", "json"]
        what = ["serve", str(tmp_path / "recipe.toml"), "--out", str(fed.run), *common]
        fed.start("server", "-c", SKEWED, str(server * HOUR_S), "fedtune", *what)
        for place, name in enumerate(SITES):
            skew_s = (site, -site, 0)[place] * HOUR_S
            fed.start(name, "-c", SKEWED, str(skew_s), "tests.link.scripted", str(tmp_path / name / "site.toml"), "0.1")
        assert fed.exit_statuses("server", *SITES) == [0] * 4, {name: fed.log(name)[-3000:] for name in fed.lines}
        assert last_state(fed) == reference(tmp_path)
