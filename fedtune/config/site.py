"""A client's own file: its name, its base and its data; all else is in the server's assignments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Interval

from fedtune.config.adapter_kinds import layers_faults
from fedtune.config.binding import bind_name
from fedtune.config.presets import expand_data_preset
from fedtune.config.reading import apply_overrides, parse, read
from fedtune.config.recipe import PYTHON
from fedtune.config.tables import apply_rule, bind_table, bind_value, freeze_table, unknown_keys
from fedtune.data.federation import Federation, Shard
from fedtune.data.settings import GROUP, DataSettings
from fedtune.data.settings import faults as data_faults
from fedtune.errors import ConfigError, Fault
from fedtune.link.client.conditions import Conditions
from fedtune.link.client.http_proxy import parse_proxy
from fedtune.link.settings import ENVIRONMENT_PROXY, JoinSettings, Policy
from fedtune.link.settings import validate_policy as check_policy
from fedtune.model.settings import AdapterSettings, ModelSettings
from fedtune.store.seeds import MANIFEST as TENSORS

WHOLE: Mapping[str, Any] = {"kind": "iid", "clients": 1}
"""The split of a site whose file has none: all rows are its own."""


@dataclass(frozen=True)
class Layers:
    """Which layers get an adapter; the table `adapter` of a site. The server says the rank."""

    targets: Sequence[str] = ()
    """Module names or their last parts, as in the run's recipe; none where virtual tokens train."""
    modules_to_save: Sequence[str] = ()
    """Modules trained in full beside the adapter, as in the run's recipe."""
    layers: str | None = None
    """Only these layers (blocks), as in the run's recipe: numbers such as "8-15", or the ends of an emulator."""
    kind: Literal["lora", "prefix", "p-tuning", "prompt"] = "lora"
    """Kind of adapter, as in the run's recipe; likewise the keys below."""
    tokens: Annotated[int, Interval(ge=1, le=65_536)] = AdapterSettings.tokens
    """Virtual tokens of the kinds prefix, p-tuning and prompt."""
    hidden: Annotated[int, Interval(ge=1, le=65_536)] | None = None
    """Width of P-tuning's encoder between its layers; none: that of the base's embeddings."""
    send: Literal["embeddings", "encoder"] = "embeddings"
    """What of P-tuning trains and travels."""
    init_text: str | None = None
    """A text whose tokens' embeddings a prompt starts from; none: those of tokens drawn by the seed."""

    @property
    def settings(self) -> AdapterSettings:
        return AdapterSettings(
            rank=1,
            targets=self.targets,
            modules_to_save=self.modules_to_save,
            layers=self.layers,
            kind=self.kind,
            tokens=self.tokens,
            hidden=self.hidden,
            send=self.send,
            init_text=self.init_text,
        )


@dataclass(frozen=True)
class OwnTraining:
    """How a site trains, where fedtune does not; the table `client` of a site."""

    trainer: str
    """A function that trains the adapter in place of fedtune: `package.module:function`, which Python can import."""


@dataclass(frozen=True)
class SiteSettings:
    """A client's own file: its name, its base, its data, and what it allows."""

    name: str
    """The client's lasting name, under which it is enrolled."""
    model: ModelSettings
    adapter: Layers | None
    """Needed by a client with torch; a device takes all layers of its bundle without it."""
    data: DataSettings
    seed: int
    """The run's seed. A classification head that the base lacks is drawn from it, and must be the same at every site.
    """
    split: bool
    """Whether the data are divided, and the site's part is the one of its name."""
    root: Path
    """Folder of the file; relative paths in it are relative to this."""
    link: JoinSettings | None = None
    """How it connects to a server of fedtune's own; none for a site on a SuperNode."""
    policy: Policy = field(default_factory=Policy)
    """What it agrees to do over the link."""
    client: OwnTraining | None = None
    """None: fedtune trains."""

    @property
    def state(self) -> Path:
        """Folder of the outbox, the audit log and a pause."""
        return (self.root / (self.link.state if self.link is not None else JoinSettings.state)).resolve()


TABLES: Mapping[str, type[Any]] = {
    "model": ModelSettings,
    "adapter": Layers,
    "data": DataSettings,
    "link": JoinSettings,
    "policy": Policy,
    "client": OwnTraining,
}
"""The settings by their table."""


LOADED: Mapping[str, Mapping[str, Any]] = {
    "model": {"base": PYTHON},
    "data": {"source": PYTHON, "split": {"kind": "key", "by": GROUP}},
}
"""Keys of a site whose base and data are in the Python process that joins."""


def bind_site(path: Path | Mapping[str, Any], *, loaded: bool = False) -> SiteSettings:
    """Read, check and freeze a site file.

    Args:
        path: of the file; or its tables.
        loaded: whether base and data are Python objects, whatever the file names.

    Raises:
        ConfigError: with every fault at once, or the reason why the file cannot be read.
    """
    if isinstance(path, Path) and not path.is_file():
        fault = Fault("", "a site file", "no such file", "fedtune site init writes one")
        raise ConfigError(fault, source=str(path))
    return bind_table_of_site(*read(path), loaded=loaded)


def bind_site_text(text: str, path: Path) -> SiteSettings:
    """Check and freeze the text of a site file that is to be written to a path.

    Raises:
        ConfigError: as `bind_site`.
    """
    return bind_table_of_site(path.name, path.stem, path.absolute().parent, parse(text, path.name))


