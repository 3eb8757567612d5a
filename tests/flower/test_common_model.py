from __future__ import annotations

from dataclasses import replace

import pytest

from fedtune.flower.common_model import CommonModel
from fedtune.wire.profile import ModelSpec

SPEC = ModelSpec("ab" * 32, {"layer.q": (4, 6)}, labels=("no", "yes"))


def test_a_pinned_base_holds_whoever_comes_first() -> None:
    common = CommonModel(base="cd" * 32)
    assert "expected the base cdcdcdcdcdcd; got abababababab" in common.find_fault(SPEC, asked=False)
    pinned = list[str]()
    free = CommonModel(on_base=pinned.append)
    assert free.find_fault(SPEC, asked=False) == ""
    free.take(SPEC)
    free.take(replace(SPEC, base="cd" * 32))
    assert pinned == [SPEC.base]
    assert "expected the base ababab" in free.find_fault(replace(SPEC, base="cd" * 32), asked=False)


def test_layers_differ_before_the_first_round_too_and_classes_do_not_count_then() -> None:
    common = CommonModel()
    common.take(SPEC)
    assert common.find_fault(replace(SPEC, labels=("odd",)), asked=False) == ""
    assert "adapted modules" in common.find_fault(replace(SPEC, modules={"layer.v": (4, 6)}), asked=False)


def test_classes_that_differ_are_united_in_order_and_those_that_agree_stay() -> None:
    common = CommonModel()
    common.unite_labels([SPEC, replace(SPEC, labels=("yes", "no"))])
    assert common.labels == ("no", "yes")
    numbers = CommonModel()  # as a simulation orders them: rows of a head without names are taken for them in order
    numbers.unite_labels([replace(SPEC, labels=("2", "10")), replace(SPEC, labels=("2",))])
    assert numbers.labels == ("2", "10")
    agreed = CommonModel()
    agreed.unite_labels([replace(SPEC, labels=("yes", "no"))] * 2)
    assert not agreed.labels
    assert agreed.is_current(SPEC)
    agreed.settle(replace(SPEC, labels=("yes", "no")))
    assert agreed.labels == ("yes", "no")


@pytest.mark.parametrize(
    ("labels", "asked", "match"),
    [
        (("no", "new", "yes"), False, "expected the classes no, yes .*got 'new' too; name all classes"),
        (("no", "yes"), True, ""),
        (("yes", "no"), True, "use the same label names"),
    ],
)
def test_after_the_first_round_classes_must_be_the_settled_ones(
    labels: tuple[str, ...], asked: bool, match: str
) -> None:
    import re

    common = CommonModel()
    common.take(SPEC)
    common.settle(SPEC)
    fault = common.find_fault(replace(SPEC, labels=labels), asked=asked)
    assert re.search(match, fault) if match else not fault


def test_a_base_with_a_head_of_its_own_may_have_more_classes_than_are_asked_for() -> None:
    common, wide = CommonModel(labels=("no", "yes")), replace(SPEC, labels=("maybe", "no", "yes"))
    assert common.is_current(wide)
    assert common.find_fault(wide, asked=True) == ""
    assert not common.is_current(replace(SPEC, labels=("no",)))
