"""Virtual tokens take part where nothing needs factors; everything else is refused by its key, with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.config import bind, render
from fedtune.config.consent import permission_texts
from fedtune.config.site import bind_site
from fedtune.errors import ConfigError
from fedtune.methods import METHODS
from tests.config.conftest import Faulty

TEXT = """\
model = { base = "embedded" }
adapter = { kind = "prefix" }
method = "fedit"
client = { steps = 20, batch = 4, learning_rate = 3e-2 }
rounds = { count = 10 }

[data]
source = "train.jsonl"
split = { kind = "iid", clients = 4 }
"""


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["adapter.tokens=7"],
        ["adapter.kind=p-tuning", "adapter.send=encoder", "adapter.hidden=64"],
        ["adapter.kind=prompt", "adapter.init_text=Summarise:"],
        ["adapter.kind=prompt", "client.gradient_checkpointing=true"],
        ["adapter.kind=prompt", "adapter.rank=4"],  # a comparison of kinds may leave it there
        ["adapter.kind=prompt", "method.server_optimizer=fedadam", "method.robust=median", "rounds.min_clients=3"],
        ["adapter.kind=lora", "adapter.rank=4"],
    ],
)
def test_a_recipe_of_virtual_tokens_binds_and_comes_back_from_its_text(overrides: list[str]) -> None:
    recipe = bind(TEXT, overrides=overrides)
    assert bind(render(recipe)) == recipe


@pytest.mark.parametrize(
    ("overrides", "path", "words"),
    [
        (["client.gradient_checkpointing=true"], "client.gradient_checkpointing", "expected false with adapter.kind"),
        (["client.packing=true"], "client.packing", "share their virtual tokens"),
        (["client.dropout=0.1"], "client.dropout", "no input of a factor"),
        (["adapter.targets=['q_proj']"], "adapter.targets", "virtual tokens belong to no layer; got"),
        (["adapter.layers=0-1"], "adapter.layers", "nothing with adapter.kind"),
        (["adapter.alpha=16"], "adapter.alpha", "nothing with adapter.kind"),
        (["adapter.rslora=true"], "adapter.rslora", "nothing with adapter.kind"),
        (["adapter.modules_to_save=['lm_head']"], "adapter.modules_to_save", "nothing with adapter.kind"),
        (["adapter.hidden=8"], "adapter.hidden", "leave it out, or choose another adapter.kind"),
        (["adapter.send=encoder"], "adapter.send", "nothing with adapter.kind"),
        (["adapter.init_text=x"], "adapter.init_text", "nothing with adapter.kind"),
        (["adapter.kind=lora", "adapter.tokens=5"], "adapter.tokens", "nothing with adapter.kind"),
        (["adapter.kind=prompt", "adapter.tokens=0"], "adapter.tokens", "got 0"),
        (["adapter.kind=prompt", "adapter.tokens=65537"], "adapter.tokens", "got 65537"),
        (["adapter.kind=bitfit"], "adapter.kind", 'expected one of "lora", "prefix", "p-tuning", "prompt"; got'),
        (["model.task=classification"], "model.task", "'causal' with adapter.kind"),
        (["planner.back=0.5"], "planner.back", "gradient comes through every layer"),
        (["fleet.name=fedspine80", "fleet.proxy=llama-7b"], "fleet.proxy", "other bases stand in with factors"),
        (["pruning.target=0.5"], "pruning", "no table with this method"),
        (["planner=ucb"], "planner", "'fixed' with method 'fedit'"),
        (["planner=fedpipe"], "planner", "'fixed' with method 'fedit'"),
    ],
)
def test_what_needs_factors_is_refused(faulty: Faulty, overrides: list[str], path: str, words: str) -> None:
    assert words in faulty(*overrides, text=TEXT)[path]


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"fedit"}))
def test_every_method_but_the_mean_is_refused_by_its_name(faulty: Faulty, name: str) -> None:
    assert "expected 'fedit' with adapter.kind = 'prefix'" in faulty(f"method={name}", text=TEXT)["method"]


@pytest.mark.parametrize(
    ("more", "path"),
    [
        ("gradient_checkpointing = true", "override.0.gradient_checkpointing"),
        ("packing = true", "override.0.packing"),
        ("dropout = 0.1", "override.0.dropout"),
        ("back = 0.5", "override.0.back"),
    ],
)
def test_an_override_is_held_to_the_same(faulty: Faulty, more: str, path: str) -> None:
    assert path in faulty(text=TEXT, more=f'\n[[override]]\nclients = ["a"]\n{more}\n')


def test_a_site_reads_what_trains_and_what_leaves_it() -> None:
    expected = {
        "prefix": "20 virtual tokens (prefix): their keys and values in every layer",
        "prompt": "20 virtual tokens (prompt): their embeddings",
        "p-tuning": "20 virtual tokens (p-tuning): their embeddings",
    }
    for kind, whole in expected.items():
        texts = permission_texts(bind(TEXT, overrides=[f"adapter.kind={kind}"]), "a")
        assert texts["whole"] == whole
        assert texts["ranks"] == "none"
        assert texts["bytes"] == "the virtual tokens in fp32, and nothing else of the model"
    encoder = bind(TEXT, overrides=["adapter.kind=p-tuning", "adapter.send=encoder"])
    assert permission_texts(encoder, "a")["whole"].endswith("the encoder of their embeddings")


SITE = """\
name = "a"
model = { base = "embedded" }
adapter = { %s }
data = { source = "train.jsonl" }
"""


def test_a_site_names_the_kind_of_its_run(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("site") / "site.toml"
    path.write_text(SITE % 'kind = "p-tuning", tokens = 4, send = "encoder", hidden = 8')
    adapter = bind_site(path).adapter
    assert adapter is not None
    own, recipe = adapter.settings, bind(TEXT, overrides=["adapter.kind=p-tuning", "adapter.tokens=4"])
    assert (own.kind, own.tokens, own.send, own.hidden) == ("p-tuning", 4, "encoder", 8)
    assert own.targets == () != recipe.adapter.targets
    for table, key in (('kind = "prompt", targets = ["q_proj"]', "targets"), ("rank = 1", "rank"), ("", "targets")):
        path.write_text(SITE % table)
        with pytest.raises(ConfigError, match=f"adapter.{key}"):
            bind_site(path)


def test_a_site_names_the_layers_of_its_run(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    for layers in ("ends", "0-1, 3"):
        path.write_text(SITE % f'targets = ["all-linear"], layers = "{layers}"')
        adapter = bind_site(path).adapter
        assert adapter is not None
        assert adapter.settings.layers == layers
    for table in ('targets = ["q_proj"], layers = "3-1"', 'kind = "prompt", layers = "ends"'):
        path.write_text(SITE % table)
        with pytest.raises(ConfigError, match=r"adapter\.layers: expected"):
            bind_site(path)
