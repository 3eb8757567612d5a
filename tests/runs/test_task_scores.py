from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedtune import api
from fedtune.errors import ConfigError, FedtuneError
from fedtune.rounds.events import Note, Phase
from fedtune.runs.export import export
from fedtune.runs.task_scores import score_tasks
from fedtune.runs.task_target import open_target
from tests.evaluation.conftest import arc_row, gsm8k_row, mmlu_row, write
from tests.store.test_peft_import import foreign

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

SHORT = {"mmlu": 0, "gsm8k": 0}


@pytest.fixture
def data(tmp_path: Path) -> Mapping[str, Path]:
    """Short questions: the tiny models read 128 tokens."""
    subjects = ["sums"] * 5 + ["logic"] * 3
    write(tmp_path / "mmlu" / "test.jsonl", *(mmlu_row(k, name) for k, name in enumerate(subjects)))
    write(tmp_path / "arc" / "test.jsonl", *(arc_row(k) for k in range(4)))
    write(tmp_path / "arc" / "train.jsonl", *(arc_row(k) for k in range(5, 9)))
    write(tmp_path / "gsm8k" / "test.jsonl", *(gsm8k_row(k) for k in range(3)))
    write(tmp_path / "gsm8k" / "train.jsonl", *(gsm8k_row(k) for k in range(9)))
    return {name: tmp_path / name for name in ("mmlu", "arc", "gsm8k")}


def only(data: Mapping[str, Path], *names: str) -> Mapping[str, Path]:
    return {name: data[name] for name in names}


def test_a_run_is_scored_before_and_after_on_the_same_items(ran: api.Run, data: Mapping[str, Path]) -> None:
    events: list[Any] = []
    scores = score_tasks(
        str(ran.path),
        ["arc", "gsm8k", "mmlu"],
        data=data,
        shots={**SHORT, "arc": 1},
        new_tokens=8,
        watch=events.append,
    )
    assert scores["quick"] is True
    assert json.loads(json.dumps(scores)) == scores
    assert list(scores["tasks"]) == ["arc", "gsm8k", "mmlu"]
    for name, measures in (
        ("mmlu", ("acc", "acc_macro")),
        ("arc", ("acc", "acc_norm")),
        ("gsm8k", ("strict", "flexible")),
    ):
        task = scores["tasks"][name]
        assert tuple(task["measures"]) == measures
        for estimates in task["measures"].values():
            assert list(estimates) == ["before", "after", "difference"]
            change = estimates["after"]["value"] - estimates["before"]["value"]
            assert estimates["difference"]["value"] == pytest.approx(change)
            assert {estimate["items"] for estimate in estimates.values()} == {task["items"]}
    mmlu = scores["tasks"]["mmlu"]
    means = [group["before"]["value"] for group in mmlu["groups"].values()]
    assert mmlu["measures"]["acc_macro"]["before"]["value"] == pytest.approx(sum(means) / 2)
    assert Phase("arc, after: 4 of 4") in events


def test_scores_of_the_exported_adapter_and_model_equal_the_live_ones(
    ran: api.Run, data: Mapping[str, Path], tmp_path: Path, tables: dict[str, Any]
) -> None:
    live = score_tasks(str(ran.path), ["arc"], data=only(data, "arc"))["tasks"]["arc"]
    adapter = score_tasks(str(ran.adapter), ["arc"], data=only(data, "arc"), base=tables["model"]["base"])
    assert adapter["tasks"]["arc"] == live
    merged = export(ran.path, form="merged", out=tmp_path / "merged")
    alone = score_tasks(str(merged), ["arc"], data=only(data, "arc"))["tasks"]["arc"]["measures"]
    assert {name: measure["base"] for name, measure in alone.items()} == {
        name: measure["after"] for name, measure in live["measures"].items()
    }


def test_options_are_scored_by_the_tuned_model_itself(ran: api.Run) -> None:
    from fedtune.model.answers import continuation, log_likelihoods
    from fedtune.runs.chat import attach

    target = open_target(str(ran.path), base=None, watch=lambda event: None)
    answers = [continuation(target.speaker.base, "the quick", " fox")]
    scores: list[float] = []
    for tuned in (False, True):
        with attach(target.speaker, tuned=tuned) as net:
            scores += log_likelihoods(net, target.speaker.base, answers, batch=1)
    assert scores[0] != scores[1]


def test_an_adapter_that_cannot_be_read_is_never_scored_as_its_base(
    checkpoints: dict[str, Path], data: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    foreign(checkpoints["llama"], folder, r=2, lora_alpha=2, target_modules=["q_proj"])
    weights = (folder / "adapter_model.safetensors").read_bytes()

    def scored(**options: Any) -> Any:
        return score_tasks(str(folder), ["arc"], data=only(data, "arc"), **options)

    assert scored()["tasks"]["arc"]["items"] == 4
    (folder / "adapter_model.safetensors").write_bytes(weights[:-3])
    with pytest.raises(FedtuneError):
        scored()
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="a PEFT adapter"):
        scored()
    (folder / "adapter_model.safetensors").write_bytes(weights)
    with pytest.raises(FedtuneError, match="q_proj"):  # of a model with other layers
        scored(base=str(checkpoints["gpt2"]))
    # A base in the same folder does not make up for it either.
    shutil.copytree(checkpoints["llama"], folder, dirs_exist_ok=True)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ConfigError, match="a PEFT adapter"):
        scored()


