"""Who is planned to descend, and who to probe: by what the recipe asks, and by what the device can hold."""

from __future__ import annotations

from fedtune.messages import Client, Failure, PlannedClient, Training, VerbChoice
from fedtune.planning.fixed import Fixed
from fedtune.planning.planner import PlannerInputs
from fedtune.planning.verbs import VerbRequest, no_request

DESCENT = Training(batch=4, learning_rate=0.02, steps=8)
PROBING = Training(batch=4, learning_rate=2e-4, epochs=2.0)


def planned(
    verb: VerbChoice | None, *, short_of: str = "", probing: Training | None = PROBING
) -> PlannedClient | Failure:
    fixed = Fixed(
        lambda name: (1, PROBING if verb == "probe" else DESCENT),
        "2r",
        False,
        verb=lambda name: VerbRequest(verb, probing) if verb else no_request(name),
        misfit=lambda client, arm, training: "needs 2 GB" if "probe" in short_of else "",
        misfit_descending=lambda client, training: "needs 9 GB" if "descend" in short_of else "",
    )
    return fixed.plan(None, 1, [Client("ann", 10)])["ann"]


def test_a_client_descends_by_its_own_training_and_brings_how_it_would_probe() -> None:
    own = planned("auto")
    assert isinstance(own, PlannedClient)
    assert (own.verb, own.plan.training) == ("auto", DESCENT)
    assert own.probing is not None
    assert (own.probing.steps, own.probing.epochs) == (5, None)


def test_who_is_too_small_to_descend_probes_and_the_records_say_why() -> None:
    own = planned("auto", short_of="descend")
    assert isinstance(own, PlannedClient)
    assert (own.verb, own.plan.training.learning_rate, own.plan.training.steps) == ("probe", 2e-4, 5)
    assert "needs 9 GB" in own.why


def test_without_a_way_to_probe_the_client_sits_out() -> None:
    unfit = Failure.from_text("ann", "needs 9 GB", kind="unfit")
    assert planned("descend", short_of="descend") == unfit
    assert planned("auto", short_of="descend", probing=None) == unfit
    assert planned("auto", short_of="descend, probe") == Failure.from_text("ann", "needs 2 GB", kind="unfit")


def test_memory_for_probing_alone_does_not_keep_a_client_from_descending() -> None:
    own = planned("descend", short_of="probe")
    assert isinstance(own, PlannedClient)
    assert own.verb == "descend"


def test_methods_whose_clients_all_do_the_same_have_no_verb() -> None:
    own = planned(None)
    assert isinstance(own, PlannedClient)
    assert (own.verb, own.probing) == (None, None)


def test_planners_of_other_packages_plan_the_same_verb() -> None:
    inputs = PlannerInputs(0, 1, lambda name: (1, DESCENT), verb=lambda name: VerbRequest("auto", PROBING))
    own = inputs.plan(Client("ann", 10))
    assert (own.verb, own.plan.training, own.probing and own.probing.steps) == ("auto", DESCENT, 5)
