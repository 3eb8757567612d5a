"""The progress of a run: one live table on a terminal, one plain line per round elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedtune.messages import AdmittedUpdate, Failure, Outcome, Traffic
from fedtune.rounds.events import ClientFinished, Event, Note, Phase, RoundFinished, RoundStarted, Watch
from fedtune.rounds.record import Metrics, RoundRecord
from fedtune.terminal.console import console
from fedtune.terminal.text import duration, number, printable, size

RECENT = 5
"""Rounds whose median length gives the estimated end: a robust mean that follows changes."""
NAMED_FAILURES = 5
"""Failed clients of a round that are named; the others are counted."""


@dataclass(frozen=True)
class ProgressState:
    """How far a run is, according to its events."""

    round: int = 0
    """The round that is running or was finished last."""
    rounds: int = 0
    done: int = 0
    """Rounds finished."""
    cohort: Sequence[str] = ()
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    """Of the round that is running or was finished last, by client."""
    traffic: Mapping[str, Traffic] = field(default_factory=dict)
    record: RoundRecord | None = None
    """Of the last finished round."""
    test: Metrics = field(default_factory=dict)
    """The last scores on the test data."""
    best: tuple[float, int] | None = None
    """Lowest test loss and its round."""
    seconds: Sequence[float] = ()
    """Of the last few rounds."""
    earlier: Traffic = field(default_factory=Traffic)
    """Of all finished rounds."""
    phase: str = ""
    """The step outside the rounds that is under way."""

    @property
    def failures(self) -> Sequence[Failure]:
        return [outcome for outcome in self.outcomes.values() if isinstance(outcome, Failure)]

    @property
    def total(self) -> Traffic:
        """Bytes of the whole run so far."""
        down = self.earlier.down + sum(traffic.down for traffic in self.traffic.values())
        return Traffic(down=down, up=self.earlier.up + sum(traffic.up for traffic in self.traffic.values()))

    @property
    def remaining_s(self) -> float | None:
        """Estimated seconds to the end; None before the first round has ended."""
        return median(self.seconds) * (self.rounds - self.done) if self.seconds else None


def after_round(state: ProgressState, event: Event) -> ProgressState:
    """Return the state of progress after one event."""
    match event:
        case RoundStarted(round=number, rounds=rounds, cohort=cohort):
            return replace(state, round=number, rounds=rounds, cohort=cohort, outcomes={}, traffic={}, phase="")
        case ClientFinished(outcome=outcome, traffic=traffic):
            # A client may finish twice: its update arrived, and is refused later.
            name = outcome.client
            return replace(
                state,
                outcomes={**state.outcomes, name: outcome},
                traffic={**state.traffic, name: traffic},
            )
        case RoundFinished(record=record):
            return with_round(ProgressState(rounds=state.rounds) if record.round == 0 else state, record)
        case Phase(text=text):
            return replace(state, phase=text)
        case _:
            return state


def with_round(state: ProgressState, record: RoundRecord) -> ProgressState:
    """Return the state of progress after the record of a round; that of round 0 begins a run."""
    test = record.test or {}
    loss, best = test.get("loss"), state.best
    if loss is not None and (best is None or loss < best[0]):
        best = (loss, record.round)
    return replace(
        state,
        round=record.round,
        done=record.round,
        record=record,
        test=test or state.test,
        best=best,
        seconds=(*state.seconds, record.seconds)[-RECENT:] if record.round else (),
        earlier=state.total,
        traffic={},
        phase="",
    )


def staleness(record: RoundRecord) -> Sequence[str]:
    """Return how many updates of an asynchronous round were stale, and by how much; nothing where none was."""
    missed = [client.staleness for client in record.clients.values() if client.staleness]
    return [f"{len(missed)} stale, by at most {max(missed)}"] if missed else []


def round_line(state: ProgressState) -> str:
    """Return the result of the round that just ended, as one plain line."""
    record = state.record
    if record is None or record.round == 0:
        return "  ".join(["before", *score(state)])
    admitted = sum(isinstance(outcome, AdmittedUpdate) for outcome in state.outcomes.values())
    remaining = state.remaining_s
    return "  ".join(
        [
            f"round {state.round}/{state.rounds}",
            *losses(record),
            *(score(state) if record.test else ()),
            *([f"rate {record.rate_share:.3g} x"] if record.rate_share != 1 else ()),
            f"clients {admitted}/{len(state.cohort)}",
            *staleness(record),
            *skipped_steps(record),
            *energy_kept(record),
            f"up {size(record.bytes_up)}",
            f"down {size(record.bytes_down)}",
            duration(record.seconds),
            *([f"ETA {duration(remaining)}"] if remaining else ()),
        ]
    )


def losses(record: RoundRecord | None) -> Sequence[str]:
    """Return the mean of the clients' losses before and after their local steps, on the same rows."""
    if record is None or record.loss_after is None:
        return []
    return [f"local loss {number(record.loss_before)} -> {number(record.loss_after)}"]


