"""Checks of a federation's examples against its base: lengths, tokens and types that the base has no row for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from fedtune.data.encode import Example
from fedtune.data.federation import Federation
from fedtune.data.settings import MAX_TOKENS, DataSettings
from fedtune.errors import ConfigError, Fault


@dataclass(frozen=True)
class Limits:
    """What a base can read."""

    base: str
    """Its name."""
    positions: int
    """Longest input in tokens."""
    rows: int
    """Tokens that it has an embedding for."""
    types: int = 0
    """Token types that it has an embedding for; 0 where it heeds none, or all."""


def check_limits(federation: Federation, limits: Limits, token_text: Callable[[int], object]) -> None:
    """Refuse examples with more positions than the base has, or with a token or its type beyond its embeddings.

    Once, before anything is trained: all three fail deep inside the runtime, on CUDA without a readable error.

    Args:
        federation: the examples.
        limits: of the base.
        token_text: gives the text of a token.

    Raises:
        ConfigError: naming the client, the row and the token.
    """
    base, positions, rows, types = limits.base, limits.positions, limits.rows, limits.types
    for where, example in all_examples(federation):
        length, largest = len(example.input_ids), int(example.input_ids.max(initial=0))
        if length > positions:
            expected = f"examples of at most {positions} tokens, the positions that {base} has"
            hint = f"set data.max_tokens = {positions}"
            raise ConfigError(Fault("data.max_tokens", expected, f"one of {length} ({where})", hint))
        if largest >= rows:
            expected = f"tokens below {rows}, of which {base} has an embedding"
            hint = "resize the model's embeddings to its tokenizer and save it, or take the token out of the texts"
            got = f"token {largest} ({token_text(largest)!r}) in {where}"
            raise ConfigError(Fault("data.source", expected, got, hint))
        if types and example.token_types is not None and (kind := int(example.token_types.max(initial=0))) >= types:
            expected = f"token types below {types}, of which {base} has an embedding"
            hint = "give the base its own tokenizer"
            raise ConfigError(Fault("data.source", expected, f"type {kind} in {where}", hint))


def cut_to_positions(
    federation: Federation,
    data: DataSettings,
    encode: Callable[[DataSettings], Federation],
    *,
    base: str,
    positions: int,
) -> Federation:
    """Return a federation whose examples are no longer than the base can read, where the recipe names no length."""
    if data.max_tokens != MAX_TOKENS or longest(federation) <= positions:
        return federation
    # The default asks for more than this base can read.
    shorter = encode(replace(data, max_tokens=positions))
    return replace(shorter, notes=[f"data.max_tokens: {positions}, the positions that {base} has", *shorter.notes])


def longest(federation: Federation) -> int:
    """Return the tokens of a federation's longest example."""
    return max((len(example.input_ids) for _, example in all_examples(federation)), default=0)


def all_examples(federation: Federation) -> Iterator[tuple[str, Example]]:
    """Yield every example, rejected answers among them, and whose it is and which one."""
    for name, shard in federation.clients.items():
        yield from _with_rejected(shard.train, "training example {row} of " + name)
        yield from _with_rejected(shard.held_out, "held-out example {row} of " + name)
    yield from _with_rejected(federation.test, "test example {row}")


def _with_rejected(examples: Sequence[Example], place: str) -> Iterator[tuple[str, Example]]:
    for row, example in enumerate(examples, 1):
        where = place.replace("{row}", str(row), 1)
        yield where, example
        if example.rejected is not None:
            yield f"{where}, rejected", example.rejected
