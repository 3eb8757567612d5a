from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from fedtune.data.federation import Federation, digest, federate
from fedtune.data.given import Given
from fedtune.data.settings import DataSettings, Split
from fedtune.errors import ConfigError


@pytest.fixture(scope="module")
def tokenizer(stories: Path) -> Any:
    return AutoTokenizer.from_pretrained(stories)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sizes(federation: Federation) -> dict[str, tuple[int, int]]:
    return {name: (len(shard.train), len(shard.held_out)) for name, shard in federation.clients.items()}


def all_texts(federation: Federation) -> list[str]:
    shards = federation.clients.values()
    return sorted(example.reference for shard in shards for example in [*shard.train, *shard.held_out])


@pytest.fixture
def sites(tmp_path: Path) -> Path:
    rows = [{"text": f"story number {row}", "site": "north" if row < 20 else "south"} for row in range(30)]
    write(tmp_path / "x.jsonl", [*rows, {"text": "alone", "site": "west"}])
    return tmp_path


def by_site(root: Path, tokenizer: Any, *, seed: int = 0, **options: Any) -> Federation:
    settings = DataSettings("x.jsonl", Split("key", by="site"), **options)
    return federate(settings, tokenizer=tokenizer, task="causal", seed=seed, root=root)


def test_each_client_holds_out_its_share_and_all_held_out_rows_are_the_test(sites: Path, tokenizer: Any) -> None:
    federation = by_site(sites, tokenizer, held_out=0.2)
    assert sizes(federation) == {"north": (16, 4), "south": (8, 2), "west": (1, 0)}
    assert all_texts(federation) == sorted(["alone", *(f"story number {row}" for row in range(30))])
    held = [example for shard in federation.clients.values() for example in shard.held_out]
    assert sorted(map(id, held)) == sorted(map(id, federation.test))
    assert list(federation.labels) == list(federation.notes) == []


def test_nothing_held_out_leaves_no_test(sites: Path, tokenizer: Any) -> None:
    federation = by_site(sites, tokenizer, held_out=0.0)
    assert sizes(federation) == {"north": (20, 0), "south": (10, 0), "west": (1, 0)}
    assert list(federation.test) == []


def test_the_seed_decides_what_is_held_out(sites: Path, tokenizer: Any) -> None:
    def held(seed: int) -> list[str]:
        return [example.reference for example in by_site(sites, tokenizer, seed=seed).clients["north"].held_out]

    assert held(1) == held(1)
    assert held(1) != held(2)


def test_a_clients_held_out_rows_do_not_depend_on_other_clients(sites: Path, tokenizer: Any) -> None:
    before = by_site(sites, tokenizer).clients["north"]
    rows = [json.loads(line) for line in (sites / "x.jsonl").read_text().splitlines()]
    write(sites / "x.jsonl", [row for row in rows if row["site"] == "north"])
    after = by_site(sites, tokenizer).clients["north"]
    assert [example.reference for example in after.held_out] == [example.reference for example in before.held_out]


def test_clients_of_equal_size_hold_out_different_rows(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path / "x.jsonl", [{"text": f"row {row}", "site": site} for site in "ab" for row in range(50)])
    federation = by_site(tmp_path, tokenizer, held_out=0.2)
    first, second = ([example.reference for example in shard.held_out] for shard in federation.clients.values())
    assert first != second
    assert {example.reference for example in federation.test[:10]} != set(first)  # the first so many are not one client


def test_a_limit_draws_rows_and_leftover_rows_are_noted(sites: Path, tokenizer: Any) -> None:
    settings = DataSettings("x.jsonl", Split("sizes", sizes=[4, 4]), limit=10)
    federation = federate(settings, tokenizer=tokenizer, task="causal", seed=0, root=sites)
    assert sizes(federation) == {"client-0": (3, 1), "client-1": (3, 1)}
    assert federation.notes == ["data.split: 2 of 10 rows go to no client"]
    assert len(set(all_texts(federation))) == 8


def test_packing_joins_training_rows_but_not_scored_ones(sites: Path, tokenizer: Any) -> None:
    federation = by_site(sites, tokenizer, held_out=0.2, packing=True, max_tokens=64)
    assert len(federation.clients["north"].train) < 16
    assert len(federation.clients["north"].held_out) == 4


