"""The command `fedtune search`: try settings of a recipe, each trial a run, and write the recipe of the best one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli.options import (
    DebugOption,
    JsonOption,
    QuietOption,
    SetOption,
    examples,
    report_errors,
    run_with_progress,
)
from fedtune.terminal.console import console


def register(app: typer.Typer) -> None:
    """Add the command to an application."""
    app.command(
        epilog=examples(
            "fedtune search recipe.toml --dry-run",
            "fedtune search recipe.toml --out runs/rates",
            "fedtune search recipe.toml --set search.kind=asha --set search.trials=27",
            "fedtune search --resume runs/rates",
        )
    )(search)


def search(
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="[RECIPE]", help="A recipe with the table [search].", show_default=False),
    ] = None,
    overrides: SetOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Folder instead of runs/NAME-search.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Go on with a search that was stopped or killed.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="If the folder is taken, start beside it.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the trials and what they would send; train nothing.")
    ] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Try settings of a recipe: each trial is a run, the good ones go on, and the best becomes a recipe.

    The table [search] says which settings, how many trials, and which of them run all rounds. Trials are compared on
    the clients' held-out rows alone. The result is one table, one picture, what the search itself has spent, and
    best.toml, ready for fedtune simulate.
    """
    if (recipe is None) == (resume is None):
        got = "both" if recipe is not None else "neither"
        raise typer.BadParameter(f"expected a RECIPE, or --resume DIR; got {got}", param_hint="RECIPE")
    if resume is not None and (out is not None or fresh or overrides or dry_run):
        raise typer.BadParameter(
            "expected nothing beside it: a search goes on as it was begun, in its folder", param_hint="--resume"
        )
    with report_errors(debug):
        from fedtune.config import bind
        from fedtune.runs import search as runs

        bound = runs.recipe_of_search(resume) if resume is not None else bind(recipe or "", overrides=overrides or ())
        if dry_run:
            show_planned(runs.plan_search(bound), as_json)
            return
        target = resume if resume is not None else out
        done = run_with_progress(
            "search",
            quiet,
            lambda watch: runs.search(bound, out=target, fresh=fresh, resume=resume is not None, watch=watch),
        )
        if as_json:
            paths = {"path": str(done.path), "page": str(done.page), "recipe": str(done.best)}
            typer.echo(json.dumps({**done.content, **paths}))
            return
        if not quiet:
            from fedtune.terminal.search import show_search

            show_search(console(sys.stdout), done.content)
        typer.echo(done.best)


def show_planned(content: object, as_json: bool) -> None:
    from fedtune.terminal.search import show_plan

    if as_json:
        typer.echo(json.dumps(content))
    else:
        show_plan(console(sys.stdout), content)  # type: ignore[arg-type]
