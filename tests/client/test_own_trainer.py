from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.client.own_trainer import OwnTrainer, TrainingData, TrainingOrder
from fedtune.client.perform import perform
from fedtune.data.encode import Example
from fedtune.errors import ClientError
from fedtune.lora.adapter import Adapter, draw_a, unpack
from fedtune.messages import (
    Assignment,
    Plan,
    Preference,
    ProbeSeeds,
    Proximal,
    Pruning,
    SeedState,
    TailRank,
    Training,
    TrainLora,
)
from fedtune.model.base import Base, digest
from fedtune.model.batches import collate
from fedtune.model.peft_model import lora_layers, write_factors
from fedtune.model.train import learning_rate
from fedtune.pruning.ranking import PruningSettings
from fedtune.tensors import Tensors
from tests.model.conftest import Loader

# PEFT reads names of transformers that are to go.
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")

TRAINING = Training(batch=2, learning_rate=0.05, steps=3)
Q = "model.layers.0.self_attn.q_proj"  # (32, 32)
Examples = Callable[[int], list[Example]]


@pytest.fixture
def base(loaded: Loader) -> Base:
    return loaded("llama")


@pytest.fixture
def rows(examples: Examples) -> list[Example]:
    return examples(6)


def order(
    base: Base, *, blobs: Mapping[str, Tensors] | None = None, plan: Plan | None = None, **task: Any
) -> Assignment:
    return Assignment(
        method="flora",
        round=2,
        seed=11,
        plan=plan or Plan(client="ann", rank=4, scale=2.0, training=TRAINING),
        task=TrainLora(a_key=5, **{"wire_dtype": "fp32", **task}, blobs=blobs or {}),
        base=base.digest,
    )


def run(base: Base, rows: list[Example], asked: Assignment, function: Any, **options: Any) -> Any:
    return perform(base, rows, asked, threads=1, own=OwnTrainer(function, **options))


