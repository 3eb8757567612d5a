"""The commands of a federation over gRPC: `fedtune serve`, `join`, `status` and `audit`."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from fedtune.cli.options import DebugOption, JsonOption, RunArgument, SetOption, console, examples, report_errors
from fedtune.cli.text import printable, size

AGAIN = 75
"""Exit status of what may succeed when it is tried again, as sysexits.h has it."""

LogOption = Annotated[str, typer.Option("--log", metavar="FORM", help="How events are written: text or json.")]


def serve(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="The experiment, in TOML.", show_default=False)
    ] = None,
    overrides: SetOption = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Go on with a run that was stopped or killed.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The server's own file, with the table link.")
    ] = None,
    listen: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where clients dial; 0.0.0.0:9000.")] = None,
    identity: Annotated[Path | None, typer.Option(metavar="DIR", help="Identity folder instead of ./identity.")] = None,
    expect: Annotated[
        int | None, typer.Option(min=1, help="Clients that round 1 waits for; the cohort, or all that are enrolled.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Run directory instead of runs/NAME.")] = None,
    log: LogOption = "text",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Serve a recipe to the institutions of a federation: they dial in, train on their own data, and send updates."""
    if (recipe is None) == (resume is None):
        raise typer.BadParameter("expected a RECIPE, or --resume RUN", param_hint="RECIPE")
    with report_errors(debug), stop_on_signals():
        from fedtune.cli.event_log import event_writer
        from fedtune.config.link import bind_link
        from fedtune.deployment.coordinator import coordinate
        from fedtune.deployment.server_setup import data_at_sites
        from fedtune.errors import RoundError

        source = recipe if recipe is not None else (resume or Path()) / "recipe.toml"
        edits = [f"link.listen={json.dumps(listen)}"] if listen is not None else []
        edits += [f"link.identity={json.dumps(str(identity.absolute()))}"] if identity is not None else []
        settings, root = bind_link(config, tuple(edits))
        bound = data_at_sites(str(source), overrides=overrides or ())
        run = resume if resume is not None else out or Path("runs") / bound.name
        tell = event_writer(form(log))
        try:
            summary = coordinate(bound, run, settings, root, resume=resume is not None, expect=expect, tell=tell)
        except RoundError as error:
            typer.echo(f"fedtune: {printable(str(error))}", err=True)
            raise typer.Exit(1 if error.final else AGAIN) from None
        except KeyboardInterrupt:
            return  # the run's own note says how to go on with it
        if as_json:
            typer.echo(json.dumps({**summary, "path": str(run)}))
        else:
            typer.echo(
                f"{summary['state']} after round {summary['rounds']}, state {summary['state_digest'][:16]}; see {run}"
            )


def join(
    site: Annotated[Path, typer.Argument(metavar="SITE", help="This site's own file, in TOML.", show_default=False)],
    server: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Instead of link.address.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what the server's run would ask of this site, and do nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Agree to the recipe where policy.ask wants somebody to.")] = False,
    log: LogOption = "text",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Take part in a federation: dial its server, train here on this site's data, and send what the policy allows."""
    with report_errors(debug), stop_on_signals():
        from fedtune.cli.event_log import event_writer
        from fedtune.deployment import join as join_module

        if dry_run:
            shown = join_module.dry_run(site, server=server)
            if as_json:
                typer.echo(json.dumps(shown.facts))
            else:
                from fedtune.cli.dry_run import show

                show(console(sys.stdout), shown)
            raise typer.Exit(0 if shown.allowed else 1)

        def agree(recipe: str) -> bool:
            typer.echo(printable(recipe, lines=True), err=True)
            return yes or (sys.stdin.isatty() and typer.confirm("Take part in this run?", err=True))

        with suppress(KeyboardInterrupt):
            join_module.join(site, server=server, tell=event_writer(form(log)), agree=agree)


def status(run: RunArgument, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Say how a served run stands: its rounds, and rounds, bytes and last error of each client; also while it runs."""
    with report_errors(debug):
        from fedtune.deployment import status as status_module

        found = status_module.server_status(run)
        if as_json:
            typer.echo(json.dumps(found.facts))
            return
        from rich.table import Table

        for name, text in found.lines.items():
            typer.echo(f"{name:11} {printable(text)}")
        table = Table(box=None, pad_edge=False)
        for column in ("client", "state", "seen", "rounds", "up", "down", "last error"):
            table.add_column(column, justify="right" if column in ("rounds", "up", "down") else "left", overflow="fold")
        for client in found.clients:
            table.add_row(
                printable(client.name),
                client.state,
                client.seen,
                str(client.rounds),
                size(client.up),
                size(client.down),
                printable(client.error),
            )
        console(sys.stdout).print(table if found.clients else "no client has come yet")


def audit(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="Run directory, a site's state folder, or a log.", show_default=False)
    ],
    kind: Annotated[str | None, typer.Option(metavar="KIND", help="Only events of this kind.")] = None,
    head: Annotated[
        str | None, typer.Option(metavar="HEX", help="A head noted earlier, which must still be in the chain.")
    ] = None,
    receipts: Annotated[
        Path | None,
        typer.Option(metavar="STATE", help="A site's state folder: hold its receipts against the run's journal."),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Print an audit log, after its chain of hashes has been verified: what was asked, sent, refused, and when."""
    with report_errors(debug):
        import time

        from fedtune.deployment import status as status_module

        log = status_module.audit(path, head=head)
        if receipts is not None:
            held = status_module.receipts(path, receipts)
            typer.echo(f"{held} receipts of {printable(str(receipts))} stand in the journal of {printable(str(path))}")
            return
        for entry in log.entries:
            if kind is not None and entry.kind != kind:
                continue
            stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(entry.unix_ms / 1000))
            if as_json:
                typer.echo(json.dumps({"n": entry.n, "time": stamp, "event": entry.kind, **entry.fields}))
            else:
                fields = " ".join(f"{name}={printable(value)}" for name, value in sorted(entry.fields.items()))
                typer.echo(f"{entry.n:6} {stamp} {entry.kind:10} {fields}")
        if not as_json:
            typer.echo(f"{len(log.entries)} entries, chain verified; head {log.head}")


def form(text: str) -> Any:
    if text not in ("text", "json"):
        raise typer.BadParameter(f"expected text or json; got {text!r}", param_hint="--log")
    return text


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does; a second signal ends the process at once: the journal survives it."""
    signals = 0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal signals
        signals += 1
        if signals > 1:
            os._exit(128 + number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(
        epilog=examples(
            "fedtune serve recipe.toml",
            "fedtune serve recipe.toml --listen 0.0.0.0:9000 --expect 3",
            "fedtune serve --resume runs/dolly",
        )
    )(serve)
    app.command(epilog=examples("fedtune join site.toml --dry-run", "fedtune join site.toml"))(join)
    app.command(epilog=examples("fedtune status runs/dolly", "fedtune status runs/dolly --json"))(status)
    app.command(
        epilog=examples(
            "fedtune audit runs/dolly",
            "fedtune audit state --kind sending",
            "fedtune audit runs/dolly --receipts site-a/state",
        )
    )(audit)
