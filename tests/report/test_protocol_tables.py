from __future__ import annotations

import math

from fedtune.report.protocol_tables import protocol_tables
from fedtune.report.protocols import Protocols, ToTarget, UnderBudget
from fedtune.report.robustness import Robustness
from fedtune.report.spread import Spread
from fedtune.report.time_to_target import Ratio
from fedtune.report.units import NOTHING

NONE, RATIO = Spread(math.nan, None), Ratio(math.nan, math.nan, math.nan)
CONTENT = Protocols(
    measure="loss",
    scored_on="test data",
    clock="devices",
    targets={0: 3.5, 1: 3.6},
    under_budget=(UnderBudget("joules", 1234.0, (Spread(3.5, 0.012), NONE)),),
    to_target=(
        ToTarget(
            "bytes", ({0: 10.0, 1: 30.0}, {0: None, 1: 9e6}), (Spread(20.0, 14.1), NONE), (Ratio(1.0, 0.9, 1.1), RATIO)
        ),
    ),
    robustness=(
        Robustness(Spread(0.125, None), Spread(4.0, 0.1), "", NONE),
        Robustness(NONE, NONE, "a", Spread(0.5, 0.25)),
    ),
)


def test_tables_say_what_is_known_and_a_dash_for_the_rest() -> None:
    tables = protocol_tables(["a", "b"], CONTENT)
    budget, target, robustness = tables.values()
    assert list(tables)[1] == "Cost per client until the loss is 3.500 to 3.600, by seed"
    assert budget.head == ["recipe", "within 1.23 kJ"]
    assert budget.rows == [["a", "3.500 ± 0.012"], ["b", NOTHING]]
    assert target.rows == [["a", "20 B ± 14 B", "1.00 (0.900 to 1.10)"], ["b", "1 of 2 seeds", NOTHING]]
    assert robustness.rows == [["a", "12.5 %", "4.000 ± 0.10", NOTHING], ["b", NOTHING, NOTHING, "50 % ± 25 % of a"]]


def test_without_an_evaluation_only_robustness_is_shown() -> None:
    empty = Protocols("loss", "", "devices", {}, robustness=CONTENT.robustness[:1])
    assert list(protocol_tables(["a"], empty)) == ["Robustness"]
