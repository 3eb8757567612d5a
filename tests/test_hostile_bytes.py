"""Changed messages, files and envelopes run no code: no event of the interpreter happens while they are read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
HARMLESS = {"sys._getframe", "builtins.id", "object.__getattr__", "object.__setattr__", "mmap.__new__"}
"""Events that read or run nothing that came from outside."""
FILES = {"open", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.mkdir"}
"""Events of the file system: allowed below the test's own folder."""


@pytest.mark.guarantee("G1")
@pytest.mark.parametrize("mutations", [10_000, pytest.param(300_000, marks=pytest.mark.slow)])
def test_changed_bytes_cause_no_event_of_the_interpreter(
    tmp_path: Path, cases: Callable[[int], None], mutations: int
) -> None:
    command = [sys.executable, __file__, str(tmp_path), str(mutations)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["events"] == {}
    assert result["other_errors"] == {}
    assert len(result["read"]) >= 22
    assert sum(result["read"].values()) == mutations // len(result["read"]) * len(result["read"])
    assert all(result["taken"][name] < count for name, count in result["read"].items()), "no change was refused"
    # The same hook sees what a decoder of bad faith does, were there one.
    assert {"pickle.find_class", "os.system", "import", "exec", "compile", "socket.connect", "subprocess.Popen"} <= {
        *result["caught"]
    }
    cases(sum(result["read"].values()))


def main(folder: Path, mutations: int) -> None:
    """Read changed bytes under an audit hook, and print what happened."""
    from tests.decoders import EXPECTED, decoders
    from tests.link.test_fuzz import mutations as changed

    events, watching = dict[str, int](), False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not watching or event in HARMLESS:
            return
        # By a number a file is opened that was opened before, by its path.
        if event in FILES and (isinstance(arguments[0], int) or str(arguments[0]).startswith(str(folder))):
            return
        name = f"{event} {arguments[0]!r:.80}" if event in {*FILES, "import"} and arguments else event
        events[name] = events.get(name, 0) + 1

    sys.addaudithook(hook)
    read, taken, other = dict[str, int](), dict[str, int](), dict[str, int]()
    known = decoders(folder)
    for decoder in known:
        decoder.read(decoder.data)  # what is imported at first use is, and the bytes are ones that it takes
        count = mutations // len(known)
        read[decoder.name], taken[decoder.name] = 0, 0
        for data in changed(decoder.data, f"hostile {decoder.name}", count):
            watching = True
            try:
                decoder.read(data)
                taken[decoder.name] += 1
            except EXPECTED:
                pass
            except Exception as error:  # whatever else it raises is a finding by name
                other[f"{decoder.name}: {error!r:.200}"] = 1
            watching = False
            read[decoder.name] += 1
    result = {"events": dict(events), "read": read, "taken": taken, "other_errors": other}
    watching = True
    misbehave()
    watching = False
    caught = sorted({event.partition(" ")[0] for event in events.keys() - result["events"].keys()})
    print(json.dumps({**result, "caught": caught}))


def misbehave() -> None:
    """Do all that received bytes must never cause."""
    import pickle
    import socket
    from contextlib import suppress

    pickle.loads(b"cposix\nsystem\n(S'true'\ntR.")
    exec(compile("import colorsys", "received", "exec"))
    subprocess.run(["true"], check=True)
    with suppress(OSError), socket.socket() as plain:
        plain.connect(("127.0.0.1", 9))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
