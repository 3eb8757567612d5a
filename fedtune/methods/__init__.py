"""The table of methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedtune.methods import fedex, fedit, fedkseed, ffa, flexlora, flora, hetlora, zeropad
from fedtune.methods.method import LinearMethod, Method
from fedtune.methods.server_optimizer import with_server_optimizer
from fedtune.methods.settings import LinearSettings

METHODS: Mapping[str, Method[Any]] = {
    "flora": flora.METHOD,
    "fedit": fedit.METHOD,
    "zeropad": zeropad.METHOD,
    "hetlora": hetlora.METHOD,
    "ffa": ffa.METHOD,
    "flexlora": flexlora.METHOD,
    "fedex": fedex.METHOD,
    "fedkseed": fedkseed.METHOD,
}


def with_settings(method: Method[Any], settings: Any) -> Method[Any]:
    """Return a method as its settings ask for it: with the server optimiser that they name, if they name one."""
    if isinstance(method, LinearMethod) and isinstance(settings, LinearSettings):
        optimizer = settings.server_optimizer
        return method if optimizer.name == "none" else with_server_optimizer(method, optimizer)
    return method
