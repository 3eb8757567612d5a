"""The tuned model of a device as files for other programs: a LoRA adapter in PEFT's format, or for llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtune.directions.seed_ledger import SeedLedger
from fedtune.edge.bundle import Bundle
from fedtune.edge.gguf_adapter import Heads, adapter_file
from fedtune.errors import ConfigError, Fault, StoreError
from fedtune.lora.adapter import Adapter
from fedtune.methods.method import SeedModel
from fedtune.store import manifest, peft
from fedtune.store.files import fill, new_folder
from fedtune.store.seeds import kron_adapter

FORMS = ("peft", "gguf")
GGUF_FILE = "adapter.gguf"


def export_tuned(bundle: Bundle, ledger: SeedLedger, trainable: Sequence[int], out: Path, *, form: str) -> Path:
    """Write a device's model as an adapter of its base, in one step, and return the folder.

    The adapter has rank p and scale 1, and is the change of the weights itself, not an approximation of it.

    Args:
        bundle: of the base.
        ledger: the seeds that a device has received last.
        trainable: ordinals of the matrices that they move.
        out: a new or an empty folder.
        form: peft: for transformers and PEFT; gguf: for llama.cpp.

    Raises:
        ConfigError: if the form is unknown, or cannot hold this model.
        StoreError: if the folder holds files, or cannot be written.
    """
    if form not in FORMS:
        raise ConfigError(Fault("--form", f"one of {', '.join(FORMS)}", repr(form)))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StoreError(f"{out}: expected a new or an empty folder; it holds files; choose another")
    adapter, facts = change(bundle, ledger, trainable), bundle.facts
    origin = provenance(bundle, ledger)
    if form == "peft":
        target = peft.Target(bundle.base_name, None, "causal", facts.transposed, ())
        return peft.write(out, adapter, {}, target, origin)
    data = adapter_file(adapter, family=facts.family, heads=heads(bundle))
    with new_folder(out) as folder:
        fill(folder / GGUF_FILE, data)
        manifest.write(folder, origin)
    return out


def change(bundle: Bundle, ledger: SeedLedger, trainable: Sequence[int]) -> Adapter:
    """Return what seeds change of a base, as factors of rank p.

    Raises:
        ConfigError: if they are of another base.
    """
    if ledger.manifest != bundle.manifest.digest:
        expected, got = ledger.manifest.hex()[:16], bundle.manifest.digest.hex()[:16]
        hint = "use the bundle that the model was tuned on"
        raise ConfigError(Fault("model.base", f"the base of the tuned model, {expected}", got, hint))
    model = SeedModel(ledger, bundle.manifest, tuple(trainable))
    return kron_adapter(model, transposed=bundle.facts.transposed)


def provenance(bundle: Bundle, ledger: SeedLedger) -> Mapping[str, Any]:
    """Return what the manifest of an exported adapter says of its origin."""
    return {
        "method": "fedkseed",
        "bank": ledger.bank.name,
        "round": ledger.round,
        "state_digest": ledger.digest.hex(),
        "base": {"name": bundle.base_name, "digest": bundle.base_digest},
    }


def heads(bundle: Bundle) -> Heads | None:
    """Return how many heads the base has; None where its bundle does not say so."""
    layout = bundle.facts.anatomy
    if layout is None or not layout.blocks:
        return None
    return Heads(layout.blocks[0].heads, layout.blocks[0].kv_heads)
