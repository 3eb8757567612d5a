"""rounds.jsonl: one line of JSON for each round, written and read by this module alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

from fedtune.errors import StoreError
from fedtune.rounds.record import ARM_FIELDS, PROBE_FIELDS, ClientRecord, ModuleRecord, RoundRecord
from fedtune.store import files
from fedtune.store.files import append_line, store_errors
from fedtune.store.run_directory import REMEDY, VERSION
from fedtune.store.typed_json import decode, nan_to_null

NAME = "rounds.jsonl"
BLOCK_BYTES = 64 * 1024


@dataclass(frozen=True)
class RoundLines:
    """The whole lines of a file of rounds."""

    records: tuple[RoundRecord, ...]
    """Rounds 0, 1, 2, ... without a gap."""
    num_bytes: int
    """Of these lines."""
    torn_bytes: int
    """Behind them: what a crash left of one more."""


def append_round(run: Path, record: RoundRecord) -> None:
    """Append the line of one round, and sync it to the disk."""
    append_line(run / NAME, json.dumps(nan_to_null(encode(record)), allow_nan=False))


def encode(record: RoundRecord) -> Mapping[str, Any]:
    """Return the JSON object of a round; keys and their order are part of version 1."""
    return {
        "version": VERSION,
        "round": record.round,
        "state_digest": record.state_digest,
        "seconds": record.seconds,
        "cohort": record.cohort,
        "loss_before": record.loss_before,
        "loss_after": record.loss_after,
        "test": record.test,
        "held_out": record.held_out,
        "clients": {name: encode_client(client) for name, client in record.clients.items()},
        "aside": [asdict(reply) for reply in record.unsolicited],
        "bytes_down": record.bytes_down,
        "bytes_up": record.bytes_up,
        "modules": {name: encode_module(module) for name, module in record.modules.items()},
        "figures": record.figures,
        "clock_s": record.clock_s,
        **({} if record.rate_share == 1.0 else {"rate_share": record.rate_share}),
        **({"personal": record.personal} if record.personal else {}),
        **({} if record.deployed is None else {"deployed": record.deployed}),
        **({"working": record.working} if record.working else {}),
    }


def encode_client(client: ClientRecord) -> Mapping[str, Any]:
    line: dict[str, Any] = {
        "status": client.status,
        "reason": client.reason,
        "rank": client.rank,
        "steps": client.steps,
        "examples": client.examples,
        "bytes_down": client.bytes_down,
        "bytes_up": client.bytes_up,
    }
    if client.counted is not None:
        line["counted"] = client.counted
    if client.ratio is not None:
        line["ratio"] = client.ratio
    if client.deadline_s is not None:
        line["deadline_s"] = client.deadline_s
    if client.why:
        line["why"] = client.why
    if client.verb:
        line["verb"] = client.verb
    # At their defaults they are left out, as in the lines of releases before 0.3.0.
    usual = {field.name: field.default for field in fields(client)}
    line |= {key: value for key in (*ARM_FIELDS, *PROBE_FIELDS) if (value := getattr(client, key)) != usual[key]}
    if client.compute_s is not None:
        line |= {"compute_s": client.compute_s, "transfer_s": client.transfer_s, "overhead_s": client.overhead_s}
        line |= {} if client.down_s is None else {"down_s": client.down_s}
    if client.joules is not None:
        line["joules"] = client.joules
    for key in ("planned_s", "planned_bytes"):
        if (planned := getattr(client, key)) is not None:
            line[key] = planned
    if client.status != "ok":
        return line
    line |= {
        "loss_before": client.loss_before,
        "loss_after": client.loss_after,
        "seconds": client.seconds,
        "peak_bytes": client.peak_bytes,
        "tokens": client.tokens,
        "norm": client.norm,
    }
    if client.importance is not None:
        line["importance"] = client.importance
    for key in ("whole_loss_before", "whole_loss_after"):
        if (loss := getattr(client, key)) is not None:
            line[key] = loss
    if client.module_importance:
        line["module_importance"] = client.module_importance
    line |= {key: value for key in ("staleness", "discount") if (value := getattr(client, key)) != usual[key]}
    if client.personal is not None:
        line["personal"] = asdict(client.personal)
    return line if not client.skipped_steps else line | {"skipped_steps": client.skipped_steps}


def encode_module(module: ModuleRecord) -> Mapping[str, Any]:
    line = {"rank": module.rank, "norm": module.norm, "singular_values": module.singular_values}
    shares = {"energy_kept": module.energy_kept, "state_energy_kept": module.state_energy_kept}
    return line | {key: share for key, share in shares.items() if share is not None}


def last_line_digest(run: Path) -> str:
    """Return the SHA-256 (hex) of the last whole line of rounds.jsonl; empty where there is none.

    Raises:
        StoreError: if it cannot be read.
    """
    path = run / NAME
    if not path.exists():
        return ""
    with store_errors(path), path.open("rb") as file:
        # From the end in blocks: a run of many rounds is not read whole after each of them.
        rest, at = b"", file.seek(0, os.SEEK_END)
        while at and rest.count(b"\n") < 2:
            at, end = max(0, at - BLOCK_BYTES), at
            file.seek(at)
            rest = file.read(end - at) + rest
    *lines, _ = rest.split(b"\n")
    return sha256(lines[-1]).hexdigest() if lines else ""


def line_digests(run: Path) -> Sequence[str]:
    """Return the SHA-256 (hex) of each whole line of rounds.jsonl."""
    path = run / NAME
    with store_errors(path):
        *lines, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]
    return [sha256(line).hexdigest() for line in lines]


def read_rounds(run: Path) -> Sequence[RoundRecord]:
    """Return the records of rounds.jsonl, none if there is no such file; a torn last line is left out.

    Raises:
        StoreError: as `scan` does.
    """
    return scan(run / NAME).records


def scan(path: Path) -> RoundLines:
    """Read a file of rounds; safe beside the process that appends to it.

    Raises:
        StoreError: if a line is damaged, of another version, or not of the round after the one before it; naming file,
            line and key.
    """
    with store_errors(path):
        data = path.read_bytes() if path.exists() else b""
    *lines, rest = data.split(b"\n")
    records, num_bytes = list[RoundRecord](), 0
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or brackets thousands deep
            if number == len(lines) and not rest:
                # A file may have grown on the disk before its bytes got there. The lines before were synced earlier.
                break
            raise StoreError(f"{where}: expected one JSON object; got {error}; {REMEDY}") from error
        records.append(parse(value, where, expected_round=len(records)))
        num_bytes += len(line) + 1
    return RoundLines(tuple(records), num_bytes, len(data) - num_bytes)


def parse(value: object, where: str, *, expected_round: int) -> RoundRecord:
    version = value.get("version") if isinstance(value, dict) else None
    if isinstance(value, dict) and version != VERSION:
        raise StoreError(
            f"{where}: expected version {VERSION}; got {version!r}; read it with the fedtune that wrote it"
        )
    record = decode(RoundRecord, value, where)
    if record.round != expected_round:
        # A gap or a repeat would shift every sum over rounds, and the planner would learn from another history.
        raise StoreError(
            f"{where}: expected round {expected_round}: every round from 0 on has one line, in order; "
            f"got round {record.round}; {REMEDY}"
        )
    return record


def mend_rounds(run: Path) -> None:
    """Cut a torn last line off rounds.jsonl and sync the others; only for the process that writes the run.

    A process that was killed may have left a whole line that is not synced: after a power cut it would be missing,
    though the run had gone on from it.

    Raises:
        StoreError: if more than that is wrong with it, or it cannot be written.
    """
    path = run / NAME
    lines = scan(path)
    if not path.exists():
        return
    with store_errors(path):
        descriptor = files.append_to(path)
        try:
            if lines.torn_bytes:
                files.truncate(descriptor, lines.num_bytes)
            files.sync(descriptor)
            files.sync_folder(run)
        finally:
            os.close(descriptor)
