from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import exp, log
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer

from fedtune.data.encode import Example
from fedtune.messages import Plan, Training, TrainLora
from fedtune.model import fused_loss
from fedtune.model.base import Base, load, load_tokenizer
from fedtune.model.batches import Batch, collate
from fedtune.model.fused_loss import head_cross_entropies, projects_plainly
from fedtune.model.lora import start, with_adapters
from fedtune.model.loss import summed_loss
from fedtune.model.settings import AdapterSettings, ModelSettings
from fedtune.model.train import train
from tests.model.families import CAUSAL, build

FAST = {"llama", "gpt2", "qwen2", "gemma2", "cohere"}
OWN_LOGITS = {"gemma2", "cohere"}
"""Decoders that cap or scale their logits."""


@pytest.fixture(scope="module")
def tokenizer(checkpoints: dict[str, Path]) -> Any:
    return AutoTokenizer.from_pretrained(checkpoints["llama"])


def load_tiny(folder: Path) -> Base:
    settings = ModelSettings(base=str(folder), device="cpu")
    adapter, tokenizer = (
        AdapterSettings(rank=2),
        load_tokenizer(settings, Path()),
    )
    return load(settings, adapter, tokenizer=tokenizer, root=Path(), seed=0)


def stock(head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(head(hidden).float(), labels, reduction="sum")


def gradients(base: Base, batch: Batch, *, autocast: bool = False) -> dict[str, torch.Tensor]:
    """Return the loss and the gradients of everything that is trained, with an adapter that is far from zero."""
    plan = Plan("c", 2, 2.0, Training(steps=1))
    local = {
        name: replace(factors, b=np.full_like(factors.b, 0.03))
        for name, factors in start(TrainLora(a_key=5), plan, base.modules).items()
    }
    with with_adapters(base, local=local, scale=2.0, saved=base.saved_tensors()) as model:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = summed_loss(model, batch, task="causal") / batch.count
        loss.backward()
        trained = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), **trained}


def assert_same(fused: dict[str, torch.Tensor], own: dict[str, torch.Tensor], *, rtol: float = 1e-5) -> None:
    assert fused.keys() == own.keys()
    assert fused["loss"].item() == pytest.approx(own["loss"].item(), rel=min(rtol, 1e-6))
    for name, value in own.items():
        torch.testing.assert_close(fused[name], value, rtol=0, atol=rtol * max(value.abs().max().item(), 1e-3))


def test_by_hand() -> None:
    head = nn.Linear(1, 3, bias=False).requires_grad_(False)
    head.weight.copy_(torch.tensor([[0.0], [1.0], [2.0]]))
    hidden = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss = head_cross_entropies(head, hidden, torch.tensor([2, 0]))
    loss.backward()
    # Logits 0, 1, 2 with target 2, and 0, -1, -2 with target 0: twice the same loss, and opposite gradients.
    total = 1 + exp(-1) + exp(-2)
    assert loss.item() == pytest.approx(2 * log(total), rel=1e-6)
    slope = (exp(-1) + 2) / total - 2  # the mean logit by its probabilities, less the target's
    assert hidden.grad is not None
    assert hidden.grad.flatten().tolist() == pytest.approx([slope, -slope], rel=1e-6)


