"""Fifty federations on a bad network whose processes are killed: each ends with the right state, and none hangs."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

import grpc
import numpy as np
import pytest

from fedtune.link.client import outbox
from fedtune.link.client.channel import dial
from fedtune.link.pki.identity import load_identity
from fedtune.link.settings import JoinSettings
from fedtune.seeds import derive, generator
from fedtune.store.history import replay_journal
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.federation import Federation, federation
from tests.link.proxy import Fate, Fault, proxy
from tests.test_link import FLORA, SITE, SITES, reference, scripted

SEEDS = 50
FAULTS: Mapping[Fault, float] = {"none": 0.35, "cut": 0.3, "delay": 0.15, "flip": 0.17, "silence": 0.03}
"""Faults of a connection, and their frequency."""
QUIET = 6
"""Connections of a federation after which the network is good, so that every run can end."""


@cache
def right(folder: Path) -> str:
    return reference(folder)


def fates(rng: np.random.Generator) -> list[Fate]:
    """Return the faults of a federation's first connections."""
    kinds = rng.choice(len(FAULTS), size=QUIET, p=list(FAULTS.values()))
    return [
        Fate(
            fault=list(FAULTS)[kind],
            after=int(rng.integers(1, 600_000)),
            up=bool(rng.integers(2)),
            seconds=3.0 if list(FAULTS)[kind] == "silence" else float(rng.uniform(0.005, 0.05)),
        )
        for kind in kinds
    ]


def strike(fed: Federation, rng: np.random.Generator) -> None:
    """Kill a random process after a random event, and start it again."""
    victim = str(rng.choice(["server", *SITES]))
    kind, count = str(rng.choice(["asked", "sending", "receipt"])), int(rng.integers(1, 5))
    witness = str(rng.choice(SITES))
    fed.until(lambda: len(fed.events(witness, kind)) >= count or over(fed))
    if over(fed):
        return
    number = signal.SIGKILL if rng.integers(4) else signal.SIGTERM
    fed.kill(victim, number)
    if victim == "server":
        fed.serve(resume=(fed.run / "recipe.toml").exists())
    else:
        scripted(fed, victim, seconds=0.05)


def over(fed: Federation) -> bool:
    return any(fed.events("server", "stopped")) and fed.processes["server"].poll() is not None


def repeat_replies(fed: Federation, name: str, rng: np.random.Generator) -> None:
    """Send a site's replies once more, in any order: none of them may count again."""
    link = JoinSettings(address=f"localhost:{fed.port}")
    calls = dial(load_identity(fed.places[name], role="client", now=int(time.time())), link)
    try:
        for run in (fed.folder / name / "state" / "runs").glob("*"):
            requests = [one.reply() for one in outbox.load_entries(fed.folder / name / "state", run.name)]
            known = [one for one in requests if one is not None]
            for place in rng.permutation(len(known)).tolist():
                calls.submit(pb.SubmitRequest(envelope=known[place].envelope), timeout=30)
    finally:
        calls.close()


@pytest.mark.guarantee("G14")
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_federation_in_chaos_ends_with_the_right_bytes(tmp_path: Path, seed: int) -> None:
    rng = generator(derive(seed, "chaos"))
    decided = fates(rng)
    sites = dict.fromkeys(SITES, SITE)
    server = {"inline_kib": int(rng.choice([1, 64])), "window_mib": 1, "part_kib": 64, "drain_s": 2.0, "hold_s": 2.0}
    with (
        proxy(lambda number: decided[number] if number < QUIET else Fate()) as between,
        federation(tmp_path, FLORA, SITES, site=sites, server=server, port=between.port) as fed,
    ):
        between.target = fed.port
        fed.serve()
        scripted(fed, *SITES, seconds=0.05)
        for _ in range(int(rng.integers(0, 4))):
            strike(fed, rng)
        if rng.integers(2):
            fed.until(lambda: fed.events("site-a", "receipt") or over(fed))
            with suppress(grpc.RpcError):  # the server may be away just then
                repeat_replies(fed, "site-a", rng)
        assert fed.exit_statuses("server") == [0], {name: fed.log(name)[-3000:] for name in fed.lines}
        for (
            name
        ) in SITES:  # one that was killed at the very end finds no server any more that says that the run is complete
            fed.processes[name].send_signal(signal.SIGTERM)
        # -SIGTERM: it had ended by itself, and was met on its way out.
        assert set(fed.exit_statuses(*SITES)) <= {0, -signal.SIGTERM}, {
            name: fed.log(name)[-3000:] for name in fed.lines
        }
        history = replay_journal(fed.run)[0]
        assert history.committed == 4
        assert history.digests[-1] == right(tmp_path), "another state than in one process"
