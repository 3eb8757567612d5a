"""A client's own trainer as a recipe, a site's file or Python code gives it: by name, or as a function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedtune.client.own_trainer import OwnTrainer
from fedtune.config.plugins import import_function


def own_trainer(
    given: Any, *, rows: Any = None, folder: Path | None = None, quotes: bool = False, path: str = "client.trainer"
) -> OwnTrainer | None:
    """Return what trains a client's adapter, of a function, its name, or None, with which fedtune trains.

    Raises:
        ConfigError: if Python cannot import the name.
    """
    if given is None:
        return None
    function = import_function(given, path=path) if isinstance(given, str) else given
    return OwnTrainer(function, rows=rows, quotes=quotes, folder=folder)
