"""The training process of a site: it reads requests line by line, and writes profiles, updates and scores to files."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self, TextIO, TypeAlias

from fedtune.errors import ClientError, ConfigError, FedtuneError, may_pass
from fedtune.link.client.conditions import Conditions, StepGate
from fedtune.link.client.energy_meter import EnergyMeter
from fedtune.link.settings import ScorePolicy
from fedtune.link.uploads import map_file
from fedtune.messages import Assignment, ClientScores, ClientUpdate, ScoreRequest
from fedtune.probing.steps import OnStep, no_steps
from fedtune.rounds.failures import failure_of
from fedtune.wire.codec import decode_assignment, encode_update
from fedtune.wire.profile import ClientProfile, encode_profile
from fedtune.wire.scores import decode_score_request, encode_scores

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Errors of the operating system where a disk has no space."""
BEAT_S = 5.0
"""Between two lines that say how far a request is."""


class TrainingSite(Protocol):
    """A client with its base and examples, in whatever way it computes."""

    @property
    def client(self) -> str: ...
    @property
    def scores(self) -> ScorePolicy:
        """What its policy says of scores, and of the losses before and after training."""
        ...

    def with_labels(self, labels: Sequence[str], date: str = "") -> Self: ...
    def profile(self) -> ClientProfile: ...
    def perform(self, assignment: Assignment) -> ClientUpdate: ...
    def score(self, request: ScoreRequest) -> ClientScores: ...
    def in_run(self, folder: Path) -> Self:
        """Return the client with the folder of a run at this site, where it may store what is to stay there."""
        ...


LoadSite: TypeAlias = Callable[[str, OnStep], TrainingSite]
"""From the path of a site's file, and what hears of each step, to the site; its base and data are loaded once."""


@dataclass(frozen=True)
class Energy:
    """What a request has taken of it, and whether that may leave the site."""

    joules: Callable[[], float | None] = lambda: None
    send: bool = False


NO_ENERGY = Energy()


def without_losses(update: ClientUpdate) -> ClientUpdate:
    """Return an update that does not say how well the model does on the client's rows."""
    return replace(update, measured=replace(update.measured, loss_before=None, loss_after=None))


def serve(arguments: Sequence[str], load: LoadSite, conditions: Callable[[str], Conditions]) -> None:
    """Answer requests until their pipe ends.

    Args:
        arguments: the last ones are the site's file, and the descriptors of requests, of replies and of the parent's
            life; see `training_process.ProcessTrainer`.
        load: loads base and data of the file.
        conditions: says by the file when the machine may work; a training waits for that between two steps.
    """
    site, requests, replies, life = arguments[-4], *map(int, arguments[-3:])
    # What it writes is for the owner alone: updates, and a profile with the initial values of saved modules.
    os.umask(0o077)
    # The read ends when the parent is gone, however it ended: no process with a client's data outlives it.
    threading.Thread(target=lambda: (os.read(life, 1), os._exit(0)), daemon=True).start()
    with os.fdopen(requests, "r") as lines, os.fdopen(replies, "w") as writer:
        beat = Beat(writer)
        threading.Thread(target=beat.run, daemon=True).start()
        send_energy = False
        with suppress(ConfigError):  # what is wrong with the file is the reply to the first request
            limits = conditions(site)
            beat.gate, send_energy = StepGate(limits), limits.sends_energy
        for line in lines:
            beat.begin()
            energy = Energy(beat.meter.joules, send=send_energy)
            beat.end(handle(load, site, json.loads(line), beat.step, energy))


