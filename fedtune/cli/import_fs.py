"""The command `fedtune import-fs`: a configuration of FederatedScope-LLM as a recipe, with what became of every key."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.cli.options import DebugOption, JsonOption, examples, report_errors
from fedtune.terminal.text import printable

if TYPE_CHECKING:
    from fedtune.config.federatedscope import Entry


def import_fs(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="Configuration of FederatedScope-LLM, YAML.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Recipe to write, a new file; without it stdout."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="NAME", help="In place of its model: a folder, or a name on the hub.")
    ] = None,
    data: Annotated[str | None, typer.Option(metavar="FILE", help="In place of its data: a local copy.")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Turn a configuration of FederatedScope-LLM into a recipe, and say what became of each of its keys.

    What has no counterpart is listed with the reason, a key that FederatedScope does not have with the nearest one that
    it has; its defaults are written out. The recipe is checked before it is written. Nothing is trained.
    """
    with report_errors(debug):
        from fedtune.config import bind
        from fedtune.config.federatedscope import convert, recipe_text
        from fedtune.config.fs_yaml import read_yaml
        from fedtune.errors import ConfigError, Fault

        values = read_yaml(config)
        space = config.parent / str(values.get("hpo.ss", ""))
        converted = convert(values, base=base, data=data, space=read_yaml(space) if space.is_file() else None)
        text = recipe_text(converted, config.name)
        bind(text)
        if out is not None:
            try:
                with out.open("x", encoding="utf-8") as file:
                    file.write(text)
            except FileExistsError:
                raise ConfigError(Fault("--out", "a new file", str(out), "name another one, or remove it")) from None
        if as_json:
            keys = [asdict(entry) for entry in converted.entries]
            typer.echo(json.dumps({"recipe": text, "keys": keys, "defaults": list(converted.defaults)}, default=str))
            return
        for line in report_lines(converted.entries):
            typer.echo(printable(line), err=True)
        typer.echo(str(out) if out is not None else text, nl=out is not None)


def report_lines(entries: Sequence[Entry]) -> Iterator[str]:
    """Yield how many keys have made a line of the recipe, and one line for each of the others.

    How each of the former was read is in the recipe's comments.
    """
    read = sum(bool(entry.ours) for entry in entries)
    unknown = sum(not entry.known for entry in entries)
    yield f"{len(entries)} keys: {read} read, {len(entries) - read - unknown} without a counterpart, {unknown} unknown"
    # Unknown ones last, where they are seen.
    yield from (entry_line(entry) for entry in sorted(entries, key=lambda entry: not entry.known) if not entry.ours)


def entry_line(entry: Entry) -> str:
    """Return what became of a key in one line."""
    became = ", ".join(entry.ours) or ("no counterpart" if entry.known else "unknown")
    return f"{entry.key}: {became}" + (f" ({entry.note})" if entry.note else "")


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(
        "import-fs",
        epilog=examples(
            "fedtune import-fs config.yaml -o recipe.toml",
            "fedtune import-fs config.yaml --base models/smollm2 --data dolly.jsonl -o recipe.toml",
        ),
    )(import_fs)
