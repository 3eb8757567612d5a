from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import ConfigError
from fedtune.evaluation.sandbox import Limits
from fedtune.runs.code_scores import CodeSettings, check_code, code_result
from fedtune.runs.task_scores import score_tasks
from fedtune.terminal.task_table import remarks
from tests.evaluation.conftest import humaneval_row, write

ALLOWED = CodeSettings(allowed=True, limits=Limits(confined=False))


def test_no_program_runs_without_leave(checkpoints: Mapping[str, Path], tmp_path: Path) -> None:
    file = write(tmp_path / "test.jsonl", humaneval_row())
    with pytest.raises(ConfigError, match=r"--tasks humaneval: expected --allow-code-execution.*got none"):
        score_tasks(str(checkpoints["llama"]), ["humaneval"], data={"humaneval": file})
    with pytest.raises(ConfigError, match="--tasks humaneval beside the options"):
        check_code(ALLOWED, ["arc"])
    with pytest.raises(ConfigError, match="greedy ones are all alike"):
        check_code(CodeSettings(allowed=True, samples=3, temperature=0.0), ["humaneval"])


def test_completions_of_a_model_are_run_with_their_tests(
    checkpoints: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def continuations(net: Any, base: Any, prompts: Sequence[Any], **options: Any) -> Sequence[str]:
        asked.append(options)
        return ["    return a + b", "    return a - b", "    x = bytearray(2 ** 31)"]

    monkeypatch.setattr("fedtune.model.answers.continuations", continuations)
    file = write(tmp_path / "test.jsonl", *[humaneval_row()] * 3)
    options: dict[str, Any] = {"data": {"humaneval": file}, "code": ALLOWED, "new_tokens": 16}
    scores = score_tasks(str(checkpoints["llama"]), ["humaneval"], **options)
    task = scores["tasks"]["humaneval"]
    assert (asked[0]["temperature"], asked[0]["new_tokens"]) == (0.0, 16)
    assert "\ndef" in asked[0]["stop"]
    passed = task["measures"]["pass@1"]["base"]
    assert (passed["value"], passed["items"]) == (0.5, 2)
    assert task["out_of_memory"] == {"base": 1}
    assert next(iter(remarks(scores))) == (
        "humaneval: 1 samples at temperature 0; not confined; 1 programs out of memory and not counted, 0 out of time"
    )


def test_a_model_of_random_weights_writes_no_program(checkpoints: Mapping[str, Path], tmp_path: Path) -> None:
    file = write(tmp_path / "test.jsonl", humaneval_row())
    code = CodeSettings(allowed=True, samples=2, limits=Limits(confined=False))
    options: dict[str, Any] = {"data": {"humaneval": file}, "code": code, "new_tokens": 8}
    task = score_tasks(str(checkpoints["llama"]), ["humaneval"], **options)["tasks"]["humaneval"]
    assert (task["measures"]["pass@1"]["base"]["value"], task["temperature"]) == (0.0, 0.8)


def test_pass_at_k_needs_k_samples_of_every_view_and_memory_is_no_answer() -> None:
    before: Sequence[Sequence[Any]] = [["passed"] + ["failed"] * 9, ["failed"] * 10, ["memory"] + ["passed"] * 9]
    after: Sequence[Sequence[Any]] = [["passed"] * 10, ["timeout"] * 10, ["passed"] * 10]
    result = code_result({"before": before, "after": after}, CodeSettings(samples=10))
    assert list(result["measures"]) == ["pass@1", "pass@10"]
    one, ten = result["measures"].values()
    assert one["before"]["value"] == pytest.approx((0.1 + 0 + 1) / 3)
    assert one["difference"]["value"] == pytest.approx(0.3)
    assert (ten["before"]["value"], ten["before"]["items"], ten["after"]["items"]) == (0.5, 2, 2)
    assert (result["out_of_memory"], result["timeouts"]) == ({"before": 1, "after": 0}, {"before": 0, "after": 10})
    nothing = code_result({"base": [["memory"]]}, CodeSettings())
    assert nothing["measures"] == {}
