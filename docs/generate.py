"""The generated pages of the site: settings, commands and schema, read from the code that defines them.

mkdocs loads this file as a hook (`mkdocs.yml`); nothing that it generates is committed.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import click
import typer
from annotated_types import Ge, Gt, Interval, Le, Lt
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from fedtune import errors
from fedtune.cli.main import app
from fedtune.config import binding
from fedtune.config.recipe import Override, Recipe
from fedtune.config.site import SiteSettings
from fedtune.device import DeviceProfile
from fedtune.link.settings import LinkSettings
from fedtune.methods import METHODS
from fedtune.planning.policies import POLICIES
from fedtune.simulation.resources import Resources
from fedtune.simulation.settings import DeviceOverride

ROOT = Path(__file__).parents[1]
SCHEMA = ROOT / "proto" / "fedtune" / "v1"

UNITS_BY_ENDING: Mapping[str, str] = {
    "_s": "seconds",
    "_kib": "KiB (1,024 bytes)",
    "_mib": "MiB (1,024² bytes)",
    "_gib": "GiB (1,024³ bytes)",
    "_gb": "GB (10⁹ bytes)",
    "_mbps": "10⁶ bits per second",
    "_gbps": "10⁹ bytes per second",
    "_tflops": "10¹² operations per second",
    "_per_min": "calls per minute",
}
UNITS: Mapping[str, str] = {
    "accumulation": "forward passes",
    "attempts": "tries",
    "availability": "share of the time",
    "bar_after": "refusals",
    "batch": "examples",
    "batches": "forward passes",
    "client_examples": "examples",
    "clients": "clients",
    "cohort": "clients, or share of the fleet",
    "count": "rounds",
    "downloads": "transfers",
    "dropout": "probability",
    "epochs": "passes over the client's examples",
    "every": "rounds",
    "examples": "examples",
    "explore": "clients per round",
    "fraction_bits": "bits",
    "generate": "examples",
    "gpu_share": "share of a GPU",
    "held_out": "share of the rows",
    "limit": "rows",
    "max_rank": "rank",
    "max_rounds": "rounds",
    "max_steps": "steps",
    "max_tokens": "tokens",
    "min_clients": "clients",
    "min_cohort": "clients",
    "min_examples": "rows",
    "modes": "share of the top speed",
    "multiple": "channels",
    "new_tokens": "tokens",
    "queries": "directions per step",
    "ramp": "share of the rounds",
    "rank": "rank",
    "ranks": "rank",
    "rank_decay": "share of the rank",
    "ratio": "share of the blocks' weights",
    "ratios": "share of the blocks' weights",
    "refresh": "rounds",
    "seeds": "directions",
    "sizes": "rows",
    "stages": "stages",
    "state_max_rank": "rank",
    "steps": "optimizer steps",
    "steps_between": "optimizer steps",
    "target": "share of the blocks' weights",
    "tau": "share of the squared singular values",
    "threads": "CPU threads",
    "uploads": "transfers",
    "utilisation": "share of the peak",
    "warmup": "share of the steps",
    "workers": "processes",
}
PLAIN_NUMBERS = frozenset(
    "alpha clip clip_norm coverage_floor learning_rate max_norm momentum net_sigma over_select perturbation rank_penalty"
    " scalar_step seed server_learning_rate weight_decay".split()
)
"""Numbers without a unit."""

NOUNS: Mapping[Any, str] = {int: "whole number", float: "number", str: "text", bool: "true or false"}

COMMON_CLIENTS = "Names or globs (`*`, `?`, `[..]`) of the clients that this table is about."


@dataclass(frozen=True)
class Key:
    """One key of a settings file, as its page shows it."""

    name: str
    """Dotted path, e.g. `data.split.kind`."""
    kind: str
    """Type in words."""
    range: str
    """Allowed numbers; empty where every value of the type is allowed."""
    default: str
    """As it would be written in TOML; `required` without one."""
    unit: str
    """Empty where the value is no number."""
    text: str
    """The field's docstring, as Markdown."""

    def markdown(self) -> str:
        default = "required" if self.default == "required" else f"default `{self.default}`"
        facts = " · ".join(filter(None, [self.kind, self.range, self.unit, default]))
        return f"### `{self.name}`\n\n{facts}\n{{ .facts }}\n\n{self.text}\n"


@dataclass(frozen=True)
class Table:
    """One table of a settings file, with its keys."""

    title: str
    text: str
    keys: Sequence[Key]

    def markdown(self) -> str:
        return "\n".join([f"## {self.title}\n\n{self.text}\n", *(key.markdown() for key in self.keys)])


