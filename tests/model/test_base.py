from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from fedtune.data.encode import Example
from fedtune.directions.seed_ledger import decode_manifest
from fedtune.errors import ConfigError
from fedtune.model.base import base_from_object, digest, load, load_tokenizer, manifest_of
from fedtune.model.batches import collate
from fedtune.model.settings import AdapterSettings, ModelSettings


def test_a_head_that_the_checkpoint_lacks_is_trained_and_drawn_from_the_seed(loaded: Any) -> None:
    base = loaded("bert", targets=["query"], task="classification", labels=["a", "b", "c"])
    assert base.saved == ["classifier.bias", "classifier.weight"]
    assert base.saved_modules == ["classifier"]
    again = loaded("bert", targets=["query"], task="classification", labels=["a", "b", "c"])
    np.testing.assert_array_equal(base.saved_tensors()["classifier.weight"], again.saved_tensors()["classifier.weight"])
    assert base.saved_tensors()["classifier.weight"].shape == (3, 32)
    assert base.digest == again.digest


def test_the_digest_tells_other_weights_apart(loaded: Any) -> None:
    base = loaded()
    assert base.digest == digest(base.model)
    with torch.no_grad():
        next(base.model.parameters()).view(-1)[0] += 1
    assert base.digest != digest(base.model)


def test_a_base_that_is_nowhere_gives_one_clear_error() -> None:
    with pytest.raises(ConfigError, match=r"model\.base: expected a folder with config\.json.*'no/such-model'"):
        load_tokenizer(ModelSettings(base="no/such-model"), Path())


