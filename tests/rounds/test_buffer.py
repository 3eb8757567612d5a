"""Asynchronous rounds over scripted clients and a clock that is known: who is in which buffer, and what it adds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedtune.errors import ConfigError, RoundError
from fedtune.messages import AdmittedUpdate, Blueprint, Client, ClientUpdate, Failure, LoraResult
from fedtune.methods import METHODS
from fedtune.planning.fixed import Fixed
from fedtune.rounds import buffer, loop
from fedtune.rounds.asynchronous import AsyncSettings
from fedtune.rounds.clock import ClientTime, CompletedWork
from fedtune.rounds.context import RoundContext
from fedtune.rounds.events import Event, Note
from fedtune.rounds.journal import Ask, NullJournal, OpenOrders
from fedtune.rounds.loop import RoundResult
from fedtune.rounds.schedule import Schedule
from fedtune.rounds.transport import Answer, Reply
from tests.rounds.scripted import SHAPE, TRAINING, Script, Scripted, answer


class Steady:
    """A clock by which each client takes the same time in every round."""

    def __init__(self, seconds: Mapping[str, float], away: Sequence[str] = ()) -> None:
        self.seconds, self.away = seconds, away

    def client_times(
        self, round: int, now_s: float, done: Mapping[str, CompletedWork], late: Mapping[str, float]
    ) -> Mapping[str, ClientTime]:
        return {name: ClientTime(self.seconds[name], 0.0) for name in done}

    def overdue(self, deadlines_s: Mapping[str, float], spent: Mapping[str, ClientTime]) -> Mapping[str, float]:
        return {}

    def round_seconds(self, spent: Mapping[str, ClientTime]) -> float:
        return max((each.seconds for each in spent.values()), default=0.0)

    def reachable(self, round: int, client: str) -> bool:
        return client not in self.away


def trained(value: float) -> Script:
    """Return a client that moves what its task trains, by numbers of its own in every round."""

    def reply(assignment: Any) -> ClientUpdate:
        update = answer(value + 0.01 * assignment.round)(assignment)
        assert isinstance(update, ClientUpdate)
        assert isinstance(update.result, LoraResult)
        kept = {name: factor for name, factor in update.result.tensors.items() if name[-1] in assignment.lora.train}
        return replace(update, result=replace(update.result, tensors=kept))

    return reply


THREE = {"ann": 1.0, "bob": 2.0, "cyd": 10.0}


def context_of(
    seconds: Mapping[str, float],
    asynchronous: AsyncSettings | None,
    *,
    replies: Mapping[str, Script] | None = None,
    method: str = "fedit",
    count: int = 3,
    order: Callable[[list[str]], list[str]] = sorted,
    strays: Sequence[Answer] = (),
    **options: Any,
) -> RoundContext:
    scripts = {name: trained(0.1 * place) for place, name in enumerate(seconds, 1)} | dict(replies or {})
    own = {key: options.pop(key) for key in ("journal", "watch", "first") if key in options}
    away, enrolled = options.pop("away", ()), options.pop("enrolled", {})
    return RoundContext(
        method=METHODS[method],
        settings=METHODS[method].settings(wire_dtype="bf16"),
        planner=Fixed(lambda name: (2, TRAINING), alpha="2r", rslora=False),
        transport=Scripted(scripts, order, strays, enrolled),
        schedule=Schedule(count=count, max_norm=None, **options),
        blueprint=Blueprint({"x": SHAPE}, saved={}, max_rank=2, seed=0),
        base="base",
        clock=Steady(seconds, away),
        asynchronous=asynchronous,
        **own,
    )


def rounds(seconds: Mapping[str, float], asynchronous: AsyncSettings, **options: Any) -> list[RoundResult]:
    return list(buffer.run(context_of(seconds, asynchronous, **options)))


def story(results: Sequence[RoundResult]) -> list[tuple[float, dict[str, int]]]:
    return [(result.clock_s, dict(result.staleness)) for result in results]


def test_a_round_ends_with_the_first_updates_and_slow_clients_miss_versions() -> None:
    """Ann takes 1 s, bob 2 s, cyd 10 s: cyd's first update comes in the sixth round, five versions late."""
    results = rounds(THREE, AsyncSettings(buffer=2), count=6)
    fresh = {"ann": 0, "bob": 0}
    assert story(results) == [(2, fresh), (4, fresh), (6, fresh), (8, fresh), (10, fresh), (11, {"ann": 0, "cyd": 5})]
    assert results[-1].discounts == {"cyd": 6**-0.5}
    assert [tuple(result.working) for result in results] == [("cyd",)] * 5 + [("bob",)]


