"""What a strategy does with replies that are of no use, with arguments that are, and with what is saved."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtune.errors import ConfigError, FedtuneError
from fedtune.flower import FFA, FedEx, FedIT, FlexLoRA, FLoRA, HetLoRA
from fedtune.flower.lora_strategy import LoraStrategy
from fedtune.flower.peft_records import PeftState, to_record
from fedtune.store import peft
from tests.flower.conftest import NODE, MemoryGrid
from tests.flower.stock_app import NumpyClient, answer, first_state, grid_of

FIRST = "base_model.model.m.q.lora_A.weight"


def start(strategy: LoraStrategy, *clients: Any, rounds: int = 1, rank: int = 4) -> Any:
    return strategy.start(
        grid=grid_of(*clients), initial_arrays=to_record(first_state(rank)), num_rounds=rounds, timeout=1
    )


def left_out(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]


def with_array(name: str, array: Array) -> Callable[[PeftState, Message], RecordDict]:
    def reply(state: PeftState, message: Message) -> RecordDict:
        content = answer(state)
        content.array_records["arrays"][name] = array
        return content

    return reply


def changed(**factors: Any) -> Callable[[PeftState, Message], RecordDict]:
    def reply(state: PeftState, message: Message) -> RecordDict:
        key = next(iter(factors)).replace("__", ".")
        return answer(PeftState({**state.factors, key: factors[key.replace(".", "__")](state.factors[key])}, {}))

    return reply


NAN = np.array([[math.nan] * 10] * 4, np.float32)


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        (
            with_array(FIRST, Array(np.ones((4, 10)).astype(ml_dtypes.bfloat16))),
            "m.q.lora_A.weight: expected numbers of float32, float16, float64; got bfloat16; send tensor.float() of "
            "every tensor",
        ),
        (
            with_array("base_model.model.m.z.lora_A.weight", Array(np.ones((4, 10), np.float32))),
            "m.z: expected both factors lora_A and lora_B; got one of them",
        ),
        (
            with_array("base_model.model.score.weight", Array(np.ones((4, 10), np.float32))),
            "expected 0 modules_to_save; got 1: 0 missing, 1 extra; 'score.weight' was not asked for",
        ),
        (
            changed(m__q__a=lambda a: NAN),
            "m.q.a: expected finite numbers; got 40 of 40 that are not",
        ),
        (changed(m__q__a=lambda a: a[:, :9]), "m.q.a: expected shape (4, 10), b having rank 4; got (4, 9)"),
        (
            lambda state, message: answer(first_state(2)),
            "expected rank 4, as it was sent; got rank 2; name its rank in ranks, or let the client read "
            "config['lora-rank']",
        ),
        (
            lambda state, message: answer(PeftState(state.factors, {}, prefix="")),
            "expected names that begin with 'base_model.model.'; got 'm.q'",
        ),
        (
            lambda state, message: RecordDict({"metrics": MetricRecord({"num-examples": 1})}),
            "expected one ArrayRecord, 'arrays'; got none",
        ),
        (
            lambda state, message: RecordDict({"arrays": ArrayRecord(), "metrics": MetricRecord({"num-examples": 1})}),
            "expected 4 factors; got 0: 4 missing, 0 extra; 'm.q.a' is missing",
        ),
        (
            lambda state, message: RecordDict({"arrays": to_record(state)}),
            "expected one MetricRecord; got none",
        ),
        (
            lambda state, message: answer(state, examples=0),
            "expected a whole number of examples above 0 as the metric 'num-examples'; got 0",
        ),
        (
            changed(m__q__b=lambda b: b + np.float32(1e5)),
            "change, most of it in m.q: expected the change of the layers, b a, to have a norm of at most 1e+06",
        ),
        (lambda state, message: Error(2, "ValueError: out of rows"), "Flower error 2: ValueError: out of rows"),
        (lambda state, message: None, "expected a reply in time; got none"),
    ],
)
def test_a_reply_of_no_use_costs_its_client_the_round_and_no_other(
    caplog: pytest.LogCaptureFixture, reply: Callable[[PeftState, Message], Any], sentence: str
) -> None:
    clients = [NumpyClient(0), NumpyClient(1, reply=reply), NumpyClient(2)]
    strategy = FLoRA(alpha=16, fraction_evaluate=0.0)
    result = start(strategy, *clients)
    (line,) = left_out(caplog)
    assert line.startswith("fedtune: round 1: node-1 is left out: ")
    assert sentence in line
    assert "\n" not in line
    assert "rounds." not in line
    metrics = result.train_metrics_clientapp[1]
    assert (metrics["clients-used"], metrics["clients-left-out"]) == (2, 1)
    assert all(np.isfinite(factors.b).all() for factors in strategy.adapter.values())


def test_a_clients_words_are_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    hostile = with_array("base_model.model.x\nERROR \x1b[2J.lora_A.weight", Array(np.ones((4, 10), np.int8)))
    start(FLoRA(alpha=16, fraction_evaluate=0.0), NumpyClient(0), NumpyClient(1, reply=hostile), NumpyClient(2))
    (line,) = left_out(caplog)
    assert line.isprintable()


NAMES = st.sampled_from(["m.q.lora_A.weight", "m.q.lora_B.weight", "m.v.lora_A.weight", "m.v.lora_B.weight", "x", ""])
SHAPES = st.sampled_from([(4, 10), (12, 4), (9, 4), (0, 0), (1, 10), (12, 1), (4,), (), (2, 2, 2)])
NUMBERS = st.sampled_from([0.0, 1.0, -1e30, 3e38, math.inf, math.nan])


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    arrays=st.dictionaries(st.tuples(st.booleans(), NAMES), st.tuples(SHAPES, NUMBERS), max_size=5),
    dtype=st.sampled_from(["float32", "float16", "float64", "int32", "bool"]),
    metrics=st.dictionaries(st.sampled_from(["num-examples", "loss"]), st.floats() | st.integers(-3, 3), max_size=2),
    own=st.booleans(),
)
def test_no_reply_ends_the_round(arrays: Any, dtype: str, metrics: Any, own: bool) -> None:
    def reply(state: PeftState, message: Message) -> RecordDict:
        content = to_record(state)
        for (known, name), (shape, number) in arrays.items():
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # casts of what is no number
                array = np.full(shape, number).astype(dtype)
            content[("base_model.model." if known else "") + name] = Array(array)
        return RecordDict({"arrays": content, "metrics": MetricRecord(metrics)})

    strategy = FLoRA(alpha=16, ranks="own" if own else None, fraction_evaluate=0.0)
    hostile = NumpyClient(1, rank=4, reply=reply)
    result = start(strategy, NumpyClient(0, rank=4), hostile, NumpyClient(2, rank=4), rounds=2)
    assert result.train_metrics_clientapp[2]["clients-used"] >= 2
    assert all(np.isfinite(factors.b).all() and np.isfinite(factors.a).all() for factors in strategy.adapter.values())


def test_of_three_or_more_a_change_far_above_the_median_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    far = changed(m__q__b=lambda b: b + np.float32(50))
    start(FLoRA(alpha=16, fraction_evaluate=0.0), NumpyClient(0), NumpyClient(1, reply=far), NumpyClient(2))
    (line,) = left_out(caplog)
    assert "node-1 is left out: " in line
    assert "if it has trained as asked, set max_norm higher" in line
    caplog.clear()
    strategy = FLoRA(alpha=16, fraction_evaluate=0.0, max_norm=None)
    start(strategy, NumpyClient(0), NumpyClient(1, reply=far), NumpyClient(2))
    assert not left_out(caplog)


def test_a_client_counts_at_most_ten_times_the_median_unless_the_cap_is_off() -> None:
    def share(cap: float | None) -> float:
        clients = [NumpyClient(seed, examples=[1, 1, 100][seed]) for seed in range(3)]
        strategy = FedIT(alpha=4, weight_cap=cap, fraction_evaluate=0.0)
        result = start(strategy, *clients)
        ends = [client.sent[0].factors["m.q.b"] for client in clients]
        mean = result.arrays["base_model.model.m.q.lora_B.weight"].numpy()
        matrix = np.stack([end.ravel() for end in ends], axis=1)
        return float(np.linalg.lstsq(matrix, mean.ravel(), rcond=None)[0][2])

    assert share(10.0) == pytest.approx(10 / 12, abs=1e-4)
    assert share(None) == pytest.approx(100 / 102, abs=1e-4)


def test_too_few_usable_replies_leave_the_model_as_it_was_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    bad = NumpyClient(1, reply=lambda state, message: Error(2, "no"))
    strategy = FLoRA(alpha=16, min_updates=2, fraction_evaluate=0.0)
    result = start(strategy, NumpyClient(0), bad)
    assert left_out(caplog)[-1] == (
        "fedtune: round 1: expected at least 2 usable updates; got 1; the model stays as it was"
    )
    assert not result.train_metrics_clientapp
    assert not strategy.adapter


def test_a_round_without_a_usable_reply_names_the_reasons(caplog: pytest.LogCaptureFixture) -> None:
    bad = [NumpyClient(seed, reply=lambda state, message: answer(first_state(2))) for seed in range(2)]
    start(FLoRA(alpha=16, fraction_evaluate=0.0), *bad)
    assert left_out(caplog)[-1].endswith("expected at least one usable update; got none; the model stays as it was")


def test_the_run_goes_on_after_a_round_of_no_use() -> None:
    broken = NumpyClient(1)
    broken.reply = lambda state, message: Error(2, "no") if len(broken.got) == 1 else answer(state)
    strategy = FLoRA(alpha=16, min_updates=2, fraction_evaluate=0.0)
    result = start(strategy, NumpyClient(0), broken, rounds=2)
    assert list(result.train_metrics_clientapp) == [2]


def test_a_client_that_trained_the_frozen_a_is_left_out_by_ffa(caplog: pytest.LogCaptureFixture) -> None:
    start(FFA(alpha=16, fraction_evaluate=0.0), NumpyClient(0, train_a=False), NumpyClient(1))
    assert left_out(caplog) == [
        "fedtune: round 1: node-1 is left out: m.q: expected lora_A as it was sent, which this strategy freezes; got "
        "another; set requires_grad_(False) on every lora_A before training"
    ]


def test_a_client_that_holds_the_frozen_a_in_half_precision_is_taken() -> None:
    def halved(state: PeftState, message: Message) -> RecordDict:
        return answer(
            PeftState({key: array.astype(np.float16).astype(np.float32) for key, array in state.factors.items()}, {})
        )

    client = NumpyClient(0, train_a=False, reply=halved)
    result = start(FFA(alpha=16, fraction_evaluate=0.0), client, NumpyClient(1, train_a=False))
    assert result.train_metrics_clientapp[1]["clients-used"] == 2


def test_a_client_that_has_not_added_the_frozen_change_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    stock = NumpyClient(1, reply=lambda state, message: answer(state))
    result = start(FedEx(alpha=16, fraction_evaluate=0.0), NumpyClient(0), stock, rounds=2)
    assert [result.train_metrics_clientapp[number]["clients-used"] for number in (1, 2)] == [2, 1]
    (line,) = left_out(caplog)
    assert line.startswith("fedtune: round 2: node-1 is left out: expected 'frozen-digest' = ")
    assert line.endswith(
        "call fedtune.flower.add_frozen(model, msg.content) before training, and add what it returns to them"
    )


@pytest.mark.parametrize(
    ("strategy", "sentence"),
    [
        (HetLoRA(alpha=16, ranks="own"), "ranks: expected ranks that HetLoRA sends factors of; got 'own'; give ranks"),
        (FedIT(alpha=16, ranks={"node-0": 2}), "ranks: expected one rank for all clients of FedIT; got {'node-0': 2}"),
        (
            FLoRA(alpha=16, ranks={"node-0": 0}),
            "ranks: expected whole numbers of at least 1, one for all or by node name, or 'own'; got 0",
        ),
        (FLoRA(alpha=0), "alpha: expected a number above 0, the clients' lora_alpha; got 0"),
        (FLoRA(alpha=math.nan), "alpha: expected a number above 0, the clients' lora_alpha; got nan"),
        (FLoRA(alpha=16, max_norm=0.0), "max_norm: expected a number above 0, or None; got 0.0"),
    ],
)
def test_an_argument_of_no_use_is_refused_before_a_client_is_asked(strategy: LoraStrategy, sentence: str) -> None:
    client = NumpyClient(0)
    with pytest.raises(ConfigError) as refused:
        start(strategy, client, client)
    assert sentence in str(refused.value)
    assert not client.got


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        (ArrayRecord(), "initial_arrays: expected factors lora_A and lora_B of one rank; got no factors"),
        (ArrayRecord({"x.lora_A.weight": Array(np.ones((2, 2), np.float32))}), "initial_arrays: x: expected both"),
        (
            to_record(PeftState({**first_state(2).factors, "m.z.a": np.ones((3, 4)), "m.z.b": np.ones((4, 3))}, {})),
            "initial_arrays: expected factors lora_A and lora_B of one rank; got ranks [2, 3]",
        ),
    ],
)
def test_first_arrays_of_no_use_are_refused(arrays: ArrayRecord, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        FLoRA(alpha=16).start(grid=grid_of(), initial_arrays=arrays, num_rounds=1)
    assert sentence in str(refused.value)


def test_nothing_is_saved_before_a_run_has_begun(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a run that has begun; got none; call strategy\.start"):
        FLoRA(alpha=16).save(tmp_path / "x")


def test_every_round_is_saved_if_asked_as_a_peft_directory(tmp_path: Path) -> None:
    strategy = FLoRA(alpha=16, save_to=tmp_path, base="hub/name", task_type="SEQ_CLS", fraction_evaluate=0.0)
    start(strategy, NumpyClient(0), NumpyClient(1), rounds=2)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["round-0001", "round-0002"]
    adapter, _, facts = peft.read(tmp_path / "round-0002")
    assert set(adapter) == {"m.q", "m.v"}
    assert (facts["method"], facts["rounds"]) == ("flora", 2)
    target = peft.read_target(tmp_path / "round-0002")
    assert (target.base, target.task) == ("hub/name", "classification")


def test_modules_to_save_are_averaged_and_saved(tmp_path: Path) -> None:
    def whole(value: float) -> NumpyClient:
        head = {"score.weight": np.full((2, 3), value, np.float32)}
        return NumpyClient(int(value), reply=lambda state, message: answer(PeftState(state.factors, head)))

    first = PeftState(first_state(4).factors, {"score.weight": np.zeros((2, 3), np.float32)})
    strategy = FLoRA(alpha=16, fraction_evaluate=0.0)
    result = strategy.start(grid=grid_of(whole(1), whole(3)), initial_arrays=to_record(first), num_rounds=1, timeout=1)
    assert (result.arrays["base_model.model.score.weight"].numpy() == 2).all()
    strategy.save(tmp_path / "x")
    assert peft.read_target(tmp_path / "x").saved_modules == ["score"]


def test_what_a_client_needs_to_build_its_model_is_in_the_config() -> None:
    clients = [NumpyClient(0), NumpyClient(1)]
    strategy = FLoRA(alpha=lambda rank: 2 * rank, ranks={"node-1": 2}, fraction_evaluate=0.0)
    grid, arrays = grid_of(*clients), to_record(first_state(4))
    strategy.start(grid=grid, initial_arrays=arrays, num_rounds=2, timeout=1, train_config=ConfigRecord({"lr": 0.1}))
    assert clients[1].configs[1] == {"lr": 0.1, "server-round": 2, "lora-rank": 2, "lora-alpha": 4.0}
    assert clients[0].configs[0]["lora-rank"] == 4


def test_clients_of_their_own_rank_are_sent_no_factors_before_their_first_reply_and_then_theirs() -> None:
    clients = [NumpyClient(0, rank=2), NumpyClient(1, rank=4)]
    start(FlexLoRA(alpha=16, ranks="own"), *clients, rounds=2)
    assert [set(state.ranks.values()) for state in clients[0].got] == [set(), {2}]
    assert [set(state.ranks.values()) for state in clients[1].got] == [set(), {4}]


def test_a_client_whose_own_rank_differs_from_layer_to_layer_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    ragged = PeftState({**first_state(2).factors, **{k: v for k, v in first_state(3).factors.items() if "q" in k}}, {})
    odd = NumpyClient(1, rank=2, reply=lambda state, message: answer(ragged))
    start(FLoRA(alpha=16, ranks="own", fraction_evaluate=0.0), NumpyClient(0, rank=4), odd)
    (line,) = left_out(caplog)
    assert "node-1 is left out: m.v.b: expected shape (9, 3); got (9, 2)" in line


def test_a_client_cannot_choose_a_rank_that_no_layer_has_room_for(caplog: pytest.LogCaptureFixture) -> None:
    strategy = FLoRA(alpha=16, ranks="own", fraction_evaluate=0.0)
    start(strategy, NumpyClient(0, rank=10), NumpyClient(1, rank=11), rounds=2)
    reason = "expected a rank of at most 10, the smaller side of the widest layer; got 11"
    assert left_out(caplog) == [f"fedtune: round {number}: node-1 is left out: {reason}" for number in (1, 2)]


def test_a_client_of_a_rank_that_alpha_has_no_number_for_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    strategy = FLoRA(alpha=lambda rank: {4: 8.0}[rank], ranks="own", fraction_evaluate=0.0)
    result = start(strategy, NumpyClient(0, rank=4), NumpyClient(1, rank=3))
    assert left_out(caplog) == [
        "fedtune: round 1: node-1 is left out: alpha: expected a number above 0, the clients' lora_alpha of rank 3; "
        "got KeyError: 3"
    ]
    assert result.train_metrics_clientapp[1]["clients-used"] == 1


def test_an_array_of_an_impossible_shape_costs_its_client_alone(caplog: pytest.LogCaptureFixture) -> None:
    head = b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"1, " * 65 + b")}\n"
    data = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + bytes(4)
    reply = with_array(FIRST, Array("float32", (1,), "numpy.ndarray", data))
    start(FLoRA(alpha=16, fraction_evaluate=0.0), NumpyClient(0), NumpyClient(1, reply=reply), NumpyClient(2))
    assert "node-1 is left out: m.q.lora_A.weight: expected the shape of an array; got (1, 1" in left_out(caplog)[0]


def test_evaluation_asks_for_what_the_next_training_starts_from() -> None:
    seen = dict[str, Any]()

    class Evaluating(NumpyClient):
        def __call__(self, message: Message) -> Any:
            if message.metadata.message_type == "evaluate":
                seen.update(message.content.config_records["config"])
            return super().__call__(message)

    result = start(FLoRA(alpha=16), Evaluating(0), Evaluating(4))
    assert result.evaluate_metrics_clientapp[1]["eval_loss"] == 2.0
    assert seen["lora-rank"] == 4


def test_an_evaluation_that_fails_is_named_and_the_others_count(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(NumpyClient):
        def __call__(self, message: Message) -> Any:
            kind = message.metadata.message_type
            return RecordDict() if kind == "evaluate" else super().__call__(message)

    result = start(FLoRA(alpha=16), NumpyClient(3), Broken(0))
    assert result.evaluate_metrics_clientapp[1]["eval_loss"] == 3.0
    assert "node-1 is left out: expected one MetricRecord; got none" in left_out(caplog)[0]


def test_metrics_may_be_averaged_by_functions_of_the_users_own() -> None:
    def count(contents: list[RecordDict], key: str) -> MetricRecord:
        return MetricRecord({"replies": len(contents)})

    strategy = FLoRA(alpha=16, train_metrics_aggr_fn=count, evaluate_metrics_aggr_fn=count)
    result = start(strategy, NumpyClient(0), NumpyClient(1))
    assert result.train_metrics_clientapp[1]["replies"] == 2
    assert dict(result.evaluate_metrics_clientapp[1]) == {"replies": 2}


def test_bytes_are_those_of_the_arrays() -> None:
    result = start(FLoRA(alpha=16, fraction_evaluate=0.0), NumpyClient(0), NumpyClient(1))
    size = sum(len(array.data) for array in to_record(first_state(4)).values())
    metrics = result.train_metrics_clientapp[1]
    assert (metrics["bytes-down"], metrics["bytes-up"]) == (2 * size, 2 * size)


def test_a_reply_is_matched_by_the_message_that_it_answers_and_counted_once() -> None:
    clients = [NumpyClient(seed) for seed in range(2)]
    strategy = FLoRA(alpha=16)
    grid = grid_of(*clients)
    messages = list(strategy.configure_train(1, to_record(first_state(4)), ConfigRecord(), grid))
    replies = list(grid.send_and_receive(messages))
    stray = Message(answer(first_state(4)), reply_to=replies[0])
    _, metrics = strategy.aggregate_train(1, [*replies, replies[0], stray])
    assert metrics is not None
    assert (metrics["clients-used"], metrics["clients-left-out"]) == (2, 0)


def test_fewer_clients_may_be_drawn_than_there_are() -> None:
    clients = [NumpyClient(seed) for seed in range(4)]
    start(FLoRA(alpha=16, fraction_train=0.5, min_available_nodes=4, fraction_evaluate=0.0), *clients, rounds=3)
    assert sum(len(client.got) for client in clients) == 6


def test_a_second_run_of_one_strategy_begins_anew() -> None:
    strategy, results = FLoRA(alpha=16, ranks={"node-1": 2}, fraction_evaluate=0.0), []
    for first in (0, 7):
        # In a simulation the ids of the nodes are others each time.
        grid = MemoryGrid({NODE + first + place: NumpyClient(place) for place in range(2)})
        arrays = to_record(first_state(4))
        results.append(strategy.start(grid=grid, initial_arrays=arrays, num_rounds=1, timeout=1).arrays)
    assert results[0][FIRST].data == results[1][FIRST].data


def test_a_rank_of_a_node_that_is_not_there_is_noted(caplog: pytest.LogCaptureFixture) -> None:
    start(FLoRA(alpha=16, ranks={"anne": 2}, fraction_evaluate=0.0), NumpyClient(0), NumpyClient(1), rounds=2)
    assert left_out(caplog) == ["fedtune: ranks names the node 'anne', which is not here (node-0, node-1)"]


def test_nodes_that_do_not_connect_end_the_run_with_a_sentence() -> None:
    strategy = FLoRA(alpha=16, patience_s=0.0)
    with pytest.raises(FedtuneError, match="expected at least 2 nodes within 0 s; got 1"):
        strategy.start(grid=MemoryGrid({NODE: NumpyClient(0)}), initial_arrays=to_record(first_state(4)), num_rounds=1)
