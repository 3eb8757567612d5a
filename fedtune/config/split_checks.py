"""What test rows that are divided among the clients must not decide."""

from __future__ import annotations

from collections.abc import Iterator

from fedtune.config.error_text import quote
from fedtune.config.recipe import PYTHON, Recipe, requested_verbs
from fedtune.errors import Fault

BLIND = ("fixed", "random", PYTHON)
"""Planners that learn from no loss, and those of the user's own, who knows."""


def match_faults(recipe: Recipe) -> Iterator[Fault]:
    """Refuse to learn from clients' scores where their held-out rows are those of the test data."""
    if recipe.data.split.match is None:
        return
    hint = "leave data.split.match out, so that clients hold out rows of their own"
    if recipe.search is not None:
        expected = "none with [search], which would choose by the test data"
        yield Fault("data.split.match", expected, quote(recipe.data.split.match), hint)
    if recipe.planner.name not in BLIND:
        expected = "'fixed' or 'random' with data.split.match: all others learn from losses, here on the test data"
        yield Fault("planner.name", expected, quote(recipe.planner.name), hint)
    if requested_verbs(recipe) & {"probe", "descend", "auto"}:
        # Its guard sets rounds back and halves the rate by the losses of clients' held-out rows.
        expected = "a method of adapters with data.split.match: this one's guard learns from losses, here on the test"
        yield Fault("method.name", expected, quote(recipe.method.name), hint)