def sgd(model: Any, data: TrainingData, asked: TrainingOrder, *, rate: float = 0.1) -> None:
    """Train as a user's own loop does, without anything of fedtune."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    rows = data.dataset().with_format("torch")
    for step in range(asked.steps):
        row = rows[step % len(rows)]
        model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def still(model: Any, data: TrainingData, asked: TrainingOrder) -> None:
    """Train nothing."""


def test_a_loop_of_the_users_own_trains_an_adapter_of_the_asked_rank(base: Base, rows: list[Example]) -> None:
    seen: list[TrainingOrder] = []

    def train(model: Any, data: TrainingData, asked: TrainingOrder) -> None:
        seen.append(asked)
        assert type(model).__module__.startswith("peft")
        assert data.tokenizer is base.tokenizer
        assert len(data.examples) == 6
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        sgd(model, data, asked)

    update = run(base, rows, order(base), train)
    assert (seen[0].client, seen[0].round, seen[0].rank, seen[0].steps, seen[0].batch) == ("ann", 2, 4, 3, 2)
    assert {name: array.shape for name, array in update.lora.tensors.items()} == {
        f"{name}.{side}": (4, size[1]) if side == "a" else (size[0], 4)
        for name, size in base.modules.items()
        for side in "ab"
    }
    assert update.measured.loss_after < update.measured.loss_before
    assert update.measured.tokens == sum(len(row.input_ids) for row in rows[:3])
    assert update.measured.seconds > 0
    assert update.measured.peak_bytes > 0
    assert update.num_examples == 6


def test_the_base_is_afterwards_as_before(base: Base, rows: list[Example]) -> None:
    def untidy(model: Any, data: TrainingData, asked: TrainingOrder) -> None:
        inner = model.get_base_model()
        inner.config.use_cache = False
        getattr(inner, "activation_checkpointing_enable", inner.gradient_checkpointing_enable)()
        inner.enable_input_require_grads()
        inner.forward = partial(type(inner).forward, inner)
        model.register_forward_hook(lambda *_: None)
        model.train()
        sgd(model, data, asked)

    modules = dict(base.model.named_modules())
    use_cache, kinds = base.model.config.use_cache, {name: type(one) for name, one in modules.items()}
    first = perform(base, rows, order(base), threads=1)
    run(base, rows, order(base), untidy)
    assert dict(base.model.named_modules()) == modules
    assert {name: type(one) for name, one in base.model.named_modules()} == kinds
    assert "forward" not in vars(base.model)
    assert base.model.config.use_cache == use_cache
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not base.model.training
    again = perform(base, rows, order(base), threads=1)
    assert all(np.array_equal(first.lora.tensors[name], again.lora.tensors[name]) for name in first.lora.tensors)
    assert digest(base.model) == base.digest


@pytest.mark.parametrize("upload", ["factors", "difference"])
@pytest.mark.parametrize("train", ["ab", "b"])
def test_the_same_factors_give_the_same_bits_as_fedtunes_own_training(
    upload: str, train: str, base: Base, rows: list[Example]
) -> None:
    rng = np.random.default_rng(3)
    received = {
        "global": {f"{Q}.a": rng.normal(0, 0.1, (2, 32)).astype(np.float32), f"{Q}.b": np.ones((32, 2), np.float32)},
        "local": {
            f"{name}.b": rng.normal(0, 0.1, (4, size[0])).astype(np.float32).T for name, size in base.modules.items()
        },
    }
    asked = order(base, blobs=received, upload=upload, train=train)
    own = perform(base, rows, asked, threads=1)
    # As fedtune's client had it when its training ended: the scale of 2 is undone exactly.
    trained = order(base, blobs=received, train="ab", upload="factors")
    if train == "b":
        whole = {**perform(base, rows, replace(trained, task=replace(trained.lora, train="b")), threads=1).lora.tensors}
        whole |= {f"{name}.a": draw_a(5, name, 4, size[1]) for name, size in base.modules.items()}
    else:
        whole = {**perform(base, rows, trained, threads=1).lora.tensors}
    ends: Adapter = {name: replace(f, b=f.b / np.float32(2.0)) for name, f in unpack(whole).items()}

    def given(model: Any, data: TrainingData, asked: TrainingOrder) -> None:
        write_factors(model, ends, scale=2.0)

    update = run(base, rows, asked, given)
    assert update.lora.tensors.keys() == own.lora.tensors.keys()
    for name, array in own.lora.tensors.items():
        np.testing.assert_array_equal(update.lora.tensors[name], array)
    assert (update.measured.loss_before, update.measured.loss_after) == (
        own.measured.loss_before,
        own.measured.loss_after,
    )


def test_a_loop_like_fedtunes_own_ends_at_the_same_factors(base: Base, rows: list[Example]) -> None:
    from fedtune.probing.order import batches

    frozen = {f"{Q}.a": np.full((3, 32), 0.02, np.float32), f"{Q}.b": np.full((32, 3), 0.3, np.float32)}
    asked = order(base, blobs={"global": frozen})

    def train(model: Any, data: TrainingData, asked: TrainingOrder) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer, places = torch.optim.AdamW(parameters, weight_decay=0.0), batches(6, size=2, key=11)
        for step in range(asked.steps):
            optimizer.param_groups[0]["lr"] = learning_rate(asked.training, step, asked.steps)
            batch = collate([data.examples[place] for place in next(places)], base)
            logits = model(**batch.inputs).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    ours, theirs = perform(base, rows, asked, threads=1), run(base, rows, asked, train)
    for name, array in ours.lora.tensors.items():
        np.testing.assert_allclose(theirs.lora.tensors[name], array, atol=2e-4, err_msg=name)


def test_the_frozen_change_is_no_parameter_and_goes_where_the_adapter_is_disabled(
    base: Base, rows: list[Example]
) -> None:
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        plain = base.model(ids).logits
    frozen = {f"{Q}.a": np.full((3, 32), 0.5, np.float32), f"{Q}.b": np.full((32, 3), 0.5, np.float32)}

    def look(model: Any, data: TrainingData, asked: TrainingOrder) -> None:
        model.eval()
        with torch.no_grad():
            assert not torch.allclose(model(ids).logits, plain)
            with model.disable_adapter():
                torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=0)
        assert sum("lora" in name for name, _ in model.named_parameters()) == 2 * len(base.modules)
        assert len(model.state_dict()) == len(base.model.state_dict())  # wrapped in place

    run(base, rows, order(base, blobs={"global": frozen}), look)


def drop(model: Any, *_: Any) -> Any:
    return model.unload()


def merge(model: Any, data: TrainingData, asked: TrainingOrder) -> Any:
    for layer in lora_layers(model).values():
        torch.nn.init.ones_(layer.lora_B["default"].weight)
    return model.merge_and_unload()


def whole_base(model: Any, data: TrainingData, asked: TrainingOrder) -> None:
    model.requires_grad_(True)
    sgd(model, data, asked)


def in_half(model: Any, *_: Any) -> None:
    model.half()


def another_rank(model: Any, *_: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model.unload(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


def other_layers(model: Any, *_: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model.unload(), LoraConfig(r=4, target_modules=["q_proj"]))


def infinite(model: Any, *_: Any) -> None:
    with torch.no_grad():
        lora_layers(model)[Q].lora_B["default"].weight.fill_(float("inf"))


def broken(model: Any, *_: Any) -> None:
    raise KeyError("row 17: the patient's name")


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (drop, "expected the trained adapter of its trainer; got a model without one"),
        (merge, "expected its trainer to leave the base as it was; got 4 changed parameters, such as model.layers.0"),
        (whole_base, "expected its trainer to leave the base as it was; got "),
        (in_half, "expected its trainer to leave the base as it was; got "),
        (another_rank, f"expected rank 4 at {Q} from its trainer, as asked; got 2"),
        (
            other_layers,
            "expected an adapter of 4 layers from its trainer; got 2 without model.layers.0.self_attn.v_proj",
        ),
        (infinite, f"expected finite factors from its trainer; got others in B of {Q}"),
        (broken, r"expected its trainer to train; got KeyError \(test_own_trainer.py:\d+\); this client's own log"),
    ],
)
def test_what_a_trainer_does_wrong_is_one_sentence_and_the_next_round_is_as_ever(
    function: Any, sentence: str, base: Base, rows: list[Example]
) -> None:
    before = perform(base, rows, order(base), threads=1)
    with pytest.raises(ClientError, match=f"^ann: {sentence}") as caught:
        run(base, rows, order(base), function)
    assert "\n" not in str(caught.value)
    assert "patient" not in str(caught.value)
    after = perform(base, rows, order(base), threads=1)
    assert all(np.array_equal(before.lora.tensors[name], after.lora.tensors[name]) for name in before.lora.tensors)


def test_in_a_simulation_the_error_of_a_trainer_is_quoted(base: Base, rows: list[Example]) -> None:
    with pytest.raises(ClientError, match=r"got KeyError: .row 17: the patient"):
        run(base, rows, order(base), broken, quotes=True)


def test_a_base_that_cannot_be_read_again_is_refused_from_then_on(base: Base, rows: list[Example]) -> None:
    lost = replace(base, path="no/such/folder")
    with pytest.raises(ClientError, match="it could not be read again: start this process anew"):
        run(lost, rows, order(base), whole_base)
    with pytest.raises(ClientError, match="expected the base as it was loaded; got another, since the trainer of ann"):
        perform(lost, rows, order(base), threads=1)


PRUNED = PruningSettings(target=0.5)


@pytest.mark.parametrize(
    ("plan", "task", "named"),
    [
        ({"ratio": 0.5}, {}, "a pruned model"),
        ({}, {"pruning": Pruning(PRUNED)}, "a pruned model"),
        ({"importance": "gain"}, {}, "scores of modules"),
        ({"back": 0.5}, {}, "backward passes that leave a share out"),
        ({"base_dtype": "nf4"}, {}, "a base in nf4"),
        ({}, {"terms": (Preference(0.1),)}, "answers compared with beta 0.1"),
    ],
)
def test_what_only_fedtunes_own_training_does_is_refused_by_name(
    plan: dict[str, Any], task: dict[str, Any], named: str, base: Base, rows: list[Example]
) -> None:
    asked = order(base, plan=Plan("ann", 4, 2.0, TRAINING, **plan), **task)
    with pytest.raises(ClientError, match=f"^ann: expected a plan that a trainer of its own can follow; got {named}; "):
        run(base, [replace(row, rejected=row) for row in rows] if "terms" in task else rows, asked, still)


def test_a_method_of_seeds_is_refused_by_name(base: Base, rows: list[Example]) -> None:
    task = ProbeSeeds(
        "hadamard", 16, key=1, exponent=10, shift=3, perturbation=1, state=SeedState("whole", 0, b"", 0, b"")
    )
    asked = replace(order(base), method="fedkseed", task=task)
    with pytest.raises(
        ClientError, match=r"expected an order to train a LoRA adapter.*got one of the method 'fedkseed'"
    ):
        run(base, rows, asked, still)


def test_another_a_is_refused_where_all_clients_share_it(base: Base, rows: list[Example]) -> None:
    def moves_a(model: Any, *_: Any) -> None:
        with torch.no_grad():
            lora_layers(model)[Q].lora_A["default"].weight.add_(1)

    with pytest.raises(
        ClientError, match=f"expected its trainer to train B alone, as the order says; got another A at {Q}"
    ):
        run(base, rows, order(base, train="b"), moves_a)


def test_terms_of_the_objective_are_added_before_each_step(base: Base, rows: list[Example]) -> None:
    def without_gradients(model: Any, data: TrainingData, asked: TrainingOrder) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        with torch.no_grad():
            lora_layers(model)[Q].lora_B["default"].weight.fill_(1.0)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()

    # By hand: b starts at 0 and stands at 1; a step at rate 0.1 takes 0.1 * mu * (b - 0) = 0.5 b of it away.
    update = run(base, rows, order(base, terms=(Proximal(5.0),)), without_gradients)
    np.testing.assert_allclose(update.lora.tensors[f"{Q}.b"], 2.0 * 0.25, rtol=1e-6)


def test_hetloras_cut_is_made_after_a_training_that_shrinks_the_tail(base: Base, rows: list[Example]) -> None:
    start = {f"{name}.b": np.full((4, size[0]), 0.5, np.float32).T for name, size in base.modules.items()}

    def shrink(model: Any, data: TrainingData, asked: TrainingOrder) -> None:
        sgd(model, data, asked, rate=1e-9)
        with torch.no_grad():
            for layer in lora_layers(model).values():
                layer.lora_B["default"].weight[:, 2:] *= 0.1

    asked = order(base, blobs={"local": start}, terms=(TailRank(0.01, 0.5),))
    update = run(base, rows, asked, shrink)
    assert update.lora.tensors[f"{Q}.a"].shape == (2, 32)
    with pytest.raises(ClientError, match="expected steps of an optimizer of torch, to which the objective's TailRank"):
        run(base, rows, asked, still)


def test_modules_trained_in_full_are_trained_too(loaded: Loader, rows: list[Example]) -> None:
    base = loaded("llama", saved=["lm_head"])
    update = run(base, rows, order(base, blobs={"saved": base.saved_tensors()}), sgd)
    assert not np.array_equal(update.lora.saved["lm_head.weight"], base.saved_tensors()["lm_head.weight"])
    assert digest(base.model) == base.digest


def test_a_classifiers_head_is_trained_beside_its_adapter(loaded: Loader, examples: Examples) -> None:
    base = loaded("llama", task="classification", labels=["yes", "no"])
    asked = order(base, blobs={"saved": base.saved_tensors()})
    update = run(base, examples(6, classes=2), asked, sgd)  # type: ignore[call-arg]
    [head] = base.saved
    assert not np.array_equal(update.lora.saved[head], base.saved_tensors()[head])
    assert digest(base.model, leave_out=[head]) == base.digest


def test_torchs_modes_are_afterwards_as_before(base: Base, rows: list[Example]) -> None:
    def careless(*_: Any) -> None:
        torch.set_default_dtype(torch.bfloat16)
        torch.set_grad_enabled(False)

    run(base, rows, order(base), careless)
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()


def test_each_optimizer_step_is_heard_of(base: Base, rows: list[Example]) -> None:
    heard: list[tuple[int, int]] = []
    perform(base, rows, order(base), threads=1, own=OwnTrainer(sgd), on_step=lambda *at: heard.append(at))
    assert heard == [(1, 3), (2, 3), (3, 3)]


def test_ranks_that_differ_between_layers_and_conv1d_layers_are_had(loaded: Loader, rows: list[Example]) -> None:
    base = loaded("gpt2", targets=("c_attn", "c_proj"))
    ranks = tuple(2 + place % 3 for place in range(len(base.modules)))
    plan = Plan("ann", max(ranks), 0.75, TRAINING, ranks=ranks)
    frozen: dict[str, Any] = {}
    for name, (m, n) in base.modules.items():
        frozen |= {f"{name}.a": np.full((1, n), 0.1, np.float32), f"{name}.b": np.full((m, 1), 0.1, np.float32)}
    update = run(base, rows, order(base, plan=plan, blobs={"global": frozen}), sgd)
    got = {name: update.lora.tensors[f"{name}.a"].shape[0] for name in base.modules}
    assert got == plan.rank_of(base.modules)
    assert update.measured.loss_after < update.measured.loss_before
