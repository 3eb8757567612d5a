"""The table of methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedtune.methods import fedex, fedit, fedkseed, ffa, flexlora, flora, hetlora, zeropad
from fedtune.methods.method import Method

METHODS: Mapping[str, Method[Any]] = {
    "flora": flora.METHOD,
    "fedit": fedit.METHOD,
    "zeropad": zeropad.METHOD,
    "hetlora": hetlora.METHOD,
    "ffa": ffa.METHOD,
    "flexlora": flexlora.METHOD,
    "fedex": fedex.METHOD,
    "fedkseed": fedkseed.METHOD,
}
