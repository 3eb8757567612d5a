"""The limits that a server states in its hello, within what a site takes from it."""

from __future__ import annotations

from collections.abc import Mapping

from fedtune.link.settings import KIB, MIB
from fedtune.wire.v1 import link_pb2 as pb

RANGES: Mapping[str, tuple[int, int]] = {
    "part_bytes": (KIB, 512 * KIB),
    "window_bytes": (KIB, 64 * MIB),
    "inline_bytes": (0, 512 * KIB),
    "hold_ms": (0, 300_000),
    "stall_ms": (1_000, 3_600_000),
}
"""As far as a server's own settings go. With parts of no byte a transfer would never end, with a window of 4 GiB the
server would decide how much memory a site takes, and with 49 days it would have the site wait for nothing."""


def within_ranges(limits: pb.Limits) -> pb.Limits:
    """Return a server's limits, each at the nearest value that a site takes."""
    values = {name: min(max(getattr(limits, name), least), most) for name, (least, most) in RANGES.items()}
    return pb.Limits(**values)
