from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from fedtune.errors import ClientError, ConfigError, ShapeError
from fedtune.lora.adapter import Adapter, Factors
from fedtune.model.base import Base
from fedtune.model.importance import gates, readers
from fedtune.model.lora import layers, with_adapters
from fedtune.model.quantised_layers import codes_digest, quantisable, quantise_layers
from fedtune.model.selective_backward import halves_of
from fedtune.model.surgery import fit, layout_of, shrink_further, with_structure
from fedtune.pruning.structure import (
    Block,
    BlockLayout,
    BlockStructure,
    ModelStructure,
    cuts,
    full_block,
    linear_shapes,
    shapes,
    slice_adapter,
)
from tests.model.gating import with_gates

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}
LLAMA = {**SIZES, "intermediate_size": 24, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1}
GQA = {**LLAMA, "num_key_value_heads": 2, "eos_token_id": 63}
BERT = {**SIZES, "intermediate_size": 24, "max_position_embeddings": 66, "pad_token_id": 1, "num_labels": 3}
CONFIGS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llama-mha": lambda: (LlamaForCausalLM, LlamaConfig(**{**GQA, "num_key_value_heads": 4})),
    "llama-gqa": lambda: (LlamaForCausalLM, LlamaConfig(**GQA, tie_word_embeddings=True)),
    "mistral": lambda: (MistralForCausalLM, MistralConfig(**GQA, head_dim=8)),
    "qwen2": lambda: (Qwen2ForCausalLM, Qwen2Config(**GQA)),
    "qwen3": lambda: (Qwen3ForCausalLM, Qwen3Config(**GQA, head_dim=16)),
    "gpt2": lambda: (
        GPT2LMHeadModel,
        GPT2Config(
            n_embd=32, n_layer=3, n_head=4, n_positions=64, n_inner=24, vocab_size=64, bos_token_id=1, eos_token_id=63
        ),
    ),
    "bert": lambda: (BertForSequenceClassification, BertConfig(**BERT)),
    "roberta": lambda: (RobertaForSequenceClassification, RobertaConfig(**BERT)),
}
CAUSAL = [name for name in CONFIGS if "bert" not in name]
ATTENTION = ["eager", "sdpa"]
IDS = torch.tensor([[5, 9, 17, 3, 44, 21, 8, 30], [7, 2, 19, 50, 11, 1, 1, 1]])
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])


