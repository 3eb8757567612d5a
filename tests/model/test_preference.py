from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.data.encode import IGNORED, Example
from fedtune.data.preference import encode_preferences
from fedtune.data.settings import DataSettings, Split
from fedtune.errors import ClientError
from fedtune.messages import Preference, Proximal, Training
from fedtune.model.base import Base, load, load_tokenizer
from fedtune.model.batches import Pairs, collate
from fedtune.model.evaluate import evaluate
from fedtune.model.lora import layers, with_adapters
from fedtune.model.loss import answer_likelihoods, preference_losses, summed_loss
from fedtune.model.objective import Hooks
from fedtune.model.preference import check_rows, num_referred, with_margins, with_reference
from fedtune.model.settings import AdapterSettings, ModelSettings
from fedtune.model.train import train

BETA = Preference(0.5)
TRAINING = Training(batch=2, learning_rate=0.02, steps=8, objective="dpo", dpo_beta=0.5)


@pytest.fixture
def pairs(examples: Callable[[int], list[Example]]) -> list[Example]:
    """Six pairs of answers of unequal lengths behind one prompt each."""
    rng = np.random.default_rng(3)
    rows = []
    for row, example in enumerate(examples(6)):
        answer = rng.integers(3, 200, size=3 + row).astype(np.int64)
        start = example.input_ids[: example.prompt_tokens]
        labels = np.concatenate([np.full(len(start), IGNORED), answer])
        other = replace(example, input_ids=np.concatenate([start, answer]), labels=labels)
        rows.append(replace(example, rejected=other))
    return rows


def likelihood(model: Any, example: Example) -> float:
    """Return log p of an answer from the model's own logits, in float64, token by token."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(example.input_ids)[None]).logits[0].double()
    table, labels = torch.log_softmax(logits, -1), np.asarray(example.labels)
    return sum(float(table[at - 1, labels[at]]) for at in range(1, len(labels)) if labels[at] != IGNORED)


def margin(model: Any, row: Example) -> float:
    assert row.rejected is not None
    return likelihood(model, row) - likelihood(model, row.rejected)


def adapter(base: Base, size: float = 0.3, seed: int = 0) -> dict[str, Any]:
    from fedtune.lora.adapter import Factors

    rng = np.random.default_rng(seed)
    return {
        name: Factors(
            a=rng.normal(size=(2, n)).astype(np.float32), b=(size * rng.normal(size=(m, 2))).astype(np.float32)
        )
        for name, (m, n) in base.modules.items()
    }


def test_the_loss_by_hand() -> None:
    """-log sigmoid(0.5 ((-2 + 5) - 1)) = log(1 + e^-1); with a margin like the reference's it is log 2."""
    likelihoods = torch.tensor([-2.0, -3.0, -5.0, -4.0])
    losses = preference_losses(likelihoods, Pairs(0.5, torch.tensor([1.0, 1.0])))
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-1)), math.log(2)])


def test_it_equals_the_formula_written_out_over_log_probabilities(loaded: Any, pairs: list[Example]) -> None:
    base = loaded()
    reference = [margin(base.model, row) for row in pairs]
    rows = with_reference(base, pairs, BETA, TRAINING)
    assert [row.margin for row in rows] == pytest.approx(reference, abs=1e-4)
    with with_adapters(base, local=adapter(base)) as model:
        model.eval()
        own = [margin(model, row) for row in pairs]
        expected = [math.log1p(math.exp(-0.5 * (x - y))) for x, y in zip(own, reference, strict=True)]
        with torch.no_grad():
            total = summed_loss(model, collate(rows, base), task="causal").item()
    assert total == pytest.approx(sum(expected), rel=1e-5)
    assert max(abs(x - y) for x, y in zip(own, reference, strict=True)) > 0.1


def test_the_loss_is_that_of_trl(stories: Path) -> None:
    """0.6236836: DPOTrainer.compute_loss of trl 1.16.0 with transformers 5.24.0, recorded 2026-11-30.

    On the same three rows and the same tokenizer (prompt and a line break before either answer, an end-of-sequence
    token behind it), beta 0.1, the base as ref_model, and as the policy the base with all weights times 1.05.
    """
    answers = [
        ("Who sat in the tree?", "A little bird sat in the tree.", "Tom went home."),
        (
            "What did Lily find?",
            "Lily found a red ball in the park.",
            "Lily found nothing, and then she cried and cried.",
        ),
        ("Was the dog sad?", "No, the dog was happy.", "No, the dog was big."),
    ]
    parts = dict(zip(("instruction", "output", "rejected"), map(list, zip(*answers, strict=True)), strict=True))
    chosen = ModelSettings(base=str(stories), device="cpu", dtype="float32")
    tokenizer = load_tokenizer(chosen, Path())
    base = load(chosen, AdapterSettings(rank=1, targets=["q_proj"]), tokenizer=tokenizer, root=Path(), seed=0)
    data = DataSettings("x", Split("files"), template="{instruction}\n{output}")
    encoded = encode_preferences(parts, data, tokenizer, place=str).examples
    rows = with_reference(base, [row for row in encoded if row is not None], Preference(0.1), TRAINING)
    with torch.no_grad():
        for parameter in base.model.parameters():
            parameter *= 1.05
        loss = summed_loss(base.model, collate(rows, base), task="causal").item() / 3
    assert loss == pytest.approx(0.6236836314201355, abs=1e-6)


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_without_all_logits_in_memory_loss_and_gradients_are_the_same(
    head: str, loaded: Any, pairs: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedtune.model.fused_loss.CHUNK_BYTES", 4 * 256 * 3)  # three tokens at a time
    base = loaded(saved=["lm_head"] if head == "trained" else [])
    assert base.fused
    ends = []
    rows = with_reference(base, pairs, BETA, TRAINING)
    for fused in (True, False):
        saved = base.saved_tensors() if head == "trained" else {}
        with with_adapters(base, local=adapter(base), saved=saved) as model:
            model.eval()
            batch = replace(collate(rows, base), fused=fused)
            loss = summed_loss(model, batch, task="causal")
            loss.backward()
            grads = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
            ends.append((loss.item(), torch.cat(grads)))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-5)
    torch.testing.assert_close(ends[0][1], ends[1][1], rtol=1e-4, atol=1e-6)


