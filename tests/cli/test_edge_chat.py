"""The command `fedtune-edge chat`, in a pipe and at a terminal."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtune.cli.edge import main
from fedtune.cli.edge_options import DONE, USAGE
from tests.edge.speaking import Scripted, tune, write_device


@pytest.fixture
def device(tmp_path: Path, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Scripted]:
    site, runtime = write_device(tmp_path, checkpoints["llama"])
    monkeypatch.setattr("fedtune.edge.base.load_runtime", lambda bundle, threads: runtime)
    tune(site)
    return site, runtime


def piped(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_each_line_of_a_pipe_is_a_question_of_its_own(
    device: tuple[Path, Scripted], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site, runtime = device
    piped(monkeypatch, "the quick\n\nthe fox\n")
    assert main(["chat", str(site)]) == DONE
    shown = capsys.readouterr()
    assert shown.out == "the lazy dog\n\nthe lazy dog\n\n"
    assert "the model after round 3" in shown.err
    piped(monkeypatch, "the quick\n")
    assert main(["chat", str(site), "--json", "--base", "--new-tokens", "1"]) == DONE
    answered = json.loads(capsys.readouterr().out)
    assert answered["question"] == "the quick"
    assert runtime.asked[-1] == (None, (), 1)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # by the locale that a device is started with
def test_a_question_in_another_encoding_is_a_question(
    device: tuple[Path, Scripted], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], errors: str
) -> None:
    given = io.TextIOWrapper(io.BytesIO(b"the caf\xe9\nthe fox\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr(sys, "stdin", given)
    assert main(["chat", str(device[0]), "--json", "--system", "be na\udcefve"]) == DONE
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["question"] for answer in answers] == ["the caf\ufffd", "the fox"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    left: Iterator[str | type[BaseException]] = iter(lines)

    def read(prompt: str) -> str:
        line = next(left)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", read)


def test_ctrl_c_stops_an_answer_and_then_ends_the_conversation(
    device: tuple[Path, Scripted], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site, runtime = device
    runtime.interrupted_after = 2
    typed(monkeypatch, "the quick", "the fox", "/reset", "", KeyboardInterrupt)
    assert main(["chat", str(site)]) == DONE
    first, second, rest = capsys.readouterr().out.split("\n", 2)
    assert (second, rest) == ("the lazy dog", "\n")
    assert len(first) < len(second)
    assert second.startswith(first)
    assert len(runtime.asked) == 2


@pytest.mark.parametrize("end", ["/exit", "/quit", EOFError])
def test_a_conversation_ends_where_its_owner_ends_it(
    device: tuple[Path, Scripted], monkeypatch: pytest.MonkeyPatch, end: str | type[BaseException]
) -> None:
    typed(monkeypatch, end)
    assert main(["chat", str(device[0])]) == DONE
    assert device[1].asked == []


def test_what_is_wrong_is_one_line_and_status_2(
    device: tuple[Path, Scripted], capsys: pytest.CaptureFixture[str]
) -> None:
    (device[0].parent / "state" / "model.ftks").unlink()
    assert main(["chat", str(device[0])]) == USAGE
    error = capsys.readouterr().err
    assert "got none yet" in error
    assert len(error.splitlines()) == 1
    with pytest.raises(SystemExit):
        main(["chat", "--new-tokens", "0"])
    assert "expected at least 1; got 0" in capsys.readouterr().err
