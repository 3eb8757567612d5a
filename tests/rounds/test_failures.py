from __future__ import annotations

import pytest

from fedtune.errors import ClientError
from fedtune.messages import Failure
from fedtune.rounds import failures
from fedtune.rounds.failures import debug_traceback, failure_of, innermost_line, one_line
from fedtune.seeds import generator


def raised(work: object) -> BaseException:
    try:
        work()  # type: ignore[operator]
    except (Exception, SystemExit) as error:
        return error
    raise AssertionError("raised nothing")


def test_an_unforeseen_error_names_its_type_and_the_line_of_fedtune_that_it_passed() -> None:
    error = raised(lambda: generator("x"))  # type: ignore[arg-type]
    reason = failure_of("ann", error).reason
    assert reason.startswith("ann: expected an update; got ")
    assert reason.endswith(")")
    assert f" ({innermost_line(error)})" in reason
    assert innermost_line(error).startswith("fedtune/seeds.py:")


def test_what_may_quote_data_stays_where_the_data_are() -> None:
    secret = raised(lambda: generator("patient 4711"))  # type: ignore[arg-type]
    reason = failure_of("ann", secret, quote=False).reason
    assert "4711" not in reason
    assert "fedtune/seeds.py:" in reason
    assert reason.endswith("; this client's own log says more")


def test_an_error_of_fedtune_speaks_for_itself_in_one_line() -> None:
    assert failure_of("ann", ClientError("ann: two\nlines")) == Failure.from_text("ann", "ann: two lines")
    assert len(failure_of("ann", ClientError("x" * 9999)).reason) == failures.LONGEST


def test_memory_that_runs_out_anywhere_is_known_as_that() -> None:
    assert failure_of("ann", MemoryError("12 bytes")).out_of_memory
    assert not failure_of("ann", ValueError("memory")).out_of_memory


def test_lines_of_the_engine_say_nothing_of_the_work() -> None:
    from fedtune.simulation.resources import next_start

    assert innermost_line(raised(lambda: next_start(None, None, None, None, None))) == ""  # type: ignore[arg-type]


def test_a_long_text_is_cut_and_control_characters_are_left_out() -> None:
    assert one_line("a\x00b\n c", longest=9) == "a b c"
    assert one_line("x" * 20, longest=9) == "xxxxx ..."


def test_a_traceback_is_printed_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = raised(lambda: [][1])
    monkeypatch.setenv("FEDTUNE_DEBUG", "")
    debug_traceback(error)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("FEDTUNE_DEBUG", "1")
    debug_traceback(error)
    assert "IndexError" in capsys.readouterr().err
