"""What can be said of a recipe in a moment, of its files, trackers and engine, before large libraries are imported."""

from __future__ import annotations

from pathlib import Path

from fedtune.config import Recipe
from fedtune.config.recipe import PYTHON
from fedtune.data.paths import places
from fedtune.data.presets import naming_file
from fedtune.model.base_paths import check_vocabulary, local_base
from fedtune.tracking.packages import check_packages


def check_paths(recipe: Recipe) -> None:
    """Refuse a recipe whose base, data or test data lead to nothing; hub names and plugins are left to their loaders.

    Raises:
        ConfigError: naming the key and the path.
        ExtraError: naming the package of a tracker or of the engine that is missing.
    """
    check_packages(recipe.report.trackers)
    if recipe.engine.name == "ray":
        from fedtune.flower.shim import check_ray

        check_ray()
    data = recipe.data
    if recipe.model.base not in (PYTHON, "embedded"):
        folder = local_base(recipe.model, recipe.root)
        # Of a folder that is no model at all, such as an adapter, its loader says more.
        if folder is not None and is_model(folder):
            check_vocabulary(folder)
    if data.format == "plugin" or data.source == PYTHON:
        return
    for key, source in (("data.source", data.source), ("data.test", data.test)):
        if source is not None:
            with naming_file(data.preset):
                places([source] if isinstance(source, str) else source, data.format, recipe.root, key)


def is_model(folder: Path) -> bool:
    """Return whether a folder is that of a model; an adapter is none, and a GGUF file has its tokenizer inside."""
    other = (folder / "adapter_config.json").exists() or any(folder.glob("*.gguf"))
    return (folder / "config.json").is_file() and not other
