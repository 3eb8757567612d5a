from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fedtune.messages import (
    AdmittedUpdate,
    Assignment,
    Blueprint,
    ClientUpdate,
    DescendResult,
    DescendSeeds,
    Failure,
    LoraResult,
    Measured,
    Plan,
    PlannedClient,
    ProbeResult,
    ProbeSeeds,
    Pruning,
    ScalarBits,
    SeedState,
    TailRank,
    Training,
    TrainLora,
)
from fedtune.methods import METHODS
from fedtune.number_formats import from_wire, to_wire
from fedtune.pruning.least_squares import moment_shapes
from fedtune.pruning.ranking import PruningSettings
from fedtune.pruning.structure import Block, BlockLayout, BlockStructure, ModelStructure, bitmap
from fedtune.rounds.admission import MAX_SKIPPED, admit, largest_update, refuse_other_codes, scalar_bytes_of
from fedtune.tensors import Tensors, cast
from fedtune.wire.codec import encode_update

BLUEPRINT = Blueprint(
    modules={"q": (6, 5), "v": (2, 5)}, saved={"head": np.zeros((2, 3), np.float32)}, max_rank=4, seed=0
)


def assignment(**local: Any) -> Assignment:
    plan = Plan(client="anna", rank=2, scale=2.0, training=Training(batch=1, learning_rate=1.0, steps=1))
    return Assignment(
        method="flora", round=3, seed=0, plan=plan, task=TrainLora(a_key=0, **local), base="0123456789abcdef"
    )


def factors(rank: int = 2, sides: str = "ab") -> Tensors:
    shapes = {f"{name}.a": (rank, n) for name, (_, n) in BLUEPRINT.modules.items()}
    shapes |= {f"{name}.b": (m, rank) for name, (m, _) in BLUEPRINT.modules.items()}
    return {name: np.ones(shape, np.float32) for name, shape in shapes.items() if name[-1] in sides}


def update(**changes: Any) -> ClientUpdate:
    own = {key: changes.pop(key) for key in [*changes] if key in ("tensors", "saved", "base", "mask", "moments")}
    result = LoraResult(factors(), saved={"head": np.ones((2, 3), np.float32)}, base="0123456789abcdef")
    return replace(ClientUpdate("anna", 3, 10, replace(result, **own)), **changes)


def taken(outcome: AdmittedUpdate | Failure) -> ClientUpdate:
    assert isinstance(outcome, AdmittedUpdate), outcome
    return outcome.update


def put(name: str, array: Any) -> Callable[[], ClientUpdate]:
    return lambda: update(tensors={**factors(), name: array})


def spoiled(value: float) -> Any:
    array = np.ones((2, 5), np.float32)
    array[1, 3] = value
    return array


def without(name: str) -> ClientUpdate:
    return update(tensors={key: t for key, t in factors().items() if key != name})


@pytest.mark.parametrize("format", ["fp32", "bf16", "fp16"])
def test_an_update_that_answers_its_assignment_is_taken_as_it_is(format: str) -> None:
    good = update(tensors=cast(factors(), format))
    assert taken(admit(good, assignment(), BLUEPRINT, num_examples=10)) is good


SHARES = (0.75, 0.25)


def scored(*shares: float) -> ClientUpdate:
    return update(measured=Measured(module_importance=shares))


def scoring(ranks: tuple[int, ...] = ()) -> Assignment:
    order = assignment()
    return replace(order, plan=replace(order.plan, importance="gain", ranks=ranks))


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ((), ["2 shares of modules", "got 0"]),
        ((0.5, 0.25, 0.25), ["2 shares of modules", "got 3"]),
        ((float("nan"), 1.0), ["finite shares", "1 that are not finite"]),
        ((float("inf"), 0.0), ["finite shares", "1 that are not finite"]),
        ((1.25, -0.25), ["none below 0", "the least -0.25"]),
        ((0.0, 0.0), ["sum is 1", "got 0"]),
        ((1e30, 0.0), ["sum is 1", "got 1e+30"]),
        ((0.75, 0.26), ["sum is 1", "got 1.01"]),
    ],
)
@pytest.mark.guarantee("G4")
def test_scores_of_modules_are_shares_of_one_whole_or_refused(
    shares: tuple[float, ...], words: list[str], cases: Callable[[int], None]
) -> None:
    outcome = admit(scored(*shares), scoring(), BLUEPRINT, num_examples=10)
    assert isinstance(outcome, Failure)
    assert outcome.kind == "refused"
    assert all(word in outcome.reason for word in words), outcome.reason
    assert isinstance(admit(scored(*SHARES), scoring(), BLUEPRINT, num_examples=10), AdmittedUpdate)
    cases(1)


