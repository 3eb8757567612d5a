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
    help="Create the certificate authority that signs the parties of a federation.",
)


@app.callback()
def group() -> None:
    """Keep `init` a command of its own: a group with one command would take its place."""


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
