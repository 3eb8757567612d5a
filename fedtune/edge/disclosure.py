"""What a device sends, field by field and byte for byte, written by the code that sends it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedtune.link.client.replies import sample_statement
from fedtune.link.client.training_server import without_losses
from fedtune.link.settings import Policy
from fedtune.messages import ClientScores, ClientUpdate, Measured, ProbeResult
from fedtune.wire.codec import encode_update
from fedtune.wire.fields import Field, fields
from fedtune.wire.profile import ClientProfile, encode_profile
from fedtune.wire.scores import encode_scores
from fedtune.wire.v1 import link_pb2, round_pb2

WORDS: Mapping[str, Mapping[str, str]] = {
    "ClientProfile": {
        "client": "this device's name, under which it is enrolled",
        "examples": "how many examples it trains on",
        "base": "which base model it holds: its digest",
        "modules": "names and sizes of that model's layers",
        "saved": "a description of layers trained in full: none",
        "saved_modules": "their names",
        "labels": "names of classes, of classifiers alone",
        "transposed": "how that model stores its layers",
        "parameters": "how many parameters that model has",
        "verbs": "what the program can do",
        "methods": "the methods that it knows",
        "protocol": "version of the messages",
        "device": "main memory and number of cores of this machine",
        "anatomy": "sizes of that model's blocks",
        "manifest": "names, sizes and digests of that model's tensors",
        "held_out": "how many examples are held out",
    },
    "ProbeUpdate": {
        "scalars": "one signed byte for each random direction: how steep the loss of some examples is along it",
        "state": "which global model it started from: 8 bytes of a digest",
        "checks": "4 digests of 4 bytes that show that the model was rebuilt right",
        "round": "number of the round",
        "examples": "how many examples it trains on",
        "skipped": "how many directions could not be measured",
        "seconds": "how long it took",
        "peak_mib": "how much memory it took",
        "tokens": "how many tokens were read",
        "loss_before": "mean loss of some examples before",
        "loss_after": "the same after",
        "rms": "how large the bytes would be, where a run asks for that first",
        "slopes": "16 numbers, where a run asks for them first: how steep the loss is along a direction",
        "curvatures": "16 numbers, likewise: how fast that changes",
        "lost": "that it needs the global model anew",
        "joules": "how much energy it took",
        "numbers": "",
        "shift": "",
        "bits": "",
        "count": "",
    },
    "ScoreUpdate": {
        "client": "this device's name",
        "round": "number of the round",
        "base": "which base model it holds: its digest",
        "metrics": "means over the held-out examples: loss, and how many there are",
        "seconds": "how long it took",
        "personal": "",
    },
    "Header": {
        "protocol": "version of the messages",
        "federation": "name of the federation",
        "run": "number of the run",
        "author": "this device's name",
        "to": "",
        "kind": "that this is an answer",
        "task": "",
        "round": "number of the round",
        "recipe": "digest of the recipe that it agreed to",
        "base": "digest of the base",
        "state": "digest of the state that the order names",
        "order": "digest of the order that is answered",
        "parts": "digest and length of the message",
        "cohort": "",
        "decline": "where it does nothing: why, in one sentence that names none of your data",
        "receipt": "",
        "build": "version of this program",
        "nonce": "",
        "epoch": "",
        "members": "",
    },
}
"""What each field of a message says, in words; empty for fields that a device leaves empty."""
SIGNS_OF_LIFE = (
    "while connected: its certificate (name, organisation, federation), the version of this program, a random number "
    "of this process, which orders it works on, how many steps and processor seconds it has come, or that it waits"
)
NEVER = (
    "your files, their names, rows, texts and tokens",
    "gradients, and any change of the model's weights but the bytes above",
    "private keys",
    "anything to anyone but the server of the federation that you have joined",
)
STEPS = (20, 100, 200)
"""Directions for which the size of an update is shown."""


@dataclass(frozen=True)
class Disclosed:
    """A message that leaves a device."""

    what: str
    data: bytes
    fields: Sequence[Field]


def profile_sent(profile: ClientProfile) -> Disclosed:
    """Return what a device says of itself once, before the first round."""
    data = encode_profile(profile).header
    return Disclosed("once, before the first round", data, explain(round_pb2.ClientProfile.FromString(data)))


def update_sent(profile: ClientProfile, *, steps: int, policy: Policy) -> Disclosed:
    """Return an example of what a device answers in a round: of its sizes and fields, with numbers that are none.

    Args:
        profile: the device's.
        steps: directions that the run asks for.
        policy: the device's: losses and joules leave it only where that sends them.
    """
    numbers = (np.arange(steps) * 37 % 255 - 127).astype(np.int8)
    result = ProbeResult(numbers, state=bytes(range(8)), checks=bytes(range(16)))
    joules = 25.0 if policy.energy == "send" else None
    measured = Measured(12.5, 300 * 2**20, loss_before=3.25, loss_after=3.24, tokens=steps * 512, joules=joules)
    update = ClientUpdate(profile.client, 12, profile.num_examples, result, measured)
    data = encode_update(update if policy.scores == "send" else without_losses(update))
    message = round_pb2.ProbeUpdate.FromString(data)
    return Disclosed(f"in each round, of {steps} directions", data, explain(message))


def scores_sent(profile: ClientProfile) -> Disclosed:
    """Return an example of what a device answers where it is asked for scores."""
    metrics = {"loss": 3.25, "examples": float(profile.held_out)}
    data = encode_scores(ClientScores(profile.client, 12, profile.foundation.base, metrics, 1.5))
    return Disclosed("where the run asks for scores", data, explain(round_pb2.ScoreUpdate.FromString(data)))


def statement_sent(client: str, data: bytes, *, federation: str) -> Disclosed:
    """Return the signed statement around an answer; it travels beside it, signed with the device's key."""
    header, around = sample_statement(client, federation, data)
    what = f"around each answer, {around} B with signature and digests"
    return Disclosed(what, header, explain(link_pb2.Header.FromString(header)))


def explain(message: Any) -> Sequence[Field]:
    """Return the fields of a message that are sent, in words."""
    return fields(message, WORDS[message.DESCRIPTOR.name])