def test_scores_of_modules_that_were_not_asked_for_are_refused() -> None:
    outcome = admit(scored(*SHARES), assignment(), BLUEPRINT, num_examples=10)
    assert isinstance(outcome, Failure)
    assert "0 shares of modules" in outcome.reason


HOSTILE: list[tuple[Callable[[], ClientUpdate], list[str]]] = [
    (lambda: update(client="eve"), ["'anna'", "'eve'"]),
    (lambda: update(base="beef"), ["'0123456789abcdef'", "'beef'"]),
    (lambda: update(round=2), ["round 3", "got 2"]),
    (lambda: update(num_examples=-1), ["1 to 10", "-1"]),
    (lambda: update(num_examples=0), ["1 to 10", "got 0"]),
    (lambda: update(num_examples=10**9), ["1 to 10", "1000000000"]),
    (lambda: without("v.a"), ["4 factors", "got 3", "'v.a' is missing"]),
    (lambda: without("q.b"), ["4 factors", "got 3", "'q.b' is missing"]),
    (lambda: update(tensors={}), ["4 factors", "got 0", "4 missing"]),
    (put("k.a", np.ones((2, 5), np.float32)), ["got 5", "1 extra", "'k.a' was not asked for"]),
    (put("q.a", np.ones((3, 5), np.float32)), ["q.a", "(2, 5)", "(3, 5)"]),
    (put("q.b", np.ones((6, 3), np.float32)), ["q.b", "(6, 2)", "(6, 3)"]),
    (lambda: update(tensors=factors(4)), ["q.b", "(6, 2)", "(6, 4)"]),
    (lambda: update(tensors=factors(1)), ["q.b", "(6, 2)", "(6, 1)"]),
    (put("q.b", np.ones((5, 2), np.float32)), ["q.b", "(6, 2)", "(5, 2)"]),
    (put("q.b", np.ones(12, np.float32)), ["q.b", "(6, 2)", "(12,)"]),
    (put("q.a", np.ones((2, 5))), ["q.a", "fp32 or fp16 or bf16", "float64"]),
    (put("q.a", np.ones((2, 5), np.int8)), ["q.a", "int8"]),
    (put("q.a", spoiled(np.nan)), ["q.a", "1 of 10"]),
    (put("q.a", spoiled(np.inf)), ["q.a", "1 of 10"]),
    (put("q.a", spoiled(np.nan).astype(ml_dtypes.bfloat16)), ["q.a", "1 of 10"]),
    (
        lambda: update(tensors={**factors(), "q.a": spoiled(1e30), "q.b": np.full((6, 2), 1e30, np.float32)}),
        ["q:", "float32", "e+60"],
    ),
    (lambda: update(saved={}), ["1 modules_to_save", "got 0", "'head'"]),
    (lambda: update(saved={"head": np.ones((3, 2), np.float32)}), ["head", "(2, 3)", "(3, 2)"]),
    (lambda: update(saved={"head": np.ones((2, 3), np.float16)}), ["head", "fp32", "float16"]),
    (lambda: update(saved={"head": np.full((2, 3), np.nan, np.float32)}), ["head", "6 of 6"]),
]


@pytest.mark.parametrize(("make", "words"), HOSTILE)
def test_anything_else_is_refused_by_name_with_the_number(make: Callable[[], ClientUpdate], words: list[str]) -> None:
    outcome = admit(make(), assignment(), BLUEPRINT, num_examples=10)
    assert isinstance(outcome, Failure)
    assert (outcome.client, outcome.kind) == ("anna", "refused")
    assert all(word in outcome.reason for word in words), outcome.reason


def over(dtype: str, codes: bytes, client: str = "anna") -> ClientUpdate:
    honest = update()
    return replace(honest, client=client, result=replace(honest.lora, base_dtype=dtype, codes=codes))  # type: ignore[arg-type]


def test_an_update_states_the_format_that_it_was_planned_over_and_its_codes() -> None:
    order = assignment()
    planned = replace(order, plan=replace(order.plan, base_dtype="nf4"))
    judge = partial(admit, blueprint=BLUEPRINT, num_examples=10)
    assert isinstance(judge(over("nf4", b"12345678"), planned), AdmittedUpdate)
    # Without a planned one it is the site's own choice.
    assert isinstance(judge(over("int8", b"12345678"), order), AdmittedUpdate)
    for wrong, words in (
        (update(), "expected an update over the base in nf4; got one that is not quantised"),
        (over("int8", b"12345678"), "expected an update over the base in nf4; got int8"),
        (over("nf4", b""), "expected 8 bytes of a digest of its codes; got 0"),
    ):
        outcome = judge(wrong, planned)
        assert isinstance(outcome, Failure)
        assert words in outcome.reason
        assert outcome.code == "WRONG_BASE"
    outcome = judge(over("", b"12345678"), order)
    assert isinstance(outcome, Failure)