def build(name: str, attention: str = "sdpa") -> Any:
    """Return a tiny model in which every parameter, biases and norms too, is drawn at random."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind, config = CONFIGS[name]()
        config._attn_implementation = attention
        model = kind(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.25)
    return model.requires_grad_(False).eval()


model_of = lru_cache(build)  # by those tests that leave a model as it was, which one of them proves


def base_of(model: Any, anatomy: BlockLayout) -> Base:
    """Return a base whose every linear layer in a block gets an adapter."""
    modules = dict(zip(anatomy.sides, linear_shapes(anatomy), strict=True))
    task = "causal" if hasattr(model, "lm_head") else "classification"
    return Base("tiny", "tiny", model, None, task, torch.device("cpu"), "", modules, (), ())


def random_keep(anatomy: BlockLayout, seed: int) -> ModelStructure:
    """Return a keep of other widths in every block: some key/value heads, as many queries of each, some channels."""
    rng = np.random.default_rng(seed)

    def some(size: int, count: int) -> list[int]:
        return sorted(rng.permutation(size)[:count].tolist())

    blocks = []
    for block in anatomy.blocks:
        kv = some(block.kv_heads, int(rng.integers(1, block.kv_heads + 1)))
        each = int(rng.integers(1, block.group + 1))
        q = [head * block.group + i for head in kv for i in some(block.group, each)]
        blocks.append(
            BlockStructure(tuple(q), tuple(kv), tuple(some(block.channels, int(rng.integers(3, block.channels)))))
        )
    return ModelStructure(tuple(blocks))


def random_adapter(anatomy: BlockLayout, seed: int = 1, rank: int = 3) -> Adapter:
    rng = np.random.default_rng(seed)
    return {
        name: Factors(
            a=rng.normal(size=(rank, n)).astype(np.float32),
            b=(0.1 * rng.normal(size=(m, rank))).astype(np.float32),
        )
        for name, (m, n) in zip(anatomy.sides, linear_shapes(anatomy), strict=True)
    }


def logits(model: Any, ids: torch.Tensor = IDS, mask: torch.Tensor | None = MASK) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits
    return result


def snapshot(model: Any) -> dict[str, Any]:
    """Return everything that surgery touches: parameters by identity, and every plain attribute of every module."""
    found: dict[str, Any] = {name: id(parameter) for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str)}
        found |= {f"{name}:{key}": value for key, value in plain.items()}
        found[f"{name}:hooks"] = len(module._forward_pre_hooks)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_the_anatomy_is_that_of_the_config(name: str) -> None:
    model = model_of(name)
    anatomy = layout_of(model)
    kv = 2 if name in ("llama-gqa", "mistral", "qwen2", "qwen3") else 4
    prefix = {"gpt2": "transformer.h", "bert": "bert.encoder.layer", "roberta": "roberta.encoder.layer"}
    start = prefix.get(name, "model.layers")
    assert anatomy.family == name.partition("-")[0]
    assert anatomy.width == 32
    size = 16 if name == "qwen3" else 8
    assert anatomy.blocks == tuple(Block(f"{start}.{i}", 4, kv, size, 24) for i in range(3))
    assert set(anatomy.sides) <= {name for name, _ in model.named_modules()}


def test_a_bare_model_has_blocks_without_a_prefix() -> None:
    assert layout_of(BertModel(BertConfig(**BERT))).blocks[1].prefix == "encoder.layer.1"


def test_other_models_are_refused_by_name() -> None:
    fused = Phi3ForCausalLM(Phi3Config(**{**GQA, "num_key_value_heads": 4}))
    with pytest.raises(ConfigError, match=r"pruning: expected a model of type llama, .* got 'phi3'"):
        layout_of(fused)
    encoder_decoder = T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=8, d_ff=8, num_layers=1, num_heads=1))
    with pytest.raises(ConfigError, match="'t5'"):
        layout_of(encoder_decoder)
    crossed = BertModel(BertConfig(**BERT, is_decoder=True, add_cross_attention=True))
    with pytest.raises(ConfigError, match="cross attention"):
        layout_of(crossed)
    model = build("llama-gqa")
    model.config.quantization_config = {"load_in_4bit": True}
    with pytest.raises(ConfigError, match="quantised before"):
        layout_of(model)
    del model.config.quantization_config
    model.model.layers[1].mlp.up_proj = type("Linear4bit", (torch.nn.Linear,), {})(32, 24)
    with pytest.raises(ConfigError, match=r"whose model\.layers\.1\.mlp\.up_proj is Linear4bit"):
        layout_of(model)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_codes_have_the_blocks_of_their_weights_and_are_not_pruned(name: str) -> None:
    """Planners read the blocks; taking columns out of codes is refused before anything is changed."""
    model = build(name)
    anatomy = layout_of(model)
    quantise_layers(model, quantisable(model), "nf4")
    assert layout_of(model) == anatomy
    codes = codes_digest(model)
    expected = r"pruning: expected .*plain linear layers.*; got .*whose .* is quantised: its columns share scales"
    with pytest.raises(ConfigError, match=expected), with_structure(model, random_keep(anatomy, 3), anatomy):
        pass
    assert codes_digest(model) == codes
    with pytest.raises(ClientError, match=r"got .*is quantised.*; let the planner choose fewer blocks"):
        halves_of(model)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=5, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_pruned_model_says_what_the_gated_one_says(name: str, attention: str, seed: int) -> None:
    model = model_of(name, attention)
    anatomy = layout_of(model)
    keep = random_keep(anatomy, seed)
    with torch.inference_mode():
        with with_gates(model, keep, anatomy):
            expected = logits(model)
        with with_structure(model, keep, anatomy):
            found = logits(model)
        assert (logits(model) - expected).abs().max() > 1e-3  # the gates do something
    torch.testing.assert_close(
        found[MASK.bool()] if found.dim() == 3 else found,
        expected[MASK.bool()] if found.dim() == 3 else expected,
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_of_the_factors_are_those_of_the_gated_model_at_what_is_kept(name: str, attention: str) -> None:
    model = model_of(name, attention)
    anatomy = layout_of(model)
    keep, cut = random_keep(anatomy, 3), cuts(random_keep(anatomy, 3), anatomy)
    base, frozen, local = base_of(model, anatomy), random_adapter(anatomy, 5), random_adapter(anatomy)

    def gradients(base: Base) -> dict[str, torch.Tensor]:
        logits(base.model).square().sum().backward()
        found = layers(base.model).items()
        return {f"{key}.{side}": getattr(layer, side).grad.clone() for key, layer in found for side in "ab"}

    with with_adapters(base, frozen=frozen, local=local, scale=0.5), with_gates(model, keep, anatomy):
        full = gradients(base)
    with with_structure(model, keep, anatomy):
        small = replace(base, modules=shapes(base.modules, cut))
        with with_adapters(small, frozen=slice_adapter(frozen, cut), local=slice_adapter(local, cut), scale=0.5):
            found = gradients(small)
    for key, gradient in found.items():
        at = cut[key[:-2]]
        index = at.into if key.endswith("a") else at.out
        axis = 1 if key.endswith("a") else 0
        everything = full[key]
        kept = everything if index is None else everything.index_select(axis, torch.from_numpy(index))
        scale = float(everything.abs().max())
        torch.testing.assert_close(gradient, kept, atol=1e-5 * max(scale, 1.0), rtol=1e-4)
        if index is not None:  # nothing flows past a gate
            assert everything.abs().sum() == pytest.approx(float(kept.abs().sum()), rel=1e-4)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_generation_is_the_same_with_and_without_a_cache(name: str, attention: str) -> None:
    model = model_of(name, attention)
    anatomy = layout_of(model)
    keep = random_keep(anatomy, 11)
    options = {"max_new_tokens": 10, "do_sample": False, "attention_mask": MASK[:1], "pad_token_id": 0}
    with with_structure(model, keep, anatomy), torch.inference_mode():
        cached = model.generate(IDS[:1], use_cache=True, **options)
        plain = model.generate(IDS[:1], use_cache=False, **options)
        out = model(IDS[:1], use_cache=True)
    with with_gates(model, keep, anatomy), torch.inference_mode():
        full = model.generate(IDS[:1], use_cache=True, **options)
    assert torch.equal(cached, plain)
    assert torch.equal(cached, full)
    stored = out.past_key_values if hasattr(out, "past_key_values") else out.cache
    assert [layer.keys.shape[1] for layer in stored.layers] == [len(kept.kv) for kept in keep.blocks]


def test_a_static_cache_is_refused() -> None:
    model = model_of("llama-gqa")
    anatomy = layout_of(model)
    with with_structure(model, random_keep(anatomy, 1), anatomy), pytest.raises(ConfigError, match="dynamic cache"):
        model.generate(IDS[:1], max_new_tokens=2, do_sample=False, cache_implementation="static", disable_compile=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_is_exactly_what_it_was_afterwards(name: str) -> None:
    model = build(name)
    anatomy = layout_of(model)
    before, values = snapshot(model), {key: value.clone() for key, value in model.state_dict().items()}
    keep = random_keep(anatomy, 2)
    cut = cuts(keep, anatomy)
    for fails in (False, True):
        with pytest.raises(RuntimeError) if fails else nullcontext(), with_structure(model, keep, anatomy):
            assert snapshot(model) != before
            found = {name: tuple(model.get_submodule(name).weight.shape) for name in cut}
            wanted = shapes(base_of(model, anatomy).modules, cut)
            assert found == {key: shape[::-1] if name == "gpt2" else shape for key, shape in wanted.items()}
            assert all(model.get_submodule(name).weight.is_contiguous() for name in cut)
            base = replace(base_of(model, anatomy), modules=wanted)
            with with_adapters(base, local=slice_adapter(random_adapter(anatomy), cut)):
                logits(model).sum().backward()
                if fails:
                    raise RuntimeError
        assert snapshot(model) == before
        assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())


def test_what_keeps_everything_is_not_copied() -> None:
    model = model_of("qwen2")
    anatomy = layout_of(model)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    with with_structure(model, full_block(anatomy), anatomy):
        assert {name: id(parameter) for name, parameter in model.named_parameters()} == before


def test_nothing_outside_of_the_blocks_is_touched() -> None:
    model = model_of("llama-gqa")
    anatomy = layout_of(model)
    outside = {name for name, _ in model.named_parameters() if name.rpartition(".")[0] not in anatomy.sides}
    before = {name: id(parameter) for name, parameter in model.named_parameters() if name in outside}
    with with_structure(model, random_keep(anatomy, 4), anatomy):
        assert {name: id(parameter) for name, parameter in model.named_parameters() if name in outside} == before
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_model_that_is_not_whole_is_refused() -> None:
    model = model_of("llama-gqa")
    anatomy = layout_of(model)
    keep = random_keep(anatomy, 6)
    with (
        with_structure(model, keep, anatomy),
        pytest.raises(ShapeError, match="as in the base"),
        with_structure(model, keep, anatomy),
    ):
        pass
    base = base_of(model, anatomy)
    with (
        with_adapters(base, local=random_adapter(anatomy)),
        pytest.raises(ShapeError, match="got a LoraLayer"),
        with_structure(model, keep, anatomy),
    ):
        pass
    with (
        pytest.raises(ShapeError, match=r"model\.layers\.0, q"),
        with_structure(model, ModelStructure((BlockStructure((0, 9), (0,), (1,)),) * 3), anatomy),
    ):
        pass


def test_columns_by_hand() -> None:
    """Heads 1 and 3 of four heads of two: columns 2, 3, 6, 7 of each of the three parts of GPT-2's c_attn."""
    model = build("gpt2")
    block = replace(layout_of(model).blocks[0], channels=24)
    anatomy = layout_of(model)
    keep = ModelStructure((BlockStructure((1, 3), (1, 3), (0, 5)), *full_block(anatomy).blocks[1:]))
    weight = model.transformer.h[0].attn.c_attn.weight
    columns = [a * 8 + b + part for part in (0, 32, 64) for a in (1, 3) for b in range(8)]
    with with_structure(model, keep, anatomy):
        attention = model.transformer.h[0].attn
        assert torch.equal(attention.c_attn.weight, weight[:, columns])
        assert (attention.num_heads, attention.split_size, attention.embed_dim) == (2, 16, 16)
        assert (attention.c_attn.nf, attention.c_proj.nx, attention.c_proj.nf) == (48, 16, 32)
        assert attention.scaling == block.head_dim**-0.5


