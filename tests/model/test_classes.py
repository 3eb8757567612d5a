from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedtune.model.base import Base, load, load_tokenizer
from fedtune.model.base_config import class_order
from fedtune.model.classes import head_modules, match_classes, output_layer
from fedtune.model.settings import AdapterSettings, ModelSettings
from tests.model.families import CLASSIFIERS, build

OWN = ["yes", "no", "maybe"]


@pytest.fixture(scope="module")
def folder(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with a head of its own, whose rows are OWN."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["llama"])
    return build("bert", CLASSIFIERS["bert"], tmp_path_factory.mktemp("own"), tokenizer, task="classification")


def load_classifier(folder: Path, labels: list[str], *, seed: int = 0, dtype: Any = "float32") -> Base:
    settings = ModelSettings(base=str(folder), task="classification", device="cpu", dtype=dtype)
    adapter, tokenizer = AdapterSettings(rank=2, targets=["query"]), load_tokenizer(settings, Path())
    return load(settings, adapter, tokenizer=tokenizer, root=Path(), seed=seed, labels=labels)


@pytest.mark.parametrize(
    ("own", "labels", "order", "fits", "note"),
    [
        (OWN, ["maybe", "no", "yes"], OWN, True, ""),
        (OWN, ["no", "yes"], OWN, True, "2 of the base's 3 classes (not maybe)"),
        (["LABEL_0", "LABEL_1"], ["bad", "good"], ["bad", "good"], True, "taken for bad, good"),
        (["LABEL_0", "LABEL_1"], ["LABEL_1", "LABEL_0"], ["LABEL_0", "LABEL_1"], True, ""),
        (["LABEL_0", "LABEL_1"], ["a", "b", "c"], ["a", "b", "c"], False, "other classes (LABEL_0, LABEL_1)"),
        (["up", "down"], ["bad", "good"], ["bad", "good"], False, "a new one is drawn"),
        (["a", "a"], ["a", "b"], ["a", "b"], False, "a new one"),
        ([], ["a", "b"], ["a", "b"], False, "a new one"),
    ],
)
def test_the_bases_names_are_the_truth_where_the_data_use_them(
    own: list[str], labels: list[str], order: list[str], fits: bool, note: str
) -> None:
    classes = match_classes(own, labels)
    assert classes.labels == order
    assert classes.fits is fits
    assert (note in classes.note) if note else classes.note == ""


def test_a_head_of_the_datas_classes_is_kept_row_by_row(folder: Path) -> None:
    settings = ModelSettings(base=str(folder), task="classification")
    assert class_order(settings, Path(), ["maybe", "no", "yes"]) == OWN
    base = load_classifier(folder, OWN)
    stock = AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(base.model.classifier.weight, stock.classifier.weight)
    assert base.model.config.id2label == dict(enumerate(OWN))
    assert base.saved == ["classifier.bias", "classifier.weight"]  # it travels, although it is not new
    assert base.notes == ()


@pytest.mark.parametrize("labels", [["a", "b", "c"], ["a", "b"]])
def test_a_head_of_other_classes_is_drawn_anew_from_the_seed_and_said(labels: list[str], folder: Path) -> None:
    base, again, other = (load_classifier(folder, labels, seed=seed) for seed in (0, 0, 1))
    weight = base.model.classifier.weight
    assert weight.shape == (len(labels), 32)
    stock = AutoModelForSequenceClassification.from_pretrained(folder).classifier.weight
    assert not torch.equal(weight, stock[: len(labels)])
    assert torch.equal(weight, again.model.classifier.weight)
    assert not torch.equal(weight, other.model.classifier.weight)
    assert float(weight.detach().abs().max()) > 0
    # The digest is of what sites have in common: not of the head, which the seed draws.
    assert base.digest == other.digest
    assert base.notes == (
        f"the base's head is of other classes (yes, no, maybe) than the data ({', '.join(labels)}): a new one is drawn",
    )
    assert list(base.model.config.id2label.values()) == labels


def test_a_checkpoint_without_a_head_needs_no_word(checkpoints: dict[str, Path]) -> None:
    assert load_classifier(checkpoints["bert"], ["a", "b", "c"]).notes == ()


def test_the_layers_beside_the_body_are_the_head(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["llama"])
    heads = {
        "distilbert": (["pre_classifier", "classifier"], "classifier"),
        "roberta": (["classifier"], "classifier.out_proj"),
        "gpt2": (["score"], "score"),
    }
    for kind, (modules, last) in heads.items():
        path = build(kind, CLASSIFIERS[kind], tmp_path / kind, tokenizer, task="classification")
        model = AutoModelForSequenceClassification.from_pretrained(path)
        assert head_modules(model) == modules
        assert output_layer(model) == last


def test_a_body_without_all_its_layers_is_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from fedtune.errors import ConfigError

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if "layer.1.output" not in name},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ConfigError, match=r"it lacks .* bert\.encoder\.layer\.1\.output"):
        load_classifier(tmp_path, OWN)
