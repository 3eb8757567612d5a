"""Signatures in the OpenSSF format, by the package itself: what it signs, it verifies, and no changed file passes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedtune.errors import ConfigError, ExtraError, StoreError
from fedtune.link import openssf
from fedtune.link.pki.certificates import pem_of
from fedtune.store import manifest


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    private.write_bytes(pem_of(key))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_model.safetensors").write_bytes(b"numbers")
    (path / ".hidden").write_text("x")
    manifest.write(path, {"round": 3})
    return path


def test_without_the_package_the_extra_is_named(
    folder: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for call, key in zip((openssf.sign, openssf.verify), keys, strict=True):
        with pytest.raises(ExtraError, match=r"pip install 'fedtune\[signing\]'"):
            call(folder, key)


@pytest.mark.guarantee("G19")
def test_what_was_signed_is_verified_and_nothing_else(folder: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("model_signing", reason="the extra signing is not installed")
    private, public = keys
    with pytest.raises(StoreError, match=r"model\.sig: expected a signature; got none"):
        openssf.verify(folder, public)
    assert openssf.sign(folder, private) == folder / "model.sig"
    openssf.verify(folder, public)
    manifest.open_folder(folder).check()  # the signature is no file of the result
    (folder / ".hidden").write_text("y")
    openssf.verify(folder, public)
    for name in ("adapter_model.safetensors", "fedtune.json", "model.sig"):
        whole = (folder / name).read_bytes()
        for at in range(0, len(whole), max(1, len(whole) // 15)):
            if name == "model.sig" and whole[at : at + 1] in b'{}[],: \n"':
                continue
            (folder / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(StoreError, match=r"model\.sig: expected a signature of these files by"):
                openssf.verify(folder, public)
        (folder / name).write_bytes(whole)
    (folder / "added.py").write_text("x")
    with pytest.raises(StoreError, match="expected a signature of these files"):
        openssf.verify(folder, public)
    (folder / "added.py").unlink()
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    public.write_bytes(other.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(StoreError, match="expected a signature of these files"):
        openssf.verify(folder, public)
    for call in (openssf.sign, openssf.verify):
        with pytest.raises(ConfigError, match=r"--openssf: expected a (private|public) key of an elliptic curve"):
            call(folder, tmp_path / "none.pem")
