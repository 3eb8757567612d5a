"""The clock of real deployments: the seconds that clients report, at most those until their answer arrived."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fedtune.rounds.clock import ClientTime, CompletedWork


class MeasuredClock:
    """Takes times as they were measured; late clients were given up by the round's own deadline."""

    def client_times(
        self, round: int, now_s: float, done: Mapping[str, CompletedWork], late: Mapping[str, float]
    ) -> Mapping[str, ClientTime]:
        """Return, by client, its seconds of work, and as transfer the rest of the time until its answer.

        A client cannot have worked for longer than until its answer arrived, whatever it reports.
        """
        answered = {
            name: replace(split_seconds(each.measured.seconds, each.arrived_s), joules=each.measured.joules)
            for name, each in done.items()
            if each.arrived_s
        }
        return {**answered, **{name: ClientTime.until_deadline(after_s) for name, after_s in late.items()}}

    def overdue(self, deadlines_s: Mapping[str, float], spent: Mapping[str, ClientTime]) -> Mapping[str, float]:
        return {}

    def round_seconds(self, spent: Mapping[str, ClientTime]) -> float:
        return max((each.seconds for each in spent.values()), default=0.0)

    def reachable(self, round: int, client: str) -> bool:
        return True


def split_seconds(work_s: float, arrived_s: float) -> ClientTime:
    # A client reports its own seconds: those beyond its answer would make its transfer negative.
    work_s = min(work_s, arrived_s)
    return ClientTime(work_s, arrived_s - work_s)
