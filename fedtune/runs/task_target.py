"""The model that `fedtune evaluate --tasks` scores: a run's, an adapter's, or a base as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.data.settings import DataSettings, Split
from fedtune.errors import ConfigError, Fault
from fedtune.methods.method import GlobalModel
from fedtune.model.settings import AdapterSettings, ModelSettings
from fedtune.rounds.events import Watch
from fedtune.runs.chat import Speaker, check_task, load_base, open_speaker

# torch and transformers take seconds to import, so `model` is imported where it is needed.


@dataclass(frozen=True)
class Target:
    """What is scored."""

    speaker: Speaker
    views: Mapping[str, bool]
    """Names of its models, and whether they are tuned: `before` and `after`, or `base` alone."""

    def facts(self) -> Mapping[str, Any]:
        """Return by what the model is known again."""
        base = self.speaker.base
        return {"base": base.name, "base_digest": base.digest, "dtype": base.dtype, "device": str(base.device)}


def open_target(source: str, *, base: str | None, watch: Watch) -> Target:
    """Load a run directory, a PEFT adapter with its base, or a plain base such as a merged model.

    What is meant as an adapter is never scored as its base alone: a folder with an adapter that cannot be read is
    refused.

    Raises:
        ConfigError: if it is none of these, or not a causal model.
        StoreError: if a run holds no result.
    """
    folder = Path(source)
    if (folder / "recipe.toml").is_file() or is_adapter(folder):
        speaker = open_speaker(folder, base=base, watch=watch)
        return Target(speaker, {"before": False, "after": True})
    if base is not None:
        got = f"{source}, which is neither a run nor an adapter"
        raise ConfigError(Fault("--base", "a run or an adapter that is to be scored over it", got, "leave --base out"))
    if folder.is_dir() and not (folder / "config.json").is_file():
        expected = "a run directory, a PEFT adapter or a model (with config.json)"
        raise ConfigError(Fault(source, expected, "a folder with none of their files"))
    model = ModelSettings(base=source)
    loaded = load_base(model, AdapterSettings(rank=1), Path(), 0, watch)
    check_task(loaded.task, folder)
    data = DataSettings(source="", split=Split(kind="iid", clients=1))
    return Target(Speaker(loaded, GlobalModel(), data, "instruction", model.threads), {"base": False})


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds, or should hold, an adapter: any of its files is there."""
    return any(folder.glob("adapter_*"))
