"""What a client is planned to do: the recipe's rank and training, changed by the overrides that cover it."""

from __future__ import annotations

from fedtune.config import Override, bind, planned_training
from fedtune.config.recipe import with_changes
from tests.config.conftest import SHORTEST


def test_an_override_covers_names_and_globs() -> None:
    override = Override(clients=("phone-[12]", "hub"))
    assert [name for name in ("phone-1", "phone-3", "hub", "Hub") if override.covers(name)] == ["phone-1", "hub"]


def test_a_client_without_override_is_as_the_recipe_says() -> None:
    recipe = bind(SHORTEST)
    assert planned_training(recipe, "client-1") == (8, recipe.client)


def test_later_overrides_win_key_by_key() -> None:
    more = '[[override]]\nclients = "client-*"\nrank = 4\nbatch = 2\n[[override]]\nclients = ["client-1"]\nrank = 2\n'
    recipe = bind(SHORTEST + more)
    rank, training = planned_training(recipe, "client-1")
    assert (rank, training.batch, training.steps) == (2, 2, 20)
    assert planned_training(recipe, "client-2")[0] == 4


def test_steps_and_epochs_replace_each_other() -> None:
    training = bind(SHORTEST).client
    by_epochs = with_changes(training, {"epochs": 2.0})
    assert (by_epochs.steps, by_epochs.epochs) == (None, 2.0)
    assert with_changes(by_epochs, {"steps": 3}) == with_changes(training, {"steps": 3})


def test_a_planned_client_trains_by_epochs_where_an_override_says_so() -> None:
    recipe = bind(SHORTEST + '[[override]]\nclients = "phone-?"\nepochs = 0.5\n')
    assert [planned_training(recipe, name)[1].steps for name in ("phone-1", "phone-10")] == [None, 20]
    assert planned_training(recipe, "phone-1")[1].epochs == 0.5


def test_an_override_by_none_switches_a_setting_off() -> None:
    recipe = bind(SHORTEST + '[[override]]\nclients = "a"\nclip_norm = "none"\n')
    assert planned_training(recipe, "a")[1].clip_norm is None
    assert planned_training(recipe, "b")[1].clip_norm == 1.0
