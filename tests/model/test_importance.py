from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fedtune.errors import ClientError, ConfigError
from fedtune.model.batches import Batch
from fedtune.model.importance import DECAY, gradients, pool, readers, scores, sketch, sketch_layers, smooth, unit_scores
from fedtune.model.lora import with_adapters
from fedtune.model.loss import summed_loss
from fedtune.model.surgery import core, layout_of, with_structure
from fedtune.pruning.ranking import Criterion, PruningSettings, at_structure, rank_units, structure_at
from fedtune.pruning.structure import BlockStructure, ModelStructure, cuts, full_block, rows, shapes, slice_adapter
from tests.model.gating import with_gates
from tests.model.test_surgery import CONFIGS, IDS, MASK, base_of, build, model_of, random_adapter, random_keep

ALL: list[Criterion] = ["wanda", "lora", "gate", "magnitude", "random"]


def batch_of(task: str = "causal", ids: torch.Tensor = IDS, mask: torch.Tensor = MASK) -> Batch:
    labels = ids.masked_fill(mask == 0, -100) if task == "causal" else torch.arange(len(ids)) % 3
    count = int((labels[:, 1:] != -100).sum()) if task == "causal" else len(ids)
    return Batch(input_ids=ids, attention_mask=mask, labels=labels, count=count, tokens=int(mask.sum()))


def double(name: str) -> Any:
    return build(name).double()


def weight_of(module: Any, name: str) -> torch.Tensor:
    """Return a layer's own weight, (out, in)."""
    weight: torch.Tensor = core(module).weight.detach()
    return weight.T if name == "gpt2" else weight


