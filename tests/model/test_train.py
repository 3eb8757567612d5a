from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune.errors import ClientError
from fedtune.messages import Plan, Training, TrainLora
from fedtune.model import train as training_loop
from fedtune.model.base import Base, base_from_object, load_tokenizer
from fedtune.model.batches import collate
from fedtune.model.lora import layers, read_local, start, with_adapters
from fedtune.model.loss import summed_loss
from fedtune.model.pruned_training import block_layout
from fedtune.model.settings import AdapterSettings, ModelSettings
from fedtune.model.train import learning_rate, make_optimizer, peak_bytes, report_out_of_memory, train
from fedtune.probing.order import batches
from fedtune.pruning.depth import block_of, module_ranks
from tests.devices.live_bytes import LiveBytes

TRAINING = Training(batch=2, learning_rate=0.05, steps=6)


def run(base: Any, rows: Any, training: Training, *, key: int = 1, measured: Any = None, b: float = 0.0) -> Any:
    """Train a local adapter whose B starts at one value; losses are measured on the training rows, or on others."""
    plan = Plan("c", 4, 2.0, training)
    local = {
        name: replace(factors, b=factors.b + np.float32(b))
        for name, factors in start(TrainLora(a_key=5), plan, base.modules).items()
    }
    with with_adapters(base, local=local, scale=2.0, dropout=training.dropout) as model:
        trained = train(base, rows, training, key=key, client="c", rows=rows if measured is None else measured)
        return trained, read_local(model)


def test_training_lowers_the_loss_and_is_bit_equal_from_the_same_key(loaded: Any, examples: Any) -> None:
    base, rows = loaded(), examples(4)
    training = replace(TRAINING, steps=20, dropout=0.1)
    (first, one), (second, two), (_, other) = (run(base, rows, training, key=key) for key in (1, 1, 2))
    assert first.measured.loss_after < 0.9 * first.measured.loss_before
    assert first.losses == second.losses
    name = next(iter(one))
    np.testing.assert_array_equal(one[name].b, two[name].b)
    assert not np.array_equal(one[name].b, other[name].b)


def test_losses_before_and_after_are_the_models_own_on_the_rows(loaded: Any, examples: Any) -> None:
    base, rows, others = loaded(), examples(4), examples(5)

    def own() -> float:
        with torch.inference_mode():
            totals = [summed_loss(base.model, collate([row], base), task="causal").item() for row in others]
        return sum(totals) / sum(collate([row], base).count for row in others)

    before = own()  # B is zero: the model as received is the base
    plan = Plan("c", 4, 2.0, TRAINING)
    with with_adapters(base, local=start(TrainLora(a_key=5), plan, base.modules), scale=2.0):
        measured = train(base, rows, TRAINING, key=1, client="c", rows=others).measured
        after = own()
    assert measured.loss_before == pytest.approx(before, rel=1e-6)
    assert measured.loss_after == pytest.approx(after, rel=1e-6)
    assert abs(before - after) > 1e-3


@pytest.mark.parametrize("autocast", ["off", "bf16"])
def test_nothing_is_gained_where_nothing_is_learned(autocast: Any, loaded: Any, examples: Any) -> None:
    still = replace(TRAINING, learning_rate=1e-9, steps=10, dropout=0.5, autocast=autocast)
    trained, _ = run(loaded(), examples(12), still, b=0.05)
    assert trained.measured.loss_before == pytest.approx(trained.measured.loss_after, abs=1e-5)
    assert max(trained.losses) - min(trained.losses) > 0.05  # the losses of the steps, each on another batch


def test_measuring_changes_nothing_that_is_learned(loaded: Any, examples: Any) -> None:
    base, rows, training = loaded(), examples(4), replace(TRAINING, dropout=0.3)
    (silent, one), (loud, two) = (run(base, rows, training, measured=measured) for measured in ((), examples(7)))
    assert silent.losses == loud.losses
    for name in one:
        np.testing.assert_array_equal(one[name].b, two[name].b)
    assert (silent.measured.loss_before, silent.measured.loss_after) == (None, None)


