"""What a recipe may ask of clients that probe and of those that descend, each fault named by its key."""

from __future__ import annotations

import pytest

from fedtune.config import Recipe, bind, digest, render
from fedtune.config.recipe import (
    planned_training,
    probing_training,
    requested_verb,
    requested_verbs,
    verb_request,
)
from fedtune.config.render import tables
from fedtune.planning.verbs import DescendSettings, VerbRequest
from tests.config.conftest import SHORTEST, Faulty

SEEDS = SHORTEST.replace('method = "flora"', 'method = { name = "fedkseed" }').replace(
    'adapter = { rank = 8, targets = ["q_proj", "v_proj"] }\n', ""
)
UNSET = SEEDS.replace("client = { steps = 20, batch = 4, learning_rate = 3e-4 }", "client = { batch = 4 }")
GPU = 'override=[{clients = "gpu-*", verb = "descend"}]'


def bound(*overrides: str, text: str = SEEDS) -> Recipe:
    return bind(text, overrides=overrides)


@pytest.mark.parametrize(
    ("text", "overrides", "path", "words"),
    [
        (SHORTEST, [GPU], "override.0.verb", "\"adapt\", as all clients of 'flora'; got 'descend'"),
        (
            SEEDS,
            ['override=[{clients = "a", verb = "adapt"}]'],
            "override.0.verb",
            '"probe", "descend" or "auto", as all',
        ),
        (SHORTEST, ["method.verb=descend"], "method.verb", "unknown key"),
        (UNSET, ["method.verb=descend", "method.estimator=one-sided"], "method.estimator", "'two-sided' where every"),
        (UNSET, ["method.verb=descend", "method.clip=none"], "method.clip", "'quantile' where every client descends"),
        (UNSET, ["method.verb=descend", "client.weight_decay=0.1"], "client.weight_decay", "clients that descend"),
        (SEEDS, ["method.verb=adapt"], "method.verb", "got 'adapt'"),
        (SEEDS, ["descend.steps=4"], "descend", "no table where no client descends; got one; set method.verb"),
        (SHORTEST, ["descend.steps=4"], "descend", "no table where no client descends"),
        (
            SEEDS,
            ['override=[{clients = "a", descend = {steps = 4}}]'],
            "override.0.descend",
            "no table where no client",
        ),
        (
            SEEDS,
            ["method.verb=auto", 'override=[{clients = "a", descend = {}}]'],
            "override.0.descend",
            "a key that changes (steps, learning_rate, batch or accumulation); got an empty table",
        ),
        (
            SEEDS,
            ["method.verb=auto", 'override=[{clients = "a", descend = {step = 4}}]'],
            "override.0.descend.step",
            "unknown key; did you mean override.0.descend.steps?",
        ),
        (SEEDS, ["method.groups=3"], "method.groups", "a power of 2 from 1 to 64"),
        (SEEDS, ["method.groups=128"], "method.groups", "128"),
        (SEEDS, ['method.bank="kron"', "method.groups=4"], "method.groups", "1 or"),
        (SEEDS, ["method.redraw=3"], "method.redraw", "3"),
        (SEEDS, ["method.redraw=4", "rounds.count=1024"], "method.redraw", "at most 256 banks in 1024 rounds; got 257"),
        (SEEDS, ["method.redraw=4", "method.groups=64", "rounds.count=64"], "method.groups", "x 17 banks; got 4456448"),
        (SEEDS, ["method.redraw=4", 'method.sampling="pro"'], "method.redraw", "0 with sampling = 'pro'"),
        (UNSET, ["method.verb=descend", "method.public_log=true"], "method.public_log", "false with verb = 'descend'"),
        (UNSET, ["method.verb=descend", 'method.sampling="pro"'], "method.sampling", "uniform with verb"),
        (UNSET, ["method.verb=descend", "descend.learning_rate=0.0"], "descend.learning_rate", "got 0.0"),
        (UNSET, ["method.verb=descend", "client.steps=20"], "client.steps", "nothing where every client descends, and"),
        (UNSET, ["method.verb=descend", "client.epochs=0.5"], "client.epochs", "got 0.5; write descend.steps"),
        (UNSET, ["method.verb=descend", "client.learning_rate=1e-3"], "client.learning_rate", "write descend.learning"),
        (
            UNSET,
            ["method.verb=descend", 'override=[{clients = "a", steps = 4}]'],
            "override.0.steps",
            "and none probes; got 4; write override.0.descend.steps",
        ),
        (SEEDS, ["method.scalar_bits=4"], "method.scalar_bits", "8 where no client descends; got 4"),
        (SEEDS, ["method.scalar_bits=3"], "method.scalar_bits", "got 3"),
        (SEEDS, ["method.groups=65"], "method.groups", "got 65"),
        (SEEDS, ["method.redraw=3"], "method.redraw", "got 3"),
        (SEEDS, ["method.verb=descend", "pruning={}"], "pruning", "moves every weight|directions move every weight"),
        (SEEDS, ["method.verb=auto", "planner=deadline"], "planner", "'fixed' with method 'fedkseed'"),
        (UNSET, ["method.verb=descend", "descend.steps=1000000"], "descend.steps", "at most"),
    ],
)
def test_what_does_not_go_together_is_refused_by_its_key(
    faulty: Faulty, text: str, overrides: list[str], path: str, words: str
) -> None:
    messages = faulty(*overrides, text=text)
    assert any(word in messages[path] for word in words.split("|")), messages