def test_codes_unlike_those_of_most_clients_of_the_format_are_refused_by_name() -> None:
    one, two = b"1" * 8, b"2" * 8
    stated = {"ann": ("nf4", one), "bob": ("nf4", two), "cyd": ("nf4", two), "dan": ("int8", one), "eve": ("", b"")}
    updates = [AdmittedUpdate(over(dtype, codes, name)) for name, (dtype, codes) in stated.items()]
    (refused,) = refuse_other_codes(updates)
    assert (refused.client, refused.code, refused.kind) == ("ann", "WRONG_BASE", "refused")
    assert f"expected the nf4 codes {two.hex()} of 2 of 3 clients; got {one.hex()}" in refused.reason
    # Of two that differ neither is of most: the first by name counts, in whatever order they came.
    assert [failure.client for failure in refuse_other_codes(updates[:2][::-1])] == ["bob"]
    assert not refuse_other_codes(updates[1:])
    assert not refuse_other_codes([])


def test_only_b_is_taken_where_only_b_is_trained() -> None:
    alone = update(tensors=factors(sides="b"))
    assert taken(admit(alone, assignment(train="b"), BLUEPRINT, num_examples=10)) is alone
    assert isinstance(admit(update(), assignment(train="b"), BLUEPRINT, num_examples=10), Failure)


def test_a_smaller_rank_is_taken_where_ranks_may_shrink() -> None:
    asked, small = assignment(terms=(TailRank(0.1, 0.5),)), update(tensors=factors(1))
    assert taken(admit(small, asked, BLUEPRINT, num_examples=10)) is small
    for rank in (0, 3):
        outcome = admit(update(tensors=factors(rank)), asked, BLUEPRINT, num_examples=10)
        assert isinstance(outcome, Failure)
        assert "1..2" in outcome.reason


@pytest.mark.parametrize("name", sorted(METHODS))
def test_honest_answers_to_every_method_are_taken(name: str) -> None:
    method = METHODS[name]
    plan = assignment().plan
    asked = method.assign(method.init(BLUEPRINT, method.settings()), 0, PlannedClient(plan))
    if method.task is ProbeSeeds:
        answer = ClientUpdate("anna", 1, 10, ProbeResult(np.zeros(1, np.int8), rms=1e-3))
    else:
        tensors = factors(sides=asked.lora.train)
        answer = update(round=1, base="", tensors=to_wire(tensors, asked.lora.wire_dtype))
    admitted = taken(admit(answer, asked, BLUEPRINT, num_examples=10))
    if method.task is ProbeSeeds:
        assert admitted is answer
    else:
        wide = from_wire(answer.lora.tensors)
        assert admitted == replace(answer, result=replace(answer.lora, tensors=admitted.lora.tensors))
        assert {key: array.tobytes() for key, array in admitted.lora.tensors.items()} == {
            key: array.tobytes() for key, array in wide.items()
        }


STEPS = 20


def probe(steps: int = STEPS, **changes: Any) -> Assignment:
    state = SeedState("whole", 0, bytes(16), 2, bytes(32))
    asked = ProbeSeeds("hadamard", seeds=8, key=0, exponent=26, shift=4, perturbation=9, state=state)
    asked = replace(asked, **changes)
    training = Training(batch=1, learning_rate=1.0, steps=steps)
    plan = Plan(client="anna", rank=1, scale=1.0, training=training)
    return Assignment(method="fedkseed", round=3, seed=0, plan=plan, task=asked)


def answer(scalars: Any = (5,) * STEPS, **changes: Any) -> ClientUpdate:
    probed = replace(ProbeResult(np.array(scalars, np.int8), state=bytes(8), checks=bytes(16)), **changes)
    return ClientUpdate(client="anna", round=3, num_examples=10, result=probed)


@pytest.mark.parametrize(
    "good",
    [
        answer(),
        answer([127, -127] * 10),
        answer(skipped=2),
        answer(rms=float("nan")),  # of no account beyond the round that measures it
    ],
    ids=["plain", "at the bounds", "some skipped", "stray size"],
)
def test_scalars_that_answer_a_probe_are_taken_as_they_are(good: ClientUpdate) -> None:
    assert taken(admit(good, probe(), BLUEPRINT, num_examples=10)) is good


