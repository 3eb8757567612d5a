from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from fedtune.errors import ClientError
from fedtune.lora.adapter import Adapter
from fedtune.model.lora import layers, with_adapters
from fedtune.model.selective_backward import Segments, Windows, halves_of, segments, with_selective_backward
from fedtune.model.surgery import layout_of, shrink_further, with_structure
from fedtune.model.train import activation_checkpointing, only_adapters_train
from fedtune.pruning.structure import cuts, shapes, slice_adapter
from tests.model.test_surgery import (
    ATTENTION,
    CAUSAL,
    CONFIGS,
    GQA,
    IDS,
    MASK,
    base_of,
    build,
    model_of,
    random_adapter,
    random_keep,
    snapshot,
)

Gradients = dict[str, torch.Tensor]


@contextmanager
def attached(model: Any, *, only: str = "", frozen: bool = True, **options: Any) -> Iterator[Any]:
    """Attach random adapters, frozen ones too, in the model's own number format; `only`: to modules with this name."""
    layout = layout_of(model)
    local: Adapter = {name: f for name, f in random_adapter(layout).items() if only in name}
    change = random_adapter(layout, 5) if frozen else None
    with with_adapters(base_of(model, layout), frozen=change, local=local, scale=0.5, **options):
        dtype = next(model.parameters()).dtype
        for layer in layers(model).values():
            layer.a.data, layer.b.data = layer.a.data.to(dtype), layer.b.data.to(dtype)
            layer.frozen = tuple(matrix.to(dtype) for matrix in layer.frozen)
        yield model


def passes(model: Any) -> tuple[torch.Tensor, Gradients]:
    """Return a model's outputs, and the gradients of its adapters for a loss that depends on all of them."""
    model.zero_grad()
    options = {"use_cache": False} if hasattr(model, "lm_head") else {}
    outputs = model(input_ids=IDS, attention_mask=MASK, **options).logits
    outputs.square().sum().backward()
    named = layers(model).items()
    return outputs.detach(), {f"{k}.{s}": getattr(f, s).grad.clone() for k, f in named for s in "ab"}


