"""The commands of `fedtune enroll` over the network: invite, queue and serve; and the one command of a site."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.cli.options import DebugOption, JsonOption, examples, report_errors
from fedtune.cli.stop_signals import until_signal
from fedtune.terminal.text import duration, printable

if TYPE_CHECKING:
    from fedtune.deployment.enrolment import Place
    from fedtune.link.pki.queue_files import Waiting
    from fedtune.link.pki.queue_signing import Verdict

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="The server's own file: link and enrolment."),
]
ServerOption = Annotated[
    Path | None, typer.Option("--identity", metavar="DIR", help="The server's identity folder instead of ./identity.")
]
EXIT_RETRY = 75


def find_place(config: Path | None, identity: Path | None) -> Place:
    from fedtune.config.link import bind_server
    from fedtune.deployment import enrolment

    edits = (f"link.identity={json.dumps(str(identity.absolute()))}",) if identity is not None else ()
    return enrolment.find_place(*bind_server(config, edits))


def invite(
    name: Annotated[str, typer.Option(help="Lasting name of the site, unique in the federation.")],
    org: Annotated[str, typer.Option(help="Organisation that it belongs to.")],
    hours: Annotated[int, typer.Option(min=1, max=720, help="For which the code can be used.")] = 24,
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="What the site dials, instead of enrolment.address.")
    ] = None,
    server: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="What it dials to join, instead of the link's port.")
    ] = None,
    config: ConfigOption = None,
    identity: ServerOption = None,
    debug: DebugOption = False,
) -> None:
    """Make a one-time code with which a site asks to be enrolled over the network; run at the coordinator."""
    with report_errors(debug):
        from fedtune.deployment import enrolment
        from fedtune.link.pki import invitations
        from fedtune.link.pki.identity import format_time

        place = find_place(config, identity)
        code = enrolment.invite(place, name=name, org=org, hours=hours, address=address or "", server=server or "")
        until = format_time(int(time.time()) + hours * 3600)
        typer.echo(f"a code for {name}, client of {org}: for one use, until {until}")
        typer.echo(f"it dials {code.address}: run fedtune enroll serve, or fedtune serve with [enrolment]")
        typer.echo("send this line to the site, and there: fedtune enroll --code CODE")
        typer.echo(invitations.encode(code))


def queue(
    config: ConfigOption = None,
    identity: ServerOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List the requests that wait for the CA, and the codes that were not used yet; run at the coordinator."""
    with report_errors(debug):
        from fedtune.link.pki import invitations, queue_files

        place, now = find_place(config, identity), time.time()
        waiting, problems = queue_files.load(place.queue) if place.queue.is_dir() else ((), ())
        rows = [
            {
                "name": one.request.name,
                "org": one.request.org,
                "role": one.request.role,
                "state": "answered" if one.answered else "waiting",
                "seconds": max(0, int(now - one.since)),
                "fingerprint": one.fingerprint,
            }
            for one in waiting
        ]
        rows += [
            {
                "name": known.name,
                "org": known.org,
                "role": "client",
                "state": "invited" if now <= known.until else "invitation ended",
                "seconds": max(0, int(abs(known.until - now))),
                "fingerprint": "",
            }
            for _, known in invitations.list_all(place.folder)
            if not known.holder
        ]
        if as_json:
            typer.echo(json.dumps({"queue": str(place.queue), "requests": rows, "problems": list(problems)}))
            return
        for row in rows:
            state = {"waiting": "waits for {}", "answered": "answered; came {} ago", "invited": "invited; {} left"}
            since = state.get(str(row["state"]), "its code ended {} ago").format(duration(float(row["seconds"])))
            typer.echo(f"{printable(str(row['name']))}, {row['role']} of {printable(str(row['org']))}: {since}")
            if row["state"] == "waiting":
                typer.echo(f"  fingerprint {row['fingerprint']}")
        for problem in problems:
            typer.echo(printable(problem), err=True)
        if not rows:
            typer.echo("no request waits, and no code is open")
        elif any(row["state"] == "waiting" for row in rows):
            typer.echo(f"next: carry {place.queue} to the CA, there fedtune enroll sign FOLDER, and put it back")


