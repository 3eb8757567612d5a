"""Means and covariances of the inputs of layers that read heads and channels, measured in forward passes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from fedtune.errors import ClientError
from fedtune.pruning.least_squares import input_widths, moment_shapes, moments_rank, moments_to_wire
from fedtune.pruning.ranking import PruningSettings
from fedtune.pruning.structure import BlockLayout
from fedtune.seeds import derive, generator
from fedtune.tensors import Array, Tensors

NOISE = 1e-6
"""Share of a covariance's largest eigenvalue below which eigenvalues count as zero."""
SKETCH = 2
"""Columns of a sketch of a covariance, in units of the columns that are kept of it."""


class Moments:
    """Sums over the tokens that go forward, of which `result` makes moments; memory grows with n * rank, not with n^2.

    C is known by its product with a random orthonormal matrix (Nystroem's approximation, Tropp et al.,
    arXiv 1706.05736); with the identity, and exactly, where a layer is no wider than the sketch.
    """

    def __init__(self, settings: PruningSettings, layout: BlockLayout, *, key: int, device: torch.device) -> None:
        self._settings, self._layout = settings, layout
        self._tests = {
            name: sketch_matrix(n, SKETCH * moments_rank(settings, n), derive(key, "prune.moments", place)).to(device)
            for place, (name, n) in enumerate(input_widths(layout).items())
            if settings.repair == "least-squares"
        }
        self._sums: dict[str, torch.Tensor] = {}
        self._tokens = 0

    def add(self, name: str, x: torch.Tensor, mask: torch.Tensor) -> None:
        """Add a layer's input (batch, time, n) where the mask is 1, x in at least 32 bits."""
        rows = x[mask.bool()]  # (tokens, n)
        if name == next(iter(input_widths(self._layout))):
            self._tokens += len(rows)
        parts = {"mean": rows.double().sum(dim=0)}
        if name in self._tests:
            parts["square"] = rows.double().square().sum(dim=0)
            # Products in float32: sums of rounding errors over tokens are far below the ridge.
            parts["product"] = (rows.T @ (rows @ self._tests[name].to(rows.dtype))).double()
        for part, value in parts.items():
            key = f"{name}.{part}"
            self._sums[key] = self._sums[key] + value if key in self._sums else value

    def result(self) -> Tensors:
        """Return the moments as they travel.

        Raises:
            ClientError: if nothing went forward, or a sum is not finite.
        """
        if not self._tokens:
            raise ClientError("moments: expected at least one token; got none; give the client more data")
        moments: dict[str, Array] = {}
        for name in input_widths(self._layout):
            mean = self._sums[f"{name}.mean"] / self._tokens
            moments[f"{name}.mean"] = mean.cpu().numpy()
            if name in self._tests:
                moments |= {f"{name}.{side}": part for side, part in self._covariance(name, mean).items()}
        if not all(np.isfinite(array).all() for array in moments.values()):
            raise ClientError("moments: expected finite numbers; got others; use another model.dtype")
        assert moments.keys() == moment_shapes(self._settings, self._layout).keys()
        return moments_to_wire(moments)

    def _covariance(self, name: str, mean: torch.Tensor) -> Mapping[str, Array]:
        test = self._tests[name].double()  # (n, sketch)
        variance = (self._sums[f"{name}.square"] / self._tokens - mean.square()).clamp(min=0)
        product = self._sums[f"{name}.product"] / self._tokens - torch.outer(mean, mean @ test)
        if not torch.isfinite(product).all():
            raise ClientError(f"moments, {name}: expected finite numbers; got others; use another model.dtype")
        u = leading_factor(product.cpu(), test.cpu(), moments_rank(self._settings, len(mean)))
        rest = (variance.cpu() - u.square().sum(dim=1)).clamp(min=0)
        return {"deviation": rest.sqrt().numpy(), "u": u.numpy()}


def sketch_matrix(n: int, columns: int, key: int) -> torch.Tensor:
    """Return a random orthonormal (n, columns); the identity where there are n columns or more."""
    if columns >= n:
        return torch.eye(n)
    drawn = generator(key).standard_normal((n, columns))
    # By torch and not by numpy: the number of its threads, and with it the last bits, is the client's own setting.
    orthonormal: torch.Tensor = torch.linalg.qr(torch.from_numpy(drawn))[0]
    return orthonormal.float()


def leading_factor(product: torch.Tensor, test: torch.Tensor, rank: int) -> torch.Tensor:
    """Return U (n, rank) with U U^T near C, from C @ test and an orthonormal test matrix, float64."""
    core = test.T @ product
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    # What is left out here is noise of products in float32, by whose roots the factor would be divided.
    known = values > NOISE * values.abs().max()
    factor = product @ (vectors[:, known] / values[known].sqrt())  # (n, up to sketch)
    left, lengths, _ = torch.linalg.svd(factor, full_matrices=False)
    leading = left[:, :rank] * lengths[:rank]
    return torch.nn.functional.pad(leading, (0, rank - leading.shape[1]))
