"""Which package each tracker needs, and whether it is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec

from fedtune.errors import ExtraError
from fedtune.tracking.tracker import TrackerName

INSTALL: Mapping[TrackerName, str] = {
    "tensorboard": '"fedtune[tensorboard]"',
    "mlflow": "mlflow",
    "trackio": "trackio",
    "wandb": "wandb",
}
"""What pip is asked for; each package is imported by the tracker's own name."""


def check_packages(names: Sequence[TrackerName]) -> None:
    """Refuse trackers whose packages are missing, without importing any of them.

    Raises:
        ExtraError: naming the first one and the command that installs it.
    """
    for name in names:
        if find_spec(name) is None:
            raise ExtraError(
                f"report.trackers: expected the package {name}, which the tracker {name!r} needs; it is not installed; "
                f"run: pip install {INSTALL[name]}"
            )