def test_the_gradient_is_that_of_finite_differences(loaded: Any, pairs: list[Example]) -> None:
    base = loaded(dtype="float32")
    rows = with_reference(base, pairs, BETA, TRAINING)
    with with_adapters(base, local=adapter(base)) as model:
        model.eval()
        batch = collate(rows, base)
        loss = summed_loss(model, batch, task="causal")
        loss.backward()
        weight = next(iter(layers(model).values())).b
        direction = weight.grad / weight.grad.norm()
        values = []
        with torch.no_grad():
            for step in (1e-2, -1e-2):
                weight += step * direction
                values.append(summed_loss(model, batch, task="causal").item())
                weight -= step * direction
    assert (values[0] - values[1]) / 2e-2 == pytest.approx(weight.grad.norm().item(), rel=2e-2)


def test_padding_and_the_batch_change_no_likelihood(loaded: Any, pairs: list[Example]) -> None:
    base = loaded()
    with torch.no_grad():
        together = answer_likelihoods(base.model, collate(pairs, base))
        alone = torch.stack([answer_likelihoods(base.model, collate([row], base)) for row in pairs])
    torch.testing.assert_close(together, torch.cat([alone[:, 0], alone[:, 1]]), rtol=1e-5, atol=1e-4)


def test_the_first_step_starts_at_log_two_and_the_margin_grows(loaded: Any, pairs: list[Example]) -> None:
    base = loaded()
    rows = with_margins(base, pairs, BETA, TRAINING, key=1)
    measured = with_reference(base, pairs, BETA, TRAINING)
    a = {name: replace(factors, b=np.zeros_like(factors.b)) for name, factors in adapter(base).items()}
    with with_adapters(base, local=a) as model:
        trained = train(base, rows, TRAINING, key=1, client="ann", hooks=Hooks(model, (BETA,)), rows=measured)
        with torch.no_grad():
            likelihoods = answer_likelihoods(model, collate(pairs, base))
    assert trained.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert trained.measured.loss_before == pytest.approx(math.log(2), abs=1e-6)
    assert trained.measured.loss_after is not None
    assert trained.measured.loss_after < 0.9 * math.log(2)
    preferred, rejected = likelihoods.chunk(2)
    gains = preferred - rejected - torch.tensor([row.margin for row in measured])
    assert (gains > 0).all()


def test_only_rows_that_the_steps_reach_go_through_the_reference(loaded: Any, pairs: list[Example]) -> None:
    base = loaded()
    rows = with_margins(base, pairs, BETA, replace(TRAINING, steps=1), key=1)
    assert sum(row.beta > 0 for row in rows) == 2
    assert num_referred(rows) == sum(
        len(row.input_ids) + len(row.rejected.input_ids) for row in rows if row.beta and row.rejected
    )
    whole = with_margins(base, pairs, BETA, replace(TRAINING, steps=3), key=1)
    assert all(row.beta == 0.5 for row in whole)


def test_scores_of_the_base_are_those_of_chance_and_of_an_adapter_by_hand(loaded: Any, pairs: list[Example]) -> None:
    base, change = loaded(), adapter(loaded(), seed=2)
    plain = evaluate(base, {}, {}, {"test": pairs, "none": []}, batch=4, preference=BETA)
    assert plain.keys() == {"test"}
    scores = dict(plain["test"])
    reference = [margin(base.model, row) for row in pairs]
    assert scores.pop("preferred") == sum(margin > 0 for margin in reference) / 6
    assert scores == {"loss": pytest.approx(math.log(2)), "reward_accuracy": 0.5, "reward_margin": 0.0, "examples": 6}
    tuned = evaluate(base, change, {}, {"test": pairs}, batch=4, preference=BETA)["test"]
    with with_adapters(base, frozen=change) as model:
        own = [margin(model, row) for row in pairs]
    rewards = [0.5 * (x - y) for x, y in zip(own, reference, strict=True)]
    assert tuned["reward_margin"] == pytest.approx(sum(rewards) / 6, rel=1e-4)
    assert tuned["reward_accuracy"] == sum(reward > 0 for reward in rewards) / 6
    assert tuned["preferred"] == sum(margin > 0 for margin in own) / 6
    assert tuned["loss"] == pytest.approx(sum(math.log1p(math.exp(-reward)) for reward in rewards) / 6, rel=1e-4)


def test_rows_of_another_kind_than_the_objective_are_refused_by_name(pairs: list[Example]) -> None:
    single = [replace(row, rejected=None) for row in pairs]
    with pytest.raises(ClientError, match=r"^ann: expected rows with a rejected answer.*data\.fields\.rejected"):
        check_rows(single, (BETA,), "ann")
    with pytest.raises(ClientError, match=r"^ann: expected rows of one answer; got rows with a rejected one"):
        check_rows(pairs, (Proximal(0.1),), "ann")
    check_rows(pairs, (Proximal(0.1), BETA), "ann")
    check_rows(single, (), "ann")
