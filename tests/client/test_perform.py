from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.client import perform as perform_module
from fedtune.data.encode import Example
from fedtune.directions import sampling
from fedtune.directions.consistency import sample_places
from fedtune.directions.downlink import count_scalars
from fedtune.errors import ClientError, ConfigError, ShapeError, WireError
from fedtune.lora.adapter import draw_a
from fedtune.messages import (
    AdmittedUpdate,
    Assignment,
    ClientUpdate,
    Plan,
    PlannedClient,
    Preference,
    ProbeResult,
    Proximal,
    TailRank,
    Training,
    TrainLora,
)
from fedtune.methods import fedkseed
from fedtune.methods.fedkseed_state import FedKSeedSettings, FedKSeedState
from fedtune.model.base import Base, digest, load, load_tokenizer
from fedtune.model.settings import AdapterSettings, ModelSettings
from fedtune.model.shares import ALONE, Shares
from fedtune.probing.replica import Replicas
from fedtune.seeds import derive
from fedtune.tensors import Tensors, l2_norm
from fedtune.wire.codec import decode_assignment, encode_assignment
from tests.model.test_shares import pair

__all__ = ["pair"]

TRAINING = Training(batch=2, learning_rate=0.05, steps=4)

perform = partial(perform_module.perform, threads=1)


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
        task=TrainLora(a_key=5, **local, blobs={"saved": base.saved_tensors()} if blobs is None else blobs),
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
    assert (update.client, update.round, update.num_examples, update.lora.base) == ("ann", 3, 5, base.digest)
    assert update.lora.tensors.keys() == {f"{name}.{side}" for name in base.modules for side in "ab"}
    assert all(array.dtype.name == "bfloat16" for array in update.lora.tensors.values())
    assert update.lora.saved["lm_head.weight"].dtype == np.float32
    assert not np.array_equal(update.lora.saved["lm_head.weight"], base.saved_tensors()["lm_head.weight"])
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
    np.testing.assert_allclose(update.lora.tensors[f"{name}.b"], b, rtol=1e-6)
    np.testing.assert_array_equal(update.lora.tensors[f"{name}.a"], draw_a(5, name, 4, 32))


def test_differences_of_an_untrained_client_are_zero(base: Base, rows: list[Example]) -> None:
    still = replace(
        assignment(base, upload="difference"), plan=Plan("ann", 4, 2.0, replace(TRAINING, learning_rate=1e-30))
    )
    assert max(float(np.abs(array).max()) for array in perform(base, rows, still).lora.tensors.values()) < 1e-25


def test_differences_and_factors_describe_the_same_end(base: Base, rows: list[Example]) -> None:
    factors = perform(base, rows, assignment(base, wire_dtype="fp32")).lora.tensors
    difference = perform(base, rows, assignment(base, wire_dtype="fp32", upload="difference")).lora.tensors
    for name in base.modules:
        start = draw_a(5, name, 4, base.modules[name][1])
        np.testing.assert_allclose(factors[f"{name}.a"], start + difference[f"{name}.a"], atol=1e-6)
        np.testing.assert_allclose(factors[f"{name}.b"], difference[f"{name}.b"], atol=1e-6)


def test_only_b_travels_where_only_b_is_trained(base: Base, rows: list[Example]) -> None:
    update = perform(base, rows, assignment(base, train="b"))
    assert update.lora.tensors.keys() == {f"{name}.b" for name in base.modules}


def test_the_same_assignment_gives_the_same_bits_whoever_worked_before(base: Base, rows: list[Example]) -> None:
    first = perform(base, rows, assignment(base))
    perform(base, rows, replace(assignment(base), seed=12))
    second = perform(base, rows, assignment(base))
    for name, array in first.lora.tensors.items():
        np.testing.assert_array_equal(array, second.lora.tensors[name])


def test_another_base_is_refused_by_name(base: Base, rows: list[Example]) -> None:
    with pytest.raises(ClientError, match="ann: expected base 123; has "):
        perform(base, rows, replace(assignment(base), base="123"))


def with_ranks(base: Base, ranks: tuple[int, ...], **local: Any) -> Assignment:
    asked = assignment(base, wire_dtype="fp32", **local)
    return replace(asked, plan=replace(asked.plan, ranks=ranks))


