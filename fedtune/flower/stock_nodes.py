"""The nodes of a grid under lasting names, and the seeded draw of those that take part in a round."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from flwr.serverapp import Grid

from fedtune.errors import RoundError
from fedtune.seeds import derive, generator

LOG = logging.getLogger("flwr")
PAUSE_S = 1.0
"""Between two looks for nodes."""


class NodeNames:
    """Names of nodes: that of a registered SuperNode, else `node-<place>` in the order in which they registered.

    Node ids are drawn anew in every run; names are not, so cohorts and sums are the same in the next one. Flower's
    simulation engine registers nodes in the order of their partitions: there `node-3` holds partition 3.
    """

    def __init__(self) -> None:
        self._names = dict[int, str]()

    def update(self, grid: Grid) -> dict[str, int]:
        """Return the nodes that are there now, by name and sorted by it."""
        nodes = {node.node_id: node for node in grid.get_nodes()}
        for node_id in sorted(nodes.keys() - self._names.keys(), key=lambda one: (nodes[one].registered_at, one)):
            own = nodes[node_id].name
            # Two nodes with one name would be one client of the sum.
            taken = not own or own in self._names.values()
            self._names[node_id] = f"node-{len(self._names)}" if taken else own
        return dict(sorted((self._names[node_id], node_id) for node_id in nodes))


def wait_for_nodes(
    names: NodeNames,
    grid: Grid,
    least: int,
    *,
    patience_s: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, int]:
    """Return the nodes by name, once there are as many as are needed.

    Raises:
        RoundError: if there are fewer after `patience_s`.
    """
    until, said = clock() + patience_s, -1
    while len(nodes := names.update(grid)) < least:
        if clock() >= until:
            raise RoundError(
                f"expected at least {least} nodes within {patience_s:g} s; got {len(nodes)}; start more SuperNodes, "
                "or lower min_available_nodes and min_train_nodes"
            )
        if len(nodes) != said:
            LOG.info("fedtune: waiting for nodes: %d of %d are connected", len(nodes), least)
            said = len(nodes)
        sleep(PAUSE_S)
    return nodes


def draw(names: Sequence[str], fraction: float, least: int, *, seed: int, purpose: str, round: int) -> Sequence[str]:
    """Return the names that take part in a round, sorted: a share of all, and at least so many of them."""
    # Rounded down, as Flower's FedAvg does.
    count = min(len(names), max(int(len(names) * fraction), least))
    places = generator(derive(seed, purpose, round)).permutation(len(names))[:count]
    return sorted(names[place] for place in places)
