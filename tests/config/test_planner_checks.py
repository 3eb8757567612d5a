"""Faults between pruning, planner and simulated devices, each named by its key."""

from __future__ import annotations

import pytest

from fedtune.config import bind
from fedtune.config.planner_checks import requested_ratios
from fedtune.config.recipe import Override
from fedtune.methods import METHODS
from fedtune.planning.fedpipe import FedPipeSettings
from fedtune.planning.fixed import FixedSettings
from tests.config.conftest import SHORTEST, Faulty

EXPGRAD = ["planner={name='expgrad', learning_rates=[0.001, 0.01]}"]
ADAPTIVE = ["planner=deadline", "pruning={target = 0.5}"]


@pytest.mark.parametrize(
    ("overrides", "path", "words"),
    [
        (["planner.ratio=0.5"], "planner.ratio", "0 without the table pruning; got 0.5; write [pruning]"),
        (['override=[{clients = "a", ratio = 0.25}]'], "override.0.ratio", "0 without the table pruning; got 0.25"),
        (["method=fedit", "pruning={}"], "pruning", "no table with this method; got 'fedit': a mean of factors"),
        (["pruning={score='magnitude', allocation='global'}"], "pruning.allocation", "uniform with score"),
        (["pruning={policy='vote', target=0.0}"], "pruning.target", "above 0 with 'vote'"),
        (
            ["pruning={policy='vote'}", 'override=[{clients = "a", ratio = 0.25}]'],
            "pruning.policy",
            "one ratio for all with 'vote', whose clients share a mask; got several; use nested",
        ),
        ([*ADAPTIVE, "planner.ratios=[0.5]"], "planner.ratios", "0 among them"),
        ([*ADAPTIVE, "planner.ratios=[0.0]"], "planner.ratios", "pruning.target = 0.5 among them; got 0;"),
        ([*ADAPTIVE, 'override=[{clients = "a", rank = 2}]'], "override.0.rank", "nothing with the planner 'deadline'"),
        ([*ADAPTIVE, "planner.ranks=[]"], "planner.ranks", "at least one number; got an empty list"),
        ([*ADAPTIVE, "planner.reward=fedmp"], "planner.reward", "nothing with the planner 'deadline'"),
        (["planner=deadline", "method=fedit"], "planner", "'fixed' with method 'fedit', which needs one rank for all"),
        (["planner.top=0.5", "method=fedit"], "planner.top", "nothing with 'fedit', which needs all modules of every"),
        (["planner.top=0.0"], "planner.top", "got 0.0"),
        (["planner.back=0.9"], "planner.back", "got 0.9"),
        (["planner.down_rank=2", "method=zeropad"], "planner.down_rank", "one global change for every client"),
        (["planner=bandit", "method=zeropad", "planner.tops=[1.0, 0.5]"], "planner.tops", "'zeropad', which needs all"),
        (["planner=bandit", "method=hetlora", "planner.down_ranks=[2]"], "planner.down_ranks", "one global change for"),
        (
            ["method=flexlora", 'override=[{clients = "a", top = 0.5}]'],
            "override.0.top",
            "nothing with 'flexlora', which needs all modules of every client; got 0.5; use method = \"flora\"",
        ),
        ([*ADAPTIVE, 'override=[{clients = "a", top = 0.5}]'], "override.0.top", "nothing with the planner 'deadline'"),
        (["method=fedkseed", "planner.top=0.5"], "planner.top", "nothing; got 0.5; 'fedkseed' trains no adapter"),
        (["planner=expgrad"], "planner", "2 to 64 arms, which are the combinations of its lists; got 1; list values"),
        ([*EXPGRAD, f"planner.steps={list(range(1, 40))}"], "planner", "2 to 64 arms"),
        ([*EXPGRAD, "planner.steps=[5, 5]"], "planner.steps", "each value once; got [5, 5]"),
        ([*EXPGRAD, "planner.dropouts=[1.0]"], "planner.dropouts", "got [1.0]"),
        ([*EXPGRAD, "planner.learning_rate=[1.0]"], "planner.learning_rate", "did you mean planner.learning_rates?"),
        ([*EXPGRAD, "data.held_out=0.0"], "data.held_out", "above 0 with the planner 'expgrad'"),
        ([*EXPGRAD, "method=fedkseed"], "planner", "which trains no adapter; got 'expgrad'"),
        (
            [*EXPGRAD, 'override=[{clients = "a", learning_rate = 0.1}]'],
            "override.0.learning_rate",
            "nothing with planner.learning_rates; got 0.1",
        ),
        ([*EXPGRAD, "planner.steps=[1]", 'override=[{clients = "a", epochs = 1.0}]'], "override.0.epochs", "nothing"),
        (["planner=oracle"], "planner", "another, without fleet.by = 'round'"),
        (["fleet={name='orin8', late='drop'}"], "fleet.late", "'wait' with the planner 'fixed'"),
        (['device=[{clients = "a", memory_gb = 4.0}]'], "device", "no tables without [fleet]; got 1"),
    ],
)
def test_a_fault_between_tables_is_named_by_its_key(
    faulty: Faulty, overrides: list[str], path: str, words: str
) -> None:
    assert words in faulty(*overrides)[path]


