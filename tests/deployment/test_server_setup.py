"""The recipe of a server; whole runs of it are in tests/cli/test_flower_server.py and tests/test_link.py."""

from __future__ import annotations

import pytest

from fedtune.deployment.server_setup import check_overrides, data_at_sites, expected_clients, once
from fedtune.errors import ConfigError
from tests.deployment.test_coordinator import RECIPE


def test_a_recipe_without_data_is_whole_for_the_data_lie_at_the_sites() -> None:
    assert data_at_sites(RECIPE).data.source == "at the sites"
    with_data = RECIPE + '[data]\nsource = "x"\nsplit = { kind = "files" }\n'
    assert data_at_sites(with_data).data.source == "x"
    assert data_at_sites(RECIPE, overrides=["rounds.count=7"]).rounds.count == 7
    with pytest.raises(ConfigError, match="max_clients"):
        data_at_sites(RECIPE + "max_clients = 3\n")


def test_the_first_round_waits_for_its_cohort() -> None:
    assert expected_clients(data_at_sites(RECIPE)) == 1
    assert expected_clients(data_at_sites(RECIPE + "cohort = 3\n")) == 3
    assert expected_clients(data_at_sites(RECIPE + "cohort = 0.5\nmin_clients = 2\n")) == 2


def test_an_override_without_a_client_is_noted() -> None:
    said: list[str] = []
    recipe = data_at_sites(RECIPE + '[[override]]\nclients = ["anan"]\nrank = 1\n')
    check_overrides(recipe, ["anna"], said.append)
    assert "anan" in said[0]
    check_overrides(recipe, ["anan"], said.append)
    assert len(said) == 1


def test_a_recipe_may_name_the_classes_and_leave_the_source_to_the_sites() -> None:
    recipe = data_at_sites(RECIPE + '[data]\nlabels = ["no", "yes"]\n')
    assert recipe.data.labels == ("no", "yes")
    assert recipe.data.source == data_at_sites(RECIPE).data.source


def test_a_sentence_on_scores_is_said_once() -> None:
    said = list[str]()
    note = once(said.append)
    for text in ("a keeps its scores", "a keeps its scores", "b is late", "a keeps its scores"):
        note(text)
    assert said == ["a keeps its scores", "b is late"]
