from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.config import Recipe, bind, changes, digest, render
from fedtune.config.render import toml
from fedtune.methods import METHODS
from tests.config.conftest import SHORTEST

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(st.recursive(st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT, st.lists))
def test_every_value_reads_back_as_written(value: object) -> None:
    assert tomllib.loads(f"value = {toml(value)}") == {"value": value}


@settings(max_examples=40)
@given(
    prompt=TEXT,
    targets=st.lists(TEXT, min_size=1, max_size=3),
    rate=st.floats(min_value=1e-9, max_value=1e9),
    cohort=st.none() | st.integers(1, 4) | st.floats(0.01, 1.0),
    clip_norm=st.none() | st.floats(0.1, 10),
    method=st.sampled_from(sorted(METHODS)),
    training=st.fixed_dictionaries({}, optional={"batch": st.integers(1, 9), "clip_norm": st.none()}),
    fields=st.dictionaries(st.sampled_from(["text", "input", "output"]), TEXT),
)
def test_a_rendered_recipe_binds_to_the_same(
    prompt: str,
    targets: list[str],
    rate: float,
    cohort: int | float | None,
    clip_norm: float | None,
    method: str,
    training: dict[str, object],
    fields: dict[str, str],
) -> None:
    row = {"clients": ["*"], "rank": 8, **{key: "none" if value is None else value for key, value in training.items()}}
    tables = tomllib.loads(SHORTEST) | {
        "method": method,
        "adapter": {"rank": 8, "targets": targets},
        "client": {"epochs": 0.5, "batch": 2, "learning_rate": rate, "clip_norm": clip_norm},
        "rounds": {"count": 2, "cohort": cohort},
        "evaluate": {"prompt": prompt},
        "data": {"source": "s.jsonl", "split": {"kind": "iid", "clients": 4}, "fields": fields},
        "override": [row],
    }
    recipe = bind(tables)
    again = bind(render(recipe))
    assert again == recipe
    assert digest(again) == digest(recipe)
    assert not changes(recipe, again)


def test_defaults_are_written_out(recipe: Recipe) -> None:
    text = render(recipe)
    assert "max_tokens = 512" in text
    assert "planner" in text
    assert "only" not in text  # none, and none when left out


def test_a_copy_in_another_folder_still_finds_the_data(tmp_path: Path) -> None:
    source, copy = tmp_path / "here" / "recipe.toml", tmp_path / "there" / "recipe.toml"
    source.parent.mkdir()
    copy.parent.mkdir()
    (source.parent / "train.jsonl").write_text("")
    source.write_text(SHORTEST)
    recipe = bind(source)
    copy.write_text(render(recipe))
    assert bind(copy) == recipe
    assert bind(copy).data.source == str(source.parent / "train.jsonl")


@pytest.mark.parametrize(
    "override", ["client.steps=21", "seed=1", "method=zeropad", "evaluate.every=2", "data.split.clients=5"]
)
def test_the_digest_changes_with_what_changes_the_result(recipe: Recipe, override: str) -> None:
    assert digest(bind(SHORTEST, overrides=[override])) != digest(recipe)


def test_the_digest_ignores_name_report_and_folder(recipe: Recipe) -> None:
    other = replace(bind(SHORTEST, overrides=["name=other", "report.plots=false"]), root=Path("elsewhere"))
    assert digest(other) == digest(recipe)
    assert not changes(recipe, other)


def test_changes_are_told_key_by_key(recipe: Recipe) -> None:
    other = bind(SHORTEST, overrides=["client.steps=21", "client.clip_norm=none"])
    assert changes(recipe, other) == ['client.clip_norm: 1.0 -> "none"', "client.steps: 20 -> 21"]
