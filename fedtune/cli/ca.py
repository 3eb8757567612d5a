"""The command `fedtune ca`: create the certificate authority of a federation, on a machine without a network."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli.options import DebugOption, examples, report_errors

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Create the certificate authority that signs the parties of a federation, and delegate renewals.",
)


@app.command(epilog=examples("fedtune ca init ca --federation care"))
def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="New folder for its keys.", show_default=False)],
    federation: Annotated[str, typer.Option(help="Lasting name of the federation.")],
    years: Annotated[int, typer.Option(min=1, max=30, help="How long the CA lasts.")] = 10,
    debug: DebugOption = False,
) -> None:
    """Create a CA key, its certificate, the key that signs the roster, and an empty roster; keep the folder offline."""
    with report_errors(debug):
        from fedtune.link.pki import authority
        from fedtune.link.pki.signing import fingerprint

        authority.create_authority(folder, federation, now=int(time.time()), years=years)
        anchors = authority.read_ca_file(folder / authority.CA) + authority.read_ca_file(folder / authority.ROSTER_PUB)
        typer.echo(f"created {folder} for the federation {federation}; its keys decide who is in it: keep it offline")
        typer.echo(f"fingerprint of its anchors, for sites to compare: {fingerprint(anchors)}")
        typer.echo("next, at each party: fedtune enroll request --name NAME --org ORG")


@app.command(epilog=examples("fedtune ca delegate queue --days 30", "fedtune ca delegate --end"))
def delegate(
    queue: Annotated[
        Path | None, typer.Argument(metavar="[QUEUE]", help="Folder of the queue, or the file registrar.json in it.")
    ] = None,
    ca: Annotated[Path, typer.Option("--ca", metavar="DIR", help="Folder made by fedtune ca init.")] = Path("ca"),
    days: Annotated[int, typer.Option(min=1, max=92, help="How long it lasts.")] = 30,
    end: Annotated[bool, typer.Option("--end", help="End the delegation that there is.")] = False,
    debug: DebugOption = False,
) -> None:
    """Let a coordinator renew the certificates of its clients, and the roster, for some weeks without this CA.

    It can enrol no new party, and can make no server. Every party must run 0.3 or later.
    """
    if (queue is None) != end:
        raise typer.BadParameter("expected the folder of a queue, or --end", param_hint="QUEUE")
    with report_errors(debug):
        from fedtune.link.pki import authority, registrar
        from fedtune.link.pki.identity import format_time
        from fedtune.link.pki.queue_files import MAX_REQUEST_BYTES, REGISTRAR, ROSTER, read_given
        from fedtune.store.files import write_bytes

        now = int(time.time())
        if queue is None:
            roster = authority.delegate(ca, None, now=now)
            typer.echo(f"no registrar any more; the roster has version {roster.version}")
            typer.echo(f"next, at the coordinator: fedtune roster install {ca / authority.ROSTER}")
            return
        path = queue / REGISTRAR if queue.is_dir() else queue
        data = read_given(path, MAX_REQUEST_BYTES, "fedtune enroll delegate")
        name, delegation = registrar.read_ask(data, authority.current_roster(ca), days=days, now=now)
        roster = authority.delegate(ca, delegation, now=now)
        write_bytes(path.parent / ROSTER, authority.read_ca_file(ca / authority.ROSTER))
        typer.echo(f"{name} may renew clients and roster until {format_time(delegation.not_after)}")
        typer.echo(f"the roster has version {roster.version}, which releases before 0.3 do not read")
        typer.echo(f"next: put {path.parent} back at the coordinator, which takes the roster by itself")
