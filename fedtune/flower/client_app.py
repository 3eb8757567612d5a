"""The Flower app of a client: it says hello, and performs assignments with its own model and data."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeAlias

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.errors import ClientError, FedtuneError
from fedtune.flower import shim
from fedtune.flower.records import ERROR, UPDATE, pack, unpack
from fedtune.messages import Assignment, ClientScores, ClientUpdate, ScoreRequest
from fedtune.rounds.failures import debug_traceback, failure_of
from fedtune.wire.codec import decode_assignment, encode_update
from fedtune.wire.profile import ClientProfile, decode_terms, encode_profile
from fedtune.wire.scores import decode_score_request, encode_scores


class Site(Protocol):
    """A client with its model and data."""

    def profile(self) -> ClientProfile:
        """Return what the client says of itself."""
        ...

    def with_labels(self, labels: Sequence[str]) -> Site:
        """Return the client with the class names that all clients of a run use."""
        ...

    def score(self, request: ScoreRequest) -> ClientScores:
        """Return what a global model scores on the client's held-out rows; raises if that cannot be done."""
        ...

    def perform(self, assignment: Assignment) -> ClientUpdate:
        """Do what an assignment asks; raises an error of fedtune if that cannot be done."""
        ...


Scalar: TypeAlias = bool | int | float | str
SiteOf: TypeAlias = Callable[[Mapping[str, Scalar], Mapping[str, Scalar]], Site]
"""From a node's own configuration and the run's to the client; keeps what it has loaded."""


def client_app(site_of: SiteOf) -> ClientApp:
    """Return the app of the client whose node it runs on."""
    app = ClientApp()

    @app.query("caps")
    def caps(message: Message, context: Context) -> Message:
        return reply_to(message, lambda: hello(site_of(context.node_config, context.run_config), message.content))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return reply_to(message, lambda: train_reply(site_of(context.node_config, context.run_config), message.content))

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return reply_to(message, lambda: score_reply(site_of(context.node_config, context.run_config), message.content))

    return app


def reply_to(message: Message, work: Callable[[], RecordDict]) -> Message:
    """Return the reply to a message, or an error reply with the reason: an exception would arrive as a traceback.

    In a simulation, where the data are the user's own, an unforeseen error is raised: Flower tells where it came from.
    """
    try:
        return Message(work(), reply_to=message)
    except FedtuneError as error:
        return Message(Error(ERROR, str(error)), reply_to=message)
    except Exception as error:  # its text may quote data, and Flower would send it: only its type leaves
        if shim.in_simulation():  # with its type in words: of what is raised on Ray, Flower's reply keeps only the text
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        traceback.print_exc()
        reason = f"expected an answer; got {type(error).__name__}; this client's own log says where"
        return Message(Error(ERROR, reason), reply_to=message)


def hello(site: Site, content: RecordDict) -> RecordDict:
    labels = decode_terms(unpack(content).header) if len(content) else ()
    encoded = encode_profile((site.with_labels(labels) if labels else site).profile())
    return pack(encoded.header, encoded.blobs)


def train_reply(site: Site, content: RecordDict) -> RecordDict:
    """Return the update."""
    encoded = unpack(content)
    assignment = decode_assignment(encoded.header, encoded.blobs)
    with client_errors(assignment.plan.client):
        return pack(b"", {UPDATE: encode_update(site.perform(assignment))})


def score_reply(site: Site, content: RecordDict) -> RecordDict:
    """Return the scores; an error while they are made is treated as one of training."""
    encoded = unpack(content)
    request = decode_score_request(encoded.header, encoded.blobs)
    with client_errors(request.client):
        return pack(b"", {UPDATE: encode_scores(site.score(request))})


@contextmanager
def client_errors(client: str) -> Iterator[None]:
    """Turn any error of a client's work into its `ClientError`; only in a simulation with another program's words."""
    try:
        yield
    except (Exception, SystemExit) as error:
        simulated = shim.in_simulation()
        if simulated:
            debug_traceback(error)
        elif not isinstance(error, FedtuneError):
            traceback.print_exc()
        raise ClientError(failure_of(client, error, quote=simulated).reason) from error
