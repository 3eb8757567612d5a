"""JSON Schemas (draft 2020-12) of recipe, site and server files, from the settings that bind them: for editors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib.metadata import version
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Interval, Le, Lt

from fedtune.config.binding import OPTIONAL
from fedtune.config.error_text import allows
from fedtune.config.key_facts import field_texts, is_union, summary
from fedtune.config.key_tables import COMMON_CLIENTS, SITE_SPLIT, method_summary, settings_of
from fedtune.config.presets import PRESETS
from fedtune.config.reading import SHORT
from fedtune.config.recipe import ARM_KEYS, SECTIONS, Override, Recipe
from fedtune.config.rows import DECLARED
from fedtune.config.site import SiteSettings
from fedtune.config.units import DEVICE_RANGES, UNITS_BY_PATH, unit_of
from fedtune.devices.profiles import PROFILES, DeviceProfile
from fedtune.link.settings import EnrolmentSettings, LinkSettings
from fedtune.methods import METHODS
from fedtune.planning import PLANNERS
from fedtune.simulation.resources import Resources

Schema = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
PLAIN: Mapping[Any, Schema] = {
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    bool: {"type": "boolean"},
    type(None): {"const": "none"},  # TOML has no null
    Any: {},
}
NAME_PATTERN = "^[A-Za-z0-9_][A-Za-z0-9._-]{0,99}$"
WITHOUT_FILE: Mapping[str, Sequence[str]] = {"data": ("source", "split")}
"""Keys that a table of a file may lack although its settings have no default: another key brings them, or binding."""


def recipe_schema() -> Schema:
    """Return the schema of a recipe file."""
    tables = {name: table_schema(cls, name) for name, cls in SECTIONS.items()}
    tables["method"] = named_schema("method", {name: method.settings for name, method in METHODS.items()}, PRESETS)
    tables["planner"] = named_schema("planner", {name: kind.settings for name, kind in PLANNERS.items()}, ())
    tables["override"] = {"type": "array", "items": override_schema()}
    tables["device"] = {"type": "array", "items": device_schema()}
    properties = {**top_level(Recipe), **{name: short_form(schema, name) for name, schema in tables.items()}}
    required = [name for name in SECTIONS if name not in OPTIONAL]
    return document("A fedtune recipe: everything that one experiment is.", properties, required)


def site_schema() -> Schema:
    """Return the schema of a site's own file."""
    hints = get_type_hints(SiteSettings, include_extras=True)
    tables = {name: table_schema(settings_of(hints[name]), name) for name in ("link", "policy", "model", "adapter")}
    data = table_schema(settings_of(hints["data"]), "data")
    tables["data"] = {**data, "description": f"{data['description']} {SITE_SPLIT}"}
    properties = {**top_level(SiteSettings), **tables}
    return document("A fedtune site file: a client's own base, data and policy.", properties, ["model", "data"])


def server_schema() -> Schema:
    """Return the schema of a server's own file."""
    properties = {
        "link": table_schema(LinkSettings, "link"),
        "enrolment": table_schema(EnrolmentSettings, "enrolment"),
    }
    return document("A fedtune server file: how fedtune serve listens.", properties, [])


def document(title: str, properties: Mapping[str, Schema], required: Sequence[str]) -> Schema:
    """Return a whole schema, which says of which version of fedtune it is."""
    return {
        "$schema": DIALECT,
        "title": title,
        "description": f"fedtune {version('fedtune')}",
        "type": "object",
        "properties": dict(properties),
        "required": list(required),
        "additionalProperties": False,
    }


def top_level(cls: type[Any]) -> dict[str, Schema]:
    """Return the keys that stand outside of any table."""
    texts = field_texts(cls)
    name = {"type": "string", "pattern": NAME_PATTERN, "description": texts["name"]}
    seed = {"type": "integer", "minimum": 0, "default": 0, "description": texts["seed"]}
    return {"name": name, "seed": seed}


