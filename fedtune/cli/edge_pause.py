"""The commands `fedtune-edge pause` and `resume`: the owner of a device says when it may work."""

from __future__ import annotations

import argparse

from fedtune.cli.edge_options import DONE, add_site, expect_site


def add_pause_arguments(own: argparse.ArgumentParser) -> None:
    """Add the arguments of `pause`."""
    add_site(own)
    how_long = own.add_mutually_exclusive_group()
    how_long.add_argument("--for", dest="duration", metavar="TIME", help='such as "90m", "2h" or "1d"')
    how_long.add_argument("--until", metavar="HH:MM", help="the next time that this device's clock shows it")


def pause(options: argparse.Namespace) -> int:
    """Order a pause, which a running process obeys within seconds, between two steps of its training."""
    from datetime import datetime, timedelta

    from fedtune.config.site import bind_site
    from fedtune.link.client import pause as orders
    from fedtune.store.lock import holder

    seconds = None
    if options.duration is not None:
        seconds = orders.parse_duration(options.duration)
    elif options.until is not None:
        seconds = orders.seconds_until(options.until, datetime.now())
    expect_site(options.site)
    state = bind_site(options.site).state
    orders.pause(state, seconds)
    ends = "resume" if seconds is None else f"{datetime.now() + timedelta(seconds=seconds):%a %H:%M}"
    process = holder(state)
    print(f"paused until {ends}; {'it stops within seconds' if process is not None else 'it is not running'}")
    return DONE


def resume(options: argparse.Namespace) -> int:
    """End a pause."""
    from fedtune.config.site import bind_site
    from fedtune.link.client import pause as orders

    expect_site(options.site)
    print("resumed" if orders.resume(bind_site(options.site).state) else "it was not paused")
    return DONE
