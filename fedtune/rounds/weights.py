"""How much each client of a round counts: constants that are known before it trains, and that no one client can buy.

A client says itself how many examples it has, and an organisation may enrol as many clients as it likes. So what they
count is capped at a multiple of the cohort's median, organisation by organisation, before anything is divided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from statistics import median_low

from fedtune.messages import Client, Weight

GRID = 2**20
"""Where a cap bites, weights are whole numbers of this fraction of an example: sums stay exact."""


def public_weights(cohort: Sequence[Client], cap: float | None) -> Mapping[str, Weight]:
    """Return what each client of a cohort counts in this round.

    Args:
        cohort: with the examples that they have enrolled, and their organisations.
        cap: largest sum of an organisation's clients, in medians of these sums; None: none is capped.

    >>> cohort = [Client("ann", 100), Client("bob", 100), Client("eve", 10**9)]
    >>> weights = public_weights(cohort, 10.0)
    >>> {name: weight.examples / weights["ann"].examples for name, weight in weights.items()}
    {'ann': 1.0, 'bob': 1.0, 'eve': 10.0}
    """
    organisations = {client.name: client.organisation for client in cohort}
    examples = cap_sizes({client.name: client.num_examples for client in cohort}, organisations, cap)
    uniform = cap_sizes({client.name: 1 for client in cohort}, organisations, cap)
    return {name: Weight(examples=examples[name], uniform=uniform[name]) for name in examples}


def cap_sizes(sizes: Mapping[str, int], organisations: Mapping[str, str], cap: float | None) -> Mapping[str, int]:
    """Return sizes in proportion to those given, with no organisation above its cap; as they are where none is.

    A client without an organisation is one of its own.
    """
    if cap is None or not sizes:
        return sizes
    sums: dict[tuple[str, str], int] = {}
    for name, size in sizes.items():
        sums[owner(name, organisations)] = sums.get(owner(name, organisations), 0) + size
    # Of two the smaller one, not their mean: half of what a single liar states would be no bound for it.
    limit = Fraction(cap) * median_low(sums.values())
    if all(total <= limit for total in sums.values()):
        return sizes
    shares = {key: min(Fraction(1), limit / total) for key, total in sums.items()}
    return {name: max(1, int(size * shares[owner(name, organisations)] * GRID)) for name, size in sorted(sizes.items())}


def owner(name: str, organisations: Mapping[str, str]) -> tuple[str, str]:
    organisation = organisations.get(name, "")
    return (organisation, "") if organisation else ("", name)


def counted_examples(weights: Mapping[str, Weight], enrolled: Mapping[str, int]) -> Mapping[str, float]:
    """Return, by the names of clients that a cap makes count less than they have enrolled, as how many they count."""
    # All weights are on the grid as soon as one of them is capped.
    scale = max((weights[name].examples // size for name, size in enrolled.items() if name in weights), default=1)
    if scale < GRID:
        return {}
    counted = {name: weights[name].examples / GRID for name in enrolled if name in weights}
    return {name: count for name, count in counted.items() if count < enrolled[name]}


def cap_note(weights: Mapping[str, Weight], enrolled: Mapping[str, int], cap: float | None) -> str:
    """Return a sentence on the clients that count less than they have enrolled; empty if there are none."""
    counted = sorted(counted_examples(weights, enrolled).items())
    if not counted:
        return ""
    few = "; ".join(f"{name} counts as {count:,.6g} examples of {enrolled[name]:,}" for name, count in counted[:5])
    more = f"; and {len(counted) - 5} more" * (len(counted) > 5)
    return f"{few}{more} (rounds.weight_cap = {cap:g})"
