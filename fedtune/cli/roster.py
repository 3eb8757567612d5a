"""The command `fedtune roster`: list, revoke and renew the parties of a federation, and install its newest roster."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli.enroll import AuthorityOption, IdentityOption
from fedtune.cli.options import DebugOption, JsonOption, examples, report_errors
from fedtune.terminal.console import console
from fedtune.terminal.text import printable

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="List and change the parties of a federation; the CA signs every change.",
)
INSTALL = "next, at the server: fedtune roster install {path}; clients receive it from there"


@app.command("list", epilog=examples("fedtune roster list", "fedtune roster list --ca ca --json"))
def list_parties(
    identity: IdentityOption = Path("identity"),
    ca: Annotated[Path | None, typer.Option("--ca", metavar="DIR", help="Look at the CA's own roster instead.")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List the parties of the federation by the newest roster here."""
    with report_errors(debug):
        from fedtune.link.pki import authority
        from fedtune.link.pki.identity import ROOT, ROSTER, format_time, read_required, read_root_key
        from fedtune.link.pki.roster import decode

        roster = (
            authority.current_roster(ca)
            if ca is not None
            else decode(read_required(identity / ROSTER), read_root_key(identity / ROOT))
        )
        if as_json:
            members = [
                {
                    **{key: value for key, value in asdict(party).items() if key != "renewed"},
                    "key": party.key.hex(),
                    "serials": [*party.serials, *(entry.serial for entry in party.renewed)],
                }
                for party in roster.parties.values()
            ]
            head = {"federation": roster.federation, "version": roster.version, "valid_until": roster.valid_until}
            typer.echo(json.dumps({**head, "members": members}))
            return
        from rich.table import Table

        expired = ", EXPIRED" if time.time() > roster.valid_until else ""
        typer.echo(
            f"{roster.federation}, version {roster.version}, valid until {format_time(roster.valid_until)}{expired}"
        )
        if roster.delegation is not None:
            until = format_time(roster.delegation.not_after)
            typer.echo(f"a registrar may renew clients and this roster until {until}")
        table = Table(box=None, pad_edge=False)
        for column in ("name", "org", "role", "state", "certificate until", "serials"):
            table.add_column(column, overflow="fold")
        for party in roster.parties.values():
            numbers = (*party.serials, *(entry.serial for entry in party.renewed))
            serials = " ".join(serial[:12] for serial in numbers)
            row = (
                printable(party.name),
                printable(party.org),
                party.role,
                party.state,
                format_time(party.not_after),
                serials,
            )
            table.add_row(*row)
        console(sys.stdout).print(table if roster.parties else "no party is enrolled yet")


@app.command(epilog=examples("fedtune roster revoke site-c"))
def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Party to revoke.", show_default=False)],
    ca: AuthorityOption = Path("ca"),
    debug: DebugOption = False,
) -> None:
    """Revoke a party: its calls and signatures are refused once the server has the new roster."""
    with report_errors(debug):
        from fedtune.link.pki import authority

        roster = authority.revoke(ca, name, now=int(time.time()))
        typer.echo(f"{name} is revoked; the roster has version {roster.version}")
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
        from fedtune.link.pki.identity import format_time

        roster = authority.renew(ca, days=days, now=int(time.time()))
        typer.echo(f"the roster has version {roster.version} and is valid until {format_time(roster.valid_until)}")
        typer.echo(INSTALL.format(path=ca / authority.ROSTER))


@app.command(epilog=examples("fedtune roster install roster", "fedtune roster install roster --identity identity"))
def install(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The signed roster.", show_default=False)],
    identity: IdentityOption = Path("identity"),
    debug: DebugOption = False,
) -> None:
    """Install a newer roster in an identity folder; a running server or client reads it within a second."""
    with report_errors(debug):
        from fedtune.link.pki import enrollment, registrar

        data = enrollment.read_received(
            file, "a signed roster", "every fedtune enroll sign and fedtune roster command at the CA"
        )
        roster = registrar.install_roster(identity, data, now=int(time.time()))
        typer.echo(
            f"installed version {roster.version} in {identity}; a running server or client reads it within a second"
        )
        typer.echo(f"next, to list the parties: fedtune roster list --identity {identity}")