def table_schema(cls: type[Any], path: str, *, only: Sequence[str] | None = None) -> Schema:
    """Return the schema of a table by its settings dataclass; `only` names the fields to take."""
    hints, texts = get_type_hints(cls, include_extras=True), field_texts(cls)
    own = [one for one in fields(cls) if only is None or one.name in only]
    needed = [one.name for one in own if default_value(one) is MISSING and one.name not in WITHOUT_FILE.get(path, ())]
    properties = {one.name: key_schema(one, hints[one.name], f"{path}.{one.name}", texts) for one in own}
    schema = {
        "type": "object",
        "description": summary(cls),
        "properties": properties,
        "additionalProperties": False,
    }
    return schema | ({"required": needed} if needed else {})


def key_schema(
    one: Field[Any], annotation: Any, path: str, texts: Mapping[str, str], *, change: bool = False
) -> Schema:
    """Return the schema of one key, with its docstring, unit and default; a key that changes another has no default."""
    if isinstance(annotation, type) and is_dataclass(annotation):
        return short_form(table_schema(annotation, path), path) | {
            "description": texts.get(one.name, summary(annotation))
        }
    unit = UNITS_BY_PATH.get(path) or unit_of(one.name, annotation)
    schema = value_schema(annotation) | {"description": texts.get(one.name, "")}
    if unit and unit != "no unit":
        schema |= {"description": f"{schema['description']} Unit: {unit}.", "x-unit": unit}
    default = MISSING if change else default_value(one)
    if default is None:
        default = MISSING if allows(annotation, str) else "none"
    return schema if default is MISSING else schema | {"default": as_json(default)}


def default_value(one: Field[Any]) -> Any:
    return one.default_factory() if one.default_factory is not MISSING else one.default


def as_json(value: Any) -> Any:
    """Return a default as JSON has it."""
    if isinstance(value, Mapping):
        return {key: as_json(each) for key, each in value.items()}
    if is_dataclass(value):
        return {key: as_json(each) for key, each in vars(value).items()}
    return [as_json(each) for each in value] if isinstance(value, list | tuple) else value


