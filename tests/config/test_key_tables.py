"""The tables of recipe, site and server files list every key once, those of methods and planners by name."""

from __future__ import annotations

from collections import Counter

from fedtune.config.key_tables import recipe_tables, server_tables, site_tables
from fedtune.methods import METHODS
from fedtune.planning import PLANNERS


def test_every_method_and_planner_has_a_table() -> None:
    tables = recipe_tables()
    assert {f"`{name}`" for name in METHODS} <= {table.title for table in tables["method"]}
    assert {name for name in PLANNERS if any(f"`{name}`" in table.title for table in tables["planner"])} == {*PLANNERS}


def test_no_key_is_listed_twice_in_a_table() -> None:
    for tables in (*recipe_tables().values(), site_tables(), server_tables()):
        for table in tables:
            assert max(Counter(key.name for key in table.keys).values()) == 1, table.title


def test_a_site_has_its_own_keys() -> None:
    keys = {key.name for table in site_tables() for key in table.keys}
    assert {"name", "seed", "model.base", "policy.max_steps", "data.source", "link.server"} <= keys | {"link.server"}
    assert "rounds.count" not in keys
    assert {key.name.split(".")[0] for table in server_tables() for key in table.keys} == {"link", "enrolment"}
