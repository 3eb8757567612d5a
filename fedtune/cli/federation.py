"""The commands of a federation over gRPC: `fedtune serve`, `join`, `status` and `audit`."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from fedtune.cli.live import LiveAddressOption, LiveOption, LivePortOption, live_feed, live_options, live_server
from fedtune.cli.options import DebugOption, JsonOption, RunArgument, TrackOption, examples, report_errors
from fedtune.cli.stop_signals import until_signal
from fedtune.terminal.console import console
from fedtune.terminal.text import printable, size

EXIT_RETRY = 75
"""Exit status if another try may succeed: EX_TEMPFAIL of sysexits.h."""

LogOption = Annotated[str, typer.Option("--log", metavar="FORM", help="How events are written: text or json.")]


def serve(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="The experiment, in TOML.", show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Replace one setting of the recipe, or with link.KEY of the server; may be given again.",
        ),
    ] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Resume a run that was stopped or killed.")] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The server's own file, with the table link.")
    ] = None,
    listen: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where clients dial; 0.0.0.0:9000.")] = None,
    identity: Annotated[Path | None, typer.Option(metavar="DIR", help="Identity folder instead of ./identity.")] = None,
    expect: Annotated[
        int | None, typer.Option(min=1, help="Clients that round 1 waits for; the cohort, or all that are enrolled.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Run directory instead of runs/NAME.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="If the run directory is taken, start beside it.")] = False,
    track: TrackOption = None,
    live: LiveOption = False,
    live_port: LivePortOption = None,
    live_address: LiveAddressOption = None,
    log: LogOption = "text",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Serve a recipe to the institutions of a federation: they dial in, train on their own data, and send updates."""
    if (recipe is None) == (resume is None):
        raise typer.BadParameter("expected a RECIPE, or --resume RUN", param_hint="RECIPE")
    if resume is not None and (out is not None or fresh):
        raise typer.BadParameter(
            "expected no --out and no --fresh beside it: the run stays in its folder", param_hint="--resume"
        )

    def work() -> None:
        from fedtune.cli.event_log import event_writer
        from fedtune.config.link import bind_server
        from fedtune.deployment.coordinator import coordinate
        from fedtune.deployment.server_setup import data_at_sites
        from fedtune.errors import RoundError
        from fedtune.link.audit_log import record_to_all
        from fedtune.live.link_feed import feed_link
        from fedtune.runs.tracked import tracker_names

        source = recipe if recipe is not None else (resume or Path()) / "recipe.toml"
        edits = [f"link.listen={json.dumps(listen)}"] if listen is not None else []
        edits += [f"link.identity={json.dumps(str(identity.absolute()))}"] if identity is not None else []
        # The server's own settings are no part of the recipe, which the sites see.
        edits += [text for text in overrides or () if text.startswith(("link.", "enrolment."))]
        recipe_edits = [text for text in overrides or () if not text.startswith(("link.", "enrolment."))]
        bound = data_at_sites(str(source), overrides=recipe_edits)
        settings, enrolment, root = bind_server(config, tuple(edits))
        options = ["--config", str(config.absolute())] if config is not None else []
        options += [word for text in edits for word in ("--set", text)]
        trackers = tracker_names(track or ())
        options += [word for name in trackers for word in ("--track", name)]
        run = resume if resume is not None else out or Path("runs") / bound.name
        page = live_options(live, live_port, live_address)
        options += page.words if page else []
        feed = live_feed(bound.name, bound.rounds.count, resume if page else None)
        record = event_writer(check_log_format(log))
        try:
            with live_server(page, feed, lambda text: record("note", text=text)):
                run, summary = coordinate(
                    bound,
                    run,
                    settings,
                    root,
                    resume=resume is not None,
                    fresh=fresh,
                    expect=expect,
                    enrolment=enrolment,
                    options=options,
                    record=record_to_all(record, feed_link(feed)),
                    watch=feed,
                    trackers=trackers,
                )
        except RoundError as error:
            typer.echo(f"fedtune: {printable(str(error))}", err=True)
            raise typer.Exit(1 if error.final else EXIT_RETRY) from None
        if as_json:
            typer.echo(json.dumps({**summary, "path": str(run)}))
        else:
            typer.echo(
                f"{summary['state']} after round {summary['rounds']}{losses(summary)}, "
                f"state {summary['state_digest'][:16]}; see {run}"
            )

    with report_errors(debug):
        until_signal(work)


