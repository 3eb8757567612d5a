from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, snapshot_download

from fedtune.errors import ConfigError
from fedtune.model import base_files
from fedtune.model.base import load, load_tokenizer
from fedtune.model.base_files import check_folder, hub_reachable, locate, readable
from fedtune.model.settings import AdapterSettings, ModelSettings

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture
def folder(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the tiny Llama, for a test to spoil."""
    shutil.copytree(checkpoints["llama"], tmp_path / "base")
    return tmp_path / "base"


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def only_pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def lfs_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_text(LFS)


def lfs_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(LFS)


def torn(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def no_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 2000)


def missing_part(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def torn_part(folder: Path) -> None:
    torn(folder)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def adapter_alone(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))


def adapter_beside(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def own_code(folder: Path) -> None:
    change_config(folder, model_type="mynet", auto_map={"AutoConfig": "configuration_my.MyConfig"})


def newer_type(folder: Path) -> None:
    change_config(folder, model_type="llama99")


def two_stacks(folder: Path) -> None:
    change_config(folder, model_type="t5", is_encoder_decoder=True)


def quantised(method: str) -> Callable[[Path], None]:
    return lambda folder: change_config(folder, quantization_config={"quant_method": method})


SPOILT: dict[Callable[[Path], None], str] = {
    only_pickled: r"got pytorch_model\.bin, a pickle, which can run code.*from_pretrained\('.*'\)\.save_pretrained",
    no_weights: r"got no weights among .*config\.json",
    lfs_weights: r"pointers of Git LFS in place of model\.safetensors; fetch them with git lfs pull",
    lfs_tokenizer: r"pointers of Git LFS in place of tokenizer\.json",
    torn: r"the whole file .*model\.safetensors; got the first [\d,]+ of its [\d,]+ bytes",
    no_header: r"safetensors in .*model\.safetensors; got no header",
    missing_part: r"all 2 files .*got no model-00002-of-00002\.safetensors",
    torn_part: r"the whole file .*a\.safetensors",
    no_tokenizer: r"expected a tokenizer in .*got none",
    adapter_alone: r'a whole model; got an adapter in .*set model\.base = "some/base"',
    adapter_beside: r"without an adapter beside it; got both.*move adapter_config\.json",
    no_config: r"a config\.json in .*got .*model\.safetensors",
    broken_config: r"JSON in .*config\.json",
    list_config: r"an object in .*config\.json; got list",
    own_code: r"of type 'mynet', which comes with code of its own",
    newer_type: r"of type 'llama99'; .*upgrade transformers",
    two_stacks: r"an encoder-decoder \(t5\)",
    quantised(
        "bitsandbytes"
    ): r"the original weights, .*; got .*, quantised by 'bitsandbytes' already; .*dtype = \"nf4\"",
    quantised("gptq"): r"the package gptqmodel, which reads weights quantised by 'gptq'.*pip install gptqmodel",
    quantised("compressed-tensors"): r"the package compressed-tensors",
    quantised("quanto"): r"optimum\.quanto.*pip install optimum-quanto",
    quantised("of-tomorrow"): r"a library that transformers does not know",
}


@pytest.mark.parametrize(
    ("spoil", "message"), SPOILT.items(), ids=[getattr(spoil, "__name__", "spoil") for spoil in SPOILT]
)
def test_a_folder_that_cannot_be_used_says_why_and_what_to_do(
    spoil: Callable[[Path], None], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_files, "is_installed", lambda module: False)
    spoil(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        load_tokenizer(ModelSettings(base=str(folder)), Path())
    assert "download the model once" not in str(caught.value)


@pytest.mark.guarantee("G1")
def test_weights_are_never_unpickled(folder: Path, checkpoints: dict[str, Path]) -> None:
    only_pickled(folder)
    settings = ModelSettings(base=str(folder), device="cpu")
    tokenizer = load_tokenizer(ModelSettings(base=str(checkpoints["llama"])), Path())
    with pytest.raises(ConfigError, match="a pickle"):
        load(settings, AdapterSettings(rank=1, targets=["q_proj"]), tokenizer=tokenizer, root=Path(), seed=0)


def test_a_whole_folder_passes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_folder(ModelSettings(base=str(folder)), folder)
    monkeypatch.setattr(base_files, "is_installed", lambda module: True)
    quantised("gptq")(folder)
    check_folder(ModelSettings(base=str(folder)), folder)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c"])
def test_a_name_that_looks_like_a_path_is_never_looked_up_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_files, "hub_reachable", lambda endpoint: pytest.fail("asked the network"))
    with pytest.raises(ConfigError, match=r"model\.base: .*got nothing at "):
        locate(ModelSettings(base=name), tmp_path)


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.txt").write_text("")
    with pytest.raises(ConfigError, match=r"got another file at .*model\.txt"):
        locate(ModelSettings(base="model.txt"), tmp_path)


def test_a_hub_name_stays_one(tmp_path: Path) -> None:
    assert locate(ModelSettings(base="org/model"), tmp_path) == "org/model"
    assert locate(ModelSettings(base="gpt2"), tmp_path) == "gpt2"


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries' own setting for no network is off, and no proxy is set."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(base_files, "getproxies", dict)
    hub_reachable.cache_clear()


def test_a_hub_out_of_reach_is_said_at_once(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: refused
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(ConfigError, match=r"127\.0\.0\.1 cannot be reached, and the model is not in the cache"):
            load_tokenizer(ModelSettings(base="org/no-such-model"), Path())


def test_a_cached_model_is_read_from_the_cache_where_the_hub_is_out_of_reach(
    online: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    refs = tmp_path / "hub" / "models--org--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr(base_files, "hub_reachable", lambda endpoint: False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    original = snapshot_download
    monkeypatch.setattr(
        base_files, "snapshot_download", lambda name, **more: original(name, cache_dir=tmp_path / "hub", **more)
    )
    assert readable("org/tiny", None) == snapshot
    load_tokenizer(ModelSettings(base="org/tiny"), Path())


def test_a_hub_that_answers_is_reachable(online: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert hub_reachable(f"http://127.0.0.1:{server.getsockname()[1]}")


def test_a_proxy_stands_for_the_hub(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(base_files, "getproxies", lambda: {"https": address})
        assert hub_reachable("https://no.such.host.invalid")
