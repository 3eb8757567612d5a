from __future__ import annotations

from dataclasses import replace
from datetime import time

import pytest

from fedtune.errors import ConfigError, WireError
from fedtune.link.client.policy import (
    TaskDemand,
    Usage,
    check_policy,
    check_result,
    check_upload,
    is_within_hours,
    read_demand,
)
from fedtune.link.settings import MIB, Policy, validate_policy
from fedtune.messages import Assignment, DescendSeeds, Plan, ProbeSeeds, SeedState, SumClasses, Training, TrainLora
from fedtune.wire.codec import encode_assignment
from fedtune.wire.v1 import link_pb2 as pb

ASKED = TaskDemand("flora", round=2, rank=8, steps=10, cohort=3, num_bytes=2 * MIB, base="9f3c" * 16)
RECIPE = "ab" * 32


def vetoes(policy: Policy, asked: TaskDemand = ASKED, spent: Usage | None = None, now: time = time(12)) -> list[str]:
    return [pb.Veto.Name(one.veto) for one in check_policy(policy, asked, RECIPE, spent or Usage(), now=now)]


def test_what_a_policy_does_not_mention_is_allowed() -> None:
    assert vetoes(Policy()) == []
    everything = Policy(
        methods=["flora"],
        recipes=["abababab"],
        bases=["9F3C9F3C"],
        max_rank=8,
        max_steps=10,
        max_rounds=2,
        max_down_mib=2,
        hours="11:00-13:00",
        min_cohort=3,
    )
    assert vetoes(everything, spent=Usage(rounds=1)) == []


@pytest.mark.parametrize(
    ("policy", "veto"),
    [
        (Policy(methods=["fedkseed"]), "METHOD_NOT_ALLOWED"),
        (Policy(recipes=["cdcdcdcd"]), "RECIPE_NOT_ALLOWED"),
        (Policy(bases=["00000000"]), "BASE_NOT_ALLOWED"),
        (Policy(max_rank=7), "RANK_TOO_LARGE"),
        (Policy(max_steps=9), "TOO_MANY_STEPS"),
        (Policy(max_rounds=1), "TOO_MANY_ROUNDS"),
        (Policy(max_down_mib=1.9), "TOO_MANY_BYTES"),
        (Policy(min_cohort=4), "COHORT_TOO_SMALL"),
        (Policy(hours="20:00-06:00"), "OUTSIDE_HOURS"),
    ],
)
def test_each_limit_is_a_veto_of_its_own(policy: Policy, veto: str) -> None:
    assert vetoes(policy, spent=Usage(rounds=1)) == [veto]


def test_all_vetoes_are_reported_together() -> None:
    assert len(vetoes(Policy(methods=["fedit"], max_rank=1, min_cohort=9))) == 3


def test_nothing_of_rank_has_no_rank_to_refuse() -> None:
    assert vetoes(Policy(max_rank=1), replace(ASKED, rank=None)) == []


@pytest.mark.parametrize(
    ("hours", "inside", "outside"),
    [
        ("08:00-17:00", ["08:00", "16:59"], ["07:59", "17:00"]),
        ("20:00-06:00", ["20:00", "23:59", "00:00", "05:59"], ["06:00", "12:00", "19:59"]),
    ],
)
def test_hours_may_go_over_midnight(hours: str, inside: list[str], outside: list[str]) -> None:
    assert all(is_within_hours(hours, time.fromisoformat(one)) for one in inside)
    assert not any(is_within_hours(hours, time.fromisoformat(one)) for one in outside)


@pytest.mark.parametrize(
    ("key", "size", "free", "veto"),
    [
        ("adapter/adapter_model.safetensors", 2 * MIB, 4 * MIB, None),
        ("seeds/ledger.ftks", 2 * MIB, 4 * MIB, None),
        ("adapter/adapter_model.safetensors", 2 * MIB, 4 * MIB - 1, pb.TOO_MANY_BYTES),
        ("adapter/adapter_model.safetensors", 2 * MIB + 1, 9 * MIB, pb.TOO_MANY_BYTES),
        ("adapter/../x", 1, MIB, pb.WORK_FAILED),
        ("adapter/.bashrc", 1, MIB, pb.WORK_FAILED),
        ("adapter/a/b", 1, MIB, pb.WORK_FAILED),
        ("/etc/passwd", 1, MIB, pb.WORK_FAILED),
        ("adapter/adapter_model.bin", 1, MIB, pb.WORK_FAILED),
    ],
)
def test_a_result_is_fetched_under_plain_names_and_within_the_limits(
    key: str, size: int, free: int, veto: pb.Veto | None
) -> None:
    header = pb.Header(parts=[pb.Part(key=key, num_bytes=size)])
    violation = check_result(Policy(max_down_mib=2), header, free=free)
    assert (violation.veto if violation else None) == veto