def test_rows_of_which_nothing_counts_have_no_loss(loaded: Any, examples: Any) -> None:
    empty = [replace(row, labels=np.full_like(row.labels, -100)) for row in examples(2)]
    trained, _ = run(loaded(), examples(4), TRAINING, measured=empty)
    assert (trained.measured.loss_before, trained.measured.loss_after) == (None, None)


def test_accumulated_batches_make_the_step_of_the_joined_batch(loaded: Any, examples: Any) -> None:
    base, rows = loaded(), examples(4)
    _, joined = run(base, rows, replace(TRAINING, batch=4, steps=2))
    _, split = run(base, rows, replace(TRAINING, batch=1, accumulation=4, steps=2))
    for name in joined:
        np.testing.assert_allclose(joined[name].b, split[name].b, atol=1e-5)


def test_gradient_checkpointing_changes_no_result(loaded: Any, examples: Any) -> None:
    base, rows = loaded(), examples(4)
    _, plain = run(base, rows, TRAINING)
    _, checkpointed = run(base, rows, replace(TRAINING, gradient_checkpointing=True))
    for name in plain:
        np.testing.assert_allclose(plain[name].b, checkpointed[name].b, atol=1e-6)


def test_gradient_checkpointing_keeps_the_activations_of_one_block_alone(loaded: Any, examples: Any) -> None:
    base, rows, peaks = loaded(), examples(8), list[int]()
    for checkpointing in (False, True):
        with LiveBytes([*base.model.parameters(), *base.model.buffers()]) as live:
            run(base, rows, replace(TRAINING, batch=8, gradient_checkpointing=checkpointing))
        peaks.append(live.peak)
    assert peaks[1] < 0.8 * peaks[0]


def test_gradient_checkpointing_leaves_nothing_on_the_base_and_says_nothing(
    loaded: Any, examples: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    base = loaded()
    capfd.readouterr()
    run(base, examples(4), replace(TRAINING, gradient_checkpointing=True))
    assert not [name for name, module in base.model.named_modules() if module._forward_hooks]
    assert "".join(capfd.readouterr()) == ""


def test_sgd_and_bf16_autocast_train(loaded: Any, examples: Any) -> None:
    base, rows = loaded(), examples(4)
    trained, _ = run(base, rows, replace(TRAINING, optimizer="sgd", momentum=0.9, steps=20, autocast="bf16"))
    assert trained.measured.loss_after < trained.measured.loss_before


def test_a_gradient_above_the_bound_is_scaled_down_to_it(loaded: Any, examples: Any) -> None:
    base, rows = loaded(), examples(4)
    training = replace(TRAINING, optimizer="sgd", learning_rate=1.0, steps=1)

    def moved(clip_norm: float | None) -> float:
        plan = Plan("c", 4, 2.0, training)
        before = start(TrainLora(a_key=5), plan, base.modules)
        _, after = run(base, rows, replace(training, clip_norm=clip_norm))
        squares = [np.square(after[n].a - before[n].a).sum() + np.square(after[n].b - before[n].b).sum() for n in after]
        return float(np.sqrt(sum(squares)))

    free = moved(None)
    assert moved(free / 4) == pytest.approx(free / 4, rel=1e-3)
    assert moved(4 * free) == pytest.approx(free, rel=1e-6)


def test_a_classifier_trains_on_labels(loaded: Any, examples: Any) -> None:
    base = loaded("bert", targets=["query"], task="classification", labels=["a", "b"])
    rows = examples(6, classes=2)
    with torch.inference_mode():
        assert summed_loss(base.model, collate(rows, base), task="classification").item() > 0
    trained, _ = run(base, rows, replace(TRAINING, batch=6, steps=40))
    assert trained.measured.loss_after < trained.measured.loss_before


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("name", "targets"), [("bert", ["query"]), ("gpt2", ["c_attn"])])
def test_a_head_is_trained_in_float32_over_a_half_precision_base(
    dtype: str, name: str, targets: list[str], loaded: Any, examples: Any
) -> None:
    base = loaded(name, targets=targets, task="classification", labels=["a", "b"], dtype=dtype)
    before = base.saved_tensors()
    training = replace(TRAINING, learning_rate=1e-5)
    local = start(TrainLora(a_key=5), Plan("c", 4, 2.0, training), base.modules)
    with with_adapters(base, local=local, scale=2.0, saved=before):
        train(base, examples(8, classes=2), training, key=1, client="c")
        after = base.saved_tensors()
    assert {str(p.dtype) for p in base.model.parameters()} == {"torch.float32", f"torch.{dtype}"}
    for key, array in after.items():
        assert np.isfinite(array).all()
        assert np.mean(array != before[key]) > 0.99  # in 16 bits such steps are lost, or not a number


