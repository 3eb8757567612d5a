"""Packages that fedtune can be installed beside, and how many it brings: resolved and not installed; needs uv."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
PEERS = ("unsloth", "axolotl", "trl", "vllm", "lm-eval[hf]", "mlflow", "nvflare", "flwr")
EXTRAS = ("", "flower")
SETS = {
    "fedtune": "",
    "fedtune[report]": "report",
    "fedtune[report,data]": "report,data",
    "fedtune[flower]": "flower",
    "fedtune[all]": "all",
}
"""Installations that are counted, by their name in the table: extras."""
LIMIT_S = 300
"""Of one resolution; some solvers search for long where nothing fits."""


@dataclass(frozen=True)
class Resolution:
    """What a solver said: the versions, or why there are none."""

    versions: dict[str, str]
    reason: str = ""


def read_versions(text: str) -> dict[str, str]:
    r"""Return the versions that `uv pip compile` prints, by package.

    >>> read_versions("torch==2.13.0\n    # via fedtune\nfedtune @ file:///x\n")
    {'torch': '2.13.0'}
    """
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", text, re.M))


def read_reason(text: str) -> str:
    """Return which pins exclude each other: the first conclusion of the solver's explanation.

    >>> read_reason("cause: Because a==1 depends on x<2 and b depends on x==2, we can conclude that a==1 and b ...")
    'a==1 asks for x<2 and b asks for x==2'
    """
    first = re.search(r"Because (.+?), we can conclude", " ".join(text.split()))
    return first[1].replace("depends on", "asks for") if first else text.strip()[-160:]


def resolve(uv: Sequence[str], requirements: Sequence[str], python: str) -> Resolution:
    """Return what uv resolves requirements to, from metadata alone."""
    options = ("--python-version", python, "--quiet", "--no-header", "--no-annotate", "--python-platform", "linux")
    try:
        done = subprocess.run(
            [*uv, "pip", "compile", "-", *options],
            input="\n".join(requirements),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Resolution({}, f"no answer within {LIMIT_S} s")
    return Resolution(read_versions(done.stdout), "" if done.returncode == 0 else done.stderr)


def fedtune(extras: str) -> str:
    """Return the requirement of this repository's own metadata."""
    return f"fedtune{f'[{extras}]' if extras else ''} @ {ROOT.as_uri()}"


def counts(uv: Sequence[str], python: str) -> None:
    """Print how many packages each installation has; those of torch for CUDA are counted apart."""
    print(f"| installs | packages, Python {python} | without torch's for CUDA |\n|---|---|---|")
    for name, extras in SETS.items():
        got = resolve(uv, [fedtune(extras)], python)
        cuda = [one for one in got.versions if re.match(r"nvidia-|cuda-|triton$", one)]
        total = len(got.versions) + 1  # and fedtune itself, which stands there as a folder
        print(
            f"| `{name}` | {total} | {total - len(cuda)} |"
            if got.versions
            else f"| `{name}` | none: {read_reason(got.reason)} | |"
        )


def table(uv: Sequence[str], python: str, peers: Sequence[str]) -> None:
    """Print whether the newest release of each package resolves beside fedtune, and whose pin forbids it."""
    columns = [f"beside `fedtune{f'[{extra}]' if extra else ''}`" for extra in EXTRAS]
    print(f"| newest, Python {python} | {' | '.join(columns)} | why not |\n|---|{'---|' * (len(EXTRAS) + 1)}")
    for peer in peers:
        name = peer.partition("[")[0]
        alone = resolve(uv, [peer], python)
        newest = alone.versions.get(name)
        if newest is None:
            print(f"| {name} | no | no | not alone: {read_reason(alone.reason)} |", flush=True)
            continue
        # Of its newest release: a solver would otherwise go back to one from before its pins.
        got = [resolve(uv, [f"{peer}=={newest}", fedtune(extra)], python) for extra in EXTRAS]
        why = "; ".join(dict.fromkeys(read_reason(one.reason) for one in got if one.reason))
        cells = " | ".join("no" if one.reason else "yes" for one in got)
        print(f"| {name} {newest} | {cells} | {why} |", flush=True)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=["3.11"], nargs="+", metavar="X.Y")
    parser.add_argument("--peers", default=PEERS, nargs="+", metavar="NAME")
    given = parser.parse_args()
    uv = shutil.which("uv")
    if uv is None:
        # `make bench` runs every script, also where there is no index.
        print("skipped: needs the program uv (pip install uv), and an index of packages")
        return
    print(f"resolved on {date.today().isoformat()} with {sys.platform}")
    for python in given.python:
        counts([uv], python)
        table([uv], python, given.peers)


if __name__ == "__main__":
    main()
