"""The table of methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedtune.methods import fedex, fedit, fedkseed, ffa, flexlora, flora, hetlora, zeropad
from fedtune.methods.method import LinearMethod, Method
from fedtune.methods.robust import with_robust_rule
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
    """Return a method as its settings ask for it: with the server optimiser and the robust rule that they name."""
    if not isinstance(method, LinearMethod) or not isinstance(settings, LinearSettings):
        return method
    if settings.server_optimizer.name != "none":
        method = with_server_optimizer(method, settings.server_optimizer)
    # The optimiser inside: it takes the step towards what the rule has made of the clients' changes.
    return method if settings.robust.name == "none" else with_robust_rule(method, settings.robust)
