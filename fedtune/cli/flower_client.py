"""`app`, the client that Flower's components name: fedtune.cli.flower_client:app."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fedtune.errors import ConfigError, Fault
from fedtune.flower.client_app import Scalar, Site, client_app
from fedtune.flower.shim import in_simulation


def site_of(node_config: Mapping[str, Scalar], run_config: Mapping[str, Scalar]) -> Site:
    """Return the client that a node belongs to.

    A deployed client is what its own file says. Only a worker of Flower's simulation engine, which runs where the
    recipe lies, takes model and data from the recipe: a server must not choose which of a site's files are read.

    Raises:
        ConfigError: if no file is named, or it is wrong.
    """
    # Imported where it is used: it loads the torch stack, which a wrong start should not wait for.
    if path := str(node_config.get("fedtune-site") or ""):
        from fedtune.client.site import from_file

        site = from_file(path)
        # A SuperNode has no log of the site's own to keep scores in: such a site does not score.
        return site if site.scores == "send" else replace(site, scores="refuse")
    if "partition-id" in node_config and in_simulation():
        from fedtune.cli.flower_demo import demo_recipe
        from fedtune.client.site import simulated_site

        return simulated_site(str(run_config.get("recipe") or demo_recipe()), node_config, run_config)
    raise ConfigError(
        Fault(
            "fedtune-site",
            "the path of this client's own file in its node configuration",
            "none",
            "start flower-supernode with --node-config 'fedtune-site=\"site.toml\"'",
        )
    )


app = client_app(site_of)