@pytest.mark.parametrize("method", ["fedit", "ffa", "flora", "zeropad"])
@pytest.mark.parametrize("cohort", [None, 3])
def test_a_buffer_of_the_whole_cohort_is_the_synchronous_loop_to_the_bit(method: str, cohort: int | None) -> None:
    """K = M = cohort: every update is fresh, and the same clients are drawn."""
    seconds = {f"c{place}": 1.0 + place * 0.7 for place in range(5)}
    options: dict[str, Any] = {"method": method, "cohort": cohort, "enrolled": {"c1": 70, "c3": 40}}
    one = list(loop.run(context_of(seconds, None, **options)))
    other = rounds(seconds, AsyncSettings(buffer=cohort or 5), **options)
    assert len(one) == len(other) == 3
    for ours, theirs in zip(one, other, strict=True):
        assert (ours.digest, ours.clock_s, ours.traffic) == (theirs.digest, theirs.clock_s, theirs.traffic)
        assert list(ours.outcomes) == list(theirs.outcomes)
        assert ours.planned == theirs.planned
        assert ours.norms == theirs.norms


def test_the_state_moves_by_the_discounted_changes_by_hand() -> None:
    """Each round's step is sum of p_k s_k u_k, with u_k what the client changed of the version it was sent."""
    scripts = {"ann": constant(1.0), "bob": constant(2.0), "cyd": constant(8.0)}
    results = rounds(THREE, AsyncSettings(buffer=2), count=6, replies=scripts, enrolled={"ann": 30, "cyd": 10})
    start = METHODS["fedit"].init(Blueprint({"x": SHAPE}, saved={}, max_rank=2, seed=0), results[0].state.settings)
    moved = [result.state.tensors["x.b"] - start.tensors["x.b"] for result in results]
    # Five rounds of ann and bob (3 : 1), then ann and cyd (3 : 1), whose change counts 6 ** -0.5.
    for number in range(5):
        np.testing.assert_allclose(moved[number], (number + 1) * (0.75 * 1 + 0.25 * 2), rtol=1e-5)
    np.testing.assert_allclose(moved[5], 5 * 1.25 + 0.75 * 1 + 0.25 * 6**-0.5 * 8, rtol=1e-5)


def constant(value: float) -> Script:
    def reply(assignment: Any) -> ClientUpdate:
        update = answer(0.0)(assignment)
        assert isinstance(update, ClientUpdate)
        tensors = {"x.a": np.zeros((2, SHAPE[1]), np.float32), "x.b": np.full((SHAPE[0], 2), value, np.float32)}
        assert isinstance(update.result, LoraResult)
        return replace(update, result=replace(update.result, tensors=tensors))

    return reply


def test_an_update_that_would_be_too_stale_is_given_up_and_its_place_is_free() -> None:
    results = rounds(THREE, AsyncSettings(buffer=2, max_staleness=2), count=5)
    assert [tuple(result.outcomes) for result in results][:3] == [("ann", "bob")] * 3
    failure = results[3].outcomes["cyd"]
    assert isinstance(failure, Failure)
    assert failure.kind == "late"
    assert "asynchronous.max_staleness" in failure.reason
    assert "order of round 1 has missed 3" in failure.reason
    # Not asked again in the round that gave it up, but in the next.
    assert [tuple(result.working) for result in results] == [("cyd",)] * 3 + [(), ("cyd",)]
    assert results[3].traffic["cyd"].up == 0


def test_without_staleness_allowed_it_is_over_selection() -> None:
    """max_staleness = 0: clients that miss the buffer are given up before the next round."""
    results = rounds(THREE, AsyncSettings(buffer=2, max_staleness=0), count=3)
    assert {name: missed for result in results for name, missed in result.staleness.items()} == {"ann": 0, "bob": 0}


def test_places_are_given_away_on_arrival_if_that_is_asked() -> None:
    """Two places, four clients: with after-receiving the third starts when the first has finished."""
    seconds = {"ann": 1.0, "bob": 5.0, "cyd": 1.0, "dan": 1.0}
    after = rounds(seconds, AsyncSettings(buffer=2, concurrency=2, send="after-receiving"), count=1)[0]
    plain = rounds(seconds, AsyncSettings(buffer=2, concurrency=2), count=1)[0]
    assert len(after.working) == 1
    assert not plain.working
    drawn = sorted({*after.staleness, *after.working})
    assert {*plain.staleness} < {*drawn}