HOSTILE_PROBES: list[tuple[Callable[[], ClientUpdate], list[str]]] = [
    (lambda: answer([5] * 19), ["20 scalars", "got 19"]),
    (lambda: answer([5] * 21), ["20 scalars", "got 21"]),
    (lambda: answer([]), ["20 scalars", "got 0"]),
    (lambda: answer([5] * 19 + [-128]), ["-127 to 127", "got -128"]),
    (lambda: answer([-128] * 20), ["-127 to 127", "got -128"]),
    (lambda: answer(skipped=3), ["at most 10%", "3 of 20", "lower client.learning_rate"]),
    (lambda: answer(skipped=2**32 - 1), ["at most 10%", "4294967295 of 20"]),
    (lambda: update(), ["expected scalars of seeds; got tensors"]),
    (lambda: replace(answer(), client="eve"), ["'anna'", "'eve'"]),
    (lambda: replace(answer(), round=2), ["round 3", "got 2"]),
    (lambda: replace(answer(), num_examples=11), ["1 to 10", "got 11"]),
    (lambda: replace(answer(), num_examples=0), ["1 to 10", "got 0"]),
    (lambda: replace(answer(), measured=Measured(loss_before=np.nan)), ["loss_before", "nan"]),
    (lambda: replace(answer(), measured=Measured(loss_after=np.inf)), ["loss_after", "inf"]),
    (lambda: replace(answer(), measured=Measured(whole_loss_before=np.nan)), ["whole_loss_before", "nan"]),
    (lambda: replace(answer(), measured=Measured(whole_loss_after=-1e30)), ["whole_loss_after", "-1e+30"]),
]


@pytest.mark.parametrize(("make", "words"), HOSTILE_PROBES)
def test_any_other_answer_to_a_probe_is_refused(make: Callable[[], ClientUpdate], words: list[str]) -> None:
    outcome = admit(make(), probe(), BLUEPRINT, num_examples=10)
    assert isinstance(outcome, Failure)
    assert (outcome.client, outcome.kind) == ("anna", "refused")
    assert all(word in outcome.reason for word in words), outcome.reason


def test_a_tenth_of_the_scalars_may_be_missing_and_no_more() -> None:
    for steps in (1, 9, 10, 200):
        allowed = int(MAX_SKIPPED * steps)
        most = answer([0] * steps, skipped=allowed)
        assert taken(admit(most, probe(steps), BLUEPRINT, num_examples=10)) is most
        more = answer([0] * steps, skipped=allowed + 1)
        assert isinstance(admit(more, probe(steps), BLUEPRINT, num_examples=10), Failure)


@pytest.mark.parametrize("rms", [0.0, 1e-12, 1.0, 1e6])
def test_the_size_that_a_first_round_measures_is_taken(rms: float) -> None:
    # Whatever its scalars: none is added up.
    good = answer([], rms=rms)
    assert taken(admit(good, probe(calibrate=True), BLUEPRINT, num_examples=10)) is good


@pytest.mark.parametrize("rms", [None, float("nan"), float("inf"), float("-inf"), -1e-9, 1.1e6])
def test_a_size_that_cannot_be_is_refused(rms: float | None) -> None:
    outcome = admit(answer([], rms=rms), probe(calibrate=True), BLUEPRINT, num_examples=10)
    assert isinstance(outcome, Failure)
    assert outcome.kind == "refused"
    assert f"expected a finite size of the gradient, at most 1e+06; got {rms}" in outcome.reason


FULL = (0.5,) * 8


def test_slopes_and_curvatures_are_taken_where_they_are_asked_for() -> None:
    # A pool of eight directions has eight of them, a larger one sixteen.
    for seeds, count in ((8, 8), (4096, 16)):
        good = measured_rate(slopes=(0.5,) * count, curvatures=(-1e12,) * count)
        asked = probe(calibrate=True, curvatures=True, seeds=seeds)
        assert taken(admit(good, asked, BLUEPRINT, num_examples=10)) is good


