"""The tiny bases and examples of the tests of the model."""

from __future__ import annotations

from tests.model.conftest import examples, loaded

__all__ = ["examples", "loaded"]
