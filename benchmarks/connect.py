"""Seconds from the start of `fedtune join` until the server has said hello, straight and through an HTTP proxy.

    python benchmarks/connect.py [--runs 5]

Server and proxy are on loopback in this process, and a round trip takes no time: what is measured is the start of
Python, the imports, and the handshakes. `python -c pass` and `fedtune --version` stand beside it; all in turn.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from fedtune.deployment.join import greet  # noqa: E402
from fedtune.link.settings import JoinSettings, Policy  # noqa: E402
from tests.link.link_server import LinkServer, run_link_server  # noqa: E402
from tests.link.middlebox import listening, proxying  # noqa: E402

LOGIN = "anna:secret"


def site_file(running: LinkServer, proxy: str) -> Path:
    """Write a site's file; neither base nor data are there, for none is touched before the hello."""
    folder = running.folder / "site-a"
    path = folder / f"{'proxied' if proxy else 'straight'}.toml"
    path.write_text(
        'name = "site-a"\n[model]\nbase = "embedded"\n'
        '[adapter]\ntargets = ["all-linear"]\n[data]\nsource = "rows.jsonl"\n'
        f'[link]\naddress = "localhost:{running.port}"\nproxy = "{proxy}"\nstate = "state-{path.stem}"\n'
    )
    return path


def until_hello(*words: str) -> float:
    """Return the seconds until a process of fedtune writes that it is connected; it is ended then."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "fedtune", *words, "--log", "json"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("{") and json.loads(line).get("event") == "hello":
                seconds = time.perf_counter() - began
                process.kill()
                return seconds
    raise SystemExit(f"no hello: {''.join(lines)}")


def processor_s() -> float:
    """Return the seconds that processes which have ended took of the processor, whatever else the machine did."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def until_greeted(running: LinkServer, settings: JoinSettings) -> float:
    """Return the seconds of a connection and a hello in this process, where everything is imported."""
    began = time.perf_counter()
    greet(running.identities["site-a"], settings, Policy(), running.folder / "state")
    return time.perf_counter() - began


def until_end(*command: str) -> float:
    """Return the seconds that a command takes."""
    began = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    python, fedtune = (sys.executable, "-c", "pass"), (sys.executable, "-m", "fedtune")
    with (
        tempfile.TemporaryDirectory() as folder,
        run_link_server(Path(folder)) as running,
        listening(proxying(LOGIN)) as box,
    ):
        straight = str(site_file(running, ""))
        proxied = str(site_file(running, f"http://{LOGIN}@127.0.0.1:{box.port}"))
        measured: Mapping[str, Callable[[], float]] = {
            "python -c pass": lambda: until_end(*python),
            "fedtune --version": lambda: until_end(*fedtune, "--version"),
            "fedtune join, straight": lambda: until_hello("join", straight),
            "fedtune join, through a proxy": lambda: until_hello("join", proxied),
            "fedtune site check, straight": lambda: until_end(*fedtune, "site", "check", straight),
        }
        seconds: dict[str, list[float]] = {name: [] for name in measured}
        processor: dict[str, list[float]] = {name: [] for name in measured}
        for _ in range(runs):
            for name, measure in measured.items():
                before = processor_s()
                seconds[name].append(measure())
                processor[name].append(processor_s() - before)
    for name, values in seconds.items():
        print(f"{name:30} {median(values):6.2f} s   {min(values):.2f} to {max(values):.2f}", end="")
        print(
            f"   processor {median(processor[name]):6.2f} s   {min(processor[name]):.2f} to {max(processor[name]):.2f}"
        )
    with (
        tempfile.TemporaryDirectory() as folder,
        run_link_server(Path(folder)) as running,
        listening(proxying(LOGIN)) as box,
    ):
        for name, proxy in (("straight", ""), ("through a proxy", f"http://{LOGIN}@127.0.0.1:{box.port}")):
            settings = JoinSettings(f"localhost:{running.port}", proxy=proxy)
            milliseconds = [1000 * until_greeted(running, settings) for _ in range(4 * runs)]
            print(f"connection and hello, {name}".ljust(38), f"{median(milliseconds):6.1f} ms   ", end="")
            print(f"{min(milliseconds):.1f} to {max(milliseconds):.1f}")
    ratios = [after / before for before, after in zip(*(list(seconds.values())[2:4]), strict=True)]
    print(f"proxy over straight            {median(ratios):6.2f}     {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
