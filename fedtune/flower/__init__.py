"""fedtune as a Flower app, and its strategies for the apps of others; nothing here reports home or installs anything.

The environment is set before the first import of flwr, which reads some of it then and never again. It cannot reach
processes that Flower starts before fedtune is imported: service units and containers carry the same lines.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

# Sets which TLS gRPC may speak. flwr loads gRPC, which reads that once: a server that is started in this process later
# would accept TLS 1.2 as well.
import fedtune.link  # noqa: F401
from fedtune.errors import ExtraError

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # a SuperLink would install the app's dependencies per run
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",  # Ray listens on all interfaces, whatever its options say
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the default of its next release, for which it warns otherwise
}

for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)


def check_flower() -> None:
    """Refuse to go on without flwr, in one sentence for all who import a module of this package.

    Raises:
        ExtraError: naming the extra.
    """
    if find_spec("flwr") is None:
        raise ExtraError(
            "expected the package flwr, which fedtune serve, the engine ray and fedtune.flower run on; got none; run "
            'pip install "fedtune[flower]", or "fedtune[ray]" for the engine'
        )


# Here and not where each module is used: the import of any of them comes through here first.
check_flower()

if TYPE_CHECKING:
    from fedtune.flower.frozen_change import add_frozen
    from fedtune.flower.initial_arrays import read_arrays
    from fedtune.flower.strategies import FFA, FedEx, FedIT, FlexLoRA, FLoRA, HetLoRA

__all__ = ["FFA", "FLoRA", "FedEx", "FedIT", "FlexLoRA", "HetLoRA", "add_frozen", "read_arrays"]


def __getattr__(name: str) -> Any:
    """Load a name of `__all__` on first use, and flwr with it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    places = {"add_frozen": "frozen_change", "read_arrays": "initial_arrays"}
    return getattr(import_module(f"{__name__}.{places.get(name, 'strategies')}"), name)
