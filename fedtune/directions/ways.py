"""Which way to rebuild arrays is the quickest that is installed; the caller may as well choose one itself."""

from __future__ import annotations

import importlib.util

from fedtune.directions.bank import DirectionBank, displacement
from fedtune.directions.consistency import Displacement
from fedtune.directions.gaussian import Gaussian
from fedtune.directions.rebuild_numpy import Rebuild, rebuild


def fastest() -> Rebuild:
    """Return numba's way where numba is installed, or the reference; for tensors see `torch_rebuild.fastest`."""
    if importlib.util.find_spec("numba") is None:
        return rebuild
    from fedtune.directions import rebuild_numba

    return rebuild_numba.rebuild


def displacement_for(bank: DirectionBank) -> Displacement:
    """Return the quickest way to the displacements of a few blocks.

    Only a bank that draws for each direction is worth the seconds that numba compiles.
    """
    if not isinstance(bank, Gaussian) or importlib.util.find_spec("numba") is None:
        return displacement
    from fedtune.directions import rebuild_numba

    return rebuild_numba.displacement
