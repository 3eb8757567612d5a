"""A whole model written at the weights of a seed ledger, and the base that a ledger belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedtune.directions.seed_ledger import SeedLedger, replace_tensors
from fedtune.errors import ConfigError, Fault
from fedtune.model.base import Base, load, load_tokenizer, manifest_of
from fedtune.model.device import DTYPES
from fedtune.model.libraries import quiet
from fedtune.model.seed_rebuild import with_rebuilt_weights
from fedtune.model.settings import AdapterSettings, ModelSettings
from fedtune.tensors import Tensors


def write(
    base: Base, ledger: SeedLedger, trainable: Sequence[int], out: Path | None, *, head: Tensors | None = None
) -> str:
    """Write a Hugging Face model folder of w(A) in the base's own number format, and return the weights' digest (hex).

    The digest is that of the model's manifest, as of a base: every rebuild of the same weights has the same digest.
    Without a folder nothing is written.
    """
    with with_rebuilt_weights(base, ledger, trainable, head):
        if out is not None:
            with quiet():
                base.model.save_pretrained(out)  # as safetensors alone
                base.tokenizer.save_pretrained(out)
        return manifest_of(base.model).digest.hex()


def base_of(
    ledger: SeedLedger,
    settings: ModelSettings,
    *,
    seed: int,
    labels: Sequence[str],
    in_full: Sequence[str] = (),
    head: Tensors | None = None,
) -> Base:
    """Load the base that a ledger belongs to, in the number format that it was used in.

    Args:
        ledger: names the base by the digest of its manifest.
        settings: where the base is; the number format given there is tried first.
        seed: of the run; a classification head that the checkpoint lacks is drawn from it.
        labels: names of the classes, for classification.
        in_full: the run's `adapter.modules_to_save`, which a 16-bit base holds in float32.
        head: that the run has made, in the place of the base's own.

    Raises:
        ConfigError: if the base cannot be loaded, or its digest differs in every format.
    """
    tokenizer = load_tokenizer(settings, Path())
    every_layer = AdapterSettings(rank=1, targets=["all-linear"], modules_to_save=in_full)
    # The ledger does not say the format, and the digest of its manifest depends on it: each format is tried.
    formats = sorted(DTYPES, key=lambda name: name != settings.dtype)
    for dtype in formats:
        chosen = replace(settings, dtype=dtype)  # type: ignore[arg-type]
        base = load(chosen, every_layer, tokenizer=tokenizer, root=Path(), seed=seed, labels=labels)
        if replace_tensors(base.manifest, head or {}).digest == ledger.manifest:
            return base
    raise ConfigError(
        Fault(
            "base",
            f"the base whose manifest has the digest {ledger.manifest.hex()[:16]}",
            f"{settings.base}, which has another in each of {', '.join(formats)}",
            "give the model in the revision that the run started from; a rebuilt one is another",
        )
    )
