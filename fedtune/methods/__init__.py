"""The table of methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedtune.methods import fedit
from fedtune.methods.method import Method

METHODS: Mapping[str, Method[Any]] = {
    "fedit": fedit.METHOD,
}