def test_dropped_and_cut_rows_are_noted_with_a_remedy(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"instruction": "a " * 40, "output": "b"}, {"instruction": "a", "output": "b " * 40}]
    write(tmp_path / "x.jsonl", [*rows, *[{"instruction": "a", "output": "b"}] * 8])
    options: dict[str, Any] = {"template": "plain", "held_out": 0.0}

    def run(**more: Any) -> Federation:
        settings = DataSettings("x.jsonl", Split("iid", clients=1), **options, **more)
        return federate(settings, tokenizer=tokenizer, task="causal", seed=0, root=tmp_path)

    dropped, cut = run(max_tokens=20).notes
    assert dropped.startswith("data.max_tokens: 1 of 10 examples have no response left at 20 tokens; they were dropped")
    assert cut == "data.max_tokens: 1 of 10 examples are longer than 20 tokens; their ends were cut"
    keep = int(dropped.split("raise to ")[1].split()[0])
    assert len(run(max_tokens=keep).clients["client-0"].train) == 10
    assert len(run(max_tokens=keep - 1).clients["client-0"].train) == 9


def test_a_client_left_with_nothing_takes_no_part_and_is_named(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"instruction": "a " * 40, "output": "b", "site": "long"}, {"instruction": "a", "output": "b", "site": "x"}]
    write(tmp_path / "x.jsonl", rows)
    federation = by_site(tmp_path, tokenizer, template="plain", max_tokens=20)
    assert (list(federation.clients), list(federation.sits_out)) == (["x"], ["long"])
    assert (
        "long takes no part: data.max_tokens: expected at least one training example for client 'long'; got none of "
        "its 1 rows has an answer left at 20 tokens; raise max_tokens or give the client more rows"
    ) in federation.notes
    write(tmp_path / "x.jsonl", rows[:1])
    with pytest.raises(
        ConfigError, match=r"data\.max_tokens: expected at least one training example for client 'long'"
    ):
        by_site(tmp_path, tokenizer, template="plain", max_tokens=20)


def test_faulty_settings_and_illegal_pairs_are_refused(sites: Path, tokenizer: Any) -> None:
    settings = DataSettings("x.jsonl", Split("key"))
    with pytest.raises(ConfigError, match=r"data\.split\.by"):
        federate(settings, tokenizer=tokenizer, task="causal", seed=0, root=sites)
    settings = DataSettings("x.jsonl", Split("iid", clients=2), packing=True)
    with pytest.raises(ConfigError, match=r"data\.packing: expected false for classification"):
        federate(settings, tokenizer=tokenizer, task="classification", seed=0, root=sites)


def test_classes_come_from_the_whole_source_in_order(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path / "x.jsonl", [{"text": f"row {row}", "label": row % 12} for row in range(36)])
    write(tmp_path / "t.csv.jsonl", [{"text": "t", "label": "10"}])
    settings = DataSettings("x.jsonl", Split("iid", clients=2), test="t.csv.jsonl", limit=4)
    federation = federate(settings, tokenizer=tokenizer, task="classification", seed=0, root=tmp_path)
    assert list(federation.labels) == [str(label) for label in range(12)]
    assert [example.labels for example in federation.test] == [10]
    for shard in federation.clients.values():
        assert all(example.labels == int(example.reference) for example in shard.train)


def test_labels_that_cannot_be_learned_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    def run(**options: Any) -> Federation:
        settings = DataSettings("x.jsonl", Split("iid", clients=1), **options)
        return federate(settings, tokenizer=tokenizer, task="classification", seed=0, root=tmp_path)

    write(tmp_path / "x.jsonl", [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}])
    write(tmp_path / "t.jsonl", [{"text": "a", "label": "Yes"}])
    with pytest.raises(
        ConfigError,
        match=r"data\.test: expected classes that occur in the source \(no, yes\); got 'Yes' in row 1 of .*t\.jsonl",
    ):
        run(test="t.jsonl")
    write(tmp_path / "x.jsonl", [{"text": "a", "label": "yes"}])
    with pytest.raises(ConfigError, match="at least two classes; got only 'yes'"):
        run()
    write(tmp_path / "x.jsonl", [{"text": "a"}])
    with pytest.raises(ConfigError, match=r"data\.fields\.label: expected a column for label"):
        run()


