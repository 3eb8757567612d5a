"""Bundles of a base that comes as a GGUF file: the file as it is, compared with torch, and only then signed."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.edge import bundle as bundles
from fedtune.edge.ggml import library
from fedtune.edge.gguf_decoder import Decoder, read_decoder
from fedtune.edge.gguf_file import GgufFile
from fedtune.edge.gguf_runtime import WEIGHTS
from fedtune.errors import ConfigError, Fault
from fedtune.link.provenance import Signer, sign_folder
from fedtune.rounds.events import Phase, Watch
from fedtune.runs.edge_bundle import (
    ExportedBundle,
    check_free,
    compare,
    facts_of,
    load_base,
    read_signer,
    read_source,
    sizes_of,
    write_tokenizer,
)
from fedtune.store import manifest
from fedtune.store.files import fill, new_folder, sync_readable

if TYPE_CHECKING:
    from fedtune.model.base import Base

NAME = "weights.gguf"


def export_gguf_bundle(
    source: str | Path, out: str | Path, *, identity: Path | None = None, watch: Watch = lambda event: None
) -> ExportedBundle:
    """Write the GGUF file of a recipe or of a run, or the file itself, as a bundle that devices run without torch.

    Args:
        source: a recipe, a run directory, or a GGUF file, or a folder that holds one.
        out: folder to write, new or empty.
        identity: folder of the coordinator's keys; without it the bundle is not signed.
        watch: called with the steps.

    Raises:
        ConfigError: if there is no such file, the runtime does not run its model, or gives other losses than torch.
        ExtraError: if the package xllamacpp is not installed.
        StoreError: if `out` holds files already.
    """
    from fedtune.model.gguf import find_gguf

    target = Path(out)
    check_free(target)
    signer, origin = read_signer(identity), read_source(source)
    file = find_gguf(origin.root / Path(origin.model.base).expanduser())
    if file is None:
        hint = "give the path of one, or write a bundle of the runtime onnx"
        raise ConfigError(Fault("model.base", "a GGUF file for the runtime gguf", origin.model.base, hint))
    # Before the base is loaded, which may take minutes.
    describe(file)
    watch(Phase("loading the base"))
    return write_gguf_bundle(load_base(origin), file, target, signer=signer, watch=watch)


def write_gguf_bundle(
    base: Base, file: Path, target: Path, *, signer: Signer | None, watch: Watch = lambda event: None
) -> ExportedBundle:
    """Write a bundle of a loaded base and the GGUF file that it was loaded from.

    Names, order and digests of the tensors are those of the torch base: torch clients and devices share a run's state.

    Args:
        base: in float32, as every GGUF file is loaded.
        file: that the base was loaded from.
        target: folder to write; one that does not pass the comparison is not left behind.
        signer: of the coordinator; without it the bundle is not signed.
        watch: called with the steps.

    Raises:
        ConfigError: if the runtime does not run the file's model, or gives other losses than torch.
        ExtraError: if the package xllamacpp is not installed.
    """
    if base.dtype != "float32":
        expected = "a base in float32, to which a device expands the weights of a GGUF file"
        raise ConfigError(Fault("model.dtype", expected, base.dtype, 'leave model.dtype out, or set it to "float32"'))
    decoder, dtype = describe(file)
    facts = replace(
        facts_of(base, decoder.family, "float32"),
        runtime="gguf",
        dtype=dtype,
        positions=min(base.positions, decoder.positions),
        details={WEIGHTS: NAME},
    )
    with new_folder(target) as folder:
        watch(Phase("copying the GGUF file"))
        shutil.copyfile(file, folder / NAME)
        sync_readable(folder / NAME)
        fill(folder / bundles.TENSORS, base.manifest.encode())
        write_tokenizer(base.tokenizer, folder)
        # A local folder's path is none of the devices' business.
        stated = bundles.manifest_facts(facts, base_name=Path(base.name).name, base_digest=base.digest)
        manifest.write(folder, stated)
        watch(Phase("comparing its losses with torch's"))
        difference = compare(base, folder, {})
        if signer is not None:
            sign_folder(folder, signer, now=int(time.time()))
    return ExportedBundle(target, sizes_of(target), difference, signer.name if signer else "")


def describe(path: Path) -> tuple[Decoder, str]:
    """Return a file's decoder, and the format of most of its matrices as GGUF names it: f16, q8_0, q4_K.

    Raises:
        ConfigError: if the runtime does not run it.
    """
    file = GgufFile(path)
    try:
        decoder = read_decoder(file)
        kinds = Counter(tensor.kind for tensor in file.tensors.values() if len(tensor.shape) == 2)
        return decoder, str(library().ggml_type_name(kinds.most_common(1)[0][0]).decode())
    finally:
        file.close()
