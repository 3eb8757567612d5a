from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune import client
from fedtune.adapter import draw_a
from fedtune.data.encode import Example
from fedtune.errors import ClientError, ShapeError
from fedtune.model.base import Base, digest, load, load_tokenizer
from fedtune.model.settings import AdapterSettings, ModelSettings
from fedtune.round import Assignment, LocalAdapter, Plan, Training
from fedtune.tensors import Tensors

TRAINING = Training(batch=2, learning_rate=0.05, steps=4)

perform = partial(client.perform, threads=1)


@pytest.fixture
def base(checkpoints: dict[str, Path]) -> Base:
    settings = ModelSettings(base=str(checkpoints["llama"]), device="cpu")
    tokenizer = load_tokenizer(settings, Path())
    adapter = AdapterSettings(rank=4, targets=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    return load(settings, adapter, tokenizer=tokenizer, root=Path(), seed=0)


@pytest.fixture
def rows() -> list[Example]:
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, 200, size=9).astype(np.int64) for _ in range(5)]
    return [Example(input_ids=row, labels=row, characters=18, prompt_tokens=0, prompt="", reference="") for row in ids]


def assignment(base: Base, *, blobs: Mapping[str, Tensors] | None = None, **local: Any) -> Assignment:
    return Assignment(
        method="flora",
        round=3,
        seed=11,
        plan=Plan(client="ann", rank=4, scale=2.0, training=TRAINING),
        local=LocalAdapter(a_key=5, **local),
        blobs={"saved": base.saved_tensors()} if blobs is None else blobs,
        base=base.digest,
    )


Q = "model.layers.0.self_attn.q_proj"  # (32, 32)


@pytest.mark.parametrize(
    ("role", "tensors"),
    [
        ("global", {f"{Q}.a": (2, 33), f"{Q}.b": (32, 2)}),
        ("global", {f"{Q}.w": (2, 2, 2)}),
        ("global", {f"{Q}.w": (32, 31)}),
        ("global", {"nowhere.a": (2, 32), "nowhere.b": (32, 2)}),
        ("local", {f"{Q}.a": (2,)}),
        ("local", {"nowhere.a": (2, 32)}),
        ("saved", {"lm_head.weight": (2,)}),
        ("saved", {"nowhere.weight": (2,)}),
    ],
)
def test_tensors_that_do_not_fit_the_base_are_refused_by_name(
    role: str, tensors: dict[str, tuple[int, ...]], base: Base, rows: list[Example]
) -> None:
    sent = {name: np.zeros(shape, np.float32) for name, shape in tensors.items()}
    name = next(iter(tensors)).removesuffix(".a").removesuffix(".w")
    with pytest.raises(ShapeError, match=name):
        perform(base, rows, assignment(base, blobs={role: sent}))
    assert digest(base.model) == base.digest


def test_an_update_says_who_did_what_on_how_much(base: Base, rows: list[Example]) -> None:
    update = perform(base, rows, assignment(base))
    assert (update.client, update.round, update.num_examples, update.base) == ("ann", 3, 5, base.digest)
    assert update.tensors.keys() == {f"{name}.{side}" for name in base.modules for side in "ab"}
    assert all(array.dtype.name == "bfloat16" for array in update.tensors.values())
    assert update.saved["lm_head.weight"].dtype == np.float32
    assert not np.array_equal(update.saved["lm_head.weight"], base.saved_tensors()["lm_head.weight"])
    assert update.measured.tokens == 4 * 2 * 9 - 9  # five examples in batches of two: the third batch is short
    assert update.measured.loss_after is not None


def test_the_scale_is_folded_into_b(base: Base, rows: list[Example]) -> None:
    # Twice the scale at half the learning rate of b would be another run; at zero steps' distance only the start shows.
    name = next(iter(base.modules))
    b = np.full((32, 4), 0.01, np.float32)
    blobs = {"local": {f"{name}.b": b}, "saved": base.saved_tensors()}
    still = replace(
        assignment(base, blobs=blobs, wire_dtype="fp32"),
        plan=Plan("ann", 4, 2.0, replace(TRAINING, learning_rate=1e-30)),
    )
    update = perform(base, rows, still)
    np.testing.assert_allclose(update.tensors[f"{name}.b"], b, rtol=1e-6)
    np.testing.assert_array_equal(update.tensors[f"{name}.a"], draw_a(5, name, 4, 32))


def test_differences_of_an_untrained_client_are_zero(base: Base, rows: list[Example]) -> None:
    still = replace(
        assignment(base, upload="difference"), plan=Plan("ann", 4, 2.0, replace(TRAINING, learning_rate=1e-30))
    )
    assert max(float(np.abs(array).max()) for array in perform(base, rows, still).tensors.values()) < 1e-25


def test_differences_and_factors_describe_the_same_end(base: Base, rows: list[Example]) -> None:
    factors = perform(base, rows, assignment(base, wire_dtype="fp32")).tensors
    difference = perform(base, rows, assignment(base, wire_dtype="fp32", upload="difference")).tensors
    for name in base.modules:
        start = draw_a(5, name, 4, base.modules[name][1])
        np.testing.assert_allclose(factors[f"{name}.a"], start + difference[f"{name}.a"], atol=1e-6)
        np.testing.assert_allclose(factors[f"{name}.b"], difference[f"{name}.b"], atol=1e-6)


def test_only_b_travels_where_only_b_is_trained(base: Base, rows: list[Example]) -> None:
    update = perform(base, rows, assignment(base, train="b"))
    assert update.tensors.keys() == {f"{name}.b" for name in base.modules}


def test_the_same_assignment_gives_the_same_bits_whoever_worked_before(base: Base, rows: list[Example]) -> None:
    first = perform(base, rows, assignment(base))
    perform(base, rows, replace(assignment(base), seed=12))
    second = perform(base, rows, assignment(base))
    for name, array in first.tensors.items():
        np.testing.assert_array_equal(array, second.tensors[name])


def test_another_base_is_refused_by_name(base: Base, rows: list[Example]) -> None:
    with pytest.raises(ClientError, match="ann: expected base 123; has "):
        perform(base, rows, replace(assignment(base), base="123"))


def test_a_penalised_tail_shrinks_the_rank(base: Base, rows: list[Example]) -> None:
    plan = Plan("ann", 4, 2.0, replace(TRAINING, steps=10))
    b = {f"{name}.b": np.full((m, 4), 0.1, np.float32) for name, (m, _) in base.modules.items()}
    blobs = {"local": b, "saved": base.saved_tensors()}
    heavy = replace(assignment(base, blobs=blobs, rank_penalty=50.0, rank_decay=0.5), plan=plan)
    assert {update.shape[1] for name, update in perform(base, rows, heavy).tensors.items() if name.endswith(".b")} == {
        2
    }
    off = replace(assignment(base, blobs=blobs), plan=plan)
    assert {update.shape[1] for name, update in perform(base, rows, off).tensors.items() if name.endswith(".b")} == {4}
