from __future__ import annotations

from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from fedtune.simulation.resources import Machine, Resources, next_start, start_order

ONE = Resources()
GPUS = Machine(cores=8, workers=4, devices=("cuda:0", "cuda:1"))


def test_equal_clients_start_in_the_order_given() -> None:
    assert start_order({"cyd": ONE, "ann": ONE, "bob": ONE}) == ["cyd", "ann", "bob"]


def test_the_widest_clients_start_first() -> None:
    needs = {"ann": ONE, "bob": Resources(threads=4), "cyd": Resources(gpu_share=0.5), "dan": Resources(threads=2)}
    assert start_order(needs) == ["cyd", "bob", "dan", "ann"]


def test_a_client_starts_on_the_first_idle_worker() -> None:
    assert next_start(["ann"], {"ann": ONE}, {0: ONE}, {1, 2}, Machine(cores=2, workers=3)) == ("ann", 1)


def test_threads_never_exceed_the_cores() -> None:
    machine, two = Machine(cores=3, workers=3), Resources(threads=2)
    assert next_start(["ann"], {"ann": two}, {0: two}, {1, 2}, machine) is None
    assert next_start(["ann"], {"ann": two}, {0: ONE}, {1, 2}, machine) == ("ann", 1)


def test_a_narrow_client_overtakes_one_that_does_not_fit() -> None:
    machine, needs = Machine(cores=4, workers=2), {"ann": Resources(threads=3), "bob": ONE}
    assert next_start(["ann", "bob"], needs, {0: Resources(threads=3)}, {1}, machine) == ("bob", 1)


def test_a_client_wider_than_the_machine_runs_alone() -> None:
    machine, wide = Machine(cores=2, workers=2), Resources(threads=64)
    assert next_start(["ann"], {"ann": wide}, {1: ONE}, {0}, machine) is None
    assert next_start(["ann"], {"ann": wide}, {}, {0, 1}, machine) == ("ann", 0)
    assert next_start(["bob"], {"bob": ONE}, {0: wide}, {1}, machine) is None


def test_workers_take_the_gpus_in_turn() -> None:
    assert [GPUS.device(place) for place in range(4)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]


def test_a_client_goes_to_the_least_loaded_gpu() -> None:
    assert next_start(["ann"], {"ann": ONE}, {0: ONE}, {1, 2, 3}, GPUS) == ("ann", 1)
    assert next_start(["ann"], {"ann": ONE}, {1: ONE}, {0, 2, 3}, GPUS) == ("ann", 0)


def test_shares_of_a_gpu_never_exceed_the_whole() -> None:
    most = Resources(gpu_share=0.8)
    assert next_start(["ann"], {"ann": most}, {0: most, 1: most}, {2, 3}, GPUS) is None
    small = Resources(gpu_share=0.2)
    assert next_start(["ann"], {"ann": small}, {0: most, 1: most}, {2, 3}, GPUS) == ("ann", 2)


def test_without_a_share_the_workers_of_a_gpu_divide_it_equally() -> None:
    assert next_start(["ann"], {"ann": ONE}, {0: ONE, 1: ONE, 3: ONE}, {2}, GPUS) == ("ann", 2)
    nine = Machine(cores=9, workers=9, devices=("cuda:0",))
    assert next_start(["ann"], {"ann": ONE}, dict.fromkeys(range(8), ONE), {8}, nine) == ("ann", 8)


def test_a_share_of_a_gpu_means_nothing_on_the_cpu() -> None:
    whole = Resources(gpu_share=1.0)
    assert next_start(["ann"], {"ann": whole}, {0: whole}, {1}, Machine(cores=2, workers=2)) == ("ann", 1)


NEEDS = st.builds(Resources, st.integers(1, 9), st.none() | st.floats(0.01, 1.0))


@given(
    st.lists(NEEDS, min_size=1, max_size=12),
    st.integers(1, 6),
    st.integers(1, 5),
    st.sampled_from([("cpu",), ("cuda:0",), ("cuda:0", "cuda:1")]),
    st.randoms(use_true_random=False),
)
def test_everybody_gets_a_turn_within_the_limits(
    wanted: list[Resources], cores: int, workers: int, devices: tuple[str, ...], chance: object
) -> None:
    """However long each client takes, nothing is ever overcommitted and nothing waits while nothing runs."""
    needs = {f"client-{number}": resources for number, resources in enumerate(wanted)}
    machine = Machine(cores, workers, devices)
    waiting, running, done = list(start_order(needs)), dict[int, str](), set[str]()
    while waiting or running:
        while found := next_start(
            waiting, needs, {p: needs[c] for p, c in running.items()}, set(range(workers)) - running.keys(), machine
        ):
            client, place = found
            waiting.remove(client)
            running[place] = client
            check(machine, {p: needs[c] for p, c in running.items()})
        assert running
        done.add(running.pop(chance.choice(sorted(running))))  # type: ignore[attr-defined]
    assert done == needs.keys()


def check(machine: Machine, running: Mapping[int, Resources]) -> None:
    threads = [resources.threads for resources in running.values()]
    assert sum(threads) <= machine.cores or len(threads) == 1
    for device in set(machine.devices) - {"cpu"}:
        shares = [
            machine.share(resources, device) for place, resources in running.items() if machine.device(place) == device
        ]
        assert sum(shares) <= 1 + 1e-9


@given(st.lists(st.integers(1, 8), min_size=2, max_size=10), st.integers(1, 8), st.randoms(use_true_random=False))
def test_no_wider_client_waits_when_one_as_wide_has_ended(widths: list[int], cores: int, chance: object) -> None:
    """What ran beside a wide client leaves room for the next one, so the narrow ones cannot keep it waiting."""
    needs = {f"client-{number}": Resources(width) for number, width in enumerate(widths)}
    machine = Machine(cores, workers=len(widths))
    waiting, running = list(start_order(needs)), dict[int, str]()
    while waiting or running:
        while found := next_start(
            waiting, needs, {p: needs[c] for p, c in running.items()}, set(range(len(widths))) - running.keys(), machine
        ):
            waiting.remove(found[0])
            running[found[1]] = found[0]
        if waiting:
            assert max(needs[c].threads for c in running.values()) >= min(cores, needs[waiting[0]].threads)
        running.pop(chance.choice(sorted(running)))  # type: ignore[attr-defined]
