"""From recipe.toml to frozen, validated settings: the only place that knows TOML and pydantic."""

from fedtune.config.binding import bind, bind_for_sites
from fedtune.config.recipe import Override, Recipe, ReportSettings, planned_training
from fedtune.config.render import changes, digest, render

__all__ = [
    "Override",
    "Recipe",
    "ReportSettings",
    "bind",
    "bind_for_sites",
    "changes",
    "digest",
    "planned_training",
    "render",
]
