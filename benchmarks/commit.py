"""What it costs that a run survives a crash, against the bare writes that any durable program makes.

    python benchmarks/commit.py --dir FOLDER

FOLDER must lie on a real disk: in memory (tmpfs) a sync costs nothing. Prints one JSON line per case, with its target
and whether it is met; of two cases that are compared, each repetition runs both, one after the other, so that a busy
disk is busy for both.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from fedtune.messages import Failure
from fedtune.seeds import derive, generator
from fedtune.store.blobs import Blobs
from fedtune.store.history import History, replay_journal
from fedtune.store.journal import End, Journal
from fedtune.store.run_journal import RunJournal

MIB = 2**20
INPUTS = {"recipe": "x"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="folder on the disk to measure")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    for case in (commit, append, group, replay, rounds):
        with tempfile.TemporaryDirectory(dir=args.dir, prefix="fedtune-commit-") as folder:
            print(json.dumps(case(Path(folder), args.repeats)), flush=True)


def commit(folder: Path, repeats: int) -> dict[str, Any]:
    """A state of 32 MiB and its record, against the same bytes written to a new file and synced."""
    parts = [data(MIB, key) for key in range(32)]
    blobs, journal, number = Blobs(folder / "blobs"), Journal(folder / "journal", End()), count()

    def ours() -> None:
        parts[0] = data(8, next(number)) + parts[0][8:]
        name = blobs.put(parts)
        journal.append("commit", {"round": 1, "state": name})

    def bare() -> None:
        write(folder / f"bare-{next(number)}", parts)

    result = compared(ours, bare, repeats, lambda: clear(folder))
    return {"case": "commit of a state", "bytes": 32 * MIB, **result, **held(result["ratio"], at_most=1.5)}


def append(folder: Path, repeats: int) -> dict[str, Any]:
    """A record of 340 bytes, against as many bytes at the end of a file, synced."""
    journal = Journal(folder / "journal", End())
    bare = os.open(folder / "bare", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    text, line = "x" * 190, data(340, 0)  # the record's own fields fill it up to 340 bytes

    def plain() -> None:
        os.write(bare, line)
        os.fsync(bare)

    result = compared(lambda: journal.append("accept", {"text": text}), plain, 20 * repeats)
    journal.close()
    os.close(bare)
    num_bytes = (folder / "journal").stat().st_size // (20 * repeats + 1)
    return {"case": "append of a record", "bytes": num_bytes, **result, **held(result["ratio"], at_most=1.2)}


def group(folder: Path, repeats: int) -> dict[str, Any]:
    """32 updates of 4 KiB that last together, against one record of 340 bytes and against a blob of the same bytes."""
    names, number = [f"client-{i:02}" for i in range(32)], count()
    journal, blobs = Journal(folder / "journal", End()), Blobs(folder / "blobs")

    def together() -> None:
        whole = memoryview(data(4096 * 32, next(number)))
        updates = [whole[4096 * i : 4096 * (i + 1)] for i in range(32)]
        places = [[name, 4096 * i, 4096] for i, name in enumerate(names)]
        journal.append("accept", {"round": 1, "blob": blobs.put(updates), "updates": places})

    def record() -> None:
        journal.append("accept", {"round": 1, "blob": "0" * 64, "updates": [[name, 0, 4096] for name in names]})

    one = compared(record, lambda: journal.append("accept", {"text": "x" * 190}), 4 * repeats)
    whole = compared(together, lambda: write(folder / f"bare-{next(number)}", [data(4096 * 32, 0)]), 4 * repeats)
    found = {"record_against_one_append": one, "with_blob_against_bare": whole}
    return {"case": "32 accepted updates at once", **found, **held(one["ratio"], at_most=3.0)}


def replay(folder: Path, repeats: int) -> dict[str, Any]:
    """7200 records of a run with single accepts, read and checked."""
    names = [f"client-{i:02}" for i in range(33)]
    path, history = folder / "journal", History()
    records: list[tuple[str, dict[str, Any]]] = [("start", {"run": "r", "inputs": INPUTS})]
    for number in range(1, 201):
        now = {"round": number}
        fleet = {"cohort": dict.fromkeys(names, 1), "orders": dict.fromkeys(names, "0" * 64)}
        records.append(("open", {**now, "state": f"{number - 1:064}", **fleet}))
        records += [("accept", {**now, "blob": f"{i:064}", "updates": [[n, 0, 4096]]}) for i, n in enumerate(names)]
        records.append(("close", {**now, "blob": "", "updates": [], "failures": {}, "sizes": {}}))
        records.append(("commit", {**now, "state": f"{number:064}"}))
    journal = Journal(path, End())
    for kind, values in records:
        history.apply(kind, values)
        journal.append(kind, values)
    journal.close()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        again, _ = replay_journal(folder)
        times.append(time.perf_counter() - began)
        assert again == history
    rate = round(len(records) / median(times))
    found = {"case": "replay", "records": len(records), "bytes": path.stat().st_size, "records_per_s": rate}
    return {**found, "target": 300_000, "met": rate >= 300_000}


def rounds(folder: Path, repeats: int) -> dict[str, Any]:
    """The ledger's share of a round of 100 clients that each send 4 KiB, of which one fails; the state has 1 MiB."""
    names, times, previous = [f"client-{i:03}" for i in range(100)], [], "0" * 64
    updates = [data(4096, key) for key in range(99)]
    with RunJournal.create(folder) as ledger:
        ledger.begin(INPUTS)
        for number in range(1, repeats + 1):
            state = [data(MIB, number)]
            began = time.perf_counter()
            ledger.open(number, state=previous, cohort=dict.fromkeys(names, 9), digests=dict.fromkeys(names, "0" * 64))
            for name, update in zip(names, updates, strict=False):
                ledger.accept(number, name, update)
            ledger.close(number, {names[-1]: Failure.from_text(names[-1], "late", kind="late")}, {names[-1]: 0})
            previous = ledger.commit(number, state)
            times.append(time.perf_counter() - began)
    # The target is that of the framework's whole round, which `rounds.py` measures: the ledger is a part of it.
    found = summary("", times)
    return {"case": "ledger's time in a round", "clients": 100, **found, **held(found["median_ms"], at_most=50.0)}


