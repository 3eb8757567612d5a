"""The metrics of clients' replies: read with care, and averaged over those whose updates are used."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from flwr.app import MetricRecord, RecordDict

from fedtune.errors import WireError


def metrics_of(content: RecordDict) -> Mapping[str, float]:
    """Return the numbers of a reply's one MetricRecord; lists are left out.

    Raises:
        WireError: if there is none, or several.
    """
    records = dict(content.metric_records)
    if len(records) != 1:
        raise WireError(f"expected one MetricRecord; got {sorted(records)[:5] or 'none'}")
    (record,) = records.values()
    return {key: value for key, value in record.items() if isinstance(value, int | float)}


def examples_of(metrics: Mapping[str, float], key: str) -> int:
    """Return how many examples a client has trained on.

    Raises:
        WireError: if its metrics do not say so, or it is no whole number above 0.
    """
    count = metrics.get(key)
    if count is None or not math.isfinite(count) or count != int(count) or not 1 <= count < 2**53:
        got = "none" if count is None else f"{count}"
        raise WireError(f"expected a whole number of examples above 0 as the metric {key!r}; got {got}")
    return int(count)


def means(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """Return the weighted means of the metrics that more than half of the clients state, over their finite numbers.

    So one client hides no loss of the others by one that is no number, and adds no names of its own.
    """
    metrics = [metrics_of(content) for content in contents]
    weights = [max(0.0, float(one.get(weighted_by_key, 1.0))) for one in metrics]
    if not all(map(math.isfinite, weights)) or not sum(weights):
        weights = [1.0] * len(metrics)
    record = MetricRecord()
    stated_by = Counter(key for one in metrics for key in one if key != weighted_by_key)
    for key in sorted(key for key, count in stated_by.items() if 2 * count > len(metrics)):
        pairs = zip(weights, metrics, strict=True)
        stated = [(weight, one[key]) for weight, one in pairs if math.isfinite(one.get(key, math.nan))]
        total = sum(weight for weight, _ in stated)
        mean = sum(weight * number for weight, number in stated) / total if total else math.nan
        if math.isfinite(mean):
            record[key] = float(mean)
    return record