@pytest.mark.parametrize(
    ("slopes", "curvatures", "why"),
    [
        ((), (), "expected 8 slopes, one per shared direction; got 0"),
        (FULL, FULL[1:], "expected 8 curvatures, one per shared direction; got 7"),
        (FULL * 2, FULL, "expected 8 slopes, one per shared direction; got 16"),
        ((*FULL[1:], float("nan")), FULL, "expected finite slopes, at most 1e+12; got [nan]"),
        (FULL, (*FULL[1:], float("inf")), "expected finite curvatures, at most 1e+12; got [inf]"),
        (FULL, (*FULL[1:], -1.1e12), "expected finite curvatures, at most 1e+12; got [-1100000000000.0]"),
    ],
)
def test_slopes_and_curvatures_that_cannot_be_are_refused(
    slopes: tuple[float, ...], curvatures: tuple[float, ...], why: str
) -> None:
    update = measured_rate(slopes=slopes, curvatures=curvatures)
    outcome = admit(update, probe(calibrate=True, curvatures=True), BLUEPRINT, num_examples=10)
    assert isinstance(outcome, Failure)
    assert why in outcome.reason


@pytest.mark.parametrize("calibrate", [False, True])
def test_slopes_that_were_not_asked_for_are_refused(calibrate: bool) -> None:
    honest = answer([], rms=0.5) if calibrate else answer([0] * 5)
    for result in (replace(honest.probe, slopes=FULL), replace(honest.probe, curvatures=FULL)):
        update = replace(honest, result=result)
        outcome = admit(update, probe(5, calibrate=calibrate), BLUEPRINT, num_examples=10)
        assert isinstance(outcome, Failure)
        assert "expected no slopes and curvatures" in outcome.reason


def measured_rate(*, slopes: tuple[float, ...], curvatures: tuple[float, ...]) -> ClientUpdate:
    update = answer([])
    return replace(update, result=replace(update.probe, slopes=slopes, curvatures=curvatures))


def test_scalars_are_no_answer_to_what_asks_for_tensors() -> None:
    outcome = admit(answer(), replace(assignment(), base=""), BLUEPRINT, num_examples=10)
    assert isinstance(outcome, Failure)
    assert outcome.reason == "expected tensors; got scalars of seeds"


def test_no_honest_answer_to_a_probe_is_too_long() -> None:
    for steps in (1, 200, 65_535):
        full = answer([-127] * steps, skipped=2**32 - 1, rms=1.0, lost=True)
        full = replace(full, result=replace(full.probe, slopes=FULL * 2, curvatures=FULL * 2))
        measured = Measured(1e9, 2**50, 2**63, loss_before=1e9, loss_after=1e9)
        data = encode_update(replace(full, round=2**32 - 1, num_examples=2**63, measured=measured))
        limit = largest_update(ProbeSeeds, rank=1, scalar_bytes=steps, blueprint=BLUEPRINT)
        assert len(data) <= limit <= len(data) + 1024


COUNT = 16
FALLBACK = Training(batch=1, learning_rate=1e-4, steps=12)


def descend(bits: ScalarBits = 8, **changes: Any) -> Assignment:
    """Return an order to move 16 numbers within 2^5 by 20 steps, or to measure 12 scalars."""
    asked = DescendSeeds(probe().probe, COUNT, largest_shift=5, bits=bits, fallback=FALLBACK)
    return replace(probe(), task=replace(asked, **changes))


def moved(numbers: Any = (100,) * COUNT, shift: int = 3, bits: Any = 8, **changes: Any) -> ClientUpdate:
    result = DescendResult(np.array(numbers, np.int8), shift, bits, state=bytes(8), checks=bytes(16))
    return ClientUpdate(client="anna", round=3, num_examples=10, result=replace(result, **changes))


@pytest.mark.parametrize(
    ("good", "order"),
    [
        (moved(), descend()),
        (moved([127, -127] * 8, 5), descend()),
        (moved([0] * COUNT, 0), descend()),
        (moved([0, 1] * 8, 0), descend()),
        (moved([64] + [0] * 15, 5), descend()),
        (moved([4, -7] * 8, 5, 4), descend(4)),
        (moved([1, -1, 0, 0] * 4, 5, 2), descend(2)),
        (moved(skipped=3), descend()),
        (moved(), descend(fallback=None)),
        (answer([127] * 12), descend()),
    ],
)
def test_numbers_that_answer_an_order_to_descend_are_taken_as_they_are(good: ClientUpdate, order: Assignment) -> None:
    assert taken(admit(good, order, BLUEPRINT, num_examples=10)) is good