def test_a_verb_of_another_method_is_the_only_fault(faulty: Faulty) -> None:
    text = SHORTEST.replace("client = { steps = 20, batch = 4, learning_rate = 3e-4 }", "client = { batch = 4 }")
    assert list(faulty("method.verb=descend", text=text)) == ["method.verb"]


def test_pooling_without_classes_is_refused(faulty: Faulty) -> None:
    assert "auto without classes; got 'mean'" in faulty("model.pooling=mean", text=SHORTEST)["model.pooling"]


def test_a_recipe_in_which_all_probe_is_as_before() -> None:
    recipe = bound()
    assert requested_verbs(recipe) == {"probe"}
    assert recipe.descend is None
    assert not {"descend", "verb", "groups", "redraw", "scalar_bits"} & {*tables(recipe), *tables(recipe)["method"]}
    assert "[descend]" not in render(recipe)
    assert verb_request(recipe, "a") == VerbRequest("probe", recipe.client)
    assert verb_request(bind(SHORTEST), "a") == VerbRequest()


def test_where_all_descend_the_table_is_written_out_and_nobody_has_steps_of_probing() -> None:
    recipe = bound("method.verb=descend", text=UNSET)
    assert (recipe.client.steps, recipe.descend) == (None, DescendSettings())
    assert probing_training(recipe, "a") is None
    training = planned_training(recipe, "a")[1]
    assert (training.steps, training.batch, training.learning_rate) == (8, 4, DescendSettings().learning_rate)
    assert bind(render(recipe)) == recipe
    assert digest(recipe) != digest(bound("method.verb=descend", "descend.steps=9", text=UNSET))


def test_overrides_say_who_descends_and_how() -> None:
    recipe = bound(
        'override=[{clients = "gpu-*", verb = "auto"}, {clients = "gpu-1", batch = 2, steps = 7, '
        "descend = {steps = 3, accumulation = 2}}]",
        "descend.learning_rate=0.03",
    )
    assert requested_verbs(recipe) == {"probe", "auto"}
    asked = {name: requested_verb(recipe, name) for name in ("phone-0", "gpu-0", "gpu-1")}
    assert asked == {"phone-0": "probe", "gpu-0": "auto", "gpu-1": "auto"}
    phone, first, second = (planned_training(recipe, name)[1] for name in asked)
    assert (phone.steps, phone.learning_rate) == (20, 3e-4)
    assert (first.steps, first.batch, first.learning_rate) == (8, 4, 0.03)
    assert (second.steps, second.batch, second.accumulation) == (3, 2, 2)
    fallback = verb_request(recipe, "gpu-1").probing
    assert fallback is not None
    assert (fallback.steps, fallback.batch, fallback.learning_rate) == (7, 2, 3e-4)
    assert bind(render(recipe)) == recipe


def test_an_override_of_all_clients_leaves_none_that_the_method_means() -> None:
    recipe = bound('override=[{clients = "*", verb = "descend"}]', text=UNSET)
    assert requested_verbs(recipe) == {"descend"}
    assert recipe.client.steps is None
    assert bind(render(recipe)) == recipe
