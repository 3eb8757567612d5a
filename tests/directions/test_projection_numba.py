from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("numba", reason="needs the extra fast", exc_type=ImportError)

from fedtune.directions import projection_numba, projection_torch
from fedtune.directions.hadamard import Hadamard
from fedtune.directions.projection import project as reference
from fedtune.directions.space import directions
from tests.directions.test_projection_torch import check
from tests.directions.vectors import SEED, weights


@pytest.mark.parametrize(
    ("seeds", "groups"),
    [(8, 1), (8, 4), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((1, 2), (32, 1), (4096, 2)))],
)
def test_slopes_are_those_of_the_reference(seeds: int, groups: int) -> None:
    bank = directions("hadamard", seeds, [SEED], groups)
    for shape in ((1,), (4095,), (3, 4099), (4096 * 5 + 17,)):
        values = weights(shape, key=4)
        check(bank, torch.from_numpy(values), values)
    turned = torch.from_numpy(weights((70, 130), key=5)).bfloat16().t()
    check(bank, turned, turned.double().contiguous().numpy())


def test_the_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection_numba, "RUN", 2)
    values = weights((4096 * 7 + 9,), key=2)
    found = [
        projection_numba.project_runs(
            Hadamard(8, SEED),
            lambda part: values[part.start : part.stop],
            ordinal=3,
            shape=values.shape,
            rows=2,
            threads=threads,
        )
        for threads in (1, 2, 5)
    ]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
    expected = reference(directions("hadamard", 8, [SEED], 2), values, 3, values.shape)
    np.testing.assert_allclose(found[0].reshape(-1), expected, rtol=0, atol=1e-6 * float(np.abs(expected).max()))


def test_torch_projects_by_it_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[int]()

    def project_runs(*_: object, rows: int, **__: object) -> np.ndarray:
        calls.append(rows)
        return np.zeros((rows, 8))

    monkeypatch.setattr(projection_numba, "project_runs", project_runs)
    projection_torch.project(directions("hadamard", 8, [SEED], 4), torch.zeros(9), 0)
    assert calls == [4]
