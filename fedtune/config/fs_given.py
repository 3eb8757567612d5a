"""What a configuration of FederatedScope gives, each value checked as it is read, and what is made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from fedtune.config.error_text import display
from fedtune.errors import ConfigError, Fault


@dataclass(frozen=True)
class Setting:
    """One key of a recipe, and the keys of FederatedScope that it comes from, given or by default."""

    path: str
    value: Any
    of: tuple[str, ...]


@dataclass(frozen=True)
class Remark:
    """What a user should know of one key beyond the table."""

    key: str
    text: str


Values: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Given:
    """The values of a file, each checked as it is read; absent ones have FederatedScope's defaults."""

    values: Values
    space: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The search space that `hpo.ss` names: by key its type, ends or choices."""

    def number(self, key: str, default: float) -> float:
        """Return a number; YAML 1.1 reads 5e-3 as a text."""
        value = self.values.get(key, default)
        try:
            return float("x") if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            raise wrong(key, "a number", value) from None

    def whole(self, key: str, default: int) -> int:
        value = self.number(key, default)
        if not value.is_integer():
            raise wrong(key, "a whole number", self.values[key])
        return int(value)

    def text(self, key: str, default: str) -> str:
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise wrong(key, "a text", value)
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise wrong(key, "true or false", value)
        return value

    def texts(self, key: str) -> Sequence[str]:
        value = self.values.get(key, ())
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list | tuple) or not all(isinstance(each, str) for each in values):
            raise wrong(key, "a list of texts", value)
        return list(values)


def wrong(key: str, expected: str, value: object, hint: str = "") -> ConfigError:
    return ConfigError(Fault(key, expected, display(value), hint))
