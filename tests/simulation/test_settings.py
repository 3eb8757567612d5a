from __future__ import annotations

import pytest

from fedtune.config import bind, changes, digest
from fedtune.errors import ConfigError
from fedtune.simulation.settings import EngineSettings

TABLES = {
    "name": "tiny",
    "model": {"base": "embedded"},
    "adapter": {"rank": 4, "targets": ["q_proj"]},
    "method": "flora",
    "client": {"steps": 3, "batch": 4, "learning_rate": 0.05},
    "rounds": {"count": 2},
    "data": {"source": "data.jsonl", "split": {"kind": "iid", "clients": 4}},
}


def test_the_engine_is_one_word_or_a_table() -> None:
    assert bind(TABLES).engine == EngineSettings("inprocess", workers=None, timeout_s=None)
    assert bind({**TABLES, "engine": "processes"}).engine.name == "processes"
    table = {"name": "ray", "workers": 2}
    assert bind({**TABLES, "engine": table}).engine == EngineSettings("ray", workers=2)


def test_the_engine_changes_neither_digest_nor_what_a_resumed_run_is_held_against() -> None:
    one, other = bind(TABLES), bind({**TABLES, "engine": {"name": "processes", "workers": 3}})
    assert digest(one) == digest(other)
    assert changes(one, other) == []


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("process", r"engine.name: .*did you mean"),
        ({"workers": 0}, r"engine.workers: expected .*got 0"),
        ({"name": "ray", "worker": 2}, r"engine.worker: .*did you mean engine.workers"),
        ({"timeout_s": -1.0}, r"engine.timeout_s"),
    ],
)
def test_a_wrong_engine_is_told(engine: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bind({**TABLES, "engine": engine})
