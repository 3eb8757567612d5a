"""The process of a device that holds its base and examples, and computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedtune.config.site import site_conditions
from fedtune.edge.site import EdgeSite, from_file
from fedtune.link.client.training_server import serve
from fedtune.probing.steps import OnStep


def load(site: str, on_step: OnStep) -> EdgeSite:
    """Return the device of a file; loaded once per process."""
    return replace(from_file(site), on_step=on_step)


def main(arguments: Sequence[str]) -> None:
    """Answer requests until their pipe ends; see `training_server.serve`."""
    serve(arguments, load, site_conditions)