# ---- settings ----


@cache
def field_texts(cls: type[Any]) -> Mapping[str, str]:
    """Return the docstring under each field of a dataclass, those of its bases included."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for node, following in zip(body.body, [*body.body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                texts.pop(node.target.id, None)
                if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                    texts[node.target.id] = inspect.cleandoc(str(following.value.value))
    return texts


def is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def kind_of(annotation: Any) -> str:
    """Return a type in words, without its range.

    >>> kind_of(Annotated[int, Ge(1)] | None)
    'whole number or none'
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if is_union(annotation):
        return " or ".join(dict.fromkeys(kind_of(option) for option in arguments))
    if origin is Annotated:
        return kind_of(arguments[0])
    if origin is Literal:
        return " | ".join(f'`"{word}"`' for word in arguments)
    if origin is Mapping:
        return f"table of {kind_of(arguments[1])} by {kind_of(arguments[0])}"
    if origin is not None:
        return f"list of {kind_of(arguments[0])}"
    return "none" if annotation is type(None) else NOUNS[annotation]


def range_of(annotation: Any) -> str:
    """Return the numbers that a type allows.

    >>> range_of(Annotated[float, Interval(ge=0, lt=1)])
    '≥ 0 and < 1'
    """
    if is_union(annotation):
        return " or ".join(dict.fromkeys(filter(None, map(range_of, get_args(annotation)))))
    if get_origin(annotation) is Annotated:
        bounds = [bound for one in get_args(annotation)[1:] for bound in (one if isinstance(one, Interval) else [one])]
        return " and ".join(bound_text(bound) for bound in bounds)
    return range_of(get_args(annotation)[0]) if get_origin(annotation) not in (None, Literal, Mapping) else ""


def bound_text(bound: Any) -> str:
    match bound:
        case Ge(limit):
            return f"≥ {limit}"
        case Gt(limit):
            return f"> {limit}"
        case Le(limit):
            return f"≤ {limit}"
        case Lt(limit):
            return f"< {limit}"
    raise TypeError(f"expected a bound of annotated_types; got {bound!r}")


def numeric(annotation: Any) -> bool:
    """Whether a setting is a number, or a list of them."""
    if annotation in (int, float):
        return True
    return get_origin(annotation) is not Literal and any(map(numeric, get_args(annotation)))


def unit_of(name: str, annotation: Any) -> str:
    """Return the unit of a setting; empty where it is no number.

    Raises:
        KeyError: if nobody has said what the number counts.
    """
    if not numeric(annotation):
        return ""
    if name in UNITS:
        return UNITS[name]
    for ending, unit in UNITS_BY_ENDING.items():
        if name.endswith(ending):
            return unit
    if name in PLAIN_NUMBERS:
        return "no unit"
    raise KeyError(f"docs/generate.py: expected a unit for {name!r} in UNITS or PLAIN_NUMBERS; got none; add it")


def default_of(field: Field[Any]) -> str:
    """Return a field's default as TOML would write it."""
    if field.default is not MISSING:
        return toml(field.default)
    return toml(field.default_factory()) if field.default_factory is not MISSING else "required"


def toml(value: Any) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case str():
            return f'"{value}"'
        case float():
            return f"{value:g}" if value < 1e-3 or value >= 1e4 else str(value)
        case Mapping():
            return "{ }" if not value else str(dict(value))
        case Sequence():
            return f"[{', '.join(map(toml, value))}]"
    return str(value)


def keys_of(cls: type[Any], path: str, *, only: Sequence[str] | None = None, optional: bool = False) -> Iterator[Key]:
    """Yield the keys of a settings dataclass, those of tables inside it included.

    Args:
        cls: the dataclass.
        path: dotted path of its table; empty for the file itself.
        only: the fields to take, without it all.
        optional: whether every key may be left out, as in a table that changes another one.
    """
    hints = get_type_hints(cls, include_extras=True)
    texts = field_texts(cls)
    for field in fields(cls):
        if only is not None and field.name not in only:
            continue
        name = f"{path}.{field.name}" if path else field.name
        if is_dataclass(hints[field.name]):
            yield from keys_of(hints[field.name], name)
            continue
        yield Key(
            name=name,
            kind=kind_of(hints[field.name]),
            range=range_of(hints[field.name]),
            default="unchanged" if optional else default_of(field),
            unit=unit_of(field.name, hints[field.name]),
            text=texts.get(field.name, ""),
        )


def summary(cls: type[Any]) -> str:
    return inspect.cleandoc(cls.__doc__ or "")


