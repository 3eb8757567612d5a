"""The page of `fedtune-edge`: every command with its arguments, from the parser that prints its help."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from fedtune.cli.edge import commands, parser
from fedtune.cli.edge_options import PROGRAM

INTRODUCTION = f"""# {PROGRAM}

A device takes part in a federation by forward passes alone, without Python or torch: [every step](../how-to/edge.md).
A command that is given no site file reads `site.toml` in the folder in which it is started.

| Exit status | Means |
|---|---|
| 0 | done; of `join`: the run is complete, or it was asked to stop |
| 2 | somebody must change something: the file, the bundle, the certificate, the program's version |
| 75 | try again later: the disk is full, or the server did not answer within `link.patience_s` |
"""


def subparsers() -> Mapping[str, argparse.ArgumentParser]:
    """Return the parser of each command by its name, in the order of the help."""
    top = parser(commands())
    (under,) = (action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    return dict(under.choices)


def options_of(own: argparse.ArgumentParser) -> Sequence[argparse.Action]:
    """Return the arguments and options of a command, without its help."""
    return [action for action in own._actions if action.help != argparse.SUPPRESS and action.dest != "help"]


def edge_page() -> str:
    """Return the page of all commands."""
    return "\n".join([INTRODUCTION, *(section(name, own) for name, own in subparsers().items())])


def section(name: str, own: argparse.ArgumentParser) -> str:
    command = commands()[name]
    usage = own.format_usage().removeprefix("usage: ").replace(" [-h]", "").replace("\n       ", "\n").rstrip()
    parts = [f"## {PROGRAM} {name}", f"{own.description}", f"```text\n{usage}\n```"]
    parts.append("\n".join(option_line(action) for action in options_of(own)))
    if command.examples:
        lines = "\n".join(f"{PROGRAM} {example}" for example in command.examples)
        parts.append(f"```bash\n{lines}\n```")
    return "\n\n".join(parts) + "\n"


def option_line(action: argparse.Action) -> str:
    """Return one argument or option as an entry of a definition list."""
    choices = "|".join(map(str, action.choices or ()))
    value = "" if action.nargs == 0 else action.metavar or choices or action.dest.upper()
    if action.option_strings:
        names = ", ".join(f"`{option} {value}`" if value else f"`{option}`" for option in action.option_strings)
    else:
        names = f"`{value}`"
    return f"{names}\n:   {action.help}\n"
