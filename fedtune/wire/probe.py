"""What is asked along seeded directions, as messages of the schema and back, every number checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, TypeVar

from fedtune.directions.blocks import MAX_SIZE, Groups
from fedtune.directions.downlink import MAX_SHIFT
from fedtune.directions.rebuild_numpy import EXPONENTS
from fedtune.directions.space import MAX_ACCUMULATORS, MAX_BANKS, MAX_GROUPS
from fedtune.errors import WireError
from fedtune.messages import BankName, ProbeSeeds, Sampling, SeedState, Training
from fedtune.wire.expect import LARGEST
from fedtune.wire.v1 import round_pb2 as pb

BANK: Mapping[BankName, pb.Bank] = {"gaussian": pb.GAUSSIAN, "hadamard": pb.HADAMARD, "kron": pb.KRON}
FORM: Mapping[Literal["whole", "changed", "log"], pb.SeedForm] = {
    "whole": pb.WHOLE,
    "changed": pb.CHANGED,
    "log": pb.LOG,
}
SAMPLING: Mapping[Sampling, pb.Sampling] = {"uniform": pb.UNIFORM, "distinct": pb.DISTINCT, "pro": pb.PRO}
MAX_STEPS = 2**16 - 1
"""The log of a round writes a client's number of scalars in 16 bits."""

Choice = TypeVar("Choice", bound=str)


def to_message(probe: ProbeSeeds, training: Training) -> pb.Probe:
    """Return the message of an assignment.

    Raises:
        WireError: if there are more scalars than can travel.
    """
    assert training.steps is not None  # the planner resolves epochs
    # Here already, not only at the client: the log of later rounds could not be written.
    if training.steps > MAX_STEPS:
        raise WireError(f"client.steps: expected at most {MAX_STEPS} scalars a round; got {training.steps}")
    state = probe.state
    return pb.Probe(
        bank=BANK[probe.bank],
        seeds=probe.seeds,
        key=probe.key,
        exponent=probe.exponent,
        shift=probe.shift,
        perturbation=probe.perturbation,
        state=pb.SeedState(
            form=FORM[state.form], since=state.since, data=state.data, round=state.round, digest=state.digest
        ),
        steps=training.steps,
        batch=training.batch,
        learning_rate=training.rate,
        sampling=SAMPLING[probe.sampling],
        levels=probe.levels,
        # 0 queries is the two-sided estimator, so that its messages need no field for it.
        queries=probe.queries if probe.estimator == "one-sided" else 0,
        normalise=probe.normalise,
        clip=None if math.isinf(probe.clip) else probe.clip,
        trainable=probe.trainable,
        vectors=probe.vectors,
        embeddings=probe.embeddings,
        calibrate=probe.calibrate,
        # 0, like no field, is one group: messages of a run that has no more are as they always were.
        groups=0 if probe.groups in (1, "tensor") else int(probe.groups),
        by_tensor=probe.groups == "tensor",
        earlier=probe.earlier,
        curvatures=probe.curvatures,
    )


def from_message(message: pb.Probe) -> tuple[ProbeSeeds, Training]:
    """Return what is to be measured, and with which steps.

    Raises:
        WireError: if a number is out of its range.
    """
    state = message.state
    ranges = {
        "seeds": (message.seeds, 1, MAX_SIZE),
        "exponent": (message.exponent, EXPONENTS.start, EXPONENTS.stop - 1),
        "shift": (message.shift, 0, MAX_SHIFT),
        "perturbation": (message.perturbation, 1, 2**31 - 1),
        "steps": (message.steps, 1, MAX_STEPS),
        "batch": (message.batch, 1, 2**31 - 1),
        "queries": (message.queries, 0, MAX_STEPS),
        "state.since": (state.since, 0, state.round),
        "groups": (message.groups, 0, 0 if message.by_tensor else MAX_GROUPS),
        "earlier": (len(message.earlier), 0, MAX_BANKS - 1),
    }
    for name, (value, least, most) in ranges.items():
        if not least <= value <= most:
            raise WireError(f"probe: expected {name} from {least} to {most}; got {value}")
    if not 0 < message.learning_rate <= LARGEST or not message.clip >= 0:
        raise WireError(
            "probe: expected a learning rate above 0 and a clip of at least 0; "
            f"got {message.learning_rate} and {message.clip}"
        )
    if message.curvatures and not message.calibrate:
        raise WireError("probe: expected curvatures of a calibration alone; got them of steps")
    sampling = choice(SAMPLING, message.sampling, "sampling")
    if len(message.levels) != (message.seeds if sampling == "pro" else 0) or 0 in message.levels:
        raise WireError(f"probe: expected a level above 0 for each seed that is drawn by it; got {len(message.levels)}")
    groups: Groups = "tensor" if message.by_tensor else message.groups or 1
    # How many tensors are moved follows from the base, which is not known here.
    size = (1 + len(message.earlier)) * message.seeds * (groups if isinstance(groups, int) else 1)
    size = MAX_ACCUMULATORS if groups == "tensor" else min(size, MAX_ACCUMULATORS)
    most = 4 * size + size // 8 + 1  # no form is sent that is longer than the whole
    if len(state.digest) != 32 or len(state.data) > most:
        raise WireError(
            f"probe: expected a digest of 32 bytes and at most {most} of accumulators; "
            f"got {len(state.digest)} and {len(state.data)}"
        )
    probe = ProbeSeeds(
        bank=choice(BANK, message.bank, "bank"),
        seeds=message.seeds,
        key=message.key,
        exponent=message.exponent,
        shift=message.shift,
        perturbation=message.perturbation,
        state=SeedState(choice(FORM, state.form, "form"), state.since, state.data, state.round, state.digest),
        sampling=sampling,
        levels=message.levels,
        estimator="one-sided" if message.queries else "two-sided",
        queries=message.queries or 1,
        normalise=message.normalise,
        clip=message.clip if message.HasField("clip") else math.inf,
        trainable=tuple(message.trainable),
        vectors=message.vectors,
        embeddings=message.embeddings,
        calibrate=message.calibrate,
        groups=groups,
        earlier=tuple(message.earlier),
        curvatures=message.curvatures,
    )
    return probe, Training(batch=message.batch, learning_rate=message.learning_rate, steps=message.steps)


def choice(choices: Mapping[Choice, int], number: int, field: str) -> Choice:
    """Return the name of an enum's value.

    Raises:
        WireError: if this release knows no such value.
    """
    for name, value in choices.items():
        if value == number:
            return name
    raise WireError(f"assignment: expected {field} in {list(choices.values())}; got {number}; update this client")
