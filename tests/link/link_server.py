"""A server of the link on loopback for tests, with the identities of a coordinator and two clients."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedtune.link.audit_log import ignore_event
from fedtune.link.client.channel import LinkStub, dial
from fedtune.link.envelopes import PROTOCOL
from fedtune.link.pki import authority, registrar
from fedtune.link.pki.identity import Identity, load_identity
from fedtune.link.pki.roster import RosterFile
from fedtune.link.server.blocklist import Blocklist
from fedtune.link.server.dispatcher import Dispatcher
from fedtune.link.server.enrolment import Desk
from fedtune.link.server.run_info import RunInfo
from fedtune.link.server.server import serve_link
from fedtune.link.settings import JoinSettings, LinkSettings
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.ceremony import copy_roster, enroll_parties
from tests.link.harness import Clock

SETTINGS = LinkSettings(listen="127.0.0.1:0", hold_s=0.3, inline_kib=0, part_kib=16, window_mib=1, stall_s=5, drain_s=0)


@dataclass
class LinkServer:
    """A server on loopback, and the identities of all parties."""

    folder: Path
    dispatcher: Dispatcher
    port: int
    identities: dict[str, Identity]
    clock: Clock
    time: Clock
    places: dict[str, Path]
    desk: Desk

    def calls(self, name: str = "site-a") -> LinkStub:
        """Return the calls of a client; closed with the server."""
        stub = dial(self.identities[name], JoinSettings(f"localhost:{self.port}"))
        self.stubs.append(stub)
        return stub

    def __post_init__(self) -> None:
        self.stubs: list[LinkStub] = []
        self.ids: dict[bytes, str] = {}  # message ids by task digest


@contextmanager
def run_link_server(
    folder: Path,
    settings: LinkSettings = SETTINGS,
    *,
    run: str = "0123456789abcdef",
    recipe: str = 'name = "x"\n',
    days: int = 90,
    passed_days: int = 0,
    registrar_days: int = 0,
) -> Iterator[LinkServer]:
    """Serve a dispatcher until the block ends.

    Args:
        folder: for everything.
        settings: of the link.
        run: its number.
        recipe: TOML.
        days: life of the certificates.
        passed_days: of it.
        registrar_days: for which the coordinator may renew clients; 0: not at all.
    """
    now = int(time.time())  # TLS looks at the machine's own clock
    places = dict(enroll_parties(folder, now=now - 86_400 * passed_days, days=days))
    if registrar_days:
        server_identity = load_identity(places["server"], role="coordinator", now=now)
        known, asked = authority.current_roster(places["ca"]), registrar.ask(server_identity, now=now)
        authority.delegate(places["ca"], registrar.read_ask(asked, known, days=registrar_days, now=now)[1], now=now)
        copy_roster(places["ca"], places)
    identities = {
        name: load_identity(places[name], role="coordinator" if name == "server" else "client", now=now)
        for name in ("server", "site-a", "site-b")
    }
    clock, wall = Clock(), Clock(float(now))
    rosters = RosterFile(places["server"] / "roster", identities["server"].root, clock=clock, now=wall)
    own = identities["server"]
    info = RunInfo("care", run, recipe.encode(), own.name, own.key)
    dispatcher = Dispatcher(info, settings, folder / "spool", Blocklist(folder / "barred", clock=clock))
    dispatcher.max_reply_bytes = lambda front: 200_000_000
    desk = Desk(folder / "enrolment", own, rosters, record=ignore_event, now=wall)
    with serve_link(dispatcher, own, rosters, renew=desk.renew, now=wall) as running:
        server = LinkServer(folder, dispatcher, running.port, identities, clock, wall, places, desk)
        yield server
        for calls in server.stubs:
            calls.close()


def greeting(calls: LinkStub, **changes: object) -> pb.HelloReply:
    given = {"protocols": [PROTOCOL], "federation": "care", "build": "test", "roster_version": 0, **changes}
    return calls.hello(pb.HelloRequest(**given), timeout=10)  # type: ignore[arg-type]
