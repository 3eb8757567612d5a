"""A model written at the weights of a seed ledger, and the base that the ledger belongs to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedtune.directions.rebuild_torch import as_array
from fedtune.errors import ConfigError
from fedtune.model.base import Base, digest, manifest_of
from fedtune.model.replay import base_of, write
from fedtune.model.seed_rebuild import with_rebuilt_weights
from fedtune.model.settings import ModelSettings
from tests.model.conftest import ledger_of

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def every(base: Base) -> range:
    return range(len(base.manifest.entries))


@pytest.mark.parametrize(("name", "dtype"), [("llama", "float32"), ("gpt2", "float32"), ("llama", "bfloat16")])
def test_the_model_that_is_written_has_the_rebuilt_weights_to_the_bit(
    name: str, dtype: str, tmp_path: Path, loaded: Any
) -> None:
    base = loaded(name, targets=["all-linear"], dtype=dtype)
    own, ledger = digest(base.model), ledger_of(base, "hadamard")
    with with_rebuilt_weights(base, ledger, every(base)), torch.inference_mode():
        expected = base.model(input_ids=IDS).logits
    weights = write(base, ledger, every(base), tmp_path)
    written = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    assert str(written.dtype) == f"torch.{dtype}"
    assert manifest_of(written).digest.hex() == weights
    with torch.inference_mode():
        assert torch.equal(written(input_ids=IDS).logits, expected)
    assert AutoTokenizer.from_pretrained(tmp_path)("the dog")["input_ids"]
    assert digest(base.model) == own


def test_without_a_folder_the_same_digest_is_made_and_nothing_is_written(tmp_path: Path, loaded: Any) -> None:
    base = loaded()
    ledger = ledger_of(base, "kron")
    weights = write(base, ledger, every(base), None)
    assert not list(tmp_path.iterdir())
    assert write(base, ledger, every(base), tmp_path / "model") == weights


def test_the_digest_is_another_for_other_integers_and_the_base_s_own_for_none(loaded: Any) -> None:
    base = loaded()
    ledger = ledger_of(base, "hadamard")
    sums = ledger.accumulators.copy()
    sums[3] += 1
    first, second = (write(base, each, every(base), None) for each in (ledger, replace(ledger, accumulators=sums)))
    assert first != second
    zeros = replace(ledger, accumulators=np.zeros_like(sums))
    assert write(base, zeros, every(base), None) == base.manifest.digest.hex()
    assert write(base, ledger, every(base), None) == first


def test_only_the_tensors_that_are_named_are_moved(tmp_path: Path, loaded: Any) -> None:
    base = loaded()
    name = base.manifest.entries[4].name
    write(base, ledger_of(base, "hadamard"), [4], tmp_path)
    written = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    own = dict(base.model.named_parameters())
    moved = {key for key in own if as_array(own[key]).tobytes() != as_array(written[key]).tobytes()}
    assert moved == {name}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_base_is_found_in_the_format_that_it_was_used_in(
    dtype: str, loaded: Any, checkpoints: dict[str, Path]
) -> None:
    used = loaded(dtype=dtype)
    settings = ModelSettings(base=str(checkpoints["llama"]), device="cpu")
    found = base_of(ledger_of(used, "hadamard"), settings, seed=0, labels=())
    assert found.manifest.digest == used.manifest.digest
    assert str(found.model.dtype) == f"torch.{dtype}"


def test_a_classifier_s_head_that_the_checkpoint_lacks_is_drawn_from_the_run_s_seed(
    loaded: Any, checkpoints: dict[str, Path]
) -> None:
    labels = ["a", "b", "c"]
    ledger = ledger_of(loaded("bert", targets=["query"], task="classification", labels=labels), "hadamard")
    settings = ModelSettings(base=str(checkpoints["bert"]), task="classification", device="cpu")
    assert base_of(ledger, settings, seed=0, labels=labels).manifest.digest == ledger.manifest
    with pytest.raises(ConfigError, match=r"base: expected the base whose manifest has the digest"):
        base_of(ledger, settings, seed=1, labels=labels)


def test_another_base_is_refused_and_so_is_one_that_was_rebuilt_already(
    tmp_path: Path, loaded: Any, checkpoints: dict[str, Path]
) -> None:
    base = loaded()
    ledger = ledger_of(base, "hadamard")
    write(base, ledger, every(base), tmp_path)
    for path in (tmp_path, checkpoints["gpt2"]):
        message = rf"digest {ledger.manifest.hex()[:16]}; got .*float32, bfloat16, float16; give the model"
        with pytest.raises(ConfigError, match=message):
            base_of(ledger, ModelSettings(base=str(path), device="cpu"), seed=0, labels=())


def test_a_base_that_is_nowhere_is_one_clear_error(loaded: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.base: expected a config\.json in "):
        base_of(ledger_of(loaded(), "hadamard"), ModelSettings(base=str(tmp_path), device="cpu"), seed=0, labels=())
