"""One page per table of recipe, site and server files: each key with its type, range, unit, default and docstring."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from importlib import import_module
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Interval, Le, Lt

from fedtune.config.presets import PRESETS
from fedtune.config.recipe import SECTIONS, Override, Recipe
from fedtune.config.site import SiteSettings
from fedtune.devices.profiles import DeviceProfile
from fedtune.link.settings import LinkSettings
from fedtune.methods import METHODS
from fedtune.planning import PLANNERS
from fedtune.planning.policies import POLICIES
from fedtune.search.settings import Range
from fedtune.simulation.resources import Resources
from fedtune.simulation.settings import DeviceOverride

UNITS_BY_ENDING: Mapping[str, str] = {
    "_s": "seconds",
    "_kib": "KiB (1,024 bytes)",
    "_mib": "MiB (1,024² bytes)",
    "_gib": "GiB (1,024³ bytes)",
    "_gb": "GB (10⁹ bytes)",
    "_mbps": "10⁶ bits per second",
    "_gbps": "10⁹ bytes per second",
    "_tflops": "10¹² operations per second",
    "_w": "watts",
    "_per_min": "calls per minute",
}
UNITS: Mapping[str, str] = {
    "accumulation": "forward passes",
    "attackers": "share of the clients",
    "attempts": "tries",
    "availability": "share of the time",
    "back": "share of each block's heads and channels",
    "backs": "share of each block's heads and channels",
    "bar_after": "refusals",
    "batch": "examples",
    "batch_clients": "clients",
    "batches": "forward passes",
    "client_examples": "examples",
    "clients": "clients",
    "cutoff": "nats",
    "cohort": "clients, or share of the fleet",
    "buffer": "updates",
    "concurrency": "clients",
    "max_staleness": "versions",
    "count": "rounds",
    "max_concurrent_downloads": "transfers",
    "dropout": "probability",
    "dropouts": "probability",
    "epochs": "passes over the client's examples",
    "every": "rounds",
    "examples": "examples",
    "explore": "clients per round",
    "first_rung": "rounds",
    "final_rate": "share of client.learning_rate",
    "fraction_bits": "bits",
    "generate": "examples",
    "groups": "sets of numbers",
    "gpu_share": "share of a GPU",
    "held_out": "share of the rows",
    "interval": "rounds",
    "least_share": "share of the steps",
    "limit": "rows",
    "hidden": "hidden units",
    "max_rank": "rank",
    "patience": "evaluations",
    "replan_every": "rounds",
    "max_rounds": "rounds",
    "max_down_kib_s": "KiB (1,024 bytes) per second",
    "max_temperature_c": "°C",
    "max_up_kib_s": "KiB (1,024 bytes) per second",
    "min_battery": "percent",
    "min_steps": "optimizer steps",
    "max_steps": "steps",
    "max_tokens": "tokens",
    "min_clients": "clients",
    "min_cohort": "clients",
    "min_examples": "rows",
    "modes": "share of the top speed",
    "multiple": "channels",
    "new_tokens": "tokens",
    "processes": "processes",
    "queries": "directions per step",
    "ramp": "share of the rounds",
    "rank": "rank",
    "tokens": "virtual tokens",
    "ranks": "rank",
    "rank_decay": "share of the rank",
    "repair_rank": "columns",
    "ratio": "share of the blocks' weights",
    "ratios": "share of the blocks' weights",
    "points": "values",
    "redraw": "rounds",
    "reduction": "times",
    "refresh": "rounds",
    "scalar_bits": "bits",
    "seeds": "directions",
    "shares": "share of the steps",
    "sizes": "rows",
    "stages": "stages",
    "state_max_rank": "rank",
    "down_rank": "rank",
    "down_ranks": "rank",
    "steps": "optimizer steps",
    "steps_between": "optimizer steps",
    "target": "share of the blocks' weights",
    "tau": "share of the squared singular values",
    "threads": "CPU threads",
    "top": "share of the blocks",
    "tops": "share of the blocks",
    "trials": "trials",
    "max_concurrent_uploads": "transfers",
    "max_source_handshakes": "connections",
    "utilisation": "share of the peak",
    "warmup": "share of the steps",
    "workers": "processes",
}
PLAIN_NUMBERS = frozenset(
    (
        *(
            "alpha",
            "beta1",
            "beta2",
            "clip",
            "clip_norm",
            "coverage_floor",
            "dpo_beta",
            "largest_rate",
            "learning_rate",
            "max_norm",
            "momentum",
        ),
        *(
            "net_sigma",
            "norm_cap",
            "over_select",
            "perturbation",
            "proximal",
            "rank_penalty",
            "scalar_step",
            "seed",
            "staleness_exponent",
            "strength",
            "rate",
        ),
        *("server_learning_rate", "weight_cap", "weight_decay"),
        *("discount", "learning_rates", "weight_decays", "low", "high"),
    )
)
"""Numbers without a unit."""
UNITS_BY_PATH: Mapping[str, str] = {
    "method.server_optimizer.tau": "no unit",
    "planner.batches": "examples",
    "method.robust.bound": "no unit",
    "rounds.warmup": "rounds",
}
"""Keys whose name has another unit elsewhere."""

DEVICE_RANGES: Mapping[str, str] = {
    "memory_gb": "> 0",
    "peak_tflops": "> 0",
    "utilisation": "> 0 and ≤ 1",
    "memory_gbps": "> 0",
    "up_mbps": "≥ 0.01",
    "down_mbps": "≥ 0.01",
    "net_sigma": "≥ 0",
    "latency_s": "≥ 0",
    "overhead_s": "≥ 0",
    "modes": "> 0 and ≤ 1",
    "mode_period_s": "≥ 1",
    "availability": "≥ 0 and ≤ 1",
    "compute_w": "> 0",
    "send_w": "> 0",
    "receive_w": "> 0",
}
"""What a profile is checked for as a whole, not by the types of its fields; a test holds these against that check."""

NOUNS: Mapping[Any, str] = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "true or false",
    Range: "range",
    Any: "value",
}

REQUIRED, STEM = "required", "default: the file's name without its ending"
"""Defaults that are no values."""

SITE_SPLIT = """Leave out `data.split`: all rows are then the site's own. With it, the site's rows are the part that
has its name."""
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
    """As it would be written in TOML; `REQUIRED` without one."""
    unit: str
    """Empty where the value is no number."""
    text: str
    """The field's docstring, as Markdown."""

    def markdown(self) -> str:
        default = self.default if self.default in (REQUIRED, STEM) else f"default `{self.default}`"
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
                    texts[node.target.id] = inspect.cleandoc(str(following.value.value)).strip()
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
        KeyError: if it is a number and neither `UNITS` nor `PLAIN_NUMBERS` names it.
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
    raise KeyError(f"docs/settings_pages.py: expected a unit for {name!r} in UNITS or PLAIN_NUMBERS; got none; add it")


