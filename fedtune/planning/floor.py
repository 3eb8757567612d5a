"""The pruning ratios that a round allows: a target for clients that deploy the pruned model, in the end alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fedtune.planning.arms import Goal
from fedtune.planning.policy import GainOf
from fedtune.pruning.ranking import PruningSettings

FREE_ROUNDS = 0.8
"""Share of the rounds after which clients that deploy a pruned model train in its structure: what pruning broke must
be mended in what is deployed."""


@dataclass(frozen=True)
class Floor:
    """Which ratios are allowed to whom, and in which model a client's gain counts."""

    goal: Goal
    rounds: int
    ratios: Sequence[float]
    """Of the arms."""
    pruning: PruningSettings | None = None
    ranking: bool = False
    """Whether heads and channels are ranked from the start: else no client is pruned in the first round."""

    def lacks_ranking(self, round: int) -> bool:
        """Return whether nothing says yet what may go: the first round's clients score heads and channels."""
        settings = self.pruning
        return settings is not None and round == 1 and not self.ranking and settings.policy != "local"

    def deploys_pruned(self, client: str, kind: str, *, holds_whole: bool) -> bool:
        """Return whether a client uses the pruned model in the end.

        Args:
            client: its name.
            kind: its device's profile.
            holds_whole: whether its memory holds the whole base.
        """
        settings = self.pruning
        if settings is None or not settings.target or self.goal == "whole":
            return False
        if settings.deployed_on:
            return any(fnmatchcase(name, glob) for name in (client, kind) if name for glob in settings.deployed_on)
        return self.goal == "deployed" or not holds_whole

    def gain_of(self, client: str, kind: str, *, holds_whole: bool) -> GainOf:
        """Return in which model a client's gain counts."""
        settings = self.pruning
        if settings is None or self.goal == "whole":
            return "whole"
        if settings.floor == "ramp" or self.goal == "deployed":
            return "own"
        return "both" if self.deploys_pruned(client, kind, holds_whole=holds_whole) else "whole"

    def ratio_test(self, round: int, client: str, kind: str, *, holds_whole: bool) -> Callable[[float], bool]:
        """Return the test whether a round allows a client a ratio.

        A client that holds the whole base trains it: scattered into the whole model, what a pruned one learns also
        repairs what was missing there, and counts twice.
        """
        settings = self.pruning
        if settings is None or self.lacks_ranking(round):
            return lambda ratio: ratio == 0
        if settings.floor == "ramp":
            return self._ramp(round, settings)
        bound = self.deploys_pruned(client, kind, holds_whole=holds_whole)
        # Voters share one structure, in every round.
        if settings.policy == "vote" or (bound and round > FREE_ROUNDS * self.rounds):
            return self._nearest(settings.target)
        return lambda ratio: ratio == 0 or bound or not holds_whole

    def _ramp(self, round: int, settings: PruningSettings) -> Callable[[float], bool]:
        """Return the test of the floor ramp: for all clients from the ramp's ratio to the largest."""
        least = settings.ratio(round, self.rounds)
        if settings.target and (least == settings.target or settings.policy == "vote"):
            return self._nearest(least)
        # Never above the largest arm, or none would be left.
        most = max(self.ratios)
        return lambda ratio: ratio >= min(least, most)

    def _nearest(self, wanted: float) -> Callable[[float], bool]:
        # The target need not be one of the arms; of two as near, the smaller ratio loses less.
        nearest = min(self.ratios, key=lambda ratio: (abs(ratio - wanted), ratio))
        return lambda ratio: ratio == nearest
