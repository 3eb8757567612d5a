"""The code demo's clients are real, unequal and the same every time; its recipe is TOML that a user can edit."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fedtune.runs.demo_code import CHUNK, CLIENTS, chunks, examples, recipe_text, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("demo") / "not" / "there" / "yet")


def rows(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_there_is_one_file_per_client_and_every_row_is_text(data: Path) -> None:
    assert {file.stem for file in data.iterdir()} == set(CLIENTS)
    for file in data.glob("*.jsonl"):
        assert all(set(row) == {"text"} and row["text"].strip() for row in rows(file))


def test_clients_are_unequal_but_none_is_empty_or_slow(data: Path) -> None:
    sizes = {file.stem: len(rows(file)) for file in data.iterdir()}
    assert min(sizes.values()) >= 10
    assert max(sizes.values()) >= 5 * min(sizes.values())
    assert sum(sizes.values()) <= 3000


def test_ranks_are_mixed() -> None:
    assert len(CLIENTS) >= 8
    assert len(set(CLIENTS.values())) >= 4


def test_the_same_python_writes_the_same_bytes(data: Path, tmp_path: Path) -> None:
    again = write_data(tmp_path)
    assert {file.name: file.read_bytes() for file in data.iterdir()} == {
        file.name: file.read_bytes() for file in again.iterdir()
    }


def test_no_row_comes_twice(data: Path) -> None:
    texts = [row["text"] for file in data.iterdir() for row in rows(file)]
    assert len(texts) == len(set(texts))


def test_rows_are_source_code_of_the_clients_package() -> None:
    package = [file.read_text(encoding="utf-8") for file in Path(json.__file__).parent.glob("*.py")]
    shown = [paragraph for text in examples("json") for paragraph in text.split("\n\n")]
    assert all(any(paragraph in source for source in package) for paragraph in shown)


def test_chunks_end_at_empty_lines_and_lose_no_paragraph() -> None:
    paragraphs = [f"def f{number}():\n    return '{'x' * (7 * number)}'" for number in range(60)]
    cut = chunks("\n\n\n".join(paragraphs) + "\n")
    assert "\n\n".join(cut).split("\n\n") == paragraphs
    assert all(len(chunk) <= CHUNK for chunk in cut)
    assert len(cut) < len(paragraphs)


def test_a_paragraph_longer_than_a_chunk_stays_whole() -> None:
    assert chunks("a\n\n" + "b" * (CHUNK + 1) + "\n\nc") == ["a", "b" * (CHUNK + 1), "c"]


def test_the_recipe_is_toml_and_gives_every_client_its_rank() -> None:
    recipe = tomllib.loads(recipe_text())
    ranks = dict.fromkeys(CLIENTS, recipe["adapter"]["rank"])
    for override in recipe["override"]:
        ranks |= dict.fromkeys(override["clients"], override["rank"])
    assert ranks == CLIENTS
    assert recipe["model"]["base"] == "embedded"


def test_the_demo_is_described_without_loading_torch() -> None:
    code = "import sys, fedtune.runs.demo_code; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
