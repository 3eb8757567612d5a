"""The command `fedtune split`: a recipe's clients as files of rows, for other tools to read."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli.options import DebugOption, JsonOption, SetOption, examples, report_errors


class Form(StrEnum):
    """How rows are written."""

    jsonl = "jsonl"
    parquet = "parquet"


def register(app: typer.Typer) -> None:
    """Add the command to an application."""
    app.command(
        epilog=examples(
            "fedtune split recipe.toml --out parts",
            "fedtune split recipe.toml --out parts --form parquet --column client",
        )
    )(split)


def split(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file, TOML.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write, a new or an empty one.")],
    form: Annotated[Form, typer.Option(help="jsonl or parquet.")] = Form.jsonl,
    column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Add a column with the client's name to every row.")
    ] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write the rows of each client of a recipe as files that datasets, pandas and other frameworks read.

    The folders train, validation (rows that are held out) and test hold a file for each client, with every column as it
    was read; partition.jsonl has the numbers of their rows, and is a split itself (data.split.file).
    """
    with report_errors(debug):
        from fedtune.runs.split_files import write_split
        from fedtune.terminal import split as shown

        written = write_split(recipe, out, form=form.value, column=column, overrides=overrides or ())
        if as_json:
            typer.echo(json.dumps({"path": str(written.path), "files": written.files, **written.split}))
            return
        for line in shown.lines(written.split):
            typer.echo(line, err=True)
        typer.echo(written.path)