def test_dolly_by_flora_client_gives_the_ten_clients_of_the_paper(shared: Path, tokenizer: Any) -> None:
    settings = DataSettings("dolly/small_train.jsonl", Split("key", by="flora_client"), test="dolly/small_dev.jsonl")
    federation = federate(settings, tokenizer=tokenizer, task="causal", seed=0, root=shared / "data")
    rows = [json.loads(line) for line in (shared / "data/dolly/small_train.jsonl").read_text().splitlines()]
    assert list(federation.clients) == [str(client) for client in range(10)]
    counts = Counter(str(row["flora_client"]) for row in rows)
    kept = sum(train + held for train, held in sizes(federation).values())
    dropped = sum(int(note.split()[1]) for note in federation.notes if "no response" in note and "test" not in note)
    assert kept + dropped == sum(counts.values()) == len(rows)
    assert all(train + held <= counts[name] for name, (train, held) in sizes(federation).items())
    example = federation.clients["0"].train[0]
    assert tokenizer.decode(example.input_ids[example.prompt_tokens :], skip_special_tokens=True) == example.reference


def test_banking77_is_divided_by_intent(shared: Path, tokenizer: Any) -> None:
    split = Split("dirichlet", by="label", alpha=0.3, clients=8, min_examples=50)
    settings = DataSettings("banking77/train.jsonl", split, test="banking77/test.jsonl")
    federation = federate(settings, tokenizer=tokenizer, task="classification", seed=0, root=shared / "data")
    assert len(federation.clients) == 8
    assert len(federation.labels) == 77
    assert sum(map(sum, sizes(federation).values())) == 10_003
    assert min(map(sum, sizes(federation).values())) >= 50
    assert len({example.labels for example in federation.test[:256]}) > 60  # the first so many are a fair sample


def test_novels_qnli_and_reviews_are_read_as_they_are(shared: Path, tokenizer: Any) -> None:
    def run(task: Any, source: str, split: Split, **options: Any) -> Federation:
        settings = DataSettings(source, split, **options)
        return federate(settings, tokenizer=tokenizer, task=task, seed=0, root=shared / "data")

    novels = run("causal", "novels/train.jsonl", Split("key", by="author"), packing=True, limit=600)
    assert len(novels.clients) == 20
    assert "Dickens-Charles" in novels.clients
    fields = {"instruction": "question", "input": "sentence"}
    qnli = run("classification", "qnli/train.jsonl", Split("iid", clients=3), fields=fields, limit=300)
    assert len(qnli.labels) == 2
    first = qnli.clients["client-0"].train[0]
    question, sentence = first.prompt.split("\n", 1)
    assert first.input_ids.tolist() == tokenizer(question, sentence)["input_ids"]
    reviews = run(
        "classification", "mr_polarity/train.jsonl", Split("dirichlet", by="label", alpha=0.5, clients=4), limit=500
    )
    assert list(reviews.labels) == ["0", "1"]


def test_reading_and_encoding_import_no_torch() -> None:
    code = "import sys, fedtune.data.federation; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_rows_that_are_trained_on_and_scored_are_noted(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": f"row {number}", "site": "a"} for number in range(8)]
    write(tmp_path / "x.jsonl", [*rows, *[{**row, "site": "b"} for row in rows]])
    write(tmp_path / "t.jsonl", [{"text": "row 1"}, {"text": "new"}])
    (note,) = by_site(tmp_path, tokenizer, held_out=0.5).notes
    assert note.startswith("data: ")
    assert "of 8 held-out rows equal a row that is trained on (" in note
    notes = by_site(tmp_path, tokenizer, held_out=0.0, test="t.jsonl").notes
    assert [text.partition(";")[0] for text in notes] == ["data.test: 1 of 2 rows equal a row that is trained on"]