def stage(seed: int, anatomy: BlockLayout) -> tuple[ModelStructure, ModelStructure]:
    """Return a keep and a part of it."""
    before = random_keep(anatomy, seed)
    inner = []
    for kept in before.blocks:
        group = len(kept.q) // len(kept.kv)
        kv = kept.kv[::2]
        at = [kept.kv.index(head) * group + i for head in kv for i in range(max(1, group - 1))]
        inner.append(BlockStructure(tuple(kept.q[i] for i in at), kv, kept.ff[::2]))
    return before, ModelStructure(tuple(inner))


@pytest.mark.parametrize("name", ["llama-mha", "qwen2", "qwen3", "gpt2", "bert"])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_moments_after_a_cut_are_those_of_the_gated_run(name: str, kind: str) -> None:
    """Two steps, a cut, two steps: the small model against the full one with gates that close after two steps."""
    model = model_of(name)
    anatomy = layout_of(model)
    first, second = stage(8, anatomy)
    one, two = cuts(first, anatomy), cuts(second, anatomy)
    base, frozen, local = base_of(model, anatomy), random_adapter(anatomy, 5), random_adapter(anatomy)

    def optimizer_of(base: Base) -> torch.optim.Optimizer:
        parameters = [parameter for parameter in base.model.parameters() if parameter.requires_grad]
        if kind == "sgd":
            return torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)
        return torch.optim.AdamW(parameters, lr=1e-3, eps=1e-2)

    def step(base: Base, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        loss = logits(base.model).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss  # with its graph, which holds on to the parameters before the cut

    def state(base: Base, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        found = {}
        for key, layer in layers(base.model).items():
            for side in "AB":
                parameter = getattr(layer, side.lower())
                entries = {k: v for k, v in optimizer.state[parameter].items() if isinstance(v, torch.Tensor)}
                for entry, value in {"value": parameter.detach(), **entries}.items():
                    found[f"{key}.{side}.{entry}"] = value.clone()
        return found

    with with_adapters(base, frozen=frozen, local=local):
        optimizer = optimizer_of(base)
        with with_gates(model, first, anatomy):
            step(base, optimizer), step(base, optimizer)
        with with_gates(model, second, anatomy):
            halfway = state(base, optimizer)
            step(base, optimizer), step(base, optimizer)
        end = state(base, optimizer)

    def at_kept(states: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {}
        for key, value in states.items():
            module, side, _ = key.rsplit(".", 2)
            index, axis = (two[module].into, 1) if side == "A" else (two[module].out, 0)
            small = index is None or value.dim() == 0
            found[key] = value if small else value.index_select(axis, torch.from_numpy(index))
        return found

    before = snapshot(model)
    with with_structure(model, first, anatomy):
        small = replace(base, modules=shapes(base.modules, one))
        with with_adapters(small, frozen=slice_adapter(frozen, one), local=slice_adapter(local, one)):
            optimizer = optimizer_of(small)
            losses = [step(small, optimizer), step(small, optimizer)]
            parameters = shrink_further(model, optimizer, first, second, anatomy)
            assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
            assert set(optimizer.state) == set(parameters)
            found = state(small, optimizer)
            for key, value in at_kept(halfway).items():
                torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-3)
            losses += [step(small, optimizer), step(small, optimizer)]
            found = state(small, optimizer)
            for key, value in at_kept(end).items():
                torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-3)
            for layer in layers(model).values():
                assert (layer.out_features, layer.in_features) == (layer.b.shape[0], layer.a.shape[1])
    assert snapshot(model) == before


def test_a_cut_that_would_grow_something_back_is_refused() -> None:
    model = model_of("llama-mha")
    anatomy = layout_of(model)
    first, second = stage(8, anatomy)
    base = base_of(model, anatomy)
    with with_structure(model, second, anatomy):
        small = replace(base, modules=shapes(base.modules, cuts(second, anatomy)))
        with with_adapters(small, local=slice_adapter(random_adapter(anatomy), cuts(second, anatomy))):
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
            with pytest.raises(ShapeError, match="kept before"):
                shrink_further(model, optimizer, second, first, anatomy)
            with pytest.raises(ShapeError, match="as the structure before has it"):
                shrink_further(model, optimizer, first, second, anatomy)
            logits(model).sum().backward()


def test_a_gate_on_the_layer_beneath_an_adapter_would_leak() -> None:
    """Planted: the hook on the layer beneath hides nothing from the adapter's branch."""
    model = model_of("llama-mha")
    anatomy = layout_of(model)
    name, value = readers(anatomy, "q")[0], torch.tensor([1.0, 0.0, 1.0, 0.0])
    with with_adapters(base_of(model, anatomy), local=random_adapter(anatomy)):
        with gates(model, {name: value}):
            right = logits(model)
        with gates(model, {f"{name}.base_layer": value}):
            wrong = logits(model)
    assert (right - wrong).abs().max() > 1e-3


def test_attributes_alone_can_be_written() -> None:
    model = build("bert")
    anatomy = layout_of(model)
    fit(model, ModelStructure((BlockStructure((1,), (1,), (0,)),) * 3), anatomy)
    assert model.bert.encoder.layer[2].attention.self.all_head_size == 8


def test_a_real_model_is_pruned_as_it_is_gated(stories: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    anatomy = layout_of(model)
    keep = random_keep(anatomy, 1)
    ids = torch.arange(5, 45)[None]
    with torch.inference_mode():
        with with_gates(model, keep, anatomy):
            expected = logits(model, ids, None)
        with with_structure(model, keep, anatomy):
            torch.testing.assert_close(logits(model, ids, None), expected, atol=1e-5, rtol=1e-5)