@pytest.mark.guarantee("G4")
@pytest.mark.parametrize(
    ("bad", "order", "words"),
    [
        (moved([100] * 15), descend(), ["expected 16 numbers", "got 15"]),
        (moved([100] * 17), descend(), ["expected 16 numbers", "got 17"]),
        (moved([]), descend(), ["expected 16 numbers", "got 0"]),
        (moved([7] * COUNT, bits=4), descend(), ["numbers of 8 bits", "got 4"]),
        (moved(), descend(2), ["numbers of 2 bits", "got 8"]),
        (moved(shift=6), descend(), ["numbers times 2^5 at most", "got numbers times 2^6"]),
        (moved(shift=2**31), descend(), ["numbers times 2^5 at most"]),
        (moved(shift=-1), descend(), ["numbers times 2^5 at most", "2^-1"]),
        (moved([-128] + [0] * 15), descend(), ["from -127 to 127", "of size 128"]),
        (moved([-8] * COUNT, bits=4), descend(4), ["from -7 to 7", "of size 8"]),
        (moved([100] * COUNT, bits=4), descend(4), ["from -7 to 7", "of size 100"]),
        (moved([-2] * COUNT, bits=2), descend(2), ["from -1 to 1", "of size 2"]),
        (moved([63] * COUNT, 1), descend(), ["the smallest shift", "a shift of 1 for numbers up to 63"]),
        (moved([0] * COUNT, 1), descend(), ["the smallest shift"]),
        (moved(skipped=4), descend(), ["in all but 3 steps", "4 of 20", "lower descend.learning_rate"]),
        (moved(), probe(), ["expected scalars of seeds; got numbers of a client that descends"]),
        (moved(), probe(calibrate=True), ["expected scalars of seeds; got numbers"]),
        (answer([5] * 12), descend(fallback=None), ["expected the numbers of a client that descends; got scalars"]),
        (answer([5] * 20), descend(), ["12 scalars, one per seed drawn", "got 20"]),
        (answer([-128] * 12), descend(), ["-127 to 127", "got -128"]),
        (answer([5] * 12, skipped=2), descend(), ["at most 10%", "2 of 12"]),
        (update(), descend(), ["expected numbers of seeds; got tensors"]),
        (replace(moved(), round=2), descend(), ["round 3", "got 2"]),
        (replace(moved(), client="eve"), descend(), ["'anna'", "'eve'"]),
        (replace(moved(), measured=Measured(loss_after=np.inf)), descend(), ["loss_after", "inf"]),
        (moved(), replace(assignment(), base=""), ["expected tensors"]),
    ],
)
def test_any_other_answer_to_an_order_to_descend_is_refused(
    bad: ClientUpdate, order: Assignment, words: list[str]
) -> None:
    outcome = admit(bad, order, BLUEPRINT, num_examples=10)
    assert isinstance(outcome, Failure)
    assert (outcome.client, outcome.kind) == ("anna", "refused")
    assert all(word in outcome.reason for word in words), outcome.reason


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("steps", [1, 65_535])
def test_no_honest_answer_to_an_order_to_descend_is_too_long(bits: ScalarBits, steps: int) -> None:
    task = replace(descend(bits).descend, count=4096, fallback=replace(FALLBACK, steps=steps))
    measured = Measured(1e9, 2**50, 2**52, loss_before=1e9, loss_after=1e9)
    longest = [answer([-127] * steps), moved([1] * 4096, 24, bits, skipped=2**32 - 1)]
    sizes = [len(encode_update(replace(one, round=2**32 - 1, measured=measured))) for one in longest]
    own = scalar_bytes_of(task, FALLBACK)
    limit = largest_update(DescendSeeds, rank=1, scalar_bytes=own, blueprint=BLUEPRINT)
    assert max(sizes) <= limit <= max(sizes) + 1024
    alone = scalar_bytes_of(replace(task, fallback=None), FALLBACK)
    assert alone == 4096 * bits // 8


@pytest.mark.parametrize("skipped", [1, 16])
def test_a_base_whose_losses_are_not_finite_measures_nothing(skipped: int) -> None:
    update = answer([], rms=0.0, skipped=skipped)
    outcome = admit(update, probe(calibrate=True), BLUEPRINT, num_examples=10)
    assert isinstance(outcome, Failure)
    assert f"got {skipped} that are not" in outcome.reason