@given(
    tokens=st.integers(0, 9),
    rows=st.integers(1, 10),
    size=st.sampled_from([1e-3, 1.0, 40.0]),
    bias=st.booleans(),
    kind=st.sampled_from(["plain", "trained", "hooked"]),
    seed=st.integers(0, 99),
)
def test_chunks_of_any_size_give_the_loss_and_gradients_of_stock_cross_entropy(
    tokens: int, rows: int, size: float, bias: bool, kind: str, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    head = nn.Linear(5, 7, bias=bias)
    for parameter in head.parameters():
        parameter.data = size * torch.randn(parameter.shape, generator=draw)
    head.requires_grad_(kind == "trained")
    if kind == "hooked":
        head.register_forward_hook(lambda _, inputs, output: output * 2)
    hidden = torch.randn(tokens, 5, generator=draw, requires_grad=True)
    labels = torch.randint(0, 7, (tokens,), generator=draw)
    trained = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_loss, "CHUNK_BYTES", 4 * 7 * rows)
        ours = head_cross_entropies(head, hidden, labels)
        mine = torch.autograd.grad(ours / 3, trained)
    own = stock(head, hidden, labels)
    torch.testing.assert_close(ours, own, rtol=1e-6, atol=1e-6)
    for left, right in zip(mine, torch.autograd.grad(own / 3, trained), strict=True):
        # Only the gradient of the states shrinks with the head; its own adds up numbers of about 1 that may cancel out.
        scale = size if left is mine[0] else max(size, 0.1)
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_half_precision_heads_are_summed_in_float32(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(1)
    head = nn.Linear(8, 300, bias=False).requires_grad_(False).to(dtype)
    hidden, labels = torch.randn(40, 8, generator=draw).to(dtype).requires_grad_(), torch.arange(40)
    ours, own = head_cross_entropies(head, hidden, labels), stock(head, hidden, labels)
    torch.testing.assert_close(ours, own, rtol=1e-6, atol=0)
    left, right = (torch.autograd.grad(loss / 40, hidden)[0] for loss in (ours, own))
    torch.testing.assert_close(left, right, rtol=1e-2, atol=1e-4)


def test_a_second_derivative_is_refused_not_wrong() -> None:
    head, hidden = nn.Linear(2, 3).requires_grad_(False), torch.ones(1, 2, requires_grad=True)
    loss = head_cross_entropies(head, hidden, torch.tensor([1]))
    [gradient] = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(gradient.sum(), hidden)


class Largest(TorchDispatchMode):
    """Watches the sizes of all tensors that are computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.numbers = max(self.numbers, value.numel())
        return result


@pytest.mark.parametrize("trained", [False, True])
def test_no_tensor_is_as_large_as_the_logits(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_loss, "CHUNK_BYTES", 4 * 500 * 8)
    head, hidden = nn.Linear(4, 500, bias=False).requires_grad_(trained), torch.ones(64, 4, requires_grad=True)
    labels, sizes = torch.zeros(64, dtype=torch.int64), dict[str, int]()
    for name, loss in (("fused", head_cross_entropies), ("stock", stock)):
        with Largest() as largest:
            loss(head, hidden, labels).backward()
        sizes[name] = largest.numbers
    assert sizes == {"fused": 8 * 500, "stock": 64 * 500}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in FAST else pytest.mark.slow) for k in CAUSAL])
def test_a_step_of_every_family_has_the_gradients_of_its_own_logits(
    kind: str, tokenizer: Any, tmp_path: Path, examples: Callable[..., list[Example]]
) -> None:
    base = load_tiny(build(kind, CAUSAL[kind], tmp_path, tokenizer, task="causal"))
    assert base.fused == (kind not in OWN_LOGITS)
    batch = collate(examples(5), base)
    assert batch.fused == base.fused
    assert_same(gradients(base, batch), gradients(base, replace(batch, fused=False)), rtol=3e-5)


@pytest.mark.parametrize(
    ("kind", "more"), [("granite", {"logits_scaling": 8.0}), ("gemma2", {"initializer_range": 1e-4})]
)
def test_a_model_that_scales_or_caps_its_logits_uses_its_own(
    kind: str, more: Any, tokenizer: Any, tmp_path: Path
) -> None:
    # The second model's logits are so small that its cap of 30 changes none of them; those of a trained one it would.
    assert not load_tiny(build(kind, {**CAUSAL[kind], **more}, tmp_path, tokenizer, task="causal")).fused


def test_a_model_whose_logits_are_shifted_outside_of_its_head_uses_its_own(loaded: Any) -> None:
    model = loaded().model
    assert projects_plainly(model)
    hook = model.register_forward_hook(lambda _, inputs, out: type(out)(logits=out.logits + 0.5))
    assert not projects_plainly(model)
    hook.remove()


def test_a_model_whose_head_reads_another_thing_than_its_body_returns_uses_its_own_logits(loaded: Any) -> None:
    model = loaded().model

    class Halved(type(model)):  # type: ignore[misc]
        def forward(self, **options: Any) -> Any:
            return SimpleNamespace(logits=self.lm_head(self.model(**options)[0] / 2))

    model.__class__ = Halved
    assert not projects_plainly(model)


@pytest.mark.parametrize(
    ("name", "targets", "saved"),
    [("llama", ["q_proj", "lm_head"], []), ("llama", ["v_proj"], ["lm_head"])],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_head_that_is_trained_or_adapted_gets_its_gradients(
    name: str, targets: Any, saved: Any, autocast: bool, loaded: Any, examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = loaded(name, targets=targets, saved=saved)
    assert base.fused
    batch = collate(examples(5), base)
    own = gradients(base, replace(batch, fused=False), autocast=autocast)
    monkeypatch.setattr(fused_loss, "CHUNK_BYTES", 4 * fused_loss.num_outputs(base.model.get_output_embeddings()) * 7)
    fused = gradients(base, batch, autocast=autocast)
    assert_same(fused, own, rtol=1e-2 if autocast else 1e-5)


def test_a_head_held_in_float32_over_a_half_precision_base_is_fused_too(loaded: Any, examples: Any) -> None:
    base = loaded("llama", targets=["v_proj"], saved=["lm_head"], dtype="bfloat16")
    batch = collate(examples(5), base)
    assert batch.fused
    assert_same(gradients(base, batch), gradients(base, replace(batch, fused=False)), rtol=1e-2)


def test_under_autocast_it_is_the_same_within_its_rounding(loaded: Any, examples: Any) -> None:
    base = loaded()
    batch = collate(examples(5), base)
    fused, own = (gradients(base, replace(batch, fused=way), autocast=True) for way in (True, False))
    assert_same(fused, own, rtol=1e-2)
    assert fused["loss"].item() != gradients(base, batch)["loss"].item()  # bfloat16 was used


def test_a_batch_in_which_nothing_counts_has_no_loss_and_no_gradient(loaded: Any, examples: Any) -> None:
    base = loaded()
    rows = [replace(row, labels=np.full_like(row.labels, -100)) for row in examples(2)]
    found = gradients(base, replace(collate(rows, base), count=1))
    assert {float(value.abs().max()) for value in found.values()} == {0.0}


def test_a_training_run_learns_the_same_either_way(loaded: Any, examples: Any) -> None:
    ends, base = [], loaded()
    for way in (base, replace(base, fused=False)):
        plan = Plan("c", 4, 2.0, Training(steps=8, learning_rate=0.01, batch=2))
        with with_adapters(way, local=start(TrainLora(a_key=5), plan, way.modules), scale=2.0):
            ends.append(train(way, examples(4), plan.training, key=1, client="c").losses)
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)
    assert ends[0][-1] < ends[0][0]
