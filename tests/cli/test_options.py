from __future__ import annotations

import pytest
import typer

from fedtune.cli.options import INTERRUPTED, USAGE, examples, report_errors
from fedtune.errors import StoreError


def test_examples_are_a_list_at_the_end_of_the_help() -> None:
    assert examples("fedtune a", "fedtune b") == "Examples:\n\n- `fedtune a`\n\n- `fedtune b`"


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (StoreError("disk: full"), USAGE, "fedtune: disk: full"),
        (FileNotFoundError(2, "No such file", "x.toml"), USAGE, "fedtune: x.toml: No such file; --debug shows where"),
        (KeyboardInterrupt(), INTERRUPTED, "fedtune: stopped by Ctrl-C"),
    ],
)
def test_an_error_is_one_line_and_a_status(
    error: BaseException, status: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as ended, report_errors(debug=False):
        raise error
    assert ended.value.exit_code == status
    assert capsys.readouterr().err == f"{text}\n"


def test_debug_lets_everything_through() -> None:
    with pytest.raises(StoreError), report_errors(debug=True):
        raise StoreError("disk: full")
