"""Rounds in which clients train the repair adapter: for any planner, every second one.

With `pruning.adapters = "two"` the repair adapter makes up for what the deployed model lacks and never enters the whole
one. Whatever the planner, in those of `is_repair_round` every client that is pruned by no more than the deployed
ratio trains it, in the deployed structure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedtune.messages import Client, Failure, PlannedClient
from fedtune.planning.planner import ClientObservation, Planner
from fedtune.pruning.ranking import PruningSettings, is_repair_round


@dataclass(frozen=True)
class TwoAdapters:
    """A planner whose plans are, in every second round, of the deployed model's repair adapter."""

    planner: Planner
    pruning: PruningSettings

    def start(self) -> Any:
        return self.planner.start()

    def plan(self, learned: Any, round: int, cohort: Sequence[Client]) -> Mapping[str, PlannedClient | Failure]:
        """Return the planner's plans, in a round of the repair adapter at the deployed ratio."""
        plans = self.planner.plan(learned, round, cohort)
        if not is_repair_round(self.pruning, round):
            return plans
        return {name: self._repairing(own) for name, own in plans.items()}

    def _repairing(self, own: PlannedClient | Failure) -> PlannedClient | Failure:
        target = self.pruning.target
        # A device that needs a smaller model than is deployed trains that one, for the whole.
        if isinstance(own, Failure) or own.plan.ratio > target:
            return own
        # All modules and the whole backward pass: the arms are the planner's for the whole model.
        plan = replace(own.plan, ratio=target, view="deployed", ranks=(), back=0.0)
        return replace(own, plan=plan, top=1.0, why=f"{own.why}; repairs what is deployed".removeprefix("; "))

    def observe(self, learned: Any, seen: Sequence[ClientObservation]) -> Any:
        """Return what the planner learns: of clients that trained the repair adapter their times, and no gain."""
        # Their losses are of another model than the one whose gains the planner compares.
        return self.planner.observe(
            learned,
            [
                one if one.view == "whole" else replace(one, loss_before=None, loss_after=None, importance=None)
                for one in seen
            ],
        )