def test_a_fault_elsewhere_in_a_table_hides_no_rule(faulty: Faulty) -> None:
    messages = faulty("fleet={name='orin8', late='drop', server_s=-1.0}", "planner={name='ucb', explore=2, reward=3}")
    assert set(messages) == {"fleet.server_s", "fleet.late", "planner.reward"}  # whether explore is idle is not known


def test_every_method_without_pruning_says_why() -> None:
    assert [name for name, method in METHODS.items() if not method.why_not_pruned] == ["flora"]


def test_ratios_are_those_of_the_last_override_for_all() -> None:
    assert requested_ratios(FixedSettings(ratio=0.5), ()) == {0.5}
    overrides = [Override(["a"], ratio=0.25), Override(["*"], ratio=0.125), Override(["b"], ratio=0.0)]
    assert requested_ratios(FixedSettings(ratio=0.5), overrides) == {0.125, 0.0}


def test_pruning_with_a_planner_that_chooses_binds() -> None:
    assert bind(SHORTEST, overrides=ADAPTIVE).planner.name == "deadline"


@pytest.mark.parametrize(
    ("overrides", "path", "words"),
    [
        (["planner={name='fedpipe', ranks=[2, 4, 16]}"], "planner.ranks", "1 among them, which every module gets"),
        (["planner={name='fedpipe', ranks=[]}"], "planner.ranks", "an empty list; add 1"),
        (["planner={name='fedpipe', ranks=[1, 4]}"], "adapter.rank", "at most the largest of planner.ranks, 4; got 8"),
        (
            ["planner=fedpipe", 'override=[{clients = "a", rank = 32}]'],
            "override.0.rank",
            "at most the largest of planner.ranks, 16; got 32",
        ),
        (
            ["planner={name='fedpipe', importance='svd', warmup=3}", "rounds.count=3"],
            "planner.warmup",
            "fewer than the 3 rounds of the run; got 3",
        ),
        (["planner=fedpipe", "pruning={}"], "pruning", "no table with the planner 'fedpipe'"),
        (["planner=fedpipe", "method=fedit"], "planner", "'fixed' with method 'fedit', which needs one rank for all"),
    ],
)
def test_what_fedpipe_cannot_plan_is_refused(faulty: Faulty, overrides: list[str], path: str, words: str) -> None:
    assert words in faulty(*overrides)[path]


def test_fedpipe_takes_what_it_can_plan() -> None:
    assert bind(SHORTEST, overrides=["method=fedpipe", "adapter.rank=4"]).planner == FedPipeSettings()
