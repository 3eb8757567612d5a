"""The demo's questions: of real functions, asked once, unequal by client, and held out where they are shown."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fedtune.runs.demo_code import CLIENTS
from fedtune.runs.demo_questions import (
    ASKED,
    WORDS,
    first_sentence,
    functions,
    functions_of,
    plain,
    questions_asked,
    recipe_text,
    write_questions,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("demo") / "not" / "there" / "yet")


def rows(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for file in sorted(folder.iterdir()) for line in file.read_text("utf-8").splitlines()]


def test_clients_are_unequal_but_none_is_empty(data: Path) -> None:
    sizes = {file.stem: len(file.read_text("utf-8").splitlines()) for file in data.iterdir()}
    assert set(sizes) == set(CLIENTS)
    assert min(sizes.values()) >= 4
    assert max(sizes.values()) >= 10 * min(sizes.values())


def test_no_question_and_no_answer_stands_twice_nor_is_one_asked_at_the_end(data: Path) -> None:
    questions = [*(row["instruction"] for row in rows(data)), *(item.question for item in questions_asked())]
    answers = [*(plain(row["output"]) for row in rows(data)), *(plain(item.sentence) for item in questions_asked())]
    assert len(questions) == len(set(questions))
    assert len(answers) == len(set(answers))
    assert not set(ASKED) & set(CLIENTS)


def test_rows_are_what_the_interpreter_itself_says_of_its_functions(data: Path) -> None:
    answers = {row["instruction"]: row["output"] for row in rows(data)}
    (question,) = [question for question in answers if question.startswith("What does json.dumps(obj, skipkeys")]
    assert question.endswith(", ...) do?")
    assert answers[question] in " ".join((json.dumps.__doc__ or "").split())


def test_three_questions_are_asked_each_of_another_module() -> None:
    assert [item.name.split(".")[0] for item in questions_asked()] == ["random", "shutil", "queue"]


def test_the_same_python_writes_the_same_bytes(data: Path, tmp_path: Path) -> None:
    again = write_questions(tmp_path)
    assert {file.name: file.read_bytes() for file in data.iterdir()} == {
        file.name: file.read_bytes() for file in again.iterdir()
    }


def test_private_names_and_tests_are_left_out() -> None:
    names = [item.name for client in CLIENTS for item in functions_of(client)]
    assert not [name for name in names if any(part.startswith("_") for part in name.split("."))]
    assert not [name for name in names if name.startswith("unittest.Test_")]


def test_a_question_names_four_arguments_at_most_and_neither_self_nor_private_ones() -> None:
    source = '''
class Store:
    async def put(self, key, /, value, _hidden=0, *, a=1, b=2, c=3):
        """Put a value under its key. And more."""
    def _skip(self):
        """Never asked about by anyone here."""
    def bare(self): pass
class _Hidden:
    def put(self):
        """Never asked about by anyone either."""
'''
    asked = [(item.question, item.sentence) for item in functions(ast.parse(source), "shop")]
    assert asked == [("What does shop.Store.put(key, value, a, b, ...) do?", "Put a value under its key.")]


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return 3.11 of\n  it now. More.", "Return 3.11 of it now."),
        ("No full stop here", ""),
        ("", ""),
        ("Too short.", ""),
        ("word " * WORDS.stop + "end.", ""),
        ("A title line\n\nThen a sentence in a second paragraph.", ""),
    ],
)
def test_a_first_sentence_has_an_end_and_a_length(docstring: str, sentence: str) -> None:
    assert first_sentence(docstring) == sentence


def test_the_recipe_is_toml_whatever_the_path_and_gives_every_client_its_rank() -> None:
    path = Path('/a "b" \\c/modèle.gguf')
    recipe = tomllib.loads(recipe_text(path))
    ranks = dict.fromkeys(CLIENTS, recipe["adapter"]["rank"])
    for override in recipe["override"]:
        ranks |= dict.fromkeys(override["clients"], override["rank"])
    assert ranks == CLIENTS
    assert recipe["model"]["base"] == str(path)
    assert recipe["evaluate"]["prompts"] == [item.question for item in questions_asked()]
    assert recipe["evaluate"]["references"] == [item.sentence for item in questions_asked()]


def test_the_questions_are_written_without_loading_torch_or_the_packages_that_they_ask_about(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\nfrom fedtune.runs.demo_questions import ASKED, CLIENTS, write_questions\n"
        "before = set(sys.modules)\nwrite_questions(pathlib.Path(sys.argv[1]))\n"
        "sys.exit('torch' in sys.modules or bool((set(sys.modules) - before) & {*ASKED, *CLIENTS}))"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path], check=False).returncode == 0
