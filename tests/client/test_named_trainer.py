from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.client.named_trainer import own_trainer
from fedtune.errors import ConfigError
from tests import own_trainers


def test_a_name_and_the_function_are_the_same_trainer(tmp_path: Path) -> None:
    named = own_trainer("tests.own_trainers:sgd", folder=tmp_path)
    assert named == own_trainer(own_trainers.sgd, folder=tmp_path)
    assert named is not None
    assert named.function is own_trainers.sgd
    assert not named.quotes


def test_without_one_fedtune_trains() -> None:
    assert own_trainer(None) is None


def test_a_name_that_python_cannot_import_is_refused_by_the_key() -> None:
    with pytest.raises(ConfigError, match=r"^client.trainer: expected a function that Python can import"):
        own_trainer("tests.own_trainers:missing")
