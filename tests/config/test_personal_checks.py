"""What a recipe may not say beside [personal], each in one sentence that says what to do."""

from __future__ import annotations

from typing import Any

import pytest

from fedtune.config import bind, digest, render
from fedtune.errors import ConfigError
from fedtune.messages import Personal

TABLES: dict[str, Any] = {
    "name": "own",
    "model": {"base": "embedded"},
    "adapter": {"rank": 4, "targets": ["q_proj"]},
    "method": "fedit",
    "client": {"steps": 2, "learning_rate": 0.1},
    "data": {"source": "no-data"},
}


def bound(personal: dict[str, Any] | None = None, **changes: Any) -> Any:
    tables = {**TABLES, **changes}
    return bind(tables if personal is None else {**tables, "personal": personal})


def test_a_table_is_read_rendered_and_part_of_the_digest() -> None:
    recipe = bound({"kind": "fedrep", "keep": ["*.b"], "rate": 0.01, "steps": 3})
    assert recipe.personal == Personal("fedrep", keep=("*.b",), rate=0.01, steps=3)
    assert bind(render(recipe)) == recipe
    assert bound().personal is None
    assert "personal" not in render(bound())
    assert digest(recipe) != digest(bound())


@pytest.mark.parametrize(
    ("personal", "changes", "text"),
    [
        ({}, {"method": "flora"}, "its clients draw new factors in every round"),
        ({}, {"method": "fedkseed"}, "its clients train no adapter"),
        ({}, {"method": "flexlora"}, "of other coordinates"),
        ({}, {"method": "fedex"}, "moves what the mean lacks into the base"),
        (
            {},
            {"model": {"base": "embedded", "processes": 2}},
            "model.processes: expected none beside [personal]; got 2",
        ),
        ({"kind": "fedrep"}, {}, "personal.keep: expected globs over the tensors that stay"),
        ({"kind": "ditto", "keep": ["*.b"]}, {}, 'personal.keep: expected none with kind = "ditto"'),
        ({"kind": "share-a", "strength": 1.0}, {}, 'personal.strength: expected none with kind = "share-a"'),
        ({"kind": "fedbn", "steps": 3}, {}, 'personal.steps: expected none with kind = "fedbn"'),
        ({"kind": "share-a"}, {"adapter": {**TABLES["adapter"], "start": "else"}}, "adapter.start: expected none with"),
        (
            {"kind": "pfedme"},
            {"client": {"steps": 2, "learning_rate": 0.1}},
            "personal.strength: expected at most 10, one over client.learning_rate",
        ),
        (
            {"kind": "ditto", "strength": 30.0},
            {"client": {"steps": 2, "learning_rate": 0.1, "optimizer": "sgd"}},
            "personal.strength: expected at most 10",
        ),
        (
            {"kind": "fedrep", "keep": ["*.b"]},
            {"client": {"steps": 2, "proximal": 0.1}},
            'client.proximal: expected 0 with personal.kind = "fedrep"',
        ),
        ({"kind": "apfl"}, {}, "personal.kind: expected"),
        ({"kind": "ditto", "strength": -1.0}, {}, "personal.strength: expected"),
    ],
)
def test_what_cannot_be_right_is_refused_by_key(personal: dict[str, Any], changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        bound(personal, **changes)
    assert text in str(error.value)


def test_adam_takes_any_pull_because_its_steps_have_the_size_of_the_rate() -> None:
    assert bound({"kind": "ditto", "strength": 1e6}).personal.pull == 1e6
