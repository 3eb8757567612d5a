"""The demo as `flwr run .` runs it when no recipe is named: its recipe and its clients' rows, on the server's host."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

from fedtune.runs import demo_code
from fedtune.store.files import fill, new_folder

RECIPE = "recipe.toml"


def home() -> Path:
    """Return the folder that fedtune keeps its files in."""
    return Path(os.environ.get("FEDTUNE_HOME") or Path.home() / ".fedtune").absolute()


def demo_recipe() -> Path:
    """Return the path of the demo's recipe, with its rows beside it; both are written if they are not there yet.

    Server and clients of a simulation are processes of one machine, so each finds what the first of them has written.

    Raises:
        StoreError: if they cannot be written.
    """
    folder = home() / f"flower-demo-{version('fedtune')}"
    if not (folder / RECIPE).is_file():
        # In one step: a client that starts meanwhile reads all of it, or writes it again.
        with new_folder(folder) as new:
            demo_code.write_data(new / "data")
            fill(new / RECIPE, demo_code.recipe_text().encode())
    return folder / RECIPE
