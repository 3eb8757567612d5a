"""Runs that 0.2.0 began and that were stopped, archived so that a later release can be seen to resume them.

python tests/golden/record.py --archive    makes them; only a checkout of 0.2.0 may
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fedtune
from tests.golden import recipes
from tests.golden.recipes import Tables

HERE = Path(__file__).parent / "runs-0.2.0"
LARGEST = 300_000
"""Bytes of one archive."""


def small(name: str) -> Tables:
    """Return the recipe of an archived run; its state is to be small."""
    adapter = {"rank": 2, "targets": ["v_proj"]}
    if name == "fedkseed":
        return recipes.seeded("hadamard", sampling="pro", scalar_step="auto")
    if name == "flora-nested":
        return recipes.pruned("nested", ranks=[1, 2]) | {"adapter": adapter}
    return {**recipes.tiny(), "adapter": adapter, "override": [{"clients": ["client-2"], "rank": 1}]}


def after_round(number: int) -> Callable[[Any], bool]:
    """Return whether an event says that a round is over and its line written."""
    return lambda event: type(event).__name__ == "RoundFinished" and event.record.round == number


def within_round(number: int) -> Callable[[Any], bool]:
    """Return whether an event says that the second client of a round has answered, the first being in the journal."""
    seen: list[Any] = []

    def happened(event: Any) -> bool:
        if type(event).__name__ == "ClientFinished" and event.round == number:
            seen.append(event)
        return len(seen) == 2

    return happened


STOPPED: Mapping[str, Callable[[Any], bool]] = {
    "flora": within_round(2),
    "flora-nested": after_round(1),
    "fedkseed": after_round(1),
}
"""When each run is stopped; flora in the middle of its second round."""


def write(folder: Path) -> None:
    """Make the archives, and note beside them what the runs come to that are not stopped.

    Args:
        folder: the working folder, which holds the data.
    """
    HERE.mkdir(exist_ok=True)
    expected = {}
    for name, happened in STOPPED.items():
        whole = fedtune.simulate(small(name), out=folder / f"{name}-whole")
        expected[name] = ended(whole.path)

        def stop(event: Any, happened: Callable[[Any], bool] = happened) -> None:
            if happened(event):
                raise SystemExit  # nothing is tidied up, as with a kill

        try:
            fedtune.simulate(small(name), out=folder / name, watch=stop)
        except SystemExit:
            pass
        else:
            raise AssertionError(f"{name}: expected a run that is stopped; got one that ended")
        data = packed(folder / name)
        assert len(data) < LARGEST, (name, len(data))
        (HERE / f"{name}.tar.gz").write_bytes(data)
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def packed(run: Path) -> bytes:
    """Return a run directory as tar.gz, without times and owners."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as archive:
        for path in sorted(path for path in run.rglob("*") if path.is_file()):
            entry = tarfile.TarInfo(f"{run.name}/{path.relative_to(run)}")
            # The one path of this machine: where the package, and so the embedded model, is installed.
            data = path.read_bytes().replace(str(Path(fedtune.__file__).parent).encode(), b"fedtune")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return gzip.compress(inner.getvalue(), mtime=0)


def unpack(name: str, folder: Path) -> Path:
    """Put an archived run into a folder and return its directory."""
    with tarfile.open(HERE / f"{name}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / name


def ended(run: Path) -> Mapping[str, Any]:
    """Return the digests of a finished run."""
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    return {
        "state": summary["state"],
        "states": [line["state_digest"] for line in lines],
        "adapter": summary["adapter_digest"],
    }


def resumed(folder: Path) -> Mapping[str, Any]:
    """Return for each archived run what is known of it, and what it comes to when it goes on here, in a folder.

    A run that is refused is noted with the sentence that says so.
    """
    values: dict[str, Any] = {}
    for name in STOPPED:
        run = unpack(name, folder)
        kinds = recipes.journal(run / "journal")["kinds"]
        try:
            ending = ended(fedtune.simulate(resume=run).path)
        except fedtune.FedtuneError as error:
            ending = {"refused": str(error).replace(str(folder), "<folder>")}
        values[name] = {"before": kinds, "after": ending}
    return values
