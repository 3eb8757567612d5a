from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import fedtune
from fedtune import api
from fedtune.errors import ConfigError
from fedtune.evaluation.intervals import Estimate, Z
from fedtune.runs.own_scores import client_task, exponential, loss_task
from fedtune.runs.task_scores import score_tasks
from tests.evaluation.conftest import arc_row, write

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def scored(run: Path, *names: str, **options: Any) -> Any:
    return score_tasks(str(run), names, **{"data": {}, **options})["tasks"]


def test_the_loss_is_that_of_the_runs_own_evaluation(ran: api.Run) -> None:
    task = scored(ran.path, "loss")["loss"]
    plain: Any = fedtune.evaluate(ran.path)
    for view in ("before", "after"):
        measures = {name: measure[view]["value"] for name, measure in task["measures"].items()}
        assert measures["loss"] == pytest.approx(plain[view]["loss"], rel=1e-6)
        assert measures["perplexity"] == pytest.approx(plain[view]["perplexity"], rel=1e-6)
        assert measures["bits_per_char"] == pytest.approx(plain[view]["bits_per_character"], rel=1e-6)
    assert (task["items"], task["tokens"]) == (plain["after"]["examples"], plain["after"]["tokens"])
    change = task["measures"]["loss"]["difference"]
    assert change["value"] == pytest.approx(plain["after"]["loss"] - plain["before"]["loss"], rel=1e-5)


def test_every_client_is_scored_as_in_the_summary(ran: api.Run) -> None:
    task = scored(ran.path, "clients")["clients"]
    for view in ("before", "after"):
        losses = {name: scores["loss"] for name, scores in ran.summary[view]["held_out"].items()}
        assert {name: own[view] for name, own in task["clients"].items()} == pytest.approx(losses, rel=1e-5)
        assert task["measures"]["mean loss"][view]["value"] == pytest.approx(sum(losses.values()) / 3, rel=1e-5)
        assert task["measures"]["worst tenth"][view]["value"] == pytest.approx(max(losses.values()), rel=1e-5)
    assert scored(ran.path, "clients")["clients"] == task  # the bootstrap is drawn from the run's seed


def test_answers_are_scored_as_in_the_runs_own_evaluation(tables: dict[str, Any], tmp_path: Path) -> None:
    words = ["the dog", "the quick fox", "the lazy dog", "a fox"]
    rows = [{"instruction": f"what {k}", "output": words[k % 4], "who": f"c{k % 2}"} for k in range(16)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": str(source), "split": {"kind": "key", "by": "who"}, "template": "plain", "held_out": 0.25}
    evaluate = {"generate": 4, "new_tokens": 6}
    run = fedtune.simulate(tables | {"data": data, "evaluate": evaluate, "override": []}, out=tmp_path / "run")
    task = scored(run.path, "rouge", new_tokens=6)["rouge"]
    after = run.summary["after"]["test"]
    assert task["items"] == after["generated"]
    assert task["measures"]["rouge_l"]["after"]["value"] == pytest.approx(after["rouge_l"])
    assert task["measures"]["exact_match"]["after"]["value"] == pytest.approx(after["exact_match"])


def test_own_tasks_and_benchmarks_share_one_base(ran: api.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedtune.runs import chat

    def load_base(*arguments: Any) -> Any:
        raise AssertionError("loaded twice")

    monkeypatch.setattr(chat, "load_base", load_base)
    file = write(tmp_path / "arc.jsonl", arc_row(1))
    tasks = scored(ran.path, "loss", "arc", "clients", data={"arc": file}, limit=2)
    assert list(tasks) == ["loss", "arc", "clients"]
    assert tasks["loss"]["items"] == 2


def test_other_test_data_may_be_named(ran: api.Run, tmp_path: Path) -> None:
    file = write(tmp_path / "other.jsonl", {"text": "the lazy dog sleeps"}, {"text": "the quick fox"})
    assert scored(ran.path, "loss", data={"loss": file})["loss"]["items"] == 2


def test_what_has_no_rows_of_its_own_is_refused(
    ran: api.Run, checkpoints: dict[str, Path], tables: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"--tasks loss: expected a run directory; got .*ask benchmarks"):
        scored(checkpoints["llama"], "loss")
    with pytest.raises(ConfigError, match="none with --tasks clients"):
        scored(ran.path, "clients", base="other")
    files = {"loss": tmp_path / "a.jsonl", "rouge": tmp_path / "b.jsonl"}
    with pytest.raises(ConfigError, match="one file of test data for loss and rouge"):
        scored(ran.path, "loss", "rouge", data=files)
    with pytest.raises(ConfigError, match="one file of test data"):
        scored(ran.path, "clients", data={"clients": tmp_path / "a.jsonl"})
    tables["data"]["held_out"] = 0.0
    run = fedtune.simulate(tables | {"rounds": {"count": 1}}, out=tmp_path / "none")
    with pytest.raises(ConfigError, match="clients that hold out rows"):
        scored(run.path, "clients")
    with pytest.raises(ConfigError, match=r"data.test: expected test examples; got none; give --data loss=FILE"):
        scored(run.path, "loss")


def test_a_loss_task_by_hand() -> None:
    from fedtune.data.encode import Example

    example = Example(None, None, 8, "", "", 0)  # type: ignore[arg-type]
    task = loss_task([example, example], {"before": [(4.0, 2), (8.0, 2)], "after": [(2.0, 2), (6.0, 2)]}, 9)
    assert task["measures"]["loss"]["before"]["value"] == 3
    assert task["measures"]["loss"]["difference"]["value"] == -1
    assert task["measures"]["loss"]["difference"]["stderr"] == 0
    assert task["measures"]["bits_per_char"]["before"]["value"] == pytest.approx(12 / math.log(2) / 16)
    assert task["measures"]["perplexity"]["after"]["value"] == pytest.approx(math.exp(2))
    assert (task["rows"], task["items"], task["tokens"]) == (9, 2, 4)


def test_the_worst_tenth_of_clients_by_hand() -> None:
    before = {f"c{k:02}": [(float(k), 1)] for k in range(20)}
    after = {name: [(total / 2, count)] for name, [(total, count)] in before.items()}
    task = client_task({"before": before, "after": after}, seed=0)
    worst = task["measures"]["worst tenth"]
    assert (worst["before"]["value"], worst["after"]["value"], worst["before"]["items"]) == (18.5, 9.25, 2)
    mean = task["measures"]["mean loss"]
    assert (mean["before"]["value"], mean["difference"]["value"]) == (9.5, -4.75)
    assert mean["before"]["low"] < 9.5 < mean["before"]["high"]
    alone = client_task({"before": {"a": [(1.0, 2)]}, "after": {"a": [(1.0, 2)]}}, seed=0)
    assert "worst tenth" not in alone["measures"]


def test_the_interval_of_a_perplexity_is_that_of_its_loss() -> None:
    estimate = exponential(Estimate(2.0, 0.1, 2 - 0.1 * Z, 2 + 0.1 * Z, 5))
    assert estimate.low == pytest.approx(math.exp(2 - 0.1 * Z))
    assert estimate.stderr == pytest.approx(0.1 * math.exp(2))
    assert exponential(Estimate(1e6, None, None, None, 1)).value == pytest.approx(math.exp(700))
