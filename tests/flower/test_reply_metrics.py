from __future__ import annotations

import math

import pytest
from flwr.app import MetricRecord, RecordDict

from fedtune.errors import WireError
from fedtune.flower.reply_metrics import examples_of, means, metrics_of


def content(**metrics: float) -> RecordDict:
    return RecordDict({"metrics": MetricRecord({key.replace("_", "-"): value for key, value in metrics.items()})})


def test_means_are_weighted_by_examples() -> None:
    record = means([content(num_examples=1, loss=4.0), content(num_examples=3, loss=2.0)], "num-examples")
    assert dict(record) == {"loss": 2.5}


def test_a_client_whose_loss_is_no_number_or_missing_does_not_hide_those_of_the_others() -> None:
    replies = [
        content(num_examples=1, loss=math.nan, seconds=math.inf),
        content(num_examples=1, loss=1.0),
        content(num_examples=3, loss=3.0),
        content(num_examples=9, other=1.0),
    ]
    assert dict(means(replies, "num-examples")) == {"loss": 2.5}


def test_a_mean_that_leaves_float64_is_left_out() -> None:
    assert (
        dict(means([content(num_examples=1, loss=1.5e308), content(num_examples=1, loss=1.5e308)], "num-examples"))
        == {}
    )


def test_clients_without_a_count_weigh_the_same() -> None:
    assert dict(means([content(loss=1.0), content(loss=2.0)], "num-examples")) == {"loss": 1.5}
    assert dict(means([content(num_examples=0, loss=1.0), content(num_examples=0, loss=2.0)], "num-examples")) == {
        "loss": 1.5
    }


def test_a_reply_has_one_record_of_metrics() -> None:
    with pytest.raises(WireError, match="expected one MetricRecord; got none"):
        metrics_of(RecordDict())
    two = RecordDict({"a": MetricRecord(), "b": MetricRecord()})
    with pytest.raises(WireError, match=r"got \['a', 'b'\]"):
        metrics_of(two)
    listed = RecordDict({"a": MetricRecord({"losses": [1.0, 2.0], "loss": 1.0})})
    assert dict(metrics_of(listed)) == {"loss": 1.0}


@pytest.mark.parametrize("count", [0, -1, 1.5, math.nan, math.inf, 2**60])
def test_a_count_of_examples_is_a_whole_number_above_zero(count: float) -> None:
    with pytest.raises(WireError, match="expected a whole number of examples above 0 as the metric 'n'"):
        examples_of({"n": count}, "n")


def test_a_count_may_be_written_as_a_float_and_must_be_there() -> None:
    assert examples_of({"n": 12.0}, "n") == 12
    with pytest.raises(WireError, match="'n'; got none"):
        examples_of({}, "n")
