"""One page per command, from the same objects that print its help."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import typer

from fedtune.cli.main import app

VALUES: Mapping[str, str] = {"integer": "N", "integer range": "N", "float": "X", "float range": "X"}
"""What the help shows for the value of an option, by the name of its type."""


def commands(group: click.Group | None = None, path: str = "fedtune") -> Iterator[tuple[str, click.Command]]:
    """Yield every command of the command line by its full name."""
    root: Any = group or typer.main.get_command(app)
    for name, command in root.commands.items():
        if hasattr(command, "commands"):
            # A group with options of its own does something by itself: fedtune enroll --code CODE.
            if command.params:
                yield f"{path} {name}", command
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def command_page(name: str, command: Any) -> str:
    """Return the page of one command: what it does, its arguments and options, and examples."""
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    options = [param for param in command.params if param.param_type_name == "option" and not param.hidden]
    usage = " ".join([name, "[OPTIONS]", *(param.metavar or param.name.upper() for param in arguments)])
    parts = [f"# {name}", command.help or "", f"```text\n{usage}\n```"]
    if arguments:
        parts.append("## Arguments\n\n" + "\n".join(parameter_line(param) for param in arguments))
    if options:
        parts.append("## Options\n\n" + "\n".join(parameter_line(param) for param in options))
    lines = re.findall(r"^- `(.*)`$", command.epilog or "", flags=re.MULTILINE)
    if lines:
        parts.append("## Examples\n\n```bash\n" + "\n".join(lines) + "\n```")
    return "\n\n".join(parts) + "\n"


def parameter_line(param: Any) -> str:
    if param.param_type_name == "argument":
        names = f"`{param.metavar or param.name.upper()}`"
    else:
        value = "" if param.is_flag else f" {param.metavar or VALUES.get(param.type.name, param.name.upper())}"
        names = ", ".join(f"`{option}{value}`" for option in param.opts)
    facts = [f"at least {param.type.min:g}"] if getattr(param.type, "min", None) is not None else []
    facts += [f"at most {param.type.max:g}"] if getattr(param.type, "max", None) is not None else []
    facts += ["required"] if param.required else []
    default = param.default
    if isinstance(default, str | int | float | Path) and not isinstance(default, bool):
        facts.append(f"default `{default}`")
    return f"{names}\n:   {param.help or ''}" + (f" ({', '.join(facts)})" if facts else "") + "\n"
