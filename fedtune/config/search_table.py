"""The recipe's table `search`, whose table `space` has the keys of other tables, and the recipe of each trial."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from fedtune.config.error_text import display
from fedtune.config.tables import AT_FAULT, bind_table, freeze, freeze_table
from fedtune.errors import Fault
from fedtune.search.settings import Dimension, Range, SearchSettings

RANGE_KEYS = frozenset(field.name for field in fields(Range))


def bind_search(content: Any, faults: list[Fault]) -> SearchSettings:
    """Return the table `search`, bound; faults are noted as by `bind_table`."""
    if not isinstance(content, dict):
        return bind_table(SearchSettings, content, "search", faults)
    before = len(faults)
    space = bind_space(content.get("space", {}), faults)
    rest = {key: value for key, value in content.items() if key != "space"}
    settings = bind_table(SearchSettings, rest, "search", faults)
    if len(faults) == before:
        return replace(settings, space=space)
    # Without the keys at fault, so that rules are held against the others.
    bound = {name: value for name, value in vars(settings).items() if name not in ("_cls", "space")}
    return freeze_table(SearchSettings, {**bound, "space": space}, complete=False)


def bind_space(content: Any, faults: list[Fault]) -> Mapping[str, Dimension]:
    """Return the settings to try by their dotted keys, written in quotes or as tables within tables."""
    if not isinstance(content, dict):
        hint = '"client.learning_rate" = [0.001, 0.01]'
        faults.append(Fault("search.space", "a table", display(content), f"e.g. {hint}"))
        at_fault: Mapping[str, Dimension] = AT_FAULT
        return at_fault
    return {key: bind_dimension(key, value, faults) for key, value in flat_space(content)}


def flat_space(content: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings of a space with their keys; a table that has the keys of a range is one."""
    for key, value in content.items():
        if isinstance(value, dict) and value and not value.keys() & RANGE_KEYS:
            yield from flat_space(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def bind_dimension(key: str, content: Any, faults: list[Fault]) -> Dimension:
    """Return what a setting may be, after noting what is wrong with it."""
    path = space_path(key)
    if isinstance(content, dict):
        before = len(faults)
        numbers = bind_table(Range, content, path, faults)
        if len(faults) == before:
            faults.extend(range_faults(numbers, path))
        return numbers
    if not isinstance(content, list | tuple):
        hint = f"write [{display(content)}], or leave it out: the recipe has its value"
        faults.append(Fault(path, "a list of values or a range { low, high }", display(content), hint))
        return ()
    values: Sequence[Any] = tuple(freeze(content))
    if not values or any(value in values[:place] for place, value in enumerate(values)):
        got = "an empty list" if not values else f"{display(list(values))}, one of them twice"
        faults.append(Fault(path, "at least one value, each once", got, "leave it out to keep the recipe's value"))
    return values


def range_faults(numbers: Range, path: str) -> Iterator[Fault]:
    """Yield what is wrong between the ends of a range."""
    if not numbers.low < numbers.high:
        yield Fault(
            f"{path}.high", f"above low = {numbers.low:g}", f"{numbers.high:g}", "a single value needs no search"
        )
    if numbers.log and numbers.low <= 0:
        yield Fault(f"{path}.low", "above 0 with log = true", f"{numbers.low:g}", "raise it, or leave log out")


def space_path(key: str) -> str:
    """Return the path of a setting in the table `search.space`, for messages."""
    return f'search.space."{key}"'
