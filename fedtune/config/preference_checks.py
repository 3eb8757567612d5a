"""What a recipe that compares preferred with rejected answers cannot ask for beside that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedtune.config.error_text import display, quote
from fedtune.config.recipe import Recipe
from fedtune.errors import Fault
from fedtune.messages import Training

OWN = ("objective", "dpo_beta")
"""Keys of the table `client` that are the same for all clients: their updates are of one objective."""


def preference_faults(recipe: Recipe) -> Iterator[Fault]:
    """Refuse what the objective dpo has no use for, and its keys where they are not read."""
    client = recipe.client
    for place, override in enumerate(recipe.override):
        for key in OWN:
            if key in override.training:
                hint = f"set client.{key}, for all clients: their updates are averaged"
                got = display(override.training[key])
                yield Fault(f"override.{place}.{key}", f"no entry; client.{key} is the same for all", got, hint)
    if client.objective != "dpo":
        if client.dpo_beta != Training.dpo_beta:
            hint = "set client.objective = 'dpo', or leave it out"
            yield Fault("client.dpo_beta", "nothing with client.objective = 'likelihood'", f"{client.dpo_beta:g}", hint)
        return
    merge = "merge that adapter into the base first (fedtune export RUN --form merged), which then is the reference"
    reasons = {
        "model.task": (recipe.model.task != "causal", repr(recipe.model.task), "'causal'", "classes have no answers"),
        "client.packing": (client.packing, "true", "false", "each pair is compared by itself"),
        "data.packing": (recipe.data.packing, "true", "false", "each pair is compared by itself"),
        "data.loss_on": (recipe.data.loss_on == "all", "'all'", "'completion'", "both answers have the same prompt"),
        "pruning": (recipe.pruning is not None, "that table", "no such table", "answers are compared in whole models"),
        "adapter.start": (bool(recipe.adapter.start), display(recipe.adapter.start), "nothing", merge),
    }
    for path, (there, got, expected, hint) in reasons.items():
        if there:
            yield Fault(path, f"{expected} with client.objective = {quote('dpo')}", got, hint)


def rows_faults(recipe: Recipe, *, compared: bool) -> Sequence[Fault]:
    """Return what is wrong between a recipe's objective and the rows that were read; `compared`: with two answers."""
    if recipe.client.objective == "dpo" and not compared:
        expected = "rows with a preferred and a rejected answer, which client.objective = 'dpo' compares"
        hint = 'map both with fields = { chosen = "...", rejected = "..." }'
        return [Fault("data.fields.rejected", expected, "rows without a rejected answer", hint)]
    if recipe.client.objective != "dpo" and compared:
        expected = "'dpo' for rows with a preferred and a rejected answer"
        hint = 'or train on the preferred answer alone: fields = { output = "chosen" }'
        return [Fault("client.objective", expected, quote(recipe.client.objective), hint)]
    return []
