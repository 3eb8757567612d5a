"""The tables of a recipe that there may be several of: what is different for some clients, and for their devices."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Annotated, Any, get_type_hints

from annotated_types import Ge

from fedtune.config.checks import length_faults
from fedtune.config.error_text import display, join_words, nearest, quote
from fedtune.config.recipe import ARM_KEYS, Override
from fedtune.config.tables import AT_FAULT, bind_value, unknown_keys
from fedtune.devices.profiles import PROFILES, DeviceProfile
from fedtune.devices.profiles import check as check_profile
from fedtune.errors import ConfigError, Fault
from fedtune.messages import Training, VerbChoice
from fedtune.planning.fixed import FixedSettings
from fedtune.planning.verbs import DescendSettings
from fedtune.simulation.resources import Resources
from fedtune.simulation.settings import DeviceOverride

DECLARED = [field.name for field in fields(DeviceProfile) if field.name not in ("name", "provenance")]
"""Fields of a device's profile that a table `device` may change."""

GLOBS = str | Sequence[str]
"""The type of the key `clients`."""


def bind_overrides(content: Any, faults: list[Fault]) -> Sequence[Override]:
    """Bind the tables `override`, each to the keys of `client`, the rank and the resources that it changes.

    Returns: the overrides; `AT_FAULT` if one of them has a fault.
    """
    if not isinstance(content, list | tuple):
        faults.append(Fault("override", "a list of tables, each [[override]]", display(content)))
        return ()
    before = len(faults)
    bound = [bind_override(row, f"override.{place}", faults) for place, row in enumerate(content)]
    overrides: Sequence[Override] = tuple(override for override in bound if override is not None)
    return overrides if len(faults) == before else AT_FAULT


def bind_override(row: Any, path: str, faults: list[Fault]) -> Override | None:
    training, taken = (get_type_hints(cls, include_extras=True) for cls in (Training, Resources))
    planner = get_type_hints(FixedSettings, include_extras=True)
    own = {"clients": GLOBS, "rank": Annotated[int, Ge(1)], "verb": VerbChoice, "descend": dict[str, Any]}
    own |= {key: planner[key] for key in ("ratio", *ARM_KEYS)}
    values = bind_row(own | training | taken, row, path, "rank", faults)
    if values is None:
        return None
    descend = bind_changes(DescendSettings, values.get("descend"), f"{path}.descend", faults)
    steps, epochs = values.get("steps"), values.get("epochs")
    if values.keys() & {"steps", "epochs"} and AT_FAULT not in (steps, epochs):
        faults.extend(length_faults(steps, epochs, path))
    return Override(
        clients=values["clients"],
        rank=values.get("rank"),
        ratio=values.get("ratio"),
        **{key: values.get(key) for key in ARM_KEYS},
        verb=values.get("verb"),
        descend=descend,
        training={key: value for key, value in values.items() if key in training},
        resources={key: value for key, value in values.items() if key in taken},
    )


def bind_changes(cls: type[Any], content: Any, path: str, faults: list[Fault]) -> Mapping[str, Any] | None:
    """Return the keys of a table that change for some clients, by name; None where none do."""
    if content is None or content is AT_FAULT:
        return content
    hints = get_type_hints(cls, include_extras=True)
    faults.extend(unknown_keys(content, hints, path))
    if not content:
        faults.append(Fault(path, f"a key that changes ({join_words(hints, joint='or')})", "an empty table"))
    return {key: bind_value(hints[key], content[key], f"{path}.{key}", faults) for key in content if key in hints}


def bind_devices(content: Any, faults: list[Fault]) -> Sequence[DeviceOverride]:
    """Bind the tables `device`, each to the fields of a device's profile that it changes."""
    if not isinstance(content, list | tuple):
        faults.append(Fault("device", "a list of tables, each [[device]]", display(content)))
        return ()
    bound = [bind_device(row, f"device.{place}", faults) for place, row in enumerate(content)]
    return tuple(device for device in bound if device is not None)


def bind_device(row: Any, path: str, faults: list[Fault]) -> DeviceOverride | None:
    hints = {key: kind for key, kind in get_type_hints(DeviceProfile, include_extras=True).items() if key in DECLARED}
    values = bind_row(hints | {"clients": GLOBS, "profile": str}, row, path, "profile or memory_gb", faults)
    if values is None:
        return None
    clients, profile = values.pop("clients"), values.pop("profile", None)
    if profile is not None and profile is not AT_FAULT and profile not in PROFILES:
        meant = nearest(profile, PROFILES)
        hint = f"did you mean {quote(meant)}?" if meant else ""
        faults.append(Fault(f"{path}.profile", join_words(PROFILES, joint="or"), display(profile), hint))
        profile = AT_FAULT
    if AT_FAULT not in values.values():
        name = next(iter(PROFILES)) if profile is None or profile is AT_FAULT else profile
        try:
            check_profile(replace(PROFILES[name], name=path, **values))
        except ConfigError as error:
            faults.extend(replace(fault, path=f"{path}.{fault.path.rpartition('.')[2]}") for fault in error.faults)
    return DeviceOverride(clients=clients, profile=profile, fields=values)


def bind_row(hints: Mapping[str, Any], row: Any, path: str, example: str, faults: list[Fault]) -> dict[str, Any] | None:
    """Return the values of one table by key, with `clients` as a tuple of globs; None if it is no table.

    Args:
        hints: the types of all keys, `clients` among them.
        row: as read from TOML.
        path: of the table, for messages.
        example: of a key that could change, for messages.
        faults: receives what is wrong.
    """
    if not isinstance(row, dict):
        faults.append(Fault(path, "a table", display(row)))
        return None
    faults.extend(unknown_keys(row, hints, path))
    values = {key: bind_value(hints[key], row[key], f"{path}.{key}", faults) for key in row if key in hints}
    globs = values.pop("clients", ())
    if globs is AT_FAULT:
        clients: Sequence[str] = ()
    else:
        clients = (globs,) if isinstance(globs, str) else tuple(globs)
        if not clients:
            faults.append(Fault(f"{path}.clients", "the name or glob of a client, or a list of them", "nothing"))
    faults.extend(unclosed_globs(clients, path))
    if not row.keys() - {"clients"}:
        faults.append(Fault(path, f"something that changes, such as {example}", "only clients"))
    return {"clients": clients, **values}


def unclosed_globs(globs: Sequence[str], path: str) -> Iterator[Fault]:
    for bad in [text for text in globs if not text or re.search(r"\[[^\]]*$", text)]:
        yield Fault(f"{path}.clients", "a glob with every [ closed", display(bad), 'e.g. "client-[1-3]"')
