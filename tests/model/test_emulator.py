"""Emulators of many families, and what a projection leaves of their middles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from fedtune.errors import ConfigError
from fedtune.model import emulator as emulators
from fedtune.model.blocks import find_blocks
from fedtune.model.emulator import build_emulator, emulator_names, middle_names, projection_of, write_projected
from fedtune.model.importance import scores
from fedtune.model.quantise import dequantise, quantise
from fedtune.model.surgery import layout_of, with_structure
from fedtune.pruning.ranking import PruningSettings, rank_units, structure_at
from fedtune.pruning.structure import ModelStructure, full_block
from tests.model.families import CAUSAL, CLASSIFIERS, COMMON

SHARED_BLOCKS = {"albert"}
"""Whose blocks are one and the same."""
OTHER_CONFIGS = {"longformer"}
"""Whose config lists windows by block under a name that says nothing of layers."""
FAST = {"llama", "gpt2", "gemma3_text", "gpt_neo"}
COUNT = 6


def deeper(sizes: Any) -> dict[str, Any]:
    counts = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
    depth: dict[str, Any] = {key: COUNT for key in counts if key in sizes}
    if "attention_types" in sizes:
        depth["attention_types"] = [[["global", "local"], COUNT // 2]]
    return {**COMMON, **sizes, **depth}


def model_of(kind: str, sizes: Any, auto: Any = AutoModelForCausalLM) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return auto.from_config(AutoConfig.for_model(kind, **deeper(sizes))).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def llama() -> Any:
    return model_of("llama", CAUSAL["llama"])


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in FAST else pytest.mark.slow) for k in CAUSAL])
def test_an_emulator_of_every_family_computes_what_its_blocks_do_in_the_base(kind: str) -> None:
    # `build_emulator` compares both itself, and refuses those that differ.
    model = model_of(kind, CAUSAL[kind])
    emulator = build_emulator(model, [0, 2, 5], task="causal")
    name, blocks = find_blocks(emulator)
    assert len(blocks) == 3
    theirs = dict(find_blocks(model)[1][2].named_parameters())
    for key, parameter in blocks[1].named_parameters():
        assert torch.equal(parameter, theirs[key])
        assert parameter.data_ptr() != theirs[key].data_ptr()
    assert emulator.config.get_text_config().num_hidden_layers == 3
    assert name == find_blocks(model)[0]


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k == "bert" else pytest.mark.slow) for k in CLASSIFIERS])
def test_an_emulator_of_every_classifier(kind: str) -> None:
    model = model_of(kind, CLASSIFIERS[kind], AutoModelForSequenceClassification)
    if kind in SHARED_BLOCKS | OTHER_CONFIGS:
        with pytest.raises(ConfigError, match=r"one list of 6 blocks|whose blocks can stand at other places"):
            build_emulator(model, [0, 2, 5], task="classification")
        return
    assert len(find_blocks(build_emulator(model, [0, 2, 5], task="classification"))[1]) == 3


def test_a_base_is_not_changed_by_what_is_written_into_its_emulator(llama: Any) -> None:
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    emulator = build_emulator(llama, range(COUNT), task="causal")
    with torch.no_grad():
        for name in middle_names(emulator, range(1, COUNT - 1)):
            emulator.get_parameter(name).zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())


def test_blocks_that_depend_on_their_place_are_refused(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # As if the family read its blocks by number: the emulator gets others than were asked for.
    monkeypatch.setattr(
        emulators, "emulator_names", lambda name, blocks, layers: emulator_names(name, blocks, [0, 3, 5])
    )
    with pytest.raises(ConfigError, match="a llama: they compute something else at another place"):
        build_emulator(llama, [0, 2, 5], task="causal")


def test_names_in_the_emulator() -> None:
    assert emulator_names("h.2.mlp.weight", "h", [0, 2, 5]) == ["h.1.mlp.weight"]
    assert emulator_names("h.3.mlp.weight", "h", [0, 2, 5]) == []
    assert emulator_names("norm.weight", "h", [0, 2, 5]) == ["norm.weight"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_pruned_middle_computes_what_the_smaller_model_does(kind: str) -> None:
    model, middle = model_of(kind, CAUSAL[kind]), range(1, COUNT - 1)
    projection = projection_of(model, "prune", middle, ratio=0.5)
    emulator = build_emulator(model, range(COUNT), task="causal")
    write_projected(emulator, middle_names(emulator, middle), projection)
    layout, settings = layout_of(model), PruningSettings(score="magnitude", target=0.5)
    importance = scores(model, [], "magnitude", layout, task="causal", key=0)
    small, whole = structure_at(rank_units(importance, layout, settings), layout, settings, 0.5), full_block(layout)
    structure = ModelStructure(tuple(small.blocks[i] if i in middle else whole.blocks[i] for i in range(COUNT)))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode(), with_structure(model, structure, layout):
        wanted = model(input_ids=ids).logits
    got = emulator(input_ids=ids).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    zeros = [int((emulator.get_parameter(n) == 0).sum()) for n in middle_names(emulator, middle) if "mlp" in n]
    assert min(zeros) > 0
    name = find_blocks(model)[0]
    ends = [n for n, _ in model.named_parameters() if n.startswith((f"{name}.0.", f"{name}.{COUNT - 1}."))]
    assert ends
    assert all(torch.equal(emulator.get_parameter(n), model.get_parameter(n)) for n in ends)


@pytest.mark.parametrize("ratio", [0.0, 0.9, float("nan")])
def test_a_share_that_cannot_be_pruned(ratio: float, llama: Any) -> None:
    with pytest.raises(ConfigError, match=r"a share above 0, up to 0\.875"):
        projection_of(llama, "prune", [1, 2], ratio=ratio)


def test_a_family_whose_heads_cannot_be_taken_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'phi3' \\(another family\\)"):
        projection_of(model_of("phi3", CAUSAL["phi3"]), "prune", [1, 2], ratio=0.5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("codes", ["nf4", "int8"])
def test_a_quantised_middle_holds_values_of_codes(kind: str, codes: Any) -> None:
    model = model_of(kind, CAUSAL[kind])
    projection = projection_of(model, "quantise", [1, 2], codes=codes)
    layer = f"{find_blocks(model)[0]}.1.mlp." + ("up_proj" if kind == "llama" else "c_fc")
    weight = model.get_submodule(layer).weight
    near = projection(f"{layer}.weight", weight)
    turned = weight if isinstance(model.get_submodule(layer), nn.Linear) else weight.T
    wanted = dequantise(quantise(turned, codes), torch.float32)
    assert torch.equal(near if turned is weight else near.T, wanted)
    assert near.is_contiguous()
    assert not torch.equal(near, weight)
    assert torch.equal(projection(layer.replace(".1.", ".3.", 1) + ".weight", weight), weight)
