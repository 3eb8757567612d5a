"""Checks of a federation's examples against its base: lengths and tokens that the base has no row for."""

from __future__ import annotations

from collections.abc import Iterator

from fedtune.data.encode import Example
from fedtune.data.federation import Federation
from fedtune.errors import ConfigError, Fault
from fedtune.model.base import Base
from fedtune.model.load_checks import embedding_rows


def check_examples(federation: Federation, base: Base) -> None:
    """Refuse examples with more positions than the base has, or with a token beyond its embeddings.

    Once, before anything is trained: both fail deep inside torch, on CUDA without a readable error.

    Raises:
        ConfigError: naming the client, the row and the token.
    """
    rows = embedding_rows(base.model)
    for where, example in all_examples(federation):
        length, largest = len(example.input_ids), int(example.input_ids.max(initial=0))
        if length > base.positions:
            expected = f"examples of at most {base.positions} tokens, the positions that {base.name} has"
            hint = f"set data.max_tokens = {base.positions}"
            raise ConfigError(Fault("data.max_tokens", expected, f"one of {length} ({where})", hint))
        if largest >= rows:
            token = base.tokenizer.convert_ids_to_tokens(largest)
            expected = f"tokens below {rows}, of which {base.name} has an embedding"
            hint = "resize the model's embeddings to its tokenizer and save it, or take the token out of the texts"
            raise ConfigError(Fault("data.source", expected, f"token {largest} ({token!r}) in {where}", hint))


def all_examples(federation: Federation) -> Iterator[tuple[str, Example]]:
    """Yield every example, and whose it is and which one."""
    for name, shard in federation.clients.items():
        yield from ((f"training example {row} of {name}", example) for row, example in enumerate(shard.train, 1))
        yield from ((f"held-out example {row} of {name}", example) for row, example in enumerate(shard.held_out, 1))
    yield from ((f"test example {row}", example) for row, example in enumerate(federation.test, 1))
