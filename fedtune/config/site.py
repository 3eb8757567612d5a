"""A client's own file: its name, its base and its data; everything else is in what the server asks of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from fedtune.config.binding import Findings, bind_name, bind_table, leaf, unknown_keys
from fedtune.config.reading import apply_overrides, read
from fedtune.data.settings import DataSettings
from fedtune.data.settings import faults as data_faults
from fedtune.errors import ConfigError, Fault
from fedtune.link.client.policy import Policy
from fedtune.link.client.policy import validate_policy as check_policy
from fedtune.link.settings import JoinSettings
from fedtune.model.settings import AdapterSettings, ModelSettings

WHOLE: Mapping[str, Any] = {"kind": "iid", "clients": 1}
"""The split of a site that says none: all rows are its own."""


@dataclass(frozen=True)
class Layers:
    """Which layers get an adapter; the table `adapter` of a site. The server says the rank."""

    targets: Sequence[str]
    """Module names or their last parts, as in the run's recipe."""
    modules_to_save: Sequence[str] = ()
    """Modules trained in full beside the adapter, as in the run's recipe."""

    @property
    def settings(self) -> AdapterSettings:
        return AdapterSettings(rank=1, targets=self.targets, modules_to_save=self.modules_to_save)


@dataclass(frozen=True)
class SiteSettings:
    """What a client is made of."""

    name: str
    """The client's lasting name, under which it is enrolled."""
    model: ModelSettings
    adapter: Layers
    data: DataSettings
    seed: int
    """The run's seed. A classification head that the base lacks is drawn from it, and must be the same at every site.
    """
    split: bool
    """Whether the data are divided, and the site's part is the one of its name."""
    root: Path
    """Folder of the file; relative paths in it are relative to this."""
    link: JoinSettings | None = None
    """How it dials a server of fedtune's own; none for a site on a SuperNode."""
    policy: Policy = field(default_factory=Policy)
    """What it will do over the link."""


def bind_site(path: Path) -> SiteSettings:
    """Read, check and freeze a site file.

    Raises:
        ConfigError: with every fault at once, or the reason why the file cannot be read.
    """
    if not path.is_file():
        fault = Fault("", "a site file", "no such file", "clients/supernode/site.toml shows what stands in one")
        raise ConfigError(fault, source=str(path))
    label, stem, root, read_table = read(path)
    found = Findings()
    table = apply_overrides(read_table, (), found.faults)
    found.faults.extend(unknown_keys(table, ("name", "seed", "model", "adapter", "data", "link", "policy"), ""))
    for name in ("model", "adapter", "data"):
        if name not in table:
            found.faults.append(Fault(name, f"the table [{name}]", "nothing"))
    data, split = table.get("data", {}), False
    if isinstance(data, dict):
        split = "split" in data
        data = {"split": dict(WHOLE), **data}
    bound: dict[str, Any] = {
        "model": bind_table(ModelSettings, table["model"], "model", found) if "model" in table else None,
        "adapter": bind_table(Layers, table["adapter"], "adapter", found) if "adapter" in table else None,
        "data": bind_table(DataSettings, data, "data", found) if "data" in table else None,
        "name": bind_name(table.get("name", stem), found),
        "seed": leaf(Annotated[int, Ge(0)], table.get("seed", 0), "seed", found),
    }
    if bound["data"] is not None:
        found.faults.extend(data_faults(bound["data"]))
    if "link" in table:
        bound["link"] = bind_table(JoinSettings, table["link"], "link", found)
    if "policy" in table and (policy := bind_table(Policy, table["policy"], "policy", found)) is not None:
        bound["policy"] = policy
        found.faults.extend(policy_faults(policy, bound["data"]))
    if found.faults:
        raise ConfigError(found.faults, source=label)
    return SiteSettings(root=root, split=split, **bound)


def policy_faults(policy: Policy, data: DataSettings | None) -> Sequence[Fault]:
    """Return what of a policy is wrong by itself, and the columns of the data that it does not allow."""
    try:
        check_policy(policy)
    except ConfigError as error:
        return error.faults
    if not policy.columns or data is None:
        return ()
    if not data.fields:
        return [Fault("data.fields", "every column by name, where policy.columns names some", "none")]
    return [
        Fault(f"data.fields.{part}", f"a column of policy.columns ({', '.join(policy.columns)})", repr(column))
        for part, column in sorted(data.fields.items())
        if column not in policy.columns
    ]
