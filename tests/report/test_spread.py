from __future__ import annotations

import math

from fedtune.report.spread import Spread, mean_and_spread


def test_what_no_seed_measured_has_no_mean() -> None:
    assert math.isnan(mean_and_spread([math.nan]).mean)
    assert mean_and_spread([math.nan, 2.0]) == Spread(2.0, None)


def test_equal_numbers_have_no_deviation_of_rounding() -> None:
    assert mean_and_spread([0.1] * 3) == Spread(0.1, 0.0)
