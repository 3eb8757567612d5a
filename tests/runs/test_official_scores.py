"""lm-eval's scores beside our quick ones: from the package where it is installed, and as recorded from it.

`lm_eval_scores.json` holds lm-eval 0.4.13's score of each of 200 generated questions by stories260k, as a string of
zeros and ones: `python -m tests.runs.test_official_scores MODEL` writes it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from fedtune import api
from fedtune.errors import ConfigError, ExtraError
from fedtune.evaluation.tasks import TASKS, load
from fedtune.rounds.events import Note
from fedtune.runs import official_scores, task_scores
from fedtune.runs.official_scores import columns, in_file_order, score_officially
from fedtune.runs.task_scores import score_tasks
from tests.evaluation.conftest import arc_row, gsm8k_row, mmlu_row, rows, write
from tests.evaluation.generated_items import SHOTS, write_items

RECORDED = Path(__file__).with_name("lm_eval_scores.json")
NAMES = ("mmlu", "arc")
COUNTS = {"mmlu": SHOTS, "arc": 0}
needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="needs the extra eval: pip install 'fedtune[eval]'"
)
warns = pytest.mark.filterwarnings("ignore")


def values_of(module: Any, score: Any, source: Path, data: Mapping[str, Path], **options: Any) -> dict[str, Any]:
    """Return every item's score by task and measure, as the module counts them."""
    seen: dict[str, Any] = {}
    plain = module.result

    def result(part: Any, values: Mapping[str, Any], new_tokens: int) -> Any:
        seen[part.asked.task.name] = values["base"]
        return plain(part, values, new_tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "result", result)
        score(str(source), NAMES, data=data, shots=COUNTS, **options)
    return seen


def bits(values: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, str]]:
    return {
        task: {measure: "".join(str(int(hit)) for hit in hits) for measure, hits in own.items()}
        for task, own in values.items()
    }


def quick_bits(source: Path, folder: Path, items: int) -> dict[str, dict[str, str]]:
    return bits(values_of(task_scores, score_tasks, source, write_items(folder, items=items)))


@pytest.mark.parametrize("items", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_quick_scores_are_lm_evals_item_by_item(stories: Path, tmp_path: Path, items: int) -> None:
    recorded = json.loads(RECORDED.read_text())
    wanted = {task: {m: hits[:items] for m, hits in own.items()} for task, own in recorded["scores"].items()}
    assert {len(hits) for own in recorded["scores"].values() for hits in own.values()} == {200}
    assert quick_bits(stories, tmp_path, items) == wanted


@pytest.mark.slow
@needs_lm_eval
@warns
def test_lm_eval_itself_scores_as_it_is_recorded(stories: Path, tmp_path: Path) -> None:
    files = write_items(tmp_path)
    official = bits(values_of(official_scores, score_officially, stories, files))
    assert official == json.loads(RECORDED.read_text())["scores"]


@pytest.mark.slow
@needs_lm_eval
@warns
def test_a_run_is_exported_and_scored_before_and_after(ran: api.Run, tmp_path: Path) -> None:
    files = write_items(tmp_path, items=6)
    official = score_officially(str(ran.path), ["arc"], data={"arc": files["arc"]})
    quick = score_tasks(str(ran.path), ["arc"], data={"arc": files["arc"]})
    assert official["quick"] is False
    assert official["tasks"]["arc"]["measures"] == quick["tasks"]["arc"]["measures"]
    adapter = score_officially(str(ran.adapter), ["arc"], data={"arc": files["arc"]})
    assert adapter["tasks"] == official["tasks"]


@pytest.mark.slow
@needs_lm_eval
@warns
def test_items_that_lm_eval_cuts_are_counted(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    file = write(tmp_path / "arc.jsonl", arc_row(1), arc_row(2, question="the dog " * 99))
    notes: list[Any] = []
    scores = score_officially(str(checkpoints["llama"]), ["arc"], data={"arc": file}, watch=notes.append)
    assert scores["tasks"]["arc"]["cut"] == 1
    assert Note("arc: 1 items are longer than 128 tokens: lm-eval cuts them") in notes


def test_without_lm_eval_it_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(official_scores, "version", missing)
    with pytest.raises(ExtraError, match=r"the package lm-eval; install the extra: pip install 'fedtune\[eval\]'"):
        score_officially("none", ["arc"], data={})


def test_names_are_refused_before_lm_eval_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(official_scores, "version", lambda name: "0")
    with pytest.raises(ConfigError, match="expected names among"):
        score_officially("none", ["arcs"], data={})


def test_rows_are_written_with_the_columns_that_lm_eval_reads() -> None:
    [mmlu, arc, gsm8k] = rows(
        mmlu_row(1, answer="B"),
        arc_row(1, answerKey=2),
        {"instruction": gsm8k_row(1)["question"], "output": gsm8k_row(1)["answer"], "final": 2},
    )
    assert columns("mmlu", mmlu) == mmlu_row(1)
    assert columns("arc", arc) == arc_row(1, answerKey="C")
    assert columns("gsm8k", gsm8k) == gsm8k_row(1)


def test_samples_by_subject_are_put_into_the_order_of_the_file(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", *(mmlu_row(k, "ba"[k % 2]) for k in range(4)))
    asked, _ = load(TASKS["mmlu"], data={"mmlu": tmp_path}, shots=0)
    samples = {
        "mmlu_b": [{"doc_id": 1, "acc": 0.0}, {"doc_id": 0, "acc": 1.0}],
        "mmlu_a": [{"doc_id": 0, "acc": 0.0}, {"doc_id": 1, "acc": 1.0}],
    }
    assert in_file_order(asked, samples) == {"acc": [1.0, 0.0, 0.0, 1.0]}


def test_generated_answers_are_read_by_filter(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", gsm8k_row(1), gsm8k_row(2))
    asked, _ = load(TASKS["gsm8k"], data={"gsm8k": tmp_path}, shots=0)
    samples = {
        "gsm8k": [
            {"doc_id": number, "filter": name, "exact_match": float(name == "flexible-extract" and number)}
            for name in ("strict-match", "flexible-extract")
            for number in (1, 0)
        ]
    }
    assert in_file_order(asked, samples) == {"strict": [0.0, 0.0], "flexible": [0.0, 1.0]}


if __name__ == "__main__":
    with TemporaryDirectory() as scratch:
        given = values_of(official_scores, score_officially, Path(sys.argv[1]), write_items(Path(scratch)))
    recorded = {"package": f"lm-eval {official_scores.lm_eval_version()}", "scores": bits(given)}
    RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")
