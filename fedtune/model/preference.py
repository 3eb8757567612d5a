"""Direct preference optimisation: what the reference says of the rows, and how a model scores on pairs of answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import torch

from fedtune.data.encode import Example
from fedtune.data.preference import holds_preferences
from fedtune.errors import ClientError
from fedtune.messages import Preference, Term, Training
from fedtune.model.base import Base
from fedtune.model.batches import Batch, collate
from fedtune.model.loss import answer_likelihoods, answer_margins, preference_losses
from fedtune.model.train import autocast
from fedtune.probing.order import batches
from fedtune.probing.scores import Metrics, by_length


def preference_of(terms: Sequence[Term]) -> Preference | None:
    """Return the term that compares preferred with rejected answers, where the objective has it."""
    return next((term for term in terms if isinstance(term, Preference)), None)


def check_rows(examples: Sequence[Example], terms: Sequence[Term], client: str) -> None:
    """Refuse rows of another kind than the objective needs: either would train on something else than was asked.

    Raises:
        ClientError: naming the client.
    """
    compares, compared = preference_of(terms) is not None, holds_preferences(examples)
    if compares and not compared and examples:
        hint = "map data.fields.chosen and data.fields.rejected"
        raise ClientError(f"{client}: expected rows with a rejected answer, for the objective 'dpo'; got none; {hint}")
    if compared and not compares:
        hint = "set client.objective = 'dpo', or map the preferred answer as data.fields.output"
        raise ClientError(f"{client}: expected rows of one answer; got rows with a rejected one; {hint}")


def with_margins(
    base: Base, examples: Sequence[Example], term: Preference, training: Training, *, key: int
) -> Sequence[Example]:
    """Return a client's training examples with what the reference, the base alone, says of those that are trained on.

    Measured once, before the round's training: no second model is in memory, and a row that is seen again costs
    nothing more.

    Args:
        base: without adapters.
        examples: of the client.
        term: of the order.
        training: with `steps` set; of what it does not reach, nothing is measured.
        key: by which `train` draws its batches.
    """
    assert training.steps is not None  # the planner resolves epochs
    order = batches(len(examples), size=training.batch, key=key)
    places = sorted({place for part in islice(order, training.steps * training.accumulation) for place in part})
    measured = with_reference(base, [examples[place] for place in places], term, training)
    known = dict(zip(places, measured, strict=True))
    return [known.get(place, example) for place, example in enumerate(examples)]


def with_reference(base: Base, examples: Sequence[Example], term: Preference, training: Training) -> Sequence[Example]:
    """Return examples with beta and the margins of the reference, in the arithmetic of the training."""
    base.model.eval()
    measured = list[Example]()
    with torch.no_grad():
        for begin in range(0, len(examples), training.batch):
            rows = examples[begin : begin + training.batch]
            with autocast(training, base.device):
                margins = answer_margins(answer_likelihoods(base.model, collate(rows, base))).tolist()
            measured += [replace(row, beta=term.beta, margin=own) for row, own in zip(rows, margins, strict=True)]
    return measured


def num_referred(examples: Sequence[Example]) -> int:
    """Return the tokens that went through the reference, of both answers of every row with its margin."""
    texts = [text for example in examples if example.beta and example.rejected for text in (example, example.rejected)]
    return sum(len(text.input_ids) for text in texts)


def reference_batches(
    base: Base, groups: Mapping[str, Sequence[Example]], term: Preference, *, batch: int
) -> Mapping[str, Sequence[Batch]]:
    """Return the rows of each group in batches of similar length, with the margins of the base alone."""
    base.model.eval()
    with torch.inference_mode():
        return {name: list(_batches(base, rows, term, batch)) for name, rows in groups.items()}


def _batches(base: Base, examples: Sequence[Example], term: Preference, size: int) -> Iterator[Batch]:
    for places in by_length(examples, size):
        rows = collate([replace(examples[place], beta=term.beta) for place in places], base)
        assert rows.pairs is not None  # the rows hold rejected answers
        margins = answer_margins(answer_likelihoods(base.model, rows))
        yield replace(rows, pairs=replace(rows.pairs, margins=margins))


def preference_scores(model: torch.nn.Module, rows: Sequence[Batch]) -> Metrics:
    """Return a model's scores on pairs of answers.

    `loss` is DPO's, in nats per pair. The reward of an answer is beta times the log of how much more probable it is
    than by the reference: `reward_margin` is the mean difference of the rewards of both answers, and
    `reward_accuracy` the share of the pairs in which the preferred answer has the higher one, where equal ones, as
    those of the base itself, count half. `preferred` is the share of pairs whose preferred answer is the more probable
    one, whatever the reference says.
    """
    total = won = margins = preferred = 0.0
    pairs = 0
    for batch in rows:
        assert batch.pairs is not None  # `reference_batches` gives them
        likelihoods = answer_likelihoods(model, batch)
        own = answer_margins(likelihoods)
        rewards = batch.pairs.beta * (own - batch.pairs.margins)
        total += preference_losses(likelihoods, batch.pairs).sum().item()
        won += ((rewards > 0).float() + 0.5 * (rewards == 0).float()).sum().item()
        margins += rewards.sum().item()
        preferred += (own > 0).float().sum().item()
        pairs += batch.count
    return {
        "loss": total / pairs,
        "reward_accuracy": won / pairs,
        "reward_margin": margins / pairs,
        "preferred": preferred / pairs,
        "examples": pairs,
    }
