from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    Qwen3Config,
)

from fedtune.devices.cost import PROXIES, Body, adapter_sides, llama_7b, roberta_base, sizes
from fedtune.devices.memory import CHUNK_BYTES, STORED, Footprint, change_bytes, memory
from fedtune.devices.profiles import PROFILES
from fedtune.model import fused_loss
from fedtune.model.batches import Batch
from fedtune.model.frozen import SLIGHT
from fedtune.model.lora_layer import LoraLayer, Trainable
from fedtune.model.loss import summed_loss
from fedtune.model.selective_backward import Windows, with_selective_backward
from fedtune.model.surgery import layout_of
from fedtune.model.targets import linear_shape
from fedtune.model.train import activation_checkpointing
from fedtune.pruning.ranking import PruningSettings
from fedtune.pruning.structure import FAMILIES
from tests.devices.live_bytes import LiveBytes

ROBERTA = roberta_base()
PRUNING = PruningSettings()
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VOCABULARY, RANK, BLOCKS = 600, 4, 4


def footprint(body: Body = ROBERTA, rank: float = 8, **more: Any) -> Footprint:
    usual: dict[str, Any] = {"rows": 32, "longest": 128.0}
    return Footprint(dict.fromkeys(body.modules, rank), **{**usual, **more})


def model_of(family: str, attention: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    same: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    wide = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 192, "num_hidden_layers": BLOCKS}
    config: Any = {
        "llama": lambda: LlamaConfig(**same, **wide, num_key_value_heads=2),
        "qwen3": lambda: Qwen3Config(**same, **wide, num_key_value_heads=2, head_dim=16),
        "gpt2": lambda: GPT2Config(**same, n_embd=64, n_head=4, n_inner=192, n_layer=BLOCKS),
        "bert": lambda: BertConfig(**same, **wide, num_labels=2),
    }[family]()
    kind = AutoModelForSequenceClassification if family == "bert" else AutoModelForCausalLM
    return kind.from_config(config, attn_implementation=attention).to(dtype).requires_grad_(False).eval()


def step_of(
    family: str,
    leaves: tuple[str, ...],
    *,
    rows: int = 4,
    length: int = 32,
    lowest: int = 0,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    **work: Any,
) -> tuple[float, float]:
    """Return (bytes counted, bytes predicted) of two steps, without weights, runtime and initial values."""
    model = model_of(family, attention, dtype)
    body = Body(
        replace(layout_of(model), outputs=VOCABULARY, number_bytes=dtype.itemsize),
        {
            name: shape
            for name, module in model.named_modules()
            if (shape := linear_shape(module)) and name.split(".")[-1] in leaves
        },
        parameters=sum(p.numel() for p in model.parameters()),
        classifies=family == "bert",
    )
    trained = [n for n in body.modules if any(n.startswith(f"{b.prefix}.") for b in body.layout.blocks[lowest:])]
    for name in trained:
        layer, (parent, _, leaf) = model.get_submodule(name), name.rpartition(".")
        m, n = body.modules[name]
        factors = Trainable(nn.Parameter(torch.randn(RANK, n)), nn.Parameter(torch.zeros(m, RANK)), 2.0, 0.1)
        wrapped = LoraLayer(layer, factors)
        wrapped.training = bool(work.get("dropout"))
        setattr(model.get_submodule(parent), leaf, wrapped)
    ids = torch.randint(1, VOCABULARY, (rows, length))
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0  # a batch of one length has no mask
    causal = not body.classifies
    labels = ids if causal else torch.zeros(rows, dtype=torch.int64)
    batch = Batch(ids, mask, labels, count=1, tokens=1, fused=causal and work.get("fused", True))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    twice = activation_checkpointing(model) if work.get("checkpointing") else nullcontext()
    part = with_selective_backward(model, Windows(work["back"], 1)) if work.get("back") else nullcontext()
    with LiveBytes([*model.parameters(), *model.buffers()]) as live, twice, part:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=bool(work.get("half"))):
                loss = summed_loss(model, batch, task="causal" if causal else "classification")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    needs = Footprint(
        dict.fromkeys(trained, float(RANK)),
        rows=rows,
        longest=length,
        device="cpu",
        heap=1.0,
        runtime=0.0,
        eager=attention == "eager",
        **work,
    )
    parts = memory(body, None, needs)
    return live.peak, parts.total - parts.adapters - body.parameters * dtype.itemsize


