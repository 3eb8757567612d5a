"""Settings that exclude or need each other are told with the key, what was expected, what came and what to do."""

from __future__ import annotations

import pytest

from fedtune.config import bind
from fedtune.messages import Client
from fedtune.rounds.schedule import sample
from tests.config.conftest import SHORTEST, Faulty


@pytest.mark.parametrize(
    ("overrides", "path", "words"),
    [
        (["client.epochs=1"], "client", "exactly one of steps and epochs; got steps = 20 and epochs = 1.0"),
        (["client.steps=none"], "client", "exactly one of steps and epochs; got neither"),
        (["client.momentum=0.9"], "client.momentum", "0 with optimizer 'adamw'; got 0.9"),
        (
            ["method=fedkseed", "client.proximal=0.1"],
            "client.proximal",
            "expected 0.0; got 0.1; 'fedkseed' only measures losses",
        ),
        (["data.split.kind=dirichlet"], "data.split.alpha", "which 'dirichlet' needs"),
        (["data.split.kind=key"], "data.split.by", "which 'key' needs"),
        (["data.split.sizes=[1, 2]"], "data.split.sizes", "'iid' has no use for it"),
        (["data.template=alpca"], "data.template", "auto, alpaca, chat, plain or a text that ends in {output}"),
        (["data.template=alpca"], "data.template", 'did you mean "alpaca"?'),
        (["data.template='{output} {output}'"], "data.template", "{output} once, at the end"),
        (["data.split.kind=sizes", "data.split.sizes=[]"], "data.split.sizes", "which 'sizes' needs"),
        (["data.split.kind=files", "data.split.by=x"], "data.split.by", "'files' has no use for it; got 'x'"),
        (["data.split.only=[]"], "data.split.only", "at least one client's name; got an empty list"),
        (["data.source=''"], "data.source", "at least one file"),
        (["data.source=[]"], "data.source", "at least one file"),
        (["data.source=['a', '']"], "data.source", "none of them empty; got ['a', '']"),
        (["data.test=[]"], "data.test", "at least one file, none of them empty; got []"),
        (["model.base="], "model.base", "a folder, a hub name or embedded; got an empty text"),
        (
            ["adapter.layers=9-3"],
            "adapter.layers",
            "ranges of them, the smaller one first, or ends of an emulator; got '9-3'",
        ),
        (["adapter.layers='0-3,'"], "adapter.layers", """got '0-3,'; write, say, "8-15" or "0-3, 28\""""),
        (["adapter.layers='-1'"], "adapter.layers", "numbers of layers and ranges of them"),
        (["rounds.warmup=5", "rounds.count=5"], "rounds.warmup", "fewer rounds than rounds.count = 5; got 5"),
        (["rounds.final_rate=0.5"], "rounds.final_rate", "nothing with rounds.schedule = 'constant'; got 0.5"),
        (
            ["rounds.over_select=1.3", "engine.name=processes"],
            "rounds.over_select",
            "1 with the engine 'processes', whose clients race; got 1.3",
        ),
        (
            ["rounds.keep=best", "evaluate.every=0"],
            "evaluate.every",
            "at least 1, to compare rounds; got evaluate.every",
        ),
        (["rounds.patience=2", "evaluate.every=0"], "evaluate.every", "and rounds.patience; set evaluate.every = 1"),
        (["rounds.metric=accuracy"], "rounds.metric", "exact_match for causal models; got 'accuracy'"),
        (["rounds.metric=rouge_l"], "rounds.metric", "a score that is taken; got 'rouge_l' with evaluate.generate = 0"),
        (["model.task=classification", "rounds.metric=perplexity"], "rounds.metric", "loss, accuracy and macro_f1 for"),
        (
            ["model.unquantised=bfloat16"],
            "model.unquantised",
            "nothing with model.dtype = 'auto'; got 'bfloat16'; write dtype = ",
        ),
        (
            ["model.dtype=nf4", "method=fedspine"],
            "model.dtype",
            "a base that is not quantised, beside [pruning]: columns taken out of codes",
        ),
        (
            ["model.dtype=int8", "method=fedkseed", "method.bank=hadamard"],
            "method.bank",
            "'kron' with model.dtype = 'int8', whose changes stand beside the codes; got 'hadamard'",
        ),
        (
            ["model.dtype=nf4", "method=fedpipe", "planner.base_dtypes=['int8']"],
            "planner.base_dtypes",
            "no other format with model.dtype = 'nf4', whose codes are all that a client holds; got 'int8'",
        ),
        (["model.dtype=int4"], "model.dtype", "got 'int4'"),
        (["rounds.cohort=1.5"], "rounds.cohort", "a share of at most 1; got 1.5"),
        (["rounds.cohort=5"], "rounds.cohort", "at most the 4 clients of data.split; got 5"),
        (["rounds.min_clients=5"], "rounds.min_clients", "at most the 4 clients of data.split; got 5"),
        (["rounds.cohort=2", "rounds.min_clients=3"], "rounds.min_clients", "at most rounds.cohort = 2; got 3"),
        (["data.split.only=['a']", "rounds.cohort=2"], "rounds.cohort", "at most the 1 clients"),
        (["data.split={kind='key', by='id', clients=3}", "rounds.cohort=4"], "rounds.cohort", "at most the 3 clients"),
        (
            ["rounds.cohort=0.5", "rounds.min_clients=3"],
            "rounds.min_clients",
            "at most 2, the share rounds.cohort = 0.5 of 4 clients; got 3",
        ),
        (["model.task=classification", "data.packing=true"], "data.packing", "only causal models read packed rows"),
        (["model.task=classification", "client.packing=true"], "client.packing", "only causal models read packed rows"),
        (["model.task=classification", "evaluate.generate=2"], "evaluate.generate", "only causal models write"),
        (["model.task=classification", "evaluate.prompt=Once"], "evaluate.prompt", "only causal models write"),
        (["model.task=classification", "evaluate.prompts=['Who?']"], "evaluate.prompts", "only causal models write"),
        (
            ["evaluate.prompts=['Who?', 'Why?']", "evaluate.references=['I']"],
            "evaluate.references",
            "one answer for each of the 2 evaluate.prompts, or none; got 1",
        ),
        (["evaluate.references=['I']"], "evaluate.references", "of the 0 evaluate.prompts, or none; got 1"),
        (["model.task=classification", "data.fields.output=y"], "data.fields.label", "the column of the class"),
        (["data.fields.label=y"], "data.fields.label", "no entry with model.task = 'causal'"),
        (["model.device=gpu"], "model.device", "auto, cpu, cuda, cuda:<number> or mps; got 'gpu'"),
        (
            ["engine.batch_clients=4", "engine.name=processes"],
            "engine.batch_clients",
            "(1, or auto) beside engine.name; got 4 with",
        ),
        (
            ["engine.batch_clients=4", "client.dropout=0.1"],
            "engine.batch_clients",
            "beside client.dropout; got 4 with 0.1",
        ),
        (
            ["engine.batch_clients=4", "client.packing=true"],
            "engine.batch_clients",
            "beside client.packing; got 4 with true",
        ),
        (
            ["engine.batch_clients=4", "model.processes=2"],
            "engine.batch_clients",
            "beside model.processes; got 4 with 2",
        ),
        (["model.processes=2", "engine.name=processes"], "model.processes", "1 beside engine.name; got 2 with"),
        (["engine.batch_clients=0"], "engine.batch_clients", "at least 1"),
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
        ["rounds.cohort=0.3", "rounds.min_clients=2"],  # 0.3 of 4 clients is 1.2, and two are drawn
        ['data.test=["test.jsonl"]', 'data.split.only=["client-0"]'],
        ["data.split={kind='dirichlet', by='category', alpha=0.5, clients=4}"],
        ["data.split={kind='sizes', sizes=[3, 4]}", "rounds.cohort=2"],
        ["data.split={kind='key', by='id'}", "rounds.cohort=90"],
        ["model.task=classification", "data.fields.label=y", "adapter.modules_to_save=['score']"],
        ["model.device=cuda:1"],
        ["engine.batch_clients=4"],
        ["model.processes=2"],
        ["engine.batch_clients=auto", "client.dropout=0.1", "engine.name=processes"],
        ["engine.batch_clients=1", "client.dropout=0.1"],
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


def test_mixed_ranks_are_refused_in_one_sentence(faulty: Faulty) -> None:
    found = faulty("method=fedit", 'override=[{clients = "client-3", rank = 4}]')
    assert found == {
        "method": "method: expected one rank, as 'fedit' needs; got 4 and 8 from adapter.rank and the overrides; "
        "use flora, zeropad, hetlora, ffa or flexlora, or one rank"
    }


def test_a_client_whose_override_leaves_momentum_without_sgd_is_told(faulty: Faulty) -> None:
    sgd = ["client.optimizer=sgd", "client.momentum=0.9"]
    rows = 'override=[{clients = "a", rank = 4}, {clients = "b", optimizer = "adamw"}]'
    assert faulty(*sgd, rows) == {
        "override.1.momentum": "override.1.momentum: expected 0 with optimizer 'adamw'; got 0.9; "
        "set optimizer and momentum in the same override"
    }
    assert set(faulty('override=[{clients = "a", momentum = 0.5}]')) == {"override.0.momentum"}
    assert set(faulty("client.momentum=0.9", 'override=[{clients = "a", rank = 4}]')) == {"client.momentum"}
    bind(SHORTEST, overrides=[*sgd, 'override=[{clients = "b", optimizer = "adamw", momentum = 0.0}]'])


def test_a_share_is_rounded_as_the_draw_rounds_it(faulty: Faulty) -> None:
    assert 0.07 * 100 > 7
    found = faulty("data.split.clients=100", "rounds.cohort=0.07", "rounds.min_clients=8")
    assert "at most 7, the share" in found["rounds.min_clients"]
    fleet = [Client(f"client-{number}", 1) for number in range(100)]
    assert len(sample(fleet, 0.07, seed=0, round=1)) == 7


def test_one_rank_for_all_by_an_override_is_one_rank() -> None:
    more = '[[override]]\nclients = "client-1"\nrank = 4\n[[override]]\nclients = "*"\nrank = 16\n'
    assert bind(SHORTEST + more, overrides=["method=fedit"]).override[1].rank == 16


def test_a_check_whose_key_is_at_fault_is_left_out(faulty: Faulty) -> None:
    assert set(faulty("rounds.cohort='3'", "rounds.min_clients=4")) == {"rounds.cohort"}


def test_a_fault_beside_the_split_does_not_hide_the_splits(faulty: Faulty) -> None:
    found = faulty("data.max_tokens=0", "data.template=x", "data.split.kind=key", "data.split.alpha=1")
    assert set(found) == {"data.max_tokens", "data.template", "data.split.by", "data.split.alpha"}
