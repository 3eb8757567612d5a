"""A run without training: the real rounds, whose clients answer at once with numbers of the right shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedtune.errors import FedtuneError
from fedtune.messages import Assignment, Blueprint, Client, ClientUpdate, LoraResult, Measured, PersonalTrace, Training
from fedtune.number_formats import to_wire
from fedtune.pruning.structure import ModelStructure, cuts, from_bitmap, shapes
from fedtune.rounds import buffer
from fedtune.rounds.context import RoundContext
from fedtune.rounds.loop import RoundResult, run
from fedtune.rounds.transport import Answer, Reply, Rule
from fedtune.seeds import derive, generator
from fedtune.tensors import Tensors
from fedtune.wire.codec import EncodedAssignment, decode_assignment, encode_update

SIZE = 1e-4
"""Of the numbers that clients answer with: small beside any bound on a change."""
LITTLE = 0.01
"""Share by which a round's bytes may exceed those before it without growing."""
LARGEST = 1e9
"""Numbers that a rehearsed round may add up, of all its clients: a few seconds of work."""


@dataclass(frozen=True)
class Rehearsal:
    """A transport whose clients train nothing; what travels has the sizes of what would."""

    blueprint: Blueprint
    fleet: Sequence[Client]
    tokens: Callable[[str, Training, int], tuple[float, float]]
    """(client, training, rank) -> tokens that it would train on, and that go forward beside that."""
    plans: dict[str, Assignment] = field(default_factory=dict)
    """The last assignment of each client."""

    def clients(self) -> Sequence[Client]:
        return self.fleet

    def exchange(self, orders: Mapping[str, EncodedAssignment], rule: Rule) -> Iterator[Answer]:
        """Yield an answer for every client, in order."""
        for name, encoded in orders.items():
            assignment = decode_assignment(encoded.header, encoded.blobs)
            self.plans[name] = assignment
            yield Reply(name, encode_update(self.answer(assignment)))

    def answer(self, assignment: Assignment) -> ClientUpdate:
        """Return an update as large as the one that training would end in."""
        plan, task = assignment.plan, assignment.lora
        rng = generator(derive(assignment.seed, "rehearsal"))

        def numbers(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
            return (SIZE * rng.standard_normal(shape)).astype(np.float32)

        left = self.structure(assignment)
        cut = cuts(left, self.blueprint.anatomy) if left and self.blueprint.anatomy else {}
        own, tensors = shapes(self.blueprint.modules, cut), dict[str, np.ndarray]()
        for name, rank in plan.rank_of(self.blueprint.modules).items():
            m, n = own[name]
            tensors[f"{name}.b"] = numbers(m, rank)
            if task.train == "ab":
                tensors[f"{name}.a"] = numbers(rank, n)
        personal = task.personal
        if personal is not None:
            tensors = {name: tensor for name, tensor in tensors.items() if not personal.keeps(name)}
        examples = next(client.num_examples for client in self.fleet if client.name == plan.client)
        trained, beside = self.tokens(plan.client, plan.training, plan.rank)
        return ClientUpdate(
            plan.client,
            assignment.round,
            examples,
            LoraResult(
                to_wire(tensors, task.wire_dtype, key=assignment.seed),
                dict(task.blobs.get("saved", {})),
                assignment.base,
                structure_digest=left.digest if left else b"",
                scores=self.scores(assignment, left, rng),
                personal=PersonalTrace(bytes(8), bytes(8)) if personal is not None else None,
            ),
            Measured(seconds=1.0, peak_bytes=2**30, tokens=int(trained), side_tokens=int(beside))
            if task.pruning is None
            else Measured(1.0, 2**30, int(trained), 2.0, 1.9, importance=1.0, side_tokens=int(beside)),
        )

    def structure(self, assignment: Assignment) -> ModelStructure | None:
        """Return what is left of the model in which an assignment's training ends; None: all of it."""
        pruning, anatomy = assignment.lora.pruning, self.blueprint.anatomy
        stages = pruning.stages if pruning else ()
        return from_bitmap(stages[-1], anatomy) if stages and anatomy else None

    def scores(self, assignment: Assignment, left: ModelStructure | None, rng: np.random.Generator) -> Tensors:
        """Return scores of heads and channels, where an assignment asks for them."""
        pruning, anatomy = assignment.lora.pruning, self.blueprint.anatomy
        if pruning is None or anatomy is None or not pruning.scores_requested:
            return {}
        heads = [len(part.q) for part in left.blocks] if left else [block.heads for block in anatomy.blocks]
        channels = [len(part.ff) for part in left.blocks] if left else [block.channels for block in anatomy.blocks]
        return {
            "heads": rng.uniform(0.5, 1.5, sum(heads)).astype(np.float16),
            "channels": rng.uniform(0.5, 1.5, sum(channels)).astype(np.float16),
        }


def rehearse(context: RoundContext, *, most: int, growing: int) -> Sequence[RoundResult]:
    """Return the first rounds of a run, until two in a row have sent and taken the same.

    They are `most` at the most, or `growing` while each is sent more than those before it. Where a round cannot be
    rehearsed, as where no client is left, those before it are returned. Asynchronous rounds end with their buffers.
    """
    results = list[RoundResult]()
    try:
        for result in run(context) if context.asynchronous is None else buffer.run(context):
            results.append(result)
            number = len(results)
            if number >= growing or (number >= most and not grows(results)):
                break
            if number > 2 and alike(results[-2], result):
                break
    except FedtuneError:
        if not results:
            raise
    return results


def grows(results: Sequence[RoundResult]) -> bool:
    """Return whether the last round has sent more down than each before it, and still more than a little."""
    down = [sum(traffic.down for traffic in result.traffic.values()) for result in results]
    return len(down) > 1 and down[-1] > (1 + LITTLE) * max(down[:-1])


def alike(one: RoundResult, other: RoundResult) -> bool:
    """Return whether two rounds have sent and received the same bytes from the same clients."""
    return one.traffic == other.traffic and one.planned == other.planned
