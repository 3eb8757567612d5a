"""The table `search` and its space, which has the keys of other tables."""

from __future__ import annotations

from fedtune.config import bind, changes, digest, render
from fedtune.config.trials import search_of
from fedtune.search.settings import Range
from tests.config.conftest import SHORTEST
from tests.config.test_search_checks import TEXT


def test_keys_are_written_in_quotes_or_as_tables() -> None:
    settings = search_of(bind(TEXT)).settings
    assert settings.space == {
        "client.learning_rate": Range(1e-4, 1e-2, log=True),
        "adapter.rank": (2, 4),
    }


def test_the_table_is_no_part_of_what_a_run_is() -> None:
    plain, searched = bind(SHORTEST), bind(TEXT)
    assert digest(plain) == digest(searched)
    assert not changes(plain, searched)
    assert bind(render(searched)) == searched
    assert "[search]" not in render(plain)
