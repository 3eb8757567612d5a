from __future__ import annotations

from collections.abc import Mapping

from flwr.app import Context, RecordDict

from fedtune.flower.server_app import Connect, Scalar, server_app
from tests.flower.conftest import fleet


def test_the_app_hands_on_the_runs_configuration_and_its_grid() -> None:
    seen: list[object] = []
    notes: list[str] = []

    def run_recipe(connect: Connect, run_config: Mapping[str, Scalar]) -> None:
        transport = connect(expected=2, least=1, note=notes.append)
        seen.extend([dict(run_config), [client.name for client in transport.clients()]])

    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={"recipe": "x", "resume": ""})
    server_app(run_recipe)(fleet("bob", "ann"), context)
    assert seen == [{"recipe": "x", "resume": ""}, ["ann", "bob"]]
    assert notes[0] == "waiting for 2 clients to say hello"
    assert {note.partition(" (")[0] for note in notes[1:]} == {
        f"{name} connected: 10 examples" for name in ("ann", "bob")
    }
    assert [note[-8:] for note in notes[1:]] == ["(1 of 2)", "(2 of 2)"]
