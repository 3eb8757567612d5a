"""Limits that a site sets for itself, checked before anything large of a task is fetched or trained."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import time
from typing import TypeAlias

from fedtune.errors import WireError
from fedtune.link.client.session import Greeting
from fedtune.link.rejections import one_line
from fedtune.link.settings import MIB, MIN_DIGEST_DIGITS, Policy
from fedtune.messages import Training
from fedtune.wire import settings
from fedtune.wire.codec import parse
from fedtune.wire.v1 import link_pb2 as pb
from fedtune.wire.v1 import round_pb2

RESULT_FILE = re.compile(r"(adapter|seeds)/[A-Za-z0-9][A-Za-z0-9_.-]{0,79}\.(json|md|safetensors|ftks|ftkm)")
"""Names of the files of a run's result: no format that can run code when it is loaded."""


MAX_ANSWERS = 3
"""To different orders of one round. A server asks once, or once more with the whole state; after its disk was restored
from a copy it does the round again."""


@dataclass(frozen=True)
class TaskDemand:
    """What a task demands of a site, in numbers."""

    method: str
    round: int
    rank: int | None
    """Of the adapter; None where the site measures seeds instead."""
    steps: int
    cohort: int | None
    """Clients of its round; None where that is not known yet."""
    num_bytes: int
    """To download."""
    base: str | None
    """Digest (hex); None in a dry run, which does not know it yet."""


@dataclass(frozen=True)
class Usage:
    """What the site has done already, as far as the policy limits it."""

    rounds: int = 0
    """Of this run, for which it has sent an update; without the current one."""
    day_bytes: int = 0
    """That it has sent within 24 hours."""
    answers: int = 0
    """That it has given already to other orders of the same round."""


@dataclass(frozen=True)
class PolicyViolation:
    """One limit that a task exceeds."""

    veto: pb.Veto
    note: str


OrderCheck: TypeAlias = Callable[[Greeting, pb.Header, bytes], Sequence[PolicyViolation]]
"""(what the server has said of the run, the header of an order, its assignment or no bytes) -> why it is none that the
accepted recipe permits, or that this site does with the examples that it has."""


def read_demand(header: pb.Header, front: bytes) -> TaskDemand:
    """Return what the task of a round demands.

    Raises:
        WireError: if it is no assignment of this release.
    """
    message = parse(round_pb2.Assignment(), front)
    cohort: int | None = header.cohort
    if message.verb == round_pb2.SCORE:
        # Nothing is trained, and the score of one client says nothing of another's data.
        rank, steps, cohort = None, 0, None
    elif message.verb == round_pb2.PROBE:
        rank, steps = None, message.probe.steps
    elif message.verb == round_pb2.DESCEND:
        # Whichever of the two the client will do.
        rank, steps = None, max(message.descend.steps, message.descend.probe.steps)
    elif message.verb == round_pb2.SUM:
        rank, steps = None, 0
    else:
        rank, steps = message.plan.rank, settings.decode(message.settings, Training).steps or 0
    # The limits are checked against the signed header: the work must be of the round that was checked.
    if message.round != header.round:
        raise WireError(f"expected an assignment of round {header.round}, as signed; got one of {message.round}")
    return TaskDemand(
        method=one_line(message.method),
        round=header.round,
        rank=rank,
        steps=steps,
        cohort=cohort,
        num_bytes=sum(part.num_bytes for part in header.parts),
        base=header.base.hex(),
    )


def check_policy(
    policy: Policy, demand: TaskDemand, recipe: str, usage: Usage, *, now: time
) -> Sequence[PolicyViolation]:
    """Return every limit of the policy that a demand exceeds.

    Args:
        policy: the site's.
        demand: of the task.
        recipe: digest (hex) of the run's recipe.
        usage: what the site has done already.
        now: the site's local time.
    """
    return list(violations(policy, demand, recipe, usage, now))


