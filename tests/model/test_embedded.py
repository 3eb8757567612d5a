"""The embedded model is small, loads as it is, knows Python text, and its script makes the same bytes again."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedtune.model import embedded
from fedtune.model.embedded import train
from fedtune.runs.demo_code import CLIENTS, examples

UNIFORM = math.log(2048)
"""Loss in nats of a model that knows nothing."""

TINY = """
    --steps 2 --batch 2 --vocabulary 300 --hidden 16 --layers 1 --heads 2 --kv-heads 1 --feed-forward 32 --context 16
    --characters 300 --threads 1
"""


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(embedded.path(), local_files_only=True)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(embedded.path(), local_files_only=True)


@pytest.fixture
def _own_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@torch.no_grad()
def loss(model: Any, tokenizer: Any, text: str) -> float:
    tokens = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")["input_ids"]
    return float(model(input_ids=tokens, labels=tokens).loss)


def test_the_weights_take_less_than_four_megabytes_and_are_those_of_the_readme() -> None:
    weights = (embedded.path() / "model.safetensors").read_bytes()
    assert len(weights) <= 4_000_000
    assert hashlib.sha256(weights).hexdigest() in (embedded.path() / "README.md").read_text(encoding="utf-8")


def test_every_weight_is_found_and_the_model_has_about_a_million_parameters() -> None:
    model, found = AutoModelForCausalLM.from_pretrained(
        embedded.path(), local_files_only=True, output_loading_info=True
    )
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    assert 700_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 1_300_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_bundle_of_python_files_finds_the_model_of_the_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = embedded.path()
    bundled = tmp_path / "fedtune" / "model" / "embedded"
    bundled.mkdir(parents=True)
    monkeypatch.setattr(embedded, "__file__", str(bundled / "__init__.py"))
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(installed.parents[2])])
    assert embedded.path() == installed
    # Where there is none, the name of the missing folder is in the error of whatever opens it.
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert embedded.path() == bundled


def test_loading_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    AutoTokenizer.from_pretrained(embedded.path(), local_files_only=True)
    AutoModelForCausalLM.from_pretrained(embedded.path(), local_files_only=True)
    said = capfd.readouterr()
    assert said.out == ""
    assert all("Loading weights" in line for line in said.err.replace("\r", "\n").split("\n") if line.strip())


def test_its_files_name_no_folder_of_the_machine_that_made_them() -> None:
    for file in embedded.path().glob("*.json"):
        assert "_name_or_path" not in json.loads(file.read_text(encoding="utf-8"))


def test_it_predicts_documentation_far_better_than_chance(model: Any, tokenizer: Any) -> None:
    assert loss(model, tokenizer, topics["assert"]) < 0.6 * UNIFORM


@pytest.mark.parametrize("client", CLIENTS)
def test_it_predicts_code_it_has_never_seen_far_better_than_chance(client: str, model: Any, tokenizer: Any) -> None:
    texts = examples(client)[:8]
    assert sum(loss(model, tokenizer, text) for text in texts) / len(texts) < 0.65 * UNIFORM


@pytest.mark.parametrize("text", ["def f(x):\n    return x\n", "Grüße, 世界 🙂", "\t\0 \r\n", ""])
def test_any_text_begins_with_bos_and_comes_back_from_its_tokens(text: str, tokenizer: Any) -> None:
    tokens = tokenizer(text)["input_ids"]
    assert tokens[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_it_generates_with_its_own_special_tokens(model: Any, tokenizer: Any) -> None:
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    config = model.generation_config
    assert special == (0, 1, 2) == (config.pad_token_id, config.bos_token_id, config.eos_token_id)
    given = tokenizer(["class A:", "import os\n\ndef "], padding=True, padding_side="left", return_tensors="pt")
    answers = model.generate(**given, max_new_tokens=8, do_sample=False)
    assert answers.shape[1] <= given["input_ids"].shape[1] + 8
    assert all(text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True))


@pytest.mark.usefixtures("_own_threads")
def test_the_script_makes_the_same_bytes_from_the_same_seed_only(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    for folder, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        train.main([str(tmp_path / folder), "--seed", seed, *TINY.split()])
    assert torch.equal(before, torch.random.get_rng_state())
    a, b, c = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in "abc")
    assert a == b
    assert a["model.safetensors"] != c["model.safetensors"]
    assert a["tokenizer.json"] == c["tokenizer.json"]
    assert set(a) == {path.name for path in embedded.path().iterdir() if path.suffix in (".json", ".safetensors")}


def test_every_module_of_the_training_text_exists_and_none_is_a_client_of_the_demo() -> None:
    modules = train.MODULES.split()
    assert not set(modules) & set(CLIENTS)
    assert all(file.is_file() for module in modules for file in train.sources(module))
    assert all(train.sources(module) for module in modules)


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the model was trained on the documentation of Python 3.11")
def test_no_paragraph_of_the_demo_stands_in_the_training_text() -> None:
    trained = {paragraph.strip() for text in train.documents() for paragraph in text.split("\n\n")}
    shown = {paragraph.strip() for client in CLIENTS for text in examples(client) for paragraph in text.split("\n\n")}
    assert not {paragraph for paragraph in trained & shown if len(paragraph) >= 100}


def test_pieces_are_whole_lines_and_make_up_the_text() -> None:
    text = "".join(f"{number} {'x' * (number % 90)}\n" for number in range(200)) + "no newline at the end"
    cut = train.pieces(text)
    assert "".join(cut) == text
    assert all(len(piece) >= train.PIECE and piece.endswith("\n") for piece in cut[:-1])
    assert train.pieces("") == []