def default_of(field: Field[Any]) -> str:
    """Return a field's default as TOML would write it."""
    if field.default is not MISSING:
        return toml(field.default)
    return toml(field.default_factory()) if field.default_factory is not MISSING else REQUIRED


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
            unit=UNITS_BY_PATH.get(name) or unit_of(field.name, hints[field.name]),
            text=texts.get(field.name, ""),
        )


def summary(cls: type[Any]) -> str:
    """Return the docstring of a class."""
    return inspect.cleandoc(cls.__doc__ or "")


def method_summary(name: str) -> str:
    """Return the first line of a method's module, with its paper."""
    text = inspect.cleandoc(import_module(f"fedtune.methods.{name}").__doc__ or "")
    line = " ".join(text.split("\n\n")[0].split())
    return line if line.endswith(".") else f"{line}."


def table_of(cls: type[Any], path: str, title: str = "") -> Table:
    return Table(title=title or f"`[{path}]`", text=summary(cls), keys=list(keys_of(cls, path)))


def clients_key(table: str) -> Key:
    return Key(f"{table}.clients", "text or list of text", "", REQUIRED, "", COMMON_CLIENTS)


def choice_table(table: str, names: Sequence[str], default: str, text: str) -> Table:
    """Return the key `name` of a table whose other keys depend on it."""
    key = Key(f"{table}.name", " | ".join(f'`"{name}"`' for name in names), "", default, "", text)
    return Table("Name", "", [key])


def without_name(table: Table) -> Table:
    return replace(table, keys=[key for key in table.keys if key.name not in ("method.name", "planner.name")])


def file_keys(cls: type[Any], defaults: Mapping[str, str]) -> Table:
    """Return the keys `name` and `seed` of a file, which stand outside of any table."""
    keys = [replace(key, default=defaults[key.name]) for key in keys_of(cls, "", only=["name", "seed"])]
    return Table("Top level", "Keys outside of any table.", keys)


def override_table() -> Table:
    """Return the table `[[override]]`: which clients, and the keys of other tables that differ for them."""
    ranges = {
        "override.rank": range_of(get_type_hints(SECTIONS["adapter"], include_extras=True)["rank"]),
        **{
            f"override.{key}": range_of(get_type_hints(PLANNERS["fixed"].settings, include_extras=True)[key])
            for key in ("ratio", "top", "back", "down_rank")
        },
    }
    own = [
        replace(key, range=ranges.get(key.name, ""))
        for key in keys_of(Override, "override", only=["rank", "ratio", "top", "back", "down_rank", "verb"])
    ]
    training = keys_of(SECTIONS["client"], "override", optional=True)
    resources = keys_of(Resources, "override", optional=True)
    descend = Key("override.descend", "table", "", "none", "", field_texts(Override)["descend"])
    return Table("`[[override]]`", summary(Override), [clients_key("override"), *own, descend, *training, *resources])


