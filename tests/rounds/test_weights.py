"""What clients count: capped by organisation, in whole numbers, and the same after a resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.lora.adapter import Factors, delta, norm
from fedtune.messages import AdmittedUpdate, Client, Failure, Weight, cohort_weights
from fedtune.methods import METHODS
from fedtune.methods.fedkseed import integer_weights
from fedtune.rounds.events import Note
from fedtune.rounds.journal import InterruptedRound
from fedtune.rounds.weights import GRID, cap_note, cap_sizes, counted_examples, public_weights
from tests.methods.conftest import Federate
from tests.rounds.scripted import Noted, answer, rounds, state_bytes

federate = Federate()


def shares(cohort: list[Client], cap: float | None = 10.0, weighting: str = "examples") -> Mapping[str, float]:
    weights = {name: getattr(weight, weighting) for name, weight in public_weights(cohort, cap).items()}
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def test_clients_count_as_they_have_enrolled_as_long_as_none_is_far_above_the_median() -> None:
    cohort = [Client("ann", 3), Client("bob", 5), Client("cyd", 30)]
    assert public_weights(cohort, 10.0) == {"ann": Weight(3, 1), "bob": Weight(5, 1), "cyd": Weight(30, 1)}
    assert public_weights([Client("ann", 2**62), Client("bob", 1)], None)["ann"] == Weight(2**62, 1)
    assert public_weights([], 10.0) == {}


@pytest.mark.guarantee("G4")
@pytest.mark.parametrize("claimed", [10**3, 10**9, 2**62])
@pytest.mark.parametrize("honest", [1, 2, 4, 9])
def test_no_claim_buys_more_than_the_cap(claimed: int, honest: int) -> None:
    cohort = [Client(f"site-{i}", 10) for i in range(honest)] + [Client("liar", claimed)]
    assert shares(cohort)["liar"] == pytest.approx(10 / (10 + honest))
    # The enrolled examples of the others are left as they are to each other.
    assert len({weight for name, weight in shares(cohort).items() if name != "liar"}) == 1


def test_a_liar_who_claims_little_takes_no_more_from_the_only_other_than_the_cap() -> None:
    assert shares([Client("honest", 5000), Client("liar", 1)])["liar"] == pytest.approx(1 / 11)


@pytest.mark.guarantee("G4")
@pytest.mark.parametrize("nodes", [2, 100])
@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_the_clients_of_one_organisation_share_its_cap(nodes: int, weighting: str) -> None:
    many = [Client(f"liar-{i:03}", 10**9, organisation="evil") for i in range(nodes)]
    honest = [Client(f"site-{i}", 10, organisation=f"hospital-{i}") for i in range(4)]
    own = sum(share for name, share in shares([*honest, *many], weighting=weighting).items() if "liar" in name)
    limit = 10.0 if weighting == "examples" else min(nodes, 10)
    assert own == pytest.approx(limit / (limit + 4), rel=1e-5)


def test_without_organisations_two_clients_of_one_name_are_none() -> None:
    """A client's name is no organisation's: neither can pass for the other."""
    cohort = [Client("a", 10), Client("b", 10, organisation="a"), Client("c", 10, organisation="c")]
    assert public_weights(cohort, 1.0) == {name: Weight(10, 1) for name in "abc"}


@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(1, 2**62), min_size=1, max_size=12),
    st.lists(st.sampled_from(["", "x", "y", "z"]), min_size=12, max_size=12),
    st.floats(1, 100),
)
def test_no_organisation_is_above_its_cap_and_within_it_proportions_stay(
    sizes: dict[str, int], organisations: list[str], cap: float
) -> None:
    owners = dict(zip(sizes, organisations, strict=False))
    weights = cap_sizes(sizes, owners, cap)
    groups: dict[str, list[str]] = {}
    for name in sizes:
        groups.setdefault(owners[name] or f"own {name}", []).append(name)
    scale = 1 if weights == sizes else GRID
    middle = sorted(sum(sizes[name] for name in group) for group in groups.values())[(len(groups) - 1) // 2]
    for group in groups.values():
        # Never below one grain of the grid.
        assert sum(weights[name] for name in group) <= scale * cap * middle * (1 + 1e-9) + len(group)
        if sum(sizes[name] for name in group) <= cap * middle:
            assert all(weights[name] == scale * sizes[name] for name in group)
    assert min(weights.values()) >= 1


def test_who_is_capped_is_named_with_both_numbers() -> None:
    cohort, enrolled = [Client("ann", 10), Client("bob", 20), Client("eve", 5000)], {"ann": 10, "bob": 20, "eve": 5000}
    weights = public_weights(cohort, 10.0)
    assert counted_examples(weights, enrolled) == {"eve": 200.0}
    assert cap_note(weights, enrolled, 10.0) == "eve counts as 200 examples of 5,000 (rounds.weight_cap = 10)"
    plain = public_weights(cohort[:2], 10.0)
    assert counted_examples(plain, enrolled | {"ann": 10}) == {}
    assert cap_note(plain, {"ann": 10, "bob": 20}, 10.0) == ""


def test_an_updates_own_examples_do_not_decide_what_it_counts(two_updates: list[AdmittedUpdate]) -> None:
    weighed = [replace(update, weight=Weight(GRID, 1)) for update in two_updates]
    assert [share for _, share in cohort_weights(weighed, "examples")] == [0.5, 0.5]
    assert [share for _, share in cohort_weights(two_updates, "examples")] == [0.25, 0.75]
    ours: Any = METHODS["fedkseed"].settings(weights="examples")
    state: Any = type("State", (), {"settings": ours})
    assert [weight for _, weight in integer_weights(state, weighed)] == [127, 127]
    many = [replace(update, weight=Weight(1, share)) for update, share in zip(two_updates, (1, 10), strict=True)]
    state.settings = replace(ours, weights="uniform")
    assert [weight for _, weight in integer_weights(state, many)] == [13, 127]
    assert [weight for _, weight in integer_weights(state, two_updates)] == [1, 1]


@pytest.fixture
def two_updates() -> list[AdmittedUpdate]:
    factors = {"x": Factors(a=np.ones((1, 2), np.float32), b=np.ones((2, 1), np.float32))}
    return [federate.update("ann", factors, examples=1), federate.update("bob", factors, examples=3)]


@pytest.mark.guarantee("G4")
@pytest.mark.parametrize("name", sorted(set(METHODS) - {"fedkseed"}))
def test_every_method_sums_by_the_weights_of_the_round(name: str) -> None:
    """The state with a claim of 2^62 is the one with what the cap makes of it."""
    federation, method = federate({"q": (6, 5)}, max_rank=2), METHODS[name]
    state = federation.state(method)
    claimed = federation.updates(method, state, [("ann", 2, 1.0, 10), ("bob", 2, 1.0, 10), ("eve", 2, 1.0, 2**62)])
    weights = public_weights([Client(update.client, update.num_examples) for update in claimed], 10.0)
    capped_ = [replace(update, weight=weights[update.client]) for update in claimed]
    honest = [
        replace(update, update=replace(update.update, num_examples=100 if update.client == "eve" else 10))
        for update in claimed
    ]
    got, expected, bought = (method.aggregate(state, part) for part in (capped_, honest, claimed))
    assert norm(method.adapter(expected)) > 0
    np.testing.assert_allclose(
        delta(method.adapter(got)["q"]), delta(method.adapter(expected)["q"]), rtol=1e-5, atol=1e-7
    )
    if name != "hetlora":  # its factors are weighed by their norms
        assert not np.allclose(delta(method.adapter(got)["q"]), delta(method.adapter(bought)["q"]), rtol=1e-3)


def test_the_loop_notes_journals_and_keeps_the_weights() -> None:
    noted, notes = Noted(), list[Any]()
    replies = {"ann": answer(), "bob": answer(), "cyd": answer()}
    sizes = {"ann": 10, "bob": 10, "cyd": 5000}
    result = rounds(replies, ledger=noted, watch=notes.append, enrolled=sizes)[0]
    capped_ = public_weights([Client(name, size) for name, size in sizes.items()], 10.0)
    assert noted.noted["weights"] == capped_
    texts = [event.text for event in notes if isinstance(event, Note)]
    assert texts == ["cyd counts as 100 examples of 5,000 (rounds.weight_cap = 10)"]
    assert result.counted == {"cyd": 100.0}
    assert all(not isinstance(outcome, Failure) for outcome in result.outcomes.values())
    # The same state as where that many are enrolled, and another than without a cap.
    plain = rounds(replies, enrolled={**sizes, "cyd": 100})[0]
    np.testing.assert_allclose(plain.state.delta["x.s"], result.state.delta["x.s"], rtol=1e-5)
    assert state_bytes(rounds(replies, enrolled=sizes, weight_cap=None)[0]) != state_bytes(result)


def test_a_resumed_round_counts_as_it_began_whatever_the_recipe_says_by_then() -> None:
    noted = Noted()
    replies = {"ann": answer(), "bob": answer(), "cyd": answer()}
    sizes = {"ann": 10, "bob": 10, "cyd": 5000}
    whole = rounds(replies, ledger=noted, enrolled=sizes)[0]
    updates = {name: noted.noted[name] for name in replies}
    held = InterruptedRound(sizes, noted.noted["digests"], updates, weights=noted.noted["weights"])
    for cap in (10.0, 2.0, None):
        assert rounds(replies, ledger=Noted(held), enrolled=sizes, weight_cap=cap)[0].digest == whole.digest
    # A round that began without a record of weights, under 0.2.0, counts what was enrolled.
    before = rounds(replies, enrolled=sizes, weight_cap=None)[0]
    assert rounds(replies, ledger=Noted(replace(held, weights={})), enrolled=sizes)[0].digest == before.digest
