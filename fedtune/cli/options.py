"""What the commands share: common options, where they write, and how they report errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedtune.terminal.console import console

if TYPE_CHECKING:
    from fedtune.rounds.events import Watch

USAGE, INTERRUPTED = 2, 130
"""Exit statuses: an error that the user can correct, and Ctrl-C."""


def examples(*lines: str) -> str:
    """Return the end of a help text."""
    return "Examples:\n\n" + "\n\n".join(f"- `{line}`" for line in lines)  # typer joins the lines of a paragraph


RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, e.g. runs/demo.", show_default=False)]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace one setting of the recipe; may be given again."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Last line of stdout: the result as one JSON object.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


TrackOption = Annotated[
    list[str] | None,
    typer.Option(
        "--track",
        metavar="NAME",
        help="Send each round's numbers to a tracker: tensorboard, mlflow, trackio or wandb; may be given again.",
    ),
]


@contextmanager
def report_errors(debug: bool) -> Iterator[None]:
    """Print an error that the user can correct as one message on stderr, and exit with its status."""
    from fedtune.errors import FedtuneError

    if debug or os.environ.get("FEDTUNE_DEBUG"):
        # In the environment, so that engines and their worker processes show where a client's work failed, too.
        before = os.environ.get("FEDTUNE_DEBUG", "")
        os.environ["FEDTUNE_DEBUG"] = before or "1"
        try:
            yield
        finally:
            os.environ["FEDTUNE_DEBUG"] = before
        return
    try:
        yield
    except FedtuneError as error:
        typer.echo(f"fedtune: {print_line(str(error))}", err=True)
        raise typer.Exit(USAGE) from None
    except BrokenPipeError:
        # The reader of our output has closed it; Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        typer.echo(f"fedtune: {print_line(where + (error.strerror or str(error)))}; --debug shows where", err=True)
        raise typer.Exit(USAGE) from None
    except KeyboardInterrupt:
        typer.echo("fedtune: stopped by Ctrl-C", err=True)
        raise typer.Exit(INTERRUPTED) from None


def print_line(text: str) -> str:
    from fedtune.terminal.text import printable

    return printable(text, lines=True)


def run_with_progress(title: str, quiet: bool, call: Callable[[Watch], Any]) -> Any:
    """Call with an observer that shows progress on stderr, or notes alone if quiet."""
    if quiet:
        from fedtune.rounds.events import Note

        return call(lambda event: typer.echo(print_line(event.text), err=True) if isinstance(event, Note) else None)
    from fedtune.terminal.progress import Progress

    with Progress(console(sys.stderr), title=title) as progress:
        return call(progress)
