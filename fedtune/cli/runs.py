"""The command `fedtune runs`: which runs there are, their state, and whether a run can be trusted."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedtune.cli.options import DebugOption, JsonOption, RunArgument, examples, report_errors
from fedtune.terminal.console import console
from fedtune.terminal.text import printable, size

if TYPE_CHECKING:
    from fedtune.store.verify import Status

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="List runs, show the state of a run, and check its journal, states and result against each other.",
)


@app.command("list", epilog=examples("fedtune runs list", "fedtune runs list experiments --json"))
def list_runs(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[FOLDER]", help="Folder of run directories; runs without it.")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List the runs of a folder: rounds done, state, bytes on disk."""
    with report_errors(debug):
        from fedtune import api

        statuses = api.runs(folder)
        if as_json:
            typer.echo(json.dumps([status_line(path, status) for path, status in statuses]))
            return
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for column in ("run", "rounds", "state", "on disk"):
            table.add_column(column, justify="right" if column in ("rounds", "on disk") else "left", overflow="fold")
        for path, status in statuses:
            if isinstance(status, str):
                table.add_row(printable(str(path)), "", f"damaged: {printable(status.removeprefix(f'{path}: '))}", "")
            else:
                table.add_row(printable(str(path)), str(status.committed), state(status), size(status.num_bytes))
        console(sys.stdout).print(table if statuses else f"no runs in {printable(str(folder or 'runs'))}")


@app.command(epilog=examples("fedtune runs status runs/demo"))
def status(run: RunArgument, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Show the state of a run, also while it runs."""
    with report_errors(debug):
        from fedtune import api

        status = api.status(run)
        if as_json:
            typer.echo(json.dumps(status_line(run, status)))
            return
        facts = {
            "run": f"{printable(str(run))} ({status.run})",
            "state": state(status),
            "rounds": str(status.committed),
            "last state": status.state or "none yet",
            "started": "not yet" if not status.begun else "once" if status.epochs == 1 else f"{status.epochs} times",
            "on disk": size(status.num_bytes),
        }
        if status.missing:
            facts["waits for"] = ", ".join(printable(name) for name in status.missing)
        if status.holder is None and not status.finished:
            from fedtune.runs.resume import resume_command

            facts["resume with"] = printable(resume_command(status.inputs.get("door", "simulate"), run))
        for name, text in facts.items():
            typer.echo(f"{name:11} {text}")


@app.command(epilog=examples("fedtune runs verify runs/demo"))
def verify(run: RunArgument, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Check all files of a run against each other: journal, states, lines, summary, results, exports, audit log."""
    with report_errors(debug):
        from fedtune import api

        verified = api.verify(run)
        if as_json:
            typer.echo(json.dumps(asdict(verified)))
            return
        torn = (
            f"; {verified.torn_bytes} bytes of a torn record at the end, which a resume cuts"
            if verified.torn_bytes
            else ""
        )
        typer.echo(
            f"{printable(str(run))}: {verified.records} records, {verified.committed} rounds and "
            f"{verified.blobs} {'blob' if verified.blobs == 1 else 'blobs'} ({size(verified.num_bytes)}) in order; "
            f"rounds.jsonl, summary and result agree with them; {verified.files} files of {folders(verified.folders)} "
            f"are as they were written{torn}"
        )
        for remark in verified.remarks:
            typer.echo(printable(remark), err=True)


def folders(count: int) -> str:
    return "1 result" if count == 1 else f"{count} results and exports"


def state(status: Status) -> str:
    """Return the state of a run in words."""
    if not status.begun:
        return "not begun"
    if status.holder is not None:
        return f"running, process {status.holder}" + (f", in round {status.open}" if status.open else "")
    if status.finished:
        return "finished"
    return f"stopped in round {status.open}" if status.open else "stopped"


def status_line(path: Path, status: Status | str) -> dict[str, Any]:
    if isinstance(status, str):
        return {"path": str(path), "damaged": status}
    facts = {key: value for key, value in asdict(status).items() if key != "inputs"}
    return {"path": str(path), **facts, "in_words": state(status)}
