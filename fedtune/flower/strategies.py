"""Strategies for Flower's Message API over fedtune's methods; clients are any ClientApp that trains a PEFT model.

`FLoRA(alpha=32, fraction_train=0.1)` takes the place of `FedAvg(fraction_train=0.1)` in a ServerApp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from fedtune.flower.lora_strategy import LoraStrategy
from fedtune.lora import dense, lowrank
from fedtune.lora.dense import Summed
from fedtune.methods import METHODS
from fedtune.methods.fedex import FedExSettings
from fedtune.methods.fedit import FedItSettings
from fedtune.methods.ffa import FfaSettings
from fedtune.methods.flexlora import FlexLoraSettings
from fedtune.methods.flora import FloraSettings
from fedtune.methods.hetlora import HetLoraSettings


@dataclass(kw_only=True, eq=False)
class FLoRA(LoraStrategy):
    """Adapters are stacked, so ranks may differ and the sum is exact (Wang et al., NeurIPS 2024, arXiv 2409.05976)."""

    down: Literal["leading", "whole"] = "leading"
    """What a client gets of the global change. leading: the components that its rank can hold, so a stock client needs
    nothing; the next round goes on from those that the largest rank holds. whole: all of it, the rest as a frozen
    record that the client adds by `fedtune.flower.add_frozen`, as the paper's clients merge it."""
    method: ClassVar[str] = "flora"
    own_ranks: ClassVar[bool] = True

    @property
    def sends_frozen(self) -> bool:
        return self.down == "whole"

    def settings(self) -> FloraSettings:
        return FloraSettings(state_max_rank="exact", server_learning_rate=self.server_learning_rate, wire_dtype="fp32")

    def exact_changes(self) -> Callable[[Any], Mapping[str, Summed]]:
        return lambda state: dense.unpack(state.delta)

    def next_start(self, state: Any) -> Any:
        if self.sends_frozen:
            return state
        # What no client is sent would stay in the sum, be learned again by clients that lack it, and count twice.
        most = max([self._running().blueprint.max_rank, *self._own.values()])
        cut = {name: dense.cut_down(low, tau=1.0, max_rank=most) for name, low in dense.unpack(state.delta).items()}
        return replace(state, delta=dense.pack(cut))

    def with_room(self, state: Any, ranks: Sequence[int]) -> Any:
        # Two products for each client, end and start, on top of the sum so far.
        largest = 2 * sum(ranks) + max((low.rank for low in dense.unpack(state.delta).values()), default=0)
        shapes = self._running().blueprint.modules.values()
        wide = [min(shape) for shape in shapes if min(shape) > dense.NARROW]
        # Factors are summed in float64, and stay of the rank that the sum has. Where they would be as large as the
        # layer, "exact" adds to a matrix instead.
        fits = all(ranks) and largest < min(wide, default=largest + 1)
        return replace(state, settings=replace(state.settings, state_max_rank=largest if fits else "exact"))


@dataclass(kw_only=True, eq=False)
class FlexLoRA(LoraStrategy):
    """The exact sum, of which each client restarts from its rank's leading part (Bai et al., arXiv 2402.11505)."""

    method: ClassVar[str] = "flexlora"
    own_ranks: ClassVar[bool] = True

    def settings(self) -> FlexLoraSettings:
        return FlexLoraSettings(server_learning_rate=self.server_learning_rate, wire_dtype="fp32")

    def exact_changes(self) -> Callable[[Any], Mapping[str, Summed]]:
        return lambda state: lowrank.unpack(state.total)


@dataclass(kw_only=True, eq=False)
class FedEx(LoraStrategy):
    """Factors are averaged, and what their mean misses is frozen beside them (Singhal et al., arXiv 2410.09432).

    Clients add that by `fedtune.flower.add_frozen`; all have one rank.
    """

    method: ClassVar[str] = "fedex"

    @property
    def sends_frozen(self) -> bool:
        return True

    def settings(self) -> FedExSettings:
        return FedExSettings(server_learning_rate=self.server_learning_rate, wire_dtype="fp32")

    def exact_changes(self) -> Callable[[Any], Mapping[str, Summed]]:
        return lambda state: lowrank.compress(METHODS["fedex"].adapter(state))


@dataclass(kw_only=True, eq=False)
class HetLoRA(LoraStrategy):
    """Factors of unequal rank are padded and averaged by the size of their change (Cho et al., arXiv 2401.06432).

    Without the paper's pruning of ranks, which is a term of the clients' loss.
    """

    method: ClassVar[str] = "hetlora"

    def settings(self) -> HetLoraSettings:
        return HetLoraSettings(
            server_learning_rate=self.server_learning_rate, wire_dtype="fp32", rank_decay=1.0, rank_penalty=0.0
        )


@dataclass(kw_only=True, eq=False)
class FFA(LoraStrategy):
    """A is frozen and B is averaged, which is exact at any ranks (Sun et al., ICLR 2024, arXiv 2403.12313).

    Clients freeze lora_A; one that has trained it is left out.
    """

    method: ClassVar[str] = "ffa"

    def settings(self) -> FfaSettings:
        return FfaSettings(server_learning_rate=self.server_learning_rate, wire_dtype="fp32")


@dataclass(kw_only=True, eq=False)
class FedIT(LoraStrategy):
    """The factors themselves are averaged, as Flower's FedAvg does, with fedtune's checks (arXiv 2305.05644)."""

    method: ClassVar[str] = "fedit"

    def settings(self) -> FedItSettings:
        return FedItSettings(server_learning_rate=self.server_learning_rate, wire_dtype="fp32")
