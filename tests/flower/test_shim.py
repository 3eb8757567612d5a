"""What is used of flwr beyond its public interface, and that nothing else uses more."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from flwr.app import Message, MessageType, RecordDict

from fedtune.errors import ConfigError, ExtraError
from fedtune.flower import ENVIRONMENT, shim

ROOT = Path(__file__).parents[2]
PUBLIC = {"flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy"}
MODULES = sorted(path.stem for path in (ROOT / "fedtune" / "flower").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("found", ["1.40.9", "1.43.0", "2.41.0", "1.4.1", ""])
def test_a_flwr_that_nobody_has_looked_at_is_refused(found: str) -> None:
    with pytest.raises(ConfigError, match=r"expected flwr>=1.41,<1.43; got flwr"):
        shim.check_version(found)


@pytest.mark.parametrize("found", ["1.41.0", "1.42.3", "1.42.0.dev1"])
def test_the_minors_whose_internals_are_known_are_taken(found: str) -> None:
    shim.check_version(found)


def test_only_the_shim_imports_more_of_flwr_than_is_public() -> None:
    faults = []
    for path in [
        *(ROOT / "fedtune").rglob("*.py"),
        *(ROOT / "server").rglob("*.py"),
        *(ROOT / "clients").rglob("*.py"),
    ]:
        if path == ROOT / "fedtune" / "flower" / "shim.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            faults += [f"{path}: {name}" for name in names if name.split(".")[0] == "flwr" and name not in PUBLIC]
    assert not faults, "\n".join(faults)


def test_a_message_needs_the_identity_of_a_task() -> None:
    shim.leave_task()
    with pytest.raises(RuntimeError, match="TaskIdentity"):
        Message(RecordDict(), 7, MessageType.TRAIN)
    shim.enter_task(12)
    assert Message(RecordDict(), 7, MessageType.TRAIN).metadata.run_id == 12


def test_a_stamped_message_is_answered_by_its_id() -> None:
    order = Message(RecordDict(), 7, MessageType.TRAIN)
    shim.stamp(order, "one")
    assert Message(RecordDict(), reply_to=order).metadata.reply_to_message_id == "one"


def test_a_missing_ray_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ExtraError, match=r'pip install "fedtune\[ray\]"'):
        shim.check_ray()


def test_a_process_without_ray_is_no_simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    assert not shim.in_simulation()
    assert "ray" not in sys.modules


@pytest.mark.parametrize("module", MODULES)
def test_flower_reports_nothing_home_whatever_is_imported_first(module: str) -> None:
    code = (
        f"import fedtune.flower.{module}, os, flwr.supercore.telemetry as telemetry\n"
        "print(telemetry.FLWR_TELEMETRY_ENABLED, *(os.environ[name] for name in "
        f"{sorted(ENVIRONMENT)!r}))"
    )
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("FLWR_", "RAY_"))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, env=bare, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["0", *(ENVIRONMENT[name] for name in sorted(ENVIRONMENT))]


def test_an_operators_own_choice_stays() -> None:
    code = "import fedtune.flower, os; print(os.environ['RAY_AUTH_MODE'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "disabled"


def test_telemetry_that_is_switched_off_does_not_look_at_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower asks for it in a thread, whose program `file` was found running after the engine had ended."""
    from flwr.supercore import telemetry

    asked = list[str]()
    monkeypatch.setattr("platform.architecture", lambda: asked.append("architecture"))
    monkeypatch.setattr(telemetry, "_get_source_id", lambda: asked.append("id"))
    monkeypatch.setattr(telemetry, "create_event", telemetry.create_event)  # restored after the test
    monkeypatch.setattr(telemetry, "FLWR_TELEMETRY_ENABLED", "1")  # as where flwr is imported before fedtune
    monkeypatch.setattr("urllib.request.urlopen", lambda *arguments, **options: asked.append("network"))
    shim.skip_reports()
    assert telemetry.event(telemetry.EventType.PING).result(timeout=60) == "disabled"
    assert asked == []
