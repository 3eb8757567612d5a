"""Scores of a global model by the clients themselves, each on the rows that it holds out: asked, checked, pooled."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from fedtune.errors import WireError
from fedtune.messages import Failure, ScoreRequest, Traffic
from fedtune.rounds.admission import LARGEST_LOSS
from fedtune.rounds.exchange import encoded_bytes
from fedtune.rounds.record import COUNTS, Metrics
from fedtune.rounds.scores import HIGHER_IS_BETTER, LOWER_IS_BETTER, SIGNED
from fedtune.rounds.transport import Answer, Reply, Rule, UnsolicitedReply
from fedtune.wire.codec import EncodedAssignment, blob_encoder
from fedtune.wire.scores import decode_scores, encode_score_request

LONGEST_ROW = 2**20
"""Tokens of a row, at most: what a client counts is its weight in the pooled loss."""


class ScoreTransport(Protocol):
    """How requests for scores travel."""

    def evaluate(self, orders: Mapping[str, EncodedAssignment], rule: Rule) -> Iterable[Answer]:
        """Deliver requests and yield one `Reply` or `Failure` per client, and what came unsolicited."""
        ...


@dataclass(frozen=True)
class SiteScores:
    """What the clients said."""

    scores: Mapping[str, Metrics] = field(default_factory=dict)
    """By client, sorted by name."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """By client that was asked and has no scores, why."""
    personal: Mapping[str, Metrics] = field(default_factory=dict)
    """Of the clients' own models on the same rows, where they were asked for."""
    traffic: Mapping[str, Traffic] = field(default_factory=dict)
    unsolicited: Sequence[UnsolicitedReply] = ()
    """What came meanwhile from clients that were not asked, as a refusal or an answer to an earlier round."""


def ask_scores(
    transport: ScoreTransport,
    requests: Mapping[str, ScoreRequest],
    *,
    held_out: Mapping[str, int],
    rule: Rule,
    note: Callable[[str], None] = lambda text: None,
) -> SiteScores:
    """Have clients score a global model, and return what they said; nothing that one client does raises.

    Args:
        transport: over which they are asked.
        requests: by client.
        held_out: rows that each client has said to hold out: it cannot have scored more.
        rule: when to stop waiting.
        note: called with a sentence on each client that has no scores.
    """
    # One encoder: clients share the tensors, which are serialised and hashed once.
    encode = blob_encoder()
    encoded = {name: encode_score_request(request, encode=encode) for name, request in sorted(requests.items())}
    scores, personal, missing, up = dict[str, Metrics](), dict[str, Metrics](), dict[str, str](), dict[str, int]()
    unsolicited = list[UnsolicitedReply]()
    for answer in transport.evaluate(encoded, rule):
        name = answer.client
        if isinstance(answer, UnsolicitedReply):  # a transport says it once: here or in no record at all
            unsolicited.append(answer)
            continue
        if name not in encoded or name in scores or name in missing:
            continue
        if isinstance(answer, Reply):
            up[name] = len(answer.update)
        outcome = answer if isinstance(answer, Failure) else admit_scores(answer, requests[name], held_out[name])
        if isinstance(answer, Reply) and not isinstance(outcome, Failure):
            # As a whole: a client whose one model cannot be right is not believed of the other.
            own = admit_own(answer, requests[name], outcome)
            personal |= {name: own} if own and not isinstance(own, Failure) else {}
            outcome = own if isinstance(own, Failure) else outcome
        if isinstance(outcome, Failure):
            missing[name] = outcome.reason
        else:
            scores[name] = outcome
    missing |= {name: "no answer" for name in encoded if name not in scores and name not in missing}
    for name, reason in sorted(missing.items()):
        note(f"{name} has no scores: {reason}")
    traffic = {name: Traffic(down=encoded_bytes(sent), up=up.get(name, 0)) for name, sent in encoded.items()}
    return SiteScores(
        scores=dict(sorted(scores.items())),
        missing=dict(sorted(missing.items())),
        personal=dict(sorted(personal.items())),
        traffic=traffic,
        unsolicited=unsolicited,
    )