class Beat:
    """Says every few seconds how far a request is: steps, and the time that this process has computed."""

    def __init__(self, writer: TextIO, *, every_s: float = BEAT_S) -> None:
        """Begin without a request; lines are written to `writer`."""
        self._writer, self._every_s = writer, every_s
        self._lock, self._done, self._total = threading.Lock(), 0, 0
        self._works = threading.Event()
        self.meter = EnergyMeter()
        self.gate: StepGate | None = None
        """Between two steps, where the work waits while the machine may not do it; None: it never waits."""

    def run(self) -> None:
        """Write a line in each interval in which a request is under way."""
        while True:
            self._works.wait()
            time.sleep(self._every_s)
            self.say()

    def begin(self) -> None:
        self._done = self._total = 0
        self.meter.begin()
        self._works.set()

    def step(self, done: int, total: int) -> None:
        """Note how many steps of a training have been taken; returns when the next one may be."""
        self._done, self._total = done, total
        if self.gate is not None:
            self.gate.wait()

    def say(self) -> None:
        """Write how far the request is, if one is under way: between two of them the parent reads nothing."""
        with self._lock:
            if self._works.is_set():
                waits = self.gate.obstacle if self.gate is not None else ""
                self.meter.sample(works=not waits)
                line = {"at": [self._done, self._total, int(1000 * time.process_time())]}
                self._write({**line, "waits": waits} if waits else line)

    def end(self, reply: Mapping[str, Any]) -> None:
        """Write the reply to a request."""
        with self._lock:
            self._works.clear()
            self._write(reply)

    def _write(self, line: Mapping[str, Any]) -> None:
        self._writer.write(json.dumps(line) + "\n")
        # The parent waits for the line; in a buffer it would wait for ever.
        self._writer.flush()


def handle(
    load: LoadSite,
    site: str,
    request: Mapping[str, Any],
    on_step: OnStep = no_steps,
    energy: Energy = NO_ENERGY,
) -> Mapping[str, Any]:
    """Run a request, and return the reply: `done` with what was measured, or `failed` with the reason."""
    try:
        return {"done": run_request(load(site, on_step), request, energy)}
    except FedtuneError as error:
        return {"failed": str(error), **({"passing": True} if may_pass(error) else {})}
    except BaseException as error:  # its text may quote data: only its type leaves the site
        if isinstance(error, OSError) and error.errno in FULL:
            return {"failed": "expected space on this site's disk; got none; free some", "passing": True}
        traceback.print_exc()
        return {"failed": f"expected an answer; got {type(error).__name__}; this site's own log says where"}


def run_request(site: TrainingSite, request: Mapping[str, Any], energy: Energy = NO_ENERGY) -> Mapping[str, float]:
    """Write the site's profile, update or scores to the path that a request names, and return what was measured."""
    into = Path(request["into"])
    if request["do"] == "profile":
        profile = encode_profile(site.with_labels(request.get("labels", ())).profile())
        into.mkdir(parents=True, exist_ok=True)
        (into / "front").write_bytes(profile.header)
        for digest, body in profile.blobs.items():
            (into / digest).write_bytes(body)
        return {}
    folder = Path(request["folder"])
    site = site.in_run(folder.parent)
    # Mapped, not read: an assignment may be larger than the memory that is free.
    bodies: dict[str, Any] = {name: map_file(folder / name) for name in request["bodies"]}
    front = (folder / "front").read_bytes()
    try:
        if request["do"] == "score":
            scores = site.score(decode_score_request(front, bodies))
            into.write_bytes(encode_scores(scores))
            return {**scores.metrics, "seconds": scores.seconds}
        update = site.perform(decode_assignment(front, bodies))
        joules = energy.joules()
        if energy.send:
            update = replace(update, measured=replace(update.measured, joules=joules))
        into.write_bytes(encode_update(update if site.scores == "send" else without_losses(update)))
    except FedtuneError:
        raise
    except BaseException as error:  # its text may quote data: its type and place alone leave the site
        traceback.print_exc()
        # Half an update would keep the space that others wait for.
        into.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in FULL:
            expected = f"{site.client}: expected space for an update on this site's disk"
            raise ClientError(f"{expected}; got none; the next round is tried again") from error
        raise ClientError(failure_of(site.client, error, quote=False).reason) from error
    own = {**asdict(update.measured), "joules": joules}
    return {name: value for name, value in own.items() if value is not None}