def method_summary(name: str) -> str:
    """Return the first line of a method's module, with its paper."""
    text = inspect.cleandoc(import_module(f"fedtune.methods.{name}").__doc__ or "")
    line = " ".join(text.split("\n\n")[0].split())
    return line if line.endswith(".") else f"{line}."


def table_of(cls: type[Any], path: str, title: str = "") -> Table:
    return Table(title=title or f"`[{path}]`", text=summary(cls), keys=list(keys_of(cls, path)))


def clients_key(table: str) -> Key:
    return Key(f"{table}.clients", "text or list of text", "", "required", "", COMMON_CLIENTS)


def override_table() -> Table:
    """Return the table `[[override]]`: which clients, and the keys of other tables that differ for them."""
    own = keys_of(Override, "override", only=["rank", "ratio", "verb"])
    training = keys_of(binding.SECTIONS["client"], "override", optional=True)
    resources = keys_of(Resources, "override", optional=True)
    return Table("`[[override]]`", summary(Override), [clients_key("override"), *own, *training, *resources])


def device_table() -> Table:
    """Return the table `[[device]]`: which clients, their profile, and the numbers of it that differ."""
    own = keys_of(DeviceOverride, "device", only=["profile"])
    declared = [field.name for field in fields(DeviceProfile) if field.name not in ("name", "provenance")]
    numbers = keys_of(DeviceProfile, "device", only=declared, optional=True)
    return Table("`[[device]]`", summary(DeviceOverride), [clients_key("device"), *own, *numbers])


def recipe_pages() -> Mapping[str, Sequence[Table]]:
    """Return the tables of a recipe by page."""
    top = Table("Top level", "Keys outside of any table.", list(keys_of(Recipe, "", only=["name", "seed"])))
    pages: dict[str, Sequence[Table]] = {"top-level": [top]}
    for name, cls in binding.SECTIONS.items():
        pages[name] = [table_of(cls, name)]
    pages["method"] = [
        Table(f"`{name}`", method_summary(name), list(keys_of(method.settings, "method")))
        for name, method in METHODS.items()
    ]
    planners = binding.NAMED["planner"]
    learning = [name for name in planners if name in POLICIES]
    pages["planner"] = [
        table_of(planners["fixed"], "planner", "`fixed`"),
        table_of(planners[learning[0]], "planner", ", ".join(f"`{name}`" for name in learning)),
    ]
    pages["override"] = [override_table()]
    pages["device"] = [device_table()]
    return pages


def site_pages() -> Sequence[Table]:
    """Return the tables of a site's own file."""
    hints = get_type_hints(SiteSettings, include_extras=True)
    top = Table("Top level", "Keys outside of any table.", list(keys_of(SiteSettings, "", only=["name", "seed"])))
    tables = ("link", "policy", "model", "adapter", "data")
    settings = {name: next(part for part in (*get_args(hints[name]), hints[name]) if is_dataclass(part)) for name in tables}
    return [top, *(table_of(cls, name) for name, cls in settings.items())]


def server_pages() -> Sequence[Table]:
    """Return the tables of a server's own file."""
    return [table_of(LinkSettings, "link")]


RECIPE_INTRODUCTIONS: Mapping[str, str] = {
    "method": "`method.name` chooses the method, and with it which keys the table has. `method = \"flora\"` is short for "
    '`method = { name = "flora" }`. `method = "fedspine"` is a preset: `flora`, the table `pruning`, and the planner '
    "`deadline`.",
    "planner": "`planner.name` chooses who decides what each device is asked to do. Without the table the planner is `fixed`.",
    "override": "Changes settings for some clients. Tables are applied in their order: where two name the same client and "
    "key, the later one holds.",
    "device": "Changes the simulated devices of some clients. Tables are applied in their order.",
    "pruning": "Without this table every client trains the whole model.",
    "fleet": "Without this table no devices are simulated.",
}


def settings_page(title: str, introduction: str, tables: Sequence[Table]) -> str:
    return "\n\n".join([f"# {title}", introduction, *(table.markdown() for table in tables)])


# ---- commands ----

VALUES: Mapping[str, str] = {"integer": "N", "integer range": "N", "float": "X", "float range": "X"}
"""What stands for the value of an option, by the name of its type."""



def commands(group: click.Group | None = None, path: str = "fedtune") -> Iterator[tuple[str, click.Command]]:
    """Yield every command of the command line by its full name."""
    root: Any = group or typer.main.get_command(app)
    for name, command in root.commands.items():
        if hasattr(command, "commands"):
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