def test_items_that_do_not_fit_are_refused_or_counted(
    checkpoints: dict[str, Path], data: Mapping[str, Path], tmp_path: Path
) -> None:
    base = str(checkpoints["llama"])
    with pytest.raises(ConfigError, match=r"--tasks arc: expected items of at most 128 tokens.*got 4 of 4.*arc=\d"):
        score_tasks(base, ["arc"], data=only(data, "arc"), shots={"arc": 4})
    with pytest.raises(ConfigError, match="with 100 tokens of an answer"):
        score_tasks(base, ["gsm8k"], data=only(data, "gsm8k"), shots={"gsm8k": 1}, new_tokens=100, skip_long=True)
    mixed = write(tmp_path / "mixed.jsonl", arc_row(1), arc_row(2, question="the dog " * 99), arc_row(3))
    with pytest.raises(ConfigError, match="got 1 of 3 longer ones, 0 shots; set --skip-long"):
        score_tasks(base, ["arc"], data={"arc": mixed})
    # Where no number of shots lets all fit, the one that lets most, and the option without which it does not help.
    shots = {"arc": mixed, "arc.shots": data["arc"]}
    with pytest.raises(
        ConfigError, match=r"got 3 of 3 longer.*set --shots arc=\d, with which 1 do not fit, and --skip"
    ):
        score_tasks(base, ["arc"], data=shots, shots={"arc": 4}, skip_long=True)
    long = write(tmp_path / "long.jsonl", arc_row(1, question="the dog " * 99))
    with pytest.raises(ConfigError, match="got 1 of 1 longer ones, 0 shots; take a model that reads more"):
        score_tasks(base, ["arc"], data={"arc": long}, skip_long=True)
    notes: list[Any] = []
    task = score_tasks(base, ["arc"], data={"arc": mixed}, skip_long=True, watch=notes.append)["tasks"]["arc"]
    assert (task["rows"], task["items"], task["too_long"]) == (3, 2, 1)
    assert Note("arc: 1 items are longer than 128 tokens: left out") in notes


def test_a_limit_and_the_batch_change_no_answer(checkpoints: dict[str, Path], data: Mapping[str, Path]) -> None:
    base, files = str(checkpoints["llama"]), only(data, "arc")
    whole, alone = (score_tasks(base, ["arc"], data=files, batch=batch)["tasks"] for batch in (8, 1))
    assert whole == alone
    few = score_tasks(base, ["arc"], data=files, limit=2)["tasks"]["arc"]
    assert (few["rows"], few["items"]) == (4, 2)


@pytest.mark.parametrize("kind", ["prefix", "p-tuning", "prompt"])
def test_virtual_tokens_are_read_before_every_item_of_a_batch(
    tables: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    from fedtune.data.prompts import open_ids
    from fedtune.model.answers import continuation, continuations, log_likelihoods
    from fedtune.model.evaluate import continue_text
    from fedtune.runs.chat import attach

    adapter = {"kind": kind, "tokens": 5}
    recipe = tables | {"adapter": adapter, "override": [], "method": {"name": "fedit"}, "rounds": {"count": 1}}
    target = open_target(str(api.simulate(recipe, out=tmp_path / "run").path), base=None, watch=lambda event: None)
    base = target.speaker.base
    texts = ("the dog", "the lazy dog sleeps over", "a")
    answers = [continuation(base, text, end) for text in texts for end in (" fox", " quick brown dog")]
    prompts = [open_ids(base.tokenizer, text, special=True) for text in texts]
    with attach(target.speaker, tuned=True) as net:
        together = log_likelihoods(net, base, answers, batch=6)
        alone = [log_likelihoods(net, base, [answer], batch=1)[0] for answer in answers]
        written = continuations(net, base, prompts, new_tokens=6, batch=3)
        assert list(written) == [continue_text(net, base, ids, new_tokens=6) for ids in prompts]
    with attach(target.speaker, tuned=False) as net:
        before = log_likelihoods(net, base, answers, batch=6)
    assert together == pytest.approx(alone, abs=1e-4)
    assert max(abs(a - b) for a, b in zip(together, before, strict=True)) > 1e-3


def test_options_for_tasks_that_are_not_asked_are_refused(data: Mapping[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        score_tasks("none", ["arc", "mmul"], data=data, shots={"gsm8k": 1})
    words = str(refused.value)
    assert "--tasks: expected names among mmlu, arc, gsm8k" in words
    assert "'mmul'" in words
    assert "--data: expected a task of --tasks" in words
    assert "--shots: expected" in words


def test_targets_that_are_no_model_are_refused(
    checkpoints: dict[str, Path], data: Mapping[str, Path], tmp_path: Path
) -> None:
    files = only(data, "arc")
    with pytest.raises(ConfigError, match="a run directory, a PEFT adapter or a model"):
        score_tasks(str(tmp_path), ["arc"], data=files)
    with pytest.raises(ConfigError, match="neither a run nor an adapter; leave --base out"):
        score_tasks(str(checkpoints["llama"]), ["arc"], data=files, base="x")
    with pytest.raises(FedtuneError):
        score_tasks(str(tmp_path / "gone"), ["arc"], data=files)
