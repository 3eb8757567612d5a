"""The process that holds a site's base and examples: it reads requests line by line, and writes updates to files."""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedtune.client.site import Site, from_file, without_losses
from fedtune.errors import ClientError, FedtuneError
from fedtune.link.uploads import map_file
from fedtune.rounds.failures import failure_of
from fedtune.wire.codec import decode_assignment, encode_update
from fedtune.wire.profile import encode_profile
from fedtune.wire.scores import decode_score_request, encode_scores


def main() -> None:
    """Serve a site's file; the last arguments are the descriptors of requests, replies and the parent's life."""
    site, requests, replies, life = sys.argv[-4], *map(int, sys.argv[-3:])
    # The read ends when the parent is gone, however it ended: no process with a client's data outlives it.
    threading.Thread(target=lambda: (os.read(life, 1), os._exit(0)), daemon=True).start()
    with os.fdopen(requests, "r") as lines, os.fdopen(replies, "w") as writer:
        for line in lines:
            writer.write(json.dumps(handle(site, json.loads(line))) + "\n")
            # The parent waits for the line; in a buffer it would wait for ever.
            writer.flush()


def handle(site: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
    """Run a request, and return the reply: `done` with what was measured, or `failed` with the reason."""
    try:
        return {"done": run_request(from_file(site), request)}
    except FedtuneError as error:
        return {"failed": str(error)}
    except Exception as error:  # its text may quote data: only its type leaves the site
        traceback.print_exc()
        return {"failed": f"expected an answer; got {type(error).__name__}; this site's own log says where"}


def run_request(site: Site, request: Mapping[str, Any]) -> Mapping[str, float]:
    """Write the site's profile, update or scores to the path that a request names, and return what was measured."""
    into = Path(request["into"])
    if request["do"] == "profile":
        profile = encode_profile(site.with_labels(request.get("labels", ())).profile())
        into.mkdir(parents=True, exist_ok=True)
        (into / "front").write_bytes(profile.header)
        for digest, body in profile.blobs.items():
            (into / digest).write_bytes(body)
        return {}
    folder = Path(request["folder"])
    # Mapped, not read: an assignment may be larger than the memory that is free.
    bodies: dict[str, Any] = {name: map_file(folder / name) for name in request["bodies"]}
    front = (folder / "front").read_bytes()
    try:
        if request["do"] == "score":
            scores = site.score(decode_score_request(front, bodies))
            into.write_bytes(encode_scores(scores))
            return {**scores.metrics, "seconds": scores.seconds}
        update = site.perform(decode_assignment(front, bodies))
        into.write_bytes(encode_update(update if site.scores == "send" else without_losses(update)))
    except FedtuneError:
        raise
    except (Exception, SystemExit) as error:  # its text may quote data: its type and place alone leave the site
        traceback.print_exc()
        raise ClientError(failure_of(site.client, error, quote=False).reason) from error
    return {name: value for name, value in asdict(update.measured).items() if value is not None}


if __name__ == "__main__":
    main()
