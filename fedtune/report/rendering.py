"""Pages from the templates beside this module, every text escaped; tables and figures as values that they show."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined

from fedtune.report.units import number_text


@dataclass(frozen=True)
class Table:
    """Texts in rows and columns; all but the first `text_columns` columns are aligned as numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1


@dataclass(frozen=True)
class Card:
    """One figure with its caption and the numbers that it is drawn from."""

    name: str
    """Of its PNG file, and its CSS class."""
    title: str
    caption: str
    svg: str
    """Not escaped in the page: only `drawing.svg` may make it. Empty without matplotlib: the numbers stand alone."""
    numbers: Table | None


def source(name: str) -> str:
    """Return a template or style sheet as text, from wherever the package is installed."""
    return (files("fedtune.report") / "templates" / name).read_text(encoding="utf-8")


@functools.cache
def environment() -> Environment:
    # Names, reasons and samples in a page come from clients. StrictUndefined: a value that the page's code forgot to
    # give is an error in a test, not an empty place in a report.
    pages = Environment(
        loader=FunctionLoader(source),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    pages.filters["number"] = number_text
    return pages


def render(template: str, **values: object) -> str:
    """Return a whole HTML document."""
    return environment().get_template(template).render(values).lstrip()


def replace_text(target: Path, text: str) -> None:
    """Write the file beside its place and move it there, so that a reader never sees half of it."""
    part = target.with_name(target.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, target)
