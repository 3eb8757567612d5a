from __future__ import annotations

from fedtune.config import Override, bind, planned
from fedtune.config.recipe import changed
from tests.config.conftest import SHORTEST


def test_an_override_covers_names_and_globs() -> None:
    override = Override(clients=("phone-[12]", "hub"))
    assert [name for name in ("phone-1", "phone-3", "hub", "Hub") if override.covers(name)] == ["phone-1", "hub"]


def test_a_client_without_override_is_as_the_recipe_says() -> None:
    recipe = bind(SHORTEST)
    assert planned(recipe, "client-1") == (8, recipe.client)


def test_later_overrides_win_key_by_key() -> None:
    more = '[[override]]\nclients = "client-*"\nrank = 4\nbatch = 2\n[[override]]\nclients = ["client-1"]\nrank = 2\n'
    recipe = bind(SHORTEST + more)
    rank, training = planned(recipe, "client-1")
    assert (rank, training.batch, training.steps) == (2, 2, 20)
    assert planned(recipe, "client-2")[0] == 4


def test_steps_and_epochs_replace_each_other() -> None:
    training = bind(SHORTEST).client
    by_epochs = changed(training, {"epochs": 2.0})
    assert (by_epochs.steps, by_epochs.epochs) == (None, 2.0)
    assert changed(by_epochs, {"steps": 3}) == changed(training, {"steps": 3})
