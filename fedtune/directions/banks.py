"""The table of banks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedtune.directions.bank import DirectionBank
from fedtune.directions.gaussian import Gaussian
from fedtune.directions.hadamard import Hadamard
from fedtune.directions.kron import Kron

BANKS: Mapping[str, Callable[[int, int], DirectionBank]] = {
    Gaussian.name: Gaussian,
    Hadamard.name: Hadamard,
    Kron.name: Kron,
}
"""By name: a bank is made of K and a key."""

CODES: Mapping[int, str] = {bank.code: bank.name for bank in (Gaussian, Hadamard, Kron)}
"""Names by the byte of a seed ledger."""
