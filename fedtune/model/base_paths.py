"""The path of a local base, as opposed to a hub name, refused where nothing is or a tokenizer lacks; without torch."""

from __future__ import annotations

from pathlib import Path

from fedtune.errors import ConfigError, Fault
from fedtune.model.settings import ModelSettings

VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"),
    *("tekken.json", "spm.model", "vocab.bpe", "bpe.codes"),
)
"""Files one of which a folder with a tokenizer holds."""


def local_base(settings: ModelSettings, root: Path) -> Path | None:
    """Return the folder of a local base, relative to the recipe, or a file in its place; None for a hub name.

    Raises:
        ConfigError: if there is nothing where a path leads, or a file that is no base.
    """
    local = root / Path(settings.base).expanduser()
    if local.is_dir() or (local.suffix == ".gguf" and local.is_file()):
        return local
    if local.exists() or settings.base.startswith((".", "/", "~")) or settings.base.count("/") > 1:
        got = f"another file at {local}" if local.exists() else f"nothing at {local}"
        expected = "a folder with config.json, tokenizer and safetensors, or a GGUF file"
        raise ConfigError(Fault("model.base", expected, got, "check the path; a hub name has one slash"))
    return None


def check_vocabulary(path: str | Path) -> None:
    """Refuse a base's folder without a tokenizer.

    Raises:
        ConfigError: naming the folder.
    """
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in VOCABULARIES):
        expected = f"a tokenizer in {folder} (tokenizer.json, or another of its files)"
        hint = "copy the files of the model's tokenizer there"
        raise ConfigError(Fault("model.base", expected, "none", hint))