def value_schema(annotation: Any) -> Schema:
    """Return the schema of a type.

    >>> value_schema(Annotated[float, Interval(gt=0, le=1)] | None)
    {'anyOf': [{'type': 'number', 'exclusiveMinimum': 0, 'maximum': 1}, {'const': 'none'}]}
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and is_dataclass(annotation):
        return table_schema(annotation, annotation.__name__.lower())
    if is_union(annotation):
        # None cannot be written where any text is allowed: there one leaves the key out.
        options = [option for option in arguments if not (option is type(None) and allows(annotation, str))]
        schemas = [value_schema(option) for option in options]
        return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    if origin is Annotated:
        return value_schema(arguments[0]) | dict(map(bound_schema, flat_bounds(arguments[1:])))
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Mapping, dict):
        keys = {"propertyNames": {"enum": list(get_args(arguments[0]))}} if get_args(arguments[0]) else {}
        return {"type": "object", "additionalProperties": value_schema(arguments[1]), **keys}
    if origin is not None:
        return {"type": "array", "items": value_schema(arguments[0])}
    return dict(PLAIN[annotation])


def flat_bounds(constraints: Sequence[Any]) -> Sequence[Any]:
    return [part for one in constraints for part in (one if isinstance(one, Interval) else (one,))]


def bound_schema(bound: Any) -> tuple[str, Any]:
    """Return the keyword of a bound, and its limit."""
    match bound:
        case Ge(limit):
            return "minimum", limit
        case Gt(limit):
            return "exclusiveMinimum", limit
        case Le(limit):
            return "maximum", limit
        case Lt(limit):
            return "exclusiveMaximum", limit
    raise TypeError(f"expected a bound of annotated_types; got {bound!r}")


def named_schema(table: str, kinds: Mapping[str, type[Any]], presets: Sequence[str] | Mapping[str, Any]) -> Schema:
    """Return the schema of a table whose key `name` says which other keys it has; packages may bring other names."""
    options = []
    for name, cls in kinds.items():
        own = table_schema(cls, table)
        text = method_summary(name) if table == "method" else own["description"]
        properties = {**own["properties"], "name": {"const": name}}
        required = [*(key for key in own.get("required", ()) if key != "name"), "name"]
        options.append({**own, "title": name, "description": text, "properties": properties, "required": required})
    preset: Schema = {"enum": list(presets), "description": "A preset: keys of several tables at once."}
    other: Schema = {"not": {"enum": [*kinds, *presets]}, "type": "string", "description": "Of another package."}
    for title, word in (("preset", preset), ("plug-in", other)):
        if title == "plug-in" or presets:
            options.append({"title": title, "type": "object", "properties": {"name": word}, "required": ["name"]})
    names = {"enum": [*kinds, *presets]}
    return {"anyOf": [*options, names], "x-names": names["enum"]}


def short_form(schema: Schema, path: str) -> Schema:
    """Return the schema of a table that may be written as one word."""
    key = SHORT.get(tuple(path.split(".")))
    if key is None or "x-names" in schema:
        return schema
    word = schema["properties"][key]
    return {"anyOf": [schema, {name: value for name, value in word.items() if name not in ("default", "x-unit")}]}


def override_schema() -> Schema:
    """Return the schema of one table `[[override]]`: clients, and the keys of other tables that differ for them."""
    own = changed_keys(Override, "override", only=["verb"])
    texts, planner = field_texts(Override), get_type_hints(PLANNERS["fixed"].settings, include_extras=True)
    types = {"rank": Annotated[int, Ge(1)], **{key: planner[key] for key in ("ratio", *ARM_KEYS)}}
    own |= {name: {**value_schema(kind), "description": texts[name]} for name, kind in types.items()}
    descend = {**table_schema(SECTIONS["descend"], "descend"), "description": texts["descend"]}
    descend["properties"] = changed_keys(SECTIONS["descend"], "descend")
    training = changed_keys(SECTIONS["client"], "client")
    resources = changed_keys(Resources, "override")
    return row_schema(summary(Override), {**own, "descend": descend, **training, **resources})


def device_schema() -> Schema:
    """Return the schema of one table `[[device]]`: clients, their profile, and the numbers of it that differ."""
    numbers = changed_keys(DeviceProfile, "device", only=DECLARED)
    for name, schema in numbers.items():
        bounds = dict(range_keyword(part) for part in DEVICE_RANGES[name].split(" and "))
        numbers[name] = (
            {**schema, "items": {**schema["items"], **bounds}} if "items" in schema else {**schema, **bounds}
        )
    profile = {"enum": list(PROFILES), "description": "The kind of device."}
    return row_schema("What is different for some clients' devices.", {"profile": profile, **numbers})


def range_keyword(text: str) -> tuple[str, float]:
    """Return the keyword of a bound that is written as `≥ 0.01`."""
    sign, limit = text.split()
    return {"≥": "minimum", ">": "exclusiveMinimum", "≤": "maximum", "<": "exclusiveMaximum"}[sign], float(limit)


def changed_keys(cls: type[Any], path: str, *, only: Sequence[str] | None = None) -> dict[str, Schema]:
    """Return the schemas of a settings dataclass's keys in a table that changes another one."""
    hints, texts = get_type_hints(cls, include_extras=True), field_texts(cls)
    own = [one for one in fields(cls) if only is None or one.name in only]
    return {one.name: key_schema(one, hints[one.name], f"{path}.{one.name}", texts, change=True) for one in own}


def row_schema(text: str, properties: Mapping[str, Schema]) -> Schema:
    globs = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
    return {
        "type": "object",
        "description": text,
        "properties": {"clients": {**globs, "description": COMMON_CLIENTS}, **properties},
        "required": ["clients"],
        "additionalProperties": False,
    }
