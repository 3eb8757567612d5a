"""What a recipe may ask of clients whose adapter another program trains: what that program could not do is refused."""

from __future__ import annotations

from collections.abc import Iterator

from fedtune.config.error_text import quote
from fedtune.config.recipe import Recipe, method_type_of, planner_type_of
from fedtune.errors import ConfigError, Fault
from fedtune.messages import TrainLora
from fedtune.model.settings import quantised_format

HINT = "leave it out, or let fedtune train"


def names_trainer(recipe: Recipe) -> bool:
    """Return whether another program trains the adapter of any client."""
    overrides = any(override.training.get("trainer") for override in recipe.override)
    return recipe.objects.trainer is not None or recipe.client.trainer is not None or overrides


def refuse_named(recipe: Recipe) -> None:
    """Refuse a server's recipe that names a trainer, which no site would call.

    Raises:
        ConfigError: saying where its name belongs.
    """
    if names_trainer(recipe):
        hint = "name it in the site's own file, or leave it out"
        raise ConfigError(Fault("client.trainer", "none in a recipe that is served to sites", "one", hint))


def trainer_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield what of a recipe only fedtune's own training does, where another program trains clients."""
    if names_trainer(recipe):
        yield from own_training_faults(recipe, "client.trainer")


def own_training_faults(recipe: Recipe, trainer: str) -> Iterator[Fault]:
    """Yield what of a recipe only fedtune's own training does; `trainer` says in messages what trains instead."""
    method, planner = method_type_of(recipe), planner_type_of(recipe).choices(recipe.planner, recipe.adapter.rank, 0.0)
    asked = {
        "method.name": (method.task is not TrainLora, quote(recipe.method.name), "a method of LoRA adapters"),
        "pruning": (recipe.pruning is not None, "that table", "no pruned models"),
        "personal": (recipe.personal is not None, "that table", "no models of the clients' own"),
        "adapter.kind": (recipe.adapter.kind != "lora", quote(recipe.adapter.kind), "factors ('lora')"),
        "model.dtype": (
            quantised_format(recipe.model.dtype) is not None,
            quote(recipe.model.dtype),
            "a base that is not quantised",
        ),
        "planner.name": (
            bool(planner.base_dtypes or planner.importance or planner.backs),
            quote(recipe.planner.name),
            "a planner that asks for ranks and steps alone",
        ),
    }
    for path, (there, got, expected) in asked.items():
        if there:
            yield Fault(path, f"{expected} beside {trainer}", got, HINT)
