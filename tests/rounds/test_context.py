from __future__ import annotations

from fedtune.messages import Blueprint, Training
from fedtune.methods import METHODS
from fedtune.planning.fixed import Fixed
from fedtune.rounds.context import RoundContext
from fedtune.rounds.events import Note
from fedtune.rounds.journal import NullJournal
from fedtune.rounds.schedule import Schedule
from tests.rounds.scripted import Scripted


def test_without_journal_and_clock_nothing_is_kept_and_no_time_is_known() -> None:
    context = RoundContext(
        method=METHODS["fedit"],
        settings=METHODS["fedit"].settings(),
        planner=Fixed(lambda name: (2, Training(batch=1, learning_rate=0.1, steps=1)), alpha="2r", rslora=False),
        transport=Scripted({}),
        schedule=Schedule(count=1),
        blueprint=Blueprint({"x": (4, 6)}, saved={}, max_rank=2, seed=0),
        base="base",
    )
    assert isinstance(context.journal, NullJournal)
    assert context.clock is None
    context.watch(Note("which no one hears"))
