from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import fedtune
from fedtune import api
from fedtune.errors import ConfigError
from fedtune.runs.chat import open_speaker, turn, voice
from fedtune.store import manifest
from tests.store.test_peft_import import foreign

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def said(speaker: Any, question: str, *, tuned: bool = True, new_tokens: int = 4) -> str:
    pieces: list[str] = []
    with voice(speaker, tuned=tuned, new_tokens=new_tokens) as ask:
        text = ask([turn("user", question)], pieces.append)
    assert "".join(pieces) == text
    return text


def test_a_run_answers_as_its_own_sample_did_without_its_data(ran: api.Run, tables: dict[str, Any]) -> None:
    recipe = ran.path / "recipe.toml"
    recipe.write_text(recipe.read_text().replace(tables["data"]["source"], "gone.jsonl"))
    speaker = open_speaker(ran.path)
    assert said(speaker, "the quick") == ran.summary["sample"]["after"]
    assert said(speaker, "the quick", tuned=False) == ran.summary["sample"]["before"]
    assert not speaker.remembers  # rows of plain text have no place for earlier turns


@pytest.mark.parametrize("seeded", ["kron"], indirect=True)
def test_a_run_of_seeds_answers_as_its_own_sample_did(seeded: api.Run) -> None:
    speaker = open_speaker(seeded.path)
    assert said(speaker, "the quick") == seeded.summary["sample"]["after"]
    assert said(speaker, "the quick", tuned=False) == seeded.summary["sample"]["before"]  # rebuilt weights are undone


def test_an_adapter_of_others_speaks_over_the_base_that_it_names(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    foreign(checkpoints["llama"], tmp_path / "a", r=2, lora_alpha=64, target_modules=["q_proj", "down_proj"])
    speaker = open_speaker(tmp_path / "a")
    assert said(speaker, "the quick") != said(speaker, "the quick", tuned=False)
    moved = shutil.copytree(checkpoints["llama"], tmp_path / "base")
    assert said(open_speaker(tmp_path / "a", base=str(moved)), "the dog") == said(speaker, "the dog")


def test_another_base_than_the_runs_is_refused(ran: api.Run) -> None:
    facts = manifest.open_folder(ran.adapter).facts
    manifest.write(ran.adapter, {**facts, "base": {**facts["base"], "digest": "0" * 64}})
    with pytest.raises(ConfigError, match="expected the base that"):
        open_speaker(ran.path)


def test_classifiers_do_not_speak(ran: api.Run, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    foreign(checkpoints["llama"], tmp_path / "a", r=2, lora_alpha=2, target_modules=["q_proj"])
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "task_type": "SEQ_CLS"}))
    with pytest.raises(ConfigError, match="only causal models write"):
        open_speaker(tmp_path / "a")
    nameless = {**config, "base_model_name_or_path": ""}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(nameless))
    with pytest.raises(ConfigError, match="--base: expected the adapter's base"):
        open_speaker(tmp_path / "a")
    with pytest.raises(ConfigError, match="a PEFT adapter"):
        open_speaker(tmp_path / "none")


def test_questions_of_instruction_rows_are_written_as_the_rows_were(tables: dict[str, Any], tmp_path: Path) -> None:
    rows = [
        {"instruction": f"the {word}", "output": "the dog", "who": f"c{n % 2}"} for n, word in enumerate("abcdefgh")
    ]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": str(source), "split": {"kind": "key", "by": "who"}, "template": "plain", "held_out": 0.25}
    tables |= {"data": data, "rounds": {"count": 1}, "override": []}
    tables["evaluate"] = {"prompts": ["the quick"], "new_tokens": 4}
    run = fedtune.simulate(tables, out=tmp_path / "run", watch=lambda event: None)
    (shown,) = run.summary["samples"]
    assert said(open_speaker(run.path), "the quick") == shown["after"]
