"""Graphs are of standard operators, small, and hold every weight; a tensor too many or too few is refused.

What they compute is held against torch in `tests/edge/test_onnx_runtime.py`, for every family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from fedtune.edge.onnx_file import OPERATORS, check_graph
from fedtune.errors import ConfigError
from fedtune.model.base import Base, to_numpy
from fedtune.model.onnx_config import read_architecture
from fedtune.model.onnx_graph import BODY, HEAD, WEIGHTS, write_graphs
from fedtune.model.onnx_weights import Stored, write_weights
from tests.edge.tiny_models import MODELS, tiny_base


def weights_of(base: Base, folder: Path, **extra: tuple[int, ...]) -> Mapping[str, Stored]:
    import numpy as np

    parameters = dict(base.model.named_parameters())
    shapes: dict[str, Any] = {name: tuple(weight.shape) for name, weight in parameters.items()}
    shapes |= {name.replace("__", "."): shape for name, shape in extra.items()}
    return write_weights(
        folder / WEIGHTS,
        shapes,
        lambda name: to_numpy(parameters[name]) if name in parameters else np.zeros(shapes[name], np.float32),
        rounded={},
    )


def write(base: Base, folder: Path, weights: Mapping[str, Stored], **changes: Any) -> None:
    architecture = replace(read_architecture(base.model.config.to_dict()), **changes)
    write_graphs(folder, architecture, weights, list(base.modules))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_graphs_are_of_operators_that_devices_run(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    base = tiny_base(name, checkpoints["llama"])
    write(base, tmp_path, weights_of(base, tmp_path))
    for file in (BODY, HEAD):
        data = (tmp_path / file).read_bytes()
        assert len(data) < 60_000
        check_graph(data, file, weights=WEIGHTS, size=(tmp_path / WEIGHTS).stat().st_size)
        assert {node.op_type for node in onnx.load_model_from_string(data).graph.node} <= OPERATORS
    body = onnx.load_model_from_string((tmp_path / BODY).read_bytes())
    paths = {entry.name.partition(".")[2] for entry in body.graph.input if entry.name.startswith("first.")}
    assert paths == set(base.modules)


def test_a_tensor_that_no_node_reads_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    base = tiny_base("qwen2", checkpoints["llama"])
    weights = weights_of(base, tmp_path, model__layers__0__mlp__norm__weight=(48,))
    with pytest.raises(ConfigError, match=r"got model\.layers\.0\.mlp\.norm\.weight \(of 1\) as well"):
        write(base, tmp_path, weights)


def test_a_tensor_that_is_missing_is_named(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    base = tiny_base("llama", checkpoints["llama"])
    weights = dict(weights_of(base, tmp_path))
    del weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ConfigError, match=r"expected the tensor model\.layers\.1\.mlp\.up_proj\.weight of llama"):
        write(base, tmp_path, weights)


def test_the_output_layer_is_the_one_that_the_config_says(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for name, tied in (("llama", True), ("qwen2", False)):
        folder = tmp_path / name
        folder.mkdir()
        base = tiny_base(name, checkpoints["llama"])
        with pytest.raises(ConfigError, match="the output layer that tie_word_embeddings"):
            write(base, folder, weights_of(base, folder), tied=tied)


def test_layers_without_a_place_for_a_path_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    base = tiny_base("llama", checkpoints["llama"])
    architecture = read_architecture(base.model.config.to_dict())
    with pytest.raises(ConfigError, match=r"expected linear layers of the blocks, for devices; got lm_head"):
        write_graphs(tmp_path, architecture, weights_of(base, tmp_path), [*base.modules, "lm_head"])