@pytest.mark.parametrize(("keys", "got"), [([], "none"), (["adapter/a.json", "seeds/a.json"], "adapter, seeds")])
def test_a_result_is_one_folder(keys: list[str], got: str) -> None:
    header = pb.Header(parts=[pb.Part(key=key, num_bytes=1) for key in keys])
    violation = check_result(Policy(), header, free=MIB)
    assert violation is not None
    assert violation.note.endswith(f"; got {got}")


def test_what_leaves_the_site_is_limited_for_each_reply_and_each_day() -> None:
    assert check_upload(Policy(), 10**12, Usage()) is None
    assert check_upload(Policy(max_up_mib=1), MIB, Usage()) is None
    assert check_upload(Policy(max_up_mib=1), MIB + 1, Usage()) is not None
    assert check_upload(Policy(day_up_mib=2), MIB, Usage(day_bytes=MIB)) is None
    assert check_upload(Policy(day_up_mib=2), MIB, Usage(day_bytes=MIB + 1)) is not None


def test_a_demand_is_what_the_assignment_says() -> None:
    plan = Plan("anna", rank=4, scale=2.0, training=Training(batch=1, learning_rate=0.1, steps=7))
    adapt = encode_assignment(Assignment("flora", round=3, seed=0, plan=plan, task=TrainLora(a_key=0)))
    header = pb.Header(round=3, cohort=5, base=b"\x9f", parts=[pb.Part(num_bytes=10), pb.Part(num_bytes=20)])
    assert read_demand(header, adapt.header) == TaskDemand("flora", 3, 4, 7, 5, 30, "9f")
    probe = ProbeSeeds(
        bank="hadamard", seeds=4, key=1, exponent=20, shift=1, perturbation=1,
        state=SeedState("whole", 0, b"\0" * 16, 2, b"d" * 32),
    )  # fmt: skip
    assigned = Assignment("fedkseed", round=3, seed=0, plan=plan, task=probe)
    result = read_demand(header, encode_assignment(assigned).header)
    assert (result.method, result.rank, result.steps) == ("fedkseed", None, 7)
    for steps, most in ((None, 7), (5, 7), (90, 90)):
        fallback = Training(batch=1, learning_rate=0.1, steps=steps) if steps else None
        descending = replace(assigned, task=DescendSeeds(probe, 4, 9, fallback=fallback))
        # Whichever it will do: the policy's limit holds for both.
        assert read_demand(header, encode_assignment(descending).header).steps == most
    sums = Assignment("fedit", round=3, seed=0, plan=plan, task=SumClasses(11), base="9f")
    result = read_demand(header, encode_assignment(sums).header)
    assert (result.method, result.rank, result.steps, result.cohort) == ("fedit", None, 0, 5)


def test_an_assignment_of_another_round_than_the_signed_one_is_refused() -> None:
    plan = Plan("anna", rank=4, scale=2.0, training=Training(batch=1, learning_rate=0.1, steps=7))
    encoded = encode_assignment(Assignment("flora", round=3, seed=0, plan=plan, task=TrainLora(a_key=0)))
    with pytest.raises(WireError, match="round 4"):
        read_demand(pb.Header(round=4), encoded.header)
    with pytest.raises(WireError):
        read_demand(pb.Header(round=3), b"\xff\xff")


def test_malformed_times_and_digests_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        validate_policy(Policy(hours="25:00-26:00", recipes=["short"], bases=["xyzxyzxyz"]))
    assert [fault.path for fault in caught.value.faults] == ["policy.hours", "policy.recipes", "policy.bases"]
    validate_policy(Policy(hours="00:00-23:59", recipes=["0123abcd"]))


def test_a_round_is_not_done_again_and_again() -> None:
    assert vetoes(Policy(), spent=Usage(answers=2)) == []
    assert vetoes(Policy(), spent=Usage(answers=3)) == ["VETO_RECIPE_DIFFERS"]
