"""The clock of real deployments: what clients say they worked, as far as it went by until they answered."""

from __future__ import annotations

from collections.abc import Mapping

from fedtune.rounds.clock import ClientTime, CompletedWork


class MeasuredClock:
    """Takes times as they were measured; nobody is given up here, for a deadline of the round has done that."""

    def timed(
        self, round: int, now_s: float, done: Mapping[str, CompletedWork], late: Mapping[str, float]
    ) -> Mapping[str, ClientTime]:
        """Return, by client, its own seconds of work, and the rest of the time from the first order to its answer.

        Nobody can have worked for longer than until its answer came, whatever it says.
        """
        there = {
            name: split_seconds(each.measured.seconds, each.arrived_s) for name, each in done.items() if each.arrived_s
        }
        return {**there, **{name: ClientTime.given_up(after_s) for name, after_s in late.items()}}

    def cut(self, deadlines_s: Mapping[str, float], spent: Mapping[str, ClientTime]) -> Mapping[str, float]:
        return {}

    def lasted(self, spent: Mapping[str, ClientTime]) -> float:
        return max((each.seconds for each in spent.values()), default=0.0)

    def reachable(self, round: int, client: str) -> bool:
        return True


def split_seconds(work_s: float, arrived_s: float) -> ClientTime:
    work_s = min(work_s, arrived_s)
    return ClientTime(work_s, arrived_s - work_s)