CASES: Mapping[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "queries and values": ("llama", ("q_proj", "v_proj"), {}),
    "all layers": ("llama", ALL, {}),
    "the upper half of the blocks": ("llama", ALL, {"lowest": 2}),
    "16 bits": ("llama", ALL, {"dtype": torch.bfloat16}),
    "autocast": ("llama", ALL, {"half": True, "rows": 16}),
    "dropout": ("llama", ALL, {"dropout": True}),
    "checkpointing": ("llama", ALL, {"checkpointing": True, "rows": 16}),
    "all logits": ("llama", ALL, {"fused": False}),
    "eager attention": ("llama", ALL, {"attention": "eager", "length": 96}),
    "a part of the backward pass": ("llama", ("q_proj", "v_proj"), {"back": 0.5}),
    "a part of the backward pass of all layers": ("llama", ALL, {"back": 0.5}),
    "a part of the backward pass in gpt2": ("gpt2", ("c_attn", "c_proj", "c_fc"), {"back": 0.5}),
    "a part of the backward pass in bert": ("bert", ("query", "value"), {"back": 0.5}),
    "norms of queries": ("qwen3", ALL, {}),
    "gpt2": ("gpt2", ("c_attn", "c_proj", "c_fc"), {}),
    "gpt2 with checkpointing": ("gpt2", ("c_attn",), {"checkpointing": True, "rows": 16}),
    "gpt2 in 16 bits": ("gpt2", ("c_attn",), {"dtype": torch.bfloat16}),
    "bert": ("bert", ("query", "value"), {}),
    "bert with checkpointing": ("bert", ("query", "value"), {"checkpointing": True, "rows": 16}),
    "bert in 16 bits": ("bert", ("query", "key", "value", "dense"), {"dtype": torch.bfloat16}),
    "bert under autocast": ("bert", ("query", "value"), {"half": True, "rows": 16}),
}


@pytest.mark.parametrize("case", CASES)
def test_prediction_lies_within_a_seventh_of_the_tensors_that_are_alive(case: str) -> None:
    family, leaves, more = CASES[case]
    counted, predicted = step_of(family, leaves, **more)
    assert predicted == pytest.approx(counted, rel=0.14)


def test_every_family_that_can_be_cut_has_its_counts() -> None:
    assert set(STORED) == set(FAMILIES)


def test_chunks_of_the_loss_and_slight_changes_are_those_of_the_model() -> None:
    cpu = fused_loss.CHUNK_BYTES
    assert {"cpu": cpu, "cuda": cpu * fused_loss.GPU_FACTOR} == CHUNK_BYTES
    body = Body(ROBERTA.layout, {"x": (1024, 1024)}, parameters=0)
    at = {
        rank: change_bytes(body, sizes(body.layout, None, 0.0), Footprint({}, 1, 1, global_rank=rank))
        for rank in (8, 9)
    }
    assert SLIGHT * 8 * 2048 == 1024 * 1024  # the largest rank that stays beside the weight
    assert at == {8: 2 * 4 * 8 * 2048, 9: 4 * 9 * 2048 + 4 * 1024 * 1024}


def test_parts_on_paper() -> None:
    """RoBERTa-base, rank 8 on all six layers of 12 blocks, 32 x 128 tokens: 4,096 tokens, 165,888 sides.

    A block stores per token, in numbers: 2 norms 1536, attention 4 x 768 + 12, mask 128, channels 3072, inputs of query
    768, intermediate 768 and output 3072 (that of attention's output is stored already), six times rank 8.
    """
    parts = memory(replace(ROBERTA, saved=0), None, footprint())
    trained = 8 * 165_888
    stored = 1536 + 3072 + 12 + 128 + 3072 + 768 + 768 + 3072 + 48
    assert parts.weights == 4 * 124_647_170
    assert (parts.adapters, parts.optimizer, parts.frozen_change) == (8 * trained, 12 * trained, 0)
    assert parts.logits == 32 * 2 * 12
    assert parts.activations == 4096 * 4 * (12 * stored + 2 * 3072 + 2 * 768) - parts.logits
    assert parts.total == sum(parts.by_part().values())


