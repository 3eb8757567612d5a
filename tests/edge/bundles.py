"""Bundles for tests: a folder whose files are anything, with facts and a manifest of tensors that fit each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.directions.seed_ledger import describe_base
from fedtune.edge.bundle import TENSORS, BundleFacts, Module, manifest_facts
from fedtune.store import manifest
from fedtune.store.files import fill, new_folder

FACTS = BundleFacts(
    runtime="onnx",
    family="llama",
    dtype="float32",
    layers=("layer.weight",),
    modules={"layer": Module(out=2, width=3)},
    transposed=False,
    parameters=6,
    positions=16,
    vocabulary=4,
    pad_id=0,
    eos_ids=(1,),
)
WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)


def write_bundle(
    path: Path, *, edit: Mapping[str, Any] | None = None, files: Mapping[str, bytes] | None = None, **facts: Any
) -> Path:
    """Write a bundle of one layer with more files; `facts` and `edit` replace what its manifest says."""
    stated = dict(manifest_facts(replace(FACTS, **facts), base_name="tiny", base_digest="ab" * 32))
    stated["bundle"] = {**stated["bundle"], **(edit or {})}
    with new_folder(path) as folder:
        fill(folder / TENSORS, describe_base({"layer.weight": WEIGHT}).encode())
        for name, content in {"graph.onnx": b"a graph", **(files or {})}.items():
            fill(folder / name, content)
        manifest.write(folder, stated)
    return path
