"""The command `fedtune schema`: every command and every key of a settings file as JSON, for editors and agents."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from fedtune.cli.options import DebugOption, examples, report_errors

TYPES: Mapping[str, str] = {
    "integer range": "integer",
    "float range": "number",
    "float": "number",
    "text": "string",
    "filename": "path",
    "file": "path",
}
"""What JSON calls the types of options; the others keep their names."""
PLAIN_TYPES: Mapping[Any, str] = {int: "integer", float: "number", bool: "boolean", str: "string", Path: "path"}
"""The same by annotation."""


class Part(StrEnum):
    """What there is a schema of."""

    recipe = "recipe"
    site = "site"
    server = "server"
    commands = "commands"


def register(app: typer.Typer) -> None:
    """Add the command to an application."""
    app.command(
        epilog=examples("fedtune schema recipe > recipe.schema.json", "fedtune schema commands", "fedtune schema")
    )(schema)


def schema(
    ctx: typer.Context,
    part: Annotated[
        Part | None,
        typer.Argument(metavar="[PART]", help="recipe, site, server or commands; all of them without it."),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Print every key of a recipe, site or server file as JSON Schema, and every command with its options.

    An editor that reads TOML with a schema completes and checks recipes by it; each key has its type, range, default,
    unit and description. It is the schema of this version of fedtune.
    """
    with report_errors(debug):
        root: Any = ctx.find_root().command
        typer.echo(json.dumps(content(root, part), indent=2, ensure_ascii=False))


def content(root: Any, part: Part | None) -> Mapping[str, Any]:
    """Return one schema, or all of them by name; `root` is the whole command line."""
    if part is Part.commands:
        return {"fedtune": version("fedtune"), "commands": all_commands(root)}
    from fedtune.config.json_schema import recipe_schema, server_schema, site_schema

    files = {Part.recipe: recipe_schema, Part.site: site_schema, Part.server: server_schema}
    if part is not None:
        return files[part]()
    schemas = {name.value: make() for name, make in files.items()}
    return {"fedtune": version("fedtune"), **schemas, "commands": all_commands(root)}


def all_commands(root: Any) -> list[Mapping[str, Any]]:
    """Return the commands of `fedtune`, then those of `fedtune-edge`."""
    from fedtune.cli.edge import commands, parser
    from fedtune.cli.edge_options import PROGRAM

    (under,) = (action.choices for action in parser(commands())._actions if isinstance(action.choices, dict))
    edge = [edge_object(f"{PROGRAM} {name}", own) for name, own in under.items()]
    return [*(command_object(name, command) for name, command in walk(root, "fedtune")), *edge]


def walk(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield every command below a group by its full name."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            # A group with options of its own does something by itself: fedtune enroll --code CODE.
            if command.params:
                yield f"{path} {name}", command
            yield from walk(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def command_object(name: str, command: Any) -> Mapping[str, Any]:
    """Return a command with its arguments and options."""
    params = [param for param in command.params if not getattr(param, "hidden", False)]
    return {
        "name": name,
        "help": " ".join((command.help or "").split()),
        "arguments": [parameter(one) for one in params if one.param_type_name == "argument"],
        "options": [parameter(one) for one in params if one.param_type_name == "option"],
        "examples": re.findall(r"^- `(.*)`$", command.epilog or "", flags=re.MULTILINE),
    }


def parameter(param: Any) -> Mapping[str, Any]:
    """Return an argument or an option; what does not hold of it is left out."""
    kind, option = value_type(param), param.param_type_name == "option"
    flag = option and bool(param.is_flag)
    facts = {
        "names": [*param.opts, *param.secondary_opts] if option else None,
        "name": None if option else param.metavar or param.name.upper(),
        "type": "boolean" if flag else kind.name,
        "value": None if flag or not option else param.metavar,
        "choices": list(kind.choices) or None,
        "minimum": kind.minimum,
        "maximum": kind.maximum,
        "default": plain_default(param.default),
        "required": param.required or None,
        "multiple": param.multiple if option and param.multiple else None,
        "help": getattr(param, "help", None),
    }
    return {key: value for key, value in facts.items() if value is not None}


@dataclass(frozen=True)
class ValueType:
    """What an option or argument takes: its type as JSON calls it, and what bounds it."""

    name: str
    choices: Sequence[str] = ()
    minimum: float | None = None
    maximum: float | None = None


def value_type(param: Any) -> ValueType:
    """Return what an option or argument takes, by click's type of it or, from typer 0.26 on, by its annotation."""
    if (kind := getattr(param, "type", None)) is not None:
        choices = [str(choice) for choice in getattr(kind, "choices", ())]
        return ValueType(
            TYPES.get(kind.name, kind.name), choices, getattr(kind, "min", None), getattr(kind, "max", None)
        )
    described = param.type_descriptor
    chosen = described.choices
    # Of a list, the type of its items.
    plain = next(iter(get_args(described.annotation)), described.annotation)
    name = "choice" if chosen else PLAIN_TYPES.get(plain, "path" if described.is_path else "string")
    choices = [str(choice.value if isinstance(choice, Enum) else choice) for choice in chosen or ()]
    return ValueType(name, choices, param.min, param.max)


def plain_default(default: Any) -> str | float | None:
    """Return a default that JSON can hold; None for others, such as lists that are empty."""
    if isinstance(default, Path):
        return str(default)
    return default if isinstance(default, str | int | float) else None


def edge_object(name: str, own: Any) -> Mapping[str, Any]:
    """Return a command of a device, from the parser that reads it."""
    actions = [action for action in own._actions if action.dest != "help" and action.help != "==SUPPRESS=="]
    return {
        "name": name,
        "help": " ".join((own.description or "").split()),
        "arguments": [edge_parameter(one) for one in actions if not one.option_strings],
        "options": [edge_parameter(one) for one in actions if one.option_strings],
        "examples": [],
    }


def edge_parameter(action: Any) -> Mapping[str, Any]:
    kind = {int: "integer", float: "number", Path: "path"}.get(action.type, "string")
    facts = {
        "names": list(action.option_strings) or None,
        "name": None if action.option_strings else action.metavar or action.dest.upper(),
        "type": "boolean" if action.nargs == 0 else kind,
        "choices": list(map(str, action.choices)) if action.choices else None,
        "default": plain_default(action.default),
        "required": True if action.required else None,
        "help": action.help,
    }
    return {key: value for key, value in facts.items() if value is not None}
