from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from fedtune.client import site
from fedtune.client.shared_work import SharedWork, Work
from fedtune.config import bind, render
from fedtune.config.site import bind_site
from fedtune.data.settings import MAX_TOKENS
from fedtune.errors import ClientError, ConfigError
from fedtune.messages import Assignment, ClientUpdate, Plan, Training, TrainLora
from fedtune.model.base import Base, load
from fedtune.model.shares import ALONE
from fedtune.runs.local import prepare
from fedtune.wire.profile import difference
from tests.cli.test_flower_server import dated, site_files
from tests.model.families import CLASSIFIERS, build


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Load anew in each test what a process keeps."""
    yield
    site.from_file.cache_clear()
    site.cached_recipe.cache_clear()


def test_a_site_says_what_its_base_and_data_are(tmp_path: Path, tables: dict[str, Any]) -> None:
    (path,) = site_files(tmp_path, tables, ("client-1",))
    experiment = prepare(bind(tables))
    profile = site.from_file(str(path)).profile()
    assert profile.client == "client-1"
    assert profile.num_examples == experiment.fleet["client-1"]
    assert profile.foundation.base == experiment.base.digest
    assert profile.foundation.modules == experiment.base.modules
    assert profile.device.cores >= 1
    assert profile.device.memory_bytes > 2**20
    assert "flora" in profile.methods


def test_sites_that_hold_one_base_in_several_formats_take_part_in_one_run(
    tmp_path: Path, tables: dict[str, Any]
) -> None:
    (path,) = site_files(tmp_path, tables, ("client-1",))
    own = path.read_text()
    assert 'device = "cpu"' in own
    profiles = []
    for dtype in ("float32", "nf4", "int8"):
        path.write_text(own.replace('device = "cpu"', f'device = "cpu"\ndtype = "{dtype}"'))
        site.from_file.cache_clear()
        profiles.append(site.from_file(str(path)).profile().foundation)
    assert profiles[0].anatomy is not None
    assert not [difference(profiles[0], other) for other in profiles[1:] if difference(profiles[0], other)]


def test_a_simulated_client_holds_what_the_recipe_gives_it(tables: dict[str, Any]) -> None:
    recipe = bind(tables | {"override": [{"clients": ["client-1"], "threads": 2}]})
    experiment = prepare(recipe)
    for place, name in enumerate(sorted(experiment.fleet)):
        found = site.simulated_site(render(recipe), {"partition-id": place}, {})
        assert found.client == name
        assert found.threads == (2 if name == "client-1" else 1)
        expected = experiment.federation.clients[name].train
        for ours, theirs in zip(found.examples, expected, strict=True):
            np.testing.assert_array_equal(ours.input_ids, theirs.input_ids)


def test_base_and_data_are_loaded_once_per_process(
    tmp_path: Path, tables: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []

    def counted(*args: Any, **more: Any) -> Base:
        loads.append(args)
        return load(*args, **more)

    monkeypatch.setattr("fedtune.client.site.load", counted)
    text = render(bind(tables))
    bases = {id(site.simulated_site(text, {"partition-id": place}, {}).base) for place in (0, 1, 2, 0)}
    assert (len(loads), len(bases)) == (1, 1)
    (path,) = site_files(tmp_path, tables, ("client-1",))
    assert site.from_file(str(path)) is site.from_file(str(path))
    assert len(loads) == 2


def test_data_without_a_split_are_all_the_sites_own(tmp_path: Path, tables: dict[str, Any]) -> None:
    data = {key: value for key, value in tables["data"].items() if key != "split"} | {"held_out": 0.0}
    (path,) = site_files(tmp_path, tables | {"data": data}, ("site-a",))
    found = site.from_file(str(path))
    assert (found.client, len(found.examples)) == ("site-a", 24)


def test_a_name_that_the_split_does_not_know_is_a_fault(tmp_path: Path, tables: dict[str, Any]) -> None:
    (path,) = site_files(tmp_path, tables, ("client-9",))
    with pytest.raises(ConfigError, match=r"name: expected one of the clients of data.split \(client-0, client-1"):
        site.from_file(str(path))


def test_layers_with_a_row_for_each_token_are_trained_where_the_site_says_so(
    tmp_path: Path, tables: dict[str, Any]
) -> None:
    adapter = {"rank": 2, "targets": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    (path,) = site_files(tmp_path, tables | {"adapter": adapter}, ("client-1",))
    expected = r"policy.allow_embeddings: expected true, .*; got false, and model.embed_tokens.weight; the rows"
    with pytest.raises(ConfigError, match=expected):
        site.from_file(str(path))
    path.write_text(path.read_text().replace("[policy]", "[policy]\nallow_embeddings = true"))
    assert site.from_file(str(path)).base.saved == ["model.embed_tokens.weight"]


def test_an_update_of_fewer_examples_than_the_policy_says_is_never_made(tmp_path: Path, tables: dict[str, Any]) -> None:
    (path,) = site_files(tmp_path, tables, ("client-1",))
    path.write_text(path.read_text().replace("min_examples = 1", "min_examples = 5"))
    plan = Plan("client-1", 2, 2.0, Training(batch=2, learning_rate=0.1, steps=2))
    found = site.from_file(str(path))
    with pytest.raises(ClientError, match=r"policy\.min_examples: an update of at least 5 examples; got 4"):
        found.perform(Assignment("flora", 1, 0, plan, TrainLora(a_key=0), base=found.base.digest))


def test_the_policy_says_how_much_memory_the_process_may_take(tmp_path: Path, tables: dict[str, Any]) -> None:
    (path,) = site_files(tmp_path, tables, ("client-1",))
    found = site.from_file(str(path))
    assert found.max_bytes is None
    assert replace(found, policy=replace(found.policy, max_memory_gib=1.5)).max_bytes == 3 * 2**29


@pytest.mark.parametrize(("processes", "devices"), [(1, None), (2, ["cpu", "cpu"])])
def test_a_site_divides_its_training_among_the_processes_of_its_file(
    processes: int, devices: list[str] | None, tmp_path: Path, tables: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = list[list[str]]()

    def alone(self: SharedWork, assignment: Assignment, work: Work, *, threads: int) -> ClientUpdate:
        shared.append(list(self._devices))
        return work(ALONE)

    monkeypatch.setattr(SharedWork, "perform", alone)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})
    (path,) = site_files(tmp_path, tables | {"model": tables["model"] | {"processes": processes}}, ("client-1",))
    plan = Plan("client-1", 2, 2.0, Training(batch=2, learning_rate=0.1, steps=2))
    found = site.from_file(str(path))
    found.perform(Assignment("flora", 1, 0, plan, TrainLora(a_key=0), base=found.base.digest))
    assert shared == ([] if devices is None else [devices])


def test_an_assignment_for_another_client_is_not_done(tmp_path: Path, tables: dict[str, Any]) -> None:
    (path,) = site_files(tmp_path, tables, ("client-1",))
    plan = Plan("client-2", 2, 2.0, Training(batch=1, learning_rate=0.1, steps=1))
    with pytest.raises(ClientError, match="client-1: expected an assignment of its own; got one for 'client-2'"):
        site.from_file(str(path)).perform(Assignment("flora", 1, 3, plan, TrainLora(a_key=4)))


def test_examples_longer_than_the_base_are_refused(tables: dict[str, Any], tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text('{"text": "' + "the dog sleeps " * 200 + '", "who": "client-0"}\n')
    text = render(bind(tables | {"data": tables["data"] | {"source": str(long), "max_tokens": 400}, "override": []}))
    with pytest.raises(ConfigError, match=r"data\.max_tokens: expected examples of at most 128 tokens"):
        site.simulated_site(text, {"partition-id": 0}, {})


def test_without_a_limit_of_ones_own_examples_are_cut_at_the_positions_of_the_base(
    tables: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "many words " * 400, "site": "a"}) + "\n")
    data = {"split": {"kind": "key", "by": "site"}, "held_out": 0.0}
    recipe = bind(tables | {"data": data | {"source": str(tmp_path / "long.jsonl")}, "override": []})
    federation, base = site.load_site(recipe.model, recipe.adapter, recipe.data, seed=0, root=tmp_path)
    [example] = federation.clients["a"].train
    assert len(example.input_ids) == base.positions < MAX_TOKENS
    assert federation.notes[0] == f"data.max_tokens: {base.positions}, the positions that {base.name} has"
    assert "1 of 1 examples are longer" in federation.notes[1]


def test_a_bundle_without_the_embedded_model_names_the_stub(
    tables: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("fedtune.model.embedded.path", lambda: tmp_path)  # a folder of code alone
    text = render(bind(tables | {"model": {"base": "embedded"}}))
    with pytest.raises(ConfigError, match="run the app in server/superlink"):
        site.simulated_site(text, {"partition-id": 0}, {})


def test_classes_are_numbered_by_the_rows_of_the_bases_own_head(
    tmp_path: Path, checkpoints: dict[str, Path], tables: dict[str, Any]
) -> None:
    folder = build(
        "bert",
        CLASSIFIERS["bert"],
        tmp_path / "base",
        AutoTokenizer.from_pretrained(checkpoints["llama"]),
        task="classification",
    )
    labels = ["maybe", "no", "yes"]
    rows = [{"text": f"the fox {i}", "label": labels[i % 3], "who": f"client-{i % 2}"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rest = {key: value for key, value in tables.items() if key not in ("override", "evaluate")}
    recipe = bind(
        rest
        | {
            "model": {"base": str(folder), "task": "classification", "device": "cpu"},
            "adapter": {"rank": 2, "targets": ["query"]},
            "data": {"source": str(tmp_path / "rows.jsonl"), "split": {"kind": "key", "by": "who"}, "max_tokens": 32},
        }
    )
    federation = prepare(recipe).federation
    assert federation.labels == ["yes", "no", "maybe"]
    for shard in federation.clients.values():
        for example in shard.train:
            assert federation.labels[int(example.labels)] == example.reference


def test_a_site_writes_the_day_of_the_run_into_its_prompts(tmp_path: Path, tables: dict[str, Any]) -> None:
    recipe = dated(tables, tmp_path)
    (path,) = site_files(tmp_path, recipe, ("client-1",))
    asked = prepare(bind(recipe, overrides=["data.date=2026-11-29"])).federation.clients["client-1"].train
    for own in (site.from_file(str(path)), site.simulated_site(render(bind(recipe)), {"partition-id": 1}, {})):
        shared = own.with_labels((), "2026-11-29")
        assert "29 November" in shared.examples[0].prompt
        assert shared.base is own.base
        for ours, theirs in zip(shared.examples, asked, strict=True):
            np.testing.assert_array_equal(ours.input_ids, theirs.input_ids)
        assert "26 July" in own.examples[0].prompt
        assert shared.with_labels((), "2026-11-29") is shared
    path.write_text(path.read_text().replace("[data]", '[data]\ntemplate = "plain"'))
    site.from_file.cache_clear()
    plain = site.from_file(str(path))
    assert plain.with_labels((), "2026-11-29") is plain


def test_a_site_that_lacks_a_class_loads_with_the_classes_of_all(tmp_path: Path, tables: dict[str, Any]) -> None:
    (path,) = site_files(tmp_path, tables, ("client-1",))
    rows = "".join(f'{{"text": "the quick fox {n}", "label": "yes"}}\n' for n in range(10))
    (tmp_path / "yes.jsonl").write_text(rows)
    base = bind_site(path).model.base
    path.write_text(
        f'name = "client-1"\n[model]\nbase = "{base}"\ntask = "classification"\n'
        f'[adapter]\ntargets = ["q_proj"]\n[data]\nsource = "{tmp_path / "yes.jsonl"}"\n'
    )
    own = site.from_file(str(path))
    assert own.profile().foundation.labels == ("yes",)
    shared = own.with_labels(("no", "yes"))
    assert shared.profile().foundation.labels == ("no", "yes")
    assert {int(example.labels) for example in shared.examples} == {1}
    assert own.with_labels(()) is own
    assert shared.with_labels(("no", "yes")) is shared
    with pytest.raises(ConfigError, match=r"data\.labels"):
        own.with_labels(("maybe", "no"))
    path.write_text(path.read_text() + '[policy]\nlabels = "keep"\n')
    site.from_file.cache_clear()
    with pytest.raises(ConfigError, match="agreed on"):
        site.from_file(str(path))