def device_table() -> Table:
    """Return the table `[[device]]`: which clients, their profile, and the numbers of it that differ."""
    own = keys_of(DeviceOverride, "device", only=["profile"])
    declared = [field.name for field in fields(DeviceProfile) if field.name not in ("name", "provenance")]
    numbers = [
        replace(key, range=DEVICE_RANGES[key.name.removeprefix("device.")])
        for key in keys_of(DeviceProfile, "device", only=declared, optional=True)
    ]
    return Table("`[[device]]`", summary(DeviceOverride), [clients_key("device"), *own, *numbers])


def recipe_pages() -> Mapping[str, Sequence[Table]]:
    """Return the tables of a recipe by page."""
    pages: dict[str, Sequence[Table]] = {"top-level": [file_keys(Recipe, {"name": STEM, "seed": "0"})]}
    for name, cls in SECTIONS.items():
        pages[name] = [table_of(cls, name)]
    pages["search"] = [*pages["search"], table_of(Range, "search.space", "a range in `[search.space]`")]
    pages["method"] = [
        choice_table("method", [*METHODS, *PRESETS], REQUIRED, "What is sent, and how clients' updates are combined."),
        *(
            without_name(Table(f"`{name}`", method_summary(name), list(keys_of(method.settings, "method"))))
            for name, method in METHODS.items()
        ),
    ]
    learning = [name for name in PLANNERS if name in POLICIES]
    adaptive = PLANNERS[learning[0]].settings
    pages["planner"] = [
        choice_table("planner", list(PLANNERS), toml("fixed"), field_texts(adaptive)["name"]),
        without_name(table_of(PLANNERS["fixed"].settings, "planner", "`fixed`")),
        without_name(table_of(adaptive, "planner", ", ".join(f"`{name}`" for name in learning))),
        *(without_name(table_of(PLANNERS[name].settings, "planner", f"`{name}`")) for name in ("fedpipe", "expgrad")),
    ]
    pages["override"] = [override_table()]
    pages["device"] = [device_table()]
    return pages


def site_pages() -> Sequence[Table]:
    """Return the tables of a site's own file."""
    hints = get_type_hints(SiteSettings, include_extras=True)
    tables = [table_of(settings_of(hints[name]), name) for name in ("link", "policy", "model", "adapter", "data")]
    tables[-1] = replace(tables[-1], text=f"{tables[-1].text} {SITE_SPLIT}")
    return [file_keys(SiteSettings, {"name": STEM, "seed": "0"}), *tables]


def settings_of(annotation: Any) -> type[Any]:
    """Return the settings dataclass of a table that may be left out."""
    return next(part for part in (annotation, *get_args(annotation)) if isinstance(part, type) and is_dataclass(part))


def server_pages() -> Sequence[Table]:
    """Return the tables of a server's own file."""
    return [table_of(LinkSettings, "link")]


RECIPE_INTRODUCTIONS: Mapping[str, str] = {
    "method": """`method.name` chooses the method, and with it which keys the table has. `method = "flora"` is short for
`method = { name = "flora" }`. `method = "fedspine"` is a preset: `flora`, the table `pruning` and the planner
`deadline`; `method = "fedpipe"` is `flora` and the planner `fedpipe`. [Plug-ins](../plug-ins.md) bring further
names.""",
    "planner": """`planner.name` chooses the planner, which decides what each device is asked to do, and with it which
keys the table has. `planner = "deadline"` is short for `planner = { name = "deadline" }`. Without the table the planner
is `fixed`. [Plug-ins](../plug-ins.md) bring further names.""",
    "override": """Changes settings for some clients. Tables are applied in their order: where two name the same client
and key, the later one wins.""",
    "device": """Changes the simulated devices of some clients; it needs the table [`fleet`](fleet.md). Tables are
applied in their order.""",
    "pruning": "Without this table every client trains the whole model.",
    "fleet": "Without this table no devices are simulated.",
    "personal": """Without this table no client has a model of its own.
[Models of their own](../../how-to/personal.md) says how they are trained and scored.""",
    "search": """`fedtune search` reads this table, and all other commands ignore it: the recipe of every trial is this
recipe with other values. [Search for settings](../../how-to/search.md) shows how.""",
}
"""What a page says before its tables, by page."""


def settings_page(title: str, introduction: str, tables: Sequence[Table]) -> str:
    return "\n\n".join([f"# {title}", introduction, *(table.markdown() for table in tables)])