@pytest.mark.parametrize("upload", ["factors", "difference"])
def test_only_modules_of_a_rank_are_trained_and_sent(base: Base, rows: list[Example], upload: Any) -> None:
    names = sorted(base.modules)
    ranks = (0, 0, 4, 2)
    sent = perform(base, rows, with_ranks(base, ranks, upload=upload)).lora.tensors
    expected = {f"{name}.{side}" for name, rank in zip(names, ranks, strict=True) if rank for side in "ab"}
    assert sent.keys() == expected
    assert [sent[f"{name}.b"].shape[1] for name in names[2:]] == [4, 2]
    assert all(np.abs(sent[f"{name}.b"]).max() > 0 for name in names[2:])
    assert digest(base.model) == base.digest


def test_a_frozen_change_of_a_module_that_is_not_trained_takes_part(base: Base, rows: list[Example]) -> None:
    rng = np.random.default_rng(0)
    blob = {f"{Q}.a": rng.standard_normal((2, 32), np.float32), f"{Q}.b": rng.standard_normal((32, 2), np.float32)}
    with_it, without = (
        perform(base, rows, with_ranks(base, (0, 0, 4, 4), blobs=blobs)).measured.loss_before
        for blobs in ({"global": blob}, {})
    )
    assert with_it is not None
    assert without is not None
    assert abs(with_it - without) > 1e-3


def test_ranks_and_factors_that_do_not_fit_the_base_are_refused_before_training(
    base: Base, rows: list[Example]
) -> None:
    with pytest.raises(ShapeError, match="ranks: expected one for each of 4 modules, the largest 4; got 3"):
        perform(base, rows, with_ranks(base, (0, 4, 4)))
    start = {f"{Q}.a": np.zeros((2, 32), np.float32), f"{Q}.b": np.zeros((32, 2), np.float32)}
    with pytest.raises(ShapeError, match=f"{Q}.a: expected factors .a and .b of modules that get an adapter"):
        perform(base, rows, with_ranks(base, (0, 0, 4, 4), blobs={"local": start}))
    with pytest.raises(ShapeError, match="at most rank 1"):
        perform(base, rows, with_ranks(base, (1, 0, 4, 4), blobs={"local": start}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"view": "deployed"}, "an adapter of the deployed model alone"),
    ],
)
def test_what_a_client_does_not_do_yet_is_refused_and_not_left_out(
    base: Base, rows: list[Example], changes: dict[str, Any], words: str
) -> None:
    asked = assignment(base)
    with pytest.raises(ClientError, match=f"ann: expected a plan that this client can follow; got {words}"):
        perform(base, rows, replace(asked, plan=replace(asked.plan, **changes)))


def over(order: Assignment, dtype: str, **changes: Any) -> Assignment:
    return replace(order, plan=replace(order.plan, base_dtype=dtype, **changes))  # type: ignore[arg-type]


def test_a_plan_s_number_format_is_trained_over_and_stated(base: Base, rows: list[Example]) -> None:
    before, plain = digest(base.model), perform(base, rows, assignment(base))
    assert (plain.lora.base_dtype, plain.lora.codes) == ("", b"")
    updates = {dtype: perform(base, rows, over(assignment(base), dtype)) for dtype in ("nf4", "int8")}
    for dtype, update in updates.items():
        assert (update.lora.base_dtype, len(update.lora.codes)) == (dtype, perform_module.CODES_BYTES)
        # Of the unquantised base: clients of all formats train one model.
        assert update.lora.base == plain.lora.base
        assert any(not np.array_equal(array, plain.lora.tensors[name]) for name, array in update.lora.tensors.items())
    assert updates["nf4"].lora.codes != updates["int8"].lora.codes
    again = perform(base, rows, over(assignment(base), "nf4"))
    for name, array in updates["nf4"].lora.tensors.items():
        np.testing.assert_array_equal(array, again.lora.tensors[name])
    assert digest(base.model) == before
    after = perform(base, rows, assignment(base))
    np.testing.assert_array_equal(after.lora.tensors[f"{Q}.b"], plain.lora.tensors[f"{Q}.b"])