def test_a_client_is_in_a_buffer_once() -> None:
    """Ann could answer ten times while bob works: then one organisation would fill the buffer alone."""
    settings = AsyncSettings(buffer=2, concurrency=2, send="after-receiving")
    results = rounds({"ann": 0.1, "bob": 5.0}, settings, count=3)
    assert [dict(result.staleness) for result in results] == [{"ann": 0, "bob": 0}] * 3


def test_a_round_of_time_takes_what_has_come() -> None:
    settings = AsyncSettings(trigger="time", budget_s=4.5)
    results = rounds(THREE, settings, count=3)
    fresh = {"ann": 0, "bob": 0}
    # The third ends early: nobody is left to wait for.
    assert story(results) == [(4.5, fresh), (9.0, fresh), (11.0, {"ann": 0, "bob": 0, "cyd": 2})]
    assert story(rounds({"ann": 7.0, "bob": 9.0}, settings, count=2, min_clients=1)) == [
        (7, {"ann": 0}),
        (11.5, {"bob": 1}),
    ]


def test_a_failed_clients_place_is_given_away_where_the_buffer_needs_it() -> None:
    scripts = {"bob": lambda assignment: Failure.from_text("bob", "no power")}
    seconds = {"ann": 1.0, "bob": 1.0, "cyd": 4.0, "dan": 4.0}
    results = rounds(seconds, AsyncSettings(buffer=2, concurrency=2), count=4, replies=scripts)
    assert all(len(result.staleness) == 2 for result in results)
    asked = [result for result in results if "bob" in result.outcomes]
    assert asked
    assert all(isinstance(result.outcomes["bob"], Failure) for result in asked)


class Silent(Scripted):
    """A client that never answers, and one that answers twice."""

    def exchange(self, orders: Any, rule: Any) -> Any:
        for one in super().exchange({name: order for name, order in orders.items() if name != "cyd"}, rule):
            yield one
            if isinstance(one, Reply) and one.client == "bob":
                yield one


def test_a_client_that_vanishes_frees_its_place_and_a_second_answer_is_dropped() -> None:
    notes: list[str] = []
    context = context_of(THREE, AsyncSettings(buffer=2), watch=texts(notes))
    transport = context.transport
    assert isinstance(transport, Scripted)
    context = replace(context, transport=Silent(transport.replies))
    results = list(buffer.run(context))
    assert [sorted(result.staleness) for result in results] == [["ann", "bob"]] * 3
    assert all("none came" in str(result.outcomes["cyd"]) for result in results)
    assert [stray.client for result in results for stray in result.unsolicited] == ["bob"] * 3
    assert "bob: answered unasked; dropped" in notes


def texts(notes: list[str]) -> Callable[[Event], None]:
    return lambda event: notes.append(event.text) if isinstance(event, Note) else None


def test_a_liar_that_answers_an_old_order_is_refused() -> None:
    def old(assignment: Any) -> ClientUpdate:
        update = answer()(assignment)
        assert isinstance(update, ClientUpdate)
        return replace(update, round=1)

    results = rounds(THREE, AsyncSettings(buffer=2), replies={"ann": old}, count=3)
    later = results[1].outcomes["ann"]
    assert isinstance(later, Failure)
    assert later.kind == "refused"
    assert "round" in later.reason


def test_a_buffer_that_no_client_is_left_to_fill_is_aggregated_as_it_is_or_stops_the_run() -> None:
    notes: list[str] = []
    results = rounds({"ann": 1.0, "bob": 2.0}, AsyncSettings(buffer=3), count=1, watch=texts(notes))
    assert sorted(results[0].staleness) == ["ann", "bob"]
    assert "round 1: 2 updates: no other client was there to fill the buffer" in notes
    with pytest.raises(RoundError, match="at least 3 usable updates"):
        rounds({"ann": 1.0, "bob": 2.0}, AsyncSettings(buffer=3), count=1, min_clients=3)
    with pytest.raises(RoundError, match="one of 2 clients to be there"):
        rounds({"ann": 1.0, "bob": 2.0}, AsyncSettings(buffer=1), count=1, away=("ann", "bob"))


def test_all_updates_stale_take_a_shorter_step() -> None:
    """Both are two versions late in the second round, and nothing divides by what they count."""
    scripts = {"ann": constant(1.0), "bob": constant(1.0)}
    seconds = {"ann": 1.0, "bob": 1.0, "cyd": 3.0, "dan": 3.0}
    settings = AsyncSettings(buffer=2, staleness_exponent=1.0)
    results = rounds(seconds, settings, count=5, replies={**scripts, "cyd": constant(1.0), "dan": constant(1.0)})
    steps = np.diff([0.0, *(float(result.state.tensors["x.b"].mean()) for result in results)])
    expected = [sum(1 / (1 + missed) for missed in result.staleness.values()) / 2 for result in results]
    assert min(expected) <= 1 / 2
    np.testing.assert_allclose(steps, expected, rtol=1e-5)