def delegate(config: ConfigOption = None, identity: ServerOption = None, debug: DebugOption = False) -> None:
    """Ask the CA to let this coordinator renew its clients' certificates by itself, for some weeks; see the manual."""
    with report_errors(debug):
        from fedtune.deployment import enrolment

        place = find_place(config, identity)
        path = enrolment.ask_delegation(place)
        typer.echo(f"wrote {path}; the keys of the registrar stay in {place.identity.folder}")
        typer.echo(f"next: carry {place.queue} to the CA, there fedtune ca delegate FOLDER, and put it back")


def serve(
    config: ConfigOption = None,
    identity: ServerOption = None,
    listen: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Instead of enrolment.listen.")] = None,
    log: Annotated[str, typer.Option("--log", metavar="FORM", help="How events are written: text or json.")] = "text",
    debug: DebugOption = False,
) -> None:
    """Serve enrolments without a run, until it is stopped; `fedtune serve` does so beside a run with [enrolment]."""
    if log not in ("text", "json"):
        raise typer.BadParameter(f"expected text or json; got {log!r}", param_hint="--log")

    def work() -> None:
        import threading

        from fedtune.cli.event_log import event_writer
        from fedtune.deployment import enrolment

        place, over = find_place(config, identity), threading.Event()
        record = event_writer("json" if log == "json" else "text")
        enrolment.serve_alone(place, record=record, until=over.wait, listen=listen or "")

    with report_errors(debug):
        until_signal(work)


def enrol_by_code(code: str, identity: Path, *, proxy: str, wait: bool) -> None:
    """Enrol this site with a code, and wait until the CA has signed its request."""
    from fedtune.deployment import enrol_site

    def pause(seconds: float) -> bool:
        if wait:
            time.sleep(seconds)
        return wait

    accepted = enrol_site.enrol(
        code, identity, lines=sys.stdin, proxy=proxy, wait=pause, say=lambda text: typer.echo(printable(text), err=True)
    )
    if accepted is None:
        typer.echo("not signed yet; the same command asks again", err=True)
        raise typer.Exit(EXIT_RETRY)
    for line in accepted:
        typer.echo(line)


def sign_folder(folder: Path, ca: Path, *, days: int, fingerprints: list[str], replace: bool, yes: bool) -> None:
    """Answer the requests of a queue: renewals at once, new ones after their fingerprint has been compared."""
    from fedtune.link.pki import authority, queue_signing
    from fedtune.link.pki.queue_files import REGISTRAR
    from fedtune.link.pki.signing import is_fingerprint

    def decide(waiting: Waiting) -> Verdict:
        asked = waiting.request
        typer.echo(
            f"{printable(asked.name)}, {asked.role} of {printable(asked.org)}: fingerprint {waiting.fingerprint}"
        )
        if yes or any(is_fingerprint(text, waiting.fingerprint) for text in fingerprints):
            return "sign"
        if fingerprints or not sys.stdin.isatty():
            return "leave"
        answer = typer.prompt("Is that what the site reads out? y: sign, n: leave, r: reject", default="n")
        verdicts: dict[str, Verdict] = {"y": "sign", "r": "reject"}
        return verdicts.get(answer.strip().lower()[:1], "leave")

    counts = dict.fromkeys(("enrolled", "renewed", "rejected", "left", "failed"), 0)
    for result in queue_signing.sign_queue(ca, folder, decide, days=days, replace=replace, now=int(time.time())):
        counts[result.outcome] += 1
        text = result.text or {"left": "left: its fingerprint was not confirmed"}.get(result.outcome, result.outcome)
        typer.echo(printable(f"{result.name}: {text}" if result.name else text))
    shown = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
    typer.echo(f"{shown or 'no request'}; the roster has version {authority.current_roster(ca).version}")
    if (folder / REGISTRAR).exists() and authority.current_roster(ca).delegation is None:
        typer.echo(f"the coordinator asks for a registrar of its own: fedtune ca delegate {folder}")
    typer.echo(f"next: put {folder} back at the coordinator, which answers the sites and takes the roster by itself")
    if counts["left"] and not sys.stdin.isatty():
        typer.echo("of the others: --fingerprint HEX for each that was compared by voice, or --yes for all")
    if counts["failed"]:
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Add the commands to the group."""
    app.command(epilog=examples("fedtune enroll invite --name site-a --org hospital-a --config server.toml"))(invite)
    app.command(epilog=examples("fedtune enroll queue --config server.toml"))(queue)
    app.command(epilog=examples("fedtune enroll serve --config server.toml"))(serve)
    app.command(epilog=examples("fedtune enroll delegate --config server.toml"))(delegate)
