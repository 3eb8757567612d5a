from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedtune.errors import ConfigError, ExtraError
from fedtune.model import gguf
from fedtune.model.base import load, load_tokenizer
from fedtune.model.base_files import locate
from fedtune.model.settings import AdapterSettings, ModelSettings
from tests.model.gguf_files import CHAT, write_gguf


@pytest.fixture(autouse=True)
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fedtune" / "gguf"


@pytest.fixture
def written(tmp_path: Path, checkpoints: dict[str, Path]) -> tuple[Path, Any]:
    """A GGUF file, and the model that it was made from."""
    file = tmp_path / "folder" / "tiny.gguf"
    file.parent.mkdir()
    return file, write_gguf(checkpoints["llama"], file)


def load_base(base: Path) -> Any:
    settings = ModelSettings(base=str(base), device="cpu")
    adapter, tokenizer = AdapterSettings(rank=2, targets=["q_proj"]), load_tokenizer(settings, Path())
    return load(settings, adapter, tokenizer=tokenizer, root=Path(), seed=0)


def test_a_gguf_file_is_the_model_that_it_was_made_from(written: Any, checkpoints: dict[str, Path]) -> None:
    file, model = written
    base = load_base(file)
    for name, tensor in model.state_dict().items():
        assert torch.equal(base.model.state_dict()[name], tensor), name
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(base.model(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    # The digest is the one of the original folder: both hold the same base.
    assert base.digest == load_base(checkpoints["llama"]).digest
    assert load_base(file.parent).digest == base.digest  # the folder of the file will do


def test_a_converted_folder_is_stock_and_has_the_tokenizer_with_its_chat_template(
    written: Any, checkpoints: dict[str, Path]
) -> None:
    folder = gguf.convert_once(written[0])
    tokenizer, origin = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(checkpoints["llama"])
    assert tokenizer.chat_template == CHAT
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
    assert [getattr(tokenizer, name) for name in names] == [getattr(origin, name) for name in names]
    text = "the quick fox, 12 dogs"
    assert tokenizer(text)["input_ids"] == [1, *origin(text)["input_ids"]]  # add_bos_token, as the file says
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    AutoModelForCausalLM.from_pretrained(folder)


def test_a_folder_is_converted_once_and_again_where_it_is_damaged(
    written: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = gguf.convert_once(written[0])
    reads: list[Path] = []
    original = gguf.read

    def read(file: Path) -> Any:
        reads.append(file)
        return original(file)

    monkeypatch.setattr(gguf, "read", read)
    assert gguf.convert_once(written[0]) == folder
    assert not reads
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    gguf.convert_once(written[0])
    assert len(reads) == 1
    assert gguf.intact(folder)
    (folder / "tokenizer.json").unlink()
    gguf.convert_once(written[0])
    assert len(reads) == 2


def test_two_processes_at_once_convert_once(written: Any, cached: Path) -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        first, second = pool.map(gguf.convert_once, [written[0]] * 2)
    assert first == second
    assert [path.name for path in cached.iterdir() if path.is_dir()] == [first.name]
    assert gguf.intact(first)


def test_the_rotary_factors_of_llama_3_1_go_into_the_config(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    # Head width 8: four frequencies 10000^(-i/4), wavelengths 6, 63, 628 and 6283 of which those above 8192 / 4 shrink.
    def factors(factor: float) -> np.ndarray[Any, Any]:
        frequencies = 10000.0 ** (-np.arange(4) / 4)
        waves = 2 * np.pi / frequencies
        smooth = np.clip((8192 / waves - 1.0) / (4.0 - 1.0), 0.0, 1.0)
        return np.asarray(1.0 / ((1 - smooth) / factor + smooth), np.float32)

    wanted = factors(8.0)
    assert wanted[:3].tolist() == [1.0, 1.0, 1.0]
    assert 1.0 < wanted[3] < 8.0
    file = tmp_path / "long.gguf"
    write_gguf(checkpoints["llama"], file, factors=wanted)
    with pytest.raises(ConfigError, match=r"rotary factors of Llama 3\.1's rule"):
        gguf.convert_once(file)  # the largest factor is not reached, so the rule's own cannot be known


def test_rotary_factors_that_reach_their_factor_are_read(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    folder = tmp_path / "wide"
    model = AutoModelForCausalLM.from_pretrained(checkpoints["llama"])
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoints["llama"]).save_pretrained(folder)
    frequencies = 500000.0 ** (-np.arange(4) / 4)
    waves = 2 * np.pi / frequencies
    smooth = np.clip((8192 / waves - 1.0) / 3.0, 0.0, 1.0)
    factors = 1.0 / ((1 - smooth) / 8.0 + smooth)
    file = tmp_path / "long.gguf"
    write_gguf(folder, file, factors=factors)
    base = AutoModelForCausalLM.from_pretrained(gguf.convert_once(file))
    assert base.config.rope_parameters["rope_type"] == "llama3"
    np.testing.assert_allclose(base.model.rotary_emb.inv_freq.numpy(), frequencies / factors, rtol=1e-3)


def test_a_tensor_that_transformers_drops_is_refused(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    file = tmp_path / "strange.gguf"
    write_gguf(checkpoints["llama"], file, more={"blk.0.attn_q.bias": np.ones(32)})
    with pytest.raises(ConfigError, match=r"every tensor transformers loads; got .* weights in strange\.gguf"):
        gguf.convert_once(file)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (b"something else", "another file"),
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 40, "a whole GGUF file"),
    ],
)
def test_a_file_that_is_no_whole_gguf_file_is_one_clear_error(data: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(ModelSettings(base=str(file)), Path())


def test_a_torn_file_is_one_clear_error(written: Any, cached: Path) -> None:
    file, _ = written
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ConfigError, match="a whole GGUF file"):
        gguf.convert_once(file)
    assert not [path for path in cached.iterdir() if path.is_dir()]  # nothing half-written


def test_several_files_in_a_folder_are_named(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"one GGUF file; got 2 in .*a\.gguf, b\.gguf"):
        locate(ModelSettings(base=str(tmp_path)), Path())


def test_a_cache_that_cannot_be_written_is_named(written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME"):
        gguf.convert_once(written[0])


def test_the_package_that_reads_the_files_is_named(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(ExtraError, match=r"fedtune\[gguf\]"):
        gguf.convert_once(written[0])