class Constant(torch.autograd.Function):
    """The same numbers, of which those at 0 of a mask are constants."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(mask)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (mask,) = ctx.saved_tensors
        return gradient * mask, None


@contextmanager
def with_constants(model: Any, windows: Windows) -> Iterator[None]:
    """Do the same at the full cost: everything is computed and stored, and gradients end before o_proj, down_proj."""
    with ExitStack() as stack:
        for half in halves_of(model):
            block = half.block
            size = block.group * block.head_dim if half.part.heads else 1
            units = block.kv_heads if half.part.heads else block.channels
            mask = torch.zeros(units, size, dtype=torch.float64)
            for part in windows.of(half.name, units):
                mask[part.begin : part.end] = float(part.trained)
            mask = mask.flatten().to(next(model.parameters()).dtype)

            def constant(_: Any, args: Any, mask: torch.Tensor = mask) -> Any:
                return (Constant.apply(args[0], mask), *args[1:])  # type: ignore[no-untyped-call]

            stack.callback(half.sink.register_forward_pre_hook(constant).remove)
        yield


def largest(gradients: Gradients) -> float:
    return max(float(gradient.abs().max()) for gradient in gradients.values())


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_are_whole_and_gradients_those_with_constants_outside_of_the_windows(name: str, attention: str) -> None:
    model = build(name, attention).double()
    with attached(model):
        plain, full = passes(model)
        for step_windows in (Windows(0.5, 3), Windows(0.3, 5)):
            with with_selective_backward(model, step_windows):
                outputs, found = passes(model)
            with with_constants(model, step_windows):
                _, expected = passes(model)
            torch.testing.assert_close(outputs, plain, atol=1e-12, rtol=1e-12)
            for key, gradient in found.items():
                # Norms compute in 32 bits in some families, and are differentiated there.
                torch.testing.assert_close(gradient, expected[key], atol=1e-7 * largest(full), rtol=1e-7)
            assert largest({key: found[key] - full[key] for key in full}) > 0.01 * largest(full)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "bert"])
def test_in_32_bits_outputs_are_the_plain_ones_to_a_millionth(name: str) -> None:
    model = model_of(name)
    with attached(model):
        plain, _ = passes(model)
        with with_selective_backward(model, Windows(0.5, 3)):
            outputs, _ = passes(model)
        assert float((outputs - plain).abs().max()) <= 1e-6 * max(1.0, float(plain.abs().max()))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(size=st.integers(1, 40), data=st.data())
def test_segments_are_all_units_once_and_trained_ones_first(size: int, data: st.DataObject) -> None:
    begin, count = data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, size))
    chosen = segments(begin, count, size)
    units = [unit for part in chosen for unit in range(part.begin, part.end)]
    assert sorted(units) == list(range(size))
    trained = [unit for part in chosen if part.trained for unit in range(part.begin, part.end)]
    assert trained == [(begin + i) % size for i in range(count)]
    assert [part.trained for part in chosen] == sorted((part.trained for part in chosen), reverse=True)
    assert all(part.begin < part.end for part in chosen)


def test_windows_follow_from_key_step_and_block_and_favour_no_unit() -> None:
    def course(key: int, half: str = "h") -> list[Segments]:
        windows, found = Windows(0.75, key), []
        for _ in range(400):
            found.append(windows.of(half, 8))
            assert windows.of(half, 8) is found[-1]  # the same for all batches of a step
            windows.next_step()
        return found

    assert course(1) == course(1)
    assert course(1) != course(2)
    assert course(1) != course(1, "other")
    counts = Counter(u for step in course(1) for part in step if part.trained for u in range(part.begin, part.end))
    assert sum(counts.values()) == 400 * 2
    assert all(70 < counts[unit] < 130 for unit in range(8))


def test_windows_of_the_most_worth_stay_for_all_steps() -> None:
    windows = Windows(0.5, 1)
    windows.weigh("h", torch.tensor([3.0, 0.0, 0.0, 1.0]))
    windows.weigh("h", torch.tensor([0.0, 0.0, 0.0, 1.5]))
    expected = segments(3, 2, 4)  # units 3 and 0, around the end: 2.5 + 3
    for _ in range(3):
        assert windows.of("h", 4) == expected
        windows.weigh("h", torch.tensor([0.0, 99.0, 99.0, 0.0]))  # of a pass in between: too late
        windows.next_step()
    # A model that has become smaller has other units: there they are drawn again.
    drawn = set[int]()
    for _ in range(40):
        drawn.add(windows.of("h", 3)[0].begin)
        windows.next_step()
    assert drawn == {0, 1, 2}


@pytest.mark.parametrize("name", CONFIGS)
def test_units_are_weighed_by_what_they_add_to_the_outputs(name: str) -> None:
    model = model_of(name)
    windows, by_hand = Windows(0.5, 1), dict[str, torch.Tensor]()
    with attached(model):
        halves = {half.sink: half for half in halves_of(model)}

        def note(sink: Any, args: Any) -> None:
            if torch.is_grad_enabled():
                return
            half = halves[sink]
            block = half.block
            width = block.group * block.head_dim if half.part.heads else 1
            weight = sink.weight.T if name == "gpt2" else sink.weight
            worth = []
            for begin in range(0, args[0].shape[-1], width):
                columns = slice(begin, begin + width)
                per_column = args[0][..., columns].square().sum((0, 1)) * weight[:, columns].square().sum(0)
                worth.append(float(per_column.sum()))
            by_hand[half.name] = torch.tensor(worth)

        hooks = [sink.register_forward_pre_hook(note) for sink in halves]
        try:
            with with_selective_backward(model, windows):
                with torch.no_grad():
                    model(input_ids=IDS)
                passes(model)
                chosen = {half.name: half.segments(windows)[1] for half in halves.values()}
        finally:
            for hook in hooks:
                hook.remove()
    for half, parts in chosen.items():
        worth, count = by_hand[half], sum(part.end - part.begin for part in parts if part.trained)
        best = max(sum(float(worth[(begin + i) % len(worth)]) for i in range(count)) for begin in range(len(worth)))
        ours = sum(float(worth[part.begin : part.end].sum()) for part in parts if part.trained)
        assert ours == pytest.approx(best, rel=1e-4)


def test_at_least_one_head_and_channel_learns() -> None:
    assert [(part.end - part.begin, part.trained) for part in segments(0, 1, 2)] == [(1, True), (1, False)]
    for size in (1, 2, 3):
        assert sum(part.end - part.begin for part in Windows(0.875, 1).of("h", size) if part.trained) == 1


def llama(**changes: Any) -> Any:
    """Return a Llama whose blocks outweigh embeddings and norms."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 8, "num_key_value_heads": 8}
        model = LlamaForCausalLM(LlamaConfig(**{**GQA, **sizes, "num_hidden_layers": 2, **changes}))
    return model.requires_grad_(False).eval()


