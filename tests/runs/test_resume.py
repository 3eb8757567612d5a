from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.config import bind, render
from fedtune.errors import ConfigError, StoreError
from fedtune.methods import serialization
from fedtune.planning.arms import AdaptiveSettings
from fedtune.rounds import loop
from fedtune.rounds.aggregation import Aggregated, aggregate
from fedtune.rounds.events import Event, Note
from fedtune.rounds.record import RoundRecord
from fedtune.runs import context as contexts
from fedtune.runs import recording, resume
from fedtune.runs.local import Experiment, run_context, transport
from fedtune.runs.resume import (
    as_started,
    check_resumable,
    read_options,
    resume_command,
    started_with,
    write_options,
)
from fedtune.runs.runner import run_recipe
from fedtune.runs.verification import check_results
from fedtune.store.round_records import append_round
from fedtune.store.run_directory import write_recipe
from fedtune.store.run_journal import RunJournal
from tests.runs.conftest import read_lines, run_prepared, same_ends

# peft asks transformers by a name that transformers is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def test_a_finished_run_goes_on_for_more_rounds_and_cannot_go_back(
    prepared: Experiment, run: Path, tmp_path: Path
) -> None:
    longer = replace(prepared, recipe=replace(prepared.recipe, rounds=replace(prepared.recipe.rounds, count=3)))
    write_recipe(tmp_path / "whole", "")
    run_prepared(longer, tmp_path / "whole")
    run_prepared(prepared, run)
    assert run_prepared(prepared, run, resume=True)["rounds"] == 2  # nothing was left to do
    run_prepared(longer, run, resume=True)
    assert [line["state_digest"] for line in read_lines(run)] == [
        line["state_digest"] for line in read_lines(tmp_path / "whole")
    ]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"rounds.count: expected at least 3, the rounds that have begun; got 2"):
        run_prepared(prepared, run, resume=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_schedule_over_rounds_is_not_stretched_in_the_middle(prepared: Experiment, run: Path, tmp_path: Path) -> None:
    recipe = prepared.recipe
    falling = replace(recipe, rounds=replace(recipe.rounds, schedule="linear", warmup=0, final_rate=0.5))
    run_prepared(replace(prepared, recipe=falling), run)
    assert [line.get("rate_share", 1.0) for line in read_lines(run)] == [1.0, 1.0, 0.5]
    check_resumable(run, falling)
    longer = replace(falling, rounds=replace(falling.rounds, count=3))
    with pytest.raises(ConfigError, match=r"rounds.count: expected 2, by which rounds.schedule = 'linear' has set"):
        check_resumable(run, longer)


def test_lines_that_are_gone_are_not_written_anew(prepared: Experiment, run: Path) -> None:
    run_prepared(prepared, run)
    (run / "rounds.jsonl").unlink()
    with pytest.raises(StoreError, match="expected the lines of 2 rounds; got none"):
        run_prepared(prepared, run, resume=True)
    assert not (run / "rounds.jsonl").exists()


def test_a_run_may_be_resumed_where_the_data_are_not_known(prepared: Experiment, run: Path) -> None:
    """As on a server, over the same clients."""
    run_prepared(prepared, run)
    events: list[Event] = []
    with transport(prepared) as engine:
        run_recipe(
            replace(run_context(prepared), data="", door="flower"), run, engine, resume=True, watch=events.append
        )
    assert any(isinstance(event, Note) and "is not checked" in event.text for event in events)
    run_prepared(prepared, run, resume=True)


def test_a_run_is_resumed_with_the_recipe_of_its_start_only(prepared: Experiment, run: Path) -> None:
    run_prepared(prepared, run)
    check_resumable(run, prepared.recipe)
    check_resumable(run, replace(prepared.recipe, rounds=replace(prepared.recipe.rounds, count=9)))
    check_resumable(run, replace(prepared.recipe, engine=replace(prepared.recipe.engine, name="processes", workers=2)))
    # Left to the device, the number format is the one that the run began with; a base may be pinned on the way.
    auto = replace(prepared.recipe, model=replace(prepared.recipe.model, dtype="auto", digest="0" * 64))
    assert as_started(run, auto).model.dtype == "float32"
    check_resumable(run, as_started(run, auto))
    other = replace(prepared.recipe, seed=5, client=replace(prepared.recipe.client, learning_rate=1.0))
    with pytest.raises(ConfigError, match="2 faults") as error:
        check_resumable(run, other)
    assert "client.learning_rate: 0.05 -> 1.0" in str(error.value)
    assert "seed: 0 -> 5" in str(error.value)


@pytest.mark.parametrize("name", ["fedit", "flora"])
def test_a_run_goes_on_in_the_number_format_that_it_began_with(
    name: str, tables: dict[str, Any], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = bind({**tables, "method": name, "override": []})
    began = bind({**tables, "method": {"name": name, "wire_dtype": "bf16"}, "override": []})
    method: Any = recipe.method
    assert method.wire_dtype == "int8"
    # Releases before 0.3.0 wrote the key out; without it, it is what they did.
    for text in (render(began), render(began).replace('wire_dtype = "bf16"\n', "")):
        monkeypatch.setattr(resume, "has_begun", lambda run: True)
        monkeypatch.setattr(RunJournal, "inputs", staticmethod(lambda run, text=text: {"recipe": text}))
        for resumed in (started_with(run, None), as_started(run, recipe)):
            assert getattr(resumed.method, "wire_dtype", None) == "bf16"
        check_resumable(run, as_started(run, recipe))
        other = replace(recipe, method=replace(method, wire_dtype="int4"))
        with pytest.raises(ConfigError, match=r'method\.wire_dtype: "bf16" -> "int4"'):
            check_resumable(run, as_started(run, other))


def test_a_run_of_an_earlier_release_goes_on_with_its_arms_and_its_ramp(
    tables: dict[str, Any], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As 0.2.0 wrote it: every key that it had, and none of those that came later."""
    name = {"planner": {"name": "deadline"}, "pruning": {}, "method": "flora", "override": []}
    old = render(bind({**tables, **name, "planner": {"name": "deadline", "ratios": [0, 0.5], "ranks": [2, 4]}}))
    text = old.replace('goal = "auto"\n', "")
    assert "tops" not in text
    assert "ramp = 0.8" in text
    monkeypatch.setattr(resume, "has_begun", lambda run: True)
    monkeypatch.setattr(RunJournal, "inputs", staticmethod(lambda run: {"recipe": text}))
    recipe = bind({**tables, **name})
    for resumed in (started_with(run, None), as_started(run, recipe), as_started(run, bind(text))):
        planner, pruning = resumed.planner, resumed.pruning
        assert isinstance(planner, AdaptiveSettings)
        assert pruning is not None
        assert (planner.ratios, planner.ranks) == ((0, 0.5), (2, 4))
        assert (planner.tops, planner.backs, planner.shares) == ((1.0,), (0.0,), (1.0,))
        assert (pruning.floor, pruning.ramp) == ("ramp", 0.8)
        check_resumable(run, resumed)
    other = bind({**tables, **name, "planner": {"name": "deadline", "tops": [0.5]}})
    with pytest.raises(ConfigError, match=r"planner\.tops"):
        check_resumable(run, as_started(run, other))
    # A run of this release says of itself what it does.
    monkeypatch.setattr(RunJournal, "inputs", staticmethod(lambda run: {"recipe": render(recipe)}))
    assert as_started(run, recipe) == recipe


@pytest.mark.parametrize("what", ["data", "base"])
def test_a_run_is_not_resumed_over_other_data_or_another_base(what: str, prepared: Experiment, run: Path) -> None:
    run_prepared(prepared, run)
    now = run_context(prepared)
    now = replace(now, data="other") if what == "data" else replace(now, base={**now.base, "digest": "other"})
    with transport(prepared) as engine, pytest.raises(ConfigError, match=r"what the run was started with \(digest"):
        run_recipe(now, run, engine, resume=True, watch=lambda event: None)


def test_other_versions_are_noted(prepared: Experiment, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_prepared(prepared, run)
    monkeypatch.setattr(contexts, "versions", lambda: {"python": "9.9"})
    events: list[Event] = []
    run_prepared(prepared, run, events.append, resume=True)
    assert any(isinstance(event, Note) and "now python 9.9" in event.text for event in events)


def test_the_resume_command_can_be_pasted() -> None:
    assert resume_command("simulate", Path("runs/my run")) == "fedtune simulate --resume 'runs/my run'"
    assert resume_command("link", Path("runs/x")) == "fedtune serve --resume runs/x"
    expected = '\'recipe="/store/notes/recipe.toml" store="/store" resume="notes"\''
    assert resume_command("flower", Path("/store/notes")) == f"flwr run . --run-config {expected}"


def test_the_resume_command_of_a_served_run_names_its_server_s_own_file(tmp_path: Path) -> None:
    (tmp_path / "link").mkdir()
    write_options(tmp_path, ["--config", "/etc/my server.toml", "--set", 'link.listen="0.0.0.0:9"'])
    command = resume_command("link", tmp_path)
    assert shlex.split(command) == ["fedtune", "serve", "--resume", str(tmp_path), *read_options(tmp_path)]
    assert "--config '/etc/my server.toml'" in command
    for content in (b"\xff", b"{}", b"[1]", b"[" * 100_000, b""):
        (tmp_path / "link" / "options").write_bytes(content)
        assert resume_command("link", tmp_path) == f"fedtune serve --resume {tmp_path}"


def test_a_run_that_an_earlier_release_left_with_an_infinite_state_goes_on_if_its_round_can_be_done_again(
    prepared: Experiment, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe(tmp_path / "whole", "")
    run_prepared(prepared, tmp_path / "whole")

    def unchecked(context: Any, request: Any, state: Any, updates: Any, norms: Any) -> Aggregated:
        after = aggregate(context, request, state, updates, norms).state
        if after.round == 2:
            after = replace(after, delta={name: np.full_like(value, np.inf) for name, value in after.delta.items()})
        with monkeypatch.context() as earlier:
            earlier.setattr(serialization, "count_not_finite", lambda tensor: 0)
            return Aggregated(after, serialization.encode(after))

    def decomposed(path: Path, record: RoundRecord) -> None:
        if record.round == 2:
            raise np.linalg.LinAlgError("SVD did not converge")
        append_round(path, record)

    with monkeypatch.context() as earlier:
        earlier.setattr(loop, "aggregate", unchecked)
        # That release took singular values between a round's commit and its line.
        earlier.setattr(recording, "append_round", decomposed)
        with pytest.raises(np.linalg.LinAlgError):
            run_prepared(prepared, run)
    run_prepared(prepared, run, resume=True)
    assert same_ends(run, tmp_path / "whole")
    check_results(run)


def test_a_run_whose_last_state_is_not_finite_says_what_is_left_to_go_on_from(
    prepared: Experiment, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_prepared(prepared, run)
    monkeypatch.setattr(serialization, "why_not_finite", lambda data: "delta/x.s with 1 of 2 that are not")
    with pytest.raises(StoreError, match=r"finite state after round 2; got delta/x.s with 1 of 2 .*with --fresh"):
        run_prepared(prepared, run, resume=True)
    monkeypatch.setattr(RunJournal, "kept_round", property(lambda self: 1))
    monkeypatch.setattr(RunJournal, "why_not_finite", lambda self, round: "")
    with pytest.raises(StoreError, match=r'that of round 1: start another run with adapter.start = ".*/adapter"'):
        run_prepared(prepared, run, resume=True)