def change_of(module: Any) -> torch.Tensor:
    """Return the trained change; a frozen one is in the layer's weight."""
    change: torch.Tensor = module.scale * (module.b @ module.a)
    return change.detach()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_fast_form_of_lora_is_the_dense_form(name: str) -> None:
    """Ghat * W as matrices, summed over each group by index lists, in float64."""
    model = double(name)
    anatomy = layout_of(model)
    base = base_of(model, anatomy)
    with with_adapters(base, frozen=random_adapter(anatomy, 5), local=random_adapter(anatomy), scale=0.5):
        model.double()
        found = gradients(model, batch_of(base.task), task=base.task)
        fast, parts = sketch(model, anatomy, gradients=found), sketch_layers(model, anatomy, found)
        heads = [np.zeros(block.heads) for block in anatomy.blocks]
        channels = [np.zeros(block.channels) for block in anatomy.blocks]
        for layer, (index, out, into) in anatomy.sides.items():
            module, block = model.get_submodule(layer), anatomy.blocks[index]
            a, b = module.a, module.b
            dense = (found[b] @ a + b @ found[a]).detach() * weight_of(module, name)
            sums = dense.sum(dim=0 if out == "all" else 1).numpy()
            np.testing.assert_allclose(parts[layer].numpy(), sums, rtol=0, atol=1e-9 * float(dense.abs().sum()))
            side = into if out == "all" else out
            if side == "ff":
                channels[index] += np.abs(sums)
                continue
            for head in range(block.heads):
                if side == "kv":
                    heads[index][head] += abs(sums[rows([head // block.group], block.head_dim)].sum()) / block.group
                else:
                    for part in range(3 if side == "qkv" else 1):
                        at = rows([head], block.head_dim) + part * block.heads * block.head_dim
                        heads[index][head] += abs(sums[at].sum())
    for key, expected in (("heads", heads), ("channels", channels)):
        np.testing.assert_allclose(fast[key], np.concatenate(expected), rtol=1e-6)  # both rounded to float32
    assert fast["heads"].dtype == np.float32


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_derivative_of_a_gate_is_the_sum_of_weights_times_gradients(name: str, adapted: bool) -> None:
    model = double(name)
    anatomy = layout_of(model)
    base = base_of(model, anatomy)
    batches = [batch_of(base.task), batch_of(base.task, IDS.flip(0), MASK.flip(0))]
    with with_adapters(base, local=random_adapter(anatomy)) if adapted else nullcontext():
        model.double()
        found = scores(model, batches, "gate", anatomy, task=base.task, key=0)
        names = [*readers(anatomy, "q"), *readers(anatomy, "ff")]
        weights = {key: core(model.get_submodule(key)).weight.requires_grad_(True) for key in names}
        loss = sum(summed_loss(model, batch, task=base.task) for batch in batches) / sum(b.count for b in batches)
        held = dict(zip(names, torch.autograd.grad(loss, list(weights.values())), strict=True))  # type: ignore[arg-type]
        parts = {}
        for key in names:
            module = model.get_submodule(key)
            gradient = held[key].T if name == "gpt2" else held[key]
            full = weight_of(module, name) + (change_of(module) if adapted else 0)
            parts[key] = (full * gradient).sum(dim=0)
    expected = pool(parts, anatomy, full_block(anatomy))
    for key in found:
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-6)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_wanda_is_the_dense_formula_without_padding(name: str, adapted: bool) -> None:
    model = double(name)
    anatomy = layout_of(model)
    base = base_of(model, anatomy)
    rest = {"frozen": random_adapter(anatomy, 5), "local": random_adapter(anatomy), "scale": 0.5}
    with with_adapters(base, **rest) if adapted else nullcontext():  # type: ignore[arg-type]
        model.double()
        found = scores(model, [batch_of(base.task), batch_of(base.task)], "wanda", anatomy, task=base.task, key=0)
        other = batch_of(base.task, IDS.masked_fill(MASK == 0, 33))
        again = scores(model, [other], "wanda", anatomy, task=base.task, key=0)
        inputs: dict[str, torch.Tensor] = {}
        names = [*readers(anatomy, "q"), *readers(anatomy, "ff")]
        hooks = [
            model.get_submodule(key).register_forward_pre_hook(lambda _, args, key=key: inputs.update({key: args[0]}))
            for key in names
        ]
        model(input_ids=IDS, attention_mask=MASK)
        for hook in hooks:
            hook.remove()
        parts = {}
        for key in names:
            module = model.get_submodule(key)
            full = weight_of(module, name)
            if adapted:
                full = full + change_of(module)
            parts[key] = inputs[key][MASK.bool()].square().mean(dim=0) * full.square().sum(dim=0)
    expected = pool(parts, anatomy, full_block(anatomy))
    for key in found:
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-6)
        np.testing.assert_allclose(again[key], found[key], rtol=1e-6)


def test_magnitude_by_hand() -> None:
    model = build("llama-gqa")
    anatomy = layout_of(model)
    found = scores(model, [], "magnitude", anatomy, task="causal", key=0)
    block = model.model.layers[1]
    q, k, v = (getattr(block.self_attn, f"{x}_proj").weight.square() for x in "qkv")
    o = block.self_attn.o_proj.weight.square()
    expected = q[24:32].sum() + o[:, 24:32].sum() + (k[8:16].sum() + v[8:16].sum()) / 2  # the last of two a group
    assert found["heads"][7] == pytest.approx(float(expected), rel=1e-6)
    mlp = block.mlp
    channel = sum(float(m.weight[5].square().sum()) for m in (mlp.gate_proj, mlp.up_proj))
    assert found["channels"][24 + 5] == pytest.approx(channel + float(mlp.down_proj.weight[:, 5].square().sum()))


def test_a_query_head_gets_an_equal_share_of_its_key_and_value() -> None:
    kept = BlockStructure(q=(0, 1, 4, 5), kv=(0, 2), ff=(0,))
    assert unit_scores(torch.tensor([1.0, -3.0, 5.0, 1.0]), "kv", kept).tolist() == [1.0, 1.0, 3.0, 3.0]
    assert unit_scores(torch.tensor([1.0, -3.0, 5.0, 1.0]), "q", kept).tolist() == [1.0, 3.0, 5.0, 1.0]
    assert unit_scores(torch.arange(12.0), "qkv", kept).tolist() == [12.0, 15.0, 18.0, 21.0]


@pytest.mark.parametrize("criterion", ALL)
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "roberta"])
def test_scores_of_a_pruned_model_are_those_of_the_gated_one_at_what_it_keeps(name: str, criterion: Criterion) -> None:
    model = model_of(name)
    anatomy = layout_of(model)
    keep = random_keep(anatomy, 3)
    base, cut = base_of(model, anatomy), cuts(random_keep(anatomy, 3), anatomy)
    adapter = random_adapter(anatomy)
    options = {"task": base.task, "key": 4}
    with (
        with_structure(model, keep, anatomy),
        with_adapters(replace(base, modules=shapes(base.modules, cut)), local=slice_adapter(adapter, cut)),
    ):
        found = scores(model, [batch_of(base.task)], criterion, anatomy, structure=keep, **options)  # type: ignore[arg-type]
    assert found["heads"].shape == (sum(len(kept.q) for kept in keep.blocks),)
    assert found["channels"].shape == (sum(len(kept.ff) for kept in keep.blocks),)
    if criterion in ("gate", "wanda", "random"):
        with with_adapters(base, local=adapter), with_gates(model, keep, anatomy):
            full = scores(model, [batch_of(base.task)], criterion, anatomy, **options)  # type: ignore[arg-type]
        for key, array in at_structure(full, keep, anatomy).items():
            np.testing.assert_allclose(found[key], array, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("criterion", ALL)
def test_scoring_leaves_no_trace(criterion: Criterion) -> None:
    model = build("qwen2")
    anatomy = layout_of(model)
    with with_adapters(base_of(model, anatomy), local=random_adapter(anatomy)):
        hooks = [len(module._forward_pre_hooks) for module in model.modules()]
        first = scores(model, [batch_of()], criterion, anatomy, task="causal", key=1)
        second = scores(model, [batch_of()], criterion, anatomy, task="causal", key=1)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert all((first[key] == second[key]).all() and first[key].dtype == np.float32 for key in first)
    assert all((first[key] >= 0).all() and first[key].std() > 0 for key in first)


def test_lora_is_a_moving_mean_over_steps() -> None:
    model = model_of("llama-gqa")
    anatomy = layout_of(model)
    batches = [batch_of(), batch_of("causal", IDS.flip(0), MASK.flip(0))]
    with with_adapters(base_of(model, anatomy), local=random_adapter(anatomy)):
        one, two = (scores(model, [batch], "lora", anatomy, task="causal", key=0) for batch in batches)
        both = scores(model, batches, "lora", anatomy, task="causal", key=0)
        for key, array in both.items():
            np.testing.assert_allclose(array, DECAY * one[key] + (1 - DECAY) * two[key], rtol=1e-5)
            np.testing.assert_array_equal(array, smooth(one, two)[key])
        (summed_loss(model, batches[0], task="causal") / batches[0].count).backward()
        np.testing.assert_array_equal(sketch(model, anatomy)["heads"], one["heads"])  # what a training step leaves


def test_lora_needs_adapters_on_both_kinds_of_layers() -> None:
    model = model_of("llama-gqa")
    anatomy = layout_of(model)
    adapter = {name: factors for name, factors in random_adapter(anatomy).items() if "self_attn" in name}
    with pytest.raises(ConfigError, match=r"pruning\.score: .* no trainable adapter"):
        scores(model, [batch_of()], "lora", anatomy, task="causal", key=0)
    with with_adapters(base_of(model, anatomy), local=adapter), pytest.raises(ConfigError, match="a layer of channels"):
        scores(model, [batch_of()], "lora", anatomy, task="causal", key=0)
    with with_adapters(base_of(model, anatomy), local=random_adapter(anatomy), train="b"):
        found = scores(model, [batch_of()], "lora", anatomy, task="causal", key=0)
    assert found["heads"].std() > 0


def test_no_data_and_no_numbers_are_refused() -> None:
    model = build("gpt2")
    anatomy = layout_of(model)
    with pytest.raises(ClientError, match="wanda: expected at least one batch"):
        scores(model, [], "wanda", anatomy, task="causal", key=0)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[0, 0] = float("nan")
    with pytest.raises(ClientError, match="finite"):
        scores(model, [], "magnitude", anatomy, task="causal", key=0)


def test_random_scores_follow_the_key_and_nothing_else() -> None:
    model = model_of("llama-gqa")
    anatomy = layout_of(model)
    first, again, other = (scores(model, [], "random", anatomy, task="causal", key=key) for key in (1, 1, 2))
    assert (first["heads"] == again["heads"]).all()
    assert (first["heads"] != other["heads"]).all()


def test_on_a_real_model_data_tell_better_than_weights_or_chance(stories: Path) -> None:
    """Half of the blocks gone at once, no recovery, on text that the model wrote itself."""
    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval().requires_grad_(False)
    anatomy = layout_of(model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ids = model.generate(torch.ones(12, 1, dtype=torch.long), do_sample=True, max_length=96, pad_token_id=0)
    batches = [batch_of("causal", part, torch.ones_like(part)) for part in ids.split(4)]
    settings = PruningSettings(target=0.5)

    def loss(keep: ModelStructure) -> float:
        with with_structure(model, keep, anatomy), torch.inference_mode():
            return float(sum(summed_loss(model, b, task="causal") for b in batches[2:]) / batches[2].count)

    def after(criterion: Criterion, key: int = 0) -> float:
        found = scores(model, batches[:2], criterion, anatomy, task="causal", key=key)
        return loss(structure_at(rank_units(found, anatomy, settings), anatomy, settings, 0.5))

    full, wanda, gate, chance = (
        loss(full_block(anatomy)),
        after("wanda"),
        after("gate"),
        np.mean([after("random", key) for key in range(4)]),
    )
    assert full < wanda < chance - 0.4
    assert full < gate < chance