def test_tokens_are_counted_without_padding(loaded: Any, examples: Any) -> None:
    rows = examples(4)
    trained, _ = run(loaded(), rows, replace(TRAINING, batch=4, steps=2))
    assert trained.measured.tokens == 2 * sum(len(row.input_ids) for row in rows)


def test_a_loss_that_is_not_finite_names_client_step_and_remedy(loaded: Any, examples: Any) -> None:
    base = loaded()
    with torch.no_grad():
        base.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ClientError, match=r"c, before step 1: expected a finite loss; got nan .*learning_rate"):
        run(base, examples(4), TRAINING)
    with pytest.raises(ClientError, match=r"c, step 4: expected .* all but 3 steps.*got 4 .* loss nan"):
        run(base, examples(4), TRAINING, measured=())
    with pytest.raises(ClientError, match=r"c, step 2: expected .* in one at least; got 2 without.*learning_rate"):
        run(base, examples(4), replace(TRAINING, steps=2), measured=())


def poison(base: Any, row: Any) -> Any:
    """Return a row whose loss is not a number, and that of no other row."""
    with torch.no_grad():
        base.model.get_input_embeddings().weight[290] = float("nan")
    return replace(row, input_ids=np.where(np.arange(len(row.input_ids)) == 1, 290, row.input_ids))


@pytest.mark.parametrize("measured", [None, ()])
def test_a_step_that_is_not_finite_is_left_out_and_counted(measured: Any, loaded: Any, examples: Any) -> None:
    base, rows = loaded(), examples(6)
    training = replace(TRAINING, batch=1, steps=12)
    clean, _ = run(base, rows, training, measured=measured)
    rows[3] = poison(base, rows[3])
    trained, learned = run(base, rows, training, measured=measured)
    assert (clean.measured.skipped_steps, trained.measured.skipped_steps) == (0, 2)  # once in each of two passes
    assert (len(clean.losses), len(trained.losses)) == (12, 10)
    assert all(np.isfinite(factors.a).all() and np.isfinite(factors.b).all() for factors in learned.values())
    if measured is None:
        assert trained.measured.loss_after < trained.measured.loss_before


