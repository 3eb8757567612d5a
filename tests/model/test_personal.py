"""The steps of personal models on a scalar quadratic, whose ends are known, and on a tiny model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedtune.messages import Personal, Training
from fedtune.model import train as training_module
from fedtune.model.personal import Work, ditto, fedrep, pfedme
from fedtune.tensors import Array

A, W = 1.0, 2.0
"""The client's optimum, and the server's value."""


class Scalars(nn.Module):
    """Loss (theta - a)^2 / 2 in each of its parameters, whatever the examples."""

    def __init__(self, **values: float) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(torch.tensor([value])))

    def __getitem__(self, name: str) -> nn.Parameter:
        return self.get_parameter(name)

    def loss(self) -> torch.Tensor:
        return torch.stack([(parameter - A).square().sum() / 2 for parameter in self.parameters()]).sum()


@pytest.fixture(autouse=True)
def on_scalars(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the loss of the scalars in place of one on tokens."""

    def backward(base: Any, parts: Any, training: Training) -> float:
        loss = base.model.loss()
        if loss.requires_grad:
            loss.backward()
        return float(loss.detach())

    monkeypatch.setattr(training_module, "backward", backward)
    monkeypatch.setattr(training_module, "collate", lambda *_, **__: SimpleNamespace(count=1, tokens=1))


def work(model: Scalars, personal: Personal, **training: Any) -> Work:
    base: Any = SimpleNamespace(model=model, device=torch.device("cpu"), task="causal")
    settings = Training(**{"batch": 1, "optimizer": "sgd", "clip_norm": None, "learning_rate": 0.1, **training})
    return Work(base, [None, None], settings, personal, key=1, client="ann")  # type: ignore[list-item]


def value(parameter: nn.Parameter) -> float:
    return float(parameter.detach())


def towards(**values: float) -> dict[str, Array]:
    return {name: np.array([number], np.float32) for name, number in values.items()}


@pytest.mark.parametrize("strength", [0.0, 0.5, 4.0])
def test_ditto_ends_between_the_client_s_optimum_and_the_server_s_value(strength: float) -> None:
    model = Scalars(v=5.0)
    ditto(work(model, Personal("ditto", strength=strength), steps=400), {"v": model["v"]}, towards(v=W))
    assert value(model["v"]) == pytest.approx((A + strength * W) / (1 + strength), abs=1e-6)


def test_by_hand_one_step_of_ditto() -> None:
    model = Scalars(v=5.0)
    ditto(work(model, Personal("ditto", strength=0.5, rate=0.2, steps=1), steps=9), {"v": model["v"]}, towards(v=W))
    assert value(model["v"]) == pytest.approx(5.0 - 0.2 * ((5.0 - A) + 0.5 * (5.0 - W)), abs=1e-6)


def test_a_strong_pull_returns_the_server_s_value() -> None:
    model = Scalars(v=W)
    ditto(work(model, Personal("ditto", strength=1e6, rate=1e-7), steps=400), {"v": model["v"]}, towards(v=W))
    assert value(model["v"]) == pytest.approx(W, abs=1e-5)


@pytest.mark.parametrize("strength", [0.5, 15.0])
def test_theta_of_pfedme_is_the_proximal_point_and_w_follows_it(strength: float) -> None:
    model = Scalars(v=W)
    personal = Personal("pfedme", strength=strength, rate=1 / (2 * (1 + strength)), steps=60)
    _, theta = pfedme(work(model, personal, steps=1, learning_rate=0.01), {"v": model["v"]})
    expected = (A + strength * W) / (1 + strength)
    assert float(theta["v"][0]) == pytest.approx(expected, abs=1e-6)
    assert value(model["v"]) == pytest.approx(W - 0.01 * strength * (W - expected), abs=1e-6)


def test_w_of_pfedme_moves_after_every_mini_batch_and_not_once_an_epoch() -> None:
    model = Scalars(v=W)
    personal = Personal("pfedme", strength=1.0, rate=0.25, steps=60)
    pfedme(work(model, personal, steps=3, learning_rate=0.1), {"v": model["v"]})
    w = W
    for _ in range(3):
        w -= 0.1 * (w - (A + w) / 2)
    assert value(model["v"]) == pytest.approx(w, abs=1e-6)


def test_fedrep_trains_what_stays_first_and_the_rest_with_that_frozen() -> None:
    order = list[tuple[bool, bool]]()
    model = Scalars(head=5.0, body=7.0)
    hook = model.loss

    def loss() -> torch.Tensor:
        order.append((model["head"].requires_grad, model["body"].requires_grad))
        return hook()

    model.loss = loss  # type: ignore[method-assign]
    personal = Personal("fedrep", keep=["head"], rate=0.5, steps=2)
    fedrep(work(model, personal, steps=1), {"head": model["head"], "body": model["body"]})
    assert order == [(True, False), (True, False), (False, True)]
    assert value(model["head"]) == pytest.approx(A + 4.0 / 4)  # two halvings
    assert value(model["body"]) == pytest.approx(A + 6.0 * 0.9)  # one step of the client's own rate
