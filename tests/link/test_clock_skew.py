"""Federations whose clocks differ by an hour, each way: hello, rounds, receipts and the end as ever."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.link.federation import federation
from tests.link.link_server import run_link_server
from tests.link.site import collect_one, post, run_site, until
from tests.test_link import FLORA, SITE, SITES, last_state, reference

HOUR_S = 3600
SKEWS = [(1, -1), (-1, 1), (1, 0), (-1, 0)]
"""Hours of the server's clock and of one site's."""
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