ANATOMY = BlockLayout("bert", tuple(Block(f"x.{i}", 4, 4, 2, 16) for i in range(2)), width=8)


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        (((0, 1), (2, 3)), []),
        (((0,), (1, 2, 3)), []),  # ranked over all blocks: only their number is settled
        (((0,), (1,)), ["STRUCTURE", "expected 4 units of attention; got 2"]),
        (((0, 1, 2, 3), (0, 1, 2, 3)), ["STRUCTURE", "expected 4 units of attention; got 8"]),
    ],
)
def test_a_vote_keeps_as_many_heads_as_were_asked(heads: tuple[tuple[int, ...], ...], words: list[str]) -> None:
    """A voter for few heads would count for more, since votes are in units of their mean."""
    settings = PruningSettings(policy="vote", target=0.5, multiple=2)
    keep = ModelStructure(tuple(BlockStructure(q=each, kv=each, ff=tuple(range(8))) for each in heads))
    asked = replace(
        assignment(), task=replace(assignment().lora, pruning=Pruning(settings=settings, scores_requested=True))
    )
    blueprint = replace(BLUEPRINT, anatomy=ANATOMY, pruning=settings)
    outcome = admit(update(mask=bitmap(keep, ANATOMY)), asked, blueprint, num_examples=10)
    if words:
        assert isinstance(outcome, Failure)
        assert outcome.code == words[0]
        assert words[1] in outcome.reason
    else:
        assert isinstance(outcome, AdmittedUpdate)


def test_blocks_that_keep_alike_keep_as_many_heads_each() -> None:
    settings = PruningSettings(policy="vote", target=0.5, multiple=2, allocation="uniform")
    keep = ModelStructure(tuple(BlockStructure(q=each, kv=each, ff=tuple(range(8))) for each in ((0,), (1, 2, 3))))
    asked = replace(
        assignment(), task=replace(assignment().lora, pruning=Pruning(settings=settings, scores_requested=True))
    )
    blueprint = replace(BLUEPRINT, anatomy=ANATOMY, pruning=settings)
    outcome = admit(update(mask=bitmap(keep, ANATOMY)), asked, blueprint, num_examples=10)
    assert isinstance(outcome, Failure)
    assert outcome.code == "STRUCTURE"


REPAIRED = PruningSettings(repair="least-squares", repair_rank=4)


def some_moments(settings: PruningSettings = REPAIRED) -> dict[str, Any]:
    return {name: np.ones(shape, np.float16) for name, shape in moment_shapes(settings, ANATOMY).items()}


O_PROJ = next(iter(some_moments())).removesuffix(".mean")


@pytest.mark.guarantee("G4")
@pytest.mark.parametrize(
    ("change", "requested", "words"),
    [
        (lambda m: m, True, ""),
        (lambda m: {}, True, "expected moments; got none"),
        (lambda m: m, False, "expected no moments; got "),
        (lambda m: {**m, f"{O_PROJ}.u": m[f"{O_PROJ}.u"][:, :2]}, True, "as this base is wide"),
        (lambda m: {name: a for name, a in m.items() if name != f"{O_PROJ}.u"}, True, "expected those of this base's"),
        (lambda m: {**m, f"{O_PROJ}.mean": m[f"{O_PROJ}.mean"] * np.float16(np.inf)}, True, "expected finite numbers"),
        (lambda m: {**m, f"{O_PROJ}.deviation": -m[f"{O_PROJ}.deviation"]}, True, "expected none below 0; got -1"),
        (lambda m: {**m, f"{O_PROJ}.mean": m[f"{O_PROJ}.mean"].astype(np.float32) * 1e30}, True, "of format fp16"),
    ],
)
def test_moments_are_those_that_were_asked_for(change: Any, requested: bool, words: str) -> None:
    asked = replace(
        assignment(), task=replace(assignment().lora, pruning=Pruning(settings=REPAIRED, moments_requested=requested))
    )
    blueprint = replace(BLUEPRINT, anatomy=ANATOMY, pruning=REPAIRED)
    outcome = admit(update(moments=change(some_moments())), asked, blueprint, num_examples=10)
    if words:
        assert isinstance(outcome, Failure)
        assert outcome.code == ("TENSOR_DTYPE" if "fp16" in words else "SCORES")
        assert words in outcome.reason
    else:
        assert isinstance(outcome, AdmittedUpdate)


def test_the_largest_update_has_room_for_moments_only_where_pruned_models_are_repaired() -> None:
    sizes = {
        repair: largest_update(
            TrainLora,
            rank=1,
            scalar_bytes=1,
            blueprint=replace(BLUEPRINT, anatomy=ANATOMY, pruning=replace(REPAIRED, repair=repair)),
            pruned=True,
        )
        for repair in ("none", "bias", "least-squares")
    }
    assert sizes["none"] < sizes["bias"] < sizes["least-squares"]
    needed = sum(array.nbytes for array in some_moments().values())
    assert sizes["least-squares"] - sizes["none"] >= needed


def test_moments_of_a_task_without_pruning_are_refused() -> None:
    outcome = admit(update(moments=some_moments()), assignment(), BLUEPRINT, num_examples=10)
    assert isinstance(outcome, Failure)
    assert outcome.code == "STRUCTURE"


