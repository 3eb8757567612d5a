"""The command `fedtune enroll`: keys of a party, a request that the CA signs, and the bundle that it sends back."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from fedtune.cli import enroll_online
from fedtune.cli.options import DebugOption, examples, report_errors
from fedtune.terminal.text import printable

app = typer.Typer(
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Enrol a party of a federation: with a one-time code over the network, or by files: request at the site, sign "
    "at the CA, accept at the site. Keys never travel.",
)

IdentityOption = Annotated[Path, typer.Option("--identity", metavar="DIR", help="Folder of this party's keys.")]
AuthorityOption = Annotated[Path, typer.Option("--ca", metavar="DIR", help="Folder made by fedtune ca init.")]


@app.callback(invoke_without_command=True, epilog=examples("fedtune enroll --code CODE", "fedtune enroll --code -"))
def by_code(
    context: typer.Context,
    code: Annotated[
        str | None, typer.Option(metavar="CODE", help="What the coordinator has sent: a code, a file, or - to paste.")
    ] = None,
    identity: IdentityOption = Path("identity"),
    proxy: Annotated[str, typer.Option(metavar="URL", help="HTTP proxy to dial through, or environment.")] = "",
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Ask once, and do not wait until it is signed.")] = False,
    debug: DebugOption = False,
) -> None:
    """Enrol with a code, or give one of the commands below."""
    if context.invoked_subcommand is not None:
        return
    if code is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)
    with report_errors(debug):
        enroll_online.enrol_by_code(code, identity, proxy=proxy, wait=not no_wait)


@app.command(
    epilog=examples(
        "fedtune enroll request --name site-a --org hospital-a",
        "fedtune enroll request --name server --org consortium --role coordinator --host fl.example.org",
    )
)
def request(
    name: Annotated[str, typer.Option(help="Lasting name of this party, unique in the federation.")],
    org: Annotated[str, typer.Option(help="Organisation that it belongs to.")],
    role: Annotated[str, typer.Option(help="client, coordinator or auditor.")] = "client",
    host: Annotated[
        list[str] | None, typer.Option(metavar="HOST", help="A coordinator's name or address; may be given again.")
    ] = None,
    identity: IdentityOption = Path("identity"),
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Instead of NAME.request.json.")] = None,
    code: Annotated[bool, typer.Option("--code", help="Print the request as a line to paste, too.")] = False,
    debug: DebugOption = False,
) -> None:
    """Create this party's keys, which stay here, and a request for the CA; run it again to renew a certificate."""
    with report_errors(debug):
        from fedtune.link.pki import codes, enrollment
        from fedtune.link.pki.signing import fingerprint
        from fedtune.store.files import write_bytes

        data: Any = enrollment.make_request(identity, name=name, org=org, role=role, hosts=host or ())  # type: ignore[arg-type]
        path = out or Path(f"{name}.request.json")
        write_bytes(path, data)
        typer.echo(f"wrote {path}; the keys stay in {identity}")
        typer.echo(f"fingerprint, to compare by voice with the person who signs: {fingerprint(data)}")
        typer.echo(f"next, at the CA: fedtune enroll sign {path}")
        if code:
            typer.echo(f"or send this line, and there: fedtune enroll sign CODE\n{codes.encode('request', data)}")


