"""The command `fedtune roster`: who is in a federation, who is no more, and the newest word on that installed."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli.enroll import AuthorityOption, IdentityOption
from fedtune.cli.options import DebugOption, JsonOption, console, examples, report_errors
from fedtune.cli.text import printable

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="List and change who is in a federation; the CA signs every change.",
)
INSTALL = "next, at the server: fedtune roster install {path}; clients receive it from there"


@app.command("list", epilog=examples("fedtune roster list", "fedtune roster list --ca ca --json"))
def list_parties(
    identity: IdentityOption = Path("identity"),
    ca: Annotated[Path | None, typer.Option("--ca", metavar="DIR", help="Look at the CA's own roster instead.")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List who is in the federation, as the newest roster here has it."""
    with report_errors(debug):
        from fedtune.link.pki import authority
        from fedtune.link.pki.identity import ROOT, ROSTER, day, read_required, read_root_key
        from fedtune.link.pki.roster import decode

        found = (
            authority.current_roster(ca)
            if ca is not None
            else decode(read_required(identity / ROSTER), read_root_key(identity / ROOT))
        )
        if as_json:
            members = [{**asdict(one), "key": one.key.hex()} for one in found.members.values()]
            head = {"federation": found.federation, "version": found.version, "valid_until": found.valid_until}
            typer.echo(json.dumps({**head, "members": members}))
            return
        from rich.table import Table

        expired = ", EXPIRED" if time.time() > found.valid_until else ""
        typer.echo(f"{found.federation}, version {found.version}, valid until {day(found.valid_until)}{expired}")
        table = Table(box=None, pad_edge=False)
        for column in ("name", "org", "role", "state", "certificate until", "serials"):
            table.add_column(column, overflow="fold")
        for one in found.members.values():
            serials = " ".join(serial[:12] for serial in one.serials)
            row = (printable(one.name), printable(one.org), one.role, one.state, day(one.not_after), serials)
            table.add_row(*row)
        console(sys.stdout).print(table if found.members else "nobody is enrolled yet")


@app.command(epilog=examples("fedtune roster revoke site-c"))
def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Who is to leave.", show_default=False)],
    ca: AuthorityOption = Path("ca"),
    debug: DebugOption = False,
) -> None:
    """Take a party out of the federation: nothing that it says counts once the server has the new roster."""
    with report_errors(debug):
        from fedtune.link.pki import authority

        made = authority.revoke(ca, name, now=int(time.time()))
        typer.echo(f"{name} is revoked; the roster has version {made.version}")
        typer.echo(INSTALL.format(path=ca / authority.ROSTER))


@app.command(epilog=examples("fedtune roster renew", "fedtune roster renew --days 90"))
def renew(
    ca: AuthorityOption = Path("ca"),
    days: Annotated[int, typer.Option(min=1, max=397, help="How long the roster is to be valid from now.")] = 30,
    debug: DebugOption = False,
) -> None:
    """Sign the roster again before it expires."""
    with report_errors(debug):
        from fedtune.link.pki import authority
        from fedtune.link.pki.identity import day

        made = authority.renew(ca, days=days, now=int(time.time()))
        typer.echo(f"the roster has version {made.version} and is valid until {day(made.valid_until)}")
        typer.echo(INSTALL.format(path=ca / authority.ROSTER))


@app.command(epilog=examples("fedtune roster install roster", "fedtune roster install roster --identity identity"))
def install(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The signed roster.", show_default=False)],
    identity: IdentityOption = Path("identity"),
    debug: DebugOption = False,
) -> None:
    """Put a newer roster into an identity folder; a running server or client reads it within a second."""
    with report_errors(debug):
        from fedtune.link.pki import enrollment

        data = enrollment.read_received(
            file, "a signed roster", "every fedtune enroll sign and fedtune roster command at the CA"
        )
        made = enrollment.install(identity, data, now=int(time.time()))
        typer.echo(f"installed version {made.version} in {identity}; who runs with it reads it within a second")
        typer.echo(f"next, to see who is in: fedtune roster list --identity {identity}")
