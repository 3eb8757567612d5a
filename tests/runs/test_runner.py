from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.client.perform import perform
from fedtune.config import bind
from fedtune.errors import ConfigError, StoreError
from fedtune.report.reader import read_run
from fedtune.rounds.events import Event, Note, RoundFinished, Watch
from fedtune.runs import local
from fedtune.runs import runner as conducting
from fedtune.runs.local import Experiment, prepare, run_context, transport
from fedtune.runs.runner import check_results, check_resumable, resume_command, run_recipe
from fedtune.store import peft
from fedtune.store.run_directory import write_recipe

# peft asks transformers by a name that transformers is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def conducted(
    prepared: Experiment, run: Path, watch: Watch = lambda event: None, *, resume: bool = False
) -> Mapping[str, Any]:
    with transport(prepared) as engine:
        return run_recipe(run_context(prepared), run, engine, resume=resume, watch=watch)


@pytest.fixture
def prepared(tables: dict[str, Any]) -> Experiment:
    return prepare(bind(tables))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    write_recipe(folder, "name = 'tiny'")
    return folder


def lines(run: Path) -> list[Mapping[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def told(run: Path) -> Mapping[str, Any]:
    summary: Mapping[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def stopped_in(round: int, error: BaseException) -> Callable[..., Any]:
    def tired(base: Any, examples: Any, assignment: Any, **options: Any) -> Any:
        if assignment.round == round:
            raise error
        return perform(base, examples, assignment, **options)

    return tired


@pytest.mark.parametrize(("every", "scored"), [(0, [0, 3]), (2, [0, 2, 3]), (1, [0, 1, 2, 3])])
def test_the_test_data_are_scored_as_often_as_asked_and_at_both_ends(
    every: int, scored: list[int], tables: dict[str, Any], run: Path
) -> None:
    tables["evaluate"] |= {"every": every}
    tables["rounds"] = {"count": 3}
    summary = conducted(prepare(bind(tables)), run)
    assert [line["round"] for line in lines(run) if line["test"] is not None] == scored
    assert [line["round"] for line in lines(run) if line["held_out"]] == [0, 3]
    assert summary["after"]["test"] == lines(run)[-1]["test"]


def test_a_round_is_told_only_once_it_is_on_the_disk(prepared: Experiment, run: Path) -> None:
    written = []

    def watch(event: Event) -> None:
        if isinstance(event, RoundFinished):
            at = json.loads((run / "adapter" / "fedtune.json").read_text())["round"] if event.record["round"] else None
            written.append((event.record["round"], len(lines(run)), at))

    conducted(prepared, run, watch)
    assert written == [(0, 1, None), (1, 2, 1), (2, 3, 2)]


def test_the_summary_adds_up(prepared: Experiment, run: Path) -> None:
    summary = conducted(prepared, run)
    # hidden 32, four heads and two for keys and values: q_proj is 32 x 32, v_proj 16 x 32; two layers, rank 8
    assert summary["trainable"] == 8 * 2 * ((32 + 32) + (16 + 32))
    assert summary["bytes_up"] == sum(client["bytes_up"] for client in summary["clients"].values())
    _, _, origin = peft.read(run / "adapter")
    assert origin["bytes_up"] == summary["bytes_up"]
    assert origin["clients"]["client-2"] == {"examples": 6, "rank": 8}
    assert summary["adapter_digest"] == peft.digest(run / "adapter")


@pytest.mark.parametrize("round", [1, 2])
def test_ctrl_c_in_the_middle_of_a_round_leaves_what_can_be_read(
    round: int, prepared: Experiment, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "perform", stopped_in(round, KeyboardInterrupt()))
    events: list[Event] = []
    with pytest.raises(KeyboardInterrupt):
        conducted(prepared, run, events.append)
    left = read_run(run)
    assert (left.state, [each.round for each in left.rounds]) == ("interrupted", list(range(round)))
    assert (told(run)["reason"], told(run)["rounds"]) == ("Ctrl-C", round - 1)
    assert (run / "adapter").exists() is (round == 2)
    assert isinstance(events[-1], Note)
    assert f"stopped after round {round - 1}" in events[-1].text


def test_a_full_disk_is_told_even_if_the_summary_no_longer_fits(
    prepared: Experiment, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise StoreError(f"{arguments[0].name}: full")

    monkeypatch.setattr(peft, "write", full)
    monkeypatch.setattr(conducting, "write_summary", full)
    with pytest.raises(StoreError, match="adapter: full"):
        conducted(prepared, run)
    assert [line["round"] for line in lines(run)] == [0]
    assert not (run / "summary.json").exists()


def same(run: Path, other: Path) -> bool:
    """Tell whether two runs came to the same states, the same adapter and the same scores."""
    ends = [
        [(each["state_digest"], each["test"], each["modules"]) for each in lines(folder)] for folder in (run, other)
    ]
    return ends[0] == ends[1] and peft.digest(run / "adapter") == peft.digest(other / "adapter")


@pytest.mark.parametrize("round", [1, 2])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    round: int, prepared: Experiment, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe(tmp_path / "whole", "")
    conducted(prepared, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(local, "perform", stopped_in(round, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            conducted(prepared, run)
    summary = conducted(prepared, run, resume=True)
    assert same(run, tmp_path / "whole")
    assert (summary["state"], summary["rounds"]) == ("finished", 2)
    assert summary["bytes_up"] == told(tmp_path / "whole")["bytes_up"]


def test_a_finished_run_goes_on_for_more_rounds_and_cannot_go_back(
    prepared: Experiment, run: Path, tmp_path: Path
) -> None:
    longer = replace(prepared, recipe=replace(prepared.recipe, rounds=replace(prepared.recipe.rounds, count=3)))
    write_recipe(tmp_path / "whole", "")
    conducted(longer, tmp_path / "whole")
    conducted(prepared, run)
    assert conducted(prepared, run, resume=True)["rounds"] == 2  # nothing was left to do
    conducted(longer, run, resume=True)
    assert [line["state_digest"] for line in lines(run)] == [line["state_digest"] for line in lines(tmp_path / "whole")]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"rounds.count: expected at least 3, the rounds that have begun; got 2"):
        conducted(prepared, run, resume=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_beside_its_writer_is_left_alone(prepared: Experiment, run: Path) -> None:
    longer = replace(prepared, recipe=replace(prepared.recipe, rounds=replace(prepared.recipe.rounds, count=9)))

    def watch(event: Event) -> None:
        if isinstance(event, RoundFinished) and event.record["round"] == 1:
            before = (run / "recipe.toml").read_text()
            with pytest.raises(StoreError, match="no other process writes it"):
                conducted(longer, run, resume=True)
            assert (run / "recipe.toml").read_text() == before

    conducted(prepared, run, watch)


def test_a_run_killed_before_anything_was_noted_starts(prepared: Experiment, run: Path) -> None:
    check_resumable(run, replace(prepared.recipe, seed=7))
    assert conducted(prepared, run, resume=True)["rounds"] == 2


def test_a_changed_or_missing_adapter_is_written_again_from_the_state(prepared: Experiment, run: Path) -> None:
    right = conducted(prepared, run)["adapter_digest"]
    adapter, saved, origin = peft.read(run / "adapter")
    double = {name: replace(factors, b=2 * factors.b) for name, factors in adapter.items()}
    peft.write(run / "adapter", double, saved, run_context(prepared).target, origin)
    with pytest.raises(StoreError, match="expected the adapter of round 2's state"):
        check_results(run)
    assert conducted(prepared, run, resume=True)["adapter_digest"] == right
    check_results(run)
    shutil.rmtree(run / "adapter")
    with pytest.raises(StoreError, match="expected the adapter of round 2; got none"):
        check_results(run)
    assert conducted(prepared, run, resume=True)["adapter_digest"] == right


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "rounds.jsonl").unlink(), "up to round 2; got them up to -1"),
        (lambda run: cut(run / "rounds.jsonl"), "up to round 2; got them up to 1"),
        (lambda run: edit(run / "recipe.toml", "steps = 3", "steps = 4"), r"recipe.toml: .*client.steps: 3 -> 4"),
        (
            lambda run: edit(run / "adapter" / "fedtune.json", '"round": 2', '"round": 1'),
            "expected the adapter of round 2",
        ),
    ],
)
def test_what_was_taken_away_or_changed_is_found(
    spoil: Callable[[Path], Any], message: str, prepared: Experiment, run: Path
) -> None:
    conducted(prepared, run)
    check_results(run)
    spoil(run)
    with pytest.raises(StoreError, match=message):
        check_results(run)


def cut(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def edit(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_lines_that_are_gone_are_not_written_anew(prepared: Experiment, run: Path) -> None:
    conducted(prepared, run)
    (run / "rounds.jsonl").unlink()
    with pytest.raises(StoreError, match="expected the lines of 2 rounds; got none"):
        conducted(prepared, run, resume=True)
    assert not (run / "rounds.jsonl").exists()


def test_a_run_may_go_on_where_the_data_are_not_known(prepared: Experiment, run: Path) -> None:
    """As on a server, over the same clients."""
    conducted(prepared, run)
    events: list[Event] = []
    with transport(prepared) as engine:
        run_recipe(
            replace(run_context(prepared), data="", door="flower"), run, engine, resume=True, watch=events.append
        )
    assert any(isinstance(event, Note) and "is not checked" in event.text for event in events)
    conducted(prepared, run, resume=True)


def test_a_run_goes_on_with_the_recipe_it_was_begun_with_only(prepared: Experiment, run: Path) -> None:
    conducted(prepared, run)
    check_resumable(run, prepared.recipe)
    check_resumable(run, replace(prepared.recipe, rounds=replace(prepared.recipe.rounds, count=9)))
    check_resumable(run, replace(prepared.recipe, engine=replace(prepared.recipe.engine, name="processes", workers=2)))
    other = replace(prepared.recipe, seed=5, client=replace(prepared.recipe.client, learning_rate=1.0))
    with pytest.raises(ConfigError, match="2 faults") as error:
        check_resumable(run, other)
    assert "client.learning_rate: 0.05 -> 1.0" in str(error.value)
    assert "seed: 0 -> 5" in str(error.value)


@pytest.mark.parametrize("what", ["data", "base"])
def test_a_run_does_not_go_on_over_other_data_or_another_base(what: str, prepared: Experiment, run: Path) -> None:
    conducted(prepared, run)
    now = run_context(prepared)
    now = replace(now, data="other") if what == "data" else replace(now, base={**now.base, "digest": "other"})
    with transport(prepared) as engine, pytest.raises(ConfigError, match=r"what the run was begun with \(digest"):
        run_recipe(now, run, engine, resume=True, watch=lambda event: None)


def test_other_versions_are_noted(prepared: Experiment, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conducted(prepared, run)
    monkeypatch.setattr(conducting, "versions", lambda: {"python": "9.9"})
    events: list[Event] = []
    conducted(prepared, run, events.append, resume=True)
    assert any(isinstance(event, Note) and "now python 9.9" in event.text for event in events)


def test_the_command_that_goes_on_can_be_pasted() -> None:
    assert resume_command("simulate", Path("runs/my run")) == "fedtune simulate --resume 'runs/my run'"
    expected = '\'recipe="/store/notes/recipe.toml" store="/store" resume="notes"\''
    assert resume_command("flower", Path("/store/notes")) == f"flwr run . --run-config {expected}"
