from __future__ import annotations

import pytest

from fedtune.config import bind
from fedtune.config.checks import check
from tests.config.conftest import SHORTEST, Faulty


@pytest.mark.parametrize(
    ("overrides", "path", "words"),
    [
        (["client.epochs=1"], "client", "exactly one of steps and epochs; got steps = 20 and epochs = 1.0"),
        (["client.steps=none"], "client", "exactly one of steps and epochs; got neither"),
        (["client.momentum=0.9"], "client.momentum", "0 with optimizer 'adamw'; got 0.9"),
        (["data.split.kind=dirichlet"], "data.split.alpha", "'dirichlet' needs it"),
        (["data.split.kind=key"], "data.split.by", "'key' needs it"),
        (["data.split.sizes=[1, 2]"], "data.split.sizes", "'iid' has no use for it"),
        (["data.template=alpca"], "data.template", "alpaca, chat, plain or a text that ends in {output}"),
        (["data.source=''"], "data.source", "at least one file"),
        (["rounds.cohort=1.5"], "rounds.cohort", "a share of at most 1; got 1.5"),
        (["rounds.cohort=5"], "rounds.cohort", "at most the 4 clients of data.split; got 5"),
        (["rounds.min_clients=5"], "rounds.min_clients", "at most the 4 clients of data.split; got 5"),
        (["rounds.cohort=2", "rounds.min_clients=3"], "rounds.min_clients", "at most rounds.cohort = 2; got 3"),
        (["data.split.only=['a']", "rounds.cohort=2"], "rounds.cohort", "at most the 1 clients"),
        (["model.task=classification", "data.packing=true"], "data.packing", "only causal models read packed rows"),
        (["model.task=classification", "evaluate.generate=2"], "evaluate.generate", "only causal models write"),
        (["model.task=classification", "data.fields.output=y"], "data.fields.label", "the column of the class"),
        (["data.fields.label=y"], "data.fields.label", "no entry with model.task = 'causal'"),
        (["model.device=gpu"], "model.device", "auto, cpu, cuda, cuda:<number> or mps; got 'gpu'"),
        (["adapter.targets=[]"], "adapter.targets", "at least one module"),
        (["adapter.modules_to_save=['q_proj']"], "adapter.modules_to_save", "modules that are not targets"),
    ],
)
def test_settings_that_do_not_fit_together_are_told(
    faulty: Faulty, overrides: list[str], path: str, words: str
) -> None:
    assert words in faulty(*overrides)[path]


@pytest.mark.parametrize(
    "overrides",
    [
        ["client.epochs=0.5", "client.steps=none"],
        ["client.optimizer=sgd", "client.momentum=0.9"],
        ["rounds.cohort=4", "rounds.min_clients=4"],
        ["rounds.cohort=0.25"],
        ["data.split={kind='dirichlet', by='category', alpha=0.5, clients=4}"],
        ["data.split={kind='sizes', sizes=[3, 4]}", "rounds.cohort=2"],
        ["data.split={kind='key', by='id'}", "rounds.cohort=90"],
        ["model.task=classification", "data.fields.label=y", "adapter.modules_to_save=['score']"],
        ["model.device=cuda:1"],
        ["data.template='Q: {instruction} A: {output}'"],
    ],
)
def test_settings_that_fit_together_bind(overrides: list[str]) -> None:
    bind(SHORTEST, overrides=overrides)


def test_mixed_ranks_name_the_methods_that_take_them(faulty: Faulty) -> None:
    more = '[[override]]\nclients = "client-1"\nrank = 4\n'
    message = faulty("method=fedit", more=more)["method"]
    assert "expected one rank, as 'fedit' needs; got 4 and 8" in message
    assert "use flora" in message
    assert "fedex" not in message
    bind(SHORTEST + more)


def test_one_rank_for_all_by_an_override_is_one_rank() -> None:
    more = '[[override]]\nclients = "client-1"\nrank = 4\n[[override]]\nclients = "*"\nrank = 16\n'
    assert bind(SHORTEST + more, overrides=["method=fedit"]).override[1].rank == 16


def test_a_check_whose_key_is_at_fault_is_left_out(faulty: Faulty) -> None:
    assert set(faulty("rounds.cohort='3'", "rounds.min_clients=4")) == {"rounds.cohort"}
    assert list(check({"client.steps": None})) == []


def test_a_fault_beside_the_split_does_not_hide_the_splits(faulty: Faulty) -> None:
    assert set(faulty("data.max_tokens=0", "data.split.kind=key")) == {"data.max_tokens", "data.split.by"}