def test_the_copy_of_the_start_is_counted_where_fedprox_needs_one() -> None:
    plain, proximal = (memory(ROBERTA, None, footprint(start_copy=copy)).total for copy in (False, True))
    trained = 8 * adapter_sides(ROBERTA, sizes(ROBERTA.layout, None, 0.0)) + ROBERTA.saved
    assert proximal - plain == 4 * trained


def test_a_frozen_change_is_a_second_copy_of_what_is_adapted_in_32_bits_and_less_beside_16() -> None:
    whole = memory(ROBERTA, None, footprint(global_rank=64)).frozen_change
    assert whole == 4 * 84_934_656 + 4 * 64 * 165_888
    llama = llama_7b()
    # 64 (4096 + 11008) is too much for nothing, and far less than the product: as received, and on the device.
    assert memory(llama, None, footprint(llama, global_rank=64)).frozen_change == 2 * 4 * 64 * 32 * (
        8 * 4096 + 3 * 15104
    )


def test_a_seven_billion_model_fits_no_board_of_eight_gigabytes_and_an_agx_pruned_or_not() -> None:
    llama = llama_7b()
    needs = {
        p: memory(llama, PRUNING, footprint(llama, rows=1, longest=256.0, ratio=p)).total / 1e9 for p in (0.0, 0.5)
    }
    assert PROFILES["agx-xavier"].memory_gb > needs[0.0] > needs[0.5] > PROFILES["tx2"].memory_gb
    four = memory(llama, PRUNING, footprint(llama, rows=1, longest=256.0, base_dtype="nf4")).total / 1e9
    assert four < needs[0.0] / 2


def test_linear_weights_in_nf4_take_28_percent_of_their_16_bits() -> None:
    llama = llama_7b()
    linears = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    full, four = (memory(llama, None, footprint(llama, base_dtype=dtype)).weights for dtype in ("", "nf4"))
    one_layer = 2 * 4096 * 11008
    assert four == full - 2 * linears + 0.5625 * linears + one_layer


@settings(max_examples=12)
@given(
    ratio=st.sampled_from([0.0, 0.25, 0.5, 0.75]),
    name=st.sampled_from(["roberta-base", "llama-7b"]),
    device=st.sampled_from(["cpu", "cuda"]),
    rows=st.integers(1, 64),
)
def test_less_work_never_needs_more(ratio: float, name: str, device: Any, rows: int) -> None:
    body = PROXIES[name]()
    start = footprint(body, rows=rows, ratio=ratio, device=device, global_rank=16.0)
    need = memory(body, PRUNING, start).total
    upper = {n: r for n, r in start.ranks.items() if ".1." not in n and ".0." not in n}
    less: list[Callable[[Footprint], Footprint]] = [
        lambda work: replace(work, ratio=work.ratio + 0.125),
        lambda work: replace(work, ranks=upper),
        lambda work: replace(work, back=0.5),
        lambda work: replace(work, base_dtype="int8"),
        lambda work: replace(work, base_dtype="nf4"),
        lambda work: replace(work, checkpointing=True),
        lambda work: replace(work, ranks=dict.fromkeys(work.ranks, 4.0)),
        lambda work: replace(work, longest=64.0),
        lambda work: replace(work, forward_only=True),
    ]
    for change in less:
        assert memory(body, PRUNING, change(start)).total <= need
    assert memory(body, PRUNING, replace(start, rows=rows + 1)).total > need


def test_a_classifier_has_no_logits_per_token_and_packing_less_padding() -> None:
    causal = replace(ROBERTA, classifies=False, layout=replace(ROBERTA.layout, outputs=50_000))
    assert memory(causal, None, footprint()).total > memory(ROBERTA, None, footprint()).total
    padded, packed = (memory(causal, None, footprint(mean=40.0, packed=p)).activations for p in (False, True))
    assert packed == pytest.approx(padded * 12 / 32, rel=0.1)  # ceil(1.15 x 32 x 40 / 128) rows of 128


def test_logits_beyond_one_chunk_of_the_loss_take_no_memory() -> None:
    wide = replace(ROBERTA, classifies=False, layout=replace(ROBERTA.layout, outputs=128_256))
    few, many = (memory(wide, None, footprint(rows=rows)).logits for rows in (2, 64))
    assert few == 2 * 128 * (4 * 128_256 + 2 * 4 * 768)
    assert many == 2**28 + 64 * 128 * 2 * 4 * 768