def compared(
    ours: Callable[[], None], bare: Callable[[], None], repeats: int, clean: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Return median and best of both, in ms, and the ratio of the medians; the first repetition is not counted."""
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        # Which comes first changes, as a disk may still be busy with the one before.
        for index in (0, 1) if repeat % 2 else (1, 0):
            began = time.perf_counter()
            (ours, bare)[index]()
            times[index].append(time.perf_counter() - began)
        clean()
    mine, plain = times[0][1:], times[1][1:]
    return {**summary("", mine), **summary("bare_", plain), "ratio": round(median(mine) / median(plain), 2)}


def held(found: float, *, at_most: float) -> dict[str, Any]:
    """Return what a measured number is held against."""
    return {"target": at_most, "met": found <= at_most}


def summary(prefix: str, times: Sequence[float]) -> dict[str, float]:
    return {
        f"{prefix}median_ms": round(1000 * median(times), 3),
        f"{prefix}best_ms": round(1000 * min(times), 3),
    }


def data(num_bytes: int, key: int) -> bytes:
    return generator(derive(key, "benchmark.commit")).bytes(num_bytes)


def write(path: Path, parts: Sequence[bytes]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    for part in parts:
        os.write(descriptor, part)
    os.fsync(descriptor)
    os.close(descriptor)


def clear(folder: Path) -> None:
    """Remove what the last repetition wrote, so that the disk does not fill."""
    for path in [*folder.glob("bare-*"), *folder.glob("blobs/??/*")]:
        path.unlink()


if __name__ == "__main__":
    main()
