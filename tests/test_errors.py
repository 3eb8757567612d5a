from __future__ import annotations

import inspect

from fedtune import errors
from fedtune.errors import ConfigError, Fault, FedtuneError


def test_a_fault_says_where_what_was_expected_what_came_and_what_to_do() -> None:
    fault = Fault("method.max_rank", "at least 1", "0", "leave it out for no limit")
    assert str(fault) == "method.max_rank: expected at least 1; got 0; leave it out for no limit"
    assert str(Fault("", "a table", "a list")) == "expected a table; got a list"


def test_all_faults_are_shown_at_once_under_their_source() -> None:
    faults = [Fault("a", "x", "y"), Fault("b", "x", "z")]
    error = ConfigError(faults, source="recipe.toml")
    assert str(error) == "recipe.toml: 2 faults\n  a: expected x; got y\n  b: expected x; got z"
    assert str(ConfigError(faults[0], source="recipe.toml")).startswith("recipe.toml: 1 fault\n")
    assert str(ConfigError(faults)) == "a: expected x; got y\nb: expected x; got z"
    assert error.faults == tuple(faults)


def test_every_error_is_a_fedtune_error_and_stands_in_the_tree_on_top_of_the_file() -> None:
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, Exception)]
    assert len(classes) > 5
    for cls in classes:
        assert issubclass(cls, FedtuneError)
        assert cls.__name__ in (errors.__doc__ or "")


def test_the_message_of_another_error_is_not_what_came() -> None:
    inner = "roster: expected a signature by the key ab; got none that holds"
    assert str(Fault("link", "a roster", inner)) == f"link: expected a roster; {inner}"
    assert (
        str(Fault("x", "a roster", "expected one; got two", "ask"))
        == "x: expected a roster; expected one; got two; ask"
    )
    # A value that happens to have the word in it is quoted as it is.
    assert str(Fault("x", "a date", "'expected'")) == "x: expected a date; got 'expected'"