def test_a_broken_checkpoint_gives_one_clear_error(tmp_path: Path, checkpoints: dict[str, Path], loaded: Any) -> None:
    for file in checkpoints["llama"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    checkpoints = {**checkpoints, "llama": tmp_path}
    from fedtune.model.base import load
    from fedtune.model.settings import AdapterSettings

    settings = ModelSettings(base=str(tmp_path), device="cpu")
    with pytest.raises(ConfigError, match=r"model\.base"):
        load(
            settings,
            AdapterSettings(rank=4, targets=["q_proj"]),
            tokenizer=load_tokenizer(settings, Path()),
            root=Path(),
            seed=0,
        )


def test_code_that_came_with_a_checkpoint_is_never_run_nor_asked_for(
    tmp_path: Path, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "y")  # type: ignore[func-returns-value]
    auto = {"AutoConfig": "foreign.Foreign", "AutoTokenizer": [None, "foreign.Foreign"]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "foreign", "auto_map": auto}))
    (tmp_path / "foreign.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    settings = ModelSettings(base=str(tmp_path))
    tokenizer = load_tokenizer(ModelSettings(base=str(checkpoints["llama"])), Path())
    with pytest.raises(ConfigError, match=r"model\.base"):
        load_tokenizer(settings, Path())
    with pytest.raises(ConfigError, match=r"model\.base"):
        load(settings, AdapterSettings(rank=1, targets=["q_proj"]), tokenizer=tokenizer, root=Path(), seed=0)
    assert not asked
    assert not (tmp_path / "ran").exists()


def test_a_causal_checkpoint_without_all_its_weights_is_refused(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    tensors = load_file(checkpoints["llama"] / "model.safetensors")
    shutil.copytree(checkpoints["llama"], tmp_path, dirs_exist_ok=True)
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    settings = ModelSettings(base=str(tmp_path), device="cpu")
    tokenizer = load_tokenizer(settings, Path())
    with pytest.raises(ConfigError, match=r"model\.base: .*lm_head\.weight"):
        load(settings, AdapterSettings(rank=1, targets=["q_proj"]), tokenizer=tokenizer, root=Path(), seed=0)


def test_a_classifier_without_a_padding_token_reads_the_last_token_of_each_text(
    tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    shutil.copytree(checkpoints["gpt2"], tmp_path, dirs_exist_ok=True)
    for name, key in (("config.json", "pad_token_id"), ("tokenizer_config.json", "pad_token")):
        values = json.loads((tmp_path / name).read_text())
        del values[key]
        (tmp_path / name).write_text(json.dumps(values))
    settings = ModelSettings(base=str(tmp_path), task="classification", device="cpu")
    tokenizer = load_tokenizer(settings, Path())
    adapter = AdapterSettings(rank=1, targets=["c_attn"])
    base = load(settings, adapter, tokenizer=tokenizer, root=Path(), seed=0, labels=["a", "b"])
    assert tokenizer.pad_token_id is None
    rows = [Example(np.arange(3, 3 + n), 0, 0, "", "", n) for n in (4, 9)]
    with torch.inference_mode():
        alone, padded = (
            base.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[0]
            for batch in (collate(rows[:1], base), collate(rows, base))
        )
    torch.testing.assert_close(alone, padded)


def test_the_manifest_lists_every_parameter_once_sorted_by_its_name(loaded: Any) -> None:
    base = loaded("gpt2", targets=["c_attn"])
    names = [entry.name for entry in base.manifest.entries]
    assert names == sorted(names, key=str.encode)
    assert names == sorted(name for name, _ in base.model.named_parameters())
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names  # tied to it
    assert "lm_head.weight" in [entry.name for entry in loaded("llama").manifest.entries]


@pytest.mark.parametrize(("dtype", "short", "size"), [("float32", "fp32", 4), ("bfloat16", "bf16", 2)])
def test_a_line_of_the_manifest_is_shape_format_and_digest_of_the_bytes(
    dtype: str, short: str, size: int, loaded: Any
) -> None:
    base = loaded("gpt2", targets=["c_attn"], dtype=dtype)
    name = "transformer.h.0.attn.c_attn.weight"
    entry = base.manifest.entries[base.manifest.ordinals[name]]
    assert (entry.dtype, entry.shape) == (short, (32, 96))  # as it is stored, (in, out)
    data = base.model.get_parameter(name).detach().contiguous().view(torch.uint8).numpy().tobytes()
    assert len(data) == 32 * 96 * size
    assert entry.digest == hashlib.sha256(data).digest()


def test_the_manifest_travels_to_the_method_only_where_it_needs_all_of_the_base(loaded: Any) -> None:
    base = loaded()
    assert base.blueprint(max_rank=1, seed=0).manifest == b""
    assert decode_manifest(base.blueprint(max_rank=1, seed=0, whole=True).manifest) == base.manifest


def test_every_weight_that_is_no_finite_number_of_a_known_format_is_named(loaded: Any) -> None:
    model = loaded().model
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[3] = float("nan")
        model.get_parameter("lm_head.weight")[2, 1] = -float("inf")
    model.model.layers[0].mlp.up_proj.double()
    with pytest.raises(ConfigError) as caught:
        manifest_of(model)
    assert {fault.path: fault.got for fault in caught.value.faults} == {
        "lm_head.weight": "NaN or infinity",
        "model.layers.0.mlp.up_proj.weight": "torch.float64",
        "model.norm.weight": "NaN or infinity",
    }


def test_matrices_are_those_of_the_adapted_layers_and_of_a_head_that_is_trained_in_full(loaded: Any) -> None:
    assert loaded(targets=["q_proj"]).matrices == {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}
    assert "lm_head.weight" in loaded(targets=["q_proj"], saved=["lm_head"]).matrices
    head = loaded("bert", targets=["query"], task="classification", labels=["a", "b"]).matrices
    assert head == {*(f"bert.encoder.layer.{i}.attention.self.query.weight" for i in (0, 1)), "classifier.weight"}


def test_a_model_of_python_code_brings_its_own_number_format(loaded: Any) -> None:
    given = loaded("llama", dtype="bfloat16")
    settings = ModelSettings(base="<python>", device="cpu")
    base = base_from_object(settings, AdapterSettings(targets=["q_proj"]), (given.model, given.tokenizer))
    assert base.dtype == "bfloat16"


def test_a_model_of_python_code_is_quantised_as_a_copy_and_serves_another_run(loaded: Any) -> None:
    given = loaded("llama", targets=["q_proj"])
    pair, adapter = (given.model, given.tokenizer), AdapterSettings(targets=["q_proj"])
    settings = ModelSettings(base="<python>", device="cpu", dtype="nf4")
    first, second = base_from_object(settings, adapter, pair), base_from_object(settings, adapter, pair)
    plain = base_from_object(replace(settings, dtype="float32"), adapter, pair)
    assert first.codes == second.codes != b""
    assert plain.codes == b""
    assert first.digest == second.digest == plain.digest == digest(given.model)
    # Only codes take memory.
    norm = "model.norm.weight"
    assert first.model.get_parameter(norm) is plain.model.get_parameter(norm)
    with pytest.raises(ConfigError, match=r"model: expected a model that holds its weights"):
        base_from_object(replace(settings, dtype="float32"), adapter, (first.model, given.tokenizer))
    with pytest.raises(ConfigError, match=r"model\.dtype: expected a base in float32; got one in nf4"):
        base_from_object(replace(settings, dtype="float32"), adapter, first)
