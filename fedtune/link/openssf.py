"""Signatures of a folder in the format of OpenSSF Model Signing, by the package `model-signing` (extra `signing`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature

from fedtune.errors import ConfigError, ExtraError, Fault, StoreError
from fedtune.store import manifest

EXTRA = "expected the package model-signing for --openssf; install it with pip install 'fedtune[signing]'"


def sign(folder: Path, key: Path) -> Path:
    """Write `model.sig` into a folder, over all its files but those whose names begin with a dot, and return it.

    Args:
        folder: of a result; its manifest and its signature are among the files that are signed.
        key: private key in PEM, on the curve P-256, P-384 or P-521: the format knows no Ed25519.

    Raises:
        ExtraError: without the package.
        ConfigError: if the key cannot be used.
    """
    signing, hashing = _modules("signing")
    target = folder / manifest.OPENSSF
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=key)
    except (OSError, ValueError, TypeError) as error:
        raise key_error("private", key, error) from None
    config.set_hashing_config(_hashing(hashing, folder)).sign(folder, target)
    return target


def verify(folder: Path, key: Path) -> None:
    """Verify the `model.sig` of a folder with a public key in PEM.

    Raises:
        ExtraError: without the package.
        ConfigError: if the key cannot be used.
        StoreError: if there is no signature, it is by another key, or a file was added, removed or changed.
    """
    verifying, hashing = _modules("verifying")
    target = folder / manifest.OPENSSF
    if not target.is_file():
        raise StoreError(f"{target}: expected a signature; got none; fedtune sign --openssf KEY writes it")
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=key)
    except (OSError, ValueError, TypeError) as error:
        raise key_error("public", key, error) from None
    config.set_hashing_config(_hashing(hashing, folder))
    try:
        config.verify(folder, target)
    # The package raises errors of many kinds, of its parsers among them, for bytes that are not as they were signed.
    except (InvalidSignature, ValueError, TypeError, LookupError, AttributeError, OSError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise StoreError(f"{target}: expected a signature of these files by {key}; got another; {reason}") from error


def key_error(kind: str, key: Path, error: Exception) -> ConfigError:
    return ConfigError(Fault("--openssf", f"a {kind} key of an elliptic curve in {key}", str(error)[:200]))


def _hashing(hashing: Any, folder: Path) -> Any:
    """Return how files are hashed: one digest each, links refused, and names that begin with a dot left out."""
    ignored = [path for path in sorted(folder.rglob(".*"))] + [folder / manifest.OPENSSF]
    return hashing.Config().use_file_serialization(allow_symlinks=False).set_ignored_paths(paths=ignored)


def _modules(name: str) -> tuple[Any, Any]:
    try:
        from model_signing import hashing, signing, verifying
    except ImportError:
        raise ExtraError(EXTRA) from None
    return {"signing": signing, "verifying": verifying}[name], hashing
