from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import ConfigError
from fedtune.report.compare import compare
from fedtune.report.protocols import ProtocolSettings, best_within, costs, protocol_settings, protocols
from fedtune.report.reader import read_run
from fedtune.report.spread import Spread
from tests.report.conftest import WriteRun


def spending(losses: list[float], *, bytes: int, seconds: float, joules: float | None = None, **test: Any) -> Any:
    """Rounds of these test losses; two clients, each of which is used, spends half of the bytes and all the joules."""

    def edit(lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        for line, loss in zip(lines, losses, strict=True):
            line["test"] = {"loss": loss, **{key: values[line["round"]] for key, values in test.items()}}
            line |= {"bytes_up": bytes if line["round"] else 0, "bytes_down": 0}
            line["clock_s"] = seconds * line["round"]
            template = {"status": "ok", "examples": 30, "bytes_up": bytes // 2}
            with_energy = {} if joules is None else {"joules": joules}
            line["clients"] = {f"client-{i}": {**template, **with_energy} for i in range(2)} if line["round"] else {}

    return edit


def test_by_hand_quality_under_a_budget_and_cost_to_a_target(write_run: WriteRun) -> None:
    small = spending([4.0, 3.8, 3.6, 3.5], bytes=200, seconds=60.0, joules=10.0)
    large = spending([4.0, 3.0, 3.2, 3.1], bytes=20_000, seconds=20.0, joules=4.0)
    paths = [
        write_run("a", name="small", clients=2, rounds=3, edit=small),
        write_run("b", name="large", clients=2, rounds=3, edit=large),
    ]
    found = protocols(compare(paths).groups)
    assert (found.scored_on, found.clock, found.targets) == ("test data", "devices", {0: 3.5})
    by = {part.resource: part for part in found.under_budget}
    # The least that a run spent per client: 3 rounds of 100 bytes, 60 seconds, 12 joules.
    assert {kind: part.budget for kind, part in by.items()} == {"bytes": 300.0, "seconds": 60.0, "joules": 12.0}
    assert [each.mean for each in by["bytes"].quality] == [3.5, 4.0]  # the other one can not do a single round
    assert [each.mean for each in by["seconds"].quality] == [3.8, 3.0]
    assert [each.mean for each in by["joules"].quality] == [3.8, 3.0]  # best, not last
    cost = {part.resource: part for part in found.to_target}
    assert cost["bytes"].costs == ({0: 300.0}, {0: 10_000.0})
    assert cost["seconds"].costs == ({0: 180.0}, {0: 20.0})
    assert cost["joules"].costs == ({0: 30.0}, {0: 4.0})
    assert cost["joules"].mean == (Spread(30.0, None), Spread(4.0, None))
    assert cost["bytes"].ratio[1].mean == pytest.approx(10_000 / 300)


def test_a_budget_and_a_target_of_the_readers_own(write_run: WriteRun) -> None:
    paths = [
        write_run("a0", clients=2, rounds=2, seed=0, edit=spending([4.0, 3.5, 3.0], bytes=100, seconds=1.0)),
        write_run("a1", clients=2, rounds=2, seed=1, edit=spending([4.0, 3.8, 3.6], bytes=100, seconds=1.0)),
    ]
    found = protocols(compare(paths).groups, ProtocolSettings({"bytes": 50.0}, target=3.5))
    by = {part.resource: part for part in found.under_budget}
    assert set(by) == {"bytes", "seconds"}  # no run recorded joules
    assert by["bytes"].quality[0].mean == pytest.approx(3.65)
    assert by["bytes"].quality[0].deviation == pytest.approx(0.3 / math.sqrt(2))
    (spent, _) = found.to_target
    assert spent.costs == ({0: 50.0, 1: None},)
    assert math.isnan(spent.mean[0].mean)  # a mean over the seeds that got there would flatter


def test_where_more_is_better_the_best_is_the_highest(write_run: WriteRun) -> None:
    edit = spending([4.0, 3.0, 3.1], bytes=100, seconds=1.0, accuracy=[0.25, 0.5, 0.75])
    worse = spending([4.0, 3.0, 2.9], bytes=100, seconds=1.0, accuracy=[0.25, 0.5, 0.4])
    paths = [
        write_run("a", name="a", clients=2, rounds=2, edit=edit),
        write_run("b", name="b", clients=2, rounds=2, edit=worse),
    ]
    found = protocols(compare(paths).groups, ProtocolSettings(measure="accuracy"))
    assert [each.mean for each in found.under_budget[0].quality] == [0.75, 0.5]
    assert found.targets == {0: 0.4}
    assert found.to_target[0].costs == ({0: 50.0}, {0: 50.0})


def test_what_the_records_do_not_hold_is_named_and_not_made_up(write_run: WriteRun) -> None:
    with_joules = spending([4.0, 3.0], bytes=100, seconds=1.0, joules=2.0)
    without = spending([4.0, 3.0], bytes=100, seconds=1.0)
    paths = [
        write_run("a", name="a", clients=2, rounds=1, edit=with_joules),
        write_run("b", name="b", clients=2, rounds=1, edit=without),
    ]
    groups = compare(paths).groups
    found = protocols(groups, ProtocolSettings({"joules": 5.0}))
    assert [part.resource for part in found.under_budget] == ["bytes", "seconds"]
    assert found.notes == ("a budget in joules: not every run has recorded joules",)
    unscored = protocols(groups, ProtocolSettings(measure="rouge_l"))
    assert (unscored.under_budget, unscored.to_target, unscored.targets) == ((), (), {})
    assert unscored.notes == ("rouge_l: the runs share no evaluation of it",)


def test_one_client_without_joules_leaves_a_run_without(write_run: WriteRun) -> None:
    def edit(lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        spending([4.0, 3.0], bytes=100, seconds=1.0, joules=2.0)(lines, summary)
        del lines[1]["clients"]["client-1"]["joules"]

    assert "joules" not in costs(read_run(write_run("a", clients=2, rounds=1, edit=edit)), "devices")


def test_a_client_that_failed_has_spent_what_it_says(write_run: WriteRun) -> None:
    def edit(lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        spending([4.0, 3.0], bytes=100, seconds=1.0, joules=2.0)(lines, summary)
        lines[1]["clients"]["client-1"] |= {"status": "late", "reason": "after the deadline"}

    spent = costs(read_run(write_run("a", clients=2, rounds=1, edit=edit)), "devices")
    assert spent["joules"].tolist() == [0.0, 2.0]


def test_without_a_devices_clock_seconds_are_this_machines(write_run: WriteRun) -> None:
    paths = [write_run("a", clients=2, rounds=2, edit=spending([4.0, 3.0, 2.0], bytes=100, seconds=0.0))]
    found = protocols(compare(paths).groups)
    assert found.clock == "this machine"
    assert {part.resource: part.budget for part in found.under_budget}["seconds"] == pytest.approx(4.5)


def test_the_clients_rows_stand_in_for_test_data_that_one_run_lacks(write_run: WriteRun) -> None:
    def untested(lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        for line in lines:
            line["test"] = None

    paths = [write_run("a", name="a", clients=2), write_run("b", name="b", clients=2, edit=untested)]
    assert protocols(compare(paths).groups).scored_on == "clients' held-out rows"


def test_a_recipe_whose_clock_is_of_a_larger_model_is_named(write_run: WriteRun) -> None:
    path = write_run("a", name="larger", clients=2)
    recipe = path / "recipe.toml"
    recipe.write_text(recipe.read_text() + '[fleet]\nname = "phones"\nproxy = "llama-7b"\n')
    (note,) = protocols(compare([path, write_run("b", name="own", clients=2)]).groups).notes
    assert note.startswith("larger: bytes are those of the model that was trained")


def test_a_seed_without_a_target_is_named(write_run: WriteRun) -> None:
    paths = [
        write_run("a0", clients=2, rounds=1, seed=0, edit=spending([4.0, 3.0], bytes=100, seconds=1.0)),
        write_run("a1", clients=2, rounds=1, seed=1, edit=spending([4.0, 4.5], bytes=100, seconds=1.0)),
    ]
    groups = compare(paths).groups
    content = protocols(groups)
    assert content.targets == {0: 3.0}
    assert content.notes == ("no target for seed 1: a recipe ends there no better than it starts; --target sets one",)
    assert protocols(groups, ProtocolSettings(target=3.0)).notes == ()
    apart = [write_run("b", name="b", clients=2, rounds=1, seed=7), paths[0]]
    assert protocols(compare(apart).groups).notes == ("no cost to a target: the recipes share no seed",)


def test_a_recipe_that_was_evaluated_after_other_rounds_is_named(write_run: WriteRun) -> None:
    def every_second(lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        for line in lines[1:-1:2]:
            line |= {"test": None, "held_out": {}}

    paths = [
        write_run("a", name="often", clients=2, rounds=4),
        write_run("b", name="rarely", clients=2, rounds=4, edit=every_second),
        write_run("c", name="shorter", clients=2, rounds=3),  # after fewer rounds, and not after others
    ]
    (note,) = protocols(compare(paths).groups).notes
    assert note.startswith("rarely was evaluated after other rounds than often: ")


def test_a_run_without_a_summary_is_named_with_the_clients_that_are_known(write_run: WriteRun) -> None:
    path = write_run("a", name="a", clients=3)
    (path / "summary.json").unlink()
    (note,) = protocols(compare([path]).groups).notes
    assert note == "a, seed 0, has no summary: per client means of the 3 clients that its rounds name"


@given(
    st.lists(st.tuples(st.floats(0, 10), st.floats(0, 9) | st.just(math.nan)), min_size=1, max_size=9),
    st.floats(0, 50),
    st.floats(0, 50),
)
def test_a_larger_budget_is_never_worse(rounds: list[tuple[float, float]], one: float, more: float) -> None:
    cost = np.cumsum([spent for spent, _ in rounds])
    scores = np.array([score for _, score in rounds])
    first, second = best_within(cost, scores, one), best_within(cost, scores, one + more)
    assert math.isnan(first) or second <= first


@pytest.mark.parametrize(
    ("text", "budgets"),
    [
        ("10MB", {"bytes": 10e6}),
        ("1.5 kB", {"bytes": 1500.0}),
        (".5h", {"seconds": 1800.0}),
        ("2e3s", {"seconds": 2000.0}),
        ("5kJ", {"joules": 5000.0}),
        ("1Wh", {"joules": 3600.0}),
    ],
)
def test_budgets_are_read_with_their_units(text: str, budgets: dict[str, float]) -> None:
    assert protocol_settings([text]).budgets == budgets


@pytest.mark.parametrize(
    "text",
    [
        "10",
        "MB",
        "-1MB",
        "0s",
        "10mb",
        "1e999J",
        "infs",
        "nanJ",
        "1 2MB",
        "",
        "\N{ARABIC-INDIC DIGIT ONE}MB",
        "1MB\n2s",
    ],
)
def test_a_budget_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--budget: expected a number above 0 with a unit, such as 10MB"):
        protocol_settings([text])


def test_everything_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        protocol_settings(["1MB", "2GB"], math.nan, "bleu")
    text = str(raised.value)
    assert "one budget in bytes; got a second one, '2GB'" in text
    assert "--target: expected a finite number" in text
    assert "--measure: expected one of loss, perplexity" in text