def coded(dtype: str = "int8", **changes: Any) -> ClientUpdate:
    """Return an honest answer in codes with some of its tensors replaced; None takes one out."""
    sent = {**to_wire(factors(), dtype, key=1), **changes}
    return update(tensors={name: array for name, array in sent.items() if array is not None})


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_codes_are_taken_as_the_numbers_that_they_are(dtype: str) -> None:
    sent = coded(dtype)
    outcome = admit(sent, assignment(wire_dtype=dtype, upload="difference"), BLUEPRINT, num_examples=10)
    tensors = taken(outcome).lora.tensors
    assert isinstance(outcome, AdmittedUpdate)
    assert outcome.upload == "difference"
    assert tensors.keys() == factors().keys()
    for name, array in factors().items():
        assert tensors[name].dtype == np.float32
        np.testing.assert_allclose(tensors[name], array, atol=0.16 if dtype == "int4" else 0.01)
    assert taken(outcome).lora.saved is sent.lora.saved


def scale(*values: float) -> Any:
    return np.array([values], ml_dtypes.bfloat16).T


HOSTILE_CODES: Sequence[tuple[str, dict[str, Any], Sequence[str]]] = [
    ("int8", {"q.a.scales": None}, ["q.a.scales", "is missing"]),
    ("int8", {"k.a.scales": scale(1)}, ["k.a.scales", "was not asked for"]),
    ("int8", {"q.a.scales": scale(1, 1, 1)}, ["q.a.scales", "(2, 1)", "(3, 1)"]),
    ("int8", {"q.a.scales": np.ones((2, 1), np.float32)}, ["q.a.scales", "bf16", "float32"]),
    ("int8", {"q.a.scales": np.ones(2, ml_dtypes.bfloat16)}, ["q.a.scales", "(2, 1)", "(2,)"]),
    ("int8", {"q.a.scales": scale(1, np.nan)}, ["q.a.scales", "finite", "1 of 2"]),
    ("int8", {"q.a.scales": scale(1, np.inf)}, ["q.a.scales", "finite", "1 of 2"]),
    ("int8", {"q.a.scales": scale(1, -1)}, ["q.a.scales", "at least 0", "negative"]),
    ("int8", {"q.a.scales": scale(1, -0.0)}, ["q.a.scales", "at least 0", "negative"]),
    ("int8", {"q.a.scales": scale(1, 3e38)}, ["q.a", "finite"]),
    ("int8", {"q.a.scales": scale(1, 1e36)}, ["q", "product fits float32"]),
    ("int8", {"q.a": np.full((2, 5), -128, np.int8)}, ["q.a", "-127 to 127", "-128"]),
    ("int4", {"q.a": np.full((2, 5), -8).astype(ml_dtypes.int4)}, ["q.a", "-7 to 7", "-8"]),
    ("int8", {"q.a": np.ones((2, 5), ml_dtypes.int4)}, ["q.a", "int8", "int4"]),
    ("int4", {"q.a": np.ones((2, 5), np.int8)}, ["q.a", "int4", "int8"]),
    ("int8", {"q.a": np.ones((2, 5), np.float32)}, ["q.a", "int8", "float32"]),
    ("int8", {"q.b": np.ones((6, 1), np.int8)}, ["q.b", "(6, 2)"]),
    ("int8", {"q.a": np.ones((2, 6), np.int8)}, ["q.a", "(2, 5)", "(2, 6)"]),
    ("int8", {"q.a": np.ones(10, np.int8)}, ["q.a", "(2, 5)", "(10,)"]),
]


@pytest.mark.guarantee("G4")
@pytest.mark.parametrize(("dtype", "changes", "words"), HOSTILE_CODES)
def test_codes_and_scales_that_are_none_are_refused_by_name(
    dtype: str, changes: dict[str, Any], words: Sequence[str]
) -> None:
    outcome = admit(coded(dtype, **changes), assignment(wire_dtype=dtype), BLUEPRINT, num_examples=10)
    assert isinstance(outcome, Failure)
    assert outcome.kind == "refused"
    assert all(word in outcome.reason for word in words), outcome.reason


def test_codes_are_taken_only_where_they_were_asked_for() -> None:
    for sent, asked in (("int8", "bf16"), ("int4", "fp32"), ("int4", "int8")):
        assert isinstance(admit(coded(sent), assignment(wire_dtype=asked), BLUEPRINT, num_examples=10), Failure)
    assert isinstance(admit(update(), assignment(wire_dtype="int8"), BLUEPRINT, num_examples=10), Failure)
