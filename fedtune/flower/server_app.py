"""The Flower app of the server: a recipe's rounds over whatever grid Flower hands to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol, TypeAlias

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedtune.flower.grid_transport import GridTransport

Scalar: TypeAlias = bool | int | float | str


class Connect(Protocol):
    """Makes the transport over the run's grid."""

    def __call__(
        self,
        *,
        expected: int,
        least: int,
        base: str = "",
        labels: Sequence[str] = (),
        organisation: Callable[[str], str] = lambda client: "",
        may_come: Callable[[str], bool] = lambda client: True,
        on_base: Callable[[str], None] = lambda digest: None,
        note: Callable[[str], None],
        on_admitted: Callable[[str, int], None] = lambda client, examples: None,
        on_refused: Callable[[str, str, bool], None] = lambda client, reason, final: None,
        patience_s: float = 600.0,
        deadline_s: float | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> GridTransport:
        """Return it; see `GridTransport` for what is waited for."""
        ...


def server_app(run_recipe: Callable[[Connect, Mapping[str, Scalar]], None]) -> ServerApp:
    """Return the app that runs what a run's configuration names; `run_recipe` binds it and runs the rounds."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        run_recipe(partial(GridTransport, grid), dict(context.run_config))

    return app
