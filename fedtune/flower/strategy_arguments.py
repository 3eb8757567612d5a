"""What of a strategy's arguments is of no use: said before a client is asked, every fault at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from typing import Literal, TypeAlias

from fedtune.errors import ConfigError, Fault
from fedtune.methods import METHODS

Ranks: TypeAlias = int | Mapping[str, int] | Literal["own"] | None
Alpha: TypeAlias = float | Callable[[int], float]


def alpha_at(alpha: Alpha, rank: int) -> float:
    """Return the lora_alpha of clients of a rank.

    Raises:
        ConfigError: if it is no number above 0, or the user's function has none for this rank.
    """
    try:
        value = alpha(rank) if callable(alpha) else alpha
    # What a user's function raises where it looks ranks up, or divides by them.
    except (LookupError, ArithmeticError, ValueError, TypeError) as error:
        value, got = math.nan, f"{type(error).__name__}: {error}"
    else:
        got = f"{value}" if isinstance(value, Real) else repr(value)
    if not (isinstance(value, Real) and math.isfinite(value) and value > 0):
        of_rank = f" of rank {rank}" if callable(alpha) else ""
        raise ConfigError(Fault("alpha", f"a number above 0, the clients' lora_alpha{of_rank}", got))
    return float(value)


def rank_faults(strategy: str, method: str, ranks: Ranks, first: int, *, own: bool) -> Iterator[Fault]:
    """Yield what is wrong with the ranks of the clients.

    Args:
        strategy: name of its class.
        method: its name in `fedtune.methods`.
        ranks: as the user gave them.
        first: rank of the arrays that the run begins with.
        own: whether clients may start from factors of their own.
    """
    if ranks == "own":
        if not own:
            hint = "give ranks as a number or by node name, or use FLoRA or FlexLoRA"
            yield Fault("ranks", f"ranks that {strategy} sends factors of", "'own'", hint)
        return
    named = [*ranks.values()] if isinstance(ranks, Mapping) else []
    given = named if isinstance(ranks, Mapping) else [] if ranks is None else [ranks]
    # True is a number to Python.
    if wrong := [rank for rank in given if type(rank) is not int or rank < 1]:
        expected = "whole numbers of at least 1, one for all or by node name, or 'own'"
        yield Fault("ranks", expected, repr(wrong[0]))
    elif METHODS[method].ranks == "equal" and len({*named, *([first] if named else [])}) > 1:
        hint = "use FLoRA, FlexLoRA, HetLoRA or FFA for mixed ranks"
        yield Fault("ranks", f"one rank for all clients of {strategy}", f"{ranks}", hint)


def alpha_faults(alpha: Alpha, ranks: Ranks, first: int) -> Iterator[Fault]:
    """Yield what is wrong with alpha at the ranks that are known before a client replies."""
    named = ranks.values() if isinstance(ranks, Mapping) else [ranks] if type(ranks) is int else []
    for rank in sorted({first, *named}):
        try:
            alpha_at(alpha, rank)
        except ConfigError as error:
            yield error.faults[0]
            return


def bound_faults(server_learning_rate: float, **bounds: float | None) -> Iterator[Fault]:
    """Yield which of the numbers that bound or scale updates are of no use; None is no bound."""
    if not 0 < server_learning_rate < math.inf:
        yield Fault("server_learning_rate", "a number above 0", f"{server_learning_rate}")
    for name, bound in bounds.items():
        # A comparison with what is no number is false.
        if bound is not None and not bound > 0:
            yield Fault(name, "a number above 0, or None", f"{bound}")
