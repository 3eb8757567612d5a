"""A client's personal state on its own disk: written once a round, read by the next one, and never sent."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedtune.errors import ClientError, StoreError
from fedtune.tensors import Tensors, count_not_finite

DIGEST_BYTES = 8
"""Of a state's SHA-256, which an update states."""
ENDING, PARTIAL = ".safetensors", ".partial"
FILE = re.compile(r"(\d{6})-([0-9a-f]{64})\.safetensors")
FACTORS, SAVED = "factors/", "saved/"
"""What precedes the names of tensors in a file."""


@dataclass(frozen=True)
class PersonalState:
    """What one client stores of its own model after one round of a run."""

    client: str
    round: int
    kind: str
    """As in the recipe."""
    scale: float
    """By which b was multiplied in training: alpha / rank of the plan."""
    factors: Tensors = field(default_factory=dict)
    """By the names in which factors travel, float32, as they are trained: b without the scale."""
    saved: Tensors = field(default_factory=dict)
    """Of modules_to_save, by parameter name, float32."""


@dataclass(frozen=True)
class StoredState:
    """A state with its digest."""

    state: PersonalState
    digest: bytes
    """Its first bytes."""


@dataclass(frozen=True)
class StateFolder:
    """The folder of one client's personal states in one run: those of its last two rounds.

    A round that is done again, after a crash at any moment, starts from the state of an earlier round, and so comes out
    the same.
    """

    path: Path

    def load(self, client: str, before: int) -> StoredState | None:
        """Return the state of the last round before one; None where there is none, or it is damaged or another's.

        Raises:
            StoreError: if the folder cannot be read.
        """
        earlier = {round: path for round, path in self._files().items() if round < before}
        if not earlier:
            return None
        path = earlier[max(earlier)]
        with store_errors(path):
            whole = sha256(path.read_bytes()).hexdigest() == digest_in(path)
        state = read_state(path) if whole else None
        return StoredState(state, digest_of(path)) if state is not None and state.client == client else None

    def store(self, state: PersonalState) -> bytes:
        """Make a state durable, remove what no round starts from any more, and return the first bytes of its digest.

        Raises:
            ClientError: if a number of it is not finite.
            StoreError: if it cannot be written.
        """
        data = encode_state(state)
        target = self.path / f"{state.round:06}-{sha256(data).hexdigest()}{ENDING}"
        with store_errors(self.path):
            self.path.mkdir(parents=True, mode=0o700, exist_ok=True)
            replace_durably(target, data)
            known = self._files()
            last = known.get(max((round for round in known if round < state.round), default=0))
            # Of later rounds too: a server that was set back makes another history of them.
            for path in [*self.path.glob(f"*{ENDING}"), *self.path.glob(f"*{PARTIAL}")]:
                if path not in (target, last):
                    path.unlink(missing_ok=True)
        return digest_of(target)

    def _files(self) -> Mapping[int, Path]:
        """Return the files by round; of a round with several, of which a crash has left one, the last by name."""
        with store_errors(self.path):
            paths = sorted(self.path.glob(f"*{ENDING}"))
        return {int(match[1]): path for path in paths if (match := FILE.fullmatch(path.name))}


def encode_state(state: PersonalState) -> bytes:
    """Return a state as a safetensors file: of one state the same bytes.

    Raises:
        ClientError: if a number of it is not finite.
    """
    tensors = {f"{FACTORS}{name}": tensor for name, tensor in state.factors.items()}
    tensors |= {f"{SAVED}{name}": tensor for name, tensor in state.saved.items()}
    for name, tensor in sorted(tensors.items()):
        if bad := count_not_finite(tensor):
            expected = f"expected finite numbers in {name}; got {bad} that are not"
            raise ClientError(f"{state.client}: its personal model: {expected}; lower personal.rate")
    values = {"client": state.client, "round": state.round, "kind": state.kind, "scale": state.scale}
    # In one entry: the order of several is not the same in every file.
    metadata = {"fedtune": json.dumps(values, sort_keys=True)}
    return bytes(save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, metadata))


def read_state(path: Path) -> PersonalState | None:
    """Return the state in a file; None where it is none."""
    try:
        with safe_open(path, "numpy") as file:
            values = json.loads(file.metadata()["fedtune"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        parts = {
            part: {name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)}
            for part in (FACTORS, SAVED)
        }
        return PersonalState(**values, factors=parts[FACTORS], saved=parts[SAVED])
    except (SafetensorError, ValueError, TypeError, KeyError, OSError):
        return None


def replace_durably(path: Path, data: bytes) -> None:
    """Write a file that its owner alone can read, in one step that a crash or a power cut does or does not do."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=PARTIAL)  # readable by its owner alone
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)
    os.rename(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def store_errors(path: Path) -> Iterator[None]:
    """Turn an error of the operating system into one that names the place."""
    try:
        yield
    except OSError as error:
        expected = "expected a folder for this client's own models that can be read and written"
        raise StoreError(f"{path}: {expected}; got {error.strerror or error}; free space or mend its rights") from error


def digest_in(path: Path) -> str:
    """Return the SHA-256 (hex) that a state's file is named by."""
    match = FILE.fullmatch(path.name)
    return match[2] if match else ""


def digest_of(path: Path) -> bytes:
    return bytes.fromhex(digest_in(path))[:DIGEST_BYTES]


def client_folder(root: Path, client: str) -> StateFolder:
    """Return the folder of one client in a simulation, where all of them lie below one root.

    By a digest of the name, which need not be that of a folder.
    """
    return StateFolder(root / sha256(client.encode()).hexdigest()[:16])
