"""Names of methods and planners without any plug-in; tests/plugins installs some."""

from __future__ import annotations

import pytest

from fedtune.config.plugins import find_method, find_planner, method_names, planner_names
from fedtune.errors import ConfigError
from fedtune.methods import METHODS
from fedtune.planning import PLANNERS


def test_names_are_those_of_the_tables() -> None:
    assert list(method_names()) == list(METHODS)
    assert list(planner_names()) == list(PLANNERS)
    assert find_method("flora") is METHODS["flora"]
    assert find_planner("fixed") is PLANNERS["fixed"]


def test_an_unknown_name_says_how_it_could_be_known() -> None:
    with pytest.raises(ConfigError, match=r"method\.name.*install the package that brings it"):
        find_method("absent")
    with pytest.raises(ConfigError, match=r"planner\.name.*pass planner= to fedtune\.simulate"):
        find_planner("absent")
