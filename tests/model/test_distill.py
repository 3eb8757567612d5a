"""Distillation: its loss by hand, what it changes, and what it leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.data.encode import Example
from fedtune.errors import ConfigError
from fedtune.model.base import Base, digest, load, load_tokenizer
from fedtune.model.batches import collate
from fedtune.model.distill import DistillSettings, distill, losses_of, order, rate
from fedtune.model.emulator import as_it_is, build_emulator, middle_names, projection_of
from fedtune.model.settings import AdapterSettings, ModelSettings
from tests.model.families import CAUSAL, build

LAYERS = [0, 1, 4, 5]


def rows(count: int = 6) -> Sequence[Example]:
    rng = np.random.default_rng(0)
    drawn = [rng.integers(3, 300, 8 + i % 5) for i in range(count)]
    return [Example(ids, ids, len(ids), "", "", 0) for ids in drawn]


@pytest.fixture(scope="module")
def base(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Base:
    tiny = ModelSettings(base=str(checkpoints["llama"]), device="cpu")
    tokenizer = load_tokenizer(tiny, Path())
    folder = build(
        "llama", {**CAUSAL["llama"], "num_hidden_layers": 6}, tmp_path_factory.mktemp("deep"), tokenizer, task="causal"
    )
    settings = replace(tiny, base=str(folder), dtype="float32")
    return load(settings, AdapterSettings(rank=1), tokenizer=tokenizer, root=Path(), seed=0)


def middle_of(base: Base) -> tuple[Any, Sequence[str]]:
    emulator = build_emulator(base.model, LAYERS, task="causal")
    return emulator, middle_names(emulator, [1, 2])


def test_the_losses_by_hand(base: Base) -> None:
    emulator, _ = middle_of(base)
    batch = collate(rows(3), base)
    error, loss = losses_of(base, emulator, batch, front=1, back=1, with_loss=True)
    wanted = base.model(**batch.inputs, output_hidden_states=True).hidden_states[5]
    outputs = emulator(**batch.inputs, output_hidden_states=True)
    got = outputs.hidden_states[3]
    mask = batch.attention_mask.bool()
    t, s = wanted[mask].detach().double().numpy(), got[mask].detach().double().numpy()
    assert error.item() == pytest.approx((((t - s) / math.sqrt((t**2).mean())) ** 2).mean(), rel=1e-5)
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_a_whole_middle_has_no_error(base: Base) -> None:
    emulator = build_emulator(base.model, range(6), task="causal")
    error, _ = losses_of(base, emulator, collate(rows(3), base), front=1, back=1, with_loss=False)
    assert error.item() == 0.0


def test_the_middle_comes_nearer_and_nothing_else_changes(base: Base) -> None:
    emulator, free = middle_of(base)
    ends = {name: p.detach().clone() for name, p in emulator.named_parameters() if name not in free}
    first = digest(base.model)
    settings = DistillSettings(steps=16, learning_rate=5e-3, batch=3)
    course = distill(base, emulator, rows(), settings, front=1, back=1, free=free, seed=0)
    assert course.errors[-1] < 0.8 * course.errors[0]
    assert len(course.losses) == len(course.errors) == 16
    assert digest(base.model) == first
    assert all(torch.equal(emulator.get_parameter(name), before) for name, before in ends.items())
    assert not any(parameter.requires_grad for parameter in emulator.parameters())


def test_the_same_seed_gives_the_same_bits_and_another_one_others(base: Base) -> None:
    digests = []
    for seed in (0, 0, 1):
        emulator, free = middle_of(base)
        settings = DistillSettings(steps=4, batch=2, lm_weight=0.0)
        course = distill(base, emulator, rows(), settings, front=1, back=1, free=free, seed=seed)
        assert course.losses == []
        digests.append(digest(emulator))
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("kind", ["prune", "quantise"])
def test_projected_values_stay_on_their_grid(kind: Any, base: Base) -> None:
    projection = projection_of(base.model, kind, range(1, 5), ratio=0.5)
    emulator = build_emulator(base.model, range(6), task="causal")
    free = middle_names(emulator, range(1, 5))
    before = {name: projection(name, emulator.get_parameter(name)) for name in free}
    settings = DistillSettings(steps=8, learning_rate=1e-2, batch=3)
    course = distill(base, emulator, rows(), settings, front=1, back=1, free=free, projection=projection, seed=0)
    assert course.errors[0] > 0
    changed = [name for name in free if not torch.equal(emulator.get_parameter(name), before[name])]
    assert any(name.endswith("proj.weight") for name in changed)
    for name in free:
        values = emulator.get_parameter(name)
        if kind == "prune":
            assert bool((values[before[name] == 0] == 0).all()), name
        elif name.endswith("proj.weight"):
            # As many values as codes in a block of 64 inputs, here a whole row.
            assert max(len(row.unique()) for row in values) <= 16, name


def test_rows_come_once_before_any_comes_again() -> None:
    settings = DistillSettings(steps=5, batch=2)
    steps = list(order(5, settings, seed=0))
    flat = [row for step in steps for row in step]
    assert sorted(flat[:5]) == sorted(flat[5:]) == [0, 1, 2, 3, 4]
    assert [len(step) for step in order(1, settings, seed=0)] == [1] * 5


def test_the_rate_rises_and_falls() -> None:
    rates = [rate(step, 20) for step in range(20)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.1
    assert rate(0, 1) == 1.0


def test_what_cannot_be_distilled_is_refused(base: Base) -> None:
    emulator, free = middle_of(base)
    cases: list[tuple[Base, Sequence[Example], DistillSettings, str]] = [
        (base, [], DistillSettings(), "text of at least two tokens"),
        (base, rows(), DistillSettings(lm_weight=0.0, kd_weight=0.0), "both are 0"),
        (replace(base, task="classification"), rows(), DistillSettings(), "give --lm-weight 0"),
        (base, rows(), DistillSettings(kd_weight=math.inf), "kd_weight: expected a number from 0; got inf"),
        (base, rows(), DistillSettings(lm_weight=-1.0), "lm_weight: expected a number from 0; got -1"),
        (base, rows(), DistillSettings(learning_rate=0.0), "learning_rate: expected a number above 0; got 0"),
        (base, rows(), DistillSettings(learning_rate=math.nan), "learning_rate: expected a number above 0; got nan"),
        (base, rows(), DistillSettings(steps=0), "steps: expected a number from 1; got 0"),
        (base, rows(), DistillSettings(batch=0), "batch: expected a number from 1; got 0"),
        (base, rows(), DistillSettings(kd_weight=1e39), "expected finite losses; got inf at step 1"),
    ]
    for given, text, settings, words in cases:
        with pytest.raises(ConfigError, match=words):
            distill(given, emulator, text, settings, front=1, back=1, free=free, projection=as_it_is, seed=0)
