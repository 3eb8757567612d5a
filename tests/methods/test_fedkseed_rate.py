"""The learning rate of FedKSeed from slopes and curvatures: by hand, and what one client alone can do to it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import RoundError
from fedtune.methods.fedkseed_rate import (
    LEAST_AGREEMENT,
    ONE_ALONE,
    Measurement,
    RateChoice,
    agreement_of,
    choose_rate,
    rate_for,
)
from fedtune.seeds import derive, generator
from fedtune.tensors import Array

COMMON = np.where(generator(derive(3, "test.gradient")).random(16) < 0.5, -1.0, 1.0)


def client(name: str, *, noise: float = 1.0, curvature: float = 2000.0, weight: int = 1) -> Measurement:
    """Return what an honest client measures: what all agree on, and noise of its own examples."""
    rng = generator(derive(3, "test.client", 0, name))
    slopes = 10 * (COMMON + noise * rng.normal(size=16))
    return Measurement(tuple(slopes), tuple(curvature * (1 + 0.2 * rng.normal(size=16))), weight)


def cohort(count: int = 5, noise: float = 1.0) -> list[Measurement]:
    return [client(str(number), noise=noise) for number in range(count)]


def chosen(members: Sequence[Measurement]) -> RateChoice:
    return choose_rate(members, round=1)


def test_a_rate_by_hand() -> None:
    # Slopes (3, 1) and (1, 3): products 3 + 3, squares 10 + 10: they agree by 6 / 10. Curvatures of 4 and 8.
    two = [Measurement((3.0, 1.0), (4.0, -4.0), 1), Measurement((1.0, 3.0), (8.0, 8.0), 1)]
    found = chosen(two)
    assert found.agreement == pytest.approx(0.6)
    assert found.curvature == 8.0  # of two the larger one: a rate too small costs less than one too large
    assert found.slope == 2.24  # the root of 5, to three digits
    assert found.rate == pytest.approx(0.5 * min(1, 2 * 0.6) / 8, rel=5e-3)
    assert found.measurements == 4


def test_a_weak_agreement_lowers_the_rate_as_far_as_the_number_of_clients_does_not_make_up_for_it() -> None:
    two = [Measurement((5.0, 1.0), (1.0, 1.0), 1), Measurement((0.5, 5.0), (1.0, 1.0), 1)]
    agreement, _ = agreement_of(np.array([one.slopes for one in two]))
    assert 0.1 < agreement < 0.5
    assert chosen(two).rate == pytest.approx(0.5 * 2 * chosen(two).agreement, rel=5e-3)
    # Weights of 9 to 1 count as 1.22 clients.
    uneven = [Measurement(one.slopes, one.curvatures, weight) for one, weight in zip(two, (9, 1), strict=True)]
    assert chosen(uneven).rate == pytest.approx(0.5 * 100 / 82 * chosen(two).agreement, rel=5e-3)


def test_the_rate_is_half_of_one_over_the_curvature_where_clients_agree() -> None:
    found = chosen(cohort())
    assert found.rate == pytest.approx(0.5 / found.curvature, rel=5e-3)
    assert found.curvature == pytest.approx(2000, rel=0.1)
    assert found.agreement == pytest.approx(0.5, abs=0.25)


def test_no_order_of_the_clients_changes_a_bit() -> None:
    members = cohort()
    assert chosen(members).figures == chosen(members[::-1]).figures


def test_a_single_client_is_taken_at_a_usual_agreement() -> None:
    found = chosen([client("0")])
    assert found.agreement == ONE_ALONE
    assert found.rate == pytest.approx(0.5 * ONE_ALONE / found.curvature, rel=5e-3)


LIES = {
    "huge": lambda own: Measurement(tuple(1e12 * slope for slope in own.slopes), (1e12,) * 16, own.weight),
    "zero": lambda own: Measurement((0.0,) * 16, (0.0,) * 16, own.weight),
    "no curvature": lambda own: Measurement(own.slopes, (0.0,) * 16, own.weight),
    "the contrary": lambda own: Measurement(tuple(-1e12 * COMMON), own.curvatures, own.weight),
    "all of it": lambda own: Measurement(tuple(1e12 * COMMON), (0.0,) * 16, own.weight),
}


@pytest.mark.guarantee("G4")
@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("noise", [0.5, 1.0])
def test_one_liar_of_five_moves_the_rate_by_a_third_at_most(lie: str, noise: float) -> None:
    # As root mean squares over all clients, curvatures of 1e12 from one would make the rate 1e-12.
    honest = cohort(noise=noise)
    rates = [chosen([*honest[:place], LIES[lie](honest[place]), *honest[place + 1 :]]).rate for place in range(5)]
    assert max(rates) <= 1.33 * chosen(honest).rate
    assert min(rates) >= chosen(honest).rate / 1.33


def test_no_client_counts_more_by_stating_larger_slopes() -> None:
    # Of two none can be left out: unshortened, slopes of 1e12 from one would make their agreement nought.
    one, other = cohort(2)
    loud = Measurement(tuple(1e12 * slope for slope in other.slopes), other.curvatures, other.weight)
    assert chosen([one, loud]).agreement == chosen([one, other]).agreement > 0.2


@given(
    slopes=st.lists(st.floats(-1e12, 1e12), min_size=16, max_size=16),
    curvatures=st.lists(st.floats(-1e12, 1e12), min_size=16, max_size=16),
)
@settings(deadline=None, max_examples=50)
def test_whatever_one_of_five_states_the_rate_stays_within_its_bounds(
    slopes: list[float], curvatures: list[float]
) -> None:
    honest = cohort()
    found = chosen([*honest[1:], Measurement(tuple(slopes), tuple(curvatures), 1)])
    own = sorted(chosen([one]).curvature for one in honest[1:])
    assert own[0] <= found.curvature <= own[-1]
    assert 0.5 * 5 * LEAST_AGREEMENT / own[-1] <= found.rate * 1.01
    assert found.rate <= 0.5 / own[0] * 1.01


def test_slopes_that_have_nothing_in_common_are_refused_with_what_to_do() -> None:
    noise: list[Array] = [generator(derive(number, "test.noise")).normal(size=16) for number in range(5)]
    # Against each other, so that no chance agreement is left: their sum is zero along every direction.
    contrary = [part - np.mean(noise, axis=0) for part in noise]
    members = [Measurement(tuple(part), (9.0,) * 16, 1) for part in contrary]
    with pytest.raises(RoundError, match=r"round 1: expected slopes .* agree on.*a number as.*head = 'lda'") as why:
        chosen(members)
    assert why.value.final


def test_an_agreement_that_needs_one_client_left_out_must_be_plain() -> None:
    # Three agree a little by chance, the fourth contradicts them: as with MiniLM and a drawn head.
    rng = generator(derive(7, "test.chance"))
    parts = [rng.normal(size=16) + 0.5 * COMMON for _ in range(3)]
    members = [Measurement(tuple(part), (9.0,) * 16, 1) for part in (*parts, -2 * np.sum(parts, axis=0))]
    with pytest.raises(RoundError, match="expected slopes"):
        chosen(members)


@pytest.mark.parametrize("slopes", [(0.0, 0.0), (1.0, 2.0)])
def test_a_loss_that_is_flat_or_straight_has_no_rate(slopes: tuple[float, float]) -> None:
    flat = [Measurement(slopes, (0.0, 0.0), 1)] * 3
    with pytest.raises(RoundError, match="got slopes of"):
        chosen(flat)


def test_other_estimators_take_steps_of_the_same_length() -> None:
    choice = {"learning_rate": 2e-4, "slope": 10.0}
    assert rate_for(choice, "two-sided", queries=1, normalise=False) == 2e-4
    assert rate_for(choice, "one-sided", queries=8, normalise=False) == 8 * 2e-4
    assert rate_for(choice, "one-sided", queries=8, normalise=True) == pytest.approx(8 * 2e-4 * 10.0)
