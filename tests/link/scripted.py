"""A site without torch: `fedtune join` with a trainer whose updates are drawn from the assignment's seed."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fedtune.cli.event_log import event_writer
from fedtune.cli.stop_signals import until_signal
from fedtune.deployment.join import join
from fedtune.link.client.training_process import WorkProgress
from fedtune.link.uploads import map_file
from fedtune.messages import Assignment, ClientScores, ClientUpdate, LoraResult, ScoreRequest
from fedtune.number_formats import to_wire
from fedtune.seeds import generator
from fedtune.wire.codec import decode_assignment, encode_update
from fedtune.wire.profile import ClientProfile, ModelSpec, encode_profile
from fedtune.wire.scores import decode_score_request, encode_scores

MODULES: Mapping[str, tuple[int, int]] = {"layer.q": (4096, 2048), "layer.v": (1024, 2048)}
MODEL = ModelSpec(base="9f3c" * 16, modules=MODULES, parameters=10_485_760)
EXAMPLES = 10
HELD_OUT = 8


def scripted_update(assignment: Assignment) -> ClientUpdate:
    """Return an update that depends on the assignment alone, the global adapter included."""
    drawn = generator(assignment.seed)
    shared = sum(float(np.sum(one.astype(np.float64))) for one in assignment.lora.blobs.get("global", {}).values())
    rank, tensors = assignment.plan.rank, {}
    for name, (m, n) in MODULES.items():
        tensors[f"{name}.a"] = (drawn.standard_normal((rank, n)) + shared % 1).astype(np.float32)
        tensors[f"{name}.b"] = drawn.standard_normal((m, rank)).astype(np.float32)
    return ClientUpdate(
        client=assignment.plan.client,
        round=assignment.round,
        num_examples=EXAMPLES,
        result=LoraResult(to_wire(tensors, assignment.lora.wire_dtype, key=assignment.seed), base=MODEL.base),
    )


def scripted_scores(request: ScoreRequest) -> ClientScores:
    """Return scores that fall with the rounds, and differ between clients in weight and size."""
    place = ord(request.client[-1]) % 8
    loss = 3.0 - request.round / 4 + place / 8
    metrics = {"loss": loss, "perplexity": math.exp(loss), "tokens": 10.0 * (1 + place), "examples": 1.0 + place}
    return ClientScores(request.client, request.round, request.base, metrics)


class ScriptedTrainer:
    """Writes updates in this process, each after so many seconds."""

    def __init__(self, client: str, seconds: float) -> None:
        self._client, self._seconds = client, seconds

    def profile(self, into: Path, labels: Sequence[str] = ()) -> None:
        profile = encode_profile(ClientProfile(self._client, EXAMPLES, MODEL, methods=("flora",), held_out=HELD_OUT))
        into.mkdir(parents=True, exist_ok=True)
        (into / "front").write_bytes(profile.header)
        for digest, body in profile.blobs.items():
            (into / digest).write_bytes(body)

    def perform(self, folder: Path, bodies: Sequence[str], into: Path) -> Mapping[str, float]:
        contents = {name: bytes(map_file(folder / name)) for name in bodies}
        update = scripted_update(decode_assignment((folder / "front").read_bytes(), contents))
        threading.Event().wait(self._seconds)  # in place of training, which a kill may interrupt
        into.write_bytes(encode_update(update))
        return {"loss_before": 3.0, "loss_after": 2.5, "seconds": self._seconds}

    def score(self, folder: Path, bodies: Sequence[str], into: Path) -> Mapping[str, float]:
        contents = {name: bytes(map_file(folder / name)) for name in bodies}
        scores = scripted_scores(decode_score_request((folder / "front").read_bytes(), contents))
        into.write_bytes(encode_scores(scores))
        return scores.metrics

    def progress(self) -> WorkProgress:
        return WorkProgress()

    def kill(self) -> None:
        """Nothing to kill: it ends by itself soon."""


def main() -> None:
    """Join with a site file, training for so many seconds in a round."""
    site = Path(sys.argv[1])
    trainer = ScriptedTrainer(site.parent.name, float(sys.argv[2]))
    until_signal(lambda: print(join(site, record=event_writer("json"), trainer=trainer)))


if __name__ == "__main__":
    main()