def join(
    site: Annotated[Path, typer.Argument(metavar="SITE", help="This site's own file, in TOML.", show_default=False)],
    server: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Instead of link.address.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what the server's run would ask of this site, and do nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Agree to the recipe where policy.ask requires it.")] = False,
    log: LogOption = "text",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Take part in a federation: dial its server, train here on this site's data, and send what the policy allows."""
    if dry_run:
        with report_errors(debug):
            show_dry_run(site, server, as_json=as_json)

    def agree(recipe: str) -> bool:
        typer.echo(printable(recipe, lines=True), err=True)
        if not yes and not sys.stdin.isatty():
            from fedtune.deployment.join import no_terminal

            raise no_terminal()
        return yes or typer.confirm("Take part in this run?", err=True)

    def work() -> None:
        from fedtune.cli.event_log import event_writer
        from fedtune.deployment import join as join_module
        from fedtune.errors import FedtuneError, may_pass

        try:
            join_module.join(site, server=server, record=event_writer(check_log_format(log)), agree=agree)
        except FedtuneError as error:
            # A supervisor starts it again: nothing must be changed, but the disk may have space then.
            if not may_pass(error):
                raise
            typer.echo(f"fedtune: {printable(str(error))}", err=True)
            raise typer.Exit(EXIT_RETRY) from None

    with report_errors(debug):
        until_signal(work)


def show_dry_run(site: Path, server: str | None, *, as_json: bool) -> NoReturn:
    """Print what the server's run would ask of a site, and exit with 0 if the site's policy allows it."""
    from fedtune.deployment import join as join_module

    shown = join_module.dry_run(site, server=server)
    if as_json:
        typer.echo(json.dumps(shown.facts))
    else:
        from fedtune.cli.dry_run import show

        out = console(sys.stdout)
        show(lambda text: out.print(text, markup=False), shown)
    raise typer.Exit(0 if shown.allowed else 1)


def status(run: RunArgument, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Show the status of a served run, also while it runs: its rounds; bytes and last error of each client."""
    with report_errors(debug):
        from fedtune.deployment import status as status_module

        shown = status_module.server_status(run)
        if as_json:
            typer.echo(json.dumps(shown.facts))
            return
        from rich.table import Table

        from fedtune.terminal.summary import table_width

        for name, text in shown.lines.items():
            typer.echo(f"{name:11} {printable(text)}")
        table = Table(box=None, pad_edge=False)
        for column in ("client", "state", "seen", "rounds", "up", "down", "last error"):
            table.add_column(column, justify="right" if column in ("rounds", "up", "down") else "left", overflow="fold")
        for client in shown.clients:
            table.add_row(
                printable(client.name),
                f"{client.state}, {printable(client.work)}" if client.work else client.state,
                client.seen,
                str(client.rounds),
                size(client.up),
                size(client.down),
                printable(client.error),
            )
        out = console(sys.stdout)
        out.print(table if shown.clients else "no client has come yet", width=table_width(out))


def check_kind(kind: str | None, kinds: Collection[str]) -> None:
    """Refuse a kind of event that neither this log nor any other has: nothing would be printed, as if nothing was."""
    from fedtune.cli.event_log import EVENT_TEXTS
    from fedtune.errors import ConfigError, Fault

    if kind is not None and kind not in kinds and kind not in EVENT_TEXTS:
        raise ConfigError(Fault("--kind", f"a kind of event, in this log {', '.join(sorted(kinds))}", repr(kind)))


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
        typer.Option(metavar="STATE", help="A site's state folder: compare its receipts with the run's journal."),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Print an audit log, after its chain of hashes has been verified: what was asked, sent, refused, and when."""
    with report_errors(debug):
        import time

        from fedtune.deployment import status as status_module

        log = status_module.load_audit_history(path, head=head)
        if receipts is not None:
            total = status_module.verify_receipts(path, receipts)
            typer.echo(
                f"{total} receipts of {printable(str(receipts))} agree with the journal of {printable(str(path))}"
            )
            return
        check_kind(kind, {entry.kind for entry in log.entries})
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


def losses(summary: Mapping[str, Any]) -> str:
    """Return the loss on the sites' held-out rows before and after a run; empty if they do not score."""
    before, after = ((summary[when]["test"] or {}).get("loss") for when in ("before", "after"))
    return f", held-out loss {before:.3f} to {after:.3f}" if before is not None and after is not None else ""


def check_log_format(text: str) -> Any:
    if text not in ("text", "json"):
        raise typer.BadParameter(f"expected text or json; got {text!r}", param_hint="--log")
    return text


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(
        epilog=examples(
            "fedtune serve recipe.toml",
            "fedtune serve recipe.toml --listen 0.0.0.0:9000 --expect 3 --live",
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
