"""The command `fedtune-edge status`: how this device is, from its own files, without the network."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedtune.cli.edge_options import DONE, add_site, expect_site

if TYPE_CHECKING:
    from fedtune.link.client.site_status import Standing


def add_arguments(own: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_site(own)
    own.add_argument("--json", action="store_true", help="as one JSON object")


def run(options: argparse.Namespace) -> int:
    """Print how this device is."""
    from fedtune.config.site import bind_site
    from fedtune.link.client.site_status import read_standing
    from fedtune.link.settings import JoinSettings
    from fedtune.terminal.text import printable

    expect_site(options.site)
    site = bind_site(options.site)
    standing = read_standing(site.state, site.link or JoinSettings(""), site.policy)
    if options.json:
        print(json.dumps(standing.facts))
        return DONE
    for name, text in lines(standing):
        print(f"{name:11} {printable(text)}")
    return DONE


def lines(standing: Standing) -> Iterator[tuple[str, str]]:
    """Yield what is shown: a name and a text each."""
    from fedtune.terminal.text import size

    status = standing.status
    runs = f"process {standing.process}, {status.connection}" if standing.process is not None else "not running"
    # Where it has never run there is no server to name.
    yield "device", runs if standing.process is None or not status.server else f"{runs}: {status.server}"
    if status.waits:
        yield "waits", status.waits
    yield "next check", standing.next_check
    if status.run:
        yield "run", status.run
    if status.round:
        trained = f"; trained last in round {status.trained}" if status.trained else ""
        yield "round", f"{status.round}{trained}"
    if status.work:
        yield "training", status.work
    if status.scored:
        yield "scores", status.scored
    if status.up_bytes is not None and status.down_bytes is not None:
        both = f"{size(status.up_bytes)} sent, {size(status.down_bytes)} received"
        yield "today", f"{both}, TLS and gRPC included"
    if status.error:
        yield "last error", status.error