def admit_scores(reply: Reply, request: ScoreRequest, held_out: int) -> Metrics | Failure:
    """Return a client's scores if they answer the request and can be true, otherwise why not."""

    def refuse(expected: str, got: object) -> Failure:
        return Failure(reply.client, expected=expected, got=f"{got}", kind="refused", code="SCORES")

    try:
        stated = decode_scores(reply.update, client=reply.client)
    except WireError as error:
        return Failure.from_text(reply.client, str(error), kind="refused", code="MALFORMED")
    if stated.round != request.round:
        return refuse(f"scores after round {request.round}", stated.round)
    if stated.base != request.base:
        return refuse(f"the base {request.base[:12]}", stated.base[:12])
    most = min(held_out, request.examples or held_out)
    # More rows than it holds out would buy a client more weight in the mean.
    if not 1 <= stated.metrics.get("examples", 0) <= most:
        return refuse(f"scores of 1 to {most} rows", stated.metrics.get("examples", 0))
    for name, value in stated.metrics.items():
        if fault := metric_fault(name, value, most):
            return refuse(fault, value)
    if "loss" not in stated.metrics:
        return refuse("a loss", "none")
    return in_order(stated.metrics)


def admit_own(reply: Reply, request: ScoreRequest, scores: Metrics) -> Metrics | Failure:
    """Return what a client's own model scores, if that was asked for and can be true; of an answer that is admitted.

    They must be of as many rows as the global model's, or a comparison of the two would be of other rows.
    """
    stated = decode_scores(reply.update, client=reply.client).personal
    refused = partial(Failure, reply.client, kind="refused", code="SCORES")
    if request.personal is None:
        return refused(expected="no scores of a model of its own", got=f"{len(stated)}") if stated else {}
    rows = int(scores["examples"] or 0)
    faults = [(fault, value) for name, value in stated.items() if (fault := metric_fault(name, value, rows))]
    if faults:
        return refused(expected=f"of its own model {faults[0][0]}", got=f"{faults[0][1]}")
    if stated.keys() != scores.keys() or stated["examples"] != rows:
        return refused(expected=f"the scores of its own model on the same {rows} rows", got=f"{sorted(stated)}")
    return in_order(stated)


def metric_fault(name: str, value: float, rows: int) -> str:
    """Return what is expected of a metric's value that cannot be true; empty if it can."""
    # A comparison with NaN is false, so NaN is refused by every one of these.
    if name in COUNTS:
        most = rows if name != "tokens" else rows * LONGEST_ROW
        return "" if 0 <= value <= most and value == int(value) else f"{name}: a count of at most {most}"
    if name in HIGHER_IS_BETTER:
        return "" if 0 <= value <= 1 else f"{name}: a share from 0 to 1"
    if name == "perplexity":
        return "" if 1 <= value < math.inf else f"{name}: a finite number of at least 1"
    if name in LOWER_IS_BETTER:
        return "" if 0 <= value <= LARGEST_LOSS else f"{name}: a finite number from 0 to {LARGEST_LOSS:g}"
    if name in SIGNED:
        return (
            "" if abs(value) <= LARGEST_LOSS else f"{name}: a finite number from -{LARGEST_LOSS:g} to {LARGEST_LOSS:g}"
        )
    return f"a metric of {', '.join(sorted(LOWER_IS_BETTER | HIGHER_IS_BETTER | SIGNED))}; not {name[:40]!r}"


def in_order(metrics: Mapping[str, float]) -> Metrics:
    """Return the metrics as a simulation writes them: counts as integers behind the scores."""
    scores = {name: value for name, value in metrics.items() if name not in COUNTS}
    return scores | {name: int(metrics[name]) for name in COUNTS if name in metrics}
