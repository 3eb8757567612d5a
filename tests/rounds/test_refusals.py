"""For every reason to refuse an update: the round completes, names the reason, and its state is that of the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from fedtune.messages import Assignment, ClientUpdate, Failure, Measured, ProbeResult
from fedtune.rounds.loop import RoundResult
from fedtune.seeds import derive, generator
from fedtune.tensors import Array
from fedtune.wire.codec import encode_update
from fedtune.wire.v1 import link_pb2 as pb
from tests.rounds.scripted import Script
from tests.rounds.test_aggregation import UNBOUNDED, WAYS, client, run_way

TURNS = 5
Change = Callable[[ClientUpdate, np.random.Generator], ClientUpdate | bytes]


@dataclass(frozen=True)
class Lie:
    """What a client changes in an honest update, and why it is refused."""

    code: str
    change: Change
    way: str = "flora"
    schedule: str = "bounded"


def lora(name: str, make: Callable[[Array], Array], *, role: str = "tensors") -> Change:
    """Return the change of one tensor, by the end of its name."""

    def change(update: ClientUpdate, rng: np.random.Generator) -> ClientUpdate:
        tensors = dict(getattr(update.lora, role))
        chosen = sorted(key for key in tensors if key.endswith(name))[0]
        changes: dict[str, Any] = {role: {**tensors, chosen: make(tensors[chosen])}}
        return replace(update, result=replace(update.lora, **changes))

    return change


def with_value(value: float) -> Callable[[Array], Array]:
    def make(array: Array) -> Array:
        result = array.copy()
        result.flat[-1] = value
        return result

    return make


def renamed(update: ClientUpdate, rng: np.random.Generator) -> ClientUpdate:
    tensors = dict(update.lora.tensors)
    tensors[f"z{rng.integers(10**6)}"] = tensors.pop(sorted(tensors)[0])
    return replace(update, result=replace(update.lora, tensors=tensors))


def probed(**changes: Any) -> Change:
    def change(update: ClientUpdate, rng: np.random.Generator) -> ClientUpdate:
        assert isinstance(update.result, ProbeResult)
        return replace(update, result=replace(update.result, **changes))

    return change


def scalars(make: Callable[[Array], Array]) -> Change:
    return lambda update, rng: probed(scalars=make(update.probe.scalars))(update, rng)


def cut(update: ClientUpdate, rng: np.random.Generator) -> bytes:
    data = encode_update(update)
    return data[: int(rng.integers(len(data)))]


LIES = [
    Lie("MALFORMED", cut),
    Lie("MALFORMED", lambda update, rng: rng.bytes(int(rng.integers(200)))),
    Lie("MALFORMED", lambda update, rng: replace(update, client="ann")),  # WRONG_CLIENT, had it been decoded
    Lie("MALFORMED", lambda update, rng: replace(update, num_examples=2**62)),
    Lie("WRONG_ROUND", lambda update, rng: replace(update, round=update.round + int(rng.integers(1, 9)))),
    Lie("WRONG_ROUND", lambda update, rng: replace(update, round=update.round + 1), "fedkseed"),
    Lie("WRONG_BASE", lambda update, rng: replace(update, result=replace(update.lora, base="other"))),
    Lie("WRONG_BASE", lambda update, rng: replace(update, result=replace(update.lora, codes=rng.bytes(8)))),
    Lie("WRONG_BASE", lambda update, rng: replace(update, result=replace(update.lora, base_dtype="nf4"))),
    Lie("EXAMPLES_RANGE", lambda update, rng: replace(update, num_examples=int(rng.integers(11, 2**53)))),
    Lie("EXAMPLES_RANGE", lambda update, rng: replace(update, num_examples=0)),
    Lie("EXAMPLES_RANGE", lambda update, rng: replace(update, num_examples=2**53 - 1), "fedkseed"),
    Lie("LOSS_RANGE", lambda update, rng: replace(update, measured=Measured(loss_after=float("nan")))),
    Lie("LOSS_RANGE", lambda update, rng: replace(update, measured=Measured(loss_before=1e30))),
    Lie("TENSOR_NAMES", renamed),
    Lie("TENSOR_NAMES", lambda update, rng: replace(update, result=replace(update.lora, tensors={}))),
    Lie("TENSOR_NAMES", lambda update, rng: replace(update, result=replace(update.lora, saved={}))),
    Lie("TENSOR_SHAPE", lora(".a", lambda array: np.concatenate([array, array], axis=1))),
    Lie("TENSOR_SHAPE", lora("head", lambda array: array.T.copy(), role="saved")),
    Lie("TENSOR_DTYPE", lora(".a", lambda array: array.astype(np.int8)), "flora-bf16"),
    Lie("TENSOR_DTYPE", lora("head", lambda array: array.astype(np.float16), role="saved")),
    Lie("RANK_RANGE", lora(".b", lambda array: np.concatenate([array, array], axis=1))),
    Lie("NOT_FINITE", lora(".a", with_value(np.nan)), "flora-bf16"),
    Lie("NOT_FINITE", lora(".b", with_value(-np.inf)), "flora-bf16"),
    Lie("NOT_FINITE", lora(".scales", with_value(np.nan))),
    Lie("NOT_FINITE", lora("head", with_value(np.inf), role="saved")),
    Lie("NOT_FINITE", probed(skipped=10), "fedkseed"),
    Lie("NORM_OVER_CAP", lora(".b", lambda array: array * np.float32(1e9)), "flora-fp32"),
    Lie("NORM_OVER_CAP", lora("head", lambda array: array * np.float32(1e30), role="saved")),
    Lie("NORM_OVER_CAP", lora("head", lambda array: array * np.float32(1e30), role="saved"), "fedit"),
    Lie("SCALARS", scalars(lambda array: array[:-1]), "fedkseed"),
    Lie("SCALARS", scalars(lambda array: np.concatenate([array, array])), "fedkseed"),
    Lie("SCALAR_RANGE", scalars(lambda array: np.full_like(array, -128)), "fedkseed"),
    Lie("STATE_REBUILT", probed(state=b"another."), "fedkseed"),
    Lie("STATE_REBUILT", probed(checks=bytes(16)), "fedkseed"),
    Lie("STRUCTURE", lambda update, rng: replace(update, result=replace(update.lora, structure_digest=b"s" * 32))),
    Lie(
        "STRUCTURE",
        lambda update, rng: replace(update, result=replace(update.lora, structure_digest=rng.bytes(32))),
        "flora-pruned",
    ),
    Lie("SCORES", lora("heads", lambda array: -array, role="scores"), "flora-pruned"),
    Lie(
        "NOT_AGGREGATED",
        lora("head", lambda array: np.full_like(array, 3e38), role="saved"),
        "flora-fast",
        schedule="unbounded",
    ),
]
"""At least one of each code that an update can be refused by once it has been received whole."""


def answers(way: str, second: Callable[[ClientUpdate], ClientUpdate | Failure | bytes]) -> Script:
    """Return a client that is honest in the first round, and in the second as is said."""
    honest = client(WAYS[way].blueprint, {})

    def reply(assignment: Assignment) -> ClientUpdate | Failure | bytes:
        update = honest(assignment)
        assert isinstance(update, ClientUpdate)
        return update if assignment.round == 1 else second(update)

    return reply


def second_round(way: str, schedule: str, eve: Script) -> RoundResult:
    honest = client(WAYS[way].blueprint, {})
    chosen = UNBOUNDED if schedule == "unbounded" else {}
    return run_way(WAYS[way], {"ann": honest, "bob": honest, "eve": eve}, count=2, schedule=chosen)[1]


@cache
def without(way: str, schedule: str) -> RoundResult:
    """Return the round in which eve has no power."""
    return second_round(way, schedule, answers(way, lambda update: Failure.from_text("eve", "no power")))


@cache
def with_all(way: str, schedule: str) -> RoundResult:
    return second_round(way, schedule, answers(way, lambda update: update))


@pytest.mark.guarantee("G3")
@pytest.mark.parametrize("turns", [TURNS, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("number", range(len(LIES)), ids=lambda number: f"{LIES[number].code} {number}")
def test_a_refused_update_leaves_the_state_that_the_others_make(
    number: int, turns: int, cases: Callable[[int], None]
) -> None:
    lie, rng = LIES[number], generator(derive(0, f"refusals {number}"))
    expected = without(lie.way, lie.schedule)
    assert expected.digest != with_all(lie.way, lie.schedule).digest  # it would have counted
    for _ in range(turns):
        result = second_round(lie.way, lie.schedule, answers(lie.way, lambda update: lie.change(update, rng)))
        why = result.outcomes["eve"]
        assert isinstance(why, Failure)
        assert (why.kind, why.code) == ("refused", lie.code), why
        assert result.digest == expected.digest
        assert result.norms == expected.norms
        cases(1)


def test_every_reason_to_refuse_received_bytes_is_tried() -> None:
    numbers: Mapping[str, int] = dict(pb.Reason.items())
    of_bytes = {name for name, number in numbers.items() if 60 <= number < 100}
    assert {lie.code for lie in LIES} == of_bytes - {"WRONG_CLIENT"}
