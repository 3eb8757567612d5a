"""The built file of a device: what it is made of, how long its starts take, and what it holds while it waits.

    python benchmarks/edge_binary.py FILE [--base MODEL] [--starts 5]

Seconds are wall-clock and processor time: on a machine with other work only the second says how long a start takes on
an idle one. A device joins a server that waits for another one, so that it is idle; no Python is on its PATH.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from fedtune.runs.edge_bundle import export_bundle  # noqa: E402
from tests.cli.test_flower_server import toml  # noqa: E402
from tests.edge_binary import bare_environment, join_binary, processes_of  # noqa: E402
from tests.link.federation import Federation, federation  # noqa: E402

NAMES = ("0", "1")
TICKS = os.sysconf("SC_CLK_TCK")


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def parts_of(tree: Path) -> Mapping[str, float]:
    """Return megabytes of an unpacked file by part, of half a megabyte and more."""
    result: Counter[str] = Counter()
    for path in (path for path in tree.rglob("*") if path.is_file() and not path.is_symlink()):
        parts = [part for part in path.relative_to(tree).parts if part != "_internal"]
        result[parts[0].removesuffix(".libs")] += path.stat().st_size
    return {name: round(size / 1e6, 1) for name, size in result.most_common() if size > 5e5}


def timed(command: list[str], environment: Mapping[str, str]) -> tuple[float, float]:
    """Return wall-clock and processor seconds of a command."""
    before, began = os.times(), time.monotonic()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return round(time.monotonic() - began, 3), round(cpu, 3)


def memory_of(process: int) -> Mapping[str, float]:
    """Return megabytes of a process: resident, and its share of what several processes hold."""
    rows = [line.split() for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]]
    values = {row[0].rstrip(":"): int(row[1]) * 1024 / 1e6 for row in rows}
    return {"rss_mb": round(values["Rss"], 1), "pss_mb": round(values["Pss"], 1)}


def cpu_of(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def wait_for(fed: Federation, name: str, event: str) -> None:
    fed.until(lambda: fed.events(name, event) or fed.processes[name].poll() is not None)


def measure_idle(file: Path, folder: Path, home: Path, base: Path, data: Path) -> None:
    """Join a server that waits for a second device, and say what the start took and what is held meanwhile."""
    tables = {
        "name": "idle",
        "model": {"base": str(base), "threads": 1},
        "method": {"name": "fedkseed", "bank": "kron", "seeds": 256, "perturbation": 1e-3},
        "client": {"steps": 16, "batch": 4, "learning_rate": 2e-4},
        "rounds": {"count": 3, "min_clients": 2},
        "data": {
            "source": str(data),
            "split": {"kind": "key", "by": "flora_client", "clients": 2},
            "template": "plain",
            "max_tokens": 96,
            "limit": 200,
        },
        "evaluate": {"every": 0, "examples": 2, "client_examples": 4},
    }
    own = toml({"data": tables["data"], "model": {"base": str(folder / "bundle"), "threads": 1}})
    with federation(folder, toml(tables), NAMES, site=dict.fromkeys(NAMES, own)) as fed:
        export_bundle(base, folder / "bundle", identity=fed.places["server"])
        fed.serve()
        fed.until(lambda: fed.events("server", "listening"))
        began = time.monotonic()
        process = join_binary(fed, "0", file, home)
        wait_for(fed, "0", "hello")
        say(measure="second start to joined", wall_s=round(time.monotonic() - began, 2), cpu_s=cpu_of(process.pid))
        wait_for(fed, "0", "receipt")
        say(measure="idle, link", **memory_of(process.pid))
        for other in processes_of(str(folder / "0" / "site.toml")):
            if other != process.pid:
                say(measure="idle, training process with the model", **memory_of(other))
        join_binary(fed, "1", file, home)
        fed.exit_statuses("server", *NAMES)
        for event in fed.events("0", "trained"):
            say(measure="round", **{key: event[key] for key in ("round", "work", "up", "down", "line_up", "line_down")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--base", type=Path, default=ROOT.parent / "shared" / "models" / "stories260k-hf")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "dolly" / "small_train.jsonl")
    parser.add_argument("--starts", type=int, default=5)
    options = parser.parse_args()
    file = options.file.resolve()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        home = folder / "home"
        environment = bare_environment(folder, home)
        wall, cpu = timed([str(file), "version"], environment)
        say(measure="file", mb=round(file.stat().st_size / 1e6, 1), load=os.getloadavg()[0])
        say(measure="first start, with unpacking and a trial", wall_s=wall, cpu_s=cpu)
        (tree,) = (home / "bin").iterdir()
        say(measure="unpacked, MB", **parts_of(tree))
        starts = [timed([str(file), "version"], environment) for _ in range(options.starts)]
        for place, kind in enumerate(("wall_s", "cpu_s")):
            values = [start[place] for start in starts]
            say(measure="second start: version", median=median(values), least=min(values), most=max(values), of=kind)
        (folder / "federation").mkdir()
        measure_idle(file, folder / "federation", home, options.base, options.data)


if __name__ == "__main__":
    main()
