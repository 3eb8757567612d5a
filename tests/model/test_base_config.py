from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from fedtune.errors import ConfigError
from fedtune.model.base_config import class_order, read_config
from fedtune.model.settings import ModelSettings
from tests.model.families import CLASSIFIERS, build


def test_the_config_has_the_classes_in_the_order_of_the_bases_head(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["llama"])
    folder = build("gpt2", CLASSIFIERS["gpt2"], tmp_path, tokenizer, task="classification")
    settings = ModelSettings(base=str(folder), task="classification")
    config, classes = read_config(folder, settings, ("maybe", "no", "yes"))
    assert config.id2label == {0: "yes", 1: "no", 2: "maybe"}
    assert config.label2id == {"yes": 0, "no": 1, "maybe": 2}
    assert classes.fits
    assert class_order(settings, Path(), ("no", "maybe", "yes")) == ["yes", "no", "maybe"]
    assert read_config(folder, settings, ("a", "b"))[0].num_labels == 2


def test_a_model_without_a_head_for_the_task_is_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("vit").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"a head for model\.task = 'causal'; got .*\(vit\)"):
        read_config(tmp_path, ModelSettings(base=str(tmp_path)), ())


def test_a_base_that_is_nowhere_has_no_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: Any = ModelSettings(base="no/such-model", task="classification")
    with pytest.raises(ConfigError, match=r"model\.base"):
        class_order(settings, Path(), ("a", "b"))