def bind_table_of_site(
    label: str, stem: str, root: Path, read_table: Mapping[str, Any], *, loaded: bool = False
) -> SiteSettings:
    """Check and freeze the tables of a site file; see `bind_site`.

    Raises:
        ConfigError: with every fault at once.
    """
    faults: list[Fault] = []
    own = {name: {**read_table.get(name, {}), **keys} for name, keys in LOADED.items()} if loaded else {}
    table = expand_data_preset(apply_overrides({**read_table, **own}, (), faults))
    faults.extend(unknown_keys(table, ("name", "seed", *TABLES), ""))
    needed = ("model", "data") if loaded or names_bundle(table, root) else ("model", "adapter", "data")
    for name in needed:
        if name not in table:
            faults.append(Fault(name, f"the table [{name}]", "nothing"))
    data = table.get("data")
    if isinstance(data, dict):
        table["data"] = {"split": dict(WHOLE), **data}
    values = {name: bind_table(cls, table[name], name, faults) for name, cls in TABLES.items() if name in table}
    values |= {"root": root, "adapter": values.get("adapter")}
    values["split"] = isinstance(data, dict) and "split" in data
    values["name"] = bind_name(table.get("name", stem), faults)
    values["seed"] = bind_value(Annotated[int, Ge(0)], table.get("seed", 0), "seed", faults)
    site = freeze_table(SiteSettings, values, complete=not faults)
    for rule in (lambda settings: data_faults(settings.data), policy_faults, adapter_faults, proxy_faults):
        faults.extend(apply_rule(rule, site))
    if faults:
        raise ConfigError(faults, source=label)
    return site


def adapter_faults(site: SiteSettings) -> Iterator[Fault]:
    """Yield layers that are missing where factors train, and such as are there where virtual tokens do."""
    if site.adapter is None:
        return
    layers = [*site.adapter.targets, *site.adapter.modules_to_save]
    if site.adapter.kind == "lora" and not site.adapter.targets:
        yield Fault("adapter.targets", "at least one module", "nothing", 'targets = ["all-linear"] takes all')
    yield from layers_faults(site.adapter.layers)
    if site.adapter.kind != "lora" and (layers or site.adapter.layers):
        expected = f"nothing with adapter.kind = {site.adapter.kind!r}, whose virtual tokens belong to no layer"
        key = "targets" if site.adapter.targets else "modules_to_save" if layers else "layers"
        yield Fault(f"adapter.{key}", expected, repr([*layers, site.adapter.layers][0]), "leave it out")


def proxy_faults(site: SiteSettings) -> Sequence[Fault]:
    """Return what is wrong with a site's proxy, before the network is asked; the password is in no message."""
    link = site.link
    if link is None:
        return ()
    if link.proxy_credentials and not link.proxy:
        return [Fault("link.proxy", "the proxy that link.proxy_credentials is for", "none")]
    try:
        if link.proxy not in ("", ENVIRONMENT_PROXY):
            parse_proxy(link.proxy)
    except ConfigError as error:
        return error.faults
    return ()


def names_bundle(table: Mapping[str, Any], root: Path) -> bool:
    """Return whether a site's table names a folder with a bundle for devices as its base."""
    model = table.get("model")
    base = model.get("base") if isinstance(model, Mapping) else None
    return isinstance(base, str) and (root / base / TENSORS).is_file()


def targeted_layers(site: SiteSettings, *, source: str) -> Layers:
    """Return which layers of a site with torch get an adapter.

    Raises:
        ConfigError: if the site's base is a bundle for devices.
    """
    if site.adapter is None:
        expected, got = "a base that torch loads", f"{site.model.base}, a bundle for devices"
        hint = "run fedtune-edge join, or name the base that the bundle was made of, and add the table [adapter]"
        raise ConfigError(Fault("model.base", expected, got, hint), source=source)
    return site.adapter


def own_shard(site: SiteSettings, federation: Federation, *, source: str) -> Shard:
    """Return the examples that are the site's own.

    Raises:
        ConfigError: if none of them are.
    """
    shards = federation.clients
    # Without a split all of the data belong to this client, whatever name the shard has.
    name = site.name if site.split else next(iter(shards))
    if why := federation.sits_out.get(name):
        raise ConfigError(Fault("", "", why), source=source)
    if name not in shards:
        expected = f"one of the clients of data.split ({', '.join(list(shards)[:8])})"
        raise ConfigError(Fault("name", expected, repr(name)), source=source)
    return shards[name]


def site_conditions(site: str) -> Conditions:
    """Return when the machine of a site may work, by the site's file.

    Raises:
        ConfigError: if the file is wrong.
    """
    settings = bind_site(Path(site))
    return Conditions(settings.policy, settings.state)


def policy_faults(site: SiteSettings) -> Sequence[Fault]:
    """Return what of a policy is wrong by itself, and the columns of the data that it does not allow."""
    policy = site.policy
    try:
        check_policy(policy)
    except ConfigError as error:
        return error.faults
    data = site.data
    if not policy.columns or data.source == PYTHON:
        return ()
    if not data.fields:
        return [Fault("data.fields", "every column by name, where policy.columns names some", "none")]
    return [
        Fault(f"data.fields.{part}", f"a column of policy.columns ({', '.join(policy.columns)})", repr(column))
        for part, column in sorted(data.fields.items())
        if column not in policy.columns
    ]
