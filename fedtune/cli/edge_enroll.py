"""The command `fedtune-edge enroll`: this device's keys and request, and what the operator sends back."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.cli.edge_options import DONE, PROGRAM, RETRY, SITE, ask

if TYPE_CHECKING:
    from fedtune.edge.enrolment import Places


def add_arguments(own: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    own.add_argument(
        "sent", metavar="CODE", nargs="*", help="what the operator sent back: a code, a file, or - to paste"
    )
    own.add_argument(
        "--site", metavar="SITE", type=Path, default=SITE, help=f"this device's file, to be written ({SITE})"
    )
    own.add_argument("--identity", metavar="DIR", type=Path, help="folder of its keys (identity, beside that file)")
    own.add_argument("--name", help="lasting name of this device (its host's name with four digits)")
    own.add_argument("--org", help="organisation that it belongs to (the device itself)")
    own.add_argument("--server", metavar="HOST:PORT", help="where the server is")
    own.add_argument("--model", metavar="DIR", default="model", help="folder of the base model's bundle (model)")
    own.add_argument("--data", metavar="PATH", default="data", help="file or folder of your texts (data)")
    own.add_argument("--proxy", metavar="URL", default="", help="HTTP proxy to enrol through, with an invitation")
    own.add_argument("--no-wait", dest="wait", action="store_false", help="do not wait until it is signed")
    own.add_argument("--fingerprint", metavar="HEX", help="of the federation, as the operator reads it out")
    own.add_argument("--yes", action="store_true", help="ask nothing")


def run(options: argparse.Namespace) -> int:
    """Ask for an enrolment, or finish one."""
    from fedtune.edge.enrolment import places

    where = places(options.site, options.identity)
    if not options.sent:
        return begin(options, where)
    from fedtune.link.pki import codes

    given = options.sent[0] if len(options.sent) == 1 else "".join(options.sent)
    if codes.kind_of(given) == "invitation":
        return enrol_online(options, where, given)
    return finish(options, where, given)


def begin(options: argparse.Namespace, where: Places) -> int:
    """Write keys and request, and say what to do with them."""
    from fedtune.edge import enrolment
    from fedtune.link.pki import codes

    name = options.name or enrolment.known_name(where) or enrolment.proposed_name()
    if options.name is None and may_ask(options):
        name = answer("Name of this device", name)
    enrolment.check_name("--name", name)
    asked = enrolment.request(where, name=name, org=enrolment.check_name("--org", options.org or name))
    print(f"{asked.name}: wrote {asked.path}; the keys stay in {where.identity}")
    print(f"fingerprint, to read out to the operator: {asked.fingerprint}")
    print(f"send the operator this line, or the file:\n\n{codes.encode('request', asked.data)}\n")
    print(f"next, with what comes back: {PROGRAM} enroll CODE --server HOST:PORT")
    return DONE


def enrol_online(options: argparse.Namespace, where: Places, given: str) -> int:
    """Enrol this device with a one-time code over the network; the operator's signature may take a while."""
    import time

    from fedtune.deployment import enrol_site

    def wait(seconds: float) -> bool:
        if options.wait:
            time.sleep(seconds)
        return bool(options.wait)

    lines = enrol_site.enrol(
        given,
        where.identity,
        proxy=options.proxy,
        wait=wait,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    if lines is None:
        print("not signed yet; the same command asks again", file=sys.stderr)
        return RETRY
    print("\n".join(lines[:-1]))
    code = enrol_site.read_code(given)
    return write_own_file(options, where, code.name, options.server or code.server)


def finish(options: argparse.Namespace, where: Places, given: str) -> int:
    """Install what the operator has sent, and write this device's file if there is none."""
    import time

    from fedtune.edge import enrolment
    from fedtune.link.pki import codes
    from fedtune.link.pki.identity import format_time

    bundle = codes.read_given("bundle", given, "fedtune enroll sign, at the operator", sys.stdin)
    check_federation(options, where, enrolment.anchors_fingerprint(bundle))
    accepted = enrolment.accept(where, bundle, now=int(time.time()))
    until = format_time(accepted.not_after)
    print(f"{accepted.name} is enrolled in {accepted.federation}, until {until}")
    print(f"fingerprint of the federation: {enrolment.own_anchors(where)}")
    if (asked := enrolment.earlier_request(where, accepted.name)) is not None:
        print(f"fingerprint of this device:    {asked.fingerprint}")
    address = options.server or ""
    if not address and not where.site.exists() and may_ask(options):
        address = answer("Address of the server (HOST:PORT)", "")
    return write_own_file(options, where, accepted.name, address)


def write_own_file(options: argparse.Namespace, where: Places, name: str, address: str) -> int:
    """Write this device's file if there is none, and say what is still missing."""
    from fedtune.edge import enrolment

    if enrolment.write_site(where, name, address=address, model=options.model, data=options.data):
        print(f"wrote {where.site}")
    elif options.server:
        print(f"{where.site} stays as it is: [link] address = {options.server!r} is to be written there by hand")
    faults = list(enrolment.missing(where.site))
    for fault in faults:
        print(f"still missing: {fault}")
    print(
        f"next: {PROGRAM} {'inspect' if not faults else 'join'}"
        + (f", then {PROGRAM} join" if not faults else " says so again")
    )
    return DONE


def check_federation(options: argparse.Namespace, where: Places, actual: str) -> None:
    """Compare the federation's fingerprint with what the operator has read out, where somebody can.

    Raises:
        ConfigError: if it is another.
    """
    from fedtune.edge import enrolment
    from fedtune.errors import ConfigError, Fault
    from fedtune.link.pki.identity import ROOT
    from fedtune.link.pki.signing import is_fingerprint

    if options.fingerprint is not None:
        if not is_fingerprint(options.fingerprint, actual):
            hint = "ask the operator again; if it differs, the code was changed on its way"
            raise ConfigError(Fault("--fingerprint", actual, repr(options.fingerprint), hint))
        return
    # Of a federation that was compared before, a renewal asks nothing.
    known = (where.identity / ROOT).exists() and enrolment.own_anchors(where) == actual
    if known or not may_ask(options):
        return
    print(f"fingerprint of the federation: {actual}", file=sys.stderr)
    if not ask("Is that what the operator reads out?"):
        expected, hint = (
            "a federation whose fingerprint is what the operator reads out",
            "nothing was changed; ask them",
        )
        raise ConfigError(Fault("code", expected, "another", hint))


def may_ask(options: argparse.Namespace) -> bool:
    """Return whether a person can be asked: a code that is pasted takes the terminal's lines for itself."""
    return not options.yes and sys.stdin.isatty() and sys.stderr.isatty()


def answer(question: str, default: str) -> str:
    """Return what the person at the terminal answers."""
    print(question, end=f" [{default}]: " if default else ": ", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip() or default