def test_rows_of_chat_are_encoded_noted_and_named(tmp_path: Path, stories: Path) -> None:
    chatty = AutoTokenizer.from_pretrained(stories)
    chatty.chat_template = "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}" + (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    turns = [{"from": "human", "value": "Once"}, {"from": "gpt", "value": "upon"}]
    write(tmp_path / "x.jsonl", [{"conversations": turns}, {"conversations": turns[:1]}, {"conversations": turns}])
    settings = DataSettings("x.jsonl", Split("iid", clients=1), held_out=0.0)
    federation = federate(settings, tokenizer=chatty, task="causal", seed=0, root=tmp_path)
    assert federation.form == "messages"
    assert [example.reference for example in federation.clients["client-0"].train] == ["upon", "upon"]
    assert list(federation.notes) == [
        "data: 1 of 3 conversations have no turn of the assistant that answers; they were dropped"
    ]
    write(tmp_path / "x.jsonl", [{"conversations": turns[:1]}] * 2)
    with pytest.raises(ConfigError, match=r"data\.source: .* got 2 conversations, none with a turn of the assistant"):
        federate(settings, tokenizer=chatty, task="causal", seed=0, root=tmp_path)
    tool = [{"from": "tool", "value": "4"}, *turns]
    write(tmp_path / "x.jsonl", [{"conversations": turns}] * 4 + [{"conversations": tool}])
    with pytest.raises(
        ConfigError, match=r"data\.template: .*'no tools here' from it for row 5 of .*x\.jsonl \(tool, user, as"
    ):
        federate(settings, tokenizer=chatty, task="causal", seed=0, root=tmp_path)


def test_a_client_that_lacks_a_class_takes_part_where_the_classes_are_named(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path / "x.jsonl", [{"text": f"row {row}", "label": "yes"} for row in range(4)])
    settings = DataSettings("x.jsonl", Split("iid", clients=2), labels=("no", "yes"))
    federation = federate(settings, tokenizer=tokenizer, task="classification", seed=0, root=tmp_path)
    assert list(federation.labels) == ["no", "yes"]
    assert {example.labels for shard in federation.clients.values() for example in shard.train} == {1}


def test_the_digest_of_the_data_depends_on_token_types(sites: Path, tokenizer: Any) -> None:
    federation = by_site(sites, tokenizer)
    shard = federation.clients["west"]
    (example,) = shard.train
    typed = replace(shard, train=[replace(example, token_types=np.ones_like(example.input_ids))])
    assert digest(replace(federation, clients={**federation.clients, "west": typed})) != digest(federation)


def test_rows_of_python_are_divided_as_those_of_a_file(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": f"story number {row}", "kind": "ab"[row % 2]} for row in range(30)]
    write(tmp_path / "x.jsonl", rows)
    split = Split("dirichlet", by="kind", clients=3, alpha=1.0)
    options: dict[str, Any] = {"tokenizer": tokenizer, "task": "causal", "seed": 5, "root": tmp_path}
    ours = federate(DataSettings("<python>", split), rows=rows, **options)
    assert digest(ours) == digest(federate(DataSettings("x.jsonl", split), **options))


def test_the_test_rows_of_python_are_matched(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": f"story number {row}", "kind": "ab"[row % 2]} for row in range(30)]
    settings = DataSettings("<python>", Split("meta", by="kind", clients=2, match="train"), test="<python>")
    options: dict[str, Any] = {"tokenizer": tokenizer, "task": "causal", "seed": 5, "root": tmp_path}
    federation = federate(settings, rows=Given(whole=rows[:20], test=rows[20:]), **options)
    assert sizes(federation) == {"a": (10, 5), "b": (10, 5)}
    with pytest.raises(ConfigError, match="the test rows that the run was started with"):
        federate(settings, rows=rows, **options)


def test_a_part_without_rows_sits_out_by_name(tmp_path: Path, tokenizer: Any) -> None:
    given = Given(by_client={"client-0": [{"text": "one"}, {"text": "two"}]}, empty=("client-1",))
    settings = DataSettings("<python>", Split("key", by="group"))
    federation = federate(settings, tokenizer=tokenizer, task="causal", seed=0, root=tmp_path, rows=given)
    assert list(federation.clients) == ["client-0"]
    assert federation.sits_out == {"client-1": "its part has no row"}
    assert federation.notes == ["data: the partitioner gives no row to client-1, which takes no part"]
