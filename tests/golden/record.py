"""Golden values: what every method, engine, message and command of a release comes to, kept beside this script.

python tests/golden/record.py --check            compare this checkout with the JSON files beside the script
python tests/golden/record.py --write            write them anew; only before a change that is meant to change nothing
python tests/golden/record.py --check --only methods --only messages

Bits of torch depend on the machine and the versions; where they differ from those of the recording, --check says so
and compares what does not depend on them. --ray adds the engine ray.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
LIBRARIES = ("numpy", "torch", "transformers", "peft", "flwr", "protobuf", "cryptography")
PORTABLE = ("messages",)
"""Sections that are the same on every machine."""


def machine() -> Mapping[str, str]:
    """Return what the bits of torch may depend on."""
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cpu": cpu(),
        "python": ".".join(platform.python_version_tuple()[:2]),
        **{name: version(name) for name in LIBRARIES},
    }


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


@contextmanager
def workplace() -> Iterator[Path]:
    """Give a new working folder with the data of the recipes."""
    from tests.golden.recipes import write_data

    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(before)


def methods() -> Mapping[str, Any]:
    """Return three rounds of every method in process."""
    import fedtune
    from tests.golden.recipes import described, recipes

    values: dict[str, Any] = {}
    with workplace() as folder:
        for name, tables in recipes().items():
            run = fedtune.simulate(tables, out=folder / "runs" / name, watch=lambda event: None)
            values[name] = described(run.path, simulated_clock="fleet" in tables)
    return values


def engines(*, ray: bool = False) -> Mapping[str, Any]:
    """Return the digests of the states and assignments that each engine comes to."""
    from tests.golden import engines as module

    with workplace() as folder:
        return module.digests(folder, ray=ray)


def messages() -> Mapping[str, Any]:
    """Return the bytes of one message of each kind."""
    from tests.golden import messages as module

    return module.values()


def commands() -> Mapping[str, Any]:
    """Return exit codes, machine-readable output and written files of each command."""
    from tests.golden import commands as module

    with workplace() as folder:
        return module.values(folder)


def archives() -> Mapping[str, Any]:
    """Return how the archived runs of 0.2.0, stopped after their first round, go on and end."""
    from tests.golden import archives as module

    with workplace() as folder:
        return module.resumed(folder)


def archive() -> int:
    """Make the archived runs; only a checkout of 0.2.0 can."""
    from tests.golden import archives

    if version("fedtune") != "0.2.0":
        print(f"expected a checkout of 0.2.0; got {version('fedtune')}; archived runs are those that 0.2.0 began")
        return 1
    with workplace() as folder:
        archives.write(folder)
    return 0


SECTIONS: Mapping[str, Callable[[], Mapping[str, Any]]] = {
    "messages": messages,
    "methods": methods,
    "archives": archives,
    "commands": commands,
    "engines": engines,
}


def laid_out(value: Any, depth: int = 0) -> str:
    """Return JSON with a line for every value that is short or lies deep: small to keep, and easy to compare."""
    line = json.dumps(value)
    if not isinstance(value, Mapping) or not value or (depth and len(line) <= 100) or depth > 5:
        return line
    pad = " " * (depth + 1)
    parts = (f"{pad}{json.dumps(str(key))}: {laid_out(part, depth + 1)}" for key, part in value.items())
    return "{\n" + ",\n".join(parts) + f"\n{pad[1:]}}}"


def differences(expected: Any, got: Any, path: str = "") -> Iterator[str]:
    """Yield a line for every value that differs."""
    if isinstance(expected, Mapping) and isinstance(got, Mapping):
        for key in [*expected, *(key for key in got if key not in expected)]:
            where = f"{path}.{key}" if path else str(key)
            if key not in got:
                yield f"{where}: expected {short(expected[key])}; got nothing"
            elif key not in expected:
                yield f"{where}: expected nothing; got {short(got[key])}"
            else:
                yield from differences(expected[key], got[key], where)
    elif isinstance(expected, list) and isinstance(got, list) and len(expected) == len(got):
        for place, (one, other) in enumerate(zip(expected, got, strict=True)):
            yield from differences(one, other, f"{path}[{place}]")
    elif expected != got:
        yield f"{path}: expected {short(expected)}; got {short(got)}"


def short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else text[:157] + "..."


def check(name: str, got: Mapping[str, Any], *, limit: int) -> int:
    """Print how a section differs from its recording, and return the number of differences."""
    path = HERE / f"{name}.json"
    recorded = json.loads(path.read_text())
    lines = list(differences(recorded["values"], json.loads(json.dumps(got))))
    elsewhere = list(differences(recorded["machine"], machine())) if name not in PORTABLE else []
    if elsewhere and lines:
        print(f"{name}: recorded on another machine or with other versions, so bits of torch may differ:")
        print("\n".join(f"  {line}" for line in elsewhere))
    for line in lines[:limit]:
        print(f"  {name}: {line}")
    if len(lines) > limit:
        print(f"  {name}: and {len(lines) - limit} more")
    return len(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Record or compare, and return the exit status: 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="write the values of this checkout")
    what.add_argument("--archive", action="store_true", help="make the stopped runs of runs-0.2.0 anew")
    what.add_argument("--check", action="store_true", help="compare this checkout with the recorded values")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="one section; may be given again")
    parser.add_argument("--ray", action="store_true", help="run the engine ray too")
    parser.add_argument("--limit", type=int, default=40, help="differences to print for each section")
    options = parser.parse_args(arguments)
    environment()
    if options.archive:
        return archive()
    different = 0
    for name in options.only or SECTIONS:
        began = time.monotonic()
        values = engines(ray=options.ray) if name == "engines" else SECTIONS[name]()
        if options.write:
            content = {"values": values} if name in PORTABLE else {"machine": machine(), "values": values}
            (HERE / f"{name}.json").write_text(laid_out(content) + "\n")
            outcome = "written"
        else:
            number = check(name, values, limit=options.limit)
            different += number
            outcome = f"{number} differences" if number else "as recorded"
        print(f"{name}: {outcome}, {time.monotonic() - began:.1f} s", flush=True)
    return 1 if different else 0


def environment() -> None:
    """Set what makes runs repeatable and keeps them off the network; before torch is imported."""
    sys.path.insert(0, str(ROOT))
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


if __name__ == "__main__":
    sys.exit(main())
