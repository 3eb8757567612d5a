"""What runs a bundle: losses of a batch at the weights of a run's seeds and around them, and continued text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Protocol

from fedtune.directions.seed_ledger import SeedLedger
from fedtune.edge.bundle import Bundle
from fedtune.errors import ConfigError, Fault
from fedtune.probing.measure import Position
from fedtune.probing.rows import PaddedRows

EXTRAS: Mapping[str, str] = {"onnx": "edge", "gguf": "edge-gguf"}
"""Of fedtune, by runtime: what brings its package."""
PACKAGES: Mapping[str, str] = {"onnx": "onnxruntime", "gguf": "xllamacpp"}
"""What computes, by runtime."""


class Runtime(Protocol):
    """A base that computes forward passes, at any weights that seeds of the bank `kron` give it."""

    def at(self, ledger: SeedLedger, trainable: Sequence[int]) -> AbstractContextManager[Position[PaddedRows]]:
        """Give the weights w(A) of a ledger inside a block, and the losses there and around it.

        Args:
            ledger: of the bank `kron`, over the bundle's manifest.
            trainable: ordinals of the matrices that are moved, rising; all are among the bundle's layers.

        Raises:
            ClientError: inside the block, if memory runs out.
        """
        ...

    def continue_tokens(
        self, ledger: SeedLedger | None, trainable: Sequence[int], ids: Sequence[int], *, new_tokens: int
    ) -> Iterator[int]:
        """Yield the most likely next tokens one by one, at the weights of a ledger or of the base itself.

        Ends after so many tokens, before one that ends a text, or where the base's positions end.
        """
        ...


def load_runtime(bundle: Bundle, *, threads: int) -> Runtime:
    """Return the runtime of a bundle, which computes on so many threads.

    Raises:
        ConfigError: if this program was built without it, or it cannot run the bundle.
    """
    # Imported here, and by name: each takes tens of megabytes, and a program may be built with one of them alone.
    try:
        module = import_module(f"fedtune.edge.{bundle.facts.runtime}_runtime")
    except ImportError as error:
        expected, got = "a bundle for a runtime of this program", f"one for {bundle.facts.runtime}"
        hint = f"use the program that has it, or pip install 'fedtune[{EXTRAS[bundle.facts.runtime]}]' ({error})"
        raise ConfigError(Fault("model.base", expected, got, hint)) from error
    runtime: Runtime = module.load(bundle, threads=threads)
    return runtime