# ---- schema and errors ----


@cache
def schema_blocks(file: str) -> Mapping[str, tuple[str, str]]:
    """Return the enums and messages of a schema file by name, each as its comment and its body."""
    text = (SCHEMA / file).read_text()
    pattern = re.compile(r"((?:^//[^\n]*\n)*)^(?:enum|message|service) (\w+) \{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
    return {
        name: (" ".join(line.removeprefix("//").strip() for line in comment.splitlines()), body)
        for comment, name, body in pattern.findall(text)
    }


def enum_table(file: str, name: str) -> str:
    """Return the values of an enum of the schema as a Markdown table."""
    _, body = schema_blocks(file)[name]
    rows = ["| number | name | meaning |", "|---|---|---|"]
    for value, number, comment in re.findall(r"^ *(\w+) = (\d+);(?: *// *(.*))?$", body, flags=re.MULTILINE):
        if number != "0" or not value.endswith("UNSET"):
            rows.append(f"| {number} | `{value}` | {comment or value.replace('_', ' ').lower()} |")
    return "\n".join(rows)


def message_blocks(file: str) -> str:
    """Return every message and enum of a schema file with its comment."""
    parts = []
    for name, (comment, body) in schema_blocks(file).items():
        kind = "enum" if re.search(r"^ *[A-Z_0-9]+ = \d+;", body, re.MULTILINE) else "message"
        kind = "service" if "rpc " in body else kind
        parts.append(f"### {name}\n\n{comment}\n\n```proto\n{kind} {name} {{\n{body}}}\n```")
    return "\n\n".join(parts)


def exception_table() -> str:
    """Return the exceptions of `fedtune.errors` as a Markdown table."""
    rows = ["| exception | raised when |", "|---|---|"]
    for name, cls in vars(errors).items():
        if isinstance(cls, type) and issubclass(cls, errors.FedtuneError):
            rows.append(f"| `{name}` | {summary(cls).splitlines()[0]} |")
    return "\n".join(rows)


MARKERS: Mapping[str, Any] = {"enum": enum_table, "messages": message_blocks, "exceptions": exception_table}
"""What a line `[[generated NAME ARGUMENTS]]` of a page becomes."""


# ---- hooks of mkdocs ----


def generated_pages() -> Mapping[str, str]:
    """Return the content of every generated page by its path below docs/."""
    pages = {}
    for name, tables in recipe_pages().items():
        title = "Recipe: top level" if name == "top-level" else f"Recipe: {name}"
        introduction = RECIPE_INTRODUCTIONS.get(name, "")
        pages[f"reference/recipe/{name}.md"] = settings_page(title, introduction, tables)
    site = "What one client of a federation says of itself: `fedtune join site.toml`. It never leaves the client's machine."
    pages["reference/site.md"] = settings_page("Site file", site, site_pages())
    server = "How a server listens: `fedtune serve recipe.toml --config server.toml`. Nothing in it changes what a run computes."
    pages["reference/server.md"] = settings_page("Server file", server, server_pages())
    for name, command in commands():
        pages[f"reference/commands/{command_file(name)}"] = command_page(name, command)
    return pages


def command_file(name: str) -> str:
    return name.removeprefix("fedtune ").replace(" ", "-") + ".md"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the generated pages where the navigation names a folder of them."""
    recipe = [{name.replace("-", " "): f"reference/recipe/{name}.md"} for name in recipe_pages()]
    by_command = [{name: f"reference/commands/{command_file(name)}"} for name, _ in commands()]
    lists = {"reference/recipe/*": recipe, "reference/commands/*": by_command}
    config.nav = expanded(config.nav, lists)
    return config


def expanded(nav: Any, lists: Mapping[str, Sequence[Any]]) -> Any:
    if isinstance(nav, dict):
        return {title: expanded(part, lists) for title, part in nav.items()}
    if isinstance(nav, list):
        return [entry for part in nav for entry in (lists.get(part, [part]) if isinstance(part, str) else [expanded(part, lists)])]
    return nav


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and the changelog of the repository."""
    for path, content in generated_pages().items():
        files.append(File.generated(config, path, content=content))
    files.append(File.generated(config, "changelog.md", content=(ROOT / "CHANGELOG.md").read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace every line `[[generated NAME ARGUMENTS]]`."""

    def replacement(match: re.Match[str]) -> str:
        name, *arguments = match.group(1).split()
        return str(MARKERS[name](*arguments))

    return re.sub(r"^\[\[generated (.+)\]\]$", replacement, markdown, flags=re.MULTILINE)
