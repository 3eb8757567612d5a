"""Which way to rebuild arrays is the quickest that is installed; the caller may as well choose one itself."""

from __future__ import annotations

import importlib.util

from fedtune.directions.rebuild import Rebuild, rebuild


def fastest() -> Rebuild:
    """Return numba's way where numba is installed, or the reference; for tensors see `torch_rebuild.fastest`."""
    if importlib.util.find_spec("numba") is None:
        return rebuild
    from fedtune.directions import numba_rebuild

    return numba_rebuild.rebuild
