from __future__ import annotations

import pytest

from fedtune.errors import RoundError
from fedtune.flower import shim
from fedtune.flower.stock_nodes import NodeNames, draw, wait_for_nodes
from tests.flower.conftest import NODE, Clock, MemoryGrid


def silent(message: object) -> None:
    return None


class Registered(MemoryGrid):
    """A grid whose nodes say when they registered."""

    def __init__(self, times: dict[int, str], names: dict[int, str] | None = None) -> None:
        super().__init__(dict.fromkeys(times, silent), names=names)
        self.times = times

    def get_nodes(self) -> list[shim.NodeInfo]:
        return [
            shim.NodeInfo(node_id=node, name=self.names.get(node, ""), registered_at=self.times[node])
            for node in self.nodes
        ]


def test_nodes_without_names_are_numbered_as_they_registered() -> None:
    grid = Registered({NODE + 5: "2026-01-01T00:00:01", NODE + 9: "2026-01-01T00:00:00"})
    assert NodeNames().update(grid) == {"node-0": NODE + 9, "node-1": NODE + 5}


def test_a_registered_name_is_kept_and_a_second_one_like_it_is_numbered() -> None:
    grid = Registered({NODE: "0", NODE + 1: "1", NODE + 2: "2"}, {NODE: "ann", NODE + 1: "ann"})
    assert NodeNames().update(grid) == {"ann": NODE, "node-1": NODE + 1, "node-2": NODE + 2}


def test_a_node_that_comes_later_does_not_rename_the_others() -> None:
    names, grid = NodeNames(), Registered({NODE + 5: "1"})
    names.update(grid)
    later = Registered({NODE + 5: "1", NODE + 3: "0"})
    assert names.update(later) == {"node-0": NODE + 5, "node-1": NODE + 3}
    assert names.update(grid) == {"node-0": NODE + 5}


def test_nodes_are_waited_for_and_too_few_end_the_wait(clock: Clock) -> None:
    names, grid = NodeNames(), Registered({NODE: "0"})
    with pytest.raises(RoundError, match="expected at least 2 nodes within 5 s; got 1; start more SuperNodes"):
        wait_for_nodes(names, grid, 2, patience_s=5, clock=clock, sleep=clock.sleep)
    assert clock.now == 5

    def connect(seconds: float) -> None:
        grid.nodes[NODE + 1], grid.times[NODE + 1] = silent, "1"

    assert len(wait_for_nodes(names, grid, 2, patience_s=5, clock=clock, sleep=connect)) == 2


def test_a_cohort_follows_from_seed_round_and_names_alone() -> None:
    names = [f"node-{place}" for place in range(20)]
    rounds = [tuple(draw(names, 0.25, 2, seed=1, purpose="train", round=number)) for number in range(1, 9)]
    assert {len(cohort) for cohort in rounds} == {5}
    assert len(set(rounds)) > 4
    assert rounds[0] == tuple(draw(names, 0.25, 2, seed=1, purpose="train", round=1))
    assert list(rounds[0]) == sorted(rounds[0])


def test_a_cohort_has_the_least_number_and_never_more_than_there_are() -> None:
    assert len(draw(["a", "b", "c"], 0.1, 2, seed=0, purpose="train", round=1)) == 2
    assert len(draw(["a"], 1.0, 2, seed=0, purpose="train", round=1)) == 1
