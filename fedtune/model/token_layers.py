"""Layers with a row for each token: the rows that an update moves name the tokens of a client's texts."""

from __future__ import annotations

from collections.abc import Sequence

from fedtune.model.base import Base


def token_layers(base: Base) -> Sequence[str]:
    """Return which trained layers and parameters of a base have a row for each token.

    These are its embeddings and, of a causal model, the output layer, tied or not: its gradient has another sign
    in the rows of the tokens that came.
    """
    tables = [base.model.get_input_embeddings()]
    if base.task == "causal":
        tables.append(base.model.get_output_embeddings())
    # By identity: the two have other names in every family, and may share one weight.
    weights = {id(table.weight) for table in tables if table is not None}
    parameters = dict(base.model.named_parameters())
    adapted = [name for name in base.modules if id(base.model.get_submodule(name).weight) in weights]
    # Virtual tokens are no parameters of the base: they have rows of their own, and none for a token of a text.
    return [*adapted, *(name for name in base.saved if name in parameters and id(parameters[name]) in weights)]