def skipped_steps(record: RoundRecord) -> Sequence[str]:
    """Return which clients left out steps that were not finite, and how many."""
    counts = [f"{printable(name)} {c.skipped_steps}" for name, c in sorted(record.clients.items()) if c.skipped_steps]
    more = [f"and {len(counts) - NAMED_FAILURES} more"] * (len(counts) > NAMED_FAILURES)
    return [f"skipped steps: {', '.join([*counts[:NAMED_FAILURES], *more])}"] if counts else []


def energy_kept(record: RoundRecord) -> Sequence[str]:
    """Return the least share of a module's change that is left after cuts to a bounded rank; nothing if all is."""
    shares = [share for module in record.modules.values() if (share := module.reaches_clients) is not None]
    if not shares or (least := min(shares)) > 1 - 5e-5:
        return []
    return [f"energy kept {100 * least:.1f} %"]


def score(state: ProgressState) -> Sequence[str]:
    """Return the last test scores in words."""
    words = [f"{metric} {number(state.test[metric])}" for metric in ("accuracy",) if metric in state.test]
    if "loss" in state.test and state.best is not None:
        loss, at = state.best
        best = f" (best {number(loss)}, round {at})" if state.record and state.record.round else ""
        words.insert(0, f"test {number(state.test['loss'])}{best}")
    return words


def failure_lines(failures: Sequence[Failure]) -> Sequence[str]:
    lines = [f"{printable(f.client)} {f.kind}: {printable(f.reason)}" for f in failures[:NAMED_FAILURES]]
    return [*lines, f"and {len(failures) - NAMED_FAILURES} more"] if len(failures) > NAMED_FAILURES else lines


def table(state: ProgressState, title: str, elapsed_s: float, since_round_s: float = 0.0) -> RenderableType:
    """Return the live table: the round, the scores, the clients that are done.

    Args:
        state: how far the run is.
        title: the run's name.
        elapsed_s: seconds since the start.
        since_round_s: those of them since the last round ended, by which the estimated rest is shorter now.
    """
    head = Table.grid(padding=(0, 2))
    remaining = None if state.remaining_s is None else max(0.0, state.remaining_s - since_round_s)
    head.add_row(
        Text(printable(title), style="bold"),
        f"round {state.round}/{state.rounds}",
        ProgressBar(total=max(state.rounds, 1), completed=state.done, width=24),
        f"elapsed {duration(elapsed_s)}",
        "" if remaining is None else f"ETA {duration(remaining)}",
    )
    total = state.total
    middle = [*losses(state.record), *score(state), f"up {size(total.up)}", f"down {size(total.down)}"]
    rows: list[RenderableType] = [head, Text("  " + "   ".join(middle))]
    if state.phase:
        rows.append(Text(f"  {printable(state.phase)}"))
    elif state.cohort:
        rows.append(Text(f"  clients {len(state.outcomes)}/{len(state.cohort)}"))
    rows += [Text(f"  {line}", style="yellow", no_wrap=True) for line in failure_lines(state.failures)]
    return Group(*rows)


@contextmanager
def observer(watch: Watch | None, title: str) -> Iterator[Watch]:
    """Give the observer of a run or, without one, the progress on standard error, until the block ends."""
    if watch is not None:
        yield watch
        return
    with Progress(console(sys.stderr), title=title) as progress:
        yield progress


class Progress:
    """An observer of a run, to be entered before it is called.

    It writes to one console only, which is that of stderr on the command line, so that stdout stays a result.
    """

    def __init__(self, console: Console, *, title: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console
        self.title = title
        self.clock = clock
        self.state = ProgressState()
        self._live: Live | None = None
        self._began = self._round_ended = clock()

    def __enter__(self) -> Progress:
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(self, console=self.console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __rich__(self) -> RenderableType:
        if not self.state.rounds and not self.state.record:
            phase = printable(self.state.phase or "preparing")
            return Text(f"{printable(self.title)}  {phase}  {duration(self.clock() - self._began)}")
        now = self.clock()
        return table(self.state, self.title, now - self._began, now - self._round_ended)

    def __call__(self, event: Event) -> None:
        self.state = after_round(self.state, event)
        if isinstance(event, RoundFinished):
            self._round_ended = self.clock()
        if isinstance(event, Note):
            self._print(printable(event.text))
        elif isinstance(event, Phase) and self._live is None:
            self._print(f"{printable(event.text)} ...")
        elif isinstance(event, RoundFinished) and self._live is None:
            self._print(round_line(self.state))
            for line in failure_lines(self.state.failures):
                self._print(f"  {line}")

    def _print(self, line: str) -> None:
        self.console.print(Text(line), soft_wrap=True)
