"""What a site will do for a federation: its own word, checked before anything of an order is fetched or run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import time
from typing import Annotated

from annotated_types import Ge, Gt

from fedtune.errors import ConfigError, Fault, WireError
from fedtune.link.rejections import one_line
from fedtune.link.settings import MIB
from fedtune.messages import Training
from fedtune.wire import settings
from fedtune.wire.codec import parse
from fedtune.wire.v1 import link_pb2 as pb
from fedtune.wire.v1 import round_pb2


@dataclass(frozen=True)
class Policy:
    """The table `policy` of a site's own file; what it does not mention is allowed."""

    methods: Sequence[str] = ()
    """That may be run; none named: any that is installed."""
    recipes: Sequence[str] = ()
    """Digests (hex, or how they begin, from 8 digits on) of the recipes that may be run; none named: any."""
    bases: Sequence[str] = ()
    """Digests (hex, or how they begin) of the base models that may be tuned; none named: the site's own base."""
    max_rank: Annotated[int, Ge(1)] | None = None
    """Largest LoRA rank of an assignment; none allows any."""
    max_steps: Annotated[int, Ge(1)] | None = None
    """Local steps of a round, or scalars of FedKSeed."""
    max_rounds: Annotated[int, Ge(1)] | None = None
    """Rounds of a run that the site takes part in."""
    max_up_mib: Annotated[float, Gt(0)] | None = None
    """MiB that leave the site in one answer."""
    max_down_mib: Annotated[float, Gt(0)] | None = None
    """MiB that come with one order."""
    day_up_mib: Annotated[float, Gt(0)] | None = None
    """MiB that leave the site within 24 hours."""
    hours: str = ""
    """When work may begin, in the site's local time, e.g. "20:00-06:00"; empty: always."""
    min_cohort: Annotated[int, Ge(1)] = 1
    """Clients of a round below which the site takes no part: of two, each can subtract itself."""
    columns: Sequence[str] = ()
    """Columns of the site's files that may become training text; none named: those that the table `data` names."""
    ask: bool = False
    """Whether somebody at the terminal must agree to the recipe before the site takes part."""


@dataclass(frozen=True)
class TaskDemand:
    """What an order asks of a site, in numbers."""

    method: str
    round: int
    rank: int | None
    """None where nothing is trained by adapters."""
    steps: int
    cohort: int
    num_bytes: int
    """That come with it."""
    base: str
    """Digest (hex)."""


@dataclass(frozen=True)
class Usage:
    """What the site has done already."""

    rounds: int = 0
    """Of this run, that it has answered; without the one that is asked for."""
    day_bytes: int = 0
    """That have left it within 24 hours."""


@dataclass(frozen=True)
class Refusal:
    """Why an order is not done."""

    veto: pb.Veto
    note: str


def demand(header: pb.Header, front: bytes) -> TaskDemand:
    """Return what the order of a round asks.

    Raises:
        WireError: if it is no assignment of this release.
    """
    message = parse(round_pb2.Assignment(), front)
    if message.verb == round_pb2.PROBE:
        rank, steps = None, message.probe.steps
    else:
        rank, steps = message.plan.rank, settings.decode(message.settings, Training).steps or 0
    if message.round != header.round:
        raise WireError(f"expected an assignment of round {header.round}, as signed; got one of {message.round}")
    return TaskDemand(
        method=one_line(message.method),
        round=header.round,
        rank=rank,
        steps=steps,
        cohort=header.cohort,
        num_bytes=sum(part.num_bytes for part in header.parts),
        base=header.base.hex(),
    )


def check_policy(policy: Policy, asked: TaskDemand, recipe: str, spent: Usage, *, now: time) -> Sequence[Refusal]:
    """Return everything in a demand that the policy does not allow.

    Args:
        policy: the site's.
        asked: what the order asks.
        recipe: digest (hex) of the run's recipe.
        spent: what the site has done.
        now: the site's local time.
    """
    return list(refusals(policy, asked, recipe, spent, now))