@app.command(
    epilog=examples(
        "fedtune enroll sign site-a.request.json", "fedtune enroll sign site-a.request.json --ca ca --days 30"
    )
)
def sign(
    request: Annotated[
        str,
        typer.Argument(
            metavar="REQUEST",
            help="What the site sent: a file, its code, or - to paste that; or the folder of a queue.",
            show_default=False,
        ),
    ],
    ca: AuthorityOption = Path("ca"),
    days: Annotated[int, typer.Option(min=1, max=397, help="How long the certificate lasts.")] = 90,
    fingerprint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HEX", help="Fingerprint that the site read out; required without a terminal; once for each site."
        ),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Sign a whole queue without comparing: the coordinator is trusted with that.")
    ] = False,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Accept a new key, organisation or role of an enrolled party."),
    ] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Instead of NAME.bundle.json.")] = None,
    code: Annotated[
        bool, typer.Option("--code", help="Print the bundle as a line to paste, too, as for a request that came so.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Enter a party into the roster and sign its certificate, after its fingerprint has been compared."""
    with report_errors(debug):
        from fedtune.errors import ConfigError, Fault
        from fedtune.link.pki import authority, codes, enrollment, signing
        from fedtune.store.files import write_bytes

        if len(request) <= codes.LONGEST_PATH and Path(request).is_dir():
            enroll_online.sign_folder(
                Path(request), ca, days=days, fingerprints=fingerprint or [], replace=replace, yes=yes
            )
            return
        data = codes.read_given("request", request, "fedtune enroll request", sys.stdin)
        applicant = enrollment.read_request(data)
        actual = signing.fingerprint(data)
        typer.echo(
            f"{printable(applicant.name)}, {applicant.role} of {printable(applicant.org)}" + hosts(applicant.hosts)
        )
        typer.echo(f"fingerprint {actual}")
        if fingerprint:
            if not any(signing.is_fingerprint(text, actual) for text in fingerprint):
                hint = "ask the site again; if it differs, the request was changed on its way"
                raise ConfigError(Fault("--fingerprint", actual, ", ".join(map(repr, fingerprint)), hint))
        elif not sys.stdin.isatty():
            raise ConfigError(Fault("--fingerprint", "what the site read out", "none", "compare it by voice first"))
        elif not typer.confirm("Is that what the site reads out?"):
            raise typer.Exit(1)
        bundle = authority.sign_request(ca, data, days=days, replace=replace, now=int(time.time()))
        path = out or Path(f"{applicant.name}.bundle.json")
        write_bytes(path, bundle)
        version = authority.current_roster(ca).version
        typer.echo(f"wrote {path}; the roster has version {version}")
        typer.echo(f"next, at {printable(applicant.name)}: fedtune enroll accept {path}")
        if code or request == "-" or codes.START.match(request):
            echo_code(bundle)
        typer.echo(f"and at the server: fedtune roster install {ca / authority.ROSTER}")


@app.command(epilog=examples("fedtune enroll accept site-a.bundle.json"))
def accept(
    bundle: Annotated[
        str,
        typer.Argument(
            metavar="BUNDLE", help="What the CA sent back: a file, its code, or - to paste that.", show_default=False
        ),
    ],
    identity: IdentityOption = Path("identity"),
    debug: DebugOption = False,
) -> None:
    """Install the certificate, the federation's anchors and the roster, checked against this party's keys."""
    with report_errors(debug):
        from fedtune.link.pki import codes, enrollment
        from fedtune.link.pki.identity import CA, ROOT, format_time
        from fedtune.link.pki.signing import fingerprint

        data = codes.read_given("bundle", bundle, "fedtune enroll sign REQUEST", sys.stdin)
        accepted = enrollment.accept_bundle(identity, data, now=int(time.time()))
        until = format_time(accepted.not_after)
        anchors = (identity / CA).read_bytes() + (identity / ROOT).read_bytes()
        typer.echo(
            f"{accepted.name} of {accepted.org} is enrolled as {accepted.role} in {accepted.federation}, until {until}"
        )
        typer.echo(f"fingerprint of the federation's anchors, to compare with the CA's: {fingerprint(anchors)}")
        step = "fedtune serve RECIPE" if accepted.role == "coordinator" else "fedtune join SITE --dry-run"
        typer.echo(f"next: {step}")


def echo_code(bundle: bytes) -> None:
    """Print a bundle as a line to paste, if it is short enough."""
    from fedtune.link.pki import codes

    if len(bundle) <= codes.MAX_BYTES and len(line := codes.encode("bundle", bundle)) <= codes.MAX_PASTED:
        typer.echo(f"or send this line, and there: fedtune enroll accept CODE\n{line}")
    else:
        typer.echo("its code is too long for a message, with the roster in it: send the file")


def hosts(names: tuple[str, ...]) -> str:
    return f", dialled as {', '.join(names)}" if names else ""


enroll_online.register(app)