def violations(policy: Policy, demand: TaskDemand, recipe: str, usage: Usage, now: time) -> Iterator[PolicyViolation]:
    # Every limit, not only the first: the operator sees at once what would have to be allowed.
    if policy.methods and demand.method not in policy.methods:
        yield PolicyViolation(
            pb.METHOD_NOT_ALLOWED, f"policy.methods: allowed {', '.join(policy.methods)}; got {demand.method}"
        )
    if policy.recipes and not digest_matches(recipe, policy.recipes):
        yield PolicyViolation(pb.RECIPE_NOT_ALLOWED, f"policy.recipes: recipe {recipe[:16]} is not among them")
    if demand.base == "":
        yield PolicyViolation(pb.BASE_NOT_ALLOWED, "expected an order that names its base model; got none")
    elif policy.bases and demand.base is not None and not digest_matches(demand.base, policy.bases):
        yield PolicyViolation(pb.BASE_NOT_ALLOWED, f"policy.bases: base {demand.base[:16]} is not among them")
    if policy.max_rank is not None and demand.rank is not None and demand.rank > policy.max_rank:
        yield PolicyViolation(pb.RANK_TOO_LARGE, f"policy.max_rank: allowed {policy.max_rank}; got {demand.rank}")
    if policy.max_steps is not None and demand.steps > policy.max_steps:
        yield PolicyViolation(pb.TOO_MANY_STEPS, f"policy.max_steps: allowed {policy.max_steps}; got {demand.steps}")
    if policy.max_rounds is not None and usage.rounds >= policy.max_rounds:
        yield PolicyViolation(
            pb.TOO_MANY_ROUNDS, f"policy.max_rounds: allowed {policy.max_rounds}; all of them are done"
        )
    if usage.answers >= MAX_ANSWERS:
        note = f"round {demand.round}: expected at most {MAX_ANSWERS} different orders; got one more"
        yield PolicyViolation(pb.VETO_RECIPE_DIFFERS, note)
    if policy.max_down_mib is not None and demand.num_bytes > policy.max_down_mib * MIB:
        yield PolicyViolation(
            pb.TOO_MANY_BYTES,
            f"policy.max_down_mib: allowed {policy.max_down_mib:g}; got {format_mib(demand.num_bytes)}",
        )
    if demand.cohort is not None and demand.cohort < policy.min_cohort:
        yield PolicyViolation(
            pb.COHORT_TOO_SMALL, f"policy.min_cohort: at least {policy.min_cohort}; got {demand.cohort}"
        )
    if policy.hours and not is_within_hours(policy.hours, now):
        yield PolicyViolation(pb.OUTSIDE_HOURS, f"policy.hours: allowed {policy.hours}; it is {now:%H:%M}")


def check_result(policy: Policy, header: pb.Header, *, free: int) -> PolicyViolation | None:
    """Return why the files of a run's result may not be fetched; None if they may.

    Args:
        policy: the site's.
        header: of the order that brings them.
        free: bytes that may be written.
    """
    total = sum(part.num_bytes for part in header.parts)
    keys = [part.key for part in header.parts]
    # Names from outside become names of files: none may lead out of the folder.
    if odd := [key for key in keys if not RESULT_FILE.fullmatch(key)]:
        return PolicyViolation(pb.WORK_FAILED, f"expected files of a run's result; got {one_line(odd[0])!r}")
    if len(folders := {key.partition("/")[0] for key in keys}) != 1:
        got = ", ".join(sorted(folders)) or "none"
        return PolicyViolation(pb.WORK_FAILED, f"expected the files of one folder of a run's result; got {got}")
    if policy.max_down_mib is not None and total > policy.max_down_mib * MIB:
        note = f"policy.max_down_mib: allowed {policy.max_down_mib:g}; got {format_mib(total)}"
        return PolicyViolation(pb.TOO_MANY_BYTES, note)
    # Twice: as it is fetched, and as it is put together.
    if 2 * total > free:
        return PolicyViolation(pb.TOO_MANY_BYTES, f"{total} bytes of the result do not fit the disk")
    return None


def check_upload(policy: Policy, num_bytes: int, usage: Usage) -> PolicyViolation | None:
    """Return the limit that an update of so many bytes exceeds; None if it may leave the site."""
    # Only when the update is there: no task says how large it will be.
    if policy.max_up_mib is not None and num_bytes > policy.max_up_mib * MIB:
        return PolicyViolation(
            pb.TOO_MANY_BYTES, f"policy.max_up_mib: allowed {policy.max_up_mib:g}; got {format_mib(num_bytes)}"
        )
    if policy.day_up_mib is not None and usage.day_bytes + num_bytes > policy.day_up_mib * MIB:
        total = format_mib(usage.day_bytes + num_bytes)
        return PolicyViolation(
            pb.TOO_MANY_BYTES, f"policy.day_up_mib: allowed {policy.day_up_mib:g}; it would be {total}"
        )
    return None


def format_mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:.1f}"


def digest_matches(digest: str, prefixes: Sequence[str]) -> bool:
    return any(len(prefix) >= MIN_DIGEST_DIGITS and digest.startswith(prefix.lower()) for prefix in prefixes)


def is_within_hours(hours: str, now: time) -> bool:
    """Return whether a time of day lies within `HH:MM-HH:MM`, which may go over midnight."""
    begin, end = (time.fromisoformat(text) for text in hours.split("-"))
    # The end is excluded, so that 20:00-06:00 and 06:00-20:00 share no minute.
    if begin <= end:
        return begin <= now < end
    return now >= begin or now < end