def test_a_step_that_is_left_out_changes_nothing_but_the_rate_and_the_data_of_the_next(
    loaded: Any, examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, rows, training = loaded(), examples(4), replace(TRAINING, steps=3, schedule="linear")
    backward, calls = training_loop.backward, list[int]()

    def overflowing(*args: Any) -> float:
        loss = backward(*args)
        calls.append(len(calls))
        if len(calls) == 2:  # the loss is finite, its gradient is not
            next(p for p in base.model.parameters() if p.grad is not None).grad[0, 0] = float("inf")
        return loss

    monkeypatch.setattr(training_loop, "backward", overflowing)
    trained, learned = run(base, rows, training)
    monkeypatch.undo()
    # The same steps by hand, the second left out.
    plan = Plan("c", 4, 2.0, training)
    with with_adapters(base, local=start(TrainLora(a_key=5), plan, base.modules), scale=2.0) as model:
        optimizer = make_optimizer(training, [p for p in model.parameters() if p.requires_grad])
        for step, places in enumerate(islice(batches(4, size=2, key=1), 3)):
            if step != 1:
                optimizer.param_groups[0]["lr"] = learning_rate(training, step, 3)
                backward(base, [collate([rows[i] for i in places], base)], training)
                torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
                optimizer.step()
                optimizer.zero_grad()
        expected = read_local(model)
    assert trained.measured.skipped_steps == 1
    for name, factors in expected.items():
        np.testing.assert_array_equal(learned[name].a, factors.a)
        np.testing.assert_array_equal(learned[name].b, factors.b)


def test_rows_that_overflow_before_training_are_not_measured_after_it(loaded: Any, examples: Any) -> None:
    base, rows = loaded(), examples(6)
    training = replace(TRAINING, learning_rate=1e-9)
    bad = [rows[0], poison(base, rows[1]), *rows[2:]]
    found = run(base, rows, training, measured=bad)[0].measured
    expected = run(base, rows, training, measured=rows[2:])[0].measured  # batches of two: the first is left out
    assert found.loss_before == expected.loss_before
    assert found.loss_after == pytest.approx(found.loss_before, abs=1e-5)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8000000000 bytes"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
    ],
)
def test_memory_that_runs_out_costs_the_client_alone_on_every_device(
    error: Exception, loaded: Any, examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr("fedtune.model.train.summed_loss", full)
    with (
        pytest.raises(ClientError, match=r"c: expected its batch of 2 to fit; memory ran out"),
        report_out_of_memory("c", TRAINING.batch),
    ):
        run(loaded(), examples(4), TRAINING)


def test_any_other_error_of_torch_is_not_called_one_of_memory(
    loaded: Any, examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("fedtune.model.train.summed_loss", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(loaded(), examples(4), TRAINING)


def test_peak_memory_is_in_bytes_on_macos_too(monkeypatch: pytest.MonkeyPatch) -> None:
    linux = peak_bytes(torch.device("cpu"))
    monkeypatch.setattr("sys.platform", "darwin")  # where getrusage counts bytes, not KiB
    assert peak_bytes(torch.device("cpu")) < linux / 512


def test_a_client_without_examples_is_an_error_that_names_it(loaded: Any) -> None:
    with pytest.raises(ClientError, match="c: expected at least one training example"):
        run(loaded(), [], TRAINING)


def test_the_schedule_by_hand() -> None:
    linear = replace(TRAINING, learning_rate=1.0, schedule="linear", warmup=0.2)
    assert [round(learning_rate(linear, step, 10), 4) for step in (0, 1, 2, 6, 9)] == [0.5, 1.0, 1.0, 0.5, 0.125]
    cosine = replace(TRAINING, learning_rate=1.0, schedule="cosine")
    assert [round(learning_rate(cosine, step, 10), 4) for step in (0, 5)] == [1.0, 0.5]
    assert learning_rate(replace(TRAINING, learning_rate=0.3), 7, 10) == 0.3


def test_the_frozen_bases_own_dropout_is_off(loaded: Any, examples: Any) -> None:
    base, rows = loaded("gpt2", targets=["c_attn"]), examples(4)  # GPT-2's configuration asks for dropout of 0.1
    assert base.model.config.resid_pdrop > 0
    first = {key: run(base, rows, replace(TRAINING, batch=4, steps=1), key=key)[0].losses[0] for key in (1, 2, 3)}
    assert len({round(loss, 5) for loss in first.values()}) == 1


def test_the_adapters_dropout_is_on(loaded: Any, examples: Any) -> None:
    base, rows = loaded(), examples(4)
    ends = [run(base, rows, replace(TRAINING, batch=4, steps=3, dropout=d), key=1)[0].losses[-1] for d in (0.0, 0.5)]
    assert ends[0] != ends[1]


@pytest.mark.parametrize(("name", "targets"), [("llama", ["q_proj", "v_proj"]), ("gpt2", ["c_attn"])])
def test_packed_batches_train_as_unpacked_ones_do(name: str, targets: Any, loaded: Any, examples: Any) -> None:
    base, rows = loaded(name, targets=targets), examples(8)
    training = replace(TRAINING, batch=4, steps=4, learning_rate=0.01)
    plain, alone = run(base, rows, training, b=0.03)
    packed, together = run(base, rows, replace(training, packing=True), b=0.03)
    assert packed.losses == pytest.approx(plain.losses, abs=1e-5)
    assert packed.measured.loss_before == pytest.approx(plain.measured.loss_before, abs=1e-5)
    assert packed.measured.loss_after == pytest.approx(plain.measured.loss_after, abs=1e-5)
    assert packed.measured.tokens == plain.measured.tokens
    for module, factors in alone.items():
        np.testing.assert_allclose(together[module].b, factors.b, atol=2e-4)  # AdamW divides by small gradients
    widths = {True: 0, False: 0}
    for way in widths:
        widths[way] = collate(rows, base, packed=way).input_ids.numel()
    assert widths[True] < 0.8 * widths[False]


def test_a_packed_example_sees_no_other(loaded: Any, examples: Any) -> None:
    base, rows = loaded(), examples(4)
    batch = collate(rows, base, packed=True)
    row, other = batch.input_ids[1].clone(), batch.input_ids.clone()
    assert batch.positions is not None
    second = int((batch.positions[1] == 0).nonzero()[1])
    other[1, :second] = (row[:second] + 7) % 200
    with torch.no_grad():
        logits = [
            base.model(input_ids=ids, position_ids=batch.positions, use_cache=False).logits
            for ids in (batch.input_ids, other)
        ]
    torch.testing.assert_close(logits[0][1, second:], logits[1][1, second:], atol=1e-5, rtol=0)
    assert not torch.allclose(logits[0][1, :second], logits[1][1, :second], atol=1e-2)


def deep_base(checkpoints: dict[str, Path], blocks: int = 8) -> Base:
    """Return a Llama of eight blocks, wide enough that activations are most of what a backward pass keeps."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = LlamaConfig(vocab_size=320, num_hidden_layers=blocks, max_position_embeddings=64, pad_token_id=0, **sizes)
    tokenizer = load_tokenizer(ModelSettings(base=str(checkpoints["llama"])), Path())
    settings, adapter = ModelSettings(base="none", dtype="auto"), AdapterSettings(rank=4, targets=["q_proj", "v_proj"])
    return base_from_object(settings, adapter, (LlamaForCausalLM(config), tokenizer))


def kept_bytes(base: Base, rows: Any, ranks: tuple[int, ...], *, checkpointing: bool = False) -> tuple[int, set[str]]:
    """Return the bytes that a backward pass keeps beside parameters, and the modules that got a gradient."""
    training = replace(TRAINING, batch=4, gradient_checkpointing=checkpointing)
    local = start(TrainLora(a_key=5), Plan("c", 4, 2.0, training, ranks=ranks), base.modules)
    local = {name: replace(factors, b=factors.b + np.float32(0.01)) for name, factors in local.items()}
    with with_adapters(base, local=local, scale=2.0) as model, training_loop.training_mode(base, training):
        batch = collate(rows, base)
        with LiveBytes([*model.parameters(), *model.buffers()]) as live:
            loss = summed_loss(model, batch, task="causal")
            kept = live.now
        loss.backward()
        reached = {name for name, layer in layers(model).items() if layer.a.grad is not None}
        below = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
        assert len(below) == 2 * len(reached)
    return kept, reached


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_backward_pass_stops_at_the_lowest_block_that_is_trained(
    checkpoints: dict[str, Path], examples: Any, checkpointing: bool
) -> None:
    """Of eight blocks with adapters from 0, 4 and 6 on: 285, 147 and 78 MB on a larger model, by their ratios."""
    base, rows = deep_base(checkpoints), examples(4)
    layout = block_layout(base)
    kept = {}
    for top in (1.0, 0.5, 0.25):
        ranks = module_ranks(base.modules, layout, 4, top)
        kept[top], reached = kept_bytes(base, rows, ranks, checkpointing=checkpointing)
        assert reached == {name for name in base.modules if block_of(name, layout) in range(8)[-round(8 * top) :]}
    if not checkpointing:
        assert kept[0.5] / kept[1.0] == pytest.approx(147 / 285, rel=0.15)
        assert kept[0.25] / kept[1.0] == pytest.approx(78 / 285, rel=0.15)
    # Checkpoints keep the input of each block that it goes through. A hook that asks for the gradient of the
    # embeddings, as transformers has one, would send it through all of them.
    else:
        assert 6 * (kept[1.0] - kept[0.5]) == 4 * (kept[1.0] - kept[0.25]) > 0
