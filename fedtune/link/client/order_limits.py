"""What a site's policy says of the work that an order asks for: how many examples and steps, and no embeddings."""

from __future__ import annotations

from collections.abc import Iterator

from fedtune.directions.sampling import SHARED
from fedtune.link.settings import Policy
from fedtune.messages import Assignment, DescendSeeds, ProbeSeeds, Proximal, SeedTask, SumClasses, Training, TrainLora
from fedtune.wire.v1 import link_pb2 as pb


def distinct_examples(order: Assignment, num_examples: int) -> int:
    """Return how many distinct training examples an order's update is of, at a site that has so many.

    Batches are drawn without repeats until all examples have been seen once. What the decay of later steps takes away
    of a step is not in the update any more.
    """
    training, task = order.plan.training, order.task
    if isinstance(task, SumClasses):
        return num_examples
    steps = training.steps or 0
    if isinstance(task, ProbeSeeds) and task.curvatures:  # whatever the steps of the rounds after it
        return min(num_examples, min(SHARED, task.seeds) * training.batch)
    if isinstance(task, ProbeSeeds):  # the queries of a step share its batch
        return min(num_examples, -(-steps // task.queries) * training.batch)
    if isinstance(task, DescendSeeds):
        own, instead = min(num_examples, steps * training.batch * training.accumulation), order.probed_instead()
        # The fewer of what it may do: descend, or measure seeds.
        return min(own, distinct_examples(instead, num_examples)) if instead else own
    left = min(steps, lasting_steps(training, task))
    return min(num_examples, left * training.batch * training.accumulation)


def lasting_steps(training: Training, task: TrainLora) -> int:
    """Return after how many later steps next to nothing is left of one.

    >>> lasting_steps(Training(learning_rate=0.1, weight_decay=10.0), TrainLora(a_key=0))
    1
    """
    pull = training.weight_decay
    if training.optimizer == "sgd":  # AdamW scales FedProx's gradient like any other
        pull += sum(term.mu for term in task.terms if isinstance(term, Proximal))
    # Every step shrinks what was there by this share: with a share of 1, the last batch is all that leaves.
    share = training.rate * pull
    return max(1, int(1 / share)) if share > 2.0**-31 else 2**31


def limit_violations(policy: Policy, order: Assignment, num_examples: int) -> Iterator[tuple[pb.Veto, str]]:
    """Yield veto and reason of each limit that an order breaks."""
    fallback = order.task.fallback if isinstance(order.task, DescendSeeds) else None
    steps = min(training.steps or 0 for training in (order.plan.training, fallback) if training)
    examples = distinct_examples(order, num_examples)
    # Sums over all examples: no later step is there to blur an earlier one.
    if steps < policy.min_steps and not isinstance(order.task, SumClasses):
        yield pb.TOO_FEW_STEPS, f"policy.min_steps: at least {policy.min_steps}; got {steps}"
    if examples < policy.min_examples:
        # An update of few examples speaks of each: its gradient can be turned back into their texts.
        text = f"policy.min_examples: an update of at least {policy.min_examples} examples; got {examples}"
        yield pb.TOO_FEW_EXAMPLES, text
    if policy.allow_embeddings or not isinstance(order.task, SeedTask):
        return
    if order.probe.embeddings:
        yield pb.EMBEDDINGS_NOT_ALLOWED, f"policy.allow_embeddings: false; {EMBEDDINGS}"
    # A table of embeddings that has numbers to itself shows in them row by row; among all weights it drowns.
    elif isinstance(order.task, DescendSeeds) and order.probe.groups == "tensor" and order.probe.bank != "kron":
        why = f"by method.groups = 'tensor' an embedding has numbers of its own, and {EMBEDDINGS}"
        yield pb.EMBEDDINGS_NOT_ALLOWED, f"policy.allow_embeddings: false; {why}"


EMBEDDINGS = "the rows of an embedding that move are the tokens of this site's texts"
