"""The built file of a device for tests: where it lies, how it is started without any Python, what it leaves running."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from fedtune.link.client.outbox import load_entries
from fedtune.link.envelopes import digest
from fedtune.messages import ProbeResult, ProbeSeeds
from fedtune.wire.codec import decode_update, parse
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.federation import END_S, Federation

ROOT = Path(__file__).parents[1]
TOOLS = ("sh", "tar", "gzip", "sha256sum", "tail", "mkdir", "mv", "rm", "ls", "grep", "sync", "uname")
"""All that the file's own script needs; no Python is on PATH."""


def built_file(name: str = "fedtune-edge") -> Path:
    """Return the file of this commit, built where it is not there; FEDTUNE_EDGE_BINARY names another one."""
    if name in (given := Path(os.environ.get("FEDTUNE_EDGE_BINARY", ""))).name:
        return given.resolve()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    mark = ROOT / "build" / "edge" / name / "commit"
    paths = sorted((ROOT / "dist").glob(f"{name}-[0-9]*-{os.uname().machine}"))
    if not paths or not mark.exists() or mark.read_text() != commit:
        subprocess.run([sys.executable, ROOT / "clients" / "edge" / "build.py", name], cwd=ROOT, check=True)
        mark.write_text(commit)
        paths = sorted((ROOT / "dist").glob(f"{name}-[0-9]*-{os.uname().machine}"))
    return paths[-1]


def bare_environment(folder: Path, home: Path) -> Mapping[str, str]:
    """Return the environment of a device: a PATH with few tools, and a folder for the program's files."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for tool in TOOLS:
        if not (tools / tool).exists():
            (tools / tool).symlink_to(str(shutil.which(tool)))
    return {"PATH": str(tools), "FEDTUNE_HOME": str(home)}


def join_binary(fed: Federation, name: str, binary: Path, home: Path) -> subprocess.Popen[str]:
    """Start the file as the site of a name."""
    command = ("join", str(fed.folder / name / "site.toml"), "--log", "json")
    return fed.start(name, *command, program=[str(binary)], environment=bare_environment(fed.folder, home))


def kill_group(fed: Federation, name: str) -> None:
    """Kill a site's process group, as the loss of power would, and wait until nothing of it runs."""
    process = fed.processes.pop(name)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # It ends with the last process that writes there: the one that trains, too.
    for reader in (thread for thread in fed.readers if thread.name == f"output of {process.pid}"):
        reader.join(END_S)


def processes_of(text: str) -> list[int]:
    """Return the processes whose command line has a text in it."""
    result = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text.encode() in path.read_bytes():
                result.append(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return result


def states_by_round(fed: Federation, name: str) -> Mapping[int, str]:
    """Return the digest of the state at which a site measured seeds, by round."""
    result: dict[int, set[str]] = {}
    for run in (fed.folder / name / "state" / "runs").iterdir():
        for entry in load_entries(fed.folder / name / "state", run.name):
            if (reply := entry.reply()) is None:
                continue
            keys = {part.digest: part.key for part in parse(pb.Header(), reply.envelope.header).parts}
            for part in reply.inline:
                if keys[part.digest] == "update":
                    update = decode_update(part.data, client=name, limit_bytes=1 << 20, task=ProbeSeeds)
                    assert isinstance(update.result, ProbeResult)
                    # A device that was killed may lack what a short message builds on, and asks for all of it.
                    if not update.result.lost:
                        result.setdefault(update.round, set()).add(update.result.state.hex())
    assert all(len(states) == 1 for states in result.values()), result
    return {number: states.pop() for number, states in result.items()}


def answers_of(fed: Federation, name: str) -> Mapping[str, str]:
    """Return the digest of a site's stored reply by that of its order, of all rounds but the first messages."""
    state = fed.folder / name / "state"
    entries = [entry for run in state.glob("runs/*") for entry in load_entries(state, run.name)]
    replies = [(entry, entry.reply()) for entry in entries if entry.header.round]
    return {entry.digest.hex(): digest(reply.envelope).hex() for entry, reply in replies if reply is not None}
