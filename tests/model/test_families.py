"""A run's loss, that of stock peft with the exported adapter, and that of the merged model, family by family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedtune.data.encode import Example
from fedtune.lora.adapter import Factors
from fedtune.messages import Training
from fedtune.model.base import Base, load, load_tokenizer
from fedtune.model.batches import Batch, collate
from fedtune.model.lora import read_local, with_adapters
from fedtune.model.loss import summed_loss
from fedtune.model.merge import merge
from fedtune.model.settings import AdapterSettings, ModelSettings
from fedtune.model.train import train
from fedtune.store import peft
from fedtune.tensors import Tensors
from tests.model.families import CAUSAL, CLASSIFIERS, build

# Of stock peft, which asks transformers by an older name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

FAST = {"llama", "gpt2", "qwen3_moe", "gemma2"}
"""Decoders of the fast tier: rotary positions, Conv1D, stacked experts, norms of another form."""
FAST_HEADS = {"bert", "roberta", "distilbert", "deberta-v2"}
"""Classifiers of the fast tier: a head of one layer, of two, and heads beside a pooler."""
TOLERANCE = 1e-5

Learned = tuple[dict[str, Factors], Tensors]


def cases(sizes: Any, fast: set[str]) -> list[Any]:
    return [pytest.param(kind, marks=[] if kind in fast else pytest.mark.slow) for kind in sizes]


@pytest.fixture(scope="module")
def tokenizer(checkpoints: dict[str, Path]) -> Any:
    return AutoTokenizer.from_pretrained(checkpoints["llama"])


def load_tiny(folder: Path, task: str, labels: Any = ()) -> Base:
    settings = ModelSettings(base=str(folder), task=task, device="cpu")  # type: ignore[arg-type]
    return load(
        settings,
        AdapterSettings(rank=2, targets=["all-linear"]),
        tokenizer=load_tokenizer(settings, Path()),
        root=Path(),
        seed=0,
        labels=labels,
    )


def learn(base: Base, rows: list[Example], *, checkpointing: bool = False) -> Learned:
    """Return an adapter that is far from zero, and modules_to_save, after one step of training."""
    rng = np.random.default_rng(0)
    start = {
        name: Factors(
            a=rng.normal(0, 0.1, (min(2, *shape), shape[1])).astype(np.float32),
            b=rng.normal(0, 0.1, (shape[0], min(2, *shape))).astype(np.float32),
        )
        for name, shape in base.modules.items()
    }
    training = Training(steps=1, batch=len(rows), learning_rate=1e-2, gradient_checkpointing=checkpointing)
    with with_adapters(base, local=start, saved=base.saved_tensors()) as model:
        train(base, rows, training, key=1, client="a")
        parameters = dict(model.named_parameters())
        return dict(read_local(model)), {name: parameters[name].detach().numpy().copy() for name in base.saved}


def losses(base: Base, folder: Path, rows: list[Example], learned: Learned, out: Path) -> dict[str, float]:
    """Return the loss of the run's own model, of stock peft over the base, and of the merged model."""
    adapter, saved = learned
    target = peft.Target(str(folder), None, base.task, base.transposed, base.saved_modules)
    peft.write(out / "adapter", adapter, saved, target, {})
    (out / "merged").mkdir()
    merge(base, adapter, saved, dtype="float32", revision=None, out=out / "merged")
    batch = collate(rows, base)
    auto = AutoModelForSequenceClassification if base.task == "classification" else AutoModelForCausalLM
    names = {"id2label": base.model.config.id2label} if base.task == "classification" else {}
    stock = auto.from_pretrained(folder, ignore_mismatched_sizes=bool(names), dtype=torch.float32, **names)
    measured = {}
    with torch.inference_mode():
        with with_adapters(base, frozen=adapter, saved=saved) as model:
            measured["run"] = loss(model, batch, base.task)
        batch = replace(batch, fused=False)  # of the others' own logits
        measured["peft"] = loss(PeftModel.from_pretrained(stock, out / "adapter").eval(), batch, base.task)
        merged = auto.from_pretrained(out / "merged", dtype=torch.float32).eval()
        measured["merged"] = loss(merged, batch, base.task)
    return measured


def loss(model: Any, batch: Batch, task: str) -> float:
    return summed_loss(model, batch, task=task).item() / batch.count


@pytest.mark.parametrize("kind", cases(CAUSAL, FAST))
def test_a_decoder_gives_one_loss_in_the_run_in_stock_peft_and_merged(
    kind: str, tokenizer: Any, tmp_path: Path, examples: Callable[..., list[Example]]
) -> None:
    folder = build(kind, CAUSAL[kind], tmp_path / "base", tokenizer, task="causal")
    base, rows = load_tiny(folder, "causal"), examples(4)
    measured = losses(base, folder, rows, learn(base, rows), tmp_path)
    assert measured["peft"] == pytest.approx(measured["run"], abs=TOLERANCE)
    assert measured["merged"] == pytest.approx(measured["run"], abs=TOLERANCE)


@pytest.mark.parametrize("head", ["body", "classification"])
@pytest.mark.parametrize("kind", cases(CLASSIFIERS, FAST_HEADS))
def test_a_classifier_gives_one_loss_in_the_run_in_stock_peft_and_merged(
    kind: str, head: str, tokenizer: Any, tmp_path: Path, examples: Callable[..., list[Example]]
) -> None:
    folder = build(kind, CLASSIFIERS[kind], tmp_path / "base", tokenizer, task=head)
    labels = ["yes", "no", "maybe"]
    base, rows = load_tiny(folder, "classification", labels), examples(6, classes=3)
    assert any(name.startswith(("classifier", "score", "logits_proj")) for name in base.saved_modules)
    assert list(base.model.config.id2label.values()) == labels
    measured = losses(base, folder, rows, learn(base, rows), tmp_path)
    assert measured["peft"] == pytest.approx(measured["run"], abs=TOLERANCE)
    assert measured["merged"] == pytest.approx(measured["run"], abs=TOLERANCE)


@pytest.mark.parametrize(("kind", "task"), [("opt", "causal"), ("gpt2", "classification")])
def test_gradient_checkpointing_trains_the_same_step(
    kind: str, task: str, tokenizer: Any, examples: Callable[..., list[Example]], tmp_path: Path
) -> None:
    """OPT's layers have dropout by the flag that checkpointing reads; GPT-2's pass keys and values by position."""
    sizes = (CAUSAL if task == "causal" else CLASSIFIERS)[kind]
    labels = () if task == "causal" else ("yes", "no", "maybe")
    base = load_tiny(build(kind, sizes, tmp_path, tokenizer, task=task), task, labels)
    rows = examples(3, classes=len(labels))
    (plain, _), (again, _) = (learn(base, rows, checkpointing=checkpointing) for checkpointing in (False, True))
    for name, factors in plain.items():
        np.testing.assert_allclose(again[name].b, factors.b, atol=1e-5)
    assert not any(module.training or module._forward_hooks for module in base.model.modules())