def test_a_base_loaded_as_codes_trains_as_the_variant_of_a_whole_one(
    base: Base, rows: list[Example], checkpoints: dict[str, Path]
) -> None:
    settings = ModelSettings(base=str(checkpoints["llama"]), device="cpu", dtype="nf4")
    adapter = AdapterSettings(rank=4, targets=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    codes = load(settings, adapter, tokenizer=base.tokenizer, root=Path(), seed=0)
    ours, theirs = perform(codes, rows, assignment(base)), perform(base, rows, over(assignment(base), "nf4"))
    assert replace(ours.lora, tensors={}, saved={}) == replace(theirs.lora, tensors={}, saved={})
    for name, array in ours.lora.tensors.items():
        np.testing.assert_array_equal(array, theirs.lora.tensors[name])
    with pytest.raises(ClientError, match="expected a plan over nf4, of which alone this client holds codes; got int8"):
        perform(codes, rows, over(assignment(base), "int8"))


def test_a_plan_that_prunes_codes_is_refused(base: Base, rows: list[Example]) -> None:
    with pytest.raises(ClientError, match="ann: expected a plan that prunes no codes; got one over a base in nf4"):
        perform(base, rows, over(assignment(base), "nf4", ratio=0.5))


def test_backward_passes_through_a_part_learn_from_the_whole_model(base: Base, rows: list[Example]) -> None:
    asked = assignment(base, wire_dtype="fp32")
    whole, part, again = (
        perform(base, rows, replace(asked, plan=replace(asked.plan, back=back))) for back in (0.0, 0.5, 0.5)
    )
    assert part.measured.loss_before == whole.measured.loss_before
    assert part.measured.loss_before is not None
    assert part.measured.loss_after is not None
    assert part.measured.loss_after < part.measured.loss_before
    for name, tensor in part.lora.tensors.items():
        np.testing.assert_array_equal(tensor, again.lora.tensors[name])
    b = f"{Q}.b"
    assert np.abs(part.lora.tensors[b] - whole.lora.tensors[b]).max() > 0.01 * np.abs(whole.lora.tensors[b]).max()
    assert digest(base.model) == base.digest


def test_windows_of_the_backward_pass_are_drawn_for_steps_and_not_for_batches(base: Base, rows: list[Example]) -> None:
    asked = assignment(base, wire_dtype="fp32")

    def learned(batch: int, accumulation: int, back: float = 0.5) -> Tensors:
        training = replace(TRAINING, batch=batch, accumulation=accumulation, steps=3, optimizer="sgd")
        plan = replace(asked.plan, training=training, back=back)
        return perform(base, rows[:4], replace(asked, plan=plan)).lora.tensors

    joined, parts = learned(4, 1), learned(1, 4)
    for name, tensor in joined.items():
        np.testing.assert_allclose(parts[name], tensor, atol=1e-5, rtol=1e-4)
    assert any(np.abs(tensor - learned(4, 1, back=0.0)[name]).max() > 1e-3 for name, tensor in joined.items())


def test_processes_of_one_client_go_back_through_the_same_windows(
    pair: tuple[Shares, Shares], loaded: Callable[..., Base], examples: Callable[[int], list[Example]]
) -> None:
    rows, bases = examples(6), [loaded() for _ in range(3)]

    def learn(base: Base, shares: Shares) -> Tensors:
        asked = assignment(base, wire_dtype="fp32")
        asked = replace(asked, plan=replace(asked.plan, back=0.5))
        return perform_module.train_adapter(base, rows, asked, asked.lora, shares=shares).lora.tensors

    alone = learn(bases[0], ALONE)
    with ThreadPoolExecutor(2) as pool:
        ours, theirs = pool.map(learn, bases[1:], pair)
    for name, tensor in alone.items():
        np.testing.assert_array_equal(ours[name], theirs[name])
        np.testing.assert_allclose(ours[name], tensor, atol=1e-4, rtol=0)


def test_a_base_without_heads_and_channels_refuses_to_leave_some_out(
    loaded: Callable[..., Base], examples: Callable[[int], list[Example]]
) -> None:
    base = loaded()
    base.model.config.model_type = "phi3"
    asked = assignment(base)
    with pytest.raises(ClientError, match=r"heads and channels: .*'phi3'.*fewer steps \(share\) in place of back"):
        perform(base, examples(3), replace(asked, plan=replace(asked.plan, back=0.5)))


def test_examples_are_not_packed_for_a_model_that_would_mix_them(
    base: Base, rows: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    order = assignment(base)
    plan = replace(order.plan, training=replace(order.plan.training, packing=True))
    packed = replace(order, plan=plan)
    assert perform(replace(base), rows, packed).measured.tokens == perform(base, rows, order).measured.tokens
    monkeypatch.setattr("fedtune.model.base.packs", lambda *args: False)
    with pytest.raises(ConfigError, match=r"client\.packing: expected .* within the examples of a row.*than alone"):
        perform(replace(base), rows, packed)


def test_a_penalised_tail_shrinks_the_rank(base: Base, rows: list[Example]) -> None:
    plan = Plan("ann", 4, 2.0, replace(TRAINING, steps=10))
    b = {f"{name}.b": np.full((m, 4), 0.1, np.float32) for name, (m, _) in base.modules.items()}
    blobs = {"local": b, "saved": base.saved_tensors()}
    heavy = replace(assignment(base, blobs=blobs, terms=(TailRank(50.0, 0.5),)), plan=plan)
    assert {
        update.shape[1] for name, update in perform(base, rows, heavy).lora.tensors.items() if name.endswith(".b")
    } == {2}
    off = replace(assignment(base, blobs=blobs), plan=plan)
    assert {
        update.shape[1] for name, update in perform(base, rows, off).lora.tensors.items() if name.endswith(".b")
    } == {4}


def test_a_proximal_term_travels_and_keeps_a_client_near_its_start(base: Base, rows: list[Example]) -> None:
    ends = {}
    for terms in ((), (Proximal(1e-9),), (Proximal(50.0),)):
        sent = encode_assignment(assignment(base, upload="difference", wire_dtype="fp32", terms=terms))
        update = perform(base, rows, decode_assignment(sent.header, sent.blobs))
        head = update.lora.saved["lm_head.weight"] - base.saved_tensors()["lm_head.weight"]
        ends[terms] = l2_norm({**update.lora.tensors, "head": head})
    free, loose, tight = ends.values()
    assert loose == pytest.approx(free, rel=1e-3)
    assert 0 < tight < 0.7 * free


@pytest.fixture
def compared(rows: list[Example]) -> list[Example]:
    """The same rows, each with another one's answer as the rejected one."""
    order = [*rows[1:], rows[0]]
    return [replace(row, rejected=replace(other, rejected=None)) for row, other in zip(rows, order, strict=True)]


def test_answers_are_compared_with_the_base_alone_whatever_was_received(base: Base, compared: list[Example]) -> None:
    """A change that was received is no part of the reference: only without any does a round start at log 2."""
    frozen = {f"{Q}.a": np.ones((2, 32), np.float32), f"{Q}.b": np.full((32, 2), 0.05, np.float32)}
    before = {}
    for role in ("none", "global", "local"):
        blobs = {} if role == "none" else {role: frozen if role == "global" else {f"{Q}.b": frozen[f"{Q}.b"]}}
        sent = encode_assignment(assignment(base, blobs=blobs, wire_dtype="fp32", terms=(Preference(0.5),)))
        update = perform(base, compared, decode_assignment(sent.header, sent.blobs))
        first, last = update.measured.loss_before, update.measured.loss_after
        assert first is not None
        assert last is not None
        before[role] = first
        assert last < first
        # Five pairs are reached by four steps of two, and one of them is a loss's row: each once, both answers.
        assert update.measured.side_tokens == (5 + 1) * 2 * 9
        assert update.measured.tokens == 2 * (4 * 2 * 9 - 9)
    assert before["none"] == pytest.approx(np.log(2), abs=1e-6)
    assert abs(before["global"] - np.log(2)) > 1e-3
    assert abs(before["local"] - np.log(2)) > 1e-3
    assert digest(base.model) == base.digest


def test_processes_of_one_client_compare_the_same_answers(
    pair: tuple[Shares, Shares], loaded: Callable[..., Base], compared: list[Example]
) -> None:
    bases = [loaded() for _ in range(3)]

    def learn(base: Base, shares: Shares) -> Tensors:
        asked = assignment(base, wire_dtype="fp32", terms=(Preference(0.5),))
        return perform_module.train_adapter(base, compared, asked, asked.lora, shares=shares).lora.tensors

    alone = learn(bases[0], ALONE)
    with ThreadPoolExecutor(2) as pool:
        ours, theirs = pool.map(learn, bases[1:], pair)
    for name, tensor in alone.items():
        np.testing.assert_array_equal(ours[name], theirs[name])
        np.testing.assert_allclose(ours[name], tensor, atol=1e-4, rtol=0)


def test_an_order_that_compares_answers_and_rows_that_do_not_fit_it_are_refused_by_name(
    base: Base, rows: list[Example], compared: list[Example]
) -> None:
    asked = assignment(base, terms=(Preference(0.5),))
    with pytest.raises(ClientError, match="ann: expected rows with a rejected answer"):
        perform(base, rows, asked)
    with pytest.raises(ClientError, match="ann: expected rows of one answer"):
        perform(base, compared, assignment(base))
    packed = replace(asked.plan, training=replace(TRAINING, packing=True))
    with pytest.raises(ClientError, match="answers that are compared in packed rows"):
        perform(base, compared, replace(asked, plan=packed))
    with pytest.raises(ClientError, match="answers that are compared in a pruned model"):
        perform(base, compared, replace(asked, plan=replace(asked.plan, ratio=0.5)))


def test_seeds_are_not_probed_on_rows_of_two_answers(base: Base, compared: list[Example]) -> None:
    _, asked = probed(base)
    with pytest.raises(ClientError, match="ann: expected rows of one answer"):
        perform(base, compared, asked)


Asked = tuple[FedKSeedState, Assignment]


def probed(base: Base, *, steps: int = 8, state: FedKSeedState | None = None, **settings: Any) -> Asked:
    """Return a state whose model has moved already, and what the server tells ann in it."""
    if state is None:
        chosen = FedKSeedSettings(**{"seeds": 16, "scalar_step": 2.0**-12, "clip": "none", **settings})
        state = fedkseed.init(base.blueprint(max_rank=1, seed=0, whole=True), chosen)
        sums = np.random.default_rng(0).integers(-60, 61, 16).astype(np.int32)
        state = replace(state, accumulators={"a": sums}, round=5)
    return state, fedkseed.assign(state, 0, planned(steps))


def planned(steps: int = 8) -> PlannedClient:
    return PlannedClient(Plan("ann", 1, 1.0, Training(batch=2, learning_rate=0.01, steps=steps)))


def measured(update: ClientUpdate) -> ProbeResult:
    return update.probe


BANKS: list[dict[str, Any]] = [
    {"bank": "hadamard"},
    {"bank": "gaussian"},
    {"bank": "kron"},
    {"bank": "kron", "vectors": True, "embeddings": True},
    {"bank": "hadamard", "trainable": ("*.mlp.*", "lm_head.weight")},
]


@pytest.mark.parametrize("settings", BANKS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_a_probe_states_what_the_server_finds_for_itself_and_leaves_the_base_as_it_was(
    settings: dict[str, Any], base: Base, rows: list[Example]
) -> None:
    state, asked = probed(base, **settings)
    update = perform(base, rows, asked)
    found = measured(update)
    assert (update.client, update.round, update.num_examples) == ("ann", 6, 5)
    assert (found.state, found.checks) == (state.digest[:8], state.checks)
    assert len(found.checks) == 16
    assert fedkseed.refuse(state, AdmittedUpdate(update)) == ""
    assert (found.scalars.shape, found.scalars.dtype.name, found.skipped, found.rms) == ((8,), "int8", 0, None)
    assert np.count_nonzero(found.scalars) > 4
    assert update.measured.tokens == 2 * (8 * 2 * 9 - 2 * 9)  # twice forward; of eight batches two are short
    assert digest(base.model) == base.digest


@pytest.mark.parametrize("settings", BANKS[:3], ids=lambda settings: settings["bank"])
def test_what_one_client_alone_sends_moves_the_server_s_sums_as_it_moved_its_own(
    settings: dict[str, Any], base: Base, rows: list[Example]
) -> None:
    state, asked = probed(base, **settings)
    scalars = measured(perform(base, rows, asked)).scalars
    drawn = sampling.sample_uniform(derive(asked.seed, "fedkseed.ids"), 8, 16)
    after = fedkseed.aggregate(state, [AdmittedUpdate(perform(base, rows, asked))])
    np.testing.assert_array_equal(after.sums - state.sums, count_scalars(drawn, scalars, 16) << asked.probe.shift)


def test_checks_of_other_displacements_are_refused_with_the_tensor(base: Base, rows: list[Example]) -> None:
    state, asked = probed(base)
    update = perform(base, rows, asked)
    wrong = bytearray(measured(update).checks)
    wrong[4] ^= 1
    planted = replace(update, result=replace(measured(update), checks=bytes(wrong)))
    name = state.manifest.entries[sample_places(state.digest, state.manifest, state.trainable)[1][0]].name
    assert f"expected the displacements of {name}, block" in fedkseed.refuse(state, AdmittedUpdate(planted))


def test_a_probe_that_calibrates_tells_a_size_and_no_scalars(base: Base, rows: list[Example]) -> None:
    chosen = FedKSeedSettings(seeds=16)
    state = fedkseed.init(base.blueprint(max_rank=1, seed=0, whole=True), chosen)
    update = perform(base, rows, probed(base, state=state)[1])
    found = measured(update)
    assert len(found.scalars) == 0
    assert found.rms is not None
    assert 0 < found.rms < 10
    assert fedkseed.refuse(state, AdmittedUpdate(update)) == ""
    assert update.measured.tokens == 2 * (16 * 2 * 9 - 5 * 9)  # sixteen scalars, whatever the steps
    assert fedkseed.aggregate(state, [AdmittedUpdate(update)]).calibrated


def rounds_of(base: Base, rows: list[Example], replicas: Replicas) -> Asked:
    """Return the third round's state and order after two rounds of ann alone: the first that refers to what she has."""
    state, asked = probed(base)
    state = replace(state, accumulators={"a": np.zeros(16, np.int32)}, round=0)
    for _ in range(2):
        update = perform(base, rows, probed(base, state=state)[1], replicas=replicas)
        state = fedkseed.aggregate(state, [AdmittedUpdate(update)])
    state, asked = probed(base, state=state)
    assert (asked.probe.state.form, asked.probe.state.since) == ("changed", 1)
    return state, asked


def test_who_has_lost_what_an_order_refers_to_asks_for_the_whole_and_measures_nothing(
    base: Base, rows: list[Example]
) -> None:
    replicas = Replicas()
    state, asked = rounds_of(base, rows, replicas)
    for forgetful in (None, Replicas()):
        update = perform(base, rows, asked, replicas=forgetful)
        assert measured(update).lost
        assert (len(measured(update).scalars), measured(update).state, update.measured.tokens) == (0, b"", 0)
    kept = perform(base, rows, asked, replicas=replicas)
    assert not measured(kept).lost
    whole = fedkseed.assign_whole(state, 0, planned())
    assert whole is not None
    again = perform(base, rows, whole)
    assert fedkseed.refuse(state, AdmittedUpdate(again)) == fedkseed.refuse(state, AdmittedUpdate(kept)) == ""
    np.testing.assert_array_equal(measured(again).scalars, measured(kept).scalars)


def test_a_memory_that_is_another_than_the_server_s_counts_as_lost(base: Base, rows: list[Example]) -> None:
    replicas = Replicas()
    state, asked = rounds_of(base, rows, replicas)
    ledger = replace(state.ledger, round=1, accumulators=np.full(16, 7, np.int32))
    replicas.store(ledger)
    assert measured(perform(base, rows, asked, replicas=replicas)).lost


def test_another_base_than_the_seeds_were_measured_on_is_refused(base: Base, rows: list[Example]) -> None:
    _, asked = probed(base)
    other = load(
        ModelSettings(base=base.path, dtype="bfloat16", device="cpu"),
        AdapterSettings(rank=1, targets=["all-linear"]),
        tokenizer=base.tokenizer,
        root=Path(),
        seed=0,
    )
    with pytest.raises(WireError, match=r"expected the state .* of this base and what came; load the same model"):
        perform(other, rows, asked)


def test_a_client_that_probed_trains_an_adapter_as_one_that_did_not(base: Base, rows: list[Example]) -> None:
    first = perform(base, rows, assignment(base))
    for settings in BANKS:
        perform(base, rows, probed(base, **settings)[1])
    second = perform(base, rows, assignment(base))
    for name, array in first.lora.tensors.items():
        np.testing.assert_array_equal(array, second.lora.tensors[name])


def test_a_client_without_examples_cannot_probe(base: Base) -> None:
    with pytest.raises(ClientError, match="ann: expected at least one training example"):
        perform(base, [], probed(base)[1])
    assert digest(base.model) == base.digest


@pytest.mark.parametrize("importance", ["gain", "svd"])
def test_modules_are_scored_where_the_plan_asks_for_it(importance: Any, base: Base, rows: list[Example]) -> None:
    plain = assignment(base)
    asked = replace(plain, plan=replace(plain.plan, importance=importance))
    update, other = perform(base, rows, asked), perform(base, rows, plain)
    shares = update.measured.module_importance
    assert len(shares) == len(base.modules)
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert len(set(shares)) > 1
    # Measuring leaves the training as it is, to the last bit, and is on the client's bill.
    assert all(np.array_equal(update.lora.tensors[name], tensor) for name, tensor in other.lora.tensors.items())
    assert (other.measured.module_importance, other.measured.side_tokens) == ((), 0)
    assert update.measured.side_tokens == 2 * 5 * 9
