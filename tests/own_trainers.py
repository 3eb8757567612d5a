"""Trainings of a user's own, as a recipe or a site's file names them; nothing here knows more of fedtune than they."""

from __future__ import annotations

from typing import Any

import torch


def sgd(model: Any, data: Any, order: Any) -> None:
    """Train as a loop of one's own does: plain steps over the rows, one after the other."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=order.learning_rate)
    rows = data.dataset().with_format("torch")
    for step in range(order.steps):
        row = rows[(order.seed + step) % len(rows)]
        model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def broken_in_round_2(model: Any, data: Any, order: Any) -> None:
    """Train, and fail in the second round."""
    if order.round == 2:
        raise ValueError("no more")
    sgd(model, data, order)


def keeps_a_file(model: Any, data: Any, order: Any) -> None:
    """Train, with a count of the rounds in the folder that a client has of its own."""
    order.folder.mkdir(parents=True, exist_ok=True)
    with (order.folder / "rounds").open("a") as file:
        file.write(f"{order.round}\n")
    sgd(model, data, order)


NO_FUNCTION = 3
