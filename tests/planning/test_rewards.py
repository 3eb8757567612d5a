"""What bandits are paid for; a test for each way in which such a reward has gone wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedtune.planning.rewards import LARGEST_DELAY, relative, rewards, with_worst
from tests.planning.conftest import ARMS, seen


def test_by_hand() -> None:
    observed = [
        seen("ann", ARMS[0], gain=0.2, seconds=10.0),
        seen("bob", ARMS[1], gain=0.1, seconds=20.0),
        seen("cyd", ARMS[2], gain=0.9, seconds=40.0),
    ]
    paid = rewards(observed, "time")
    # Median gain 0.2, median time 20 s: cyd's gain is clipped at three medians, and it took twice the median.
    assert paid == pytest.approx({"ann": 1 / 3, "bob": 0.5 / 3, "cyd": 1.0 - 0.5})
    fedmp = rewards(observed, "fedmp")
    mean = 70 / 3
    assert fedmp["ann"] == pytest.approx(0.2 / ((mean - 10) / mean + 0.05))


def test_quick_devices_are_not_punished_for_being_quick() -> None:
    """A symmetric |T - mean| would tell them to do idle work."""
    slow = [seen("bob", ARMS[0], seconds=10.0), seen("cyd", ARMS[0], seconds=10.0)]
    quick, same = (rewards([seen("ann", ARMS[0], seconds=t), *slow], "time")["ann"] for t in (1.0, 10.0))
    assert quick == same
    symmetric = [rewards([seen("ann", ARMS[0], seconds=t), *slow], "fedmp")["ann"] for t in (1.0, 10.0)]
    assert symmetric[0] < symmetric[1]


def test_what_was_tried_early_is_not_preferred() -> None:
    """Raw gains fall over a run; beside the round's median the same arm is paid the same late as early."""
    paid = [
        rewards(
            [seen(name, ARMS[i], gain=level * g) for i, (name, g) in enumerate((("a", 1.0), ("b", 2.0), ("c", 3.0)))],
            "time",
        )
        for level in (1.0, 0.01)
    ]
    assert paid[0] == pytest.approx(paid[1])


def test_pruning_harder_is_not_paid_for_the_damage_that_training_repairs() -> None:
    """The loss before is that before surgery: whoever ends where it began has gained nothing, whatever it pruned."""
    observed = [seen("ann", ARMS[2], gain=0.0), seen("bob", ARMS[0], gain=0.3), seen("cyd", ARMS[0], gain=0.3)]
    assert rewards(observed, "time")["ann"] == 0.0


def test_a_loss_that_rose_is_paid_nothing_and_not_less() -> None:
    observed = [seen("ann", ARMS[0], gain=-5.0), seen("bob", ARMS[0], gain=1.0), seen("cyd", ARMS[0], gain=1.0)]
    assert rewards(observed, "time")["ann"] == 0.0


def test_whoever_cannot_be_judged_is_left_out() -> None:
    observed = [seen("ann", ARMS[0], gain=None), seen("bob", ARMS[0], seconds=-1.0), seen("cyd", ARMS[0])]
    assert relative(observed).keys() == {"cyd"}
    assert rewards([], "time") == rewards([], "fedmp") == {}


def test_without_times_nobody_is_late() -> None:
    observed = [seen("ann", ARMS[0], seconds=None), seen("bob", ARMS[1], gain=0.5, seconds=None)]
    assert [each.delay for each in relative(observed).values()] == [0.0, 0.0]
    paid = rewards(observed, "fedmp")
    assert paid["ann"] == pytest.approx(2 * paid["bob"])


def test_a_delay_counts_up_to_ten_medians() -> None:
    observed = [seen(name, ARMS[0], seconds=s) for name, s in (("ann", 1.0), ("bob", 1.0), ("liar", 1e9))]
    assert relative(observed)["liar"].delay == LARGEST_DELAY


@pytest.mark.guarantee("G4")
@pytest.mark.parametrize("others", [1, 4])
def test_one_clients_claim_sets_neither_the_rewards_of_others_nor_their_deviation(others: int) -> None:
    honest = [seen(f"c{i}", ARMS[0], gain=0.1 + 0.02 * i, seconds=10.0 + i) for i in range(others)]
    plain = rewards([*honest, seen("eve", ARMS[1], gain=0.1, seconds=12.0)], "fedmp")
    for gain, seconds in ((1e12, 12.0), (-1e12, 12.0), (0.1, 1e30), (1e12, 1e30)):
        paid = rewards([*honest, seen("eve", ARMS[1], gain=gain, seconds=seconds)], "fedmp")
        # The time of all others is beside the mean of bounded times.
        assert abs(paid["eve"]) <= 10 * 0.2 / 0.05
        for one in honest:
            assert 0 < paid[one.client] <= 2.8
        assert paid.keys() == plain.keys()


def test_work_that_was_not_used_is_paid_the_worst_of_its_round() -> None:
    lost = seen("ann", ARMS[0], late_s=9.0)
    assert with_worst({"bob": 0.5}, [lost, seen("bob", ARMS[1])]) == {"ann": 0.0, "bob": 0.5}
    assert with_worst({"bob": -0.5}, [lost, seen("bob", ARMS[1])]) == {"ann": -0.5, "bob": -0.5}


def test_importance_is_beside_the_rounds_median() -> None:
    observed = [replace(seen(name, ARMS[0]), importance=value) for name, value in (("a", 1.0), ("b", 2.0), ("c", 3.0))]
    assert [each.importance for each in relative(observed).values()] == pytest.approx([1 / 6, 1 / 3, 0.5])
