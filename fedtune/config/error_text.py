"""How a recipe's types and values are put into words, and which known word an unknown one is nearest to."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime, time
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Interval, Le, Lt

LONGEST = 60
"""Characters of a wrong value that a message repeats."""

NOUNS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def describe(annotation: Any) -> str:
    """Return in words what a setting's type allows.

    >>> from typing import Annotated
    >>> from annotated_types import Ge
    >>> describe(Annotated[int, Ge(1)] | None)
    'a whole number of at least 1 or "none"'
    """
    if is_union(annotation):
        options = get_args(annotation)
        # None cannot be written where any text is allowed: there one leaves the key out.
        named = [describe(option) for option in options if option is not type(None) or not allows(annotation, str)]
        return (", or " if any("," in name for name in named) else " or ").join(dict.fromkeys(named))
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return " ".join([describe(arguments[0]), *bounds(arguments[1:])])
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(quote, arguments))
    if origin in (Sequence, tuple, list):
        return f"a list, each item {describe(arguments[0])}"
    if origin in (Mapping, dict) or annotation not in (*NOUNS, type(None)):
        return "a table"
    return '"none"' if annotation is type(None) else NOUNS[annotation]


def bounds(constraints: Iterable[Any]) -> Sequence[str]:
    """Return the range that `annotated_types` constraints describe, as at most one phrase."""
    low, high = [], []
    for constraint in constraints:
        parts = constraint if isinstance(constraint, Interval) else (constraint,)
        for part in parts:
            match part:
                case Ge(ge):
                    low.append(f"of at least {ge}")
                case Gt(gt):
                    low.append(f"above {gt}")
                case Le(le):
                    high.append(f"at most {le}")
                case Lt(lt):
                    high.append(f"below {lt}")
    phrase = " and ".join(low + high)
    return [phrase] if phrase else []


def choices(annotation: Any) -> Sequence[str]:
    """Return the words among which a setting chooses, if it does."""
    if get_origin(annotation) is Literal:
        return [word for word in get_args(annotation) if isinstance(word, str)]
    if is_union(annotation) or get_origin(annotation) is Annotated:
        return [word for option in get_args(annotation) for word in choices(option)]
    return []


def is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def allows(annotation: Any, kind: type) -> bool:
    """Return whether a setting may have a value of the plain type `kind`."""
    if is_union(annotation):
        return any(allows(option, kind) for option in get_args(annotation))
    if get_origin(annotation) is Annotated:
        return allows(get_args(annotation)[0], kind)
    return annotation is kind


def quote(text: object) -> str:
    return f'"{text}"' if isinstance(text, str) else str(text)


def display(value: object) -> str:
    """Return a value as a recipe would write it, shortened.

    >>> display(True), display("8"), display({"a": 1})
    ('true', "'8'", 'a table')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list | tuple):
        text = f"[{', '.join(map(display, value))}]"
    else:
        text = value.isoformat() if isinstance(value, datetime | date | time) else repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def nearest(word: object, known: Iterable[str]) -> str | None:
    """Return the known word that differs least, if one is near."""
    if not isinstance(word, str):
        return None
    by_lower = {option.lower(): option for option in known}
    matches = get_close_matches(word.lower(), by_lower, n=1)
    return by_lower[matches[0]] if matches else None


def join_words(words: Iterable[object], *, joint: str = "and") -> str:
    """Return `a, b and c`."""
    *rest, last = [str(word) for word in words]
    return f"{', '.join(rest)} {joint} {last}" if rest else last
