"""The commands `fedtune sign` and `fedtune verify`: who has signed the files of a result, and are they still those."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli.enroll import IdentityOption
from fedtune.cli.options import DebugOption, JsonOption, examples, report_errors
from fedtune.terminal.text import printable

FolderArgument = Annotated[
    Path,
    typer.Argument(metavar="DIR", help="Folder of a result, an export or a merged adapter.", show_default=False),
]


def sign(
    folder: FolderArgument,
    identity: IdentityOption = Path("identity"),
    openssf: Annotated[
        Path | None,
        typer.Option(
            metavar="KEY", help="Also write model.sig, in the OpenSSF format, with this private key (P-256, PEM)."
        ),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Sign the files of a result with the coordinator's key: an in-toto statement, in manifest.dsse beside them.

    Its files are checked against its manifest first. fedtune serve signs the result of a run by itself; an export, or
    an adapter that was merged, is signed with this command.
    """
    with report_errors(debug):
        import time

        from fedtune.link import openssf as openssf_module
        from fedtune.link.pki.identity import load_identity
        from fedtune.link.provenance import Signer, sign_folder

        now = int(time.time())
        party = load_identity(identity, role="coordinator", now=now)
        typer.echo(sign_folder(folder, Signer(party.federation, party.name, party.key), now=now))
        if openssf is not None:
            typer.echo(openssf_module.sign(folder, openssf))


def verify(
    folder: FolderArgument,
    roster: Annotated[
        Path, typer.Option(metavar="FILE", help="The federation's newest signed roster.", show_default=False)
    ],
    root: Annotated[
        Path | None,
        typer.Option(metavar="KEY", help="Public key that signs rosters; without it root.pub beside FILE."),
    ] = None,
    run: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Run directory whose journal must hold the signed head.")
    ] = None,
    expired_roster: Annotated[
        bool, typer.Option("--expired-roster", help="Take a roster that has expired: revocations since are not known.")
    ] = False,
    openssf: Annotated[
        Path | None, typer.Option(metavar="KEY", help="Also verify model.sig, with this public key (P-256, PEM).")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Check that the files of a folder are those that a coordinator of the federation has signed.

    Files, signature, role and state of the signer, the time of signing, and with --run the journal. Exits with 0, or
    with 2 and the first difference.
    """
    with report_errors(debug):
        from fedtune.link import openssf as openssf_module
        from fedtune.link.pki.signing import fingerprint
        from fedtune.link.provenance import load_roster, stamp, verify_folder
        from fedtune.store.training_record import check_journal

        parties, key = load_roster(roster, root, expired=expired_roster)
        verified = verify_folder(folder, parties)
        if run is not None:
            check_journal(run, verified.predicate.get("training", {}))
        if openssf is not None:
            openssf_module.verify(folder, openssf)
        facts = {
            "path": str(folder),
            "files": verified.files,
            "signer": verified.signer.name,
            "org": verified.signer.org,
            "federation": verified.federation,
            "signed_at": stamp(verified.signed_at),
            "roster": parties.version,
            "root": fingerprint(key),
        }
        if as_json:
            typer.echo(json.dumps({**facts, "predicate": verified.predicate}))
            return
        typer.echo(
            f"{printable(str(folder))}: {verified.files} files as {verified.signer.name} "
            f"({verified.signer.org}) of {verified.federation} signed them on {facts['signed_at']}"
        )
        typer.echo(f"roster version {parties.version}, root key {facts['root']}: compare it with the one you know")


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(epilog=examples("fedtune sign runs/demo/peft", "fedtune sign merged --identity server/identity"))(sign)
    app.command(
        epilog=examples(
            "fedtune verify runs/demo/peft --roster identity/roster",
            "fedtune verify adapter --roster roster --root roster.pub --json",
            "fedtune verify adapter --roster identity/roster --run runs/demo",
        )
    )(verify)