def test_weights_are_those_of_the_buffer_and_capped_in_it() -> None:
    """A client that claims a million examples counts as ten of the buffer's median."""
    results = rounds(THREE, AsyncSettings(buffer=2), count=1, enrolled={"ann": 10**6})
    assert results[0].counted == {"ann": 100.0}


def test_updates_that_come_in_any_order_give_the_same_state() -> None:
    one = rounds(THREE, AsyncSettings(buffer=2), count=6)
    other = rounds(THREE, AsyncSettings(buffer=2), count=6, order=lambda names: sorted(names, reverse=True))
    assert [result.digest for result in one] == [result.digest for result in other]


def test_the_first_round_that_prepares_the_others_takes_all_clients() -> None:
    context = context_of(THREE, AsyncSettings(buffer=2), first=METHODS["fedit"])
    first, *others = buffer.run(context)
    assert sorted(first.staleness) == ["ann", "bob", "cyd"]
    assert first.clock_s == 10
    assert all(len(result.staleness) == 2 for result in others)


def test_who_still_works_at_the_end_is_named() -> None:
    notes: list[str] = []
    rounds(THREE, AsyncSettings(buffer=2), count=2, watch=texts(notes))
    assert notes == ["still at work when the last round ended, their updates are not used: cyd"]


def test_without_a_clock_it_is_refused() -> None:
    context = replace(context_of(THREE, AsyncSettings(buffer=2)), clock=None)
    with pytest.raises(ConfigError, match="a table fleet in a simulation"):
        next(buffer.run(context))


class Recorded(NullJournal):
    """Writes down the asks and buffers of a run, and what a resumed run finds."""

    def __init__(self) -> None:
        self.steps: list[tuple[Any, ...]] = []

    def ask(self, ask: Ask, *, state: str) -> None:
        self.steps.append(("ask", ask.round, tuple(client.name for client in ask.clients), ask.now_s))

    def accept(self, round: int, client: str, update: bytes) -> None:
        self.steps.append(("accept", round, client))

    def settle(self, round: int, used: Sequence[str], failures: Any, sizes: Any) -> None:
        self.steps.append(("settle", round, tuple(used), tuple(failures)))


def test_orders_and_buffers_are_recorded_before_they_take_effect() -> None:
    journal = Recorded()
    rounds(THREE, AsyncSettings(buffer=2), count=2, journal=journal)
    assert journal.steps == [
        ("ask", 1, ("ann", "bob", "cyd"), 0.0),
        ("accept", 1, "ann"),
        ("accept", 1, "bob"),
        ("accept", 1, "cyd"),
        ("settle", 1, ("ann", "bob"), ()),
        ("ask", 2, ("ann", "bob"), 2.0),
        ("accept", 2, "ann"),
        ("accept", 2, "bob"),
        ("settle", 2, ("ann", "bob"), ()),
    ]


def test_an_update_in_a_result_holds_no_state() -> None:
    """A report keeps results of hundreds of rounds; each would keep the state that a stale client started from."""
    last = rounds(THREE, AsyncSettings(buffer=2), count=6)[-1].outcomes["cyd"]
    assert isinstance(last, AdmittedUpdate)
    assert last.origin is None


def test_nothing_is_known_without_a_journal() -> None:
    assert NullJournal().open_orders(3) == OpenOrders()
    assert NullJournal().version(3) == b""
    assert Ask(1, 0.0, (Client("ann", 1),)).digests == {}


def test_a_stale_update_is_aggregated_with_the_state_that_its_client_started_from() -> None:
    """Flora's products, and modules_to_save, are those of that state and not of the current one."""
    method, seen = METHODS["flora"], list[dict[str, int | None]]()

    def aggregate(state: Any, updates: Sequence[AdmittedUpdate]) -> Any:
        seen.append({update.client: update.origin and update.origin.round for update in updates})
        return method.aggregate(state, updates)

    context = context_of(THREE, AsyncSettings(buffer=2), method="flora", count=6)
    list(buffer.run(replace(context, method=replace(method, aggregate=aggregate))))
    assert seen == [{"ann": None, "bob": None}] * 5 + [{"ann": None, "cyd": 0}]
