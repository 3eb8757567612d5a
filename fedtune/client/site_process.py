"""The process that holds a site's base and examples: it reads requests line by line, and writes updates to files."""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedtune.client.site import Site, from_file
from fedtune.errors import FedtuneError
from fedtune.link.uploads import map_file
from fedtune.wire.codec import decode_assignment, encode_update
from fedtune.wire.profile import encode_profile


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
    """Run a request, and return the reply: `done`, or `failed` with the reason."""
    try:
        run_request(from_file(site), request)
    except FedtuneError as error:
        return {"failed": str(error)}
    except Exception as error:  # its text may quote data: only its type leaves the site
        traceback.print_exc()
        return {"failed": f"expected an answer; got {type(error).__name__}; this site's own log says where"}
    return {"done": True}


def run_request(site: Site, request: Mapping[str, Any]) -> None:
    """Write the site's profile, or its update for an assignment, to the path that the request names."""
    into = Path(request["into"])
    if request["do"] == "profile":
        profile = encode_profile(site.profile())
        into.mkdir(parents=True, exist_ok=True)
        (into / "front").write_bytes(profile.header)
        for digest, body in profile.blobs.items():
            (into / digest).write_bytes(body)
        return
    folder = Path(request["folder"])
    # Mapped, not read: an assignment may be larger than the memory that is free.
    bodies: dict[str, Any] = {name: map_file(folder / name) for name in request["bodies"]}
    update = encode_update(site.perform(decode_assignment((folder / "front").read_bytes(), bodies)))
    into.write_bytes(update)


if __name__ == "__main__":
    main()
