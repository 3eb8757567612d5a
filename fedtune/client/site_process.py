"""The process that holds the base and examples of a site with torch."""

from __future__ import annotations

import sys
from dataclasses import replace

from fedtune.client.site import Site, from_file
from fedtune.config.site import site_conditions
from fedtune.link.client.training_server import serve
from fedtune.probing.steps import OnStep


def load(site: str, on_step: OnStep) -> Site:
    """Return the site of a file; loaded once per process."""
    return replace(from_file(site), on_step=on_step)


if __name__ == "__main__":
    serve(sys.argv, load, site_conditions)
