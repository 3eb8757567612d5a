from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from fedtune.cli import chat as chat_module
from fedtune.cli.main import app


@dataclass
class Model:
    """Stands for a loaded model: answers in two pieces with its name, and notes what it was asked."""

    asked: list[tuple[str, list[str]]] = field(default_factory=list)
    stop: bool = False
    tuned: Any = field(default_factory=lambda: SimpleNamespace(seeds=None))
    remembers: bool = True

    @contextmanager
    def voice(self, speaker: Any, *, tuned: bool, new_tokens: int) -> Iterator[Any]:
        name = "tuned" if tuned else "base"

        def ask(turns: Sequence[Any], write: Callable[[str], None]) -> str:
            self.asked.append((name, [f"{turn['role']}: {turn['content']}" for turn in turns]))
            write(f"{name} ")
            if self.stop:
                raise KeyboardInterrupt
            write("speaks\x1b[2J")
            return f"{name} speaks"

        yield ask


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    model = Model()
    monkeypatch.setattr("fedtune.runs.chat.open_speaker", lambda source, base, watch: model)
    monkeypatch.setattr("fedtune.runs.chat.voice", model.voice)
    return model


def chat(*arguments: str, lines: str) -> Any:
    return CliRunner().invoke(app, ["chat", "run", *arguments], input=lines)


def test_each_line_of_a_pipe_is_a_question_of_its_own(model: Model) -> None:
    ended = chat(lines="Who?\n\n  Why?  \n")
    assert ended.exit_code == 0
    assert ended.stdout == "tuned speaks\\x1b[2J\n\ntuned speaks\\x1b[2J\n\n"
    assert model.asked == [("tuned", ["user: Who?"]), ("tuned", ["user: Why?"])]


def test_both_models_answer_and_json_holds_a_line_for_each_question(model: Model) -> None:
    ended = chat("--both", "--json", "--system", "Be brief.", lines="Who?\nWhy?\n")
    first, second = map(json.loads, ended.stdout.splitlines())
    assert first == {"question": "Who?", "base": "base speaks\x1b[2J", "tuned": "tuned speaks\x1b[2J"}
    assert second["question"] == "Why?"
    assert model.asked[0] == ("base", ["system: Be brief.", "user: Who?"])
    assert chat("--both", lines="Who?\n").stdout.startswith("base: base speaks")


def test_ctrl_c_in_a_pipe_ends_the_command(model: Model) -> None:
    model.stop = True
    ended = chat(lines="Who?\nWhy?\n")
    assert ended.exit_code == 130
    assert len(model.asked) == 1


def test_a_conversation_on_a_terminal_remembers_resets_and_survives_ctrl_c(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = iter(["Who?", "", "Why?", "stop", "/reset", "When?"])

    def entered(prompt: str) -> str:
        text = next(entries, None)
        if text is None:
            raise EOFError
        model.stop = text == "stop"
        return text

    monkeypatch.setattr("builtins.input", entered)
    with chat_module.Talk(model, both=False, system=None, new_tokens=4) as talk:  # type: ignore[arg-type]
        chat_module.converse(talk)
    speaks = "assistant: tuned speaks\x1b[2J"
    assert [turns for _, turns in model.asked] == [
        ["user: Who?"],
        ["user: Who?", speaks, "user: Why?"],
        ["user: Who?", speaks, "user: Why?", speaks, "user: stop"],
        ["user: When?"],
    ]
    assert "\x1b" not in capsys.readouterr().out


def test_a_model_without_a_place_for_earlier_turns_gets_the_question_alone(model: Model) -> None:
    model.remembers = False
    with chat_module.Talk(model, both=True, system=None, new_tokens=4) as talk:  # type: ignore[arg-type]
        for question in ("Who?", "Why?"):
            talk.ask("base", question, lambda piece: None)
    assert model.asked[1] == ("base", ["user: Why?"])


def test_seeds_have_one_voice(model: Model) -> None:
    model.tuned.seeds = object()
    assert chat("--both", lines="Who?\n").exit_code == 2
