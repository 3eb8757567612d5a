from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import StoreError
from fedtune.runs.local import Experiment, run_context
from fedtune.runs.verification import check_results
from fedtune.store import manifest, peft
from tests.runs.conftest import cut, edit, read_lines, run_prepared

# peft asks transformers by a name that transformers is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def test_a_changed_or_missing_adapter_is_written_again_from_the_state(prepared: Experiment, run: Path) -> None:
    right = run_prepared(prepared, run)["adapter_digest"]
    adapter, saved, origin = peft.read(run / "adapter")
    double = {name: replace(factors, b=2 * factors.b) for name, factors in adapter.items()}
    peft.write(run / "adapter", double, saved, run_context(prepared).target, origin)
    with pytest.raises(StoreError, match="expected the adapter of round 2's state"):
        check_results(run)
    assert run_prepared(prepared, run, resume=True)["adapter_digest"] == right
    check_results(run)
    shutil.rmtree(run / "adapter")
    with pytest.raises(StoreError, match="expected the adapter of round 2; got none"):
        check_results(run)
    assert run_prepared(prepared, run, resume=True)["adapter_digest"] == right


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "rounds.jsonl").unlink(), "up to round 2; got them up to -1"),
        (lambda run: cut(run / "rounds.jsonl"), "up to round 2; got them up to 1"),
        (lambda run: edit(run / "rounds.jsonl", read_lines(run)[1]["state_digest"], "ab" * 32), "got abababababab"),
        (lambda run: edit(run / "recipe.toml", "steps = 3", "steps = 4"), r"recipe.toml: .*client.steps: 3 -> 4"),
        (
            lambda run: manifest.write(run / "adapter", {**manifest.open_folder(run / "adapter").facts, "round": 1}),
            "expected the adapter of round 2",
        ),
        (lambda run: edit(run / "adapter" / "fedtune.json", '"round": 2', '"round": 1'), "with its own digest"),
    ],
)
def test_what_was_removed_or_changed_is_detected(
    spoil: Callable[[Path], Any], message: str, prepared: Experiment, run: Path
) -> None:
    run_prepared(prepared, run)
    check_results(run)
    spoil(run)
    with pytest.raises(StoreError, match=message):
        check_results(run)
