"""The process that keeps a site's base and examples: it reads orders line by line, and writes updates to files."""

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
    """Run on a site's file and the descriptors of requests, replies and life, the last arguments."""
    site, requests, replies, life = sys.argv[-4], *map(int, sys.argv[-3:])
    threading.Thread(target=lambda: (os.read(life, 1), os._exit(0)), daemon=True).start()
    with os.fdopen(requests, "r") as lines, os.fdopen(replies, "w") as answers:
        for line in lines:
            answers.write(json.dumps(handle(site, json.loads(line))) + "\n")
            answers.flush()


def handle(site: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
    """Do what a request asks, and return what came of it."""
    try:
        run_request(from_file(site), request)
    except FedtuneError as error:
        return {"failed": str(error)}
    except Exception as error:  # what it says may quote data: only its type leaves the site
        traceback.print_exc()
        return {"failed": f"expected an answer; got {type(error).__name__}; this site's own log says where"}
    return {"done": True}


def run_request(site: Site, request: Mapping[str, Any]) -> None:
    into = Path(request["into"])
    if request["do"] == "profile":
        profile = encode_profile(site.profile())
        into.mkdir(parents=True, exist_ok=True)
        (into / "front").write_bytes(profile.header)
        for digest, body in profile.blobs.items():
            (into / digest).write_bytes(body)
        return
    folder = Path(request["folder"])
    bodies: dict[str, Any] = {name: map_file(folder / name) for name in request["bodies"]}
    update = encode_update(site.perform(decode_assignment((folder / "front").read_bytes(), bodies)))
    into.write_bytes(update)


if __name__ == "__main__":
    main()
