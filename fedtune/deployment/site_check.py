"""The way from a site to its server, step by step, before any data or model is touched."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from fedtune.config.site import SiteSettings, bind_site
from fedtune.config.site_text import with_port
from fedtune.deployment.join import greet
from fedtune.errors import ConfigError, Fault, FedtuneError
from fedtune.link.client.http_proxy import parse_proxy, settle_proxy
from fedtune.link.client.route import Step, walk
from fedtune.link.client.session import Greeting
from fedtune.link.pki.identity import CERTIFICATE, Identity, expiry_warnings, format_time, load_identity
from fedtune.link.pki.roster import RosterFile
from fedtune.link.settings import ENVIRONMENT_PROXY, JoinSettings, Policy

State: TypeAlias = Literal["ok", "failed", "skipped"]
STEPS = ("settings", "identity", "name", "port", "proxy", "TLS", "HTTP/2", "server", "clock")
"""In the order in which they are taken; `proxy` only where there is one."""
FROM_NETWORK = STEPS.index("name")


@dataclass(frozen=True)
class Check:
    """How one step went."""

    step: str
    state: State
    text: str
    """What was seen; of a step that failed, why, and what to do."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Target:
    """What is checked: where to, and as whom."""

    link: JoinSettings
    """Its proxy is settled."""
    root: Path
    """Folder that the identity's path starts at."""
    settings: SiteSettings | None
    """Of a site file; None without one."""


def check_site(
    site: Path | None, *, server: str | None, proxy: str | None, identity: Path | None, environment: Mapping[str, str]
) -> Iterator[Check]:
    """Yield how each step to the server goes, each as soon as it is over; after one that fails the others are skipped.

    A step that needs no earlier one is taken all the same: the network is walked without an identity, too.

    Args:
        site: the site's own file; None before there is one.
        server: address in place of the file's.
        proxy: in place of the file's.
        identity: folder in place of the file's.
        environment: of the process, for its proxy.
    """
    try:
        target = target_of(site, server=server, proxy=proxy, identity=identity, environment=environment)
    except FedtuneError as error:
        yield Check("settings", "failed", sentence(error))
        yield from skip(STEPS[1:], "the settings are wrong")
        return
    yield file_check(site, target)
    known, own = identity_check(target)
    yield own
    broken = False
    for step in walk(known, target.link):
        broken = not step.ok
        yield network_check(step, target, environment)
    if broken:
        rest = STEPS[STEPS.index(step.name) + 1 :]
        yield from skip([name for name in rest if name != "proxy" or target.link.proxy], f"{step.name} failed")
    elif known is None:
        yield from skip(STEPS[-2:], "this needs an identity")
    else:
        yield from hello_checks(known, target)


def skip(steps: Sequence[str], why: str) -> Iterator[Check]:
    return (Check(step, "skipped", why) for step in steps)


def sentence(error: FedtuneError) -> str:
    """Return an error in one line: a file's faults one after the other."""
    faults = error.faults if isinstance(error, ConfigError) else ()
    return "; and ".join(map(str, faults)) or str(error)


def target_of(
    site: Path | None, *, server: str | None, proxy: str | None, identity: Path | None, environment: Mapping[str, str]
) -> Target:
    """Return what is checked.

    Raises:
        ConfigError: if the file is wrong, names no server, or its proxy is malformed.
    """
    settings = bind_site(site) if site is not None else None
    link = settings.link if settings is not None else None
    if server is not None:
        server = with_port(server)
        link = replace(link, address=server) if link is not None else JoinSettings(address=server)
    if link is None:
        hint = 'add [link] with address = "HOST:9000", or give --server'
        raise ConfigError(Fault("link", "the table [link]", "none", hint))
    if proxy is not None:
        if proxy not in ("", ENVIRONMENT_PROXY):
            parse_proxy(proxy, key="--proxy")
        link = replace(link, proxy=proxy)
    if identity is not None:
        link = replace(link, identity=str(identity.absolute()))
    host, _, port = link.address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(Fault("link.address", "HOST:PORT", repr(link.address)))
    root = settings.root if settings is not None else Path.cwd()
    return Target(settle_proxy(link, root, environment), root, settings)


def file_check(site: Path | None, target: Target) -> Check:
    if target.settings is None:
        return Check("settings", "skipped", "none given")
    return Check("settings", "ok", f"{site} is the file of {target.settings.name}, for {target.link.address}")


def identity_check(target: Target) -> tuple[Identity | None, Check]:
    """Return the identity of a site, None without a whole one, and what there is to say of it."""
    folder = (target.root / target.link.identity).resolve()
    if not (folder / CERTIFICATE).exists() and target.settings is None:
        return None, Check("identity", "skipped", f"none in {folder}; the network is checked without one")
    try:
        known = load_identity(folder, role="client", now=int(time.time()))
        if target.settings is not None and target.settings.name != known.name:
            hint = f'set name = "{known.name}", or enrol under the other name'
            got = repr(target.settings.name)
            raise ConfigError(Fault("name", f"{known.name!r}, as this site is enrolled", got, hint))
    except FedtuneError as error:
        return None, Check("identity", "failed", sentence(error))
    until = format_time(known.not_after)
    return known, Check("identity", "ok", f"{known.name} of {known.org} in {known.federation}, until {until}")


def network_check(step: Step, target: Target, environment: Mapping[str, str]) -> Check:
    """Return a step of the network, with a hint to a proxy that the environment names and the site does not use."""
    named = environment.get("https_proxy") or environment.get("HTTPS_PROXY")
    unused = not step.ok and step.name in ("name", "port") and not target.link.proxy and named
    hint = '; HTTPS_PROXY names a proxy here, which link.proxy = "environment" would use' if unused else ""
    return Check(step.name, "ok" if step.ok else "failed", step.text + hint, step.seconds)


def hello_checks(known: Identity, target: Target) -> Iterator[Check]:
    """Yield whether the server takes the site, and whether this clock agrees with all dates."""
    began = time.monotonic()
    rules = target.settings.policy if target.settings is not None else Policy()
    try:
        greeting = greet(known, target.link, rules, target.root / target.link.state)
    except FedtuneError as error:
        yield Check("server", "failed", sentence(error), time.monotonic() - began)
        yield from skip(STEPS[-1:], "the server did not take this site")
        return
    name = greeting.server.name if greeting.server is not None else "the server"
    text = f"{name} takes {known.name}: run {greeting.run}, recipe {greeting.recipe_digest.hex()[:16]}"
    yield Check("server", "ok", text, time.monotonic() - began)
    yield clock_check(known, greeting)


def clock_check(known: Identity, greeting: Greeting) -> Check:
    """Return the dates between which this clock must be, with what ends soon."""
    now = time.time()
    roster = RosterFile(known.folder / "roster", known.root).current()
    ends = [known.not_after, roster.valid_until, *([greeting.server.not_after] if greeting.server is not None else [])]
    soon = "".join(f"; {text}" for text in expiry_warnings(known, roster, now=now))
    text = f"{format_time(int(now))} here; certificates and roster are valid until {format_time(min(ends))}"
    return Check("clock", "ok", text + soon)
