"""Searches over a tiny model: budgets, journals, promotion to the bit, copies, failures, and what they leave behind."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import fedtune
from fedtune.config import Recipe, bind
from fedtune.errors import ConfigError, RoundError, StoreError
from fedtune.rounds.events import Event, Note
from fedtune.runs import search_trial
from fedtune.runs.search import plan_search, recipe_of_search, search
from fedtune.store.round_records import read_rounds
from tests.runs.conftest import Tables

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.usefixtures("unrendered"),
]
RATES = {"client.learning_rate": {"low": 0.001, "high": 0.3, "log": True}}


def searched(tables: Tables, kind: str, *, rounds: int = 4, space: Any = RATES, **keys: Any) -> Tables:
    """Return the tiny recipe with a search: of one step a round, so that a trial takes a moment."""
    table = {"kind": kind, "trials": 4, "space": space, **keys}
    rest = {key: value for key, value in copy.deepcopy(tables).items() if key not in ("override", "evaluate")}
    rest["client"] = {"steps": 1, "batch": 4, "learning_rate": 0.05}
    return {**rest, "rounds": {"count": rounds}, "search": table}


def silent(event: Event) -> None:
    pass


def run(tables: Tables, out: Path, watch: Callable[[Event], None] = silent, **keys: Any) -> Any:
    return search(bind(tables), out=out, watch=watch, **keys)


def lasting(content: Mapping[str, Any]) -> Any:
    """Return the content of a search.json without what another run of the same search does not give again."""
    return json.loads(json.dumps(content), object_hook=lambda part: {k: v for k, v in part.items() if k != "seconds"})


def digests(folder: Path) -> list[str]:
    return [record.state_digest for record in read_rounds(folder)]


def test_a_promoted_trial_is_an_uninterrupted_run_to_the_bit(tables: Tables, tmp_path: Path) -> None:
    # A schedule over all rounds: had a rung of two rounds its own, every rate would be another.
    recipe = searched(tables, "sha", rounds=3, trials=3)
    recipe["rounds"] |= {"schedule": "cosine", "warmup": 1, "cohort": 2}
    done = run(recipe, tmp_path / "s")
    best = next(row for row in done.content["trials"] if row["trial"] == done.content["best"])
    assert (best["state"], best["rounds"]) == ("finished", 3)
    assert sorted(row["rounds"] for row in done.content["trials"]) == [1, 1, 3]
    assert done.content["spent"]["client_rounds"] == (3 * 1 + 1 * 2) * 2
    alone = fedtune.simulate(done.best, out=tmp_path / "alone", watch=silent)
    trial = tmp_path / "s" / "trials" / f"{best['trial']:03d}"
    assert digests(trial) == digests(alone.path)
    assert best["state_digest"] == alone.summary["state_digest"]
    # What the result says of it are the records' own numbers.
    own = read_rounds(trial)
    assert best["bytes_up"] == sum(record.bytes_up for record in own)
    assert fedtune.api.verify(trial).committed == 3
    assert bind(done.best).search is None


VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "trained in full": {"adapter": {"rank": 4, "targets": ["q_proj"], "modules_to_save": ["norm"]}},
    "seeds": {"method": {"name": "fedkseed", "bank": "kron", "seeds": 64, "scalar_step": 1e-4, "perturbation": 1e-3}},
    "pruned": {"pruning": {"target": 0.5}, "planner": {"name": "fixed", "ratio": 0.5}},
    "momentum": {"method": {"name": "fedit", "server_optimizer": {"name": "fedavgm", "momentum": 0.5}}},
    "personal": {"personal": {"kind": "ditto"}, "method": {"name": "fedit"}},
    "asynchronous": {"asynchronous": {"buffer": 2}, "method": {"name": "fedit"}, "fleet": {"name": "phones"}},
    "learning planner": {"planner": {"name": "expgrad", "dropouts": [0.0, 0.3]}},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_trials_that_share_a_loaded_base_are_runs_of_their_own(tables: Tables, tmp_path: Path, variant: str) -> None:
    recipe = {**searched(tables, "sha", rounds=3, trials=3), **VARIANTS[variant]}
    if variant == "seeds":
        recipe.pop("adapter")
    done = run(recipe, tmp_path / "s")
    alone = fedtune.simulate(done.best, out=tmp_path / "alone", watch=silent)
    trial = tmp_path / "s" / "trials" / f"{done.content['best']:03d}"
    assert digests(trial) == digests(alone.path)
    for row in done.content["trials"]:
        assert fedtune.api.verify(tmp_path / "s" / "trials" / f"{row['trial']:03d}").committed == row["rounds"]


@pytest.mark.slow
def test_a_search_that_is_stopped_or_killed_anywhere_ends_in_the_same_table(
    tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = searched(tables, "asha", reduction=2, rounds=3, trials=3)
    whole = run(recipe, tmp_path / "whole")
    perform, left = search_trial.run_step, [2]

    def tired(*arguments: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return perform(*arguments)

    monkeypatch.setattr(search_trial, "run_step", tired)
    notes: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "cut", lambda event: notes.append(event.text) if isinstance(event, Note) else None)
    assert notes[-1] == f"stopped after 1 steps; resume with: fedtune search --resume {tmp_path / 'cut'}"
    assert json.loads((tmp_path / "cut" / "search.json").read_text())["reason"] == "stopped: Ctrl-C"
    monkeypatch.undo()
    # In the middle of a step: its run is there, its result is not in the journal.
    finish = fedtune.store.search_journal.SearchJournal.finish
    monkeypatch.setattr(
        fedtune.store.search_journal.SearchJournal, "finish", lambda *_: (_ for _ in ()).throw(OSError("cut"))
    )
    with pytest.raises(OSError, match="cut"):
        search(recipe_of_search(tmp_path / "cut"), out=tmp_path / "cut", resume=True, watch=silent)
    monkeypatch.setattr(fedtune.store.search_journal.SearchJournal, "finish", finish)
    again = search(recipe_of_search(tmp_path / "cut"), out=tmp_path / "cut", resume=True, watch=silent)
    assert lasting(again.content) == lasting(whole.content)
    # Once more, there is nothing left to do.
    last = search(recipe_of_search(tmp_path / "cut"), out=tmp_path / "cut", resume=True, watch=silent)
    assert last.content == again.content
    assert (tmp_path / "cut" / "best.toml").read_text() == (tmp_path / "whole" / "best.toml").read_text()


@pytest.mark.slow
def test_a_population_goes_on_from_a_better_model_under_its_own_settings(tables: Tables, tmp_path: Path) -> None:
    done = run(searched(tables, "pbt", interval=2), tmp_path / "s")
    copied = [row for row in done.content["trials"] if row["copied"]]
    assert len(copied) == 1
    row, (source,) = copied[0], copied[0]["copied"]
    segment = tmp_path / "s" / "trials" / f"{row['trial']:03d}-1"
    origin = tmp_path / "s" / "trials" / f"{source['trial']:03d}"
    # Up to the copy it has the other one's rounds, and from there its own.
    assert digests(segment)[:3] == digests(origin)[:3]
    assert digests(segment)[3:] != digests(origin)[3:]
    inputs = fedtune.store.run_journal.RunJournal.inputs(segment)
    assert inputs["recipe"] != bind(segment / "recipe.toml")
    assert bind(segment / "recipe.toml").client.learning_rate == row["values"]["client.learning_rate"]
    assert fedtune.api.verify(segment).committed == 4
    # Rounds that were copied were paid for once.
    assert done.content["spent"]["client_rounds"] == 4 * 4 * 3
    assert lasting(done.content) == lasting(run(searched(tables, "pbt", interval=2), tmp_path / "again").content)


@pytest.mark.slow
def test_a_trial_that_diverges_is_failed_and_never_best(tables: Tables, tmp_path: Path) -> None:
    recipe = searched(tables, "grid", trials=None, rounds=2, space={"client.learning_rate": [0.01, 1e30]})
    recipe["client"] |= {"optimizer": "sgd", "clip_norm": "none"}
    recipe["rounds"] |= {"max_norm": "none", "norm_cap": "none"}
    done = run(recipe, tmp_path / "s")
    first, last = done.content["trials"]
    assert (first["trial"], first["state"], done.content["best"]) == (0, "finished", 0)
    assert (last["trial"], last["state"], last["score"]) == (1, "failed", None)
    assert last["reason"]
    assert done.content["spent"]["failed"] == 1
    only = {**recipe, "search": {**recipe["search"], "space": {"client.learning_rate": [1e30, 2e30]}}}
    with pytest.raises(RoundError, match="expected a trial with a score; got 2 that failed: trial 0: "):
        run(only, tmp_path / "none")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("optuna") is None, reason="needs the extra search (optuna)")
def test_a_search_by_tpe_is_resumed_to_the_same_draws(
    tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = searched(tables, "tpe", rounds=1, trials=12)
    whole = run(recipe, tmp_path / "whole")
    perform = search_trial.run_step

    def tired(course: Any, recipe: Any, step: Any, *others: Any) -> Any:
        if step.trial == 11:
            raise KeyboardInterrupt
        return perform(course, recipe, step, *others)

    monkeypatch.setattr(search_trial, "run_step", tired)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "cut")
    monkeypatch.undo()
    again = search(recipe_of_search(tmp_path / "cut"), out=tmp_path / "cut", resume=True, watch=silent)
    assert lasting(again.content) == lasting(whole.content)
    rates = [row["values"]["client.learning_rate"] for row in whole.content["trials"]]
    assert len(set(rates)) == 12


@pytest.mark.slow
def test_other_engines_give_the_same_trials(tables: Tables, tmp_path: Path) -> None:
    recipe = searched(tables, "random", rounds=2, trials=2)
    here = run(recipe, tmp_path / "here")
    there = run({**recipe, "engine": {"name": "processes", "workers": 2}}, tmp_path / "there")
    assert [row["state_digest"] for row in here.content["trials"]] == [
        row["state_digest"] for row in there.content["trials"]
    ]


@pytest.mark.slow
def test_early_scores_are_compared_with_final_ones(tables: Tables, tmp_path: Path) -> None:
    done = run(searched(tables, "random", rounds=3, first_rung=1, trials=3), tmp_path / "s")
    (row,) = done.content["rank_correlation"]
    assert (row["rung"], row["trials"]) == (1, 3)
    assert -1 <= row["value"] <= 1
    for trial in done.content["trials"]:
        assert sorted(trial["scores"]) == ["0", "1", "3"]
        assert trial["score"] == trial["scores"]["3"]


def test_what_a_search_cannot_do_is_refused_before_anything_is_written(tables: Tables, tmp_path: Path) -> None:
    none = searched(tables, "random")
    none["data"]["held_out"] = 0.0
    with pytest.raises(ConfigError, match="rows that clients hold out, by which trials are compared; got none"):
        run(none, tmp_path / "s")
    plain = {key: value for key, value in searched(tables, "random").items() if key != "search"}
    with pytest.raises(ConfigError, match=r"search: expected the table \[search\]"):
        run(plain, tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_another_recipe_or_search_does_not_go_on_in_its_folder(tables: Tables, tmp_path: Path) -> None:
    recipe = searched(tables, "random", rounds=1, trials=1)
    run(recipe, tmp_path / "s")
    for changed, what in (
        ({**recipe, "seed": 5}, "recipe"),
        ({**recipe, "search": {**recipe["search"], "trials": 2}}, r"table \[search\]"),
    ):
        with pytest.raises(StoreError, match=f"expected the {what} that the search was begun with"):
            run(changed, tmp_path / "s", resume=True)
    with pytest.raises(StoreError, match="expected a new or an empty folder"):
        run(recipe, tmp_path / "s")
    assert run(recipe, tmp_path / "s", fresh=True).path.name == "s-2"


@pytest.mark.slow
def test_a_plan_lists_the_trials_with_their_bytes_and_trains_nothing(tables: Tables, tmp_path: Path) -> None:
    recipe = searched(tables, "sha", reduction=2, space={"adapter.rank": [2, 4, 8]}, trials=3)
    content = plan_search(bind(recipe))
    assert (content["trials"], content["rungs"], content["rounds"]) == (3, [1, 2, 4], 3 + 2 + 2)
    assert content["client_rounds"] == 7 * 3
    by_rank = {row["values"]["adapter.rank"]: row["bytes"] for row in content["rows"]}
    assert by_rank[2] < by_rank[4] < by_rank[8]
    assert content["bytes_are"] == "at most"
    # What it says is what a search then takes: exactly what is sent down, and at most what comes up.
    done = run(recipe, tmp_path / "s")
    for trial, row in zip(sorted(done.content["trials"], key=lambda one: one["trial"]), content["rows"], strict=True):
        took = trial["bytes_up"] + trial["bytes_down"]
        assert took <= (row["first_bytes"] if trial["rounds"] == 1 else row["bytes"]) < 2 * took + 20000


def test_the_command_simulate_says_that_it_ignores_the_table(tables: Tables, tmp_path: Path) -> None:
    notes: list[str] = []
    recipe = searched(tables, "random", rounds=1)
    fedtune.simulate(recipe, out=tmp_path / "r", watch=lambda e: notes.append(e.text) if isinstance(e, Note) else None)
    assert "the table [search] is ignored here; fedtune search tries what it lists" in notes
    bound: Recipe = bind(tmp_path / "r" / "recipe.toml")
    assert bound.search is not None
