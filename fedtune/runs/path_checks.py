"""What can be said of a recipe's files in a moment: checked before libraries are imported that take seconds."""

from __future__ import annotations

from fedtune.config import Recipe
from fedtune.config.recipe import PYTHON
from fedtune.data.paths import places
from fedtune.model.base_paths import local_base


def check_paths(recipe: Recipe) -> None:
    """Refuse a recipe whose base, data or test data lead to nothing; hub names and plugins are left to their loaders.

    Raises:
        ConfigError: naming the key and the path.
    """
    data = recipe.data
    if recipe.model.base not in (PYTHON, "embedded"):
        local_base(recipe.model, recipe.root)
    if data.format == "plugin" or data.source == PYTHON:
        return
    for key, source in (("data.source", data.source), ("data.test", data.test)):
        if source is not None:
            places([source] if isinstance(source, str) else source, data.format, recipe.root, key)