def refusals(policy: Policy, asked: TaskDemand, recipe: str, spent: Usage, now: time) -> Iterator[Refusal]:
    if policy.methods and asked.method not in policy.methods:
        yield Refusal(pb.METHOD_NOT_ALLOWED, f"policy.methods: allowed {', '.join(policy.methods)}; got {asked.method}")
    if policy.recipes and not digest_matches(recipe, policy.recipes):
        yield Refusal(pb.RECIPE_NOT_ALLOWED, f"policy.recipes: recipe {recipe[:16]} is not among them")
    if policy.bases and asked.base and not digest_matches(asked.base, policy.bases):
        yield Refusal(pb.BASE_NOT_ALLOWED, f"policy.bases: base {asked.base[:16]} is not among them")
    if policy.max_rank is not None and asked.rank is not None and asked.rank > policy.max_rank:
        yield Refusal(pb.RANK_TOO_LARGE, f"policy.max_rank: allowed {policy.max_rank}; got {asked.rank}")
    if policy.max_steps is not None and asked.steps > policy.max_steps:
        yield Refusal(pb.TOO_MANY_STEPS, f"policy.max_steps: allowed {policy.max_steps}; got {asked.steps}")
    if policy.max_rounds is not None and spent.rounds >= policy.max_rounds:
        yield Refusal(pb.TOO_MANY_ROUNDS, f"policy.max_rounds: allowed {policy.max_rounds}; all of them are done")
    if policy.max_down_mib is not None and asked.num_bytes > policy.max_down_mib * MIB:
        yield Refusal(
            pb.TOO_MANY_BYTES, f"policy.max_down_mib: allowed {policy.max_down_mib:g}; got {mib(asked.num_bytes)}"
        )
    if asked.cohort < policy.min_cohort:
        yield Refusal(pb.COHORT_TOO_SMALL, f"policy.min_cohort: at least {policy.min_cohort}; got {asked.cohort}")
    if policy.hours and not within(policy.hours, now):
        yield Refusal(pb.OUTSIDE_HOURS, f"policy.hours: allowed {policy.hours}; it is {now:%H:%M}")


def leaves(policy: Policy, num_bytes: int, spent: Usage) -> Refusal | None:
    """Return why an answer of so many bytes must not leave the site; None if it may."""
    if policy.max_up_mib is not None and num_bytes > policy.max_up_mib * MIB:
        return Refusal(pb.TOO_MANY_BYTES, f"policy.max_up_mib: allowed {policy.max_up_mib:g}; got {mib(num_bytes)}")
    if policy.day_up_mib is not None and spent.day_bytes + num_bytes > policy.day_up_mib * MIB:
        total = mib(spent.day_bytes + num_bytes)
        return Refusal(pb.TOO_MANY_BYTES, f"policy.day_up_mib: allowed {policy.day_up_mib:g}; it would be {total}")
    return None


def mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:.1f}"


def digest_matches(digest: str, prefixes: Sequence[str]) -> bool:
    return any(len(one) >= 8 and digest.startswith(one.lower()) for one in prefixes)


def within(hours: str, now: time) -> bool:
    """Return whether a time of day lies within `HH:MM-HH:MM`, which may go over midnight."""
    begin, end = (time.fromisoformat(one) for one in hours.split("-"))
    if begin <= end:
        return begin <= now < end
    return now >= begin or now < end


def check(policy: Policy) -> None:
    """Refuse what no single field can tell.

    Raises:
        ConfigError: with every fault.
    """
    faults = []
    if policy.hours and not re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d", policy.hours):
        faults.append(Fault("policy.hours", 'two times of day, such as "20:00-06:00"', repr(policy.hours)))
    for name in ("recipes", "bases"):
        faults += [
            Fault(f"policy.{name}", "at least 8 hexadecimal digits each", repr(one))
            for one in getattr(policy, name)
            if not re.fullmatch(r"[0-9a-fA-F]{8,64}", one)
        ]
    if faults:
        raise ConfigError(faults)