def flops(model: Any) -> tuple[int, int]:
    """Return the operations of matrix products and attention, (forward, backward)."""
    with FlopCounterMode(display=False) as forward:
        loss = model(input_ids=IDS, use_cache=False).logits.square().sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def stored_bytes(model: Any) -> int:
    """Return what a forward pass stores for the backward pass, each memory once and without the model's own."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    stored: dict[int, Any] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in own:
            stored[memory.data_ptr()] = memory  # held, so that no other memory gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(input_ids=IDS.repeat(4, 4), use_cache=False).logits.square().sum().backward()
    return sum(memory.nbytes() for memory in stored.values())


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_half_of_the_backward_products_and_of_what_they_need_is_saved(attention: str) -> None:
    model = llama(attn_implementation=attention)
    # Of q and v alone, as in the measurements of the documents.
    with attached(model, only="v_proj", frozen=False):
        (whole_forward, whole), whole_bytes = flops(model), stored_bytes(model)
        with with_selective_backward(model, Windows(0.5, 1)):
            (forward, half), half_bytes = flops(model), stored_bytes(model)
    assert forward == pytest.approx(whole_forward, rel=0.01)
    assert half / whole == pytest.approx(0.5, abs=0.06)  # the output layer's are not halved
    assert half_bytes < 0.7 * whole_bytes


def test_no_weight_is_copied() -> None:
    model = llama()
    with attached(model, frozen=False), with_selective_backward(model, Windows(0.5, 2)):
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        sizes = []

        def note(tensor: torch.Tensor) -> torch.Tensor:
            # (batch, time, ...) of activations; what has two axes is a weight, or a view of one.
            if tensor.dim() == 2 and tensor.untyped_storage().data_ptr() not in own and tensor.numel() > 2 * 8 * 64:
                sizes.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(input_ids=IDS, use_cache=False).logits.square().sum().backward()
    assert [shape for shape in sizes if shape[0] not in (IDS.numel(),)] == []


def test_blocks_that_no_backward_pass_reaches_are_not_split() -> None:
    model = llama()
    with attached(model, only="layers.1", frozen=False), with_selective_backward(model, Windows(0.5, 1)):
        reached = {half.name for half in halves_of(model) if half.learns(torch.zeros(1, 1, 64))}
        assert reached == {"model.layers.1.self_attn", "model.layers.1.mlp"}
        assert all(half.learns(torch.zeros(1, 1, 64, requires_grad=True)) for half in halves_of(model))
        _, found = passes(model)
    assert found
    assert all("layers.1" in key for key in found)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "bert"])
def test_activations_computed_again_give_the_same_gradients(name: str) -> None:
    model = build(name).double()
    with attached(model), with_selective_backward(model, Windows(0.5, 3)):
        _, expected = passes(model)
        only_adapters_train(model)
        with activation_checkpointing(model):
            _, found = passes(model)
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], atol=1e-9 * largest(expected), rtol=1e-9)


def test_dropout_draws_one_mask_for_all_segments() -> None:
    model = build("llama-gqa").double()
    with attached(model, only="_proj", dropout=0.3), torch.random.fork_rng():
        for name, layer in layers(model).items():
            # Sinks take their input in pieces, and draw a mask for each; the rest draws as the plain layers do.
            layer.training = not name.endswith(("o_proj", "down_proj"))
        torch.manual_seed(1)
        plain, _ = passes(model)
        with with_selective_backward(model, Windows(0.5, 3)):
            torch.manual_seed(1)
            outputs, _ = passes(model)
        torch.manual_seed(2)
        other, _ = passes(model)
    torch.testing.assert_close(outputs, plain, atol=1e-12, rtol=1e-12)
    assert (other - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "roberta"])
def test_under_autocast_products_are_of_16_bits_as_in_the_plain_model(name: str) -> None:
    model = build(name)
    with attached(model, half=True), torch.autocast("cpu", torch.bfloat16):
        plain, _ = passes(model)
        with with_selective_backward(model, Windows(0.5, 3)):
            outputs, _ = passes(model)
    assert outputs.dtype == plain.dtype
    assert float((outputs.float() - plain.float()).abs().max()) < 0.05 * float(plain.float().abs().max())


@pytest.mark.parametrize("name", CAUSAL)
def test_passes_without_gradients_or_with_a_cache_are_the_plain_ones(name: str) -> None:
    model = model_of(name)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": MASK[:1], "pad_token_id": 0}
    with attached(model):
        with torch.no_grad():
            expected, written = model(input_ids=IDS).logits, model.generate(IDS[:1], **options)
        with with_selective_backward(model, Windows(0.5, 3)):
            with torch.no_grad():
                assert torch.equal(model(input_ids=IDS).logits, expected)
                assert torch.equal(model.generate(IDS[:1], **options), written)
            filled = model(input_ids=IDS, use_cache=True)
    torch.testing.assert_close(filled.logits, expected, atol=1e-5, rtol=1e-5)
    heads = layout_of(model).blocks[0].kv_heads
    stored = filled.past_key_values if hasattr(filled, "past_key_values") else filled.cache
    assert all(layer.keys.shape[1] == heads for layer in stored.layers)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_is_exactly_what_it_was_afterwards(name: str) -> None:
    model = build(name)
    before = snapshot(model)
    for fails in (False, True):
        with (
            pytest.raises(RuntimeError) if fails else nullcontext(),
            attached(model),
            with_selective_backward(model, Windows(0.5, 3)),
        ):
            passes(model)
            if fails:
                raise RuntimeError
        assert snapshot(model) == before
        assert not any("forward" in vars(module) for module in model.modules())


def test_a_forward_pass_that_a_module_has_of_its_own_is_called_and_comes_back() -> None:
    model = build("llama-gqa")
    mlp, called = model.model.layers[0].mlp, list[int]()
    usual = mlp.forward

    def own(x: torch.Tensor) -> torch.Tensor:
        called.append(1)
        output: torch.Tensor = usual(x)
        return output

    mlp.forward = own
    with with_selective_backward(model, Windows(0.5, 3)), torch.no_grad():
        model(input_ids=IDS)
    assert mlp.forward is own
    assert called == [1]


def test_a_model_that_is_pruned_in_stages_has_windows_of_what_is_left() -> None:
    model = build("llama-gqa").double()
    layout = layout_of(model)
    first = random_keep(layout, 12)
    blocks = [replace(b, ff=b.ff[: max(1, len(b.ff) // 2)]) for b in first.blocks]
    after = replace(first, blocks=tuple(blocks))
    cut = cuts(first, layout)
    with with_structure(model, first, layout):
        base = replace(base_of(model, layout), modules=shapes(base_of(model, layout).modules, cut))
        with with_adapters(base, local=slice_adapter(random_adapter(layout), cut), scale=0.5):
            for layer in layers(model).values():
                layer.a.data, layer.b.data = layer.a.data.double(), layer.b.data.double()
            windows = Windows(0.5, 3)
            with with_selective_backward(model, windows):
                optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
                passes(model)
                shrink_further(model, optimizer, first, after, layout)
                _, found = passes(model)
            with with_constants(model, windows):
                _, expected = passes(model)
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], atol=1e-7 * largest(expected), rtol=1e-7)
    assert found["model.layers.0.mlp.down_proj.a"].shape[1] == len(after.blocks[0].ff)


def test_models_that_are_no_sum_over_heads_are_refused_with_what_works() -> None:
    model = T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=8, d_ff=8, num_layers=1, num_heads=1))
    with (
        pytest.raises(ClientError, match=r"expected a model of type llama, .* got 't5'.*fewer blocks \(top\)"),
        with_selective_backward(model, Windows(0.5, 3)),
    ):
        pass
    assert not any("forward" in vars(module) for module in model.modules())
