"""fedtune as a Flower app, on every network that Flower has; nothing here reports home or installs anything.

The environment is set before the first import of flwr, which reads some of it then and never again. It cannot reach
processes that Flower starts before fedtune is imported: service units and containers carry the same lines.
"""

import os
from importlib.util import find_spec

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
