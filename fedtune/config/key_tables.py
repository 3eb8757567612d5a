"""Every table of recipe, site and server files with its keys, for pages and for editors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from importlib import import_module
from typing import Any, get_args, get_type_hints

from fedtune.config.key_facts import (
    REQUIRED,
    STEM,
    Key,
    Table,
    field_texts,
    file_keys,
    keys_of,
    range_of,
    summary,
    table_of,
    toml,
)
from fedtune.config.presets import PRESETS
from fedtune.config.recipe import SECTIONS, Override, Recipe
from fedtune.config.site import SiteSettings
from fedtune.config.units import DEVICE_RANGES
from fedtune.devices.profiles import DeviceProfile
from fedtune.link.settings import EnrolmentSettings, LinkSettings
from fedtune.methods import METHODS
from fedtune.planning import PLANNERS
from fedtune.planning.policies import POLICIES
from fedtune.search.settings import Range
from fedtune.simulation.resources import Resources
from fedtune.simulation.settings import DeviceOverride

SITE_SPLIT = """Leave out `data.split`: all rows are then the site's own. With it, the site's rows are the part that
has its name."""
COMMON_CLIENTS = "Names or globs (`*`, `?`, `[..]`) of the clients that this table is about."


def method_summary(name: str) -> str:
    """Return the first line of a method's module, with its paper."""
    text = inspect.cleandoc(import_module(f"fedtune.methods.{name}").__doc__ or "")
    line = " ".join(text.split("\n\n")[0].split())
    return line if line.endswith(".") else f"{line}."


def clients_key(table: str) -> Key:
    return Key(f"{table}.clients", "text or list of text", "", REQUIRED, "", COMMON_CLIENTS)


def choice_table(table: str, names: Sequence[str], default: str, text: str) -> Table:
    """Return the key `name` of a table whose other keys depend on it."""
    key = Key(f"{table}.name", " | ".join(f'`"{name}"`' for name in names), "", default, "", text)
    return Table("Name", "", [key])


def without_name(table: Table) -> Table:
    return replace(table, keys=[key for key in table.keys if key.name not in ("method.name", "planner.name")])


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


def recipe_tables() -> Mapping[str, Sequence[Table]]:
    """Return the tables of a recipe by page."""
    tables: dict[str, Sequence[Table]] = {"top-level": [file_keys(Recipe, {"name": STEM, "seed": "0"})]}
    for name, cls in SECTIONS.items():
        tables[name] = [table_of(cls, name)]
    tables["search"] = [*tables["search"], table_of(Range, "search.space", "a range in `[search.space]`")]
    tables["method"] = [
        choice_table("method", [*METHODS, *PRESETS], REQUIRED, "What is sent, and how clients' updates are combined."),
        *(
            without_name(Table(f"`{name}`", method_summary(name), list(keys_of(method.settings, "method"))))
            for name, method in METHODS.items()
        ),
    ]
    learning = [name for name in PLANNERS if name in POLICIES]
    adaptive = PLANNERS[learning[0]].settings
    tables["planner"] = [
        choice_table("planner", list(PLANNERS), toml("fixed"), field_texts(adaptive)["name"]),
        without_name(table_of(PLANNERS["fixed"].settings, "planner", "`fixed`")),
        without_name(table_of(adaptive, "planner", ", ".join(f"`{name}`" for name in learning))),
        *(without_name(table_of(PLANNERS[name].settings, "planner", f"`{name}`")) for name in ("fedpipe", "expgrad")),
    ]
    tables["override"] = [override_table()]
    tables["device"] = [device_table()]
    return tables


def site_tables() -> Sequence[Table]:
    """Return the tables of a site's own file."""
    hints = get_type_hints(SiteSettings, include_extras=True)
    tables = [table_of(settings_of(hints[name]), name) for name in ("link", "policy", "model", "adapter", "data")]
    tables[-1] = replace(tables[-1], text=f"{tables[-1].text} {SITE_SPLIT}")
    return [file_keys(SiteSettings, {"name": STEM, "seed": "0"}), *tables]


def settings_of(annotation: Any) -> type[Any]:
    """Return the settings dataclass of a table that may be left out."""
    return next(part for part in (annotation, *get_args(annotation)) if isinstance(part, type) and is_dataclass(part))


def server_tables() -> Sequence[Table]:
    """Return the tables of a server's own file."""
    return [table_of(LinkSettings, "link"), table_of(EnrolmentSettings, "enrolment")]
