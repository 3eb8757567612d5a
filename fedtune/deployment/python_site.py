"""A site whose model, data and training are Python objects, for the link and for Flower."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.config.recipe import PYTHON, Objects
from fedtune.config.site import SiteSettings, bind_site, own_shard, targeted_layers
from fedtune.data.given import given_rows
from fedtune.deployment.patch import take_part, write_event
from fedtune.errors import ConfigError, Fault, type_of
from fedtune.link.audit_log import RecordEvent

if TYPE_CHECKING:
    from fedtune.client import site as client_site


@dataclass(frozen=True)
class Site:
    """One client of a federation in Python: what it holds, and what trains there.

    `join` connects it to a server of fedtune's own, `client_app` makes it a Flower ClientApp. In a simulation the
    same objects are arguments of `fedtune.simulate`: model, data by client, and trainer.
    """

    name: str
    """The client's lasting name, under which it is enrolled."""
    model: Any
    """A folder or hub name; or a transformers model and its tokenizer as a pair."""
    data: Any
    """Rows, each a mapping from column to value, or a `datasets.Dataset`; or a mapping with the rows to `train` on and
    those `held_out`."""
    trainer: Callable[..., object] | str | None = None
    """Trains the adapter: a function as in `fedtune.simulate`, or its name; None: fedtune trains."""
    targets: Sequence[str] = ("all-linear",)
    """Layers that get an adapter, as in the run's recipe."""
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """More of a site's file, such as {"policy": {"min_examples": 20}, "data": {"max_tokens": 256}}."""

    def join(
        self,
        server: str,
        *,
        identity: str | Path = "identity",
        agree: Callable[[str], bool] = lambda recipe: False,
        record: RecordEvent | None = None,
    ) -> Path | None:
        """Take part in the run of a server until it is over; return the folder of its result, if this site gets one.

        Args:
            server: HOST:PORT.
            identity: folder of the site's keys, as `fedtune enroll` made it.
            agree: asked with the recipe before the site takes part in a run, if its policy has `ask`.
            record: receives the link's events; without it they are written to standard error.

        Raises:
            ConfigError: if something must be changed before this can succeed.
        """
        link = {**self.tables.get("link", {}), "address": server, "identity": str(identity)}
        settings = self._settings({**self.tables, "link": link})
        result = take_part(self._load(settings), settings, None, agree, record or write_event)
        return Path(result) if result else None

    def client_app(self) -> Any:
        """Return the Flower ClientApp of this site, for a SuperNode; base and data are loaded with the first message.

        Raises:
            ExtraError: if Flower is not installed.
        """
        from fedtune.flower.client_app import client_app

        @cache
        def load() -> client_site.Site:
            return self._load(self._settings(self.tables))

        return client_app(lambda node, run: load())

    def _settings(self, tables: Mapping[str, Any]) -> SiteSettings:
        adapter = {"targets": list(self.targets), **tables.get("adapter", {})}
        return bind_site({**tables, "name": self.name, "adapter": adapter}, loaded=True)

    def _load(self, settings: SiteSettings) -> client_site.Site:
        """Return the client with its base and its data.

        Raises:
            ConfigError: if the model or the data are not such as are expected.
        """
        from fedtune.client.named_trainer import own_trainer
        from fedtune.client.site import Site as Loaded
        from fedtune.client.site import load_site, written_day
        from fedtune.model.settings import same_everywhere

        if not self.data:
            raise ConfigError(Fault("data", "rows, or a datasets.Dataset", type_of(self.data)))
        by_name = isinstance(self.model, str | Path)
        model = replace(settings.model, base=str(self.model) if by_name else PYTHON)
        federation, base = load_site(
            same_everywhere(model),
            targeted_layers(settings, source="").settings,
            settings.data,
            seed=settings.seed,
            root=settings.root,
            objects=Objects(model=None if by_name else self.model, data=given_rows({self.name: self.data})),
            least_classes=1,
        )
        shard = own_shard(settings, federation, source="")
        return Loaded(
            settings.name,
            base,
            shard.train,
            federation.labels,
            settings.model.threads,
            held_out=shard.held_out,
            scores=settings.policy.scores,
            policy=settings.policy,
            measures_speed=True,
            date=written_day(settings.model, settings.data, federation, base),
            own=own_trainer(self.trainer, rows=self.data, path="trainer"),
        )
